"""Trees of all layers: one stack, for a scan over layers, or layers apart, for layers that are
inlined.

A scan copies each layer out of its stack where its products cannot read it there, as on a CPU. In
sampling that is as much to move as the products read: beside others who use the machine's caches
and memory, a decoding step takes twice as long for it.

Matrices of feed-forward layers are turned on the way: a product of few rows is faster on a CPU as
W^T x^T, with W^T in memory as it is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import FEED_FORWARD
from perl_jax.runtime import precision, trees
from perl_jax.types import Array, Tree


@flax.struct.dataclass
class Apart:
    """A tree for each layer, in the place of one tree of stacked leaves [L, ...]."""

    layers: tuple[Tree, ...]


@flax.struct.dataclass
class Turned:
    """A matrix W [D, F], kept as [F, D]."""

    transposed: Array

    def of_columns(self, x_DN: Array) -> jax.Array:
        """W^T x^T, [F, N]."""
        return precision.matmul(self.transposed.astype(x_DN.dtype), x_DN, x_DN.dtype)


def is_apart(tree: Any) -> bool:
    return isinstance(tree, Apart)


def is_turned(leaf: Any) -> bool:
    return isinstance(leaf, Turned)


def apart(stack: Tree) -> Apart:
    """A stack's layers, each leaf in an array of its own; matrices of feed-forward layers
    turned.
    """
    turned = {f"mlp/{name}/kernel" for name in FEED_FORWARD}
    number = jax.tree.leaves(stack)[0].shape[0]

    # Turned first and picked then: in the other order XLA makes both.
    picked = lambda index, name, leaf: (
        Turned(jnp.swapaxes(leaf, 1, 2)[index]) if name in turned else leaf[index]
    )
    return Apart(
        tuple(trees.map_named(functools.partial(picked, index), stack) for index in range(number))
    )


def columns(x_NF: Array) -> jax.Array:
    """[F, N], as it lies in memory."""
    # Behind a barrier: XLA would put the transpose into the product beside it, which then is
    # another product.
    return jax.lax.optimization_barrier(x_NF.T)


def rows(x_FN: Array) -> jax.Array:
    """What was computed in columns as [N, F]."""
    return jax.lax.optimization_barrier(x_FN).T


def each(function: Callable[..., Tree], *stacks: Tree) -> Tree:
    """function of stacks, or of the layers that are apart one by one."""
    if not is_apart(stacks[0]):
        return function(*stacks)
    return Apart(
        tuple(function(*layers) for layers in zip(*(stack.layers for stack in stacks), strict=True))
    )


def of_layer(tree: Tree, index: int) -> Tree:
    """One layer's leaves [...] of a tree of stacks, of which some may be apart."""
    return jax.tree.map(
        lambda part: part.layers[index] if is_apart(part) else part[index], tree, is_leaf=is_apart
    )


def chosen_layers(tree: Tree, numbers: Sequence[int]) -> Tree:
    """Some of the layers of a tree whose parts are all apart."""
    return jax.tree.map(
        lambda part: Apart(tuple(part.layers[number] for number in numbers)), tree, is_leaf=is_apart
    )


def collected(outs: list[tuple[Tree, ...] | None]) -> tuple[Apart, ...] | None:
    """What each layer gave, such as keys and values: each apart. None where layers gave nothing."""
    if outs[0] is None:
        return None
    return tuple(Apart(parts) for parts in zip(*outs, strict=True))
