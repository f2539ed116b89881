"""Chooses how batches are packed: which rows share a packed row, and how long packed rows are.

Every length is another program to compile, so lengths are chosen from a few sizes: those of the
batches of a split (`Packer`) and those of sampled rollouts (`rollout_capacity`). What packing is,
and the functions of a packed batch, are in `perl_jax.models.packing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from perl_jax.data.bucketing import FILLER, Plan, round_up
from perl_jax.data.tokenise import TokenRows
from perl_jax.types import Layout


def fullest(counts: np.ndarray, parts: int, microbatches: int = 1, group: int = 1) -> int:
    """Returns the number of tokens of the fullest packed row.

    A batch is divided into parts of consecutive rows. Each part deals its groups of rows to the
    microbatches in turn, as `microbatches.split_microbatches` does. One packed row holds what one
    microbatch gets of one part.

    Args:
        counts: Tokens of each row of a batch.
        parts: Parts of consecutive rows.
        microbatches: Microbatches of each part.
        group: Consecutive rows that stay together.
    """
    dealt = np.asarray(counts).reshape(parts, -1, microbatches, group)
    return int(dealt.sum(axis=(1, 3)).max())


def balanced(counts: np.ndarray, parts: int, microbatches: int) -> np.ndarray:
    """Returns an order of a batch's rows that gives each packed row about as many tokens.

    The rows are dealt to the packed rows from the longest to the shortest, in alternating
    direction. If the rows do not divide over parts times microbatches, the order is 0, 1, 2, ...
    """
    bins = parts * microbatches
    if bins == 1 or len(counts) % bins:
        return np.arange(len(counts))
    rounds = np.argsort(-np.asarray(counts), kind="stable").reshape(-1, bins)
    rounds[1::2] = rounds[1::2, ::-1]
    # [round, part, microbatch] -> the order of rows that `fullest` expects.
    return rounds.reshape(-1, parts, microbatches).swapaxes(0, 1).reshape(-1)


# Lengths of packed rows are multiples of SLOTS tokens. A batch is packed only if that makes it at
# most WORTH times as long as padding does.
SLOTS, WORTH = 16, 0.95
# A batch that does not fit the planned size is packed into the next eighth of the padded size.
LEVELS = 8


def packed_slots(counts: np.ndarray, parts: int, microbatches: int, padded: int) -> int | None:
    """Returns the length of packed rows that a batch needs, or None if packing gains too little.

    Args:
        counts: Tokens of each row of the batch.
        parts: Parts of consecutive rows.
        microbatches: Microbatches of each part.
        padded: Tokens that one row takes with padding.
    """
    if len(counts) % (parts * microbatches):
        return None
    slots = round_up(fullest(counts, parts, microbatches), SLOTS)
    whole = len(counts) // (parts * microbatches) * padded
    return slots if slots <= WORTH * whole else None


def packed_sizes(planned: int, padded: int) -> list[int]:
    """Returns the lengths that packed rows may have, increasing.

    They are the planned length (0: none) and the eighths of the padded size that exceed both the
    planned length and half of the padded size, as far as packing is worth it.
    """
    levels = (
        round_up(-(-padded * level // LEVELS), SLOTS) for level in range(LEVELS // 2 + 1, LEVELS)
    )
    return ([planned] if planned else []) + [
        size for size in levels if planned < size <= WORTH * padded
    ]


# Of rollouts: how many lengths of packed rows there are for each padded length of the prompts,
# those for responses that fill 1/4, 2/4, ... of `max_response_length` on average; and what the
# lengths are multiples of, so that short responses have few lengths too.
ROLLOUT_LEVELS, ROLLOUT_SLOTS = 4, 64


def rollout_capacity(
    need: int, rows: int, group: int, columns: int, max_response: int
) -> int | None:
    """Returns the length of packed rows for rollouts, or None if packing gains too little.

    Args:
        need: Tokens of the fullest packed row.
        rows: Rows of the batch that share a packed row.
        group: Consecutive rows that share their prompt, which a packed row holds once.
        columns: The padded length of the prompts.
        max_response: The largest number of tokens of a response.
    """
    sizes = [
        round_up(
            rows // group * columns + rows * max_response * level // ROLLOUT_LEVELS, ROLLOUT_SLOTS
        )
        for level in range(1, ROLLOUT_LEVELS + 1)
    ]
    capacity = next(size for size in sizes if size >= need)
    return capacity if capacity <= WORTH * rows * (columns + max_response) else None


class Packer:
    """Chooses how the batches of a split are packed.

    Attributes:
        rows: The tokenised rows.
        batch_size: Rows of a batch.
        parts: Into how many parts of consecutive rows the mesh divides a batch.
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
        """Keeps what is needed to choose sizes when the first batch is packed.

        Args:
            rows: The tokenised rows.
            batch_size: Rows of a batch.
            parts: Parts of consecutive rows.
            microbatches: Microbatches of each part.
            lengths: The padded lengths that batches may have.
            plans: Returns the epochs whose batches decide the sizes.
        """
        self.rows, self.batch_size = rows, batch_size
        self.parts, self.microbatches = parts, microbatches
        self._lengths, self._plans = lengths, plans

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of a batch, reordered so that its packed rows fill evenly.

        Prompts keep their order, because the samples that are drawn for a prompt depend on its
        place in the batch.
        """
        if self.rows.kind == "prompts":
            return rows
        return rows[balanced(self._counts(rows), self.parts, self.microbatches)]

    def layout(self, rows: np.ndarray, columns: int) -> Layout | None:
        """Returns how a batch is packed: the smallest planned size that holds it.

        Returns None where the batch stays padded.

        Args:
            rows: The rows of the batch in their order (`arranged`).
            columns: The batch's padded length.
        """
        own = self._capacity(rows, columns)
        fits = () if own is None else (size for size in self._sizes.get(columns, ()) if size >= own)
        capacity = next(iter(fits), None)
        if capacity is None:
            return None
        return Layout(capacity, self.parts, self._group, self.microbatches)

    @property
    def _group(self) -> int:
        """Returns how many rows of the model's batch a data row makes: 2 for a pair, else 1."""
        return 2 if self.rows.kind == "comparisons" else 1

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of each row of a batch; a pair's prompt counts once."""
        return np.where(rows == FILLER, 0, self._tokens[rows])

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """Returns the number of tokens of each row of the split; a pair's prompt counts once."""
        return self.rows.prompts.lengths + sum(response.lengths for response in self.rows.responses)

    def _capacity(self, rows: np.ndarray, columns: int) -> int | None:
        """Returns the shortest packed rows that hold a batch; None: packing gains too little."""
        return packed_slots(
            self._counts(rows), self.parts, self.microbatches, columns * self._group
        )

    @functools.cached_property
    def _sizes(self) -> dict[int, list[int]]:
        """Returns the sizes of packed rows that may be used with each padded length.

        They are the size that the first batches need, and a few larger ones for later batches that
        need more. Few sizes keep the number of compiled programs small.
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
