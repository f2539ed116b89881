"""Weights and caches of all layers: stacked for a layer scan, or unstacked for inlined layers.

A scan copies each layer out of its stack where its products cannot read it there, as on a CPU. In
sampling the copy moves as much memory as the products read, and a decoding step takes up to twice
as long.

Unstacking also transposes the matrices of feed-forward layers: on a CPU, a product of few rows is
faster as W^T x^T with W^T contiguous in memory.
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
class Unstacked:
    """One tree per layer, in the place of one tree of stacked leaves [L, ...]."""

    layers: tuple[Tree, ...]


@flax.struct.dataclass
class Transposed:
    """A matrix W [D, F] that is stored as [F, D]."""

    transposed: Array

    def times_columns(self, x_DN: Array) -> jax.Array:
        """Returns W^T x^T, [F, N]."""
        return precision.matmul(self.transposed.astype(x_DN.dtype), x_DN, x_DN.dtype)


def is_unstacked(tree: Any) -> bool:
    """Returns whether a node is `Unstacked`."""
    return isinstance(tree, Unstacked)


def is_transposed(leaf: Any) -> bool:
    """Returns whether a leaf is `Transposed`."""
    return isinstance(leaf, Transposed)


def unstack(stack: Tree) -> Unstacked:
    """Returns a stack's layers, each leaf an array; feed-forward matrices transposed."""
    turned = {f"mlp/{name}/kernel" for name in FEED_FORWARD}
    number = jax.tree.leaves(stack)[0].shape[0]

    # The whole stack is transposed before a layer is picked; in the other order XLA makes both
    # arrays.
    picked = lambda index, name, leaf: (
        Transposed(jnp.swapaxes(leaf, 1, 2)[index]) if name in turned else leaf[index]
    )
    return Unstacked(
        tuple(trees.map_named(functools.partial(picked, index), stack) for index in range(number))
    )


def to_columns(x_NF: Array) -> jax.Array:
    """Returns x^T, [F, N], with that layout in memory."""
    # The barrier keeps XLA from fusing the transpose into the next product, which would change it.
    return jax.lax.optimization_barrier(x_NF.T)


def to_rows(x_FN: Array) -> jax.Array:
    """Returns x^T, [N, F], of a result that was computed in columns."""
    return jax.lax.optimization_barrier(x_FN).T


def map_stacks(function: Callable[..., Tree], *stacks: Tree) -> Tree:
    """Returns the function applied to stacks, or to each layer if they are unstacked."""
    if not is_unstacked(stacks[0]):
        return function(*stacks)
    return Unstacked(
        tuple(function(*layers) for layers in zip(*(stack.layers for stack in stacks), strict=True))
    )


def take_layer(tree: Tree, index: int) -> Tree:
    """Returns the leaves [...] of one layer; parts of the tree may be stacked or unstacked."""
    return jax.tree.map(
        lambda part: part.layers[index] if is_unstacked(part) else part[index],
        tree,
        is_leaf=is_unstacked,
    )


def select_layers(tree: Tree, numbers: Sequence[int]) -> Tree:
    """Returns some of the layers of a tree whose parts are all unstacked."""
    return jax.tree.map(
        lambda part: Unstacked(tuple(part.layers[number] for number in numbers)),
        tree,
        is_leaf=is_unstacked,
    )


def unstacked_outputs(outs: list[tuple[Tree, ...] | None]) -> tuple[Unstacked, ...] | None:
    """Returns the layers' outputs, such as keys and values, unstacked; None: there are none."""
    if outs[0] is None:
        return None
    return tuple(Unstacked(parts) for parts in zip(*outs, strict=True))
