"""Targets of what is written: checked before long work, and complete or absent after it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from perl_jax.errors import require
from perl_jax.runtime import buckets, files
from perl_jax.runtime.buckets import is_remote
from perl_jax.runtime.faults import explained
from perl_jax.runtime.files import PathLike
from perl_jax.runtime.replacing import require_consent
from perl_jax.runtime.scratch import make_parents, remove_dead, remove_empty, scratch_name

# Bytes that a check of a target writes: a block, which a full disk has no room for.
_BLOCK = 4096
# The object that marks a new folder in a bucket as incomplete.
_INCOMPLETE = ".incomplete"


def check_writable(path: PathLike) -> files.Path:
    """Checks that a file can be written, before long work whose result it takes; returns its path.

    Writes and deletes a block beside it. Nothing is left: missing folders are made for the check
    and deleted again.

    Raises FileError if the file cannot be written, and UserError if it is a folder.
    """
    found = files.path_of(path)
    kind = files.kind_of(found)
    require(kind != "folder", f"{found} is a folder; give the path of a file.")
    if kind == "other":
        return found
    if is_remote(found):
        probe = found.with_name(scratch_name(found.name))
        with explained(found, "written"):
            buckets.client().pipe_file(os.fspath(probe), b"")
            buckets.client().rm_file(os.fspath(probe))
        return found
    target = pathlib.Path(os.path.realpath(found))
    made: list[pathlib.Path] = []
    probe = target.with_name(scratch_name(target.name))
    try:
        with explained(found, "written"):
            made += make_parents(target)
            with open(probe, "wb") as file:
                file.write(bytes(_BLOCK))
                file.flush()
                os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        remove_empty(made)
    return found


@contextlib.contextmanager
def scratch_folder(target: PathLike) -> Iterator[pathlib.Path]:
    """Context manager that makes an empty folder beside a path on this host's disk; deletes it at
    the end, if it is still there.

    Its rights are those of any new folder, so it may be renamed to the path. What killed processes
    left of such folders is deleted first. Missing folders above it are made, and deleted again
    after an error.

    Args:
        target: The path beside which the folder is made.

    Raises:
        FileError: The folder cannot be made.
    """
    path = pathlib.Path(files.absolute(target))
    folder = path.with_name(scratch_name(path.name))
    with explained(target, "made"):
        made = make_parents(path)
        remove_dead(path)
        try:
            os.makedirs(folder)
        except OSError:
            remove_empty(made)
            raise
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(made)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(to: PathLike, marker: str) -> Iterator[pathlib.Path]:
    """Context manager that yields an empty folder on this host's disk; its content becomes the
    folder `to` when the block ends.

    On a disk the folder is renamed, and appears complete or not at all. In a bucket its files are
    uploaded, the marker last; what a stopped upload left is replaced. After an error in the block
    nothing is left. Missing parents of `to` are made. Before the block it is checked that `to` can
    be written, so long work belongs into the block.

    Args:
        to: The folder to make.
        marker: The file whose presence shows that the folder is complete.

    Raises:
        Occupied: `to` exists, and may not be replaced (`replacing`).
        FileError: `to` cannot be written.
    """
    folder = files.path_of(to)
    if is_remote(folder):
        there = files.exists(folder) and not files.exists(folder / _INCOMPLETE)
    else:
        there = os.path.lexists(folder)
    if there:
        require_consent(f"{folder} exists already; give --to a folder that does not.", folder)
    check_writable(folder / marker)
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="perl_jax_") as built:
            yield pathlib.Path(built)
            files.remove(folder)
            files.write_bytes(folder / _INCOMPLETE, b"")
            upload(pathlib.Path(built), folder, marker)
            files.remove(folder / _INCOMPLETE)
        return
    with scratch_folder(folder) as built:
        yield built
        if there:
            files.remove(folder)
        with explained(folder, "written"):
            os.rename(built, files.absolute(folder))


@contextlib.contextmanager
def filled_folder(to: PathLike, marker: str) -> Iterator[pathlib.Path]:
    """Context manager that yields a folder on this host's disk for files of the folder `to`; write
    the marker last.

    On a disk it is `to` itself, which is made if it does not exist. In a bucket the files are
    uploaded when the block ends, the marker last. Other files in `to` stay; its marker is deleted
    first.

    Args:
        to: The folder.
        marker: The file whose presence shows that the folder is complete.

    Raises:
        FileError: `to` cannot be written.
    """
    folder = files.path_of(to)
    files.remove(folder / marker)
    if not is_remote(folder):
        yield pathlib.Path(files.make_folder(folder))
        return
    with tempfile.TemporaryDirectory(prefix="perl_jax_") as built:
        yield pathlib.Path(built)
        upload(pathlib.Path(built), folder, marker)


def upload(folder: pathlib.Path, to: PathLike, marker: str) -> None:
    """Copies the files of a folder on this host's disk into a bucket, the marker last.

    Args:
        folder: The folder.
        to: Its address in the bucket.
        marker: The file whose presence shows that the folder is complete.

    Raises:
        FileError: A file cannot be read or uploaded.
    """
    target = files.path_of(to)
    for name in sorted(files.tree(folder), key=lambda name: (name == marker, name)):
        with explained(target / name, "written"):
            buckets.client().put_file(os.fspath(folder / name), os.fspath(target / name))


class LocalCopy:
    """A folder on this host's disk for what can be written to disks only; in a run's folder on a
    disk that is the folder itself, in a bucket its files are copied there at the end.

    Args:
        folder: The folder that the files are for.
    """

    def __init__(self, folder: files.Path) -> None:
        self._folder = folder
        self._made = tempfile.TemporaryDirectory(prefix="perl_jax_") if is_remote(folder) else None
        self.path = pathlib.Path(folder if self._made is None else self._made.name)

    def close(self, keep: bool = True) -> None:
        """Copies the files into the bucket and deletes them here; a second call does nothing.

        Args:
            keep: Whether the files are copied.

        Raises:
            FileError: A file cannot be copied.
        """
        if self._made is None:
            return
        try:
            for name in files.tree(self.path) if keep else ():
                with explained(self._folder / name, "written"):
                    buckets.client().put_file(
                        os.fspath(self.path / name), os.fspath(self._folder / name)
                    )
        finally:
            self._made.cleanup()
            self._made = None
