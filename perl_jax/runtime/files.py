"""JSON files that are replaced atomically, hashes of content, and configs as JSON values."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from perl_jax.errors import UserError, require


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a frozen config as JSON types: paths become strings, tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Returns a frozen config, nested ones included, from the output of `to_dict`.

    Args:
        cls: The config's class.
        values: The fields, keyed by name; fields with a default may be missing.

    Raises UserError for a field that the class does not have, so that settings written by a newer
    version are not dropped silently, and for a missing field without a default.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(
        not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}."
    )
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    require(
        not missing, f"{cls.__name__} needs the field {', '.join(missing)}, which is not there."
    )
    return cls(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    """Returns a JSON value as its field's type: configs are rebuilt, lists become tuples.

    Args:
        hint: Type annotation of the field.
        value: The JSON value.
    """
    candidates = typing.get_args(hint) or (hint,)
    for candidate in candidates:
        if (
            isinstance(candidate, type)
            and dataclasses.is_dataclass(candidate)
            and isinstance(value, Mapping)
        ):
            return from_dict(candidate, value)
    return tuple(value) if isinstance(value, list) else value


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file so that a reader or a crash sees either the old content or the new.

    The text goes to a temporary file in the same folder, which is then renamed to `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as JSON with sorted keys to a file, atomically (`write_atomically`)."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises UserError that names the file if it is missing, cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits, brackets without end
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def file_hash(path: pathlib.Path) -> str:
    """Returns the blake2b hash of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


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


def folder_bytes(folder: pathlib.Path) -> int:
    """Returns the total size of all files below a folder, in bytes."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[pathlib.Path]:
    """Context manager that yields a path; it becomes the folder `to` when the block ends.

    Write a folder or file at the yielded path, which does not exist yet. After an error nothing is
    left of it. Missing parents of `to` are created. Raises UserError if `to` exists.
    """
    folder = pathlib.Path(to).expanduser()
    require(not folder.exists(), f"{folder} exists already; give --to a folder that does not.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
