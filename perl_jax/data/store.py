"""Writes rows to array_record files with TensorFlow Datasets (TFDS) builders, and reads them.

TensorFlow itself is never imported: `GeneratorBasedBuilder` writes the rows with
`file_format="array_record"`, and `as_data_source` reads them.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from perl_jax.errors import UserError, one_of, require
from perl_jax.runtime import files
from perl_jax.runtime.copies import CACHE_VARIABLE
from perl_jax.runtime.faults import FileError, sentence
from perl_jax.runtime.files import file_hash
from perl_jax.runtime.json_values import digest
from perl_jax.runtime.outputs import scratch_folder

if TYPE_CHECKING:  # rows are read without JAX, which the module of configs imports
    from perl_jax.data.config import DataConfig

# The columns of each kind of rows.
KINDS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "response", "finished", "group"),
    "comparisons": ("prompt", "chosen", "rejected", "probability", "margin", "weight", "group"),
    "labels": ("prompt", "response", "label", "group"),
    "ratings": ("prompt", "response", "rating", "group"),
    "prompts": ("prompt",),
    "corpus": ("text",),
}
# Columns that hold numbers, and columns that hold true or false; all others hold text.
NUMBERS = ("probability", "margin", "weight", "label", "rating")
FLAGS = ("finished",)
# Defaults of the columns that a row may leave out.
# probability: that `chosen` is preferred; NaN: not known.
# margin: by how much `chosen` is better; the loss reads it.
# weight: of the pair in losses and measures.
# group: the name of the row's dialogue or topic; "": the prompt is the group (`group_of`). Rows of
#   the kind `prompts` have it among their other columns.
# finished: whether the response is complete; no token that ends a turn follows one that is not.
#   Rows in memory have this column only where it is false.
# split: the split that a row of JSON Lines belongs to; "": its file or a hash decides.
DEFAULTS = {
    "probability": float("nan"),
    "margin": 0.0,
    "weight": 1.0,
    "group": "",
    "finished": True,
    "split": "",
}
# Kinds whose rows may have other columns, with any JSON values, that rewards read (such as
# `answer`). They are stored together in the column OTHERS, as the text of a JSON object.
OPEN = ("prompts",)
OTHERS = "others"
SPLITS = ("train", "validation", "test")


def cache_folder() -> pathlib.Path:
    """Returns the folder of prepared rows: $PERL_JAX_CACHE, or ~/.cache/perl_jax/datasets.

    Raises UserError if its path is not UTF-8, which array_record needs.
    """
    folder = pathlib.Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/perl_jax/datasets")
    folder = folder.expanduser()
    require(
        str(folder).encode("utf-8", "replace").decode() == str(folder),
        f"The cache of prepared rows, {str(folder)!r}, has bytes in its path that are not UTF-8; "
        f"set {CACHE_VARIABLE} to another folder.",
    )
    return folder


class RowsBuilder(tfds.core.GeneratorBasedBuilder):
    """Base class of the builders that write a task's rows, with one TFDS config for each kind.

    A subclass implements `kind_splits`, `content` and `rows`.

    Attributes:
        name: The name of the task.
        sources: Modules whose code determines the rows, besides the builder's own.
        settings: Where rows come from and how many are read.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=kind) for kind in KINDS]
    # Set here because TFDS 4.9.10 finds it with importlib_resources, which it does not require.
    code_path: ClassVar = pathlib.Path(__file__)
    sources: ClassVar[tuple[ModuleType, ...]] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        # TFDS would register the builder, and refuse another one of its name.
        super().__init_subclass__(**{**keywords, "skip_registration": True})

    def __init__(self, settings: DataConfig, *, data_dir: str, config: str) -> None:
        self.settings = settings
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    @classmethod
    @abc.abstractmethod
    def kind_splits(cls) -> Mapping[str, tuple[str, ...]]:
        """Returns the names of the splits of each kind of rows that the task has."""

    @classmethod
    @abc.abstractmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns a JSON value that, together with the code, determines the rows: seeds, sizes,
        file hashes.

        Args:
            kind: The kind of the rows (`KINDS`).
            config: Where rows come from and how many are read.
        """

    @classmethod
    @abc.abstractmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterable[Mapping[str, object]]:
        """Yields the rows of a kind and split, in the same order at each call.

        A row has the columns of its kind (`KINDS`), of which those in `DEFAULTS` may be missing.
        Rows of `OPEN` kinds may have other columns.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: Where rows come from and how many are read.
        """

    @classmethod
    def location(cls, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns text for messages that says where a row comes from.

        Args:
            kind: The kind of the row.
            split: Its split.
            config: Where rows come from.
            index: The row's number in the split, from 0.
        """
        return f"{cls.name}, row {index + 1} of the {kind} in the {split} split"

    @classmethod
    def why_no_rows(
        cls, kind: str, split: str, config: DataConfig, sizes: Mapping[str, int]
    ) -> str:
        """Returns the sentence on a split that has no rows.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: Where rows come from.
            sizes: The number of rows of each split that has some.
        """
        return f"{cls.name} has no {kind} rows in its {split} split."

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns what TFDS needs to know of the rows: their columns with types, and that their
        order is kept.
        """
        fields = KINDS[self.builder_config.name]
        stored = (*fields, OTHERS) if self.builder_config.name in OPEN else fields
        features = {
            name: np.float64
            if name in NUMBERS
            else np.bool_
            if name in FLAGS
            else tfds.features.Text()
            for name in stored
        }
        # TFDS would shuffle the rows. Their order is kept, so that messages can number them; the
        # pipeline shuffles later.
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.name,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        """Returns the generator of stored rows of each split that has rows; raises UserError if
        none has.
        """
        kind, generators = self.builder_config.name, {}
        for split in self.kind_splits()[kind]:
            rows = iter(self.rows(kind, split, self.settings))
            # TFDS refuses a split without rows, so such a split is left out.
            first = next(rows, None)
            if first is not None:
                generators[split] = self._generate_examples(itertools.chain([first], rows))
        require(bool(generators), f"{self.name} has no {kind} rows.")
        return generators

    def _generate_examples(self, rows: Iterable[Mapping[str, object]]):
        """Yields (number from 0, stored row) for each row."""
        yield from enumerate(stored_row(self.builder_config.name, row) for row in rows)


def stored_row(kind: str, row: Mapping[str, object]) -> dict[str, object]:
    """Returns a row as it is stored, with defaults for missing columns.

    The other columns of an `OPEN` kind become the text of one JSON object, in the column `OTHERS`.

    Args:
        kind: The kind of the row (`KINDS`).
        row: The row.
    """
    fields = KINDS[kind]
    stored = {field: value for field, value in DEFAULTS.items() if field in fields} | dict(row)
    if kind not in OPEN:
        return stored
    others = {name: stored.pop(name) for name in row if name not in fields}
    return stored | {OTHERS: json.dumps(others)}


class RowSource(Sequence):
    """Gives random access to prepared rows as dictionaries, in which texts are str and numbers
    float. Columns of `FLAGS` are there only where they are not their default.

    The other columns of an `OPEN` kind are fields of the row, with the JSON values that were given.

    Args:
        records: The stored records, of TFDS.
        limit: Keep only the first so many records; None: all.
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
        others = json.loads(str(row.pop(OTHERS, "{}")))
        return without_default_flags(row) | others


def without_default_flags(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row without the columns of `FLAGS` that have their default."""
    return {
        name: value
        for name, value in row.items()
        if name not in FLAGS or bool(value) != DEFAULTS[name]
    }


def plain(value: bytes | float | np.bool_) -> str | float | bool:
    """Returns a stored value as a Python value: bytes as str, a number as float, a flag as bool."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return value.decode("utf-8") if isinstance(value, bytes) else float(value)


def named_group(row: Mapping[str, Any]) -> str:
    """Returns a row's `group` as text; "" if the row has none."""
    group = row.get("group")
    return "" if group is None else str(group)


def group_of(row: Mapping[str, Any]) -> str:
    """Returns the group of a row: its `group`, or, without one, its prompt without white space at
    both ends.

    Rows of one group are not independent: the pairs of a ranking, the turns of a dialogue.
    Confidence intervals treat a group as one unit (`perl_jax.evaluation.intervals`).

    Args:
        row: A row with a `prompt`, or with a `group` that is not empty.
    """
    return named_group(row) or row["prompt"].strip()


def part_of(text: str, percentiles: Mapping[str, tuple[int, int]]) -> str:
    """Returns the name of the part whose percentiles contain the hash of a text.

    The part depends on the text alone: other rows, seeds and sizes do not change it.

    Args:
        text: The text, such as the group of a row.
        percentiles: For each part the bounds [low, high) in per cent of all hashes; together they
            must cover 0 to 100.
    """
    percentile = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    return next(part for part, (low, high) in percentiles.items() if low <= percentile < high)


# The percentiles of hashes that make up each split.
TENTHS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}


def fingerprint(builder: type[RowsBuilder], kind: str, config: DataConfig) -> str:
    """Returns 16 hex digits that identify the rows of a kind: a digest of the builder's code and
    `content`.

    Args:
        builder: Writes the rows.
        kind: The kind of the rows.
        config: Where rows come from and how many are read.
    """
    classes = [found for found in builder.__mro__ if issubclass(found, RowsBuilder)]
    # As a dictionary, each file once: several classes may be in one.
    code = dict.fromkeys(inspect.getfile(source) for source in (*classes, *builder.sources))
    hashes = [file_hash(pathlib.Path(file)) for file in code]
    value = [builder.name, kind, hashes, builder.content(kind, config)]
    return digest(value)


def prepare(builder: type[RowsBuilder], kind: str, config: DataConfig) -> pathlib.Path:
    """Returns the folder of a kind's prepared rows; writes it first if it does not exist.

    The folder's name contains the fingerprint of its rows, so outdated rows are never read. The
    folder is written under a temporary name and renamed when it is complete. A process that is
    killed leaves only such a temporary folder, which nothing reads and the next one deletes. If two
    processes write at the same time, both use the folder that is renamed first.

    Args:
        builder: Writes the rows.
        kind: The kind of the rows.
        config: Where rows come from and how many are read.

    Raises:
        UserError: There are no rows of the kind.
    """
    final = cache_folder() / f"{builder.name}-{kind}-{fingerprint(builder, kind, config)}"
    if files.is_folder(final):
        return final
    tfds.disable_progress_bar()
    with _writable_cache(), scratch_folder(final) as temporary:
        try:
            # TFDS prints its progress to standard output, which is kept for the command's results.
            with contextlib.redirect_stdout(io.StringIO()):
                builder(config, data_dir=str(temporary), config=kind).download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        except UserError:
            raise
        except Exception as error:
            # A file of the cache, or one that the task reads.
            said = sentence(error, f"The cache of prepared rows in {cache_folder()}")
            if said is None:
                raise
            raise FileError(said) from error
        try:
            files.move(temporary, final)
        except UserError:
            if not files.is_folder(final):
                raise
    return final


@contextlib.contextmanager
def _writable_cache() -> Iterator[None]:
    """Context manager that makes the cache's folder; a fault there names the variable that moves
    it.
    """
    try:
        files.make_folder(cache_folder())
        yield
    except FileError as error:
        raise UserError(
            f"{error} {CACHE_VARIABLE} names another folder for the cache of prepared rows."
        ) from error


class NoRows(UserError):
    """A split has no rows; callers that do not need the split catch this error."""


def open_rows(builder: type[RowsBuilder], kind: str, split: str, config: DataConfig) -> RowSource:
    """Returns the rows of a split, at most `config.size(split)`; writes all rows of the kind first
    if they are not prepared.

    Args:
        builder: Writes the rows.
        kind: The kind of the rows.
        split: The split.
        config: Where rows come from and how many are read.

    Raises:
        UserError: The task does not have the kind or split.
        NoRows: The split has no rows.
    """
    splits = builder.kind_splits()
    one_of(f"{builder.name}: kind", kind, splits)
    one_of(f"{builder.name}: split of {kind}", split, splits[kind])
    folder = prepare(builder, kind, config)
    reader = builder(config, data_dir=str(folder), config=kind)
    if split not in reader.info.splits:
        sizes = {name: info.num_examples for name, info in reader.info.splits.items()}
        raise NoRows(builder.why_no_rows(kind, split, config, sizes))
    return RowSource(reader.as_data_source(split), config.size(split))
