"""Sums of adapters, and adapters merged into a base.

The names of the functions say what the sum is for: `stack` puts one adapter on top of another,
`average` forms a weighted sum, `merge` adds an adapter to the kernels of the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import LINEAR, Adapter, LoRAConfig, target_of
from perl_jax.adapters.quantise import is_quantised
from perl_jax.errors import require
from perl_jax.runtime import precision, trees
from perl_jax.types import Tree


def frozen_pairs(adapter: Adapter, layers: int, factor: float = 1.0) -> Tree:
    """Returns an adapter's LoRA leaves in the form of `Adapter.under`.

    The leaves cover all layers (zeros where there is no adapter). B includes the scale.

    Args:
        adapter: The adapter; it must have LoRA leaves.
        layers: Number of layers of the model.
        factor: Multiplies B, and so the adapter's output.

    Raises UserError for DoRA, because its output is not a sum of base and adapter.
    """
    config = adapter.lora_config
    require(not config.dora, "A DoRA adapter cannot lie under another adapter.")
    adapted = jnp.array(config.adapted_layers(layers))
    out: dict = {}
    for name, leaf in trees.named_leaves(adapter.lora).items():
        leaf = (
            leaf if name.endswith("lora_a") else leaf * (factor * config.scale_of(target_of(name)))
        )
        whole = jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[adapted].set(leaf)
        trees.insert(out, name.replace("lora_", "under_"), whole)
    return out


def summed_pairs(adapter: Adapter, layers: int) -> Tree:
    """Returns the pairs of `lora` and `under` together, in the form of `Adapter.under`.

    Args:
        adapter: The adapter; DoRA raises UserError.
        layers: Number of layers of the model.
    """
    own = [] if adapter.lora is None else [frozen_pairs(adapter, layers)]
    return _concatenated(own + ([] if adapter.under is None else [adapter.under]))


def stack(frozen: Adapter, fresh: Adapter, layers: int) -> Adapter:
    """Returns an adapter that trains `fresh` on top of `frozen`.

    Its output is the sum of both and of the frozen pairs under either.

    Args:
        frozen: The adapter whose LoRA leaves and frozen pairs stay fixed.
        fresh: The adapter whose LoRA leaves are trained; its other fields are kept.
        layers: Number of layers of the model.

    Raises UserError if either is a DoRA adapter.
    """
    parts = [summed_pairs(frozen, layers)] + ([] if fresh.under is None else [fresh.under])
    require(not fresh.lora_config.dora, "A DoRA adapter cannot go on top of another adapter.")
    return dataclasses.replace(fresh, under=_concatenated(parts))


def _concatenated(parts: Sequence[Tree]) -> Tree:
    """Returns pairs whose sum is that of all parts, concatenated along the rank.

    Args:
        parts: Trees in the form of `Adapter.under`; a module may be missing in some of them.
    """
    out: dict = {}
    names = dict.fromkeys(name for part in parts for name in trees.named_leaves(part))
    for name in names:
        leaves = [found[name] for found in map(trees.named_leaves, parts) if name in found]
        trees.insert(out, name, jnp.concatenate(leaves, axis=-1 if name.endswith("_a") else -2))
    return out


def average(adapters: Sequence[Adapter], weights: Sequence[float], layers: int) -> Adapter:
    """Returns an adapter whose update is sum_i w_i s_i A_i B_i, and whose head is sum_i w_i head_i.

    For weight-averaged reward models (Rame et al. 2024, arXiv 2401.12187). The average is exact:
    the pairs are concatenated along the rank, so the new rank is the sum of ranks, and the scale is
    1. Averaging A and B separately would add cross terms A_i B_j.

    Args:
        adapters: LoRA adapters, all with a head or all without.
        weights: w_i, one per adapter.
        layers: Number of layers of the model.

    Raises UserError for DoRA, for full tuning, and if only some adapters have a head.
    """
    require(
        len(adapters) == len(weights) > 0,
        f"An average needs one weight for each adapter; there are {len(weights)} weights and "
        f"{len(adapters)} adapters.",
    )
    require(
        all(a.lora is not None for a in adapters),
        "An average needs LoRA adapters; a fully tuned role has none.",
    )
    heads = [a.head for a in adapters]
    require(
        len({h is None for h in heads}) == 1,
        "Adapters with and without a scalar head cannot be averaged.",
    )
    parts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        parts.append(frozen_pairs(adapter, layers, weight))
        if adapter.under is not None:
            scaled = trees.map_named(
                lambda name, leaf: leaf * weight if name.endswith("_b") else leaf, adapter.under
            )
            parts.append(scaled)
    lora: dict = {}
    for name, leaf in trees.named_leaves(_concatenated(parts)).items():
        trees.insert(lora, name.replace("under_", "lora_"), leaf)
    ranks = {
        target_of(name): leaf.shape[-1]
        for name, leaf in trees.named_leaves(lora).items()
        if name.endswith("_a")
    }
    largest = max(ranks.values())
    each = ",".join(f"{name}={rank}" for name, rank in ranks.items() if rank != largest)
    config = LoRAConfig(
        rank=largest,
        alpha=float(largest),
        targets=",".join(n for n in LINEAR if n in ranks),
        ranks=each,
        alphas=each,
    )
    head = (
        None
        if heads[0] is None
        else jax.tree.map(
            lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *heads
        )
    )
    return Adapter(lora=lora, head=head, config=config)


def output_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns ||W + s A B|| of each output, float32 [..., F], without forming the [D, F] sum.

    The square is ||W||^2 + 2 s sum_r (A^T W)_r B_r + s^2 B^T (A^T A) B, an F-vector each.

    Args:
        kernel: W [..., D, F].
        a: A [..., D, R].
        b: B [..., R, F].
        scale: s.
    """
    kernel = kernel.astype(jnp.float32)
    cross = jnp.sum(precision.einsum("...dr,...df->...rf", a, kernel) * b, axis=-2)
    gram = precision.einsum("...dr,...dq->...rq", a, a)
    square = jnp.sum(b * precision.einsum("...rq,...qf->...rf", gram, b), axis=-2)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2) + 2 * scale * cross + scale**2 * square)


def merge(base: Tree, adapter: Adapter) -> Tree:
    """Returns a copy of the base with the adapter in its kernels: W + s A B (DoRA: rescaled).

    The sum is formed in float32 and rounded to the base's dtype. For a fully tuned role the result
    is its own weights, and without low-rank leaves it is the base itself. The arguments are not
    changed. Do not merge into a merged copy: repeated merging in bfloat16 accumulates rounding
    errors.

    Args:
        base: The base's tree, or a part of it with the same paths.
        adapter: The adapter; its head is ignored.

    Raises UserError for a quantised base, whose levels cannot hold the sum.
    """
    if adapter.weights is not None:
        return adapter.weights
    if adapter.lora is None and adapter.under is None:
        return base
    require(
        not any(is_quantised(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_quantised)),
        "An adapter cannot be merged into a quantised base; load the base without --quantise.kind.",
    )
    changed = adapted_modules(adapter)

    def merged(name: str, weight: jax.Array) -> jax.Array:
        """Returns the base's leaf at path `name`, with the adapter in it."""
        module = name.removesuffix("/kernel")
        if module not in changed:
            return weight
        layers = [
            merged_kernel(adapter, module, index, kernel)
            for index, kernel in enumerate(weight.astype(jnp.float32))
        ]
        return jnp.stack(layers).astype(weight.dtype)

    return trees.map_named(merged, base)


def adapted_modules(adapter: Adapter) -> set[str]:
    """Returns the paths of the modules whose kernel an adapter changes: `layers/attention/q`.

    These are the modules with LoRA leaves or frozen pairs.
    """
    parts = [part for part in (adapter.lora, adapter.under) if part is not None]
    return {name.rpartition("/")[0] for part in parts for name in trees.named_leaves(part)}


def merged_kernel(adapter: Adapter, module: str, layer: int, kernel_DF: jax.Array) -> jax.Array:
    """Returns one layer's kernel with the adapter in it, float32 [D, F].

    Args:
        adapter: The adapter.
        module: Path of the module, `layers/attention/q`.
        layer: Index of the layer.
        kernel_DF: The layer's kernel, float32.
    """
    if adapter.under is not None:
        under = trees.named_leaves(adapter.under)
        if f"{module}/under_a" in under:
            kernel_DF = kernel_DF + precision.matmul(
                under[f"{module}/under_a"][layer], under[f"{module}/under_b"][layer]
            )
    lora = {} if adapter.lora is None else trees.named_leaves(adapter.lora)
    if f"{module}/lora_a" not in lora:
        return kernel_DF
    *_, target = module.split("/")
    config = adapter.lora_config
    index = config.stack_index(layer)
    if index is None:
        return kernel_DF
    moved_DF = kernel_DF + config.scale_of(target) * precision.matmul(
        lora[f"{module}/lora_a"][index], lora[f"{module}/lora_b"][index]
    )
    if not config.dora:
        return moved_DF
    return (
        moved_DF * (lora[f"{module}/magnitude"][index] / jnp.linalg.norm(moved_DF, axis=0))[None, :]
    )
