"""Functions that process a batch one microbatch at a time, to limit memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from perl_jax.types import Array, Tokens, Tree


def split_microbatches(batch: Tree, microbatches: int, group: int = 1) -> Tree:
    """Returns leaves [B, ...] as microbatches [M, B/M, ...].

    Group g of consecutive rows goes to microbatch g mod M. The split is strided, so that every
    microbatch has rows on every device if rows are sharded over devices in contiguous parts. Packed
    tokens get the layout of one microbatch.

    Args:
        batch: Tree of arrays that all have B rows.
        microbatches: M.
        group: Number of consecutive rows that stay together.

    Raises ValueError if the groups do not divide over the microbatches.
    """

    def split(leaf: Array) -> Array:
        """Returns a leaf [B, ...] as [M, B/M, ...]."""
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
    """Returns function(batch), computed one microbatch at a time, in the batch's order of rows.

    For passes without a gradient: intermediate results exist for one microbatch at a time.

    Args:
        function: Every leaf of its result must have the rows of its argument as the first axis.
        batch: Tree of arrays that all have B rows; its groups (`group_of`) stay together.
        microbatches: Number of microbatches. If it does not divide the number of groups, their
            greatest common divisor is used instead.
    """
    group = group_of(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    microbatches = math.gcd(rows // group, microbatches)
    if microbatches == 1:
        return function(batch)
    outs = jax.lax.map(function, split_microbatches(batch, microbatches, group))

    def join(leaf: Array) -> jax.Array:
        """Returns a leaf [M, B/M, ...] as [B, ...], in the batch's order."""
        dealt = leaf.reshape(microbatches, -1, group, *leaf.shape[2:])
        return jnp.swapaxes(dealt, 0, 1).reshape(rows, *leaf.shape[2:])

    return jax.tree.map(join, outs)


def summed_microbatches(function: Callable[[Tree], Tree], batch: Tree, microbatches: int) -> Tree:
    """Returns the sum over microbatches of function(microbatch), leaf by leaf.

    Args:
        function: Leaves of its result must be sums over rows.
        batch: Tree of arrays that all have B rows; its groups (`group_of`) stay together.
        microbatches: Number of microbatches; it must divide the number of groups.
    """
    if microbatches == 1:
        return function(batch)
    sums = jax.lax.map(function, split_microbatches(batch, microbatches, group_of(batch)))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)


def check_divides(rows: int, parts: int, group: int, what: str) -> None:
    """Raises ValueError unless the groups of rows divide evenly over the parts.

    Args:
        rows: Number of rows.
        parts: Number of parts.
        group: Number of consecutive rows that stay together.
        what: Name of the parts in the message, such as "microbatches".
    """
    if rows % (parts * group):
        groups = f" in groups of {group}" if group > 1 else ""
        raise ValueError(f"{rows} rows{groups} do not split into {parts} {what}")


def group_of(batch: Tree) -> int:
    """Returns the number of consecutive rows of a batch that must stay together.

    It is `batch.group`, or 1 if the batch has no such attribute.
    """
    return getattr(batch, "group", 1)
