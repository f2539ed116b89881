"""Checks the rows that a user gives: their fields, types and values."""

from __future__ import annotations

import itertools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data.store import (
    DEFAULTS,
    FLAGS,
    KINDS,
    NUMBERS,
    SPLITS,
    without_default_flags,
)
from perl_jax.errors import UserError, is_number, listed, require

# The largest number that the float32 arrays of a batch can hold.
_LARGEST = float(np.finfo(np.float32).max)
# Fields that are compared with other texts, so that each must be a number or a text.
COMPARED = ("answer", "group")
# The least and the greatest value of each column of numbers; others may be any finite number.
RANGES = {"label": (0, 1), "probability": (0, 1), "weight": (0, math.inf)}


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
