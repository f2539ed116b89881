"""Regular expressions in bounded time.

Python's `re` may take for ever on nested repetitions: (a+)+$ on a long row of a's that ends with a
b. The library `regex` reads the same patterns and stops when a time is over.
"""

from __future__ import annotations

import re
import time
from typing import Any

import regex

from perl_jax.errors import UserError, require
from perl_jax.rewards import checks

SECONDS = 5.0  # the longest time for one response
_SHOWN = 80  # characters of a response that a message quotes


def check_pattern(field: str, pattern: Any) -> None:
    """Raises UserError unless a value is a regular expression in the syntax of Python's `re`.

    Args:
        field: The field's name, for the message.
        pattern: The value.
    """
    checks.require_text(field, pattern)
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{field} is {pattern!r}, which is not a regular expression: {error}."
        ) from (error)


def _compiled(pattern: str) -> regex.Pattern:
    """Returns a compiled pattern, with the meaning that it has in `re` (VERSION0)."""
    return regex.compile(pattern, regex.VERSION0)


def matches(field: str, pattern: str, text: str, index: int, whole: bool = False) -> bool:
    """Returns whether a pattern is found in a text, or matches the whole text.

    Args:
        field: The field that has the pattern, for error messages.
        pattern: The pattern.
        text: The text, a response.
        index: The response's number in the batch, for error messages.
        whole: Whether the pattern must match the whole text.

    Raises:
        UserError: The search takes longer than `SECONDS`.
    """
    compiled = _compiled(pattern)
    try:
        search = compiled.fullmatch if whole else compiled.search
        return search(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise _too_slow(field, pattern, text, index) from error


def last_match(field: str, pattern: str, text: str, index: int) -> str | None:
    """Returns what the last match of a pattern in a text holds; None without a match.

    It is the first group of the pattern, or the whole match of a pattern without groups.

    Args:
        field: The field that has the pattern, for error messages.
        pattern: The pattern.
        text: The text, a response.
        index: The response's number in the batch, for error messages.

    Raises:
        UserError: The search takes longer than `SECONDS`.
    """
    last, latest = None, time.monotonic() + SECONDS
    try:
        for found in _compiled(pattern).finditer(text, timeout=SECONDS):
            if time.monotonic() > latest:
                raise TimeoutError
            last = found
    except TimeoutError as error:
        raise _too_slow(field, pattern, text, index) from error
    return None if last is None else last.group(1 if last.re.groups else 0)


def _too_slow(field: str, pattern: str, text: str, index: int) -> UserError:
    """Returns the error for a search that takes too long."""
    return UserError(
        f"{field} {pattern!r} takes longer than {SECONDS:g} s for the response at index {index}, "
        f"{text[:_SHOWN]!r}; nested repetitions such as (a+)+ do so, give a simpler pattern."
    )


def require_groups(field: str, pattern: str) -> None:
    """Raises UserError if a pattern has more than one group, so that it is unclear what to take.

    Args:
        field: The field's name, for the message.
        pattern: The pattern.
    """
    groups = re.compile(pattern).groups
    require(
        groups <= 1,
        f"{field} {pattern!r} has {groups} groups; give one group around the answer, and write "
        "others as (?:...).",
    )
