"""`--config FILE`: a command's settings from a YAML or JSON file, which flags then override."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import tyro
import yaml

from perl_jax.errors import UserError, require, shown
from perl_jax.runtime import files, json_values

FLAG = "--config"
# The most bytes of a file of settings, and the most opening brackets, whose square is the time that
# PyYAML takes for them.
_LARGEST, _BRACKETS = 2**20, 500


class _Loader(yaml.SafeLoader):
    """YAML's core schema (YAML 1.2): `1e-5` is a number; `on`, `no` and `2024-07-26` are texts.

    A key may come once in a mapping.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Returns a mapping; raises UserError for a key that comes twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        line = node.start_mark.line + 1
        require(
            not repeated,
            f"the object that begins in line {line} has the key {', '.join(repeated)} twice.",
        )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:null|Null|NULL|~|)$", "nN~"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _firsts = [*_first, *([""] if _tag == "null" else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _firsts)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """Returns a number; YAML 1.1 would read 010 as 8."""
    text = str(loader.construct_scalar(node))
    return int(text) if node.tag.endswith(":int") else float(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def take(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns (file, the other arguments) of a command line; the file is None without `--config`.

    Raises:
        UserError: `--config` comes without a file, or twice.
    """
    found, rest, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        require(
            bool(value) and (bool(equals) or not value.startswith("--")),
            f"{FLAG} needs a file: {FLAG} FILE.yaml.",
        )
        found.append(value)
    require(len(found) < 2, f"{FLAG} is given {len(found)} times; give one file.")
    return (found[0] if found else None), rest


def read_defaults(name: str, config: type, path: str) -> Any:
    """Returns the settings in a file as an instance of a command's config, for `tyro.cli`.

    The file holds an object like the one under `config` in a run's config.json; a whole config.json
    is read too. Settings that the file lacks have their defaults, or `tyro.MISSING` if there are
    none. Types are checked here; whether the values fit each other is not, because flags may still
    change them.

    Args:
        name: The command.
        config: Its config class.
        path: The file, YAML or JSON.

    Raises:
        UserError: The file cannot be read, has a setting that the command does not have, a value of
            another type, or is for another job. The message has the setting's path.
    """
    file = files.path_of(path)
    values = _read(file)
    require(
        isinstance(values, Mapping), f"{file} is {shown(values)}; it must hold settings, by name."
    )
    if isinstance(values.get("config"), Mapping):
        values = values["config"]
    if "job" not in typing.get_type_hints(config):
        # A run's config.json says which command made it.
        job = values.get("job", name)
        require(
            job == name,
            f"{file}: job is {shown(job)}; these are no settings of {name}, which needs its own.",
        )
        values = {key: value for key, value in values.items() if key != "job"}
    return _unchecked(f"{file}: ", "", config, values)


def _read(file: files.Path) -> Any:
    """Returns the content of a YAML or JSON file; raises UserError if it cannot be read."""
    files.require_regular(file, largest=_LARGEST)
    if file.suffix == ".json":
        return files.read_json(file)
    text = files.read_text(file)
    try:
        brackets = text.count("[") + text.count("{")
        require(brackets <= _BRACKETS, f"it has {brackets} brackets; at most {_BRACKETS} are read.")
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" line {mark.line + 1},"
        raise UserError(f"{file} is not valid YAML:{where} {error.problem}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{file} is not valid YAML: {said}.") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _unchecked(where: str, above: str, config: type, values: Any) -> Any:
    """Returns an instance of a config class without running its checks (`__post_init__`).

    Args:
        where: What messages begin with: the file.
        above: The names of the enclosing configs, each followed by a dot.
        config: The class.
        values: The settings, by name.

    Raises:
        UserError: A setting is unknown, or a value has another type.
    """
    require(
        isinstance(values, Mapping),
        f"{where}{above.rstrip('.')} is {shown(values)}; it must hold settings, by name.",
    )
    hints = typing.get_type_hints(config)
    for name in values:
        close = difflib.get_close_matches(str(name).replace("-", "_"), hints, n=1)
        meant = f"did you mean {above}{close[0]}?" if close else f"it has {', '.join(hints)}."
        require(name in hints, f"{where}{above}{name} is no setting; {meant}")
    made = object.__new__(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if field.name in values:
            value = values[field.name]
            path = f"{above}{field.name}"
            value = (
                _unchecked(where, f"{path}.", hint, value)
                if isinstance(hint, type) and dataclasses.is_dataclass(hint)
                else json_values.restored(f"{where}{path}", hint, value)
            )
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        # Configs are frozen.
        object.__setattr__(made, field.name, value)
    return made
