"""Errors that end a run, and checks of config fields that raise them.

Each message is one sentence that names the field, the value it has and the values it may have.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class UserError(Exception):
    """An error that the user can correct.

    The command line prints it as one sentence and exits with status 2. It is not a ValueError,
    because libraries that build configs (tyro) catch those and reformat them.
    """


class Occupied(UserError):
    """A folder or file holds something else than what a command would put there.

    Attributes:
        path: The folder or file.
    """

    def __init__(self, message: str, path: Any) -> None:
        super().__init__(message)
        self.path = path


class TrainingError(RuntimeError):
    """An error that ends a run, such as a NaN loss.

    Checkpoints saved before it stay as they are.
    """


class Stopped(Exception):
    """Raised after a run was told to stop (SIGTERM) and has saved its state.

    The command line exits with status 143.
    """


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C to a run with a folder, at the end of the step, which has been saved.

    It is a KeyboardInterrupt, so that `except Exception` does not swallow it and a notebook stops
    at its cell. The command line exits with status 130.
    """


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` if the condition is False."""
    if not condition:
        raise UserError(message)


def shown(value: Any) -> str:
    """Returns a value for a message: its `repr`, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_of(field: str, value: Any, allowed: Sequence[Any] | Mapping[str, Any]) -> None:
    """Raises UserError if `value` is not among `allowed`; the message lists the allowed values.

    Args:
        field: Name of the field in the message.
        value: The field's value.
        allowed: The allowed values; the keys of a mapping.
    """
    names = list(allowed)
    require(
        any(value is name or value == name for name in names),
        f"{field} is {shown(value)}; it must be one of {', '.join(map(str, names))}.",
    )


def positive(field: str, value: float, *, zero: bool = False) -> None:
    """Raises UserError if `value` is not a finite number above 0.

    Args:
        field: Name of the field in the message.
        value: The field's value.
        zero: Whether 0 is allowed too.
    """
    good = (
        isinstance(value, (int, float))
        and math.isfinite(value)
        and (value >= 0 if zero else value > 0)
    )
    bound = "at least 0" if zero else "greater than 0"
    require(good, f"{field} is {value!r}; it must be a finite number {bound}.")


def whole(field: str, value: float) -> None:
    """Raises UserError unless `value` is an int above 0: 3.0 is refused, True passes as 1.

    Args:
        field: Name of the field in the message.
        value: The field's value.
    """
    require(
        isinstance(value, int) and value > 0,
        f"{field} is {value!r}; it must be a whole number greater than 0.",
    )


def read_by(field: str, value: Any, default: Any, choice: str, readers: Sequence[str]) -> None:
    """Raises UserError if an option is set that the user's choice does not read.

    A set option without an effect would mislead the user.

    Args:
        field: The option's name.
        value: The option's value; the default always passes.
        default: The option's default.
        choice: The user's choice, such as the name of an algorithm.
        readers: All choices that read the option; the message lists them.
    """
    do = "reads" if len(readers) == 1 else "read"
    require(
        value == default or choice in readers,
        f"{field} is {value!r}, which {choice} does not read; leave it out ({', '.join(readers)} "
        f"{do} it).",
    )


def unread(config: Any, options: Sequence[str], choice: str, readers: Sequence[str]) -> None:
    """Raises UserError if one of `options` is set although `choice` does not read it.

    An option counts as set if it differs from its default.

    Args:
        config: A frozen config.
        options: Names of its fields, dotted for fields of nested configs: `data.packing`.
        choice: The user's choice, which reads none of the options.
        readers: All choices that read the options; the message lists them.
    """
    for option in options:
        *above, field = option.split(".")
        holder = config
        for name in above:
            holder = vars(holder)[name]
        read_by(option, vars(holder)[field], default_of(type(holder), field), choice, readers)


def numbers(field: str, text: str | None, example: str) -> tuple[int, ...]:
    """Returns the numbers of a list with ranges: `0,2,4-7` gives (0, 2, 4, 5, 6, 7), sorted.

    Args:
        field: Name of the field in the message.
        text: The list; None gives ().
        example: A valid list, for the message.

    Raises UserError for any other text.
    """
    found: set[int] = set()
    for item in [] if text is None else text.split(","):
        first, dash, last = item.strip().partition("-")
        good = (
            first.isdecimal()
            and (last.isdecimal() if dash else True)
            and (not dash or int(first) <= int(last))
        )
        require(good, f"{field} is {text!r}; it must look like {example}.")
        found |= set(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))


def default_of(cls: type, field: str) -> Any:
    """Returns the default value of a field of a frozen config class."""
    return next(found.default for found in dataclasses.fields(cls) if found.name == field)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite int or float of a float's range; a bool is not."""
    # Not math.isfinite, which raises on an integer of hundreds of digits.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
