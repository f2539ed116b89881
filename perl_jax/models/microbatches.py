"""A batch in microbatches, one after the other: what a pass holds at a time is a part's."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from perl_jax.types import Array, Tokens, Tree


def split_microbatches(batch: Tree, microbatches: int, group: int = 1) -> Tree:
    """Leaves [B, ...] -> [M, B/M, ...]; group g (of rows next to each other) goes to microbatch g
    mod M, packed as one.

    Strided, not in runs: with rows sharded in runs over devices, every microbatch then still has
    its share on every device.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[0]
        check_divides(rows, microbatches, group, "microbatches")
        dealt = leaf.reshape(rows // (microbatches * group), microbatches, group, *leaf.shape[1:])
        return jnp.swapaxes(dealt, 0, 1).reshape(
            microbatches, rows // microbatches, *leaf.shape[1:]
        )

    packed = lambda part: isinstance(part, Tokens)
    return jax.tree.map(
        lambda part: part.of_microbatch() if packed(part) else part,
        jax.tree.map(split, batch),
        is_leaf=packed,
    )


def each_microbatch(function: Callable[[Tree], Tree], batch: Tree, microbatches: int) -> Tree:
    """function(batch) where every leaf of the result leads with the batch's rows, one microbatch
    after the other.

    For passes without a gradient: what they hold at a time is that of a microbatch. Where the
    microbatches do not divide the (groups of) rows, their largest common divisor is taken.
    """
    group = group_of(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    microbatches = math.gcd(rows // group, microbatches)
    if microbatches == 1:
        return function(batch)
    outs = jax.lax.map(function, split_microbatches(batch, microbatches, group))

    def join(leaf: Array) -> jax.Array:
        dealt = leaf.reshape(microbatches, -1, group, *leaf.shape[2:])
        return jnp.swapaxes(dealt, 0, 1).reshape(rows, *leaf.shape[2:])

    return jax.tree.map(join, outs)


def summed_microbatches(function: Callable[[Tree], Tree], batch: Tree, microbatches: int) -> Tree:
    """The sum over microbatches of function(microbatch), whose leaves are sums over rows."""
    if microbatches == 1:
        return function(batch)
    sums = jax.lax.map(function, split_microbatches(batch, microbatches, group_of(batch)))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)


def check_divides(rows: int, parts: int, group: int, what: str) -> None:
    """ValueError unless whole groups of rows divide over the parts."""
    if rows % (parts * group):
        groups = f" in groups of {group}" if group > 1 else ""
        raise ValueError(f"{rows} rows{groups} do not split into {parts} {what}")


def group_of(batch: Tree) -> int:
    """Rows of a batch that have to stay together: as many as it says."""
    return getattr(batch, "group", 1)
