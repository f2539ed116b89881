"""Rewards computed by a user's Python function, which runs in its own process so that a hanging
call can be stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any, NoReturn

import numpy as np

from perl_jax.errors import COUNT, UserError, positive, require
from perl_jax.rewards import checks
from perl_jax.rewards.worker import LOST_PIPE
from perl_jax.runtime import files, stopping

Batch = tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]  # prompts, responses, rows

REPLIES = ("ready", "values", "error")  # the kinds of a worker's messages
GRACE_SECONDS = 2.0  # how long a worker may take to exit once its pipe is closed
END_SECONDS = 10.0  # how long the supervisor may take to end what the function started
# The worker's program. multiprocessing would import the user's script again, and with it jax and
# everything else that training needs.
WORKER_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); from perl_jax.rewards import "
    "supervisor; supervisor.main()"
)


@dataclasses.dataclass
class Worker:
    """A worker process and the pipe to it.

    Attributes:
        process: The process of the supervisor, which runs the worker; None while none runs.
        pipe: This side's end of the pipe, or None while no process runs.
        takes_rows: Whether the function has a parameter for the rows.
        number: The number of the last batch that was sent to the process.
    """

    process: subprocess.Popen | None = None
    pipe: connection.Connection | None = None
    takes_rows: bool = False
    number: int = 0

    @property
    def running(self) -> tuple[subprocess.Popen, connection.Connection]:
        """The process and the pipe; raises RuntimeError while no process runs."""
        if self.process is None or self.pipe is None:
            raise RuntimeError("no worker process runs")
        return self.process, self.pipe

    def start(self, target: str, seconds: float) -> None:
        """Starts a process and loads the function in it; sets `process`, `pipe` and `takes_rows`.

        Args:
            target: The function, `module:function` or `path/to/file.py:function`.
            seconds: The longest time for loading.

        Raises:
            UserError: Loading fails or takes too long; the process is killed.
        """
        self.pipe, theirs = multiprocessing.Pipe()
        self.number = 0
        number = theirs.fileno()
        # -P: until sys.path is set, a module in the working directory must not hide a standard one.
        command = [
            sys.executable,
            "-P",
            "-c",
            WORKER_PROGRAM,
            target,
            str(number),
            json.dumps(sys.path, default=str),
        ]
        # A session of its own: Ctrl-C is for this process alone. Nothing is written to its standard
        # input; the end of that pipe tells the supervisor that this process has ended, even by
        # SIGKILL.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(number,), start_new_session=True
        )
        theirs.close()  # the worker has a copy
        try:
            self.takes_rows = self.receive(target, seconds, "starting up", "start_seconds")
        except BaseException:
            self.kill()  # nothing to save: the function is not loaded
            raise

    def ask(self, target: str, batch: Batch, seconds: float) -> list[float]:
        """Sends a batch to the process and returns the function's rewards, one float per response.

        Args:
            target: The function's name, for error messages.
            batch: (prompts, responses, rows). The rows are only sent to a function that takes them.
            seconds: The longest time for the call.

        Raises:
            UserError: The function fails, the process ends, or the call takes too long. A process
                that is too slow is killed.
            stopping.Abandoned: This process was told to stop; the worker is killed.
        """
        prompts, responses, rows = batch
        what = f"a batch of {len(responses)}"
        self.number += 1
        message = (
            self.number,
            list(prompts),
            list(responses),
            [dict(row) for row in rows] if self.takes_rows else [],
        )
        _, pipe = self.running
        try:
            pipe.send(message)
        except OSError:
            self.ended(target, what)
        try:
            return self.receive(target, seconds, what, "timeout_seconds")
        except (KeyboardInterrupt, stopping.Abandoned):
            self.kill()  # the function still computes
            raise

    def receive(self, target: str, seconds: float, what: str, setting: str) -> Any:
        """Waits for the reply to the last message and returns its content: `takes_rows` after the
        start, later the rewards of a batch.

        Replies to earlier batches are dropped.

        Args:
            target: The function's name, for error messages.
            seconds: The longest time to wait. After it the process is killed.
            what: What the worker is doing, for error messages.
            setting: The setting that `seconds` is from, for the message of a time-out.

        Raises:
            UserError: The message reports an error, none came in time, or the process has ended.
        """
        process, pipe = self.running
        latest = time.monotonic() + seconds
        number, kind = -1, ""
        content: Any = None
        while number != self.number:
            while not pipe.poll(max(0.0, min(stopping.LOOK_SECONDS, latest - time.monotonic()))):
                # Check the process too: a program that it has started can keep the pipe open. Its
                # last message may have arrived since the poll.
                if process.poll() is not None and not pipe.poll():
                    self.ended(target, what)
                if time.monotonic() >= latest:
                    self.kill()
                    raise UserError(
                        f"The reward function {target} took longer than {seconds:g} s for {what} "
                        f"({setting}) and was ended."
                    )
                stopping.check()
            try:
                number, kind, content = pipe.recv()
            except (EOFError, OSError):
                self.ended(target, what)
            except Exception:  # bytes that are no message, or a message that is no reply
                number, kind = None, ""
            if not (isinstance(number, int) and number <= self.number and kind in REPLIES):
                self.kill()
                raise UserError(
                    f"The process of the reward function {target} sent what is no reply during "
                    f"{what}: something writes into the worker's pipe."
                )
        require(kind != "error", content)
        return content

    def ended(self, target: str, what: str) -> NoReturn:
        """Raises UserError with the exit code of a process that has ended unexpectedly; first kills
        the processes that it left.

        Args:
            target: The function's name, for the message.
            what: What the worker was doing, for the message.
        """
        code = self.wait(END_SECONDS)
        self.kill()
        if code == LOST_PIPE:
            raise UserError(
                f"The reward function {target} closed file descriptors that are not its own, and "
                f"with them the worker's pipe, during {what}."
            )
        signalled = f" ({signal.strsignal(-code)})" if code is not None and code < 0 else ""
        raise UserError(
            f"The process of the reward function {target} ended with exit code {code}{signalled} "
            f"during {what}."
        )

    def wait(self, seconds: float) -> int | None:
        """Waits up to `seconds` for the process to exit; returns its exit code, or None if it still
        runs.
        """
        process, _ = self.running
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode

    def kill(self) -> None:
        """Ends the process and everything that the function started, and closes the pipe; does
        nothing while no process runs.
        """
        if self.process is None:
            return
        process, pipe = self.running
        if process.stdin is not None:
            process.stdin.close()  # the supervisor then kills them all
        if self.wait(END_SECONDS) is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended since
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        pipe.close()
        self.process = self.pipe = None

    def close(self) -> None:
        """Ends the process: closes the pipe, waits up to `GRACE_SECONDS` for the process to exit,
        then kills it.

        An idle process exits by itself when the pipe is closed, so the files that the function
        opened are closed properly. Does nothing while no process runs.
        """
        if self.process is None:
            return
        self.running[1].close()
        self.wait(GRACE_SECONDS)
        self.kill()


@dataclasses.dataclass(frozen=True)
class FunctionReward:
    """A reward computed by a Python function: function(prompts, responses) -> one number per
    response.

    Each batch is one call. The function also gets the rows if it has a third parameter that is
    called `rows` or has no default.

    The function runs in a worker process, which starts on entering the context or at the first
    batch. The process keeps running, so state that the function keeps between calls persists. After
    a time-out or a crash the next batch starts a new process. The worker imports the function's
    module, but neither jax nor the training script, and must not use the accelerator that training
    uses. It ends when the training process ends, and with it everything that the function started
    (on systems other than Linux: what stayed in its process group).

    Attributes:
        function: `module:function`, or `path/to/file.py:function`.
        timeout_seconds: The longest time for a batch, in seconds; after it the worker and its child
            processes are killed.
        start_seconds: The longest time for importing the function's module, in seconds.
    """

    function: str
    timeout_seconds: float = 60.0
    start_seconds: float = 120.0
    worker: Worker = dataclasses.field(
        default_factory=Worker, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checks.require_text("function.function", self.function)
        source, _, name = self.function.rpartition(":")
        form = "it must be module:function or path/to/file.py:function"
        require(
            bool(source) and name.isidentifier(), f"function.function is {self.function!r}; {form}."
        )
        if source.endswith(".py"):
            require(
                files.is_file(files.local(source, "function.function")),
                f"There is no file {source}, the source of a reward function.",
            )
        else:
            require(
                all(part.isidentifier() for part in source.split(".")),
                f"function.function is {self.function!r}; {form}.",
            )
        positive("function.timeout_seconds", self.timeout_seconds, most=COUNT)
        positive("function.start_seconds", self.start_seconds, most=COUNT)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Returns the function's rewards, float64 [n]; starts the worker process if none runs.

        An empty batch does not call the function.

        Args:
            prompts: The n prompts as text.
            responses: The n responses as text.
            rows: The rows of the prompts with all their columns; ignored unless the function takes
                rows.

        Raises:
            UserError: The function cannot be loaded, fails, takes longer than `timeout_seconds`, or
                does not return n finite numbers.
        """
        checks.require_equal_lengths(prompts, responses, rows)
        if not len(responses):
            return np.zeros(0, np.float64)
        self.start()
        return np.array(
            self.worker.ask(self.function, (prompts, responses, rows), self.timeout_seconds),
            np.float64,
        )

    def start(self) -> None:
        """Starts the worker process and loads the function, if no process runs; raises UserError if
        loading fails.
        """
        if self.worker.process is None:
            self.worker.start(self.function, self.start_seconds)

    def close(self) -> None:
        """Stops the worker process after at most `GRACE_SECONDS`; does nothing while none runs."""
        self.worker.close()

    def __enter__(self) -> FunctionReward:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
