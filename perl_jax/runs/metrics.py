"""Metrics of a run: one JSON object per step on disk, and optional dashboards.

`metrics.jsonl` holds one flat object per line: `step` (int) first, then keys such as `train/loss`
with floats. Three rules make the file safe to compare and to resume:

- Every number that depends on the wall clock has a key that starts with `time/`. All others depend
  only on the configuration and the seed, so two equal runs agree on `without_timing(rows)`.
- JSON has no NaN: a NaN or infinite value is written as null, and its name is listed under the key
  `nonfinite`. So it neither breaks a reader nor passes unnoticed.
- A resumed writer drops the rows written after the checkpoint that it resumes from.

In a run with several processes only the first should open a writer.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.errors import UserError, require
from perl_jax.runtime import files
from perl_jax.runtime.files import write_atomically

FILE_NAME = "metrics.jsonl"
# What RL writes while it trains, and the rows that an evaluation was measured on.
SAMPLES_NAME = "samples.jsonl"
EVALUATION_SAMPLES_NAME = "evaluation_samples.jsonl"
TIMING_PREFIX = "time/"
NONFINITE_KEY = "nonfinite"
RESERVED_KEYS = ("step", NONFINITE_KEY)
EXTRAS = {"tensorboardX": "tensorboard", "wandb": "wandb"}


def scalar(name: str, value: Any) -> float:
    """Returns a number, NumPy scalar or one-element array of any float type as a Python float.

    Args:
        name: The metric's name, for the message.
        value: The value.

    Raises:
        ValueError: For an array with any other number of elements.
    """
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} must be one number, not an array of shape {array.shape}")
    return float(array.reshape(()).astype(np.float64))


def encode_row(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON object of one step: `step`, then the metrics in their order.

    A NaN or infinite metric becomes None, and the names of such metrics follow as the list
    `nonfinite`, which is missing if there are none.

    Args:
        step: The step.
        metrics: Numbers or one-element arrays, by name.

    Raises:
        ValueError: For a metric that is named `step` or `nonfinite`, or that is not one number.
    """
    row: dict[str, Any] = {"step": int(step)}
    nonfinite = []
    for name, value in metrics.items():
        if name in RESERVED_KEYS:
            raise ValueError(f"a metric may not be called {name!r}; the writer uses that key")
        number = scalar(name, value)
        row[name] = number if math.isfinite(number) else None
        if row[name] is None:
            nonfinite.append(name)
    if nonfinite:
        row[NONFINITE_KEY] = nonfinite
    return row


def read_metrics(path: files.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without an incomplete last line (which a killed run
    may leave).

    Raises UserError if the file is missing, or if another line is not an object with an integer
    `step`.
    """
    path = files.path_of(path)
    require(files.exists(path), f"There is no metrics file at {path}.")
    lines = files.read_bytes(path).split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    rows = []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:  # bad JSON and bad UTF-8 alike
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif index < len(lines) - 1:
            raise UserError(
                f"Line {index + 1} of {path} is not a JSON object with an integer 'step'; "
                "restore the file or move it away."
            )
    return rows


def without_timing(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows without `time/` metrics; equal for two runs with the same configuration.

    without_timing([{"step": 1, "train/loss": 0.5, "time/step": 0.1}])
        == [{"step": 1, "train/loss": 0.5}]
    """
    cleaned = []
    for row in rows:
        kept = {k: v for k, v in row.items() if not k.startswith(TIMING_PREFIX)}
        if NONFINITE_KEY in kept:
            names = [n for n in kept[NONFINITE_KEY] if not n.startswith(TIMING_PREFIX)]
            kept[NONFINITE_KEY] = names
            if not names:
                del kept[NONFINITE_KEY]
        cleaned.append(kept)
    return cleaned


def prepare_file(path: files.Path, resume_step: int | None) -> int | None:
    """Prepares a metrics file for appending; returns the last step that it keeps, or None.

    Args:
        path: The file.
        resume_step: Rows up to this step are kept, later ones deleted. None starts a new file: an
            existing one with rows is moved to `NAME.previous.jsonl`.
    """
    if resume_step is None:
        if files.exists(path) and files.size(path):
            files.move(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
        return None
    if not files.exists(path):
        return None
    rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["step"] if rows else None


def import_extra(module: str) -> Any:
    """Returns an imported optional package.

    Args:
        module: A key of EXTRAS.

    Raises:
        UserError: The package is not installed; the message has the command that installs it.
    """
    extra = EXTRAS[module]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"Writing metrics to {extra} needs the package {module} ({error}); "
            f"install it with: pip install -c constraints.txt -e '.[{extra}]'"
        ) from error


class MetricsWriter:
    """Appends one object per step to `folder/metrics.jsonl`, and to TensorBoard and wandb on
    request.

    Steps must increase: one row per step, so pass training and validation metrics of a step in one
    call. A row is in the file before `write` returns. Write the row of a step and call `sync`
    before saving the checkpoint of that step. Then the file of a run that was killed and resumed
    equals that of an uninterrupted run, apart from `time/` keys.

    Args:
        folder: The run's folder.
        resume_step: The step of the checkpoint that the run resumes from; None for a new run.
        tensorboard: Whether to write TensorBoard events to `folder/tensorboard`.
        wandb: Whether to log to Weights & Biases.
        wandb_project: The project there; None: that of WANDB_PROJECT, or perl_jax.
        wandb_name: The run's name there; None: the last two folders of the run's path.

    Raises:
        UserError: An optional package is not installed, or the file is damaged.
    """

    def __init__(
        self,
        folder: files.PathLike,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str | None = None,
        wandb_name: str | None = None,
    ):
        # Optional packages first: if one is missing, the rows of an earlier run must stay.
        tensorboard_module = import_extra("tensorboardX") if tensorboard else None
        wandb_module = import_extra("wandb") if wandb else None
        made = files.make_folder(folder)
        self.path = made / FILE_NAME
        self._last_step = prepare_file(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  `close` closes it
        self._tensorboard = None
        self._wandb = None
        if tensorboard_module is not None:
            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = tensorboard_module.SummaryWriter(
                logdir=str(made / "tensorboard"), purge_step=purge
            )
        if wandb_module is not None:
            self._wandb = wandb_module.init(
                dir=str(made),
                project=wandb_project or os.environ.get("WANDB_PROJECT") or "perl_jax",
                name=wandb_name or "/".join(made.absolute().parts[-2:]),
                id=wandb_id(made, resume_step),
                resume="allow",
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the row of one step to the file and the dashboards.

        Args:
            step: The step.
            metrics: Numbers or one-element arrays, by name. Dashboards get the finite ones.

        Raises:
            ValueError: If the step is not larger than the last one.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        row = encode_row(step, metrics)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._last_step = step
        finite = {k: v for k, v in row.items() if k not in RESERVED_KEYS and v is not None}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def sync(self) -> None:
        """Waits until everything written is on disk; call it before saving a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and the dashboards; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SamplesWriter:
    """Appends samples of what RL writes to `folder/samples.jsonl`, as objects with `step` first.

    A resumed writer deletes the samples written after the checkpoint that it resumes from, as
    `MetricsWriter` does. The file is created with the first sample.

    Args:
        folder: The run's folder.
        resume_step: The step of the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(self, folder: files.Path, resume_step: int | None):
        self.path = folder / SAMPLES_NAME
        prepare_file(self.path, resume_step)

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the samples of a step; they are on disk when the call returns.

        Args:
            step: The step.
            rows: One JSON object per sample; without any the file is not touched.
        """
        if rows:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"step": int(step), **row}) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())


class NoMetrics:
    """Replaces the metrics writer and the progress line on processes that have neither."""

    def write(self, step: int, metrics: Any) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def update(self, step: int, **shown: Any) -> None:
        """Does nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def wandb_id(folder: files.Path, resume_step: int | None) -> str:
    """Returns the run's wandb id, which `folder/wandb_id.txt` stores.

    Args:
        folder: The run's folder.
        resume_step: With a step the stored id is returned. None, or a missing file, stores a new
            random id.
    """
    path = folder / "wandb_id.txt"
    if resume_step is not None and files.exists(path):
        return files.read_text(path).strip()
    identifier = uuid.uuid4().hex[:12]
    write_atomically(path, identifier + "\n")
    return identifier
