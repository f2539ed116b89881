"""Runs `perl-jax` commands, each in a fork of a process that has imported the package already.

A fork runs `perl_jax.cli.main.main` on a command's arguments as a fresh process would, but without
the seconds that imports take. It can be killed, stopped and limited like any process. This module
is also the program of that process: requests are lines of JSON on its standard input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from tests.xla import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
# The longest that a command may take, on a busy machine.
SECONDS = 240.0


@dataclasses.dataclass
class Running:
    """A command that was started.

    Attributes:
        commands: The process that started it.
        pid: Its process id; also that of its process group.
        output: The file with what it printed, to both streams.
        status: Its exit status, below 0 for a signal; None while it runs.
        limited: Whether it has limits.
    """

    commands: Commands
    pid: int
    output: pathlib.Path
    status: int | None = None
    limited: bool = False

    def poll(self) -> int | None:
        """Returns the exit status, or None while the command runs."""
        if self.status is None:
            self.status = self.commands.ask({"poll": self.pid})
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal, if the command still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Returns the exit status; None if the command had to be killed after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := self.poll()) is not None:
                return status
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.02)
        return None

    def printed(self) -> str:
        """Returns what the command printed."""
        if self.limited:
            # What is in the pipe still comes.
            time.sleep(0.5)
        return self.output.read_text(encoding="utf-8", errors="replace")


@dataclasses.dataclass
class Commands:
    """The process that forks.

    Attributes:
        asking: Its standard input.
        answering: Its standard output.
        folder: Where files with outputs go.
        count: The number of commands started so far.
    """

    asking: IO[str]
    answering: IO[str]
    folder: pathlib.Path
    count: int = 0

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Returns the answer to a request."""
        self.asking.write(json.dumps(request) + "\n")
        self.asking.flush()
        return json.loads(self.answering.readline())

    def start(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Running:
        """Starts a command.

        Args:
            arguments: Its name and flags.
            environment: Variables that are added to this process's.
            limits: Values of `resource` limits by name, as RLIMIT_FSIZE.
        """
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        request = {
            "arguments": list(map(str, arguments)),
            "environment": dict(environment or {}),
            "limits": dict(limits or {}),
            "output": str(output),
        }
        return Running(self, self.ask(request), output, limited=bool(limits))


@contextlib.contextmanager
def running_commands(folder: pathlib.Path) -> Iterator[Commands]:
    """Context manager that yields a `Commands`, whose files go to a folder.

    Commands inherit this process's environment variables as they are when the block begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # As in the other tests: tiny programs are compiled quickly, and once.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    environment = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(1),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.campaign.commands"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Commands(process.stdin, process.stdout, folder)
    finally:
        process.stdin.close()
        process.wait(60)


def _serve() -> None:
    """Forks for each request and answers with the pid; answers a poll with the exit status."""
    from perl_jax.cli import main

    for name in main.COMMANDS:
        main._command(name)
    import perl_jax.evaluation.report  # noqa: F401  imported here once, not by every command

    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                _become(request)
        os.write(answers, f"{json.dumps(answer)}\n".encode())


def _through_a_pipe(file: int) -> int:
    """Returns the end of a pipe; a process of its own copies what is written there to a file."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        while piece := os.read(reading, 65536):
            os.write(file, piece)
        os._exit(0)
    os.close(reading)
    os.close(file)
    return writing


def _become(request: Mapping[str, Any]) -> None:
    """Runs a command in the forked process; never returns."""
    from perl_jax.cli.main import main

    status = 1
    try:
        os.setsid()
        file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        if request["limits"]:
            # Limits of files must not be those of what is printed.
            file = _through_a_pipe(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(request["environment"])
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        status = main(request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
