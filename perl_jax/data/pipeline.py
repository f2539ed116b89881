"""The input pipeline: rows -> token batches of few static shapes, sharded, resumable.

Rows are tokenised once into memory. Each epoch has a plan (`bucketing`) that every process derives
from the same numbers; a process materialises only its contiguous slice of each batch. Grain runs
the collation in prefetching threads and keeps the cursor.
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
# Batches that are looked at for how much room packed rows need, in whole epochs.
_PLANNED = 512
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """How rows are batched.

    batch_size: rows of a whole batch, over all processes.
    max_prompt_length, max_response_length: in tokens; longer ones are cut (`tokenise`).
    bucket_count: padded lengths derived from the data; buckets: explicit ones instead.
    shuffle_seed: None is evaluation: fixed order, last batch filled up; otherwise rows and batches
        are shuffled in each epoch and the remainder of an epoch is dropped.
    epochs: None repeats for ever.
    process_index, process_count: which contiguous slice of each batch this process gets.
    packed: batches say how they are packed (`types.Layout`), where that is worth it; parts:
    consecutive
        rows that stay together on a device, microbatches: of the update.
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
        """Returns the most tokens that a row of this kind may have."""
        return self.max_prompt_length + (0 if kind == "prompts" else self.max_response_length)


class Batches:
    """The batches of tokenised rows: `len`-less, iterable, every iteration starts at the beginning.

    steps_per_epoch: batches of one epoch. lengths: the padded lengths batches may have.
    columns: a digest of what the rows have beside their tokens (`columns_digest`).
    Raises UserError when training has fewer rows than a batch, or explicit buckets do not fit.
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
        """How many prompts and responses were cut, by part of a row."""
        return self.rows.truncated

    @property
    def fingerprint(self) -> str:
        """Of what decides which rows a step gets; a cursor is only valid with the same."""
        spec, digest = self.spec, hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.rows.lengths).tobytes())
        digest.update(
            repr((self.rows.kind, spec.batch_size, spec.shuffle_seed, self.lengths)).encode()
        )
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> str:
        """Of what the rows hold: their tokens, numbers and, for prompts, every column."""
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
        """The source rows of a whole batch, -1 for filler."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._arranged(self.plan(epoch).rows[index])

    def _arranged(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a packed batch in an order that fills its packed rows evenly. Prompts keep
        theirs: samples depend on it.
        """
        spec = self.spec
        if not spec.packed or self.rows.kind == "prompts":
            return rows
        return rows[balanced(self._counts(rows), spec.parts, spec.microbatches)]

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the rows of a batch, a pair's prompt counted once."""
        return np.where(rows == FILLER, 0, self._tokens[rows])

    def batch(self, step: int) -> Batch:
        """This process's slice of the batch of a step (random access; the iterator's function)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        share = self.spec.batch_size // self.spec.process_count
        start = share * self.spec.process_index
        rows, columns = self.rows_of(step), int(self.plan(epoch).lengths[index])
        batch = collate(self.rows, rows[start : start + share], columns, self.pad_id)
        return with_layout(batch, self._layout(rows, columns)) if self.spec.packed else batch

    def _layout(self, rows: np.ndarray, columns: int) -> Layout | None:
        """The packing of a batch: the smallest that holds it of the few that its padded length has;
        None: padded.
        """
        spec, own = self.spec, self._slots(rows, columns)
        fits = () if own is None else (size for size in self._sizes.get(columns, ()) if size >= own)
        slots = next(iter(fits), None)
        return None if slots is None else Layout(slots, spec.parts, self._group, spec.microbatches)

    @property
    def _group(self) -> int:
        """Rows of the model's batch that a row of the source is."""
        return 2 if self.rows.kind == "comparisons" else 1

    def _slots(self, rows: np.ndarray, columns: int) -> int | None:
        """What a batch needs at least; None: packing it is not worth it."""
        return packed_slots(
            self._counts(rows), self.spec.parts, self.spec.microbatches, columns * self._group
        )

    @functools.cached_property
    def _sizes(self) -> dict[int, list[int]]:
        """Sizes of packed rows for each padded length: what the first batches need, and a few above
        for what later ones mix.
        """
        spec, most = self.spec, dict.fromkeys(self.lengths, 0)
        epochs = 1 if spec.shuffle_seed is None else -(-_PLANNED // self.steps_per_epoch)
        # The first epoch last: it stays in the cache of plans.
        for plan in map(self.plan, reversed(range(epochs))):
            for rows, length in zip(plan.rows, plan.lengths.tolist(), strict=True):
                most[length] = max(most[length], self._slots(self._arranged(rows), length) or 0)
        padded = lambda length: (
            spec.batch_size // (spec.parts * spec.microbatches) * length * self._group
        )
        return {length: packed_sizes(slots, padded(length)) for length, slots in most.items()}

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """Tokens of each row of the source, a pair's prompt counted once."""
        return self.rows.prompts.lengths + sum(response.lengths for response in self.rows.responses)

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


class Steps(Sequence):
    """Step numbers, as a random-access source for Grain."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> int:
        return step


class BatchIterator(Iterator):
    """Iterates over batches; its state is a small JSON value from which it continues exactly."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        epochs = batches.spec.epochs
        steps = sys.maxsize // 2 if epochs is None else epochs * batches.steps_per_epoch
        dataset = grain.MapDataset.source(Steps(steps)).map(batches.batch)
        self._iterator = iter(dataset.to_iter_dataset(PREFETCH))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self.batches.steps_per_epoch

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict:
        """The cursor: batches handed out so far (prefetched ones do not count)."""
        return {
            "grain": self._iterator.get_state(),
            "rows": self.batches.fingerprint,
            "content": self.batches.content,
        }

    def set_state(self, state: Mapping) -> None:
        """Continues where `get_state` was taken. UserError if the rows or batching differ since.

        A state of an older version has no `content`; then only the rows' lengths are compared.
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
    """Batches of a kind's rows: demonstrations and corpus -> Tokens, comparisons -> Pairs,
    labels and ratings -> Labelled, prompts -> Prompts."""
    rows = list(rows)
    tokens = tokenise(rows, kind, encoder, spec.max_prompt_length, spec.max_response_length)
    return Batches(tokens, spec, encoder.pad_id, columns_digest(rows) if kind in OPEN else "")


def columns_digest(rows: Iterable[Mapping]) -> str:
    """Of all columns of all rows: rewards read the text of prompts, and other columns."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def collate(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Batch:
    """The batch of some rows at a padded length; index -1 is an all-False row of weight 0."""
    return COLLATE[rows.kind](rows, indices, columns, pad_id)


def with_layout(batch: Batch, layout: Layout | None) -> Batch:
    """The batch with its packing on every set of tokens."""
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
    """Returns a row's prompt and, where `response` is given, that response; [] for a filler."""
    if index == FILLER:
        return []
    return [rows.prompts[index], *([] if response is None else [rows.responses[response][index]])]


def right_padded(
    rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int, response: int = 0
) -> Tokens:
    """Prompt, response, the template's tail, padding; the response mask covers the response's
    tokens, its end included.
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
    """Returns prompts that end in the last column, as sampling needs them."""
    tokens_BP, valid_BP = fill(
        [pieces_of(rows, index, None) for index in indices], columns, pad_id, left=True
    )
    return Prompts(tokens_BP, valid_BP, indices.astype(np.int32))


def pairs(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Pairs:
    """Returns comparisons: both responses with their prompt, right-padded. Filler rows weigh 0."""
    chosen = right_padded(rows, indices, columns, pad_id, response=0)
    rejected = right_padded(rows, indices, columns, pad_id, response=1)
    numbers = {
        name: np.where(indices == FILLER, 0, values[indices])
        for name, values in rows.numbers.items()
    }
    return Pairs(chosen, rejected, numbers["weight"], numbers["probability"], numbers["margin"])


def labelled(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Labelled:
    """Returns responses with a label or a rating each, right-padded. Filler rows weigh 0."""
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
