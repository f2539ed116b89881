"""User-facing errors, checks for configs, and the configs that several jobs share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import typing
from typing import Any, Mapping, Sequence

TUNINGS = ("lora", "full")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adafactor", "adamw")
SCHEDULES = ("constant", "linear", "cosine")


class UserError(Exception):
    """Something the user can put right; the command line prints it as one sentence, status 2.

    Not a ValueError: libraries that build configs (tyro) catch those and dress them up.
    """


class TrainingError(RuntimeError):
    """A run cannot go on (NaN, a sampler that disagrees); what was saved before is untouched."""


class Stopped(Exception):
    """A run was told to stop (SIGTERM) and has saved where it is; the command line's status is 143."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_of(field: str, value: Any, allowed: Sequence[Any] | Mapping[str, Any]) -> None:
    """Checks a choice; the message names the field, the value and every allowed value."""
    names = list(allowed)
    require(value in names, f"{field} is {value!r}; it must be one of {', '.join(map(str, names))}.")


def positive(field: str, value: float, *, zero: bool = False) -> None:
    """Checks that a number is finite and > 0 (>= 0 with `zero`)."""
    good = isinstance(value, (int, float)) and math.isfinite(value) and (value >= 0 if zero else value > 0)
    bound = "at least 0" if zero else "greater than 0"
    require(good, f"{field} is {value!r}; it must be a finite number {bound}.")


def whole(field: str, value: int) -> None:
    """Checks that a number is a whole one above 0."""
    require(isinstance(value, int) and value > 0, f"{field} is {value!r}; it must be a whole number greater than 0.")


def read_by(field: str, value: Any, default: Any, chosen: str, readers: Sequence[str]) -> None:
    """Refuses an option that is set although what was chosen does not read it.

    An option that does nothing would let its user believe that it does something. readers: every
    choice that reads the option; the message names them.
    """
    do = "reads" if len(readers) == 1 else "read"
    require(value == default or chosen in readers, f"{field} is {value!r}, which {chosen} does not read; leave it out ({', '.join(readers)} {do} it).")


def unread(config: Any, options: Sequence[str], chosen: str, readers: Sequence[str]) -> None:
    """`read_by` for options of a frozen config, such as `data.packing`, that `chosen` does not read; their defaults pass."""
    for option in options:
        *above, field = option.split(".")
        holder = config
        for name in above:
            holder = vars(holder)[name]
        read_by(option, vars(holder)[field], default_of(type(holder), field), chosen, readers)


def numbers(field: str, text: str | None, example: str) -> tuple[int, ...]:
    """`0,2,4-7` as sorted whole numbers; None: none. example: what the error says it must look like."""
    found: set[int] = set()
    for item in [] if text is None else text.split(","):
        first, dash, last = item.strip().partition("-")
        good = first.isdecimal() and (last.isdecimal() if dash else True) and (not dash or int(first) <= int(last))
        require(good, f"{field} is {text!r}; it must look like {example}.")
        found |= set(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config as plain JSON types (paths become strings, tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Rebuilds a frozen config (nested ones too) from `to_dict`'s output.

    Raises UserError naming a field the class does not have, so that an artefact written by a newer
    version is refused instead of read with a setting silently dropped, or one that is missing.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}.")
    missing = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING and field.name not in values]
    require(not missing, f"{cls.__name__} needs the field {', '.join(missing)}, which is not there.")
    return cls(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    candidates = typing.get_args(hint) or (hint,)
    for candidate in candidates:
        if dataclasses.is_dataclass(candidate) and isinstance(value, Mapping):
            return from_dict(candidate, value)
    return tuple(value) if isinstance(value, list) else value


def default_of(cls: type, field: str) -> Any:
    """The default of a frozen config's field."""
    return next(found.default for found in dataclasses.fields(cls) if found.name == field)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one rename: a reader or a crash sees the old file or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes one JSON value, atomically."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads JSON; a missing or broken file is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def file_hash(path: pathlib.Path) -> str:
    """The blake2b hash of a file's bytes, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def digest(value: Any) -> str:
    """16 hex digits of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest in it, under `checksum`."""
    values = {name: value for name, value in values.items() if name != "checksum"}
    return values | {"checksum": digest(values)}


def is_whole(values: Any) -> bool:
    """Whether an object is as it was `sealed`."""
    return isinstance(values, Mapping) and values.get("checksum") == sealed(values)["checksum"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optax settings of one trainable tree.

    Attributes:
        name: adafactor (the paper's; Shazeer & Stern 2018, no relative step) or adamw.
        learning_rate: The largest rate; None: 1e-4 for adapters, 1e-5 for full tuning, more on bases
            narrower than 2,048: times (2048 / width)^0.75.
        head_learning_rate: The scalar head's own rate; None: the same as the rest.
        lora_b_ratio: B's rate over A's (LoRA+; its paper uses 16); 1: the same.
        schedule: After the warm-up: constant, or linear or cosine decay to 0.
        warmup_steps: Steps of linear warm-up; 0: none.
        clip_norm: Largest global norm over the role's trainable leaves; None: no clipping.
        weight_decay: Share of the weights taken off a step: adamw times the rate, adafactor as it is.
        b1: AdamW's decay of the mean of gradients.
        b2: AdamW's decay of the mean of squared gradients.
        epsilon: AdamW's; 1e-5, not 1e-8, because policy gradients are small and rare.
    """

    name: typing.Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    lora_b_ratio: float = 1.0
    schedule: typing.Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for field in ("learning_rate", "head_learning_rate"):
            if getattr(self, field) is not None:
                positive(f"optimizer.{field}", getattr(self, field))
        if self.clip_norm is not None:
            positive("optimizer.clip_norm", self.clip_norm)
        positive("optimizer.warmup_steps", self.warmup_steps, zero=True)
        positive("optimizer.weight_decay", self.weight_decay, zero=True)
        positive("optimizer.epsilon", self.epsilon)
        positive("optimizer.lora_b_ratio", self.lora_b_ratio)
        for field in ("b1", "b2"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field} is {value!r}; it must lie in [0, 1).")
        # Adafactor has no momentum here, its own decay of squares and its own epsilons.
        for field in ("b1", "b2", "epsilon"):
            read_by(f"optimizer.{field}", getattr(self, field), default_of(OptimizerConfig, field), self.name, ("adamw",))
