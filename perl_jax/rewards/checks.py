"""Checks of settings that come from JSON, where every type is possible; messages name the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perl_jax.errors import is_number, require


def number(field: str, value: Any) -> None:
    require(is_number(value), f"{field} is {value!r}; it must be a finite number.")


def count(field: str, value: Any, least: int) -> None:
    """Checks for a whole number of at least `least`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(good, f"{field} is {value!r}; it must be a whole number of at least {least}.")


def text(field: str, value: Any) -> None:
    """Checks for a string with something to see in it."""
    require(
        isinstance(value, str) and bool(value.strip()),
        f"{field} is {value!r}; it must be a text that is not empty.",
    )


def texts(field: str, value: Any) -> None:
    """Checks for a list of such strings; a single string is refused, it would be read letter by
    letter.
    """
    good = isinstance(value, (list, tuple)) and all(
        isinstance(item, str) and item.strip() for item in value
    )
    require(good, f"{field} is {value!r}; it must be a list of texts that are not empty.")


def flag(field: str, value: Any) -> None:
    require(isinstance(value, bool), f"{field} is {value!r}; it must be true or false.")


def sequences(*columns: Sequence[Any]) -> None:
    """Checks that prompts, responses and rows are equally many: ValueError, as only code gets that
    wrong.
    """
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"prompts, responses and rows have {', '.join(map(str, lengths))} items; they must be "
            "equally many"
        )
