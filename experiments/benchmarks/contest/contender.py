"""What contenders share: their command line, their end of the protocol (see `contest.py`), the clock, the reward.

Imports no array library but what `work.py` needs, so that any contender's environment can use it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import work


def parser(description: str | None, jobs: Sequence[str]) -> argparse.ArgumentParser:
    """work, job and tuning of a contender's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder written by work.py")
    parser.add_argument("--job", choices=jobs, required=True)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    return parser


def read_rows(folder: pathlib.Path, job: str) -> list[dict[str, str]]:
    """The rows of a job's file, in its order; see `work.py` for how they make batches."""
    return [json.loads(line) for line in (folder / work.JOBS[job]).read_text().splitlines()]


def versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def even_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of the job rl-function: of a response's words, the share whose number is even."""
    even = [[word[-1] in "02468" for word in response.split()] for response in responses]
    return [sum(words) / max(len(words), 1) for words in even]


class Parts:
    """Seconds by part of the step under way. settle: waits for what the device still does."""

    def __init__(self, settle: Callable[[], object] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.settle = settle

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what the block takes to the part `name`."""
        began = time.perf_counter()
        yield
        self.settle()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


class Protocol:
    """The contender's end: `ready` once, then as long as `wait` is true one step and `report`.

    From the first moment on, standard output is the protocol's alone; what libraries print goes to
    standard error. A step's seconds run from its line's arrival to `report`, and until the device is done (`settle`).
    peak_bytes: the largest memory of the process so far; on a GPU to be set to that of the device.
    """

    def __init__(self) -> None:
        self.settle: Callable[[], object] = lambda: None
        self.peak_bytes: Callable[[], int] = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._began = self._processor = 0.0

    def ready(self, name: str, versions: dict[str, str], settings: str) -> None:
        self._say({"ready": True, "name": name, "versions": versions, "settings": settings})

    def wait(self) -> bool:
        """Blocks until the next step is asked for; False where no more will be."""
        line = sys.stdin.readline()
        if line and line.strip() != "step":
            raise ValueError(f"A line must be 'step', not {line!r}.")
        self._began, self._processor = time.perf_counter(), time.process_time()
        return bool(line)

    def report(self, tokens: int, parts: dict[str, float], rest: str | None = None) -> None:
        """A step's end; seconds that are in none of the parts get the name `rest`."""
        self.settle()
        seconds, processor = time.perf_counter() - self._began, time.process_time() - self._processor
        if rest is not None:
            parts = parts | {rest: seconds - sum(parts.values())}
        peak_mib = self.peak_bytes() / 2**20
        self._say({"seconds": seconds, "parts": parts, "tokens": tokens, "peak_mib": peak_mib, "processor_seconds": processor})

    def _say(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._output, flush=True)


def check_tokens(job: str, tokens: int, expected: int | None = None) -> int:
    """tokens, where they are what a step of the job must have; ValueError otherwise."""
    expected = work.TOKENS[job] if expected is None else expected
    if tokens != expected:
        raise ValueError(f"A step of {job} had {tokens} tokens where the work has {expected}.")
    return tokens
