"""Opens a run's folder, which records the run's settings and fingerprints of its inputs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from perl_jax import errors
from perl_jax.runs import lines, provenance
from perl_jax.runs.checkpoints import saved_steps
from perl_jax.runs.environment import environment
from perl_jax.runs.metrics import FILE_NAME, import_extra
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts, json_values, progress
from perl_jax.runtime.replacing import require_consent

# The file with fingerprints of a run's inputs, beside its config.json.
INPUTS_FILE = "stands.json"


# Settings that may differ between the command that began a run and the one that resumes it. `steps`
# is compared by itself (`_check_steps`).
_MAY_DIFFER = (
    "checkpoint_every",
    "keep",
    "tensorboard",
    "wandb",
    "wandb_project",
    "wandb_name",
    "mesh",
    "profile",
    "compile_cache",
    "steps",
    "show_samples",
)
# What commands write into a run's folder.
_MADE = (
    "config.json",
    INPUTS_FILE,
    "metrics*",
    "validation_samples*",
    "samples*",
    "evaluation_samples*",
    "checkpoints*",
    "adapters",
    "evaluation.json",
    "scores.json",
    "cost.json",
    "report.html",
    "profile",
    "tensorboard",
    "wandb",
    "wandb_id.txt",
)
# What each job writes last, which marks its run as finished.
WRITTEN_LAST = {
    "base": "cost.json",
    "sft": "cost.json",
    "rl": "cost.json",
    "reward": "evaluation.json",
    "dpo": "evaluation.json",
}


def open_run(
    job: str,
    config: Any,
    run: files.PathLike | None = None,
    now: provenance.Fingerprints | None = None,
) -> Run:
    """Returns the run of a folder; if the folder holds a run, checks that it is the same one.

    Nothing is written. With `--overwrite` (`runtime.replacing`) a run that is not the same is
    replaced instead of refused. A run is the same if its settings are equal (a few, such as
    `checkpoint_every`, may differ) and if its inputs have not changed: base, tokenizer, rows,
    artefacts and rewards (`provenance`). A finished run is checked too. `steps` may differ, as long
    as the run has not done more steps already. A folder without any work (`has_work`) holds no run,
    even if it has a config.json.

    Args:
        job: base, sft, reward, dpo or rl.
        config: The job's config.
        run: The folder; None takes `config.run`.
        now: Fingerprints of the run's inputs; None takes those of the paths in the config.

    Raises:
        Occupied: The folder holds a run with other settings, other inputs or more steps; the
            message names each, and the flags that would be right.
        UserError: Processes have different settings, a dashboard's package is missing, or the rows
            of a new run cannot be read.
    """
    folder = files.path_of(config.run if run is None else run)
    path = folder / "config.json"
    values = {"job": job, **json_values.to_dict(config)}
    _check_agreement(values)
    for module, wanted in (("tensorboardX", config.tensorboard), ("wandb", config.wandb)):
        if wanted:
            import_extra(module)
    # Also a folder without work must not lose a config.json of another kind, such as a model's.
    found = read_settings(folder) if exist(path) else None
    begun = found is not None and hosts.broadcast_flag(has_work(folder))
    if now is None:
        now = provenance.fingerprints(job, config)
        if not begun and None in now.values():
            provenance.check_rows(job, config)
    if found is None or not begun:
        return Run(folder, _settings_file(values), now)
    try:
        _check_settings(folder, found["config"], values)
        _check_inputs(folder, now)
        done = _check_steps(folder, values["steps"])
    except errors.Occupied as error:
        require_consent(str(error), folder)
        return Run(folder, _settings_file(values), now, replaces=found["config"])
    before = found["config"].get("steps")
    if values["steps"] == before:
        return Run(folder)
    if hosts.is_writer() and done:
        print(_said_of_steps(folder, before, values, done), file=sys.stderr, flush=True)
    # The file says which steps were made with another end of the schedule.
    listed = found.get("earlier")
    earlier = [
        *(listed if isinstance(listed, list) else ()),
        {"steps": before, "until_step": done},
    ]
    return Run(folder, _settings_file(values) | {"earlier": earlier}, goes_on=True)


def read_settings(folder: files.Path) -> dict[str, Any]:
    """Returns the content of a run's config.json; raises UserError if it is not that of a run."""
    path = folder / "config.json"
    found = files.read_json(path)
    errors.require(
        isinstance(found, dict) and isinstance(found.get("config"), dict),
        f"{path} does not hold the settings that the run began with; use another --run.",
    )
    return found


def has_work(folder: files.Path) -> bool:
    """Returns whether a run's folder holds anything that was computed: a checkpoint, a row of
    metrics, an artefact or an evaluation.
    """
    metrics = folder / FILE_NAME
    return (
        bool(saved_steps(folder / "checkpoints"))
        or lines.exist(metrics)
        or any(files.exists(folder / name) for name in ("adapters", *WRITTEN_LAST.values()))
    )


def contents(folder: files.Path) -> list[files.Path]:
    """Returns the files and folders in a run's folder that commands have written there."""
    return sorted({path for pattern in _MADE for path in files.listing(folder, pattern)})


def clear(run: Run) -> None:
    """Deletes the run that is replaced (`Run.replaces`); does nothing if there is none.

    Only what commands have written is deleted (`contents`). All processes must call this function.
    """
    if run.replaces is not None:
        if hosts.is_writer():
            for path in contents(run.folder):
                files.remove(path)
        hosts.barrier("run cleared")


def begin(run: Run) -> None:
    """Writes config.json and stands.json of a run whose first step is about to be made.

    A folder that has them already stays as it is. All processes must call this function.

    Raises:
        UserError: Not all processes see the same folder.
    """
    path = run.folder / "config.json"
    if run.settings is not None and hosts.is_writer():
        files.make_folder(run.folder)
        if run.goes_on:
            # Before config.json: a run that is killed in between has its old settings, and ends
            # again.
            last = WRITTEN_LAST[run.settings["config"]["job"]]
            files.remove(run.folder / last)
        if run.inputs is not None:
            # Before config.json, whose presence marks the run as begun.
            files.write_json(run.folder / INPUTS_FILE, run.inputs)
        files.write_json(path, run.settings)
    if run.settings is not None:
        hosts.barrier("run begun")
        shared = not hosts.any_process(not files.exists(path))
        errors.require(
            shared,
            f"Not every process finds {path}; --run must be a folder that all hosts share.",
        )


def _settings_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of config.json: the settings, the environment and the command."""
    return {"config": dict(values), "environment": environment(), "command": sys.argv}


def _check_agreement(values: Mapping[str, Any]) -> None:
    """Raises UserError if this process has other settings than process 0.

    All processes must call this function.
    """
    first = hosts.broadcast_json(dict(values))
    # A cache lies on each host; a shared folder may have another path there.
    names = {"job", *first, *values} - {"run", "compile_cache"}
    other = [
        f"{name} is {values.get(name)!r}, there {first.get(name)!r}"
        for name in sorted(names)
        if values.get(name) != first.get(name)
    ]
    errors.require(
        not other,
        f"This process has other settings than the first process of the run ({'; '.join(other)}); "
        "give all of them the same command.",
    )


def _check_settings(
    folder: files.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raises Occupied if a run's settings differ; the message has the flags that would be right.

    Args:
        folder: The run's folder.
        found: The settings that the run began with.
        wanted: The settings now.
    """
    if found.get("job") != wanted["job"]:
        raise errors.Occupied(
            f"{folder} holds a run with other settings (job was {found.get('job')!r}, is now "
            f"{wanted['job']!r}); use another --run.",
            folder,
        )
    differing = _differences(found, wanted)
    if differing:
        phrases, flags = zip(*differing, strict=True)
        raise errors.Occupied(
            f"{folder} holds a run with other settings ({'; '.join(phrases)}); it goes on with "
            f"{' '.join(flags)}, or use another --run.",
            folder,
        )


def _check_steps(folder: files.Path, steps: int) -> int:
    """Returns the number of steps that a run has done, by its newest checkpoint.

    Args:
        folder: The run's folder.
        steps: The number of steps that are wanted.

    Raises:
        Occupied: The run has done more steps.
    """
    done = int(hosts.broadcast_json(max(saved_steps(folder / "checkpoints"), default=0)))
    if steps < done:
        raise errors.Occupied(
            f"{folder} holds a run that has done {done} steps; steps is {steps}: give --steps "
            f"{done} or more, or another --run.",
            folder,
        )
    return done


def _said_of_steps(folder: files.Path, before: Any, values: Mapping[str, Any], done: int) -> str:
    """Returns what is printed when a run goes on to another last step.

    Args:
        folder: The run's folder.
        before: The number of steps before.
        values: The settings now.
        done: The number of steps that are done.
    """
    steps, schedule = values["steps"], values["optimizer"]["schedule"]
    said = f"{folder}: steps was {before}, is now {steps}; the run goes on from step {done}"
    if schedule == "constant":
        return f"{said}."
    return (
        f"{said}, with a {schedule} learning rate that reaches 0 at step {steps}: steps 1 to "
        f"{done} had the rates of a run of {before} steps, so the numbers are not those of a run "
        f"of {steps} steps from the start."
    )


def _check_inputs(folder: files.Path, now: provenance.Fingerprints) -> None:
    """Raises Occupied naming the inputs of a run that have changed since it began.

    For a run of an earlier version, which recorded no inputs, it prints that changes are not known.

    Args:
        folder: The run's folder.
        now: Fingerprints of the inputs.
    """
    if not hosts.broadcast_flag(files.exists(folder / INPUTS_FILE)):
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
    if other:
        raise errors.Occupied(
            f"{folder} holds a run whose inputs have changed since it began: {', '.join(other)}; "
            "restore them, or use another --run.",
            folder,
        )


def is_finished(run: Run, role: str | None, last: str) -> bool:
    """Returns whether a run has its artefact and the file that it writes last, and says so.

    A run that goes on to another last step, or replaces another, is not finished. With several
    processes all must call this function; all get the answer of the first process.

    Args:
        run: The opened run.
        role: The name of the trained role; None: its artefact is not looked for.
        last: The name of the file that the run writes last.
    """
    written = [run.folder / last, *([] if role is None else [run.artefact(role)])]
    done = not run.goes_on and run.replaces is None and exist(*written)
    if done:
        progress.say(
            f"{run.folder} holds this run, which has done all its steps: nothing is trained. More "
            "--steps continue it; another --run begins anew."
        )
    return done


def exist(*paths: files.Path) -> bool:
    """Returns whether all files or folders exist.

    With several processes all must call it; all get the answer of the first process.
    """
    return hosts.broadcast_flag(all(map(files.exists, paths)))


def write_results(folder: files.Path, results: Mapping[str, Any]) -> None:
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
) -> list[tuple[str, str]]:
    """Returns (phrase, flag) for each setting that differs, such as ("lora.rank was 8, is now 16",
    "--lora.rank 8").

    Settings that may differ (`_MAY_DIFFER`), `job` and `run` are not compared. Nested configs are
    compared field by field.

    Args:
        found: The settings that the run began with.
        wanted: The settings now.
        prefix: The names of the enclosing configs, each followed by a dot.
    """
    out = []
    for name in sorted({*found, *wanted} - {"job", "run", *_MAY_DIFFER}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            phrase = f"{prefix}{name} was {a!r}, is now {b!r}"
            out.append((phrase, flag_of(prefix, name, a)))
    return out


def flag_of(prefix: str, name: str, value: Any) -> str:
    """Returns a setting as it is given on the command line, such as `--lora.rank 8`.

    Args:
        prefix: The names of the enclosing configs, each followed by a dot.
        name: The field's name.
        value: Its JSON value.
    """
    above, name = prefix.replace("_", "-"), name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{above}{name}" if value else f"--{above}no-{name}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{above}{name}", *(shlex.quote(str(word)) for word in words)])
