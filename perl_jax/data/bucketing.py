"""Plans which rows each batch holds and how long it is padded; every process gets one plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from perl_jax.errors import require
from perl_jax.runtime.seeds import numpy_generator

# Padded lengths are multiples of this.
MULTIPLE = 8
# The index of a filler row, with which the last batch of an evaluation is filled up.
FILLER = -1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one epoch.

    Attributes:
        rows: Row indices of each batch, int [batches, batch_size]; -1 is filler.
        lengths: Padded length of each batch in tokens, int [batches].
    """

    rows: np.ndarray
    lengths: np.ndarray


def round_up(length: int, multiple: int = MULTIPLE) -> int:
    """Returns the smallest multiple of `multiple` that is at least `length`."""
    return -(-int(length) // multiple) * multiple


def fitting_batch(batch_size: int, rows: int, multiple: int) -> int:
    """Returns how many rows a batch of an evaluation needs: `batch_size`, or fewer if all rows fit
    into fewer.

    Filler rows take as long as others. The draws of a row depend on its place in the batch, so a
    smaller batch gives the same responses.

    Args:
        batch_size: The largest number of rows of a batch.
        rows: The number of rows to evaluate.
        multiple: The number of rows must be a multiple of this, because the mesh splits them.
    """
    return min(batch_size, round_up(rows, multiple))


def bucket_edges(lengths: Sequence[int], count: int, maximum: int) -> tuple[int, ...]:
    """Returns the padded lengths of at most `count` buckets, increasing.

    They are the i/count quantiles of the rows' lengths (i = 1..count), rounded up to multiples of
    `MULTIPLE`, equal ones once. The last one is at least as long as the longest row.

    Args:
        lengths: Tokens of each row.
        count: The largest number of buckets.
        maximum: The largest length that a row can have; no padded length exceeds it.
    """
    quantiles = np.quantile(np.asarray(lengths), np.arange(1, count + 1) / count, method="higher")
    return tuple(sorted({min(round_up(max(1, q)), maximum) for q in quantiles}))


def check_edges(edges: Sequence[int], longest: int) -> tuple[int, ...]:
    """Returns padded lengths that a caller gave, as a tuple, unchanged.

    Args:
        edges: The padded lengths in tokens.
        longest: Tokens of the longest row.

    Raises:
        UserError: The lengths are not positive and increasing, or the longest row does not fit.
    """
    edges = tuple(edges)
    increasing = all(a < b for a, b in itertools.pairwise(edges))
    require(
        bool(edges) and edges[0] > 0 and increasing,
        f"lengths is {edges}; it must increase from above 0.",
    )
    require(
        longest <= edges[-1],
        f"lengths ends at {edges[-1]}, but the longest row has {longest} tokens.",
    )
    return edges


def training_plan(
    lengths: np.ndarray, edges: Sequence[int], batch_size: int, seed: int, epoch: int
) -> Plan:
    """Returns the shuffled batches of one epoch, len(lengths) // batch_size of them.

    The rows are permuted by (seed, epoch) and grouped by the smallest bucket that they fit into.
    The rows of a bucket that do not fill a whole batch join the next larger bucket, in the order of
    the permutation. So only the remainder of the largest bucket is dropped. The order of the
    batches is shuffled too.

    Args:
        lengths: Tokens of each row.
        edges: The buckets' padded lengths, increasing; the last one is at least the longest row's.
        batch_size: Rows of a batch.
        seed: Seed of the order, the same in every epoch.
        epoch: Number of the epoch, from 0.
    """
    rng = numpy_generator(seed, epoch)
    order = rng.permutation(len(lengths))
    bucket = np.searchsorted(edges, lengths[order])
    batches, padded, left = [], [], np.zeros(0, np.int64)
    for index, edge in enumerate(edges):
        # Places in the permutation, sorted, so that rows left over from a smaller bucket have no
        # advantage over others when a remainder is dropped.
        pool = np.sort(np.concatenate([left, np.flatnonzero(bucket == index)]))
        whole = len(pool) // batch_size * batch_size
        batches += list(order[pool[:whole]].reshape(-1, batch_size))
        padded += [edge] * (whole // batch_size)
        left = pool[whole:]
    shuffled = rng.permutation(len(batches))
    return Plan(np.asarray(batches)[shuffled], np.asarray(padded)[shuffled])


def evaluation_plan(lengths: np.ndarray, edges: Sequence[int], batch_size: int) -> Plan:
    """Returns batches with every row once, rows of short buckets first; the last batch is filled up
    with `FILLER`.

    The padded length of a batch is the smallest one of `edges` that its longest row fits into.

    Args:
        lengths: Tokens of each row.
        edges: The buckets' padded lengths, increasing; the last one is at least the longest row's.
        batch_size: Rows of a batch.
    """
    bucket = np.searchsorted(edges, lengths)
    order = np.argsort(bucket, kind="stable")
    rows = np.concatenate([order, np.full(-len(order) % batch_size, FILLER, order.dtype)])
    rows = rows.reshape(-1, batch_size)
    longest = [max(lengths[row] for row in batch if row != FILLER) for batch in rows]
    return Plan(rows, np.asarray(edges)[np.searchsorted(edges, longest)])
