"""Tasks: where rows come from, and the true reward where one is known."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.jsonl import JsonlBuilder
from perl_jax.data.row_checks import checked_rows
from perl_jax.data.store import KINDS, OPEN, NoRows, RowsBuilder, open_rows
from perl_jax.errors import UserError, default_of, one_of, require
from perl_jax.runtime import files, json_values

Gold = Callable[[Sequence[str], Sequence[str]], np.ndarray]
# Settings of `DataConfig` that only some tasks read.
OPTIONS = ("data_dir", "data_seed")


class TaskLike(Protocol):
    """What reading rows needs of a task; `Task` and `PreparedTask` have it."""

    @property
    def name(self) -> str:
        """The name of the task in messages."""
        ...

    @property
    def splits(self) -> Mapping[str, Sequence[str]]:
        """The splits of each kind of rows (`data.store.KINDS`) that the task has."""
        ...

    @property
    def gold(self) -> Gold | None:
        """(prompts, responses) -> true rewards [n]; None: these are not known."""
        ...

    @property
    def vocabulary(self) -> Sequence[str] | None:
        """All words of the task's texts; None: there may be any words."""
        ...

    @property
    def options(self) -> Sequence[str]:
        """The names in `OPTIONS` of the settings that the task reads."""
        ...

    def open(self, kind: str, split: str, config: DataConfig) -> Sequence[Mapping[str, Any]]:
        """Returns the rows of a split, at most `config.size(split)`.

        Args:
            kind: One of `data.store.KINDS`.
            split: The split.
            config: Where rows come from and how many are read.

        Raises:
            NoRows: The split has no rows.
        """
        ...

    def content(self, kind: str, config: DataConfig) -> object:
        """Returns a JSON value that determines all rows of a kind."""
        ...

    def location(self, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns text for messages that says where a row comes from.

        Args:
            kind: The kind of the row.
            split: Its split.
            config: Where rows come from.
            index: The row's number in the split, from 0.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose rows come from a Python function; tasks outside the package are made with this
    class.

    `--data.task path/to/file.py:NAME` and `--data.task module:NAME` read the object NAME. Rows are
    checked as lines of JSON Lines are; columns with a default may be missing.

    Attributes:
        name: The name of the task in messages.
        rows: (kind, split, config) -> the rows of a split, the same ones at each call. `config` has
            the settings of the command line, such as `data_dir` and `data_seed`.
        splits: The splits of each kind of rows that the task has, such as {"demonstrations":
            ("train", "validation")}.
        gold: (prompts, responses) -> true rewards [n], which evaluations report; None: not known.
        vocabulary: All words of the texts, which are separated by spaces; `perl-jax base` then
            makes a tokenizer of whole words. None: any words may occur.
        options: Which of the settings `data_dir` and `data_seed` the function reads; setting the
            other one is an error.
    """

    name: str
    rows: Callable[[str, str, DataConfig], Iterable[Mapping[str, Any]]]
    splits: Mapping[str, Sequence[str]]
    gold: Gold | None = None
    vocabulary: Sequence[str] | None = None
    options: Sequence[str] = OPTIONS

    def __post_init__(self) -> None:
        for option in self.options:
            one_of(f"{self.name}: option", option, OPTIONS)
        for kind in self.splits:
            one_of(f"{self.name}: kind", kind, KINDS)

    def open(self, kind: str, split: str, config: DataConfig) -> list[dict[str, Any]]:
        """Returns the checked rows of a split, at most `config.size(split)`.

        Args:
            kind: The kind of the rows (`data.store.KINDS`).
            split: The split.
            config: Passed to `rows`; limits the number of rows.

        Raises:
            NoRows: The split has no rows.
            UserError: The task does not have the kind, or a row is wrong.
        """
        found = self._checked(kind, split, config)
        if not found:
            raise NoRows(f"{self.name} has no {kind} rows in its {split} split.")
        return found[: config.size(split)]

    def _checked(self, kind: str, split: str, config: DataConfig) -> list[dict[str, Any]]:
        """Returns all rows of a split after checking them; [] for a split that the task does not
        have.

        Raises UserError if the task does not have the kind, or a row is wrong.
        """
        one_of(f"{self.name}: kind", kind, self.splits)
        if split not in self.splits[kind]:
            return []
        return [
            checked
            for index, row in enumerate(self.rows(kind, split, config))
            for checked in checked_rows(
                row, KINDS[kind], self.location(kind, split, config, index), kind in OPEN
            )
        ]

    def content(self, kind: str, config: DataConfig) -> object:
        """Returns a digest of all rows of each split of a kind: {split: 16 hex digits}."""
        return {
            split: json_values.digest(self._checked(kind, split, config))
            for split in self.splits[kind]
        }

    def location(self, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns text for messages that says where a row comes from; `index` is its number in the
        split, from 0.
        """
        return f"{self.name}, row {index + 1} of the {kind} in the {split} split"


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task whose rows are written once to array_record files (`data.store.RowsBuilder`).

    Attributes:
        builder: Writes the rows.
        gold: (prompts, responses) -> true rewards [n]; None: they are not known.
        vocabulary: All words of the texts; None: any words may occur (see `Task`).
        options: Which of the settings `data_dir` and `data_seed` the builder reads.
    """

    builder: type[RowsBuilder]
    gold: Gold | None = None
    vocabulary: Sequence[str] | None = None
    options: Sequence[str] = OPTIONS

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        return self.builder.name

    @property
    def splits(self) -> Mapping[str, Sequence[str]]:
        """The splits of each kind of rows that the task has."""
        return dict(self.builder.kind_splits())

    def open(self, kind: str, split: str, config: DataConfig) -> Sequence[Mapping[str, Any]]:
        """Returns the rows of a split, at most `config.size(split)`; writes the rows first if they
        are not prepared.

        Args:
            kind: The kind of the rows (`data.store.KINDS`).
            split: The split.
            config: Where rows come from and how many are read.

        Raises:
            NoRows: The split has no rows.
            UserError: The task does not have the kind or split.
        """
        return open_rows(self.builder, kind, split, config)

    def content(self, kind: str, config: DataConfig) -> object:
        """Returns a JSON value that determines the rows: seeds, sizes, hashes of files."""
        return self.builder.content(kind, config)

    def location(self, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns text for messages that says where a row comes from; `index` is its number in the
        split, from 0.
        """
        return self.builder.location(kind, split, config, index)


TASKS: dict[str, TaskLike] = {JsonlBuilder.name: PreparedTask(JsonlBuilder, options=("data_dir",))}
# Data sets that were once built in -> the task's file in this project's repository, and its name.
FORMER = {
    "orders": "experiments/orders/data.py:ORDERS",
    "taskmaster_coffee": "experiments/taskmaster/data.py:COFFEE",
    "taskmaster_ticketing": "experiments/taskmaster/data.py:TICKETING",
    "taskmaster": "experiments/taskmaster/data.py:BOTH",
}


def task_of(config: DataConfig) -> TaskLike:
    """Returns the task that `config.task` names (`get_task`).

    Raises UserError if there is no such task, or if `config` sets one of `OPTIONS` that the task
    does not read.
    """
    task = get_task(config.task)
    for option in (option for option in OPTIONS if option not in task.options):
        value = vars(config)[option]
        require(
            value == default_of(DataConfig, option),
            f"data.{option} is {value!r}, which the task {task.name} does not read; leave it out.",
        )
    return task


def get_task(name: str) -> TaskLike:
    """Returns a task by its name.

    Args:
        name: A key of `TASKS`; or `path/to/file.py:NAME` or `module:NAME`, the object NAME of a
            file or module.

    Raises:
        UserError: The name is unknown, the file or module cannot be imported, or the object lacks
            the attributes of a task (`TaskLike`).
    """
    source, colon, attribute = name.rpartition(":")
    if not colon:
        require(
            name not in FORMER,
            f"data.task is {name!r}, which is not part of the package any more; give its file in "
            f"the repository of perl_jax: {FORMER.get(name)}.",
        )
        require(
            name in TASKS,
            f"data.task is {name!r}; it must be {', '.join(TASKS)}, or PATH.py:NAME or MODULE:NAME "
            "for a task outside the package.",
        )
        return TASKS[name]
    try:
        found: Any = vars(_module(source)).get(attribute)
    except UserError as error:
        raise UserError(f"data.task is {name!r}; {error}") from error
    needed = ("name", "splits", "gold", "vocabulary", "options", "open", "content", "location")
    require(
        all(hasattr(found, field) for field in needed),
        f"data.task is {name!r}; {source} has no perl_jax.Task that is called {attribute}.",
    )
    return found


@functools.cache
def _module(source: str) -> ModuleType:
    """Imports a module, or a file, once and returns the module.

    A file is imported as a package whose folder is the file's, so that `from .other import x` finds
    other.py beside it.

    Args:
        source: The module's name, or the path of a .py file.

    Raises:
        UserError: There is no such file, or the import fails.
    """
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = files.local(source, "The file of a task").resolve()
        require(files.is_file(path), f"there is no file {path}.")
        unique = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
        spec = importlib.util.spec_from_file_location(
            f"perl_jax_task_{path.stem}_{unique}",
            path,
            submodule_search_locations=[str(path.parent)],
        )
        assert spec is not None and spec.loader is not None  # a path that ends in .py has a loader
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their own module up by its name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"importing {source} failed: {type(error).__name__}: {error}.") from error
