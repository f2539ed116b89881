"""Ctrl-C: what it does now is said at once, and a command that does not end is ended."""

from __future__ import annotations

import os
import signal
import sys
import threading

from perl_jax.runtime import hosts

# Seconds that a command has to end by itself after Ctrl-C.
GRACE = 2.0


class Interrupts:
    """Context manager that watches for Ctrl-C from a thread of its own.

    Python raises KeyboardInterrupt between two instructions of the main thread, which may be inside
    a long compilation or device program. So a thread reads the signals. Where a training loop will
    save its step (`hosts.Termination`), the first Ctrl-C makes the thread say so. Any other Ctrl-C
    gives the process `GRACE` seconds to end by itself; then the thread ends it with status 130 and
    one sentence.

    Args:
        command: The command's name, for messages.
        resumes: Whether the command has checkpoints to resume from.
    """

    def __init__(self, command: str, resumes: bool) -> None:
        again = (
            "; the same command resumes from the last checkpoint, if there is one"
            if resumes
            else ""
        )
        self.sentence = f"stopped by Ctrl-C{again}."
        self._command = command
        self._timer: threading.Timer | None = None
        # The loop that has been asked to stop.
        self._stopping: hosts.Termination | None = None
        self._pipe: tuple[int, int] | None = None
        self._before = -1

    def __enter__(self) -> Interrupts:
        # Only the main thread can be told about signals.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)
            os.close(self._pipe[1])
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self, source: int) -> None:
        """Reads the numbers of signals from a pipe until it is closed."""
        while received := os.read(source, 64):
            for number in received:
                self._received(number)
        os.close(source)

    def _received(self, number: int) -> None:
        """Answers one signal.

        Args:
            number: The signal.
        """
        loop = hosts.Termination.current
        first = loop is not None and loop is not self._stopping
        if number in (signal.SIGTERM, signal.SIGINT) and first:
            self._stopping = loop
            if number == signal.SIGINT and hosts.is_writer():
                self._say("finishing and saving this step; Ctrl-C again ends at once.")
        elif number == signal.SIGINT and self._timer is None:
            self._timer = threading.Timer(GRACE, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _say(self, sentence: str) -> None:
        """Prints a sentence, from any thread, on a line of its own."""
        # A terminal shows ^C, or a progress line.
        start = "\n" if sys.stderr.isatty() else ""
        os.write(2, f"{start}perl-jax {self._command}: {sentence}\n".encode())

    def _end(self) -> None:
        """Ends the process."""
        self._say(self.sentence)
        os._exit(130)
