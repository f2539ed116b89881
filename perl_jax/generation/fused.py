"""Fused attention projections for sampling: few large products instead of many small ones.

For a handful of tokens, a product takes as long as reading its weights from memory; below a few
megabytes, as long as starting a kernel. On a GPU, q, k, v and their adapters are nine such products
per layer. In a copy of the weights that is made for sampling, they are two:

    [x W_q | x W_k | x W_v | x A]      one product with [W_q | W_k | W_v | A]
    + (x A) B                          one product with B; each target's rows lie in its own columns
                                       and include its scale

The output projection with its adapter is fused likewise. The adapter is not added to the weights,
so no rounding is lost compared with training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from perl_jax.adapters import combine
from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import is_quantised
from perl_jax.models.linear import FUSED
from perl_jax.runtime import trees
from perl_jax.types import Array, Tree

# Rows of a matrix are padded to a multiple of this many columns, 128 bytes in bfloat16, so that
# each row begins at an aligned address.
ALIGNED = 64


def fusible(base: Tree, adapter: Adapter | None) -> bool:
    """Returns whether attention's projections can be fused by `fuse`.

    Their matrices must be dense and not fused already. DoRA cannot be fused: it rescales outputs by
    norms of W + s A B.

    Args:
        base: The frozen base.
        adapter: The adapter; None: the base itself.
    """
    attention = base["layers"]["attention"]
    quantised = any(is_quantised(leaf) for leaf in jax.tree.leaves(attention, is_leaf=is_quantised))
    return (
        "qkv" not in attention
        and not quantised
        and (adapter is None or adapter.config is None or not adapter.config.dora)
    )


def fuse(attention: Tree, adapter: Adapter | None) -> Tree:
    """Returns the leaves [L, ...] of attention with fused products `qkv` and `o` for q, k, v and o.

    Each product contains the adapters of its projections: the LoRA leaves and the frozen pairs. Its
    leaves have the dtype of the matrices:

        kernel  [L, D, F + R]  the matrices W, then all A, then zero columns for alignment
        up      [L, R, F]      all B, with their scale, each in its own rows and columns; only with
                               an adapter
        bias    [L, F]         if one of the projections has a bias

    Args:
        attention: Weights of attention in all layers, {q, k, v, o, ...: their leaves}. Leaves of
            norms are returned as they are.
        adapter: The adapter; None: the weights alone.
    """
    out = {name: leaf for name, leaf in attention.items() if name not in lora_lib.ATTENTION}
    kernels = {name: attention[name]["kernel"] for name in lora_lib.ATTENTION}
    layers = kernels["q"].shape[0]
    pairs = {} if adapter is None else trees.named_leaves(combine.summed_pairs(adapter, layers))
    for group, names in FUSED.items():
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
        kernel = _concatenated([*own, *downs], -1, dtype)
        out[group] = {
            "kernel": jnp.pad(
                kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % ALIGNED if downs else 0))
            )
        }
        if ups:
            out[group]["up"] = _concatenated(ups, 1, dtype)
        if any("bias" in attention[name] for name in names):
            zeros = [jnp.zeros((layers, width), dtype) for width in widths]
            out[group]["bias"] = _concatenated(
                [
                    attention[name].get("bias", zero)
                    for name, zero in zip(names, zeros, strict=True)
                ],
                -1,
                dtype,
            )
    return out


def _concatenated(parts: Sequence[Array], axis: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the parts concatenated along an axis, in the given dtype."""
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=axis)


def without_attention(adapter: Adapter | None) -> Adapter | None:
    """Returns the adapter without its attention leaves and its head; None if nothing else is left.

    Sampling does not read a head.
    """
    if adapter is None:
        return None
    lora, under = _feed_forward(adapter.lora), _feed_forward(adapter.under)
    if lora is None and under is None:
        return None
    config = None if lora is None else adapter.lora_config.restricted(lora_lib.FEED_FORWARD)
    return dataclasses.replace(adapter, lora=lora, under=under, head=None, config=config)


def _feed_forward(tree: Tree | None) -> Tree | None:
    """Returns an adapter's tree without its attention leaves; None if nothing is left."""
    kept = (
        {}
        if tree is None
        else {name: part for name, part in tree["layers"].items() if name != "attention"}
    )
    return {"layers": kept} if jax.tree.leaves(kept) else None
