"""Temporary files and folders beside a path: their names, and what killed processes left."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import socket

_NUMBERS = itertools.count()


def make_parents(target: pathlib.Path) -> list[pathlib.Path]:
    """Makes the missing folders above a path; returns those it made, the highest first."""
    made: list[pathlib.Path] = []
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    try:
        for folder in reversed(missing):
            os.makedirs(folder, exist_ok=True)
            made.append(folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[pathlib.Path]) -> None:
    """Deletes folders that are empty, the last one first; others stay."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def scratch_name(name: str) -> str:
    """Returns a new name for a temporary file or folder beside a path: `.NAME.HOST.PROCESS.N.tmp`.

    N counts this process's temporary files, for its threads.

    Args:
        name: The name of the file or folder that it will become.
    """
    return f".{_shortened(name)}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}.tmp"


def _shortened(name: str) -> str:
    """Returns a name that leaves room for more characters in a file system's longest name."""
    return (
        name
        if len(os.fsencode(name)) <= 150
        else hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    )


def remove_dead(target: pathlib.Path) -> None:
    """Deletes the temporary files and folders for a path that killed processes of this host left.

    Args:
        target: The path that they would have become.
    """
    ours = re.compile(
        rf"\.{re.escape(_shortened(target.name))}\.{re.escape(socket.gethostname())}\.(\d+)\.\d+\.tmp"
    )
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            found = ours.fullmatch(name)
            if found and not _is_running(int(found[1])):
                left = target.parent / name
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_running(process: int) -> bool:
    """Returns whether this host has a process of a number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
