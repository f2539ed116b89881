"""The user's own rows: UTF-8 JSON Lines, one object a line, checked with the line in the
message.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from perl_jax.data.store import (
    DEFAULTS,
    KINDS,
    NUMBERS,
    OPEN,
    SPLITS,
    TENTHS,
    DataOptions,
    RowsBuilder,
    named_group,
    part_of,
)
from perl_jax.errors import UserError, is_number, require
from perl_jax.runtime.files import file_hash

# The largest number that a batch, which is float32, can hold.
_LARGEST = float(np.finfo(np.float32).max)
# Bounds of numbers.
RANGES = {"label": (0, 1), "probability": (0, 1), "weight": (0, math.inf)}


def read_jsonl(
    path: pathlib.Path, fields: Sequence[str], others: bool = False
) -> list[dict[str, Any]]:
    """The rows of a file, with just the wanted fields; blank lines are skipped.

    others: every other field comes too, as it is; only `answer` and `group` are checked, which must
    be a string that is not empty, or a number.

    `label` and `probability` are numbers in [0, 1], `weight` is 0 or more, `margin` and `rating`
    are any numbers, `group` is a string or a number, every other wanted field is a string that is
    not empty; `DEFAULTS` may be absent. Where comparisons are wanted, a line may hold `ranked`, two
    or more responses from best to worst, in the place of `chosen` and `rejected`: it gives every
    pair, their weights adding up to the line's (Ouyang et al. 2022, arXiv 2203.02155, equation 1).
    UserError naming file, line (from 1), field.
    """
    return [row for _, row in numbered_rows(path, fields, others)]


def numbered_rows(
    path: pathlib.Path, fields: Sequence[str], others: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """`read_jsonl`, each row with the number of its line."""
    path = pathlib.Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    numbered = enumerate(lines, start=1)
    rows = [
        (number, row)
        for number, line in numbered
        if line.strip()
        for row in parse_line(line, fields, f"{path}, line {number}", others)
    ]
    require(bool(rows), f"{path} is empty; it must hold one JSON object a line.")
    return rows


def parse_line(
    line: bytes, fields: Sequence[str], where: str, others: bool = False
) -> list[dict[str, Any]]:
    """A line's row, or rows of ranked responses; `where` opens the message of any error."""
    try:
        # utf-8-sig: the byte order mark that some editors put before the first line is not content.
        value = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=functools.partial(_distinct, where)
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}).") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply).") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    return checked_rows(value, fields, where, others)


def checked_rows(
    value: Any, fields: Sequence[str], where: str, others: bool = False
) -> list[dict[str, Any]]:
    """Returns the row that an object is, or the rows of its ranked responses (`read_jsonl`).

    where: begins the message of any UserError.
    """
    require(
        isinstance(value, Mapping),
        f"{where}: must be a JSON object with "
        f"{', '.join(field for field in fields if field not in DEFAULTS)}.",
    )
    value = dict(value)
    _check_text(value, where)
    values = ranked_pairs(value, where) if "ranked" in value and "rejected" in fields else [value]
    kept = {field: item for field, item in value.items() if field not in fields} if others else {}
    for field in ("answer", "group"):
        if field in kept:
            check_name(kept[field], field, where)
    return [{field: checked(value, field, where) for field in fields} | kept for value in values]


def check_name(value: Any, field: str, where: str) -> None:
    """UserError, opened by `where`, unless a field's value can be compared with others: an answer,
    a group.
    """
    good = is_number(value) or (isinstance(value, str) and bool(value.strip()))
    require(
        good,
        f"{where}: the field {field} is {value!r}; it must be a text that is not empty, or a "
        "number.",
    )


def ranked_pairs(value: dict, where: str) -> list[dict]:
    """Every pair of a ranking, the better one chosen; together they weigh what the line does."""
    ranked = value["ranked"]
    require(
        isinstance(ranked, list) and len(ranked) >= 2,
        f"{where}: the field ranked must be a list of two or more responses, best first.",
    )
    require(
        "chosen" not in value and "rejected" not in value,
        f"{where}: give ranked, or chosen and rejected, not both.",
    )
    pairs = list(itertools.combinations(ranked, 2))
    weight = checked(value, "weight", where) / len(pairs)
    return [
        value | {"chosen": better, "rejected": worse, "weight": weight} for better, worse in pairs
    ]


def checked(value: dict, field: str, where: str) -> str | float:
    """A field of a line's object as rows have it, or its default; UserError, opened by `where`."""
    if field not in value and field in DEFAULTS:
        return DEFAULTS[field]
    require(field in value, f"{where}: the field {field} is missing.")
    item = value[field]
    if field == "group":
        check_name(item, field, where)
        return str(item)
    if field in NUMBERS:
        low, high = RANGES.get(field, (-math.inf, math.inf))
        bounds = (
            f"in [{low}, {high}]"
            if high < math.inf
            else "of 0 or more"
            if low == 0
            else "that is finite"
        )
        good = is_number(item) and low <= item <= high
        require(
            not good or abs(item) <= _LARGEST,
            f"{where}: the field {field} is {item!r}; float32 holds numbers up to {_LARGEST:.3g}.",
        )
        require(good, f"{where}: the field {field} is {item!r}; it must be a number {bounds}.")
        return float(item)
    require(
        isinstance(item, str),
        f"{where}: the field {field} is a {type(item).__name__}; it must be a string.",
    )
    require(bool(item.strip()), f"{where}: the field {field} is empty.")
    return item


def _distinct(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields, each of which may be there once: JSON's readers disagree on which of two
    counts.
    """
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{where}: the field {', '.join(twice)} is there more than once.")
    return dict(pairs)


def _check_text(value: Any, where: str, field: str = "") -> None:
    """UserError for half of a surrogate pair, which no file can hold, in any text or name of a
    line.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_text(name, where, field or name.encode("utf-8", "replace").decode())
            _check_text(item, where, field or name)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, where, field)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: the field {field} has half of a surrogate pair.") from error


def split_of(text: str) -> str:
    """The split of a row of a single file, by a hash of its group, prompt or text: 80 / 10 / 10."""
    return part_of(text, TENTHS)


def find(options: DataOptions) -> pathlib.Path:
    """The file or folder of the user's rows; UserError if none is named or there."""
    require(
        options.data_dir is not None,
        "The task jsonl needs --data.data-dir: a .jsonl file, or a folder of them.",
    )
    path = pathlib.Path(options.data_dir).expanduser()
    require(path.exists(), f"There is no file or folder {path}.")
    return path


class JsonlBuilder(RowsBuilder):
    """One file, split 80/10/10 by a hash of the group (of the prompt, where a row names no group)
    so that equal ones stay together, or a folder with train.jsonl, validation.jsonl and test.jsonl
    (a split without a file has no rows).

    A prompt's other columns reach the rewards as they are; those of other kinds of rows are
    dropped.
    """

    name = "jsonl"
    sources: ClassVar = ("jsonl.py",)

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows: any kind may have any split."""
        return dict.fromkeys(KINDS, SPLITS)

    @classmethod
    def content(cls, kind: str, options: DataOptions) -> object:
        """Returns whether one file was given, and each file's hash. UserError if there is none."""
        path = find(options)
        files = [path] if path.is_file() else [path / f"{split}.jsonl" for split in SPLITS]
        found = {file.name: file_hash(file) for file in files if file.is_file()}
        require(
            bool(found), f"{path} holds none of {', '.join(f'{split}.jsonl' for split in SPLITS)}."
        )
        return [path.is_file(), found]

    @classmethod
    def rows(cls, kind: str, split: str, options: DataOptions) -> Iterator[dict]:
        """Returns the rows of a split, in the order of the file."""
        return (row for _, _, row in cls._numbered(kind, split, options))

    @classmethod
    def place(cls, kind: str, split: str, options: DataOptions, index: int) -> str:
        """Returns the file and the line of a row, for messages."""
        file, line, _ = next(itertools.islice(cls._numbered(kind, split, options), index, None))
        return f"{file}, line {line}"

    @classmethod
    def _numbered(
        cls, kind: str, split: str, options: DataOptions
    ) -> Iterator[tuple[pathlib.Path, int, dict]]:
        """(file, line, row) of a split's rows."""
        path, fields, others = find(options), KINDS[kind], kind in OPEN
        if path.is_file():
            return (
                (path, line, row)
                for line, row in numbered_rows(path, fields, others)
                if split_of(named_group(row) or row[fields[0]]) == split
            )
        file = path / f"{split}.jsonl"
        return (
            (file, line, row)
            for line, row in (numbered_rows(file, fields, others) if file.is_file() else [])
        )
