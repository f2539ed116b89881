"""Opens a run's folder, which records the run's settings and fingerprints of its inputs."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from perl_jax import errors
from perl_jax.runs import provenance
from perl_jax.runs.environment import environment
from perl_jax.runtime import files, hosts

# The file with fingerprints of a run's inputs, beside its config.json.
INPUTS_FILE = "stands.json"


# Settings that may differ between the command that began a run and the one that resumes it.
_MAY_DIFFER = (
    "checkpoint_every",
    "keep",
    "tensorboard",
    "wandb",
    "mesh",
    "profile",
    "compile_cache",
)


def open_run(
    job: str,
    config: Any,
    run: str | pathlib.Path | None = None,
    now: provenance.Fingerprints | None = None,
) -> pathlib.Path:
    """Creates the run's folder, or checks that an existing one belongs to the same run; returns its
    path.

    A run is the same if its settings are equal (a few, such as `checkpoint_every`, may differ) and
    if its inputs have not changed: base, tokenizer, rows, artefacts and rewards (`provenance`). A
    finished run is checked too.

    Args:
        job: base, sft, reward, dpo or rl.
        config: The job's config.
        run: The folder; None takes `config.run`.
        now: Fingerprints of the run's inputs; None takes those of the paths in the config.

    Raises:
        UserError: Settings or inputs differ (the message names each), processes have different
            settings, or not all processes see the same folder.
    """
    folder = pathlib.Path(config.run if run is None else run)
    path = folder / "config.json"
    values = {"job": job, **files.to_dict(config)}
    begun = hosts.broadcast_flag(path.exists())
    if now is None:
        now = provenance.fingerprints(job, config)
        if not begun and None in now.values():
            # Before the folder is written, so that the corrected command can use it.
            provenance.check_rows(job, config)
    if hosts.is_writer() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Before config.json, whose presence marks the run as begun.
        files.write_json(folder / INPUTS_FILE, now)
        files.write_json(
            path, {"config": values, "environment": environment(), "command": sys.argv}
        )
    hosts.barrier("run opened")
    errors.require(
        path.exists(),
        f"There is no {path} on process {jax.process_index()}; --run must be a folder that all "
        "hosts share.",
    )
    found = files.read_json(path)
    whole = isinstance(found, dict) and isinstance(found.get("config"), dict)
    errors.require(
        whole, f"{path} does not hold the settings that the run began with; use another --run."
    )
    differing = _differences(found["config"], values)
    errors.require(
        not differing,
        f"{folder} holds a run with other settings ({'; '.join(differing)}); use the same ones, "
        "or another --run.",
    )
    _check_inputs(folder, now)
    return folder


def _check_inputs(folder: pathlib.Path, now: provenance.Fingerprints) -> None:
    """Raises UserError naming the inputs of a run that have changed since it began.

    For a run of an earlier version, which recorded no inputs, it prints that changes are not known.

    Args:
        folder: The run's folder.
        now: Fingerprints of the inputs.
    """
    if not hosts.broadcast_flag((folder / INPUTS_FILE).exists()):
        if hosts.is_writer():
            print(
                f"{folder} was begun by an earlier version, which did not record the run's inputs: "
                "whether they have changed is not known.",
                flush=True,
            )
        return
    before = files.read_json(folder / INPUTS_FILE)
    errors.require(
        isinstance(before, dict),
        f"{folder / INPUTS_FILE} does not hold a JSON object; use another --run.",
    )
    other = provenance.changed(before, now)
    errors.require(
        not other,
        f"{folder} holds a run whose inputs have changed since it began: {', '.join(other)}; "
        "restore them, or use another --run.",
    )


def finished(*paths: pathlib.Path) -> bool:
    """Returns whether all files or folders exist.

    With several processes all must call it; all get the answer of the first process.
    """
    return hosts.broadcast_flag(all(path.exists() for path in paths))


def write_results(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes values as JSON files into a folder, in the given order.

    Only the first process writes.

    Args:
        folder: The folder, which exists.
        results: JSON values by file name.
    """
    if hosts.is_writer():
        for name, value in results.items():
            files.write_json(folder / name, value)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Returns one phrase for each setting that differs, such as "lora.rank was 8, is now 16".

    Settings that may differ (`_MAY_DIFFER`) and `run` are not compared. Nested configs are compared
    field by field.

    Args:
        found: The settings that the run began with.
        wanted: The settings now.
        prefix: The names of the enclosing configs, each followed by a dot.
    """
    out = []
    for name in sorted({*found, *wanted} - {"run", *_MAY_DIFFER}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            out.append(f"{prefix}{name} was {a!r}, is now {b!r}")
    return out
