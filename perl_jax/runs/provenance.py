"""What a job stands on: digests of the base, the tokenizer, the rows, the artefacts and the rewards
it is given.

They are of files, so that a finished run can be compared without loading anything. Paths are part
of a job's config; what is compared here is what lies under them.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perl_jax.data.config import DataConfig
from perl_jax.data.tasks import data_options, get_task
from perl_jax.errors import UserError
from perl_jax.hub import artefacts, families
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.runtime import files
from perl_jax.runtime.files import file_hash

# Kinds of rows by job; a reward's by its objective.
_KINDS = {
    "base": "corpus",
    "sft": "demonstrations",
    "dpo": "comparisons",
    "rl": "prompts",
    "evaluate": "prompts",
}
_OBJECTIVES = {"pairwise": "comparisons", "pointwise": "labels", "regression": "ratings"}
# A tokenizer's files in a model's folder.
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

Prints = dict[str, str | None]


def prints(job: str, config: Any) -> Prints:
    """A digest for each thing a job stands on, by how a message calls it; None: it cannot be
    read.
    """
    return {name: _read(make) for name, make in _things(job, config)}


def changed(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Names of what differs. What could not be read, then or now, is not known to differ."""
    return [
        name
        for name, found in now.items()
        if None not in (found, before.get(name)) and found != before[name]
    ]


def _read(make: Callable[[], Any]) -> str | None:
    try:
        return files.digest(make())
    # The job itself says what is wrong with what it needs; a finished one needs it no more.
    except (UserError, OSError):
        return None


def _things(job: str, config: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a message calls a thing, and how to make a JSON value of its content."""
    if job != "base":  # whose model is what it writes
        yield (
            f"the base under {config.model}",
            lambda: base_content(hf_checkpoint.find_model(config.model)),
        )
        yield (
            f"the tokenizer or its template under {config.model}",
            lambda: tokenizer_content(hf_checkpoint.find_model(config.model)),
        )
    kind = _OBJECTIVES[config.objective] if job == "reward" else _KINDS[job]
    where = "" if config.data.data_dir is None else f" in {config.data.data_dir}"
    yield (
        f"the rows of --data.task {config.data.task}{where}",
        lambda: rows_content(kind, config.data),
    )
    template = getattr(config.data, "template", None)
    if template is not None and pathlib.Path(template).expanduser().is_file():
        yield (
            f"the chat template {template}",
            lambda: file_hash(pathlib.Path(template).expanduser()),
        )
    for role, folder in _artefacts(config):
        yield (
            f"the {role} artefact {folder}",
            lambda folder=folder: artefacts.content_of(pathlib.Path(folder)),
        )
    terms = getattr(config, "terms", None)
    if terms is not None:
        yield from _terms(terms)


def _artefacts(config: Any) -> Iterator[tuple[str, str]]:
    """(role, folder) of each artefact that a config names."""
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
    """The file of reward terms, and the source of each function in it."""
    text = source
    if not source.lstrip().startswith("["):
        path = pathlib.Path(source).expanduser()
        yield f"the file of terms {source}", lambda: file_hash(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    for value in values if isinstance(values, list) else ():
        function = value.get("function") if isinstance(value, dict) else None
        if isinstance(function, str):
            yield (
                f"the function {function}",
                lambda function=function: file_hash(source_of(function)),
            )


def source_of(function: str) -> pathlib.Path:
    """The file of `path/to/file.py:function` or `module:function`, found without importing
    anything; FileNotFoundError.
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
    """Of a model's folder what decides its function: the config's part in it, and a sample of every
    tensor.
    """
    return [families.read_config(folder).function, hf_checkpoint.sampled_content(folder)]


def tokenizer_content(folder: pathlib.Path) -> Any:
    """Of a model's folder the tokenizer's files, and the ids that end a response."""
    found = {
        path.name: file_hash(path)
        for pattern in _TOKENIZER
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    configs = [folder / name for name in ("config.json", "generation_config.json")]
    return [found, [files.read_json(path).get("eos_token_id") for path in configs if path.exists()]]


def rows_content(kind: str, config: DataConfig) -> Any:
    """What determines the rows of a kind: the hashes of their files, or their seed and sizes."""
    return get_task(config.task).content(kind, data_options(config))
