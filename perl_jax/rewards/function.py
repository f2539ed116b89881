"""A reward that is a Python function of the user, run in a process of its own so that a hang can be
ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any, NoReturn

import numpy as np

from perl_jax.errors import UserError, positive, require
from perl_jax.rewards import checks

Batch = tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]  # prompts, responses, rows

GRACE_SECONDS = 2.0  # for a worker to leave by itself once its pipe is closed
LOOK_SECONDS = 0.1  # between looks at whether a worker that says nothing is still there
# A program of its own: multiprocessing would import the user's script again, and with it jax and
# all that training needs.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); from perl_jax.rewards import "
    "worker; worker.main()"
)


@dataclasses.dataclass
class Worker:
    """The process and the pipe to it; both None while there is no process."""

    process: subprocess.Popen | None = None
    pipe: connection.Connection | None = None
    takes_rows: bool = False

    def start(self, target: str, seconds: float) -> None:
        """Loads the function in a new process; UserError if that fails or takes longer than
        `seconds`.
        """
        self.pipe, theirs = multiprocessing.Pipe()
        number = theirs.fileno()
        # -P: a module of the working folder is not taken for one of Python's own before the path is
        # set.
        command = [
            sys.executable,
            "-P",
            "-c",
            START,
            target,
            str(number),
            json.dumps(sys.path, default=str),
        ]
        # A session of its own: what it starts ends with it. Its input says nothing, but ends when
        # this process does, even by a kill.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(number,), start_new_session=True
        )
        theirs.close()  # the worker has its own
        try:
            self.takes_rows = self.receive(target, seconds, "starting up (start_seconds)")
        except BaseException:
            self.kill()  # one that could not start has nothing to lose
            raise

    def ask(self, target: str, batch: Batch, seconds: float) -> list[float]:
        prompts, responses, rows = batch
        what = f"a batch of {len(responses)} (timeout_seconds)"
        message = (
            list(prompts),
            list(responses),
            [dict(row) for row in rows] if self.takes_rows else [],
        )
        try:
            self.pipe.send(message)
            return self.receive(target, seconds, what)
        except OSError:
            self.ended(target, what)
        except KeyboardInterrupt:
            self.kill()  # its answer would be taken for that of the next batch
            raise

    def receive(self, target: str, seconds: float, what: str) -> Any:
        """The next reply's content; UserError for an error in it, none within `seconds`, or a
        worker that has ended.
        """
        latest = time.monotonic() + seconds
        try:
            while not self.pipe.poll(max(0.0, min(LOOK_SECONDS, latest - time.monotonic()))):
                # The process too: a program that it left behind can hold the pipe open. Its last
                # word may have come meanwhile.
                if self.process.poll() is not None and not self.pipe.poll():
                    self.ended(target, what)
                if time.monotonic() >= latest:
                    self.kill()
                    raise UserError(
                        f"The reward function {target} took longer than {seconds:g} s for {what} "
                        "and was ended."
                    )
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            self.ended(target, what)
        require(kind != "error", content)
        return content

    def ended(self, target: str, what: str) -> NoReturn:
        """Clears up after a worker that has gone, and says so."""
        code = self.wait()
        self.kill()
        signalled = f" ({signal.strsignal(-code)})" if code is not None and code < 0 else ""
        raise UserError(
            f"The process of the reward function {target} ended with exit code {code}{signalled} "
            f"during {what}."
        )

    def wait(self) -> int | None:
        """The exit code of a process that is about to leave; None if it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        return self.process.returncode

    def kill(self) -> None:
        """Ends the process at once, and what it started."""
        if self.process is None:
            return
        if self.process.poll() is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.pipe.close()
        self.process = self.pipe = None

    def close(self) -> None:
        """Lets an idle process leave by itself, so that the function's own files are closed in
        order.
        """
        if self.process is None:
            return
        self.pipe.close()
        self.wait()
        self.kill()


@dataclasses.dataclass(frozen=True)
class FunctionReward:
    """function(prompts, responses) -> numbers, one a response, each batch in one call.

    A function with a third parameter (one without a default, or called rows) gets the rows, too.
    The process starts at the first batch, or on entering the context, and stays: what the function
    keeps between calls is still there, until a time-out or a crash; the batch after starts anew.
    It imports what the function's module imports, neither the script that trains nor jax, and ends
    with the process that trains. It must not use that one's accelerator.

    Attributes:
        function: module:function, or path/to/file.py:function.
        timeout_seconds: The longest a batch may take; then the process, and what it started, is
        killed. start_seconds: The longest the import may take.
    """

    function: str
    timeout_seconds: float = 60.0
    start_seconds: float = 120.0
    worker: Worker = dataclasses.field(
        default_factory=Worker, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checks.text("function.function", self.function)
        source, _, name = self.function.rpartition(":")
        form = "it must be module:function or path/to/file.py:function"
        require(
            bool(source) and name.isidentifier(), f"function.function is {self.function!r}; {form}."
        )
        if source.endswith(".py"):
            require(
                pathlib.Path(source).expanduser().is_file(),
                f"There is no file {source}, the source of a reward function.",
            )
        else:
            require(
                all(part.isidentifier() for part in source.split(".")),
                f"function.function is {self.function!r}; {form}.",
            )
        positive("function.timeout_seconds", self.timeout_seconds)
        positive("function.start_seconds", self.start_seconds)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        checks.sequences(prompts, responses, rows)
        if not len(responses):
            return np.zeros(0, np.float64)
        self.start()
        return np.array(
            self.worker.ask(self.function, (prompts, responses, rows), self.timeout_seconds),
            np.float64,
        )

    def start(self) -> None:
        """Loads the function if no process has it yet, so that its errors come before training."""
        if self.worker.process is None:
            self.worker.start(self.function, self.start_seconds)

    def close(self) -> None:
        self.worker.close()

    def __enter__(self) -> FunctionReward:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
