"""JSON values: frozen configs as JSON and back, and checksums of values."""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError, require, shown


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a frozen config as JSON types: paths become strings, tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type, values: Any, where: str | None = None) -> Any:
    """Returns a frozen config, nested ones included, from the output of `to_dict`.

    Args:
        cls: The config's class.
        values: The fields, keyed by name; fields with a default may be missing.
        where: What a message names before a field, such as a file; None: the class.

    Raises UserError for a value that does not have its field's type, for a field that the class
    does not have, so that settings written by a newer version are not dropped silently, and for a
    missing field without a default.
    """
    where = where or cls.__name__
    hints = typing.get_type_hints(cls)
    require(isinstance(values, Mapping), f"{where} is {shown(values)}; it must be an object.")
    unknown = sorted(str(name)[:80] for name in set(values) - set(hints))
    require(not unknown, f"{where} has no field {', '.join(unknown)}; it has {', '.join(hints)}.")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    require(not missing, f"{where} needs the field {', '.join(missing)}, which is not there.")
    return cls(
        **{name: restored(f"{where}.{name}", hints[name], value) for name, value in values.items()}
    )


def restored(where: str, hint: Any, value: Any) -> Any:
    """Returns a JSON value as its field's type: configs are rebuilt, lists become tuples.

    Args:
        where: The field, for messages.
        hint: Type annotation of the field.
        value: The JSON value.

    Raises UserError for a value of another type.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    candidates = typing.get_args(hint) if union else (hint,)
    for candidate in candidates:
        if dataclasses.is_dataclass(candidate) and isinstance(value, Mapping):
            return from_dict(typing.cast(type, candidate), value, where)
        if _has_type(candidate, value):
            return tuple(value) if isinstance(value, list) else value
    kinds = " or ".join(map(_kind, candidates))
    raise UserError(f"{where} is {shown(value)}; it must be {kinds}.")


def _has_type(hint: Any, value: Any) -> bool:
    """Returns whether a JSON value has the type of an annotation that is no union and no config.

    An int is a float too; a bool is neither.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin is types.NoneType:
        return value is None
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin is pathlib.Path:
        return isinstance(value, str)
    if origin in (tuple, list, collections.abc.Sequence):
        kinds = [kind for kind in inner if kind is not Ellipsis]
        return isinstance(value, list) and all(
            not kinds or any(_has_type(kind, item) for kind in kinds) for item in value
        )
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            not inner or _has_type(inner[1], item) for item in value.values()
        )
    # Any other annotation, such as Any, has no JSON type to compare with.
    return not dataclasses.is_dataclass(origin)


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
    pathlib.Path: "a path",
    tuple: "a list",
    list: "a list",
}


def _kind(hint: Any) -> str:
    """Returns the description of a type annotation for a message: `a whole number`."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (tuple, list) and inner and inner[0] in (int, float, str):
        return {int: "a list of whole numbers", float: "a list of numbers"}.get(
            inner[0], "a list of texts"
        )
    return _KINDS.get(origin, "an object")


def digest(value: Any) -> str:
    """Returns 16 hex digits that identify a JSON value; the order of keys does not matter."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with its own digest under the key `checksum`, added or replaced."""
    values = {name: value for name, value in values.items() if name != "checksum"}
    return values | {"checksum": digest(values)}


def has_valid_checksum(values: Any) -> bool:
    """Returns whether a JSON object has the checksum that `with_checksum` gives its other keys."""
    return (
        isinstance(values, Mapping) and values.get("checksum") == with_checksum(values)["checksum"]
    )
