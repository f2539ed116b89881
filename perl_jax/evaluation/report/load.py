"""Reads a run's or an experiment's folder into plain records, even if files are missing.

A missing or damaged file inside the folder raises no error: it is read as an empty record or list,
and `notes` gets a sentence that the page shows. In this module `notes` is always a list to which
such sentences are appended, and `name` is the file's name in them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perl_jax.errors import UserError
from perl_jax.evaluation.intervals import Estimate
from perl_jax.runs.lines import read_lines
from perl_jax.runs.metrics import (
    EVALUATION_SAMPLES_NAME,
    FILE_NAME,
    NONFINITE_KEY,
    SAMPLES_NAME,
    read_metrics,
)
from perl_jax.runtime import files

TUNING_NAMES = {"lora": "LoRA", "full": "Full tuning", "": "This run"}
# The page calls a run of the job dpo by its loss.
PREFERENCES = {"dpo": "DPO", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO"}
JOB_NAMES = {
    "base": "Base model",
    "sft": "SFT",
    "reward": "Reward model",
    "rl": "RL",
    **PREFERENCES,
    "evaluate": "Evaluation",
}
# Where earlier versions wrote what RL wrote while it trained.
OLD_SAMPLES_NAME = "validation_samples.jsonl"
# Jobs whose policies `perl-jax evaluate` compares with what they start from, and that comparison by
# itself, in a folder of its own.
POLICY_JOBS = ("rl", *PREFERENCES, "evaluate")


@dataclass(frozen=True)
class Run:
    """One job's run. A missing file is {} or [].

    Attributes:
        name: The run's name in the experiment.
        job: base, sft, reward, rl, evaluate, or the loss of a job dpo: dpo, ipo, kto or orpo.
        tuning: lora, full or another name; "" if unknown.
        config: config.json.
        rows: The rows of metrics.jsonl.
        evaluation: evaluation.json.
        cost: cost.json.
        samples: The rows of evaluation_samples.jsonl.
        written: The rows of samples.jsonl: what RL wrote while it trained.
        artefact: The artefact.json of the run's policy.
    """

    name: str
    job: str
    tuning: str
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    written: list[dict[str, Any]] = field(default_factory=list)
    artefact: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Returns the job's settings: `config` in config.json, or the whole file if it is flat."""
        nested = self.config.get("config")
        return nested if isinstance(nested, Mapping) else self.config


@dataclass(frozen=True)
class Experiment:
    """All that the report shows; a single run is an experiment with one run.

    Attributes:
        title: The page's title.
        summary: The author's summary.
        command: The command that made the results.
        hardware: The hardware they were made on.
        task: The task's name.
        seconds: The time of everything together, in seconds.
        runs: The runs.
        notes: Sentences on what is missing or damaged.
    """

    title: str
    summary: str
    command: str
    hardware: str
    task: str
    seconds: float | None
    runs: tuple[Run, ...]
    notes: tuple[str, ...]

    @property
    def tunings(self) -> list[str]:
        """Returns the tunings of the runs other than base: LoRA, then full, then others by name."""
        order = list(TUNING_NAMES)
        found = {run.tuning for run in self.runs if run.job != "base"}
        return sorted(found, key=lambda t: (order.index(t) if t in order else len(order), t))

    def run(self, job: str, tuning: str) -> Run | None:
        """Returns the first run of a job (such as `rl`) with a tuning (such as `lora`); None if
        there is none.
        """
        return next((r for r in self.runs if (r.job, r.tuning) == (job, tuning)), None)

    def runs_of(self, job: str) -> list[Run]:
        """Returns the runs of a job, the first of each tuning, in the order of `tunings`."""
        found = (self.run(job, tuning) for tuning in self.tunings or [""])
        return [run for run in found if run is not None]

    @property
    def policy_runs(self) -> list[Run]:
        """Returns the runs with a policy: those of RL, of DPO, and evaluations by themselves."""
        return [run for job in POLICY_JOBS for run in self.runs_of(job)]


def tuning_name(tuning: str) -> str:
    """Returns the displayed name of a tuning; unknown tunings are displayed as they are."""
    return TUNING_NAMES.get(tuning, tuning)


def entry(tree: object, *keys: str) -> Any:
    """Returns `tree[key0][key1]...`, or None if a key is missing or a value on the path is no
    mapping.
    """
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def number(tree: object, *keys: str) -> float | None:
    """Returns the finite number at `tree[key0][key1]...`, or None; a boolean is not a number."""
    value = entry(tree, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond any float
        return None


def estimate(tree: object, *keys: str) -> Estimate | None:
    """Returns the estimate at `tree[key0][key1]...`, or None.

    The tree holds a number there, or {"value", "low", "high", "n", "groups"}, where all but `value`
    may be missing (files of earlier versions have no `groups`).
    """
    bare = number(tree, *keys)
    if bare is not None:
        return Estimate(bare, None, None, 0)
    found = entry(tree, *keys)
    value = number(found, "value")
    if value is None:
        return None
    n, groups = number(found, "n"), number(found, "groups")
    return Estimate(
        value,
        number(found, "low"),
        number(found, "high"),
        int(n or 0),
        None if groups is None else int(groups),
    )


def text(tree: object, *keys: str) -> str:
    """Returns the string at `tree[key0][key1]...`, or "" if there is none."""
    value = entry(tree, *keys)
    return value if isinstance(value, str) else ""


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, values), float64, of the rows in which the metric `key` is a finite
    number.
    """
    found = [(row["step"], number(row, key)) for row in rows]
    kept = [(step, value) for step, value in found if value is not None]
    array = np.asarray(kept, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def nonfinite_steps(rows: Iterable[Mapping[str, Any]]) -> int:
    """Returns how many rows of metrics.jsonl are marked as having had a NaN or infinite metric."""
    return sum(1 for row in rows if row.get(NONFINITE_KEY))


def read_object(path: files.Path, notes: list[str], name: str) -> dict[str, Any]:
    """Returns the JSON object in a file; {} if the file is missing, and {} with a note if it cannot
    be read.

    Args:
        path: The file.
        notes: Gets the note.
        name: The file's name in the note.
    """
    try:
        value = json.loads(files.read_bytes(path)) if files.exists(path) else {}
    except (UserError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{name} could not be read as a JSON object and was left out.")
        return {}
    return value


def read_samples(path: files.Path, notes: list[str], name: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file; [] if the file cannot be read. Other lines are left
    out, with a note of their number.

    Args:
        path: The file.
        notes: Gets the note.
        name: The file's name in the note.
    """
    try:
        lines = read_lines(path)
    except UserError:
        return []
    rows, bad = [], 0
    for line in filter(bytes.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{bad} lines of {name} could not be read and were left out.")
    return rows


def read_both_samples(
    folder: files.Path, shown: str, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns (samples of an evaluation, samples written while training) of a run.

    Earlier versions wrote those of an evaluation to samples.jsonl, and those of training to
    validation_samples.jsonl; rows of training have a `step`.

    Args:
        folder: The run's folder.
        shown: What comes before a file's name in a note.
        notes: Gets the notes.
    """
    names = (EVALUATION_SAMPLES_NAME, SAMPLES_NAME, OLD_SAMPLES_NAME)
    found = {name: read_samples(folder / name, notes, f"{shown}{name}") for name in names}
    written = [row for row in found[SAMPLES_NAME] if "step" in row]
    compared = [row for row in found[SAMPLES_NAME] if "step" not in row]
    return found[EVALUATION_SAMPLES_NAME] or compared, written or found[OLD_SAMPLES_NAME]


def read_rows(path: files.Path, notes: list[str], name: str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; [] with a note if the file is missing or damaged.

    Args:
        path: The file.
        notes: Gets the note.
        name: The file's name in the note.
    """
    try:
        return read_metrics(path)
    except UserError:
        notes.append(f"{name} is missing or damaged; its curves were left out.")
        return []


def find_text(tree: object, key: str, depth: int = 3) -> str:
    """Returns the first string under `key` in nested mappings, level by level from the top; "" if
    there is none.

    Args:
        tree: The outermost mapping.
        key: The key to look for.
        depth: The number of levels that are searched.
    """
    level = [tree]
    for _ in range(depth):
        mappings = [item for item in level if isinstance(item, Mapping)]
        for item in mappings:
            if text(item, key):
                return text(item, key)
        level = [child for item in mappings for child in item.values()]
    return ""


def command_of(config: Mapping[str, Any]) -> str:
    """Returns the command of a config.json as one line, quoted for a shell; "" if it has none.

    config.json holds the command as a list of words or, in other places, as a string.
    """
    words = config.get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) else find_text(config, "command")


def named_job(config: Mapping[str, Any], given: str = "") -> str:
    """Returns the job that a configuration names, "" for an unknown one; of a job dpo its loss.

    Args:
        config: config.json.
        given: Replaces the configuration's job, even by an unknown one; "" replaces nothing.
    """
    named = find_text(config, "job")
    named = given or (named if named in JOB_NAMES else "")
    loss = find_text(config, "loss")
    return loss if named == "dpo" and loss in PREFERENCES else named


def infer_job(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Returns the job of a single run: what its configuration says, or else what its metrics' names
    suggest (sft if nothing else).

    Args:
        config: config.json.
        rows: The rows of metrics.jsonl.
        evaluation: evaluation.json; with a win rate and without metrics it is all that there is.
    """
    if named := named_job(config):
        return named
    if not rows and evaluation and "win_rate" in evaluation:
        return "evaluate"
    keys = {key for row in rows for key in row}
    for name in PREFERENCES:
        if any(key.startswith(f"{name}/") for key in keys):
            return name
    if any(key.startswith(("reward/", "kl/", "policy/")) for key in keys):
        return "rl"
    return "reward" if {"train/accuracy", "validation/accuracy", "validation/auc"} & keys else "sft"


def read_run(folder: files.Path, name: str, job: str, tuning: str, notes: list[str]) -> Run:
    """Returns the run in a folder.

    Args:
        folder: The run's folder.
        name: The run's name in the experiment; "" takes the folder's name.
        job: The run's job; "" infers it from the files.
        tuning: The run's tuning; "" takes it from config.json.
        notes: Gets a sentence for each file that is damaged or missing.
    """
    shown = f"{name}/" if name else ""
    config = read_object(folder / "config.json", notes, f"{shown}config.json")
    evaluation = read_object(folder / "evaluation.json", notes, f"{shown}evaluation.json")
    job = named_job(config, job)
    rows = []
    # An evaluation in a folder of its own has no steps.
    if job != "evaluate" and (config or files.exists(folder / FILE_NAME) or not evaluation):
        rows = read_rows(folder / FILE_NAME, notes, f"{shown}{FILE_NAME}")
    samples, written = read_both_samples(folder, shown, notes)
    return Run(
        name=name or folder.name,
        job=job or infer_job(config, rows, evaluation),
        tuning=tuning or find_text(config, "tuning"),
        config=config,
        rows=rows,
        evaluation=evaluation,
        cost=read_object(folder / "cost.json", notes, f"{shown}cost.json"),
        samples=samples,
        written=written,
        artefact=read_object(
            folder / "adapters" / "policy" / "artefact.json",
            notes,
            f"{shown}adapters/policy/artefact.json",
        ),
    )


def read_listed_runs(folder: files.Path, listed: object, notes: list[str]) -> list[Run]:
    """Returns the runs that an experiment lists.

    Runs whose folder is missing, or not inside the experiment's folder, are left out with a note.

    Args:
        folder: The experiment's folder.
        listed: `runs` of experiment.json: [{"name", "job", "tuning", "folder"}].
        notes: Gets the notes.
    """
    runs: list[Run] = []
    for item in listed if isinstance(listed, list) else []:
        name = text(item, "name") or text(item, "folder")
        where = folder / text(item, "folder")
        if not text(item, "folder") or not files.resolved(where).is_relative_to(
            files.resolved(folder)
        ):
            notes.append(f"the run {name!r} names no folder inside this one and was left out.")
            continue
        if not files.is_folder(where):
            notes.append(f"the folder of the run {name!r} is missing.")
            continue
        run = read_run(where, name, text(item, "job"), text(item, "tuning"), notes)
        if any((run.job, run.tuning) == (r.job, r.tuning) for r in runs):
            notes.append(f"{name!r} repeats a job and tuning; tables and curves show the first.")
        runs.append(run)
    return runs


def read_experiment(folder: files.Path) -> Experiment:
    """Returns the experiment in a folder; a folder with a single run gives an experiment with one
    run.

    Missing or damaged files are named in the experiment's `notes`. Raises UserError if the folder
    is missing, or holds none of experiment.json, config.json and metrics.jsonl.
    """
    if not files.is_folder(folder):
        raise UserError(f"There is no folder of a run at {folder}.")
    notes: list[str] = []
    if files.exists(folder / "experiment.json"):
        about = read_object(folder / "experiment.json", notes, "experiment.json")
        runs = read_listed_runs(folder, about.get("runs"), notes)
    elif any(files.exists(folder / name) for name in (FILE_NAME, "config.json", "evaluation.json")):
        about = {}
        runs = [read_run(folder, "", "", "", notes)]
        for run in runs:
            # The top level only: nested objects, such as an algorithm, have names too.
            about = {"title": text(run.config, "name") or files.resolved(folder).name}
            about["command"] = command_of(run.config)
            about["task"] = find_text(run.config, "task")
    else:
        raise UserError(
            f"{folder} is not a run's folder: it holds neither experiment.json, config.json nor "
            f"{FILE_NAME}."
        )
    notes += [
        f"{run.name}: {nonfinite_steps(run.rows)} steps had NaN or infinite metrics."
        for run in runs
        if nonfinite_steps(run.rows)
    ]
    return Experiment(
        title=text(about, "title") or files.resolved(folder).name,
        summary=text(about, "summary"),
        command=text(about, "command"),
        hardware=text(about, "hardware"),
        task=text(about, "task"),
        seconds=number(about, "seconds"),
        runs=tuple(runs),
        notes=tuple(notes),
    )
