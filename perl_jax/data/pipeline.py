"""The input pipeline: turns rows into batches of tokens with few static shapes.

All rows are tokenised once and kept in memory. Each epoch has a plan (`bucketing`) that says which
rows each batch holds. Every process derives the same plan and builds only its own contiguous slice
of each batch. Grain builds batches ahead in a thread and keeps the data cursor, from which a run
resumes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from perl_jax.data.bucketing import (
    Plan,
    bucket_edges,
    check_edges,
    evaluation_plan,
    training_plan,
)
from perl_jax.data.collate import Batch, collate, with_layout
from perl_jax.data.config import DataConfig
from perl_jax.data.mismatched import with_others
from perl_jax.data.packing import Packer
from perl_jax.data.store import OPEN
from perl_jax.data.tokenise import Encoder, TokenRows, tokenise
from perl_jax.errors import UserError, positive, require
from perl_jax.runtime import progress
from perl_jax.runtime.hosts import Share

# The share of a single process: whole batches.
WHOLE = Share(0, 1, (0,))
# How many batches are examined to choose the lengths of packed rows, rounded up to whole epochs.
_PLANNED = 512
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Batches:
    """The batches of tokenised rows. Every iteration starts at the first batch; there is no `len`.

    Attributes:
        rows: The tokenised rows.
        batch_size: Rows of a whole batch, over all processes.
        pad_id: The token id of padding.
        seed: Seed of the order of rows and batches; None: a fixed order.
        epochs: How many epochs are iterated; None: without end.
        microbatches: Microbatches of the update that reads the batches.
        lengths: The padded lengths that batches may have, increasing.
        steps_per_epoch: Batches of one epoch.
        plan: epoch -> its `Plan`.
        packer: Chooses how batches are packed; None: they are not.
    """

    def __init__(
        self,
        rows: TokenRows,
        config: DataConfig,
        batch_size: int,
        pad_id: int,
        *,
        seed: int | None,
        epochs: int | None = None,
        lengths: Sequence[int] | None = None,
        share: Share = WHOLE,
        packed: bool = False,
        parts: int = 1,
        microbatches: int = 1,
        columns: str = "",
    ) -> None:
        """Plans the batches of tokenised rows.

        Args:
            rows: The tokenised rows.
            config: The lengths of rows, and how many padded lengths there are.
            batch_size: Rows of a whole batch, over all processes.
            pad_id: The token id of padding.
            seed: Seed of the order of rows and batches, which is another in each epoch; the rows
                that do not fill a last batch are dropped. None, for evaluation: a fixed order, and
                the last batch is filled up with filler rows.
            epochs: How many epochs to iterate; None: without end.
            lengths: Explicit padded lengths, increasing; None: lengths derived from the rows.
            share: Which contiguous slice of each batch this process builds.
            packed: Whether batches carry a `types.Layout`, which says how their rows are packed.
                Batches that packing would hardly shorten carry none.
            parts: Into how many parts of consecutive rows the mesh divides a batch.
            microbatches: Microbatches of the update that reads the batches.
            columns: A digest of what the rows hold beside their tokens (`columns_digest`).

        Raises:
            UserError: For a number out of range; a batch that does not divide over the processes;
                no rows, or fewer than one training batch; explicit lengths that are too short.
        """
        _check(batch_size, seed, epochs, share)
        tokens = rows.lengths
        require(len(tokens) > 0, f"There are no {rows.kind} rows to make batches of.")
        require(
            seed is None or len(tokens) >= batch_size,
            f"There are {len(tokens)} {rows.kind} rows, fewer than batch_size, which is "
            f"{batch_size}.",
        )
        self.rows, self.batch_size, self.pad_id = rows, batch_size, pad_id
        self.seed, self.epochs, self.microbatches = seed, epochs, microbatches
        self._share, self._columns = share, columns
        if lengths is None:
            longest = config.longest(rows.kind) + rows.longest_tail
            self.lengths = bucket_edges(tokens, config.bucket_count, longest)
        else:
            self.lengths = check_edges(lengths, int(tokens.max()))
        whole, rest = divmod(len(tokens), batch_size)
        self.steps_per_epoch = whole + (seed is None and rest > 0)
        # One plan is in use at a time, two while prefetching crosses into the next epoch.
        self.plan = functools.lru_cache(maxsize=2)(self._plan)
        self.packer = (
            Packer(rows, batch_size, parts, microbatches, self.lengths, self._first_plans)
            if packed
            else None
        )

    @property
    def truncated(self) -> Mapping[str, int]:
        """How many texts were cut, by the name of the column (`TokenRows.truncated`)."""
        return self.rows.truncated

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify which rows each step gets: kind and lengths of the rows,
        batch size, seed and padded lengths.

        A data cursor is only valid for batches with the fingerprint that it was saved with.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.rows.lengths).tobytes())
        digest.update(repr((self.rows.kind, self.batch_size, self.seed, self.lengths)).encode())
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> str:
        """16 hex digits that identify the content of the rows: their tokens, their numbers and, for
        prompts, all columns.
        """
        digest = hashlib.blake2b(self._columns.encode(), digest_size=8)
        for ragged in (self.rows.prompts, *self.rows.responses):
            digest.update(np.ascontiguousarray(ragged.lengths).tobytes())
            digest.update(np.ascontiguousarray(ragged.values).tobytes())
        for name, values in sorted(self.rows.numbers.items()):
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _plan(self, epoch: int) -> Plan:
        """Returns the plan of an epoch, counted from 0; without a seed all epochs have the same
        one.
        """
        lengths = self.rows.lengths
        if self.seed is None:
            return evaluation_plan(lengths, self.lengths, self.batch_size)
        return training_plan(lengths, self.lengths, self.batch_size, self.seed, epoch)

    def _first_plans(self) -> Iterator[Plan]:
        """Returns plans of at least `_PLANNED` batches, from the first epochs; without a seed, the
        one plan that all epochs have.

        The lengths of packed rows are selected by these batches.
        """
        epochs = 1 if self.seed is None else -(-_PLANNED // self.steps_per_epoch)
        # In reverse, so that the first epoch's plan is still cached when iteration begins.
        return map(self.plan, reversed(range(epochs)))

    def rows_of(self, step: int) -> np.ndarray:
        """Returns the indices into the split of the rows of a whole batch, int [batch_size]; -1 is
        filler.

        Args:
            step: The number of the batch, from 0, over all epochs.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self.plan(epoch).rows[index]
        return rows if self.packer is None else self.packer.arranged(rows)

    def batch(self, step: int) -> Batch:
        """Returns this process's slice of a batch. Steps may be taken in any order.

        Args:
            step: The number of the batch, from 0, over all epochs.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        rows, columns = self.rows_of(step), int(self.plan(epoch).lengths[index])
        batch = collate(self.rows, self._share.part(rows), columns, self.pad_id)
        return (
            batch if self.packer is None else with_layout(batch, self.packer.layout(rows, columns))
        )

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


class Steps(Sequence):
    """The numbers 0 to size - 1, as a random-access source for Grain."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, step: int) -> int:
        return step


class BatchIterator(Iterator):
    """Iterates over batches, which a thread builds ahead; the data cursor says where to continue.

    Attributes:
        batches: The batches.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        epochs = batches.epochs
        steps = sys.maxsize // 2 if epochs is None else epochs * batches.steps_per_epoch
        dataset = grain.MapDataset.source(Steps(steps)).map(batches.batch)
        self._iterator = iter(dataset.to_iter_dataset(PREFETCH))

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of one epoch."""
        return self.batches.steps_per_epoch

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Returns the data cursor, a JSON value, from which `set_state` continues exactly.

        Its keys are `grain` (how many batches were returned), `rows` and `content`
        (`Batches.fingerprint` and `Batches.content`). Batches that were built ahead but not
        returned do not count.
        """
        return {
            "grain": self._iterator.get_state(),
            "rows": self.batches.fingerprint,
            "content": self.batches.content,
        }

    def set_state(self, state: Mapping) -> None:
        """Continues after the last batch that was returned before `get_state`.

        Args:
            state: A data cursor. One of an older version has no `content`; then only the lengths of
                the rows are compared.

        Raises:
            UserError: The rows or the batch settings are not those that the cursor was saved with.
        """
        if state.get("rows") != self.batches.fingerprint:
            raise UserError(
                "The data cursor was saved with other rows or batch settings; resume with the "
                "same ones."
            )
        if state.get("content", self.batches.content) != self.batches.content:
            raise UserError(
                "The rows of --data are others than those that the data cursor was saved with "
                "(their tokens, numbers or columns differ); resume with the same ones."
            )
        self._iterator.set_state(dict(state["grain"]))


def make_batches(
    rows: Iterable[Mapping],
    kind: str,
    encoder: Encoder,
    config: DataConfig,
    batch_size: int,
    tokens: TokenRows | None = None,
    *,
    others: bool = False,
    **how: Any,
) -> Batches:
    """Tokenises rows and returns their batches.

    Demonstrations and corpus rows become `Tokens`, comparisons `Pairs`, labels and ratings
    `Labelled`, prompts `Prompts`.

    Args:
        rows: The rows of a split.
        kind: Their kind (`data.store.KINDS`).
        encoder: Turns texts into token ids.
        config: The largest lengths of prompts and responses, and the number of padded lengths.
        batch_size: Rows of a whole batch, over all processes.
        tokens: The rows as tokens, if they are tokenised already.
        others: Whether each labelled row gets the response of another row as well
            (`mismatched.with_others`).
        how: Further arguments of `Batches`: at least `seed`.

    Raises:
        RowError: A row cannot be encoded.
        UserError: `Batches` refuses an argument, or `others` needs more rows.
    """
    rows = list(rows)
    if tokens is None:
        tokens = tokenise(rows, kind, encoder, config.max_prompt_length, config.max_response_length)
    if others:
        tokens = with_others(tokens, [row["prompt"] for row in rows])
    columns = columns_digest(rows) if kind in OPEN else ""
    return Batches(tokens, config, batch_size, encoder.pad_id, columns=columns, **how)


def with_progress(batches: Batches, stage: str, unit: str = "rows") -> Iterator[Any]:
    """Yields the batches of an evaluation; a line of progress shows how many rows are done.

    Args:
        batches: Batches with each row once.
        stage: What is done with them, such as `validating`.
        unit: What the rows are, in the plural.
    """
    done = 0
    with progress.activity(stage, len(batches.rows.prompts), unit) as line:
        for index, batch in enumerate(batches):
            yield batch
            done += int((batches.rows_of(index) >= 0).sum())
            line.update(done)


def _check(batch_size: int, seed: int | None, epochs: int | None, share: Share) -> None:
    """Raises UserError if a number is out of range or the batch does not divide over the processes.

    Args:
        batch_size: Must be above 0 and a multiple of the number of processes.
        seed: Must be 0 or more; None passes.
        epochs: Must be above 0; None passes.
        share: Its index must be below its number of processes.
    """
    positive("batch_size", batch_size)
    if epochs is not None:
        positive("epochs", epochs)
    if seed is not None:
        positive("seed", seed, zero=True)
    require(
        0 <= share.index < share.count,
        f"share.index is {share.index}; it must lie in [0, {share.count}).",
    )
    require(
        batch_size % share.count == 0,
        f"batch_size is {batch_size}; it must be a multiple of the {share.count} processes.",
    )


def columns_digest(rows: Iterable[Mapping]) -> str:
    """Returns 16 hex digits that identify all columns of all rows; rewards read columns besides the
    prompt.
    """
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
