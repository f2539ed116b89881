"""Which rows go into which batch at which static length: a plan every process derives alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from perl_jax.errors import require

MULTIPLE = 8
FILLER = -1


@dataclasses.dataclass(frozen=True)
class Plan:
    """One epoch's batches: `rows` int [batches, batch_size] (-1 is filler), `lengths` int
    [batches].
    """

    rows: np.ndarray
    lengths: np.ndarray


def round_up(length: int, multiple: int = MULTIPLE) -> int:
    """The next multiple."""
    return -(-int(length) // multiple) * multiple


def bucket_edges(lengths: Sequence[int], count: int, maximum: int) -> tuple[int, ...]:
    """At most `count` padded lengths: the data's i/count quantiles, rounded up to multiples of 8.

    The last one holds the longest row; none exceeds `maximum`, the longest a row can be.
    """
    quantiles = np.quantile(np.asarray(lengths), np.arange(1, count + 1) / count, method="higher")
    return tuple(sorted({min(round_up(max(1, q)), maximum) for q in quantiles}))


def check_edges(edges: Sequence[int], longest: int) -> tuple[int, ...]:
    """Explicit buckets, checked against the data. UserError unless increasing and long enough."""
    edges = tuple(edges)
    increasing = all(a < b for a, b in itertools.pairwise(edges))
    require(
        bool(edges) and edges[0] > 0 and increasing,
        f"batch.buckets is {edges}; it must increase from above 0.",
    )
    require(
        longest <= edges[-1],
        f"batch.buckets ends at {edges[-1]}, but the longest row has {longest} tokens.",
    )
    return edges


def training_plan(
    lengths: np.ndarray, edges: Sequence[int], batch_size: int, seed: int, epoch: int
) -> Plan:
    """Shuffled batches of one epoch; `len(lengths) // batch_size` of them in every epoch.

    The rows are permuted by (seed, epoch) and grouped by the smallest bucket that holds them. What
    is left of a bucket after whole batches joins the next larger one, in the permutation's order,
    so only the final remainder is dropped. The order of the batches is shuffled too.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    bucket = np.searchsorted(edges, lengths[order])
    batches, padded, left = [], [], np.zeros(0, np.int64)
    for index, edge in enumerate(edges):
        # Places in the permutation, sorted: no row is favoured for having come from a smaller
        # bucket.
        pool = np.sort(np.concatenate([left, np.flatnonzero(bucket == index)]))
        whole = len(pool) // batch_size * batch_size
        batches += list(order[pool[:whole]].reshape(-1, batch_size))
        padded += [edge] * (whole // batch_size)
        left = pool[whole:]
    shuffled = rng.permutation(len(batches))
    return Plan(np.asarray(batches)[shuffled], np.asarray(padded)[shuffled])


def evaluation_plan(lengths: np.ndarray, edges: Sequence[int], batch_size: int) -> Plan:
    """Every row once, short rows first; the last batch is filled up with `FILLER`."""
    bucket = np.searchsorted(edges, lengths)
    order = np.argsort(bucket, kind="stable")
    rows = np.concatenate([order, np.full(-len(order) % batch_size, FILLER, order.dtype)])
    rows = rows.reshape(-1, batch_size)
    longest = [max(lengths[row] for row in batch if row != FILLER) for batch in rows]
    return Plan(rows, np.asarray(edges)[np.searchsorted(edges, longest)])


def fullest(counts: np.ndarray, parts: int, microbatches: int = 1, group: int = 1) -> int:
    """Tokens of the fullest packed row: of a part of consecutive rows, in the microbatch that gets
    most.

    counts: of each row of a batch. Groups of rows are dealt to microbatches in turn, as
    `microbatches.split_microbatches` deals them.
    """
    dealt = np.asarray(counts).reshape(parts, -1, microbatches, group)
    return int(dealt.sum(axis=(1, 3)).max())


def balanced(counts: np.ndarray, parts: int, microbatches: int) -> np.ndarray:
    """An order of a batch's rows in which parts and microbatches get about as many tokens each.

    From the longest row to the shortest they are dealt out forth and back. Rows that do not divide
    stay as they are.
    """
    bins = parts * microbatches
    if bins == 1 or len(counts) % bins:
        return np.arange(len(counts))
    rounds = np.argsort(-np.asarray(counts), kind="stable").reshape(-1, bins)
    rounds[1::2] = rounds[1::2, ::-1]
    # [round, part, microbatch] -> places as `fullest` reads them.
    return rounds.reshape(-1, parts, microbatches).swapaxes(0, 1).reshape(-1)


# Packed rows are multiples of this long, and pay where they are shorter than the padded ones by a
# twentieth.
SLOTS, WORTH = 16, 0.95
# Eighths of the padded size are what batches are packed into that do not fit what was planned.
LEVELS = 8


def packed_slots(counts: np.ndarray, parts: int, microbatches: int, padded: int) -> int | None:
    """The room that packed rows of a batch need, or None where packing is not worth it. padded: a
    padded row's columns.
    """
    if len(counts) % (parts * microbatches):
        return None
    slots = round_up(fullest(counts, parts, microbatches), SLOTS)
    whole = len(counts) // (parts * microbatches) * padded
    return slots if slots <= WORTH * whole else None


def packed_sizes(planned: int, padded: int) -> list[int]:
    """Sizes of packed rows, increasing: what is planned (0: nothing), and levels above it and above
    half of the padded size.
    """
    levels = (
        round_up(-(-padded * level // LEVELS), SLOTS) for level in range(LEVELS // 2 + 1, LEVELS)
    )
    return ([planned] if planned else []) + [
        size for size in levels if planned < size <= WORTH * padded
    ]
