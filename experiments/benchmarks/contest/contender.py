"""What contenders share: their command line, their end of the protocol (see `contest.py`), the
clock, the reward.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import work


def parser(description: str | None, jobs: Sequence[str]) -> argparse.ArgumentParser:
    """work, job and tuning of a contender's command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=pathlib.Path, required=True, help="folder written by work.py"
    )
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


def descendants() -> list[pathlib.Path]:
    """/proc's folders of the living processes below this one; none where there is no /proc."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(folder.name)] = int(status(folder)["PPid"])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return [pathlib.Path("/proc", str(process)) for process in found[1:]]


def status(folder: pathlib.Path) -> dict[str, str]:
    """What the kernel says of a process: its memory, its parent."""
    return {
        name: value.strip()
        for name, _, value in (
            line.partition(":") for line in (folder / "status").read_text().splitlines()
        )
    }


def peak_memory() -> int:
    """The largest resident bytes of this process so far, and of each living process below it
    (VmHWM).

    The sum is an upper bound: peaks need not have been at one time, and what processes share counts
    in each.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for folder in descendants():
        with contextlib.suppress(OSError):
            peak += int(
                status(folder).get("VmHWM", "0 kB").split()[0]
            )  # a process that has ended has none
    return peak * 1024


def processor_seconds() -> float:
    """Returns the processor seconds of this process and of all processes that it has started.

    Running processes are counted to a clock tick (10 ms), ended ones once they are waited for.
    """
    seconds = time.process_time() + sum(os.times()[2:4])
    for folder in descendants():
        with contextlib.suppress(OSError):
            # After the name in brackets: user, system, and those of its own children that have
            # ended.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


class Protocol:
    """The contender's end: `ready` once, then as long as `wait` is true one step and `report`.

    From the first moment on, standard output is the protocol's alone; what libraries print goes to
    standard error. A step's seconds run from its line's arrival to `report`, and until the device
    is done (`settle`). peak_bytes: `peak_memory`, that of the process and its children; on a GPU to
    be set to that of the device.
    """

    def __init__(self) -> None:
        self.settle: Callable[[], object] = lambda: None
        self.peak_bytes: Callable[[], int] = peak_memory
        self._output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._began = self._processor = 0.0

    def ready(
        self,
        name: str,
        versions: dict[str, str],
        settings: str,
        compiled_mib: Mapping[str, float] | None = None,
    ) -> None:
        """compiled_mib: memory by program, as the compiler accounts for it."""
        self._say(
            {
                "ready": True,
                "name": name,
                "versions": versions,
                "settings": settings,
                "compiled_mib": compiled_mib or {},
            }
        )

    def wait(self) -> bool:
        """Blocks until the next step is asked for; False where no more will be."""
        line = sys.stdin.readline()
        if line and line.strip() != "step":
            raise ValueError(f"A line must be 'step', not {line!r}.")
        self._processor, self._began = processor_seconds(), time.perf_counter()
        return bool(line)

    def report(self, tokens: int, parts: dict[str, float], rest: str | None = None) -> None:
        """A step's end; seconds that are in none of the parts get the name `rest`."""
        self.settle()
        seconds, processor = (
            time.perf_counter() - self._began,
            processor_seconds() - self._processor,
        )
        if rest is not None:
            parts = parts | {rest: seconds - sum(parts.values())}
        peak_mib = self.peak_bytes() / 2**20
        self._say(
            {
                "seconds": seconds,
                "parts": parts,
                "tokens": tokens,
                "peak_mib": peak_mib,
                "processor_seconds": processor,
            }
        )

    def _say(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._output, flush=True)


def check_tokens(job: str, tokens: int, expected: int | None = None) -> int:
    """tokens, where they are what a step of the job must have; ValueError otherwise."""
    expected = work.TOKENS[job] if expected is None else expected
    if tokens != expected:
        raise ValueError(f"A step of {job} had {tokens} tokens where the work has {expected}.")
    return tokens
