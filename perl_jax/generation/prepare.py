"""Prepares weights for decoding, which reads all of them for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from perl_jax.adapters import combine
from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import is_quantised
from perl_jax.generation import fused
from perl_jax.generation.config import SamplingConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees
from perl_jax.types import Tree


def prepare_for_decoding(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    config: SamplingConfig,
    tokens: int,
    merge: Callable[[Tree, Adapter], Tree] = combine.merge,
    fuse: Callable[[Tree, Adapter | None], Tree] = fused.fuse,
) -> tuple[Tree, Adapter | None]:
    """Returns (base, adapter) in the form that decoding reads.

    The adapter is merged into a copy of the base where `should_merge` says so, and is None then.
    Full tuning's weights replace the base, cast to the activations' dtype, as every product would
    do. Attention's projections are fused if the config says so and `fused.fusible` allows it.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        config: How decoding is computed.
        tokens: Number of tokens that will be computed, prompts included.
        merge: (kernels that the adapter changes, adapter) -> merged kernels.
        fuse: (attention's leaves, adapter) -> fused leaves (`fused.fuse`).
    """
    if adapter is not None and adapter.weights is not None:
        base, adapter = cast_frozen_role(adapter, lm.config.dtype).weights, None
    if adapter is not None and should_merge(base, adapter, config, tokens):
        merged = trees.named_leaves(merge(adapted_kernels(base, adapter), adapter))
        # The merged policy needs no adapter, and sampling does not read the adapter's head.
        base, adapter = trees.map_named(merged.get, base), None
    if config.fused and fused.fusible(base, adapter):
        attention = fuse(base["layers"]["attention"], adapter)
        base, adapter = (
            base | {"layers": base["layers"] | {"attention": attention}},
            fused.without_attention(adapter),
        )
    return base, cast_pairs(adapter, lm.config.dtype)


def cast_pairs(adapter: Adapter | None, dtype: str) -> Adapter | None:
    """Returns the adapter with its low-rank pairs in the activations' dtype `dtype`.

    Every product would cast them anyway. DoRA adapters are returned unchanged, because their norms
    need the pairs in full precision.
    """
    if adapter is None or (adapter.config is not None and adapter.config.dora):
        return adapter
    if all(leaf.dtype == dtype for leaf in jax.tree.leaves((adapter.lora, adapter.under))):
        return adapter
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return dataclasses.replace(adapter, lora=cast(adapter.lora), under=cast(adapter.under))


def should_merge(base: Tree, adapter: Adapter | None, config: SamplingConfig, tokens: int) -> bool:
    """Returns whether `prepare_for_decoding` merges the adapter; shapes and dtypes alone decide.

    Args:
        base: The frozen base.
        adapter: The adapter. None, or without LoRA leaves: False.
        config: `config.adapters` is applied (False), merged (True) or auto (`merging_pays`).
        tokens: Number of tokens that will be computed.
    """
    if adapter is None or adapter.lora is None or config.adapters == "applied":
        return False
    return config.adapters == "merged" or merging_pays(base, adapter, tokens)


def merging_pays(base: Tree, adapter: Adapter, tokens: int) -> bool:
    """Returns whether merging costs fewer operations than applying the adapter to `tokens` tokens.

    Merging costs 2 R D F operations per matrix once, applying 2 R (D + F) per token. For kernels
    that are not float32 the answer is False: rounding to bfloat16 would lose small updates, and the
    sampled policy would differ from the trained one.

    Args:
        base: The frozen base.
        adapter: The adapter.
        tokens: Number of tokens that will be computed.
    """
    kernels = jax.tree.leaves(adapted_kernels(base, adapter), is_leaf=is_quantised)
    if any(is_quantised(leaf) or leaf.dtype != jnp.float32 for leaf in kernels):
        return False
    shapes = [leaf.shape[1:] for leaf in kernels]
    return sum(d * f for d, f in shapes) < tokens * sum(d + f for d, f in shapes)


def adapted_kernels(base: Tree, adapter: Adapter) -> dict[str, Tree]:
    """Returns the base's kernels that an adapter changes, as a tree of the same paths.

    Example of a path: `layers/attention/q/kernel`.
    """
    moved = combine.adapted_modules(adapter)
    out: dict[str, Tree] = {}
    for name, leaf in trees.named_leaves(base, is_leaf=is_quantised).items():
        if name.endswith("/kernel") and name.removesuffix("/kernel") in moved:
            trees.insert(out, name, leaf)
    return out
