"""Fingerprints of a job's inputs: base, tokenizer, rows, artefacts and rewards.

A run records them when it begins. When it is resumed or looked up, they show whether the files at
the same paths still hold the same content. They are computed from files, without loading a model.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perl_jax.data.config import DataConfig
from perl_jax.data.tasks import task_of
from perl_jax.errors import UserError
from perl_jax.hub import artefacts, config_json, weights
from perl_jax.objectives import preference
from perl_jax.rewards import compose
from perl_jax.runtime import files, json_values

# The kind of rows that a job reads; that of a reward model depends on its objective, that of a dpo
# job on its loss.
_KINDS = {
    "base": "corpus",
    "sft": "demonstrations",
    "rl": "prompts",
    "evaluate": "prompts",
}
_OBJECTIVES = {"pairwise": "comparisons", "pointwise": "labels", "regression": "ratings"}
# Names of a tokenizer's files in a model's folder.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "chat_template*",
    "*.model",
)

Fingerprints = dict[str, str | None]


def fingerprints(job: str, config: Any) -> Fingerprints:
    """Returns a digest of each input of a job, by the name used in messages.

    A digest is None if the input cannot be read.

    Args:
        job: base, sft, reward, dpo, rl or evaluate.
        config: The job's config.
    """
    return {name: _read(make) for name, make in _inputs(job, config)}


def changed(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Returns the names of the inputs that changed.

    An input that could not be read, before or now, counts as unchanged.

    Args:
        before: Digests by name, of the run when it began.
        now: Digests by name.
    """
    return [
        name
        for name, found in now.items()
        if None not in (found, before.get(name)) and found != before[name]
    ]


def _read(make: Callable[[], Any]) -> str | None:
    """Returns the digest of the JSON value that `make()` returns; None if it cannot be read."""
    try:
        return json_values.digest(make())
    # A job reports unreadable inputs itself; a finished job no longer needs them.
    except (UserError, OSError):
        return None


def _inputs(job: str, config: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields (name for messages, function that returns the content as a JSON value) for each input.

    The inputs are base, tokenizer, rows, a chat template's file, artefacts and the files of reward
    terms.

    Args:
        job: base, sft, reward, dpo, rl or evaluate.
        config: The job's config.
    """
    if job != "base":  # a base job has no model as input; it writes one
        yield (
            f"the base under {config.model}",
            lambda: base_content(weights.find_model(config.model)),
        )
        yield (
            f"the tokenizer or its template under {config.model}",
            lambda: tokenizer_content(weights.find_model(config.model)),
        )
    kind = _kind(job, config)
    where = "" if config.data.data_dir is None else f" in {config.data.data_dir}"
    yield (
        f"the rows of --data.task {config.data.task}{where}",
        lambda: rows_content(kind, config.data),
    )
    template = getattr(config.data, "template", None)
    if template is not None and files.is_file(template):
        yield (
            f"the chat template {template}",
            lambda: files.file_hash(template),
        )
    for role, folder in artefacts_of(config):
        yield (
            f"the {role} artefact {folder}",
            lambda folder=folder: artefacts.content_of(files.path_of(folder)),
        )
    terms = getattr(config, "terms", None)
    if terms is not None:
        yield from _terms(terms)


def _kind(job: str, config: Any) -> str:
    """Returns the kind of rows that a job reads, one of `data.store.KINDS`."""
    if job == "dpo":
        return preference.OBJECTIVES[config.loss].kind
    return _OBJECTIVES[config.objective] if job == "reward" else _KINDS[job]


def check_rows(job: str, config: Any) -> None:
    """Raises UserError if there is no such task, or if its rows cannot be read."""
    rows_content(_kind(job, config), config.data)


# The role that an artefact must have, by what a config calls it; any role can lie under another.
_ROLES = {
    "policy": "policy",
    "baseline": "policy",
    "reference": "policy",
    "reward": "reward",
    "judge": "reward",
    "frozen": None,
}


def check_artefacts(config: Any) -> None:
    """Raises UserError if an artefact that a config names is not there, is damaged, or has another
    role; only its record is read.
    """
    for name, folder in artefacts_of(config):
        path = files.path_of(folder)
        artefacts.require_role(path, artefacts.read_record(path), _ROLES[name])


def artefacts_of(config: Any) -> Iterator[tuple[str, str]]:
    """Yields (role, folder) of each artefact that a config names, such as ("policy",
    "runs/sft/adapters/policy").
    """
    given = {
        "policy": "policy",
        "frozen": "stack_on",
        "baseline": "baseline",
        "reward": "reward",
        "judge": "judge",
    }
    for role, field in given.items():
        value = vars(config).get(field)
        yield from (
            (role, folder) for folder in ((value,) if isinstance(value, str) else value or ())
        )
    reference = getattr(getattr(config, "kl", None), "reference", "none")
    if reference not in ("start", "base", "none"):
        yield "reference", reference


def _terms(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields (name for messages, function that returns the content) for the files of reward terms.

    These are the file with the terms, if there is one, and the source file of each Python function.
    Terms that are not valid JSON yield no functions.

    Args:
        source: The terms as JSON text, or the path of a file with it.
    """
    text = source
    if not compose.is_inline(source):
        path = files.path_of(source)
        yield f"the file of terms {source}", lambda: files.file_hash(path)
        try:
            text = files.read_text(path)
        except UserError:
            return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    for value in values if isinstance(values, list) else (values,):
        function = value.get("function") if isinstance(value, dict) else None
        if isinstance(function, str):
            yield (
                f"the function {function}",
                lambda function=function: files.file_hash(source_of(function)),
            )


def source_of(function: str) -> pathlib.Path:
    """Returns the source file of a reward function, without importing anything.

    Args:
        function: `path/to/file.py:function`, or `module:function` with a module on `sys.path`.

    Raises:
        FileNotFoundError: There is no such module. The existence of `path/to/file.py` is not
            checked.
    """
    source = function.rpartition(":")[0]
    if source.endswith(".py"):
        return pathlib.Path(source).expanduser()
    parts = source.split(".")
    for folder in map(pathlib.Path, sys.path):
        for path in (
            folder.joinpath(*parts).with_suffix(".py"),
            folder.joinpath(*parts, "__init__.py"),
        ):
            if path.is_file():
                return path
    raise FileNotFoundError(source)


def base_content(folder: pathlib.Path) -> Any:
    """Returns a JSON value that identifies a base model.

    It holds the config fields that affect outputs, and a sample of every tensor's bytes.

    Args:
        folder: The model's folder.
    """
    return [config_json.read_config(folder).function, weights.sampled_content(folder)]


def tokenizer_content(folder: pathlib.Path) -> Any:
    """Returns a JSON value that identifies a tokenizer.

    It holds a hash of each of the tokenizer's files, and the end-of-sequence ids of the model's
    configs.

    Args:
        folder: The model's folder.
    """
    found = {
        path.name: files.file_hash(path)
        for pattern in _TOKENIZER
        for path in files.listing(folder, pattern)
        if files.is_file(path)
    }
    configs = [folder / name for name in ("config.json", "generation_config.json")]
    return [
        found,
        [files.read_json(path).get("eos_token_id") for path in configs if files.exists(path)],
    ]


def rows_content(kind: str, config: DataConfig) -> Any:
    """Returns a JSON value that identifies the rows of a task.

    It holds hashes of the rows' files, or the seed and sizes of a synthetic task.

    Args:
        kind: The kind of rows, one of `data.store.KINDS`.
        config: The task, the folder of its files and the sizes of its splits.
    """
    return task_of(config).content(kind, config)
