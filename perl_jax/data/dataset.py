"""The rows that a job reads, by split: of a task, or given in memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.jsonl import checked_rows
from perl_jax.data.store import DEFAULTS, KINDS, OPEN, NoRows, named_group
from perl_jax.data.tasks import TaskLike, task_of
from perl_jax.errors import one_of, require
from perl_jax.runtime import files, hosts

# Characters of a shared prompt that a message shows.
_SHOWN = 80

Row = Mapping[str, Any]
# (rows, name of the dataset, split): raises UserError for rows that a job cannot use.
Check = Callable[[Sequence[Row], str, str], Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of one kind.

    Attributes:
        name: What messages call the rows.
        kind: Which columns a row has (`data.store.KINDS`).
        splits: The rows of each split that has any, in order, with random access.
        place: (split, index) -> where a message says that a row is.
        content: Returns a JSON value that determines the rows.
        gold: (prompts, responses) -> true rewards [n]; None where these are not known.
    """

    name: str
    kind: str
    splits: Mapping[str, Sequence[Row]]
    place: Callable[[str, int], str]
    content: Callable[[], object]
    gold: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows of a split. Raises UserError for a split without rows."""
        require(
            split in self.splits,
            f"{self.name} has no {self.kind} rows in a {split} split; it has "
            f"{', '.join(self.splits)}.",
        )
        return self.splits[split]


def of_rows(
    kind: str,
    train: Iterable[Row] | Dataset,
    validation: Iterable[Row] = (),
    test: Iterable[Row] = (),
) -> Dataset:
    """Returns rows in memory as a dataset; a dataset of the kind is returned as it is.

    Rows are checked as lines of JSON Lines are, and columns that have a default may be missing.
    Raises UserError that names the split, the row (from 1) and the column.
    """
    if isinstance(train, Dataset):
        require(
            train.kind == kind,
            f"{train.name} has {train.kind} rows; {kind} rows are needed here.",
        )
        return train
    given = {"train": list(train), "validation": list(validation), "test": list(test)}
    require(bool(given["train"]), f"There are no {kind} rows to train on; give at least one.")
    place = lambda split, index: f"Row {index + 1} of the {split} rows"
    splits: dict[str, Sequence[Row]] = {}
    for split, rows in given.items():
        found = [
            checked
            for index, row in enumerate(rows)
            for checked in checked_rows(
                _without_defaults(row), KINDS[kind], place(split, index), kind in OPEN
            )
        ]
        if found:
            splits[split] = found
    return Dataset("the given rows", kind, splits, place, lambda: files.digest(splits))


def _without_defaults(row: Any) -> Any:
    """Returns a row without the columns that hold their defaults, as the rows of a task do.

    A default stands for a value that is not given, and need not be one that could be given: an
    unknown probability is NaN, no group is "".
    """
    if not isinstance(row, Mapping):
        return row
    is_default = lambda name, value: (
        name in DEFAULTS
        and (value == DEFAULTS[name] or (value != value and DEFAULTS[name] != DEFAULTS[name]))
    )
    return {name: value for name, value in row.items() if not is_default(name, value)}


def of_task(
    config: DataConfig, kind: str, needed: Sequence[str], check: Check | None = None
) -> Dataset:
    """Opens every split of a task's rows and says which prompts and groups two splits share.

    Two prompts are the same when their texts are equal, white space at both ends aside.

    Args:
        config: Names the task and limits its rows.
        kind: Which rows of the task.
        needed: Splits that must have rows; other splits are opened where they have any.
        check: Is called with the rows of each needed split.

    Raises:
        UserError: For a needed split without rows, or rows that `check` refuses.
    """
    task = task_of(config)
    one_of(f"{task.name}: kind", kind, task.splits)
    others = [split for split in task.splits[kind] if split not in needed]

    def opened() -> dict[str, Sequence[Row]]:
        found = {}
        for split in (*needed, *others):
            try:
                found[split] = task.open(kind, split, config)
            except NoRows:
                if split in needed:
                    raise
        return found

    splits = hosts.writer_first(opened)
    _compare_splits(task.name, kind, splits, needed, check)
    return _of_splits(task, config, kind, splits)


def of_split(config: DataConfig, kind: str, split: str) -> Dataset:
    """Opens one split of a task's rows. Raises UserError for a split without rows."""
    task = task_of(config)
    rows = hosts.writer_first(lambda: task.open(kind, split, config))
    return _of_splits(task, config, kind, {split: rows})


def _of_splits(
    task: TaskLike, config: DataConfig, kind: str, splits: Mapping[str, Sequence[Row]]
) -> Dataset:
    place = lambda split, index: task.place(kind, split, config, index)
    return Dataset(task.name, kind, splits, place, lambda: task.content(kind, config), task.gold)


def _compare_splits(
    name: str,
    kind: str,
    splits: Mapping[str, Sequence[Row]],
    needed: Sequence[str],
    check: Check | None,
) -> None:
    """Calls `check` on the needed splits and prints what two splits share."""
    field = KINDS[kind][0]
    # Dictionaries instead of sets keep the order of the rows.
    texts: dict[str, dict[str, None]] = {}
    groups: dict[str, dict[str, None]] = {}
    for split, source in splits.items():
        rows = list(source)
        if check is not None and split in needed:
            check(rows, name, split)
        texts[split] = dict.fromkeys(row[field].strip() for row in rows)
        groups[split] = dict.fromkeys(filter(None, map(named_group, rows)))
    if hosts.is_writer():
        for line in shared(name, f"{field}s", texts) + shared(name, "groups", groups):
            print(line, flush=True)


def shared(name: str, what: str, texts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each two splits that share texts, with their number and the first.

    Args:
        name: Of the dataset.
        what: What the texts are: `prompts`, `texts` or `groups`.
        texts: The distinct texts of each split, in order.
    """
    lines = []
    for (one, mine), (other, theirs) in itertools.combinations(texts.items(), 2):
        both = [text for text in theirs if text in mine]
        if both:
            first = both[0] if len(both[0]) <= _SHOWN else f"{both[0][:_SHOWN]}…"
            lines.append(
                f"{name}: the splits {one} and {other} share {len(both)} of the latter's "
                f"{len(theirs)} {what}, such as {first!r}; neither is held out from the other "
                "there."
            )
    return lines
