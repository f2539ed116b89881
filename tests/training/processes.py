"""Jobs as processes of their own: small settings for their command lines, and limits of time that
hold on a busy machine.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import time
from collections.abc import Sequence

from tests.paths import ORDERS

ROOT = pathlib.Path(__file__).parents[2]
# Longer than any job takes.
PATIENCE = 300


def settings(
    *more: str, steps: int, batch_size: int, evaluate_every: int = 4, checkpoint_every: int
) -> tuple[str, ...]:
    """Options of a small job with dropout, two microbatches and a falling rate."""
    options = {
        "data.task": ORDERS,
        "data.train-size": 32,
        "data.evaluation-size": 16,
        "data.max-prompt-length": 8,
        "data.max-response-length": 8,
        "lora.rank": 5,
        "lora.dropout": 0.2,
        "optimizer.learning-rate": 3e-3,
        "optimizer.schedule": "cosine",
        "batch-size": batch_size,
        "microbatches": 2,
        "steps": steps,
        "evaluate-every": evaluate_every,
        "checkpoint-every": checkpoint_every,
    }
    return (*(word for name, value in options.items() for word in (f"--{name}", str(value))), *more)


def steps_done(run: pathlib.Path) -> int:
    """Rows of metrics that a run has written."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Limit:
    """A limit for processes that wait for each other, which a busy machine does not reach.

    It is passed after `seconds` without progress, which is a second of processor that the processes
    have used together, or when they have used `seconds` of processor each. So processes that hang
    and processes that compute for ever are noticed, and slow ones are not. Without /proc there is
    no progress.
    """

    def __init__(self, processes: Sequence[subprocess.Popen], seconds: float) -> None:
        self._processes, self._seconds = processes, seconds
        self._ticks: dict[int, int] = {}
        self._begin = self._last = self._used()
        self._since = time.monotonic()

    def _used(self) -> float:
        """Seconds of processor that the processes have used so far."""
        for process in self._processes:
            stat = pathlib.Path(f"/proc/{process.pid}/stat")
            if process.returncode is None and stat.exists():
                fields = stat.read_text().rpartition(")")[2].split()
                self._ticks[process.pid] = int(fields[11]) + int(fields[12])
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def passed(self) -> bool:
        """Whether the processes are past the limit."""
        used, now = self._used(), time.monotonic()
        if used - self._last >= 1:
            self._last, self._since = used, now
        most = self._seconds * len(self._processes)
        return now - self._since > self._seconds or used - self._begin > most

    def wait(self, process: subprocess.Popen) -> int:
        """Returns the exit status of a process when it has ended; TimeoutExpired past the limit."""
        while True:
            try:
                return process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if self.passed():
                    raise
