"""What a user did wrong, said in one sentence, and the checks of configs that say it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class UserError(Exception):
    """Something the user can put right; the command line prints it as one sentence, status 2.

    Not a ValueError: libraries that build configs (tyro) catch those and dress them up.
    """


class TrainingError(RuntimeError):
    """A run cannot go on (NaN, a sampler that disagrees); what was saved before is untouched."""


class Stopped(Exception):
    """A run was told to stop (SIGTERM) and has saved where it is; the command line's status is
    143.
    """


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_of(field: str, value: Any, allowed: Sequence[Any] | Mapping[str, Any]) -> None:
    """Checks a choice; the message names the field, the value and every allowed value."""
    names = list(allowed)
    require(
        value in names, f"{field} is {value!r}; it must be one of {', '.join(map(str, names))}."
    )


def positive(field: str, value: float, *, zero: bool = False) -> None:
    """Checks that a number is finite and > 0 (>= 0 with `zero`)."""
    good = (
        isinstance(value, (int, float))
        and math.isfinite(value)
        and (value >= 0 if zero else value > 0)
    )
    bound = "at least 0" if zero else "greater than 0"
    require(good, f"{field} is {value!r}; it must be a finite number {bound}.")


def whole(field: str, value: int) -> None:
    """Checks that a number is a whole one above 0."""
    require(
        isinstance(value, int) and value > 0,
        f"{field} is {value!r}; it must be a whole number greater than 0.",
    )


def read_by(field: str, value: Any, default: Any, chosen: str, readers: Sequence[str]) -> None:
    """Refuses an option that is set although what was chosen does not read it.

    An option that does nothing would let its user believe that it does something. readers: every
    choice that reads the option; the message names them.
    """
    do = "reads" if len(readers) == 1 else "read"
    require(
        value == default or chosen in readers,
        f"{field} is {value!r}, which {chosen} does not read; leave it out ({', '.join(readers)} "
        f"{do} it).",
    )


def unread(config: Any, options: Sequence[str], chosen: str, readers: Sequence[str]) -> None:
    """`read_by` for options of a frozen config, such as `data.packing`, that `chosen` does not
    read; their defaults pass.
    """
    for option in options:
        *above, field = option.split(".")
        holder = config
        for name in above:
            holder = vars(holder)[name]
        read_by(option, vars(holder)[field], default_of(type(holder), field), chosen, readers)


def numbers(field: str, text: str | None, example: str) -> tuple[int, ...]:
    """`0,2,4-7` as sorted whole numbers; None: none. example: what the error says it must look
    like.
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
    """The default of a frozen config's field."""
    return next(found.default for found in dataclasses.fields(cls) if found.name == field)


def is_number(value: Any) -> bool:
    """A finite int or float, no larger than a float can be; a bool is not a number here."""
    # Not math.isfinite, which raises on an integer of hundreds of digits.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
