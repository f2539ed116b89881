"""The projections of attention as few, large products: for sampling where a step is many small
kernels.

For a handful of tokens a product takes as long as its weights take to come from memory, and below a
few megabytes as long as a kernel takes to start: on a GPU q, k, v and their adapters' pairs are
nine such products a layer. Beside each other, in a copy that is derived for sampling as a merged
one is, they are two:

    [x W_q | x W_k | x W_v | x A]      one product with [W_q | W_k | W_v | A]
    + (x A) B                          one with B, each target's rows at its own columns, its scale
    in them

and the output projection with its own pair likewise. Nothing is added to the weights, so that
nothing is rounded away that the trainer has: a pair acts by itself, as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import is_quantised
from perl_jax.runtime import trees
from perl_jax.types import Array, Tree

# Projections that read one input, by the name of their product.
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",)}
# Columns of matrices whose rows begin where memory is read from: 128 bytes of two each.
ALIGNED = 64


def fusible(base: Tree, adapter: Adapter | None) -> bool:
    """Whether attention's projections can be fused: dense matrices, and no DoRA, which rescales
    outputs by norms of W + s A B.
    """
    attention = base["layers"]["attention"]
    quantised = any(is_quantised(leaf) for leaf in jax.tree.leaves(attention, is_leaf=is_quantised))
    return (
        "qkv" not in attention
        and not quantised
        and (adapter is None or adapter.config is None or not adapter.config.dora)
    )


def fuse(attention: Tree, adapter: Adapter | None) -> Tree:
    """An attention module's leaves [L, ...] with q, k, v and o in the fused form, pairs in them.

    kernel: [L, D, F + R], W of all projections and then A of all pairs, and zeros where rows would
    begin unaligned; up: [L, R, F]; bias: [L, F]. All have the matrices' dtype. adapter: its LoRA
    leaves and what lies under them; other parts are not read.
    """
    out = {name: leaf for name, leaf in attention.items() if name not in lora_lib.ATTENTION}
    kernels = {name: attention[name]["kernel"] for name in lora_lib.ATTENTION}
    layers = kernels["q"].shape[0]
    pairs = {} if adapter is None else trees.named_leaves(lora_lib.summed_pairs(adapter, layers))
    for group, names in GROUPS.items():
        own, widths = [kernels[name] for name in names], [kernels[name].shape[-1] for name in names]
        downs, ups, start = [], [], 0
        for name, width in zip(names, widths, strict=True):
            module = f"layers/attention/{name}"
            if f"{module}/under_a" in pairs:
                downs.append(pairs[f"{module}/under_a"])
                ups.append(
                    jnp.pad(
                        pairs[f"{module}/under_b"],
                        ((0, 0), (0, 0), (start, sum(widths) - start - width)),
                    )
                )
            start += width
        dtype = own[0].dtype
        kernel = _beside([*own, *downs], -1, dtype)
        out[group] = {
            "kernel": jnp.pad(
                kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % ALIGNED if downs else 0))
            )
        }
        if ups:
            out[group]["up"] = _beside(ups, 1, dtype)
        if any("bias" in attention[name] for name in names):
            zeros = [jnp.zeros((layers, width), dtype) for width in widths]
            out[group]["bias"] = _beside(
                [
                    attention[name].get("bias", zero)
                    for name, zero in zip(names, zeros, strict=True)
                ],
                -1,
                dtype,
            )
    return out


def _beside(parts: Sequence[Array], axis: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=axis)


def rest(adapter: Adapter | None) -> Adapter | None:
    """The adapter without its pairs of attention; None where nothing else is left that sampling
    reads.
    """
    if adapter is None:
        return None
    lora, under = _feed_forward(adapter.lora), _feed_forward(adapter.under)
    if lora is None and under is None:
        return None
    config = None if lora is None else adapter.config.restricted(lora_lib.FEED_FORWARD)
    return dataclasses.replace(adapter, lora=lora, under=under, head=None, config=config)


def _feed_forward(tree: Tree | None) -> Tree | None:
    kept = (
        {}
        if tree is None
        else {name: part for name, part in tree["layers"].items() if name != "attention"}
    )
    return {"layers": kept} if jax.tree.leaves(kept) else None
