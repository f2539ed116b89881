"""Lines of progress in the output of a notebook's cell, redrawn in place."""

from __future__ import annotations

import sys
from typing import Any

# Seconds between two drawings: a browser shows no more.
INTERVAL = 0.2
# Characters of a bar.
WIDTH = 24


def display() -> Any:
    """Returns IPython's function `display` if the process is the kernel of a notebook, else None.

    Jupyter, Colab and Kaggle have such kernels; IPython on a terminal has none.
    """
    ipython = sys.modules.get("IPython")
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return None
    return ipython.display.display


def bar(done: int, total: int | None) -> str:
    """Returns a bar of `WIDTH` characters, filled by the share that is done; "" without a total."""
    if not total:
        return ""
    filled = min(WIDTH, WIDTH * done // total)
    return "\u2588" * filled + "\u2591" * (WIDTH - filled)


class Cell:
    """One output of a cell, which is created when it is drawn first.

    Args:
        display: IPython's function (`display`).
        clock: Returns the time in seconds.
    """

    def __init__(self, display: Any, clock: Any):
        self._display, self._clock = display, clock
        self._handle: Any = None
        self._drawn: float | None = None

    @property
    def drawn(self) -> bool:
        """Returns whether the output exists."""
        return self._handle is not None

    def draw(self, text: str, force: bool = False) -> None:
        """Shows a text instead of the last one, unless that was drawn just now.

        Args:
            text: The text, of one or more lines.
            force: Whether it is shown in any case.
        """
        now = self._clock()
        if not force and self._drawn is not None and now - self._drawn < INTERVAL:
            return
        self._drawn = now
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
