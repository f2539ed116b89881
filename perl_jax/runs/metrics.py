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
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.errors import UserError
from perl_jax.runs import lines
from perl_jax.runs.owner import Lost
from perl_jax.runtime import files
from perl_jax.runtime.files import write_atomically
from perl_jax.runtime.outputs import LocalCopy

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
    lines.require_lines(path, "metrics file")
    return lines.read_rows(path)


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


def _keeps(error: type[BaseException] | None) -> bool:
    """Returns whether a writer may still write into the run's folder when its block ends.

    Args:
        error: The type of the error that ended the block; None: there was none.
    """
    return error is None or not issubclass(error, Lost)


class MetricsWriter:
    """Appends one object per step to `folder/metrics.jsonl`, and to TensorBoard and wandb on
    request.

    Steps must increase: one row per step, so pass training and validation metrics of a step in one
    call. On a disk a row is in the file before `write` returns, in a bucket with the next `sync`.
    Write the row of a step and call `sync` before saving the checkpoint of that step. Then the file
    of a run that was killed and resumed equals that of an uninterrupted run, apart from `time/`
    keys.

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
        self._lines = lines.Lines(made / FILE_NAME, resume_step)
        # What the dashboards' packages write; they know disks only.
        self._local = LocalCopy(made)
        self._tensorboard = None
        self._wandb = None
        if tensorboard_module is not None:
            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = tensorboard_module.SummaryWriter(
                logdir=str(self._local.path / "tensorboard"), purge_step=purge
            )
        if wandb_module is not None:
            self._wandb = wandb_module.init(
                dir=str(self._local.path),
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
        last = self._lines.last_step
        if last is not None and step <= last:
            raise ValueError(f"metrics of step {step} come after those of step {last}")
        row = encode_row(step, metrics)
        self._lines.write(step, [row])
        finite = {k: v for k, v in row.items() if k not in RESERVED_KEYS and v is not None}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def sync(self) -> None:
        """Waits until everything written is stored; call it before saving a checkpoint."""
        self._lines.sync()

    def close(self, keep: bool = True, merge: bool = True) -> None:
        """Closes the file and the dashboards; a second call does nothing.

        Args:
            keep: False: nothing more is written into the run's folder.
            merge: Whether parts in a bucket are merged into the file.
        """
        self._lines.close(keep, merge)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self._local.close(keep)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(keep=_keeps(kind), merge=kind is None)


class SamplesWriter:
    """Appends RL's sampled responses to `folder/samples.jsonl`: one JSON object per line, with the
    key `step` first.

    A resumed writer deletes the samples written after the checkpoint that it resumes from, as
    `MetricsWriter` does. The file is created with the first sample.

    Args:
        folder: The run's folder.
        resume_step: The step of the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(self, folder: files.Path, resume_step: int | None):
        self._lines = lines.Lines(folder / SAMPLES_NAME, resume_step)

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the samples of a step; they are stored when the call returns.

        Args:
            step: The step.
            rows: One JSON object per sample; without any the file is not touched.
        """
        self._lines.write(step, [{"step": int(step), **row} for row in rows])
        self._lines.sync()

    def __enter__(self) -> SamplesWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._lines.close(_keeps(kind), merge=kind is None)


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
