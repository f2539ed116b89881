"""Prepared rows on disk: TFDS builders that write array_record files, and the source that reads
them.

TensorFlow is never imported: rows are written by `GeneratorBasedBuilder` with
`file_format="array_record"` and read by `as_data_source`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from perl_jax.errors import UserError, one_of, positive, require
from perl_jax.runtime.files import digest, file_hash

KINDS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "response", "group"),
    "comparisons": ("prompt", "chosen", "rejected", "probability", "margin", "weight", "group"),
    "labels": ("prompt", "response", "label", "group"),
    "ratings": ("prompt", "response", "rating", "group"),
    "prompts": ("prompt",),
    "corpus": ("text",),
}
NUMBERS = ("probability", "margin", "weight", "label", "rating")
# What a row may leave out. probability: of chosen being preferred, NaN where not known. margin: by
# how much chosen is better, for the loss. weight: of the pair. group: the name of the row's
# dialogue or topic, "" where its prompt stands for it (`group_of`); prompts have it among their
# other columns.
DEFAULTS = {"probability": float("nan"), "margin": 0.0, "weight": 1.0, "group": ""}
# Kinds whose rows may have other columns, of any JSON values, for rewards to read (such as
# `answer`); they are stored in one column, as the text of a JSON object.
OPEN = ("prompts",)
OTHERS = "others"
SPLITS = ("train", "validation", "test")
CACHE_VARIABLE = "PERL_JAX_CACHE"


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where rows come from and how many are wanted.

    data_dir: a local copy of the data set's upstream folder; for `jsonl` the file or folder.
    cache_dir: where prepared files live; None: $PERL_JAX_CACHE, or ~/.cache/perl_jax/datasets.
    seed: of the embedded task's rows; it has no effect on the others.
    train_size, evaluation_size: rows of the train split, and of each other split. The embedded task
        generates as many; the others give at most so many, the first ones. None: all there are.
    """

    data_dir: str | None = None
    cache_dir: str | None = None
    seed: int = 0
    train_size: int | None = None
    evaluation_size: int | None = None

    def __post_init__(self) -> None:
        positive("data.seed", self.seed, zero=True)
        for field in ("train_size", "evaluation_size"):
            if getattr(self, field) is not None:
                positive(f"data.{field}", getattr(self, field))

    @property
    def cache_path(self) -> pathlib.Path:
        """The folder of prepared files: as given, else the environment's, else in the home."""
        default = os.environ.get(CACHE_VARIABLE) or "~/.cache/perl_jax/datasets"
        return pathlib.Path(self.cache_dir or default).expanduser()

    def size(self, split: str) -> int | None:
        """Returns how many rows a split shall have; None: as many as the task has."""
        return self.train_size if split == "train" else self.evaluation_size


class RowsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A task's builder: one config for each kind of rows, splits and rows in a fixed order.

    A task derives from it, sets `name` and `sources` (the package's files that determine its rows,
    besides what `content` says) and implements `kind_splits`, `content` and `rows`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=kind) for kind in KINDS]
    # Stated, because TFDS 4.9.10 needs an undeclared package (importlib_resources) to find it.
    code_path: ClassVar = pathlib.Path(__file__)
    sources: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: DataOptions, *, data_dir: str, config: str) -> None:
        self.options = options
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    @classmethod
    @abc.abstractmethod
    def kind_splits(cls) -> Mapping[str, tuple[str, ...]]:
        """The splits of each kind the task has."""

    @classmethod
    @abc.abstractmethod
    def content(cls, kind: str, options: DataOptions) -> object:
        """A JSON value that, with the code, determines the rows: seeds, sizes, files' hashes."""

    @classmethod
    @abc.abstractmethod
    def rows(cls, kind: str, split: str, options: DataOptions) -> Iterable[Mapping[str, object]]:
        """The rows of one kind and split, in order; those of `OPEN` kinds with any other
        columns.
        """

    @classmethod
    def place(cls, kind: str, split: str, options: DataOptions, index: int) -> str:
        """Where a message says that a row is, by its number in the split from 0."""
        return f"{cls.name}, row {index + 1} of the {kind} in the {split} split"

    def _info(self) -> tfds.core.DatasetInfo:
        fields = KINDS[self.builder_config.name]
        stored = (*fields, OTHERS) if self.builder_config.name in OPEN else fields
        features = {
            name: np.float64 if name in NUMBERS else tfds.features.Text() for name in stored
        }
        # The generator's order is kept: it is the order users see, and the pipeline shuffles
        # anyway.
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.name,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        kind, generators = self.builder_config.name, {}
        for split in self.kind_splits()[kind]:
            rows = iter(self.rows(kind, split, self.options))
            # TFDS refuses a split without rows, so such a split is left out.
            first = next(rows, None)
            if first is not None:
                generators[split] = self._generate_examples(itertools.chain([first], rows))
        require(bool(generators), f"{self.name} has no {kind} rows.")
        return generators

    def _generate_examples(self, rows: Iterable[Mapping[str, object]]):
        yield from enumerate(stored_row(self.builder_config.name, row) for row in rows)


def stored_row(kind: str, row: Mapping[str, object]) -> dict[str, object]:
    """A row as it is stored: what it leaves out at its default, other columns (`OPEN`) as one
    text.
    """
    fields = KINDS[kind]
    stored = {field: value for field, value in DEFAULTS.items() if field in fields} | dict(row)
    if kind not in OPEN:
        return stored
    others = {name: stored.pop(name) for name in row if name not in fields}
    return stored | {OTHERS: json.dumps(others)}


class RowSource(Sequence):
    """Random access to prepared rows as dictionaries of str and float (stored as float32).

    The other columns of an `OPEN` kind are beside them, as they were given.
    """

    def __init__(self, records: Sequence, limit: int | None = None) -> None:
        self._records = records
        self._size = len(records) if limit is None else min(limit, len(records))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        row = {name: plain(value) for name, value in self._records[index].items()}
        others = json.loads(row.pop(OTHERS, "{}"))
        return row | others


def plain(value: object) -> str | float:
    """Returns a stored value as a str or a float."""
    return value.decode("utf-8") if isinstance(value, bytes) else float(value)


def named_group(row: Mapping[str, Any]) -> str:
    """What a row's `group` says; "" where it has none."""
    group = row.get("group")
    return "" if group is None else str(group)


def group_of(row: Mapping[str, Any]) -> str:
    """The group that a row is not independent of: its `group`, or else its prompt.

    Intervals take the rows of one group together (`perl_jax.evaluation.intervals`): the pairs of a
    ranking, the turns of a dialogue. White space at both ends of a prompt does not count.
    """
    return named_group(row) or row["prompt"].strip()


def part_of(text: str, percentiles: Mapping[str, tuple[int, int]]) -> str:
    """The part whose percentiles [low, high) a text's hash is in: the same for ever, whatever else
    there is.
    """
    percentile = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    return next(part for part, (low, high) in percentiles.items() if low <= percentile < high)


# Train, validation, test.
TENTHS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}


def fingerprint(builder: type[RowsBuilder], kind: str, options: DataOptions) -> str:
    """16 hex digits of everything that determines the rows: the code that makes them and
    `content`.
    """
    folder = pathlib.Path(__file__).parent
    code = {name: file_hash(folder / name) for name in sorted({"store.py", *builder.sources})}
    value = [builder.name, kind, code, builder.content(kind, options)]
    return digest(value)


def prepare(builder: type[RowsBuilder], kind: str, options: DataOptions) -> pathlib.Path:
    """The folder of a kind's prepared files; made if it does not exist.

    The folder's name holds the content's fingerprint, so stale rows cannot be read. It is made
    under a temporary name beside the final one and renamed when complete: a process killed midway
    leaves only a `.preparing-*` folder that nothing reads, and of two processes that race one wins
    and the other uses what the winner made.
    """
    final = options.cache_path / f"{builder.name}-{kind}-{fingerprint(builder, kind, options)}"
    if final.is_dir():
        return final
    options.cache_path.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()
    temporary = tempfile.mkdtemp(prefix=f".preparing-{final.name}-", dir=options.cache_path)
    try:
        # TFDS prints what it does to standard output, which belongs to the command's own output.
        with contextlib.redirect_stdout(io.StringIO()):
            builder(options, data_dir=temporary, config=kind).download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


class NoRows(UserError):
    """A split of a task without rows: an error where they are needed, no more than a fact where
    they are not.
    """


def open_rows(builder: type[RowsBuilder], kind: str, split: str, options: DataOptions) -> RowSource:
    """A split's rows, prepared first if need be. UserError for an unknown kind or split; NoRows for
    a split without rows.
    """
    splits = builder.kind_splits()
    one_of(f"{builder.name}: kind", kind, splits)
    one_of(f"{builder.name}: split of {kind}", split, splits[kind])
    folder = prepare(builder, kind, options)
    reader = builder(options, data_dir=str(folder), config=kind)
    if split not in reader.info.splits:
        raise NoRows(f"{builder.name} has no {kind} rows in its {split} split.")
    return RowSource(reader.as_data_source(split), options.size(split))
