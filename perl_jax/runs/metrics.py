"""Metrics of a run: one JSON object per step on disk, optional dashboards, a progress line.

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
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import rich.console
import rich.progress

from perl_jax.errors import UserError
from perl_jax.runtime.files import write_atomically

FILE_NAME = "metrics.jsonl"
SAMPLES_NAME = "validation_samples.jsonl"
TIMING_PREFIX = "time/"
NONFINITE_KEY = "nonfinite"
RESERVED_KEYS = ("step", NONFINITE_KEY)
EXTRAS = {"tensorboardX": "tensorboard", "wandb": "wandb"}
PACKAGES = (
    "perl_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "numpy",
    "grain",
    "tensorflow-datasets",
    "transformers",
    "tokenizers",
    "safetensors",
)


def scalar(name: str, value: Any) -> float:
    """Returns a number, NumPy scalar or one-element array of any float type as a Python float.

    Raises ValueError, naming the metric, for an array with more or fewer elements.
    """
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} must be one number, not an array of shape {array.shape}")
    return float(array.reshape(()).astype(np.float64))


def encode_row(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON object of one step: `step`, the metrics in their order, then `nonfinite` if
    needed.

    Raises ValueError for a metric that is named `step` or `nonfinite`.
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


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without an incomplete last line (which a killed run
    may leave).

    Raises UserError if the file is missing, or if another line is not an object with an integer
    `step`.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"There is no metrics file at {path}.") from None
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


def prepare_file(path: Path, resume_step: int | None) -> int | None:
    """Prepares a metrics file for appending; returns the last step that it keeps, or None.

    Args:
        path: The file.
        resume_step: Rows up to this step are kept. None starts a new file; existing rows are moved
            to `metrics.previous.jsonl`.
    """
    if resume_step is None:
        if path.exists() and path.stat().st_size:
            os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
        return None
    if not path.exists():
        return None
    rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["step"] if rows else None


def import_extra(module: str) -> Any:
    """Returns an imported optional package; raises UserError with the installation command if it is
    missing.
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

    Raises:
        UserError: An optional package is not installed, or the file is damaged.
    """

    def __init__(
        self,
        folder: Path | str,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        folder = Path(folder)
        # Optional packages first: if one is missing, the rows of an earlier run must stay.
        tensorboard_module = import_extra("tensorboardX") if tensorboard else None
        wandb_module = import_extra("wandb") if wandb else None
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self._last_step = prepare_file(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  `close` closes it
        self._tensorboard = None
        self._wandb = None
        if tensorboard_module is not None:
            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = tensorboard_module.SummaryWriter(
                logdir=str(folder / "tensorboard"), purge_step=purge
            )
        if wandb_module is not None:
            self._wandb = wandb_module.init(
                dir=str(folder), name=folder.name, id=wandb_id(folder, resume_step), resume="allow"
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the row of one step to the file and the dashboards; the values are numbers or
        one-element arrays.

        Raises ValueError if the step is not larger than the last one.
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
    """Appends validation samples to `folder/validation_samples.jsonl`, as objects with `step`
    first.

    A resumed writer drops the samples written after the checkpoint that it resumes from, as
    `MetricsWriter` does. The file is created with the first sample.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        self.path = folder / SAMPLES_NAME
        prepare_file(self.path, resume_step)

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the samples of a step; they are on disk when the call returns."""
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


def wandb_id(folder: Path, resume_step: int | None) -> str:
    """Returns the run's wandb id, stored in `folder/wandb_id.txt` so that a resumed run keeps its
    id.
    """
    path = folder / "wandb_id.txt"
    if resume_step is not None and path.exists():
        return path.read_text(encoding="utf-8").strip()
    identifier = uuid.uuid4().hex[:12]
    write_atomically(path, identifier + "\n")
    return identifier


def duration(seconds: float) -> str:
    """Returns a time in words: `45 s`, `6 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Shows one progress line: stage, steps done, rate, time left and a few metrics.

    On a terminal the line is redrawn in place. Elsewhere (a log file) a line is printed at most
    every `interval` seconds, and at the first and the last update. The rate excludes the first
    update, which includes compilation.

        with Progress("sft", total=1000) as progress:
            progress.update(1, loss=2.31)

    Args:
        stage: The text at the beginning of the line.
        total: The number of steps.
        start: The step that a resumed run continues from.
        interval: Seconds between two lines where there is no terminal.
        stream: Where to print; standard error by default.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        start: int = 0,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Any = time.monotonic,
    ):
        self._stage, self._total, self._start = stage, total, start
        self._interval, self._clock = interval, clock
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None
        self._last_line: tuple[int, str] | None = None
        self._printed_at: float | None = None
        self._printed_step: int | None = None
        self._live: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[shown]}", markup=False),
                console=rich.console.Console(file=self._stream),
            )
            live.start()
            self._task = live.add_task(
                self._stage, total=self._total, completed=self._start, shown=""
            )
            self._live = live
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._last_line is not None and self._printed_step != self._last_line[0]:
            self._print(*self._last_line)

    def update(self, step: int, **shown: Any) -> None:
        """Reports that `step` steps are done; `shown` are metrics to print on the line."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        details = self._details(step, now, shown)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, shown=details)
            return
        share = f" ({step / self._total:.0%})" if self._total else ""
        line = f"{self._stage} {step}/{self._total}{share}" + (f"  {details}" if details else "")
        self._last_line = (step, line)
        due = self._printed_at is None or now - self._printed_at >= self._interval
        if due or step >= self._total:
            self._printed_at = now
            self._print(step, line)

    def _details(self, step: int, now: float, shown: Mapping[str, Any]) -> str:
        """Returns the part of the line after the step count: rate, time left, metrics."""
        parts = []
        first_step, first_time = self._first or (step, now)
        if step > first_step and now > first_time:
            rate = (step - first_step) / (now - first_time)
            parts.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
            if step < self._total:
                parts.append(f"{duration((self._total - step) / rate)} left")
        parts += [f"{name} {scalar(name, value):.4g}" for name, value in shown.items()]
        return "  ".join(parts)

    def _print(self, step: int, line: str) -> None:
        """Prints the line and remembers its step."""
        self._printed_step = step
        print(line, file=self._stream, flush=True)


def package_versions() -> dict[str, str]:
    """Returns {package: version} of the installed packages that can change a run's numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path | None = None) -> str | None:
    """Returns the git commit of a folder, with `-dirty` if files are edited, or None without git.

    A folder that git does not track (an environment inside some other repository) has no commit.

    Args:
        folder: The folder; by default that of this package.
    """
    folder = Path(__file__).parent if folder is None else folder
    outputs = []
    for arguments in (["ls-files", "."], ["rev-parse", "HEAD"], ["status", "--porcelain", "."]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        outputs.append(done.stdout.strip())
    tracked, commit, changes = outputs
    if not tracked:
        return None
    return f"{commit}-dirty" if changes else commit


def environment() -> dict[str, Any]:
    """Returns what a run ran on, for `config.json`: Python, platform, devices, package versions,
    commit.

    Call it after `jax.distributed.initialize`, because it starts JAX's backend.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "packages": package_versions(),
        "commit": git_commit(),
    }
