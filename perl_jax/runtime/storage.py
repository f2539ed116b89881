"""What Orbax's storage needs: paths without special characters, short messages, and a comparison of
restored leaves with saved digests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perl_jax.errors import require
from perl_jax.runtime import files, trees
from perl_jax.types import Tree

# Orbax looks for files by a pattern that has the folder's own path in it, and tensorstore reads
# paths as UTF-8 parts of an address. The second range is of bytes that are not UTF-8.
_SPECIAL = re.compile(r"[*?\[\]\\:\udc80-\udcff]")
# In a bucket, where no other path leads to the same folder; `#` begins an object's generation.
_NOT_IN_BUCKETS = re.compile(r"[*?\[\]\\#\r\n\udc80-\udcff]")
# A longer path leaves too little room for the names in a checkpoint: a system's longest path has
# 4,096 bytes, and that of macOS 1,024.
_LONGEST = 600

# The longest time to wait for the threads of a save that failed.
_WAIT_SECONDS = 10.0
# Largest number of characters of a storage error in a message (`short_message`).
_SAID = 300


@contextlib.contextmanager
def plain_path(folder: files.Path) -> Iterator[files.Path]:
    """Context manager that yields a path to the same folder that Orbax can use.

    It is the path itself, unless the path is very long or has one of the characters `*?[]:` or a
    backslash, or bytes that are not UTF-8. Then it is that of a symbolic link, which is deleted at
    the end.

    Args:
        folder: An absolute path. The folder need not exist.

    Raises:
        UserError: The path is an address in a bucket with such a character, or the folder for
            temporary files has one.
    """
    text = os.fspath(folder)
    if files.is_remote(folder):
        check_address(folder)
        yield folder
        return
    if not _SPECIAL.search(text) and len(os.fsencode(text)) <= _LONGEST:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="perl_jax_") as above:
        require(
            not _SPECIAL.search(above),
            f"The folder for temporary files, {os.path.dirname(above)}, has a special character in "
            "its path; set TMPDIR to another one.",
        )
        os.symlink(folder, os.path.join(above, "folder"))
        yield files.path_of(os.path.join(above, "folder"))


def check_address(folder: files.Path) -> None:
    """Raises UserError for a folder in a bucket whose address has a character that Orbax cannot
    use: `*?[]#`, a backslash or a line's end. A path on a disk passes.
    """
    if files.is_remote(folder):
        found = _NOT_IN_BUCKETS.search(os.fspath(folder))
        require(
            found is None,
            f"{folder} has the character {found and found[0]!r}, which a folder of checkpoints in "
            "a bucket may not have; choose another address.",
        )


def short_message(error: BaseException) -> str:
    """Returns the first line of a storage error, cut to 300 characters, without its settings.

    An error without text gives the name of its class.
    """
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    return (line if len(line) <= _SAID else f"{line[:_SAID]} ...") or type(error).__name__


def hide_unretrieved_errors() -> None:
    """Stops what is printed about a checkpoint's other reads and writes after one failed: by
    asyncio, and by tensorstore when its answers come after Orbax's event loop has been closed.
    """
    logging.getLogger("asyncio").addFilter(_retrieved)
    if sys.unraisablehook is not _unraisable:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


# The hook that was set before `_unraisable`.
_hooks: list[Callable[[Any], Any]] = []


def _unraisable(found: Any) -> None:
    """Passes an error that no caller can get to the hook that was set before, unless it is a late
    answer of tensorstore.
    """
    if str(found.exc_value) != "Event loop is closed":
        _hooks[-1](found)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Context manager around a save by Orbax, after whose failure nothing but its error is seen.

    The save's other threads go on. They are waited for, because those that are left when the
    interpreter ends print what they were doing.
    """
    try:
        yield
    except Exception:
        hide_unretrieved_errors()
        _wait_for_writers(_WAIT_SECONDS)
        raise


def _wait_for_writers(seconds: float) -> None:
    """Waits until Orbax's threads have ended, but not longer than some seconds."""
    end = time.monotonic() + seconds
    for thread in threading.enumerate():
        if (
            type(thread).__module__.startswith("orbax.")
            and thread is not threading.current_thread()
        ):
            # Not its own `join`, which raises what the thread has raised.
            threading.Thread.join(thread, max(0.0, end - time.monotonic()))


def _retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def changed_leaves(tree: Tree, saved: Mapping[str, str]) -> list[str]:
    """Returns the names of leaves whose content differs from saved digests, sorted.

    Args:
        tree: The tree of arrays.
        saved: The digests, keyed by path (`trees.digests`). A leaf without a digest counts as
            changed.
    """
    return sorted(name for name, text in trees.digests(tree).items() if saved.get(name) != text)
