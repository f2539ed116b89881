"""Chooses how batches are packed: which rows share a packed row, and how long packed rows are.

Every length is another program to compile, so lengths are selected from a few sizes: those of the
batches of a split (`Packer`) and those of sampled rollouts (`rollout_capacity`). What packing is,
and the functions of a packed batch, are in `perl_jax.models.packing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from perl_jax.data.bucketing import FILLER, Plan, round_up
from perl_jax.data.mismatched import MISMATCHED
from perl_jax.data.tokenise import TokenRows
from perl_jax.types import Layout


def fullest(counts: np.ndarray, parts: int, microbatches: int = 1, group: int = 1) -> int:
    """Returns the number of tokens of the fullest packed row of a batch.

    A batch is divided into parts of consecutive rows. The groups of rows of each part go to the
    microbatches in turn, as `microbatches.split_microbatches` distributes them. One packed row
    contains what one microbatch gets of one part.

    Args:
        counts: Tokens of each row of the batch, int [B]; B must be a multiple of parts *
            microbatches * group.
        parts: Number of parts of consecutive rows.
        microbatches: Number of microbatches.
        group: Number of consecutive rows that stay together.
    """
    dealt = np.asarray(counts).reshape(parts, -1, microbatches, group)
    return int(dealt.sum(axis=(1, 3)).max())


def balanced(counts: np.ndarray, parts: int, microbatches: int) -> np.ndarray:
    """Returns an order of a batch's rows, int [B], in which each packed row gets about as many
    tokens.

    The rows are distributed over the packed rows from the longest to the shortest, in alternating
    direction. If B is not a multiple of parts * microbatches, the order is 0, 1, 2, ...

    Args:
        counts: Tokens of each row of the batch, int [B].
        parts: Number of parts of consecutive rows.
        microbatches: Number of microbatches.
    """
    bins = parts * microbatches
    if bins == 1 or len(counts) % bins:
        return np.arange(len(counts))
    rounds = np.argsort(-np.asarray(counts), kind="stable").reshape(-1, bins)
    rounds[1::2] = rounds[1::2, ::-1]
    # [round, part, microbatch] -> the order of rows that `fullest` expects.
    return rounds.reshape(-1, parts, microbatches).swapaxes(0, 1).reshape(-1)


# Lengths of packed rows are multiples of MULTIPLE tokens. A batch is packed only if that makes it
# at most WORTH times as long as padding does.
MULTIPLE, WORTH = 16, 0.95
# A batch that does not fit the planned size is packed into the next eighth of the padded size.
LEVELS = 8


def packed_length(counts: np.ndarray, parts: int, microbatches: int, padded: int) -> int | None:
    """Returns the length in tokens of packed rows that a batch fits into, a multiple of `MULTIPLE`.

    Returns None if the length is more than `WORTH` times that of padded rows, or if the rows do not
    divide over parts * microbatches.

    Args:
        counts: Tokens of each row of the batch, int [B].
        parts: Number of parts of consecutive rows.
        microbatches: Number of microbatches.
        padded: Tokens that one row takes with padding.
    """
    if len(counts) % (parts * microbatches):
        return None
    length = round_up(fullest(counts, parts, microbatches), MULTIPLE)
    whole = len(counts) // (parts * microbatches) * padded
    return length if length <= WORTH * whole else None


def packed_sizes(planned: int, padded: int) -> list[int]:
    """Returns the lengths in tokens that packed rows may have, increasing.

    They are the planned length and the eighths of the padded size that exceed both the planned
    length and half of the padded size, and are at most `WORTH` times the padded size.

    Args:
        planned: The length that the examined batches need; 0: none of them is packed.
        padded: The padded size: tokens that the rows of one packed row take with padding.
    """
    levels = (
        round_up(-(-padded * level // LEVELS), MULTIPLE) for level in range(LEVELS // 2 + 1, LEVELS)
    )
    return ([planned] if planned else []) + [
        size for size in levels if planned < size <= WORTH * padded
    ]


# Each padded length of the prompts has ROLLOUT_LEVELS lengths of packed rollouts, for responses of
# 1/4, 2/4, ... of `max_response_length` tokens on average. The lengths are multiples of
# ROLLOUT_MULTIPLE, so that short responses have few lengths too.
ROLLOUT_LEVELS, ROLLOUT_MULTIPLE = 4, 64


def rollout_capacity(
    need: int, rows: int, group: int, columns: int, max_response: int
) -> int | None:
    """Returns the length in tokens of packed rows for rollouts, or None if packing gains too
    little.

    Args:
        need: Tokens of the fullest packed row.
        rows: Number of responses that share a packed row.
        group: Number of consecutive responses that share one copy of their prompt.
        columns: The padded length of the prompts in tokens.
        max_response: The largest number of tokens of a response.
    """
    sizes = [
        round_up(
            rows // group * columns + rows * max_response * level // ROLLOUT_LEVELS,
            ROLLOUT_MULTIPLE,
        )
        for level in range(1, ROLLOUT_LEVELS + 1)
    ]
    capacity = next(size for size in sizes if size >= need)
    return capacity if capacity <= WORTH * rows * (columns + max_response) else None


class Packer:
    """Chooses how the batches of a split are packed.

    Attributes:
        rows: The tokenised rows.
        batch_size: Rows of a whole batch.
        parts: Number of parts of consecutive rows into which the mesh divides a batch.
        microbatches: Microbatches of the update that reads the batches.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        parts: int,
        microbatches: int,
        lengths: Sequence[int],
        plans: Callable[[], Iterable[Plan]],
    ) -> None:
        """Stores the arguments; sizes are selected when the first batch is packed.

        Args:
            rows: The tokenised rows.
            batch_size: Rows of a whole batch.
            parts: Number of parts of consecutive rows into which the mesh divides a batch.
            microbatches: Microbatches of the update that reads the batches.
            lengths: The padded lengths, in tokens, that a batch may have.
            plans: Returns the plans of the first epochs, whose batches decide the sizes.
        """
        self.rows, self.batch_size = rows, batch_size
        self.parts, self.microbatches = parts, microbatches
        self._lengths, self._plans = lengths, plans

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """Returns the row indices of a batch, reordered so that its packed rows get about as many
        tokens.

        Batches of prompts are not reordered, because the samples that are drawn for a prompt depend
        on its place in the batch.

        Args:
            rows: Indices into the split, int [batch_size]; -1 is filler.
        """
        if self.rows.kind == "prompts":
            return rows
        return rows[balanced(self._counts(rows), self.parts, self.microbatches)]

    def layout(self, rows: np.ndarray, columns: int) -> Layout | None:
        """Returns how a batch is packed, with the smallest planned length that it fits into.

        Returns None if the batch stays padded: packing gains too little, or no planned length is
        large enough.

        Args:
            rows: Indices into the split, int [batch_size], in the order that `arranged` returns; -1
                is filler.
            columns: The batch's padded length in tokens.
        """
        own = self._capacity(rows, columns)
        fits = () if own is None else (size for size in self._sizes.get(columns, ()) if size >= own)
        capacity = next(iter(fits), None)
        if capacity is None:
            return None
        return Layout(capacity, self.parts, self._group, self.microbatches)

    @property
    def _group(self) -> int:
        """The number of rows of the model's batch that one data row makes: 2 for a pair, else 1."""
        return 2 if self.rows.kind == "comparisons" else 1

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of each row of a batch, 0 for filler; the prompt of a pair
        counts once.

        Args:
            rows: Indices into the split, int [batch_size]; -1 is filler.
        """
        return np.where(rows == FILLER, 0, self._tokens[rows])

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """The number of tokens of each row of the split; the prompt of a pair counts once.

        Of a mismatched row it is the number for the longer of its responses: each response is in a
        batch of its own, and both batches have one layout.
        """
        if self.rows.kind == MISMATCHED:
            return self.rows.lengths
        return self.rows.prompts.lengths + sum(response.lengths for response in self.rows.responses)

    def _capacity(self, rows: np.ndarray, columns: int) -> int | None:
        """Returns the smallest length of packed rows that a batch fits into, in tokens; None if
        packing gains too little.

        Args:
            rows: Indices into the split, int [batch_size], in the order that `arranged` returns.
            columns: The batch's padded length in tokens.
        """
        return packed_length(
            self._counts(rows), self.parts, self.microbatches, columns * self._group
        )

    @functools.cached_property
    def _sizes(self) -> dict[int, list[int]]:
        """The lengths that packed rows may have, increasing, by the padded length of the batch.

        They are the length that the batches of the first epochs need, and a few larger ones for
        later batches that need more. With few lengths few programs are compiled.
        """
        most = dict.fromkeys(self._lengths, 0)
        for plan in self._plans():
            for rows, length in zip(plan.rows, plan.lengths.tolist(), strict=True):
                most[length] = max(most[length], self._capacity(self.arranged(rows), length) or 0)
        each = self.batch_size // (self.parts * self.microbatches)
        return {
            length: packed_sizes(capacity, each * length * self._group)
            for length, capacity in most.items()
        }
