"""Tasks: where rows come from, and the true reward where one is known."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.jsonl import JsonlBuilder, checked_rows
from perl_jax.data.orders import OrdersBuilder, gold_rewards
from perl_jax.data.store import KINDS, OPEN, DataOptions, NoRows, RowsBuilder, open_rows
from perl_jax.data.taskmaster import BothBuilder, CoffeeBuilder, TicketingBuilder
from perl_jax.errors import UserError, one_of, require
from perl_jax.runtime import files

Gold = Callable[[Sequence[str], Sequence[str]], np.ndarray]


class TaskLike(Protocol):
    """What a job needs of a task.

    Attributes:
        name: The name of the task in messages.
        splits: The splits of each kind of rows (`data.store.KINDS`) that the task has.
        gold: (prompts, responses) -> true rewards [n]; None: these are not known.
    """

    name: str
    splits: Mapping[str, Sequence[str]]
    gold: Gold | None

    def open(self, kind: str, split: str, options: DataOptions) -> Sequence[Mapping[str, Any]]:
        """Returns the rows of a split. Raises NoRows for a split without rows."""

    def content(self, kind: str, options: DataOptions) -> object:
        """Returns a JSON value that determines the rows."""

    def place(self, kind: str, split: str, options: DataOptions, index: int) -> str:
        """Returns where a message says that a row is."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose rows come from a Python function; tasks outside the package are made with it.

    `--data.task path/to/file.py:NAME` and `--data.task module:NAME` read the object NAME. Rows are
    checked as lines of JSON Lines are; columns with a default may be missing.

    Attributes:
        name: What messages call the task.
        rows: (kind, split, options) -> the rows of a split, the same ones at each call. `options`
            has `data_dir` and `seed` as the command line gives them.
        splits: The splits of each kind of rows that the task has, such as
            {"demonstrations": ("train", "validation")}.
        gold: (prompts, responses) -> true rewards [n], which evaluations report; None: not known.
    """

    name: str
    rows: Callable[[str, str, DataOptions], Iterable[Mapping[str, Any]]]
    splits: Mapping[str, Sequence[str]]
    gold: Gold | None = None

    def __post_init__(self) -> None:
        for kind in self.splits:
            one_of(f"{self.name}: kind", kind, KINDS)

    def open(self, kind: str, split: str, options: DataOptions) -> list[dict[str, Any]]:
        """Returns the checked rows of a split. Raises NoRows for a split without rows."""
        found = self._checked(kind, split, options)
        if not found:
            raise NoRows(f"{self.name} has no {kind} rows in its {split} split.")
        return found[: options.size(split)]

    def _checked(self, kind: str, split: str, options: DataOptions) -> list[dict[str, Any]]:
        one_of(f"{self.name}: kind", kind, self.splits)
        if split not in self.splits[kind]:
            return []
        return [
            checked
            for index, row in enumerate(self.rows(kind, split, options))
            for checked in checked_rows(
                row, KINDS[kind], self.place(kind, split, options, index), kind in OPEN
            )
        ]

    def content(self, kind: str, options: DataOptions) -> object:
        """Returns a digest of all rows of a kind."""
        return {
            split: files.digest(self._checked(kind, split, options)) for split in self.splits[kind]
        }

    def place(self, kind: str, split: str, options: DataOptions, index: int) -> str:
        """Returns where a message says that a row is."""
        return f"{self.name}, row {index + 1} of the {kind} in the {split} split"


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task whose rows are written once to array_record files (`data.store.RowsBuilder`).

    Attributes:
        builder: Writes the rows.
        description: One sentence on the task.
        gold: (prompts, responses) -> true rewards [n]; None: these are not known.
    """

    builder: type[RowsBuilder]
    description: str
    gold: Gold | None = None

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        return self.builder.name

    @functools.cached_property
    def splits(self) -> Mapping[str, Sequence[str]]:
        """The splits of each kind of rows that the task has."""
        return dict(self.builder.kind_splits())

    def open(self, kind: str, split: str, options: DataOptions) -> Sequence[Mapping[str, Any]]:
        """Returns the rows of a split, prepared if need be. Raises NoRows where there are none."""
        return open_rows(self.builder, kind, split, options)

    def content(self, kind: str, options: DataOptions) -> object:
        """Returns a JSON value that determines the rows: seeds, sizes, hashes of files."""
        return self.builder.content(kind, options)

    def place(self, kind: str, split: str, options: DataOptions, index: int) -> str:
        """Returns where a message says that a row is."""
        return self.builder.place(kind, split, options, index)


TASKS: dict[str, PreparedTask] = {
    task.name: task
    for task in (
        PreparedTask(
            OrdersBuilder,
            "Embedded: structured coffee orders, simulated raters, known reward.",
            gold_rewards,
        ),
        PreparedTask(
            CoffeeBuilder, "Taskmaster TM-4: coffee ordering, thumbs up or down on single turns."
        ),
        PreparedTask(
            TicketingBuilder, "Taskmaster TM-3: movie ticketing, thumbs up or down on single turns."
        ),
        PreparedTask(
            BothBuilder, "Taskmaster TM-4 and TM-3: the corpora of both, to train a base on."
        ),
        PreparedTask(
            JsonlBuilder, "Your own rows: a JSON Lines file, or a folder with one for each split."
        ),
    )
}


def get_task(name: str) -> TaskLike:
    """Returns the task of a name, or the object that `path/to/file.py:NAME` or `module:NAME` names.

    Raises UserError for a name that is none of the known ones, a file or module that cannot be
    imported, and an object that is no task.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon:
        require(
            name in TASKS,
            f"data.task is {name!r}; it must be one of {', '.join(TASKS)}, or PATH.py:NAME or "
            "MODULE:NAME for a task of your own.",
        )
        return TASKS[name]
    found = vars(_module(source, name)).get(attribute)
    good = all(hasattr(found, field) for field in ("name", "splits", "open", "content", "place"))
    require(
        good,
        f"data.task is {name!r}; {source} has no perl_jax.Task that is called {attribute}.",
    )
    return found


@functools.cache
def _module(source: str, name: str) -> Any:
    """Imports a file or a module once."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = pathlib.Path(source).expanduser().resolve()
        require(path.is_file(), f"data.task is {name!r}; there is no file {path}.")
        spec = importlib.util.spec_from_file_location(f"perl_jax_task_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their own module up by its name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.task is {name!r}; importing {source} failed: {type(error).__name__}: {error}."
        ) from error


def data_options(config: DataConfig) -> DataOptions:
    """Returns what a task is told of a job's data."""
    return DataOptions(
        data_dir=config.data_dir,
        seed=config.data_seed,
        train_size=config.train_size,
        evaluation_size=config.evaluation_size,
    )
