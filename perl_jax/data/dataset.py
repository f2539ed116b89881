"""The rows that a job reads, by split: of a task, or given in memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.row_checks import checked_rows
from perl_jax.data.store import DEFAULTS, KINDS, OPEN, NoRows, named_group
from perl_jax.data.tasks import TaskLike, task_of
from perl_jax.errors import one_of, require
from perl_jax.runtime import hosts, json_values

# Characters of a shared prompt that a message shows.
_SHOWN = 80

Row = Mapping[str, Any]
# (rows, name of the dataset, split): raises UserError for rows that a job cannot use.
Check = Callable[[Sequence[Row], str, str], Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of one kind.

    Attributes:
        name: The name of the dataset in messages.
        kind: Which columns a row has (`data.store.KINDS`).
        splits: The rows of each split that has any, in order, with random access.
        location: (split, index from 0) -> text that says where a row comes from, for messages.
        content: Returns a JSON value that determines the rows.
        gold: (prompts, responses) -> true rewards [n]; None: they are not known.
        tokens: The rows of splits as tokens, so that they are tokenised once (`data.loading`).
    """

    name: str
    kind: str
    splits: Mapping[str, Sequence[Row]]
    location: Callable[[str, int], str]
    content: Callable[[], object]
    gold: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None
    tokens: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows of a split; raises UserError if the split has no rows."""
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
    """Returns rows in memory as a dataset.

    Rows are checked as lines of JSON Lines are (`jsonl.read_jsonl`); columns that have a default
    may be missing.

    Args:
        kind: The kind of the rows (`data.store.KINDS`).
        train: The training rows, at least one; or a dataset of this kind, which is returned
            unchanged, while the other rows are ignored.
        validation: The rows of the split validation.
        test: The rows of the split test.

    Raises:
        UserError: A row is wrong (the message names the split, the row, from 1, and the column),
            there are no training rows, or the dataset has another kind.
    """
    if isinstance(train, Dataset):
        require(
            train.kind == kind,
            f"{train.name} has {train.kind} rows; {kind} rows are needed here.",
        )
        return train
    given = {"train": list(train), "validation": list(validation), "test": list(test)}
    require(bool(given["train"]), f"There are no {kind} rows to train on; give at least one.")
    location = lambda split, index: f"Row {index + 1} of the {split} rows"
    splits: dict[str, Sequence[Row]] = {}
    for split, rows in given.items():
        found = [
            checked
            for index, row in enumerate(rows)
            for checked in checked_rows(
                _without_defaults(row), KINDS[kind], location(split, index), kind in OPEN
            )
        ]
        if found:
            splits[split] = found
    return Dataset("the given rows", kind, splits, location, lambda: json_values.digest(splits))


def _without_defaults(row: Any) -> Any:
    """Returns a row without the columns whose value is their default (`store.DEFAULTS`).

    Such a value may not pass the checks, because it means that nothing is given: an unknown
    probability is NaN, no group is "". A value that is no mapping is returned unchanged.
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
    """Returns the rows of a task as a dataset; prints which prompts and groups two splits share.

    Two prompts are the same if their texts are equal after white space is removed at both ends.

    Args:
        config: Names the task and limits the number of its rows.
        kind: The kind of the rows (`data.store.KINDS`).
        needed: Splits that must have rows; other splits are opened if they have any.
        check: Called with (rows, task name, split) for each needed split; None: no check.

    Raises:
        UserError: The task or kind is unknown, a needed split has no rows, or `check` refuses rows.
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
    """Returns one split of a task's rows as a dataset.

    Args:
        config: Names the task and limits the number of its rows.
        kind: The kind of the rows (`data.store.KINDS`).
        split: The split.

    Raises:
        UserError: The task is unknown, or the split has no rows.
    """
    task = task_of(config)
    rows = hosts.writer_first(lambda: task.open(kind, split, config))
    return _of_splits(task, config, kind, {split: rows})


def _of_splits(
    task: TaskLike, config: DataConfig, kind: str, splits: Mapping[str, Sequence[Row]]
) -> Dataset:
    """Returns the dataset of a task's opened splits.

    Args:
        task: The task.
        config: The settings that the splits were opened with.
        kind: The kind of the rows (`data.store.KINDS`).
        splits: The rows by split.
    """
    location = lambda split, index: task.location(kind, split, config, index)
    return Dataset(task.name, kind, splits, location, lambda: task.content(kind, config), task.gold)


def _compare_splits(
    name: str,
    kind: str,
    splits: Mapping[str, Sequence[Row]],
    needed: Sequence[str],
    check: Check | None,
) -> None:
    """Calls `check` on the rows of needed splits; the first process prints which prompts and groups
    two splits share.

    Args:
        name: The task's name.
        kind: The kind of the rows.
        splits: The rows of each split.
        needed: Splits whose rows are checked.
        check: Called with (rows, task name, split); None: no check.
    """
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
    """Returns a sentence for each two splits that share texts: the number of shared texts, and one
    of them.

    Args:
        name: The name of the dataset.
        what: What the texts are: `prompts`, `texts` or `groups`.
        texts: The distinct texts of each split, in order; only the keys of the inner mappings are
            read.
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
