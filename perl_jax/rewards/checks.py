"""Checks of settings read from JSON, where a value can have any type. Every message names the
field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perl_jax.errors import COUNT, is_number, require, shown


def require_number(field: str, value: Any) -> None:
    """Raises UserError, naming `field`, unless `value` is a finite number."""
    require(is_number(value), f"{field} is {value!r}; it must be a finite number.")


def require_count(field: str, value: Any, least: int) -> None:
    """Raises UserError, naming `field`, unless `value` is a whole number of at least `least` and at
    most `COUNT`.
    """
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(good, f"{field} is {shown(value)}; it must be a whole number of at least {least}.")
    require(value <= COUNT, f"{field} is {shown(value)}; it must be at most {COUNT}.")


def require_text(field: str, value: Any) -> None:
    """Raises UserError, naming `field`, unless `value` is a string that is not blank."""
    require(
        isinstance(value, str) and bool(value.strip()),
        f"{field} is {value!r}; it must be a text that is not empty.",
    )


def require_texts(field: str, value: Any) -> None:
    """Raises UserError, naming `field`, unless `value` is a list or tuple of strings that are not
    blank.

    A single string is refused: Python would read it as a sequence of letters. An empty list passes.
    """
    good = isinstance(value, (list, tuple)) and all(
        isinstance(item, str) and item.strip() for item in value
    )
    require(good, f"{field} is {value!r}; it must be a list of texts that are not empty.")


def require_flag(field: str, value: Any) -> None:
    """Raises UserError, naming `field`, unless `value` is True or False."""
    require(isinstance(value, bool), f"{field} is {value!r}; it must be true or false.")


def require_equal_lengths(*columns: Sequence[Any]) -> None:
    """Raises ValueError unless all columns (prompts, responses, rows) have the same length.

    The error is not a UserError, because only calling code can cause the mismatch.
    """
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"prompts, responses and rows have {', '.join(map(str, lengths))} items; they must be "
            "equally many"
        )
