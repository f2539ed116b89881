"""The progress line of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import rich.console
import rich.progress

from perl_jax.runs.metrics import scalar


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
        start: The last step that a resumed run has done already.
        interval: Seconds between two lines if the stream is not a terminal.
        stream: Where to print; None: standard error.
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
        """Reports a step; redraws the line, or prints it if it is due.

        Args:
            step: Number of steps that are done.
            shown: Metrics to show on the line, by name.
        """
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
        """Returns the part of the line after the number of steps: rate, time left, metrics.

        Args:
            step: Number of steps that are done.
            now: The time in seconds.
            shown: Metrics to show, by name.
        """
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
        """Prints the line and remembers its step, so that the last line is printed once."""
        self._printed_step = step
        print(line, file=self._stream, flush=True)
