"""Copies of folders in buckets, kept on this host's disk for what reads files of a disk only."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import os
import pathlib
from collections.abc import Sequence

from perl_jax.errors import UserError, require
from perl_jax.runtime import buckets, files, json_values
from perl_jax.runtime.faults import FileError, explained
from perl_jax.runtime.outputs import scratch_folder

# The environment variable that names the folder of copies and of prepared rows (`data.store`).
CACHE_VARIABLE = "PERL_JAX_CACHE"
# Files that are copied at the same time.
_AT_ONCE = 8


def cache_folder() -> pathlib.Path:
    """Returns the folder of copies: `copies` in $PERL_JAX_CACHE, or ~/.cache/perl_jax/copies."""
    given = os.environ.get(CACHE_VARIABLE)
    return files.local(given or "~/.cache/perl_jax", CACHE_VARIABLE) / "copies"


def local_copy(folder: files.PathLike, patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """Returns a folder on this host's disk: a local folder itself, or a copy of one in a bucket.

    The copy is made once. Its name is a digest of the address and of each object's name, size and
    generation, so a folder whose objects have changed is copied anew. It is written under a
    temporary name and renamed when it is complete. If several processes of a host copy the same
    folder, all use the one that is renamed first.

    Args:
        folder: The folder.
        patterns: The names of the files to copy, relative to the folder.

    Raises:
        UserError: There is no such folder in the bucket, or no file with such a name in it.
        FileError: A file cannot be read, or the copy cannot be written.
    """
    source = files.path_of(folder)
    if not files.is_remote(source):
        return pathlib.Path(source)
    with explained(source, "read"):
        facts = {
            name: about
            for name, about in sorted(buckets.tree(source).items())
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    require(bool(facts), f"There is no folder {source} with files {', '.join(patterns)}.")
    content = [[name, about["size"], about.get("generation")] for name, about in facts.items()]
    copy = cache_folder() / json_values.digest([str(source), content])
    if files.is_folder(copy):
        return copy
    try:
        files.make_folder(cache_folder())
        with scratch_folder(copy) as made:
            _copy_all(source, {name: int(about["size"]) for name, about in facts.items()}, made)
            try:
                files.move(made, copy)
            except FileError:
                if not files.is_folder(copy):
                    raise
    except FileError as error:
        raise UserError(
            f"{source} cannot be copied to this host's disk: {error} {CACHE_VARIABLE} names "
            "another folder for copies."
        ) from error
    return copy


def _copy_all(source: files.Path, sizes: dict[str, int], to: pathlib.Path) -> None:
    """Copies files of a bucket into a folder on this host's disk.

    Args:
        source: The folder in the bucket.
        sizes: The files' sizes in bytes by their names, which may have folders.
        to: The folder.

    Raises:
        FileError: A file cannot be read or written, or has another size than its object.
    """
    for name in sizes:
        files.make_folder((to / name).parent)

    def copy(name: str) -> None:
        """Copies one file."""
        files.copy(source / name, to / name)
        if files.size(to / name) != sizes[name]:
            raise FileError(f"{source / name} changed while it was copied; try again.")

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, sizes))
