"""Errors that end a run, and checks of config fields that raise them.

Each message is one sentence that names the field, the value it has and the values it may have.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

# The largest number of float32, its smallest above 0, and the largest number of a 32-bit counter.
# Devices compute with these types, in which other numbers would be infinite, 0 or negative.
LARGEST, SMALLEST, COUNT = 3.4028234e38, 1.1754944e-38, 2**31 - 1
# The largest seed.
SEED = 2**63 - 1
# The largest values of fields by name that memory or compilation is in proportion to, far above
# any that is used; other whole numbers are at most COUNT (`in_range`).
MOST = {
    "rank": 2**16,
    "batch_size": 2**20,
    "batch": 2**20,
    "microbatches": 2**20,
    "samples": 2**16,
    "n": 2**16,
    "slots": 2**20,
    "minibatches": 2**20,
    "epochs": 2**16,
    "max_new_tokens": 2**20,
    "max_prompt_length": 2**20,
    "max_response_length": 2**20,
    "prompt_length": 2**20,
    "response_length": 2**20,
    "bucket_count": 2**10,
    "block": 2**20,
    "validation_prompts": 2**20,
    "train_size": 10**8,
    "evaluation_size": 10**8,
    "vocab_size": 2**24,
    "width": 2**20,
    "ffn_width": 2**22,
    "layers": 10_000,
    "heads": 2**16,
    "kv_heads": 2**16,
    "head_dim": 2**16,
    "unroll": 10_000,
    "seed": SEED,
    "data_seed": SEED,
}
# The most numbers in a list with ranges (`numbers`).
_LISTED = 10_000


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


def listed(items: Iterable[str], most: int = 8, separator: str = ", ") -> str:
    """Returns the first items of a list for a message, and how many more there are.

    Args:
        items: The items; of each at most 200 characters are shown.
        most: How many are shown.
        separator: What is put between two.
    """
    names = list(items)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(name[:200] for name in names[:most]) + more


def one_of(field: str, value: Any, allowed: Sequence[Any] | Mapping[str, Any]) -> None:
    """Raises UserError if `value` is not among `allowed`; the message lists the allowed values.

    Args:
        field: Name of the field in the message.
        value: The field's value.
        allowed: The allowed values; the keys of a mapping.
    """
    names = list(allowed)
    require(
        value in names,
        f"{field} is {shown(value)}; it must be one of {', '.join(map(str, names))}.",
    )


def positive(field: str, value: float, *, zero: bool = False, most: float = LARGEST) -> None:
    """Raises UserError if `value` is not a finite number above 0 and at most `most`.

    Args:
        field: Name of the field in the message.
        value: The field's value.
        zero: Whether 0 is allowed too.
        most: The largest value; the default is the largest that 32 bits hold.
    """
    good = is_number(value) and (value >= 0 if zero else value > 0)
    bound = "at least 0" if zero else "greater than 0"
    require(good, f"{field} is {shown(value)}; it must be a finite number {bound}.")
    require(value <= most, f"{field} is {shown(value)}; it must be at most {most}.")


def whole(field: str, value: float, *, zero: bool = False, most: int = COUNT) -> None:
    """Raises UserError unless `value` is an int above 0 and at most `most`; 3.0 is refused.

    Args:
        field: Name of the field in the message.
        value: The field's value.
        zero: Whether 0 is allowed too.
        most: The largest value; the default is the largest of a 32-bit counter.
    """
    good = isinstance(value, int) and not isinstance(value, bool)
    good = good and (value >= 0 if zero else value > 0)
    bound = "at least 0" if zero else "greater than 0"
    require(good, f"{field} is {shown(value)}; it must be a whole number {bound}.")
    require(value <= most, f"{field} is {shown(value)}; it must be at most {most}.")


def in_range(config: Any, section: str = "") -> None:
    """Raises UserError for a numeric field of a config that no device could compute with.

    A field annotated int must hold a whole number of at most `MOST[its name]`, or `COUNT`, in
    absolute value. A field annotated float must hold a finite number in float32's range. None
    passes where the annotation allows it. A seed must be 0 or more; what else a field demands,
    such as a sign, its config checks itself.

    Args:
        config: A frozen config.
        section: Its name in messages, such as lora; nothing for a command's own fields.
    """
    for field in dataclasses.fields(config):
        kinds = {kind.strip() for kind in str(field.type).split("|")}
        value = vars(config)[field.name]
        name = f"{section}.{field.name}".lstrip(".")
        if not kinds & {"int", "float"} or (value is None and "None" in kinds):
            continue
        good = is_number(value) and ("float" in kinds or isinstance(value, int))
        kind = "a finite number" if "float" in kinds else "a whole number"
        require(good, f"{name} is {shown(value)}; it must be {kind}.")
        number = cast(float, value)
        most = LARGEST if "float" in kinds else MOST.get(field.name, COUNT)
        require(abs(number) <= most, f"{name} is {shown(value)}; it must be at most {most}.")
        signed = number >= 0 or most != SEED
        require(signed, f"{name} is {shown(value)}; a seed is 0 to {SEED}.")
        require(
            number == 0 or abs(number) >= SMALLEST,
            f"{name} is {shown(value)}, which is 0 in float32; it must be at least {SMALLEST}.",
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
        last = last if dash else first
        good = all(end.isdecimal() and len(end) <= len(str(COUNT)) for end in (first, last))
        good = good and int(first) <= int(last)
        require(good, f"{field} is {shown(text)}; it must look like {example}.")
        require(
            int(last) - int(first) + len(found) < _LISTED,
            f"{field} is {shown(text)}; it may list at most {_LISTED} numbers.",
        )
        found |= set(range(int(first), int(last) + 1))
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
