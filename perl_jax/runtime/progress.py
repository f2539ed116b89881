"""What a person sees of work in progress: lines with counts, rate, time left and numbers.

A job opens one line (`Progress`). What happens within a step of it, such as compiling or
validating, opens a line below it (`activity`). Nothing has to be passed on: the innermost open line
is known here.

On a terminal and in a notebook the lines are redrawn in place. Elsewhere (a log file) a line is
printed at most every 30 seconds. A thread prints it when the work itself does not report for so
long, so that nothing is silent for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TextIO, TypeVar

import rich.console
import rich.progress

from perl_jax.runtime import hosts, notebook

Given = ParamSpec("Given")
Result = TypeVar("Result")


def duration(seconds: float) -> str:
    """Returns a time in words: `45 s`, `6 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Shows one line of progress: stage, how much is done, rate, time left and a few numbers.

    A line that is opened while another is open is shown below that line on a terminal. Elsewhere
    the text of the outermost line comes before its own (`rl 100/200: validating 32/64 prompts`).
    The rate excludes the first update, which includes compilation.

        with Progress("sft", total=1000) as progress:
            progress.update(1, loss=2.31)

    Args:
        stage: The text at the beginning of the line.
        total: How much there is to do; None: not known, and the time so far is shown.
        start: What a resumed run has done already.
        unit: What is counted, in the plural; the line names it unless it is `steps`.
        interval: Seconds between two lines if the stream is not a terminal. An inner line has that
            of the outermost one, as it has the stream and the clock.
        stream: Where to print; None: standard error.
        clock: Returns the time in seconds.
        eager: Whether, where the line cannot be redrawn, the first and the last update are printed
            in any case; else the line is printed only if nothing was for `interval` seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        start: int = 0,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Any = time.monotonic,
        unit: str = "steps",
        eager: bool = True,
    ):
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._details_now = start, ""
        self._interval, self._clock, self._eager = interval, clock, eager
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None
        self._opened = 0.0
        self._printed_at: float | None = None
        # The line of the last update, if it was not printed; of the outermost line alone.
        self._unprinted = ""
        self._outer: Progress | None = None
        self._live: rich.progress.Progress | None = None
        # Of a notebook, and only if no stream was given.
        display = notebook.display() if stream is None else None
        self._cell = None if display is None else notebook.Cell(display, clock)
        self._task: rich.progress.TaskID | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        with _LOCK:
            self._outer = _OPEN[-1] if _OPEN else None
            if self._outer is not None:
                root = self._root
                self._stream, self._clock = root._stream, root._clock
                self._interval, self._live, self._cell = root._interval, root._live, root._cell
            self._opened = self._clock()
            _OPEN.append(self)
        if self._outer is None and self._stream.isatty():
            live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.fields[count]}", markup=False),
                rich.progress.TextColumn("{task.fields[shown]}", markup=False),
                _Elapsed(),
                console=rich.console.Console(file=self._stream),
                # What a command prints into a file or a pipe must get there.
                redirect_stdout=sys.stdout.isatty(),
                # Only the line of a job stays when it is done.
                transient=not self._eager,
            )
            live.start()
            self._live = live
        if self._live is not None:
            self._task = self._live.add_task(
                self._stage if self._outer is None else f"  {self._stage}",
                total=self._total,
                completed=self._done,
                count=self._count(),
                shown="",
                inner=self._outer is not None,
            )
        elif self._cell is not None:
            self._draw()
        elif self._outer is None and self._interval > 0:
            threading.Thread(target=self._beat_until_end, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        with _LOCK:
            if self in _OPEN:
                _OPEN.remove(self)
        if self._live is not None:
            if self._outer is None:
                self._live.stop()
            elif self._task is not None:
                self._live.remove_task(self._task)
        elif self._cell is not None:
            self._draw(force=True, ended=self._outer is None)
        elif self._unprinted:
            self._print(self._unprinted)

    @property
    def _root(self) -> Progress:
        """The outermost of the lines that this one is within."""
        return self if self._outer is None else self._outer._root

    def update(self, done: int, **shown: Any) -> None:
        """Reports what is done; redraws the line, or prints it if it is due.

        Args:
            done: How much is done.
            shown: Numbers and texts to show on the line, by name; a text is shown after its name as
                it is.
        """
        now = self._clock()
        if self._first is None:
            self._first = (done, now)
        self._done, self._details_now = done, self._details(done, now, shown)
        if self._live is not None and self._task is not None:
            self._live.update(
                self._task, completed=done, count=self._count(), shown=self._details_now
            )
            return
        if self._cell is not None:
            self._draw()
            return
        with _LOCK:
            root = self._root
            due = now - root._silent_since() >= self._interval
            eager = self._eager and self._outer is None
            if eager:
                due = due or self._printed_at is None
                due = due or (self._total is not None and done >= self._total)
            if due:
                root._print(self._line())
            self._unprinted = self._line() if eager and not due else ""

    def beat(self) -> None:
        """Prints the innermost open line, with the time since it was opened, if nothing was printed
        for `interval` seconds.
        """
        with _LOCK:
            inner = _OPEN[-1] if _OPEN else self
            now = self._clock()
            if inner._root is self and now - self._silent_since() >= self._interval:
                self._print(f"{inner._line()} ({duration(now - inner._opened)})")

    def say(self, text: str) -> None:
        """Prints a text of one or more lines; on a terminal above the lines of progress."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            with _LOCK:
                print(text, file=self._stream, flush=True)

    def _draw(self, force: bool = False, ended: bool = False) -> None:
        """Draws all open lines in the notebook's output: the outermost one, and those within it.

        A part of a job that is done within two seconds, and that no job is around, draws nothing.

        Args:
            force: Whether to draw even if that was done just now.
            ended: Whether the outermost line is closed, which then shows how long it took.
        """
        root = self._root
        waited = root._clock() - root._opened
        if self._cell is None or not (root._eager or self._cell.drawn or waited >= 2):
            return
        inner = [line for line in _OPEN if line is not root and line._root is root]
        lines = [f"{notebook.bar(root._done, root._total)} {root._line()}".lstrip()]
        if ended:
            lines[0] += f"  ({duration(waited)})"
        lines += [f"  {line._stage} {line._count()}".rstrip() for line in inner]
        self._cell.draw("\n".join(lines), force=force)

    def _beat_until_end(self) -> None:
        """Calls `beat` again and again until the line is closed."""
        while not self._ended.wait(self._interval / 4):
            # A stream that was closed meanwhile ends the reports, not the work.
            with contextlib.suppress(ValueError, OSError):
                self.beat()

    def _silent_since(self) -> float:
        """Returns when the outermost line was printed last, or else opened."""
        return self._opened if self._printed_at is None else self._printed_at

    def _count(self) -> str:
        """Returns how much is done, `32/64 prompts`; "" if it is not known how much there is."""
        if self._total is None:
            return ""
        return f"{self._done}/{self._total}" + ("" if self._unit == "steps" else f" {self._unit}")

    def _line(self) -> str:
        """Returns the line as it is printed where it cannot be redrawn."""
        count, share = self._count(), f" ({self._done / self._total:.0%})" if self._total else ""
        if self._outer is not None:
            before = f"{self._root._stage} {self._root._count()}".rstrip()
            return f"{before}: {self._stage} {count}".rstrip()
        line = f"{self._stage} {count}{share}".rstrip()
        return line + (f"  {self._details_now}" if self._details_now else "")

    def _details(self, done: int, now: float, shown: Mapping[str, Any]) -> str:
        """Returns the part of the line after the count: rate, time left, numbers.

        Args:
            done: How much is done.
            now: The time in seconds.
            shown: Numbers and texts to show, by name.
        """
        parts = []
        first, first_time = self._first or (done, now)
        if self._total is not None and done > first and now > first_time:
            rate = (done - first) / (now - first_time)
            one = "step" if self._unit == "steps" else self._unit.removesuffix("s")
            parts.append(f"{rate:.3g} {self._unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{one}")
            if done < self._total:
                parts.append(f"{duration((self._total - done) / rate)} left")
        parts += [
            f"{name} {value}" if isinstance(value, str) else f"{name} {float(value):.4g}"
            for name, value in shown.items()
        ]
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        """Prints a line and remembers when."""
        self._printed_at = self._clock()
        print(line, file=self._stream, flush=True)


class _Elapsed(rich.progress.ProgressColumn):
    """Shows how long an inner line has been open, from the third second on."""

    def render(self, task: rich.progress.Task) -> str:
        """Returns `12 s` for an inner line, "" for the outermost one."""
        seconds = task.elapsed or 0.0
        return duration(seconds) if task.fields["inner"] and seconds >= 2 else ""


class Silent:
    """Replaces a line of progress on processes that show none."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, done: int, **shown: Any) -> None:
        """Does nothing."""


# The open lines, the outermost first. A thread of `Progress` reads them too.
_OPEN: list[Progress] = []
_LOCK = threading.RLock()


def activity(stage: str, total: int | None = None, unit: str = "prompts") -> Progress | Silent:
    """Returns a line of progress for a part of a job, to be opened by `with`.

    Only the first process of a run shows it.

    Args:
        stage: What is done, such as `validating`.
        total: How much there is to do; None: not known.
        unit: What is counted, in the plural.
    """
    return Progress(stage, total, unit=unit, eager=False) if hosts.is_writer() else Silent()


def reported(stage: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Returns a decorator: while the function runs, a line shows its stage (`activity`).

    Args:
        stage: What the function does.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @functools.wraps(function)
        def call(*args: Given.args, **keywords: Given.kwargs) -> Result:
            with activity(stage):
                return function(*args, **keywords)

        return call

    return decorate


def say(text: str) -> None:
    """Prints a text to standard error, on a terminal above the open lines of progress.

    Only the first process of a run prints.
    """
    if not hosts.is_writer():
        return
    if _OPEN:
        _OPEN[-1].say(text)
    else:
        print(text, file=sys.stderr, flush=True)
