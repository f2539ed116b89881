"""Reads and checks the user's own rows: UTF-8 JSON Lines, one JSON object per line."""

from __future__ import annotations

import functools
import itertools
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.store import (
    DEFAULTS,
    FLAGS,
    KINDS,
    NUMBERS,
    OPEN,
    SPLITS,
    TENTHS,
    RowsBuilder,
    named_group,
    part_of,
    without_default_flags,
)
from perl_jax.errors import UserError, is_number, listed, require
from perl_jax.runtime import files

# The largest number that the float32 arrays of a batch can hold.
_LARGEST = float(np.finfo(np.float32).max)
# Fields that are compared with other texts, so that each must be a number or a text.
COMPARED = ("answer", "group")
# The least and the greatest value of each column of numbers; others may be any finite number.
RANGES = {"label": (0, 1), "probability": (0, 1), "weight": (0, math.inf)}


def read_jsonl(
    path: files.PathLike, fields: Sequence[str], others: bool = False
) -> list[dict[str, Any]]:
    """Returns the rows of a JSON Lines file. Blank lines are skipped.

    `label` and `probability` are numbers in [0, 1], `weight` is 0 or more, `margin` and `rating`
    are any finite numbers, `group` is a string or a number, and `finished` is true or false. Every
    other one of `fields` is a string that is not blank. The fields of `DEFAULTS` may be missing and
    then have their defaults.

    A line of comparisons may have `ranked`, two or more responses from best to worst, instead of
    `chosen` and `rejected`. It makes one row for every pair of responses; the weights of these rows
    add up to the weight of the line (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    Args:
        path: The file.
        fields: The names of the fields that each row gets.
        others: Whether rows keep all other fields too. They are not checked, except that `answer`
            and `group` must be a number or a string that is not blank.

    Raises:
        UserError: The file cannot be read or has no rows, or a line is wrong; the message names the
            file, the line (from 1) and the field.
    """
    return [row for _, row in numbered_rows(path, fields, others)]


def numbered_rows(
    path: files.PathLike,
    fields: Sequence[str],
    others: bool = False,
    compared: Sequence[str] = COMPARED,
) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number of the line from 1, row) for each row of a file; several rows of a ranking
    have the same number.

    Args:
        path: The file.
        fields: The names of the fields that each row gets.
        others: Whether rows keep all other fields too.
        compared: The other fields that must be a number or a text that is not blank.

    Raises:
        UserError: The file cannot be read or has no rows, or a line is wrong (`read_jsonl`).
    """
    path = files.path_of(path)
    lines = files.read_bytes(path).split(b"\n")
    numbered = enumerate(lines, start=1)
    rows = [
        (number, row)
        for number, line in numbered
        if line.strip()
        for row in parse_line(line, fields, f"{path}, line {number}", others, compared)
    ]
    require(bool(rows), f"{path} is empty; it must hold one JSON object a line.")
    return rows


def parse_line(
    line: bytes,
    fields: Sequence[str],
    where: str,
    others: bool = False,
    compared: Sequence[str] = COMPARED,
) -> list[dict[str, Any]]:
    """Returns the rows of a line: one, or the pairs of its ranked responses (`read_jsonl`).

    Args:
        line: The line's bytes, not blank.
        fields: The names of the fields that each row gets.
        where: The file and the line, the beginning of an error message.
        others: Whether rows keep all other fields too.
        compared: The other fields that must be a number or a text that is not blank.

    Raises:
        UserError: The line is not a JSON object in UTF-8, or a field is missing, repeated or wrong.
    """
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
    return checked_rows(value, fields, where, others, compared)


def checked_rows(
    value: Any,
    fields: Sequence[str],
    where: str,
    others: bool = False,
    compared: Sequence[str] = COMPARED,
) -> list[dict[str, Any]]:
    """Returns the rows of a JSON object: one, or the pairs of its ranked responses (`read_jsonl`).

    Args:
        value: The object.
        fields: The names of the fields that each row gets.
        where: Where the object comes from, the beginning of an error message.
        others: Whether rows keep all other fields too.
        compared: The other fields that must be a number or a text that is not blank.

    Raises:
        UserError: The value is no object, or a field is missing or wrong.
    """
    require(
        isinstance(value, Mapping),
        f"{where}: must be a JSON object with {', '.join(required(fields))}.",
    )
    value = dict(value)
    _check_text(value, where)
    values = ranked_pairs(value, where) if "ranked" in value and "rejected" in fields else [value]
    missing = [field for field in required(fields) if field not in values[0]]
    require(not missing, f"{where}: {_missing(missing, fields, value)}")
    kept = {field: item for field, item in value.items() if field not in fields} if others else {}
    for field in compared:
        if field in kept:
            check_name(kept[field], field, where)
    return [
        without_default_flags({field: checked(value, field, where) for field in fields}) | kept
        for value in values
    ]


def required(fields: Sequence[str]) -> list[str]:
    """Returns those of `fields` that have no default (`DEFAULTS`), so that each row needs them."""
    return [field for field in fields if field not in DEFAULTS]


def _missing(missing: Sequence[str], fields: Sequence[str], row: Mapping[str, Any]) -> str:
    """Returns the sentence on a row without fields that it needs: what the kind of rows has, and
    what the row has.

    Args:
        missing: The names of the missing fields, one or more.
        fields: The names of all fields that are read.
        row: The row.
    """
    gone = f"field {missing[0]} is" if len(missing) == 1 else f"fields {_joined(missing)} are"
    read = [kind for kind, columns in KINDS.items() if set(columns) == set(fields) - {"split"}]
    needs = f"{_plural(read[0]) if read else 'rows'} have {_joined(required(fields))}"
    if "rejected" in fields:
        needs += ", or ranked instead of chosen and rejected"
    # A name may hold anything, a line break too.
    names = [name if str(name).isprintable() else repr(name) for name in map(str, row)]
    like = kind_of_row(row)
    same = f", as {_plural(like)} do" if like else ""
    has = f"this row has {_joined(names) if names else 'no fields'}{same}"
    return f"the {gone} missing; {needs}; {has}."


def kind_of_row(row: Mapping[str, Any]) -> str | None:
    """Returns the kind of rows (`KINDS`) whose needed fields a row has; None if no kind fits.

    A row with a field that only other kinds have does not fit: `prompt` with `chosen` alone fits
    neither prompts nor comparisons. Of several kinds the one with the most needed fields counts.

    Args:
        row: The row; its values are not looked at.
    """
    names = set(row) | ({"chosen", "rejected"} if "ranked" in row else set())
    known = {field for columns in KINDS.values() for field in columns}
    fitting = [
        kind
        for kind, columns in KINDS.items()
        if names.issuperset(required(columns)) and names & known <= set(columns)
    ]
    return max(fitting, key=lambda kind: len(required(KINDS[kind])), default=None)


def _plural(kind: str) -> str:
    """Returns the rows of a kind in words: `comparisons`, `corpus rows`."""
    return f"{kind} rows" if kind == "corpus" else kind


def _joined(names: Sequence[str]) -> str:
    """Returns names as text, such as "a, b and c"; after the eighth only their number."""
    if len(names) > 8 or len(names) < 2:
        return listed(names)
    return f"{listed(names[:-1])} and {listed(names[-1:])}"


def check_name(value: Any, field: str, where: str) -> None:
    """Raises UserError unless a value is a finite number or a text that is not blank.

    `answer` and `group` must be such values, because they are compared with others.

    Args:
        value: The value.
        field: The name of its field, for the message.
        where: Where the row comes from, the beginning of the message.
    """
    good = is_number(value) or (isinstance(value, str) and bool(value.strip()))
    require(
        good,
        f"{where}: the field {field} is {value!r}; it must be a text that is not empty, or a "
        "number.",
    )


def ranked_pairs(value: dict, where: str) -> list[dict]:
    """Returns one comparison for each pair of responses in the field `ranked`, the better one as
    `chosen`.

    Each comparison has all other fields of the line, and as `weight` the line's weight divided by
    the number of pairs.

    Args:
        value: The line. `ranked` is a list of responses from best to worst.
        where: Where the line comes from, the beginning of an error message.

    Raises:
        UserError: `ranked` is not a list of two or more responses, or `chosen` or `rejected` is
            given too.
    """
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
    weight = float(checked(value, "weight", where)) / len(pairs)
    return [
        value | {"chosen": better, "rejected": worse, "weight": weight} for better, worse in pairs
    ]


def checked(value: dict, field: str, where: str) -> str | float | bool:
    """Returns the value of one field of a row, or the field's default if it is missing.

    A number is returned as float, a group as str.

    Args:
        value: The row.
        field: The name of the field.
        where: Where the row comes from, the beginning of an error message.

    Raises:
        UserError: `read_jsonl` does not allow the value.
        KeyError: The field is missing and has no default.
    """
    if field not in value and field in DEFAULTS:
        return DEFAULTS[field]
    item = value[field]
    if field == "group":
        check_name(item, field, where)
        return str(item)
    if field == "split":
        require(
            item in SPLITS,
            f"{where}: the field split is {item!r}; it must be {', '.join(SPLITS[:-1])} or "
            f"{SPLITS[-1]}.",
        )
        return item
    if field in FLAGS:
        require(
            isinstance(item, bool),
            f"{where}: the field {field} is {item!r}; it must be true or false.",
        )
        return item
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
        f"{where}: the field {field} is {type_in_words(item)}; it must be a string.",
    )
    require(bool(item.strip()), f"{where}: the field {field} is empty.")
    return item


def type_in_words(value: Any) -> str:
    """Returns the type of a value in words, such as "a number"; null, true and false as such."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return json.dumps(None if value is None else bool(value))
    names = {
        "a string": str,
        "a number": numbers.Number,
        "a list": (list, tuple),
        "an object": Mapping,
    }
    found = (name for name, types in names.items() if isinstance(value, types))
    return next(found, f"of the type {type(value).__name__}")


def _distinct(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a JSON object as a dictionary; raises UserError if a field occurs more
    than once.

    JSON readers disagree on which of the values counts.

    Args:
        where: The file and the line, the beginning of the message.
        pairs: (name, value) of each field, in order.
    """
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{where}: the field {', '.join(twice)} is there more than once.")
    return dict(pairs)


def _check_text(value: Any, where: str, field: str = "") -> None:
    """Raises UserError for a text or name with half of a surrogate pair, which UTF-8 cannot encode.

    Args:
        value: A JSON value; its elements are checked too.
        where: Where the row comes from, the beginning of the message.
        field: The name of the row's field that the value belongs to; "" for the row itself.
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
    """Returns the split that a row of a single file belongs to: train, validation or test.

    It is decided by a hash of the text: 80 % of the hashes are train, 10 % validation, 10 % test.

    Args:
        text: The row's group, or its prompt or text if it has no group.
    """
    return part_of(text, TENTHS)


def find(config: DataConfig) -> files.Path:
    """Returns the file or folder of the user's rows, `config.data_dir`.

    Raises UserError if it is not given or does not exist.
    """
    if config.data_dir is None:
        raise UserError(
            "The task jsonl needs --data.data-dir: a .jsonl file, or a folder of them; --data.task "
            "PATH.py:NAME names another task."
        )
    path = files.path_of(config.data_dir)
    require(files.exists(path), f"There is no file or folder {path}.")
    return path


class JsonlBuilder(RowsBuilder):
    """Reads the user's own rows from a JSON Lines file, or from a folder of such files.

    A single file is split 80/10/10 by a hash of each row's group (of its prompt or text, if the row
    has no group), so that the rows of a group stay in one split. A folder has train.jsonl,
    validation.jsonl and test.jsonl; a split without a file has no rows.

    A row's field `split`, if it has one, says to which split it belongs. So the rows that `best-of`
    made of test prompts are never trained on.

    Other columns of prompts are passed to the rewards unchanged. Other columns of other kinds of
    rows are dropped.
    """

    name = "jsonl"

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows: any kind may have any split."""
        return dict.fromkeys(KINDS, SPLITS)

    @classmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns [whether `data_dir` is a single file, {file name: hash}] of the files that exist.

        Raises UserError if there is none.
        """
        path = find(config)
        single = files.is_file(path)
        given = [path] if single else [path / f"{split}.jsonl" for split in SPLITS]
        found = {file.name: files.file_hash(file) for file in given if files.is_file(file)}
        require(
            bool(found), f"{path} holds none of {', '.join(f'{split}.jsonl' for split in SPLITS)}."
        )
        return [single, found]

    @classmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterator[dict]:
        """Returns an iterator over the rows of a split, in the order of the file.

        Args:
            kind: The kind of the rows (`KINDS`).
            split: One of `SPLITS`.
            config: `data_dir` names the file or the folder.

        Raises:
            UserError: A file cannot be read, or a line is wrong (`read_jsonl`).
        """
        return (row for _, _, row in cls._numbered(kind, split, config))

    @classmethod
    def location(cls, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns the file and the line that a row comes from, as text for messages.

        Args:
            kind: The kind of the row.
            split: Its split.
            config: `data_dir` names the file or the folder.
            index: The row's number in the split, from 0.
        """
        file, line, _ = next(itertools.islice(cls._numbered(kind, split, config), index, None))
        return f"{file}, line {line}"

    @classmethod
    def why_no_rows(
        cls, kind: str, split: str, config: DataConfig, sizes: Mapping[str, int]
    ) -> str:
        """Returns the sentence on a split without rows: the file, how its rows are split, and what
        gives the split rows.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: `data_dir` names the file or the folder.
            sizes: The number of rows of each split that has some.
        """
        path = find(config)
        said = f"{path} has no {kind} rows in its {split} split"
        if not files.is_file(path):
            return f"{said}: there is no file {path / f'{split}.jsonl'}."
        size = sum(sizes.values())
        names = " and ".join(f"{name}.jsonl" for name in dict.fromkeys(("train", split)))
        return (
            f"{said}: it has {size} {'row' if size == 1 else 'rows'}, and the rows of a single "
            "file are split 80/10/10 (train, validation, test) by a hash of their group, or of "
            f"their {KINDS[kind][0]} without one; give more rows, a folder with {names}, or rows "
            f'with "split": "{split}".'
        )

    @classmethod
    def _numbered(
        cls, kind: str, split: str, config: DataConfig
    ) -> Iterator[tuple[files.Path, int, dict]]:
        """Yields (file, number of the line from 1, row) for each row of a split.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: `data_dir` names the file or the folder.

        Raises:
            UserError: A file cannot be read, or a line is wrong or of another split.
        """
        path, fields, others = find(config), KINDS[kind], kind in OPEN
        single = files.is_file(path)
        file = path if single else path / f"{split}.jsonl"
        for line, row in (
            numbered_rows(file, (*fields, "split"), others) if files.is_file(file) else []
        ):
            named = row.pop("split")
            if others and named:
                row["split"] = named
            if single:
                hashed = split_of(named_group(row) or row[fields[0]]) == split
                if named == split or (not named and hashed):
                    yield file, line, row
                continue
            require(
                named in ("", split),
                f"{file}, line {line}: the row's split is {named}, and the file holds the {split} "
                "split; put the row into the file of its split, or leave the field split out.",
            )
            yield file, line, row
