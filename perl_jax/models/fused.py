"""The projections of attention as few, large products: for sampling where a step is many small kernels.

For a handful of tokens a product takes as long as its weights take to come from memory, and below a few
megabytes as long as a kernel takes to start: on a GPU q, k, v and their adapters' pairs are nine such
products a layer. Beside each other, in a copy that is derived for sampling as a merged one is, they are two:

    [x W_q | x W_k | x W_v | x A]      one product with [W_q | W_k | W_v | A]
    + (x A) B                          one with B, each target's rows at its own columns, its scale in them

and the output projection with its own pair likewise. Nothing is added to the weights, so that nothing is rounded
away that the trainer has: a pair acts by itself, as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from perl_jax import lora as lora_lib
from perl_jax import trees
from perl_jax.lora import Adapter
from perl_jax.quantise import is_quantised
from perl_jax.types import Array, Tree

# Projections that read one input, by the name of their product.
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",)}
# Columns of matrices whose rows begin where memory is read from: 128 bytes of two each.
ALIGNED = 64


def fusible(base: Tree, adapter: Adapter | None) -> bool:
    """Whether attention's projections can be fused: dense matrices, and no DoRA, which rescales outputs by norms of W + s A B."""
    attention = base["layers"]["attention"]
    quantised = any(is_quantised(leaf) for leaf in jax.tree.leaves(attention, is_leaf=is_quantised))
    return "qkv" not in attention and not quantised and (adapter is None or adapter.config is None or not adapter.config.dora)


def fuse(attention: Tree, adapter: Adapter | None, dtype: str) -> Tree:
    """An attention module's leaves [L, ...] with q, k, v and o in the fused form, pairs in them.

    kernel: [L, D, F + R], W of all projections and then A of all pairs, and zeros where rows would begin unaligned; up: [L, R, F]; bias: [L, F].
    dtype: of kernel and up, the activations'. adapter: its LoRA leaves and what lies under them; other parts are not read.
    """
    out = {name: leaf for name, leaf in attention.items() if name not in lora_lib.ATTENTION}
    for group, names in GROUPS.items():
        kernels = [attention[name]["kernel"] for name in names]
        layers, widths = kernels[0].shape[0], [kernel.shape[-1] for kernel in kernels]
        downs, ups, start = [], [], 0
        for name, width in zip(names, widths, strict=True):
            after = sum(widths) - start - width
            for down_LDR, up_LRF in _pairs(adapter, name, layers):
                downs.append(down_LDR)
                ups.append(jnp.pad(up_LRF, ((0, 0), (0, 0), (start, after))))
            start += width
        kernel = _beside([*kernels, *downs], -1, dtype)
        out[group] = {"kernel": jnp.pad(kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % ALIGNED if downs else 0)))}
        if ups:
            out[group]["up"] = _beside(ups, 1, dtype)
        if any("bias" in attention[name] for name in names):
            zeros = [jnp.zeros((layers, width), dtype) for width in widths]
            out[group]["bias"] = _beside([attention[name].get("bias", zero) for name, zero in zip(names, zeros, strict=True)], -1, dtype)
    return out


def _beside(parts: Sequence[Array], axis: int, dtype: str) -> jax.Array:
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=axis)


def _pairs(adapter: Adapter | None, name: str, layers: int) -> list[tuple[Array, Array]]:
    """A_LDR and s B_LRF, over all layers, of what changes a projection: its LoRA, and what lies under it."""
    module, pairs = f"layers/attention/{name}", []
    under = {} if adapter is None or adapter.under is None else trees.named_leaves(adapter.under)
    if f"{module}/under_a" in under:
        pairs.append((under[f"{module}/under_a"], under[f"{module}/under_b"]))
    lora = {} if adapter is None or adapter.lora is None else trees.named_leaves(adapter.lora)
    if f"{module}/lora_a" in lora:
        chosen = jnp.array(adapter.config.adapted_layers(layers))
        # Layers without an adapter have pairs of zeros.
        every = lambda leaf: jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[chosen].set(leaf)
        pairs.append((every(lora[f"{module}/lora_a"]), every(adapter.config.scale_of(name) * lora[f"{module}/lora_b"])))
    return pairs


def rest(adapter: Adapter | None) -> Adapter | None:
    """The adapter without its pairs of attention; None where nothing else is left that sampling reads."""
    if adapter is None:
        return None
    lora, under = _feed_forward(adapter.lora), _feed_forward(adapter.under)
    if lora is None and under is None:
        return None
    config = None if lora is None else adapter.config.restricted(lora_lib.FEED_FORWARD)
    return dataclasses.replace(adapter, lora=lora, under=under, head=None, config=config)


def _feed_forward(tree: Tree | None) -> Tree | None:
    kept = {} if tree is None else {name: part for name, part in tree["layers"].items() if name != "attention"}
    return {"layers": kept} if jax.tree.leaves(kept) else None
