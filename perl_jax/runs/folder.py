"""A run's folder: its config, and what it stands on."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from perl_jax import errors
from perl_jax.runs import provenance
from perl_jax.runs.metrics import environment
from perl_jax.runtime import files, hosts

# What a run stands on, beside its config.json.
STANDS = "stands.json"


# What may differ between the command that began a run and the one that resumes it.
_FREE = ("checkpoint_every", "keep", "tensorboard", "wandb", "mesh", "profile", "compile_cache")


def open_run(
    job: str,
    config: Any,
    run: str | pathlib.Path | None = None,
    now: provenance.Prints | None = None,
) -> pathlib.Path:
    """Makes the run's folder, or checks that the one there belongs to the same command.

    run: the folder; None: `config.run`. now: digests of what the run depends on (`provenance`);
    None: those of what the paths in the config hold.

    Raises UserError naming every setting that differs: a resumed run with another learning rate
    would be neither the old run nor a new one. So are processes with different settings refused,
    and a folder that is not the same one on all of them. Refused in the same way is a run, finished
    or not, of which anything that it stands on has changed since it began (`stands`, noted in
    stands.json).
    """
    folder = pathlib.Path(config.run if run is None else run)
    path = folder / "config.json"
    values = {"job": job, **files.to_dict(config)}
    now = provenance.prints(job, config) if now is None else now
    if hosts.is_writer() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Before the config, whose presence says that the run has begun.
        files.write_json(folder / STANDS, now)
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
        whole, f"{path} does not say which settings the run began with; use another --run."
    )
    differing = _differences(found["config"], values)
    errors.require(
        not differing,
        f"{folder} holds a run with other settings ({'; '.join(differing)}); use the same ones, "
        "or another --run.",
    )
    _check_stands(folder, now)
    return folder


def _check_stands(folder: pathlib.Path, now: provenance.Prints) -> None:
    """UserError naming what a run stands on that is not what it was."""
    if not hosts.agreed((folder / STANDS).exists()):
        if hosts.is_writer():
            print(
                f"{folder} was begun by an earlier version, which did not note what it stands on: "
                "whether that has changed is not known.",
                flush=True,
            )
        return
    before = files.read_json(folder / STANDS)
    errors.require(
        isinstance(before, dict),
        f"{folder / STANDS} does not hold a JSON object; use another --run.",
    )
    other = provenance.changed(before, now)
    errors.require(
        not other,
        f"{folder} holds a run that began with something else: changed since "
        f"{'has' if len(other) == 1 else 'have'} {', '.join(other)}; put back what was there, or "
        "use another --run.",
    )


def finished(*paths: pathlib.Path) -> bool:
    """Whether all of these are there; on several hosts as the first one sees it."""
    return hosts.agreed(all(path.exists() for path in paths))


def write_results(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """JSON files by their names, written once, in this order."""
    if hosts.is_writer():
        for name, value in results.items():
            files.write_json(folder / name, value)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    out = []
    for name in sorted({*found, *wanted} - {"run", *_FREE}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            out.append(f"{prefix}{name} was {a!r}, is now {b!r}")
    return out
