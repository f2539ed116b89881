"""The input pipeline: turns rows into batches of tokens with few static shapes.

All rows are tokenised once and kept in memory. Each epoch has a plan (`bucketing`) that says which
rows each batch holds. Every process derives the same plan and builds only its own contiguous slice
of each batch. Grain builds batches ahead in a thread and keeps the data cursor, from which a run
resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np

from perl_jax.data.bucketing import (
    FILLER,
    Plan,
    balanced,
    bucket_edges,
    check_edges,
    evaluation_plan,
    packed_sizes,
    packed_slots,
    training_plan,
)
from perl_jax.data.store import OPEN
from perl_jax.data.tokenise import Encoder, TokenRows, fill, tokenise
from perl_jax.errors import UserError, positive, require
from perl_jax.types import Labelled, Layout, Pairs, Prompts, Tokens

Batch = Tokens | Pairs | Labelled | Prompts
# How many batches are examined to choose the lengths of packed rows, rounded up to whole epochs.
_PLANNED = 512
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """How rows are batched.

    Attributes:
        batch_size: Rows of a whole batch, over all processes.
        max_prompt_length: Most tokens of a prompt; longer prompts are cut (`tokenise`).
        max_response_length: Most tokens of a response; longer responses are cut.
        bucket_count: At most how many padded lengths are derived from the data.
        buckets: Explicit padded lengths, increasing; None: derived ones.
        shuffle_seed: Seed of the order of rows and batches, which is another in each epoch; the
            rows that do not fill a last batch are dropped. None, for evaluation: a fixed order, and
            the last batch is filled up with filler rows.
        epochs: How many epochs to iterate; None: without end.
        process_index: Which contiguous slice of each batch this process builds.
        process_count: How many slices there are.
        packed: Whether batches carry a `types.Layout`, which says how their rows are packed.
            Batches that packing would hardly shorten carry none.
        parts: Into how many parts of consecutive rows the mesh divides a batch.
        microbatches: Microbatches of the update that reads the batches.

    Raises:
        UserError: For a number out of range, or a batch that does not divide over the processes.
    """

    batch_size: int
    max_prompt_length: int
    max_response_length: int
    bucket_count: int = 4
    buckets: tuple[int, ...] | None = None
    shuffle_seed: int | None = 0
    epochs: int | None = None
    process_index: int = 0
    process_count: int = 1
    packed: bool = False
    parts: int = 1
    microbatches: int = 1

    def __post_init__(self) -> None:
        for field in (
            "batch_size",
            "max_prompt_length",
            "max_response_length",
            "bucket_count",
            "process_count",
        ):
            positive(f"batch.{field}", getattr(self, field))
        if self.epochs is not None:
            positive("batch.epochs", self.epochs)
        if self.shuffle_seed is not None:
            positive("batch.shuffle_seed", self.shuffle_seed, zero=True)
        require(
            0 <= self.process_index < self.process_count,
            f"batch.process_index is {self.process_index}; it must lie in [0, "
            f"{self.process_count}).",
        )
        require(
            self.batch_size % self.process_count == 0,
            f"batch.batch_size is {self.batch_size}; it must be a multiple of the "
            f"{self.process_count} processes.",
        )

    def longest(self, kind: str) -> int:
        """Returns the most tokens that a row of a kind can have, without the template's tail."""
        return self.max_prompt_length + (0 if kind == "prompts" else self.max_response_length)


class Batches:
    """The batches of tokenised rows. Every iteration starts at the first batch; there is no `len`.

    Attributes:
        rows: The tokenised rows.
        spec: How they are batched.
        pad_id: The token id of padding.
        columns: A digest of what the rows hold beside their tokens (`columns_digest`).
        lengths: The padded lengths that batches may have, increasing.
        steps_per_epoch: Batches of one epoch.
        plan: epoch -> its `Plan`.

    Raises:
        UserError: Without rows, with fewer rows than one training batch, or if explicit buckets are
            too short for the longest row.
    """

    def __init__(self, rows: TokenRows, spec: BatchSpec, pad_id: int, columns: str = "") -> None:
        lengths = rows.lengths
        require(len(lengths) > 0, f"There are no {rows.kind} rows to make batches of.")
        require(
            spec.shuffle_seed is None or len(lengths) >= spec.batch_size,
            f"There are {len(lengths)} {rows.kind} rows, fewer than batch.batch_size, which is "
            f"{spec.batch_size}.",
        )
        self.rows, self.spec, self.pad_id, self.columns = rows, spec, pad_id, columns
        if spec.buckets is None:
            self.lengths = bucket_edges(
                lengths, spec.bucket_count, spec.longest(rows.kind) + rows.longest_tail
            )
        else:
            self.lengths = check_edges(spec.buckets, int(lengths.max()))
        whole, rest = divmod(len(lengths), spec.batch_size)
        self.steps_per_epoch = whole + (spec.shuffle_seed is None and rest > 0)
        # One plan is in use at a time, two while prefetching crosses into the next epoch.
        self.plan = functools.lru_cache(maxsize=2)(self._plan)

    @property
    def truncated(self) -> Mapping[str, int]:
        """Returns how many prompts and responses were cut, by name (`TokenRows.truncated`)."""
        return self.rows.truncated

    @property
    def fingerprint(self) -> str:
        """Returns a digest of all that decides which rows a step gets.

        A data cursor is only valid for batches with the fingerprint that it was saved with.
        """
        spec, digest = self.spec, hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.rows.lengths).tobytes())
        digest.update(
            repr((self.rows.kind, spec.batch_size, spec.shuffle_seed, self.lengths)).encode()
        )
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> str:
        """Returns a digest of the rows' tokens, their numbers and, for prompts, all columns."""
        digest = hashlib.blake2b(self.columns.encode(), digest_size=8)
        for ragged in (self.rows.prompts, *self.rows.responses):
            digest.update(np.ascontiguousarray(ragged.lengths).tobytes())
            digest.update(np.ascontiguousarray(ragged.values).tobytes())
        for name, values in sorted(self.rows.numbers.items()):
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _plan(self, epoch: int) -> Plan:
        lengths, spec = self.rows.lengths, self.spec
        if spec.shuffle_seed is None:
            return evaluation_plan(lengths, self.lengths, spec.batch_size)
        return training_plan(lengths, self.lengths, spec.batch_size, spec.shuffle_seed, epoch)

    def rows_of(self, step: int) -> np.ndarray:
        """Returns the indices of a whole batch's rows in the split, [batch_size]; filler: -1."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._arranged(self.plan(epoch).rows[index])

    def _arranged(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of a batch, reordered so that its packed rows fill evenly.

        Batches that are not packed keep their order. So do prompts, because the samples that are
        drawn for a prompt depend on its place in the batch.
        """
        spec = self.spec
        if not spec.packed or self.rows.kind == "prompts":
            return rows
        return rows[balanced(self._counts(rows), spec.parts, spec.microbatches)]

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of each row of a batch; a pair's prompt counts once."""
        return np.where(rows == FILLER, 0, self._tokens[rows])

    def batch(self, step: int) -> Batch:
        """Returns this process's slice of the batch of a step; any step may be asked for."""
        epoch, index = divmod(step, self.steps_per_epoch)
        share = self.spec.batch_size // self.spec.process_count
        start = share * self.spec.process_index
        rows, columns = self.rows_of(step), int(self.plan(epoch).lengths[index])
        batch = collate(self.rows, rows[start : start + share], columns, self.pad_id)
        return with_layout(batch, self._layout(rows, columns)) if self.spec.packed else batch

    def _layout(self, rows: np.ndarray, columns: int) -> Layout | None:
        """Returns how a batch is packed: the smallest planned size that holds it.

        Returns None where the batch stays padded.
        """
        spec, own = self.spec, self._slots(rows, columns)
        fits = () if own is None else (size for size in self._sizes.get(columns, ()) if size >= own)
        slots = next(iter(fits), None)
        return None if slots is None else Layout(slots, spec.parts, self._group, spec.microbatches)

    @property
    def _group(self) -> int:
        """Returns how many rows of the model's batch a data row makes: 2 for a pair, else 1."""
        return 2 if self.rows.kind == "comparisons" else 1

    def _slots(self, rows: np.ndarray, columns: int) -> int | None:
        """Returns the shortest packed rows that hold a batch; None: packing gains too little."""
        return packed_slots(
            self._counts(rows), self.spec.parts, self.spec.microbatches, columns * self._group
        )

    @functools.cached_property
    def _sizes(self) -> dict[int, list[int]]:
        """Returns the sizes of packed rows that may be used with each padded length.

        They are the size that the first batches need, and a few larger ones for later batches that
        need more. Few sizes keep the number of compiled programs small.
        """
        spec, most = self.spec, dict.fromkeys(self.lengths, 0)
        epochs = 1 if spec.shuffle_seed is None else -(-_PLANNED // self.steps_per_epoch)
        # In reverse, so that the first epoch's plan is still cached when iteration begins.
        for plan in map(self.plan, reversed(range(epochs))):
            for rows, length in zip(plan.rows, plan.lengths.tolist(), strict=True):
                most[length] = max(most[length], self._slots(self._arranged(rows), length) or 0)
        padded = lambda length: (
            spec.batch_size // (spec.parts * spec.microbatches) * length * self._group
        )
        return {length: packed_sizes(slots, padded(length)) for length, slots in most.items()}

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """Returns the number of tokens of each row of the split; a pair's prompt counts once."""
        return self.rows.prompts.lengths + sum(response.lengths for response in self.rows.responses)

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


class Steps(Sequence):
    """The numbers 0 to count - 1, as a random-access source for Grain."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> int:
        return step


class BatchIterator(Iterator):
    """Iterates over batches; its state is a small JSON value from which it continues exactly.

    Attributes:
        batches: The batches that are iterated.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        epochs = batches.spec.epochs
        steps = sys.maxsize // 2 if epochs is None else epochs * batches.steps_per_epoch
        dataset = grain.MapDataset.source(Steps(steps)).map(batches.batch)
        self._iterator = iter(dataset.to_iter_dataset(PREFETCH))

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of batches of one epoch."""
        return self.batches.steps_per_epoch

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Returns the data cursor: how many batches were returned, and digests of the rows.

        Batches that were prefetched but not returned do not count.
        """
        return {
            "grain": self._iterator.get_state(),
            "rows": self.batches.fingerprint,
            "content": self.batches.content,
        }

    def set_state(self, state: Mapping) -> None:
        """Continues after the last batch that was returned before `get_state`.

        Raises UserError if the rows or the batch settings are not those of the state. A state of an
        older version has no `content`; then only the lengths of the rows are compared.
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


def make_batches(rows: Iterable[Mapping], kind: str, encoder: Encoder, spec: BatchSpec) -> Batches:
    """Tokenises rows and returns their batches.

    Demonstrations and corpus rows become `Tokens`, comparisons `Pairs`, labels and ratings
    `Labelled`, prompts `Prompts`.

    Raises:
        RowError: For a row that cannot be encoded.
        UserError: See `Batches`.
    """
    rows = list(rows)
    tokens = tokenise(rows, kind, encoder, spec.max_prompt_length, spec.max_response_length)
    return Batches(tokens, spec, encoder.pad_id, columns_digest(rows) if kind in OPEN else "")


def columns_digest(rows: Iterable[Mapping]) -> str:
    """Returns a digest of all columns of all rows; rewards read columns other than the prompt."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def collate(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Batch:
    """Returns the batch of the rows at `indices`, padded to `columns` tokens.

    Index -1 makes a filler row: no token is valid and the row's weight is 0.
    """
    return COLLATE[rows.kind](rows, indices, columns, pad_id)


def with_layout(batch: Batch, layout: Layout | None) -> Batch:
    """Returns a batch with the layout set on each of its `Tokens`; prompts are unchanged."""
    if isinstance(batch, Tokens):
        return batch.replace(layout=layout)
    if isinstance(batch, Pairs):
        return batch.replace(
            chosen=batch.chosen.replace(layout=layout),
            rejected=batch.rejected.replace(layout=layout),
        )
    return (
        batch.replace(tokens=batch.tokens.replace(layout=layout))
        if isinstance(batch, Labelled)
        else batch
    )


def pieces_of(rows: TokenRows, index: int, response: int | None) -> list[np.ndarray]:
    """Returns the token ids of a row: its prompt and, if named, one response. Filler has none."""
    if index == FILLER:
        return []
    return [rows.prompts[index], *([] if response is None else [rows.responses[response][index]])]


def right_padded(
    rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int, response: int = 0
) -> Tokens:
    """Returns sequences [rows, columns]: prompt, response, the chat template's tail, padding.

    The response mask covers the response's tokens with the one that ends the turn, but not the
    tail. `response` is the number of the response that is read (0: chosen, 1: rejected).
    """
    tokens_BT, valid_BT = fill(
        [pieces_of(rows, index, response) for index in indices], columns, pad_id
    )
    prompt_B = np.where(indices == FILLER, 0, rows.prompts.lengths[indices])
    tail_B = rows.tails[response][indices] if rows.tails else np.zeros(len(indices), np.int64)
    column_T = np.arange(columns)
    ends_B = valid_BT.sum(axis=1) - tail_B
    return Tokens(
        tokens_BT,
        valid_BT,
        valid_BT & (column_T >= prompt_B[:, None]) & (column_T < ends_B[:, None]),
    )


def left_padded(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Prompts:
    """Returns prompts [rows, columns] with the padding on the left, so that all end together."""
    tokens_BP, valid_BP = fill(
        [pieces_of(rows, index, None) for index in indices], columns, pad_id, left=True
    )
    return Prompts(tokens_BP, valid_BP, indices.astype(np.int32))


def pairs(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Pairs:
    """Returns comparisons with their weights, probabilities and margins; all 0 for filler."""
    chosen = right_padded(rows, indices, columns, pad_id, response=0)
    rejected = right_padded(rows, indices, columns, pad_id, response=1)
    numbers = {
        name: np.where(indices == FILLER, 0, values[indices])
        for name, values in rows.numbers.items()
    }
    return Pairs(chosen, rejected, numbers["weight"], numbers["probability"], numbers["margin"])


def labelled(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Labelled:
    """Returns responses with their labels or ratings, and weight 1 (filler: weight 0)."""
    (values,) = rows.numbers.values()
    real_B = (indices != FILLER).astype(np.float32)
    return Labelled(right_padded(rows, indices, columns, pad_id), values[indices] * real_B, real_B)


COLLATE = {
    "demonstrations": right_padded,
    "corpus": right_padded,
    "comparisons": pairs,
    "labels": labelled,
    "ratings": labelled,
    "prompts": left_padded,
}
