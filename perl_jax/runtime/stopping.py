"""Whether this process was told to stop: for code that waits for other programs within a step.

`hosts.Termination` records SIGTERM here. A reward that waits for a server or for another process
calls `check` again and again while it waits, so that the run need not wait for the reply. This
module does not import JAX.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

LOOK_SECONDS = 0.1  # how often a waiting function looks whether to stop

_told = threading.Event()


class Abandoned(Exception):
    """Raised by a function that was told to stop while it waited; the step is not made."""


def tell() -> None:
    """Records that this process was told to stop."""
    _told.set()


def forget() -> None:
    """Deletes the record of `tell`."""
    _told.clear()


def told() -> bool:
    """Returns whether `tell` was called since the last `forget`."""
    return _told.is_set()


def check() -> None:
    """Raises Abandoned if this process was told to stop."""
    if told():
        raise Abandoned("told to stop")


def get(items: queue.SimpleQueue) -> Any:
    """Returns the next item of a queue; waits for it.

    Raises Abandoned if this process is told to stop before there is an item.
    """
    while True:
        try:
            return items.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            check()
