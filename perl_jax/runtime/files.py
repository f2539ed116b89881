"""The one door to files: reads, writes, lists and deletes on this host's disk and in buckets.

No other module opens, renames, lists or deletes a path. Paths are `etils.epath` paths: folders on a
disk, or addresses `gs://BUCKET/PATH`. Every fault of a disk or a bucket is a FileError of one
sentence.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import pathlib
import posixpath
import re
import shutil
import stat
import typing
from typing import Any

from etils.epath import Path as Path

from perl_jax.errors import UserError, require
from perl_jax.runtime import buckets
from perl_jax.runtime.buckets import is_remote
from perl_jax.runtime.faults import FileError, explained
from perl_jax.runtime.scratch import remove_dead, scratch_name

PathLike = str | os.PathLike[str]
# The most bytes of a JSON file that is read.
_LARGEST_JSON = 2**27


def path_of(path: PathLike) -> Path:
    """Returns a path that the user gave, as an `epath` path; `~` in a text is expanded.

    Args:
        path: A path on this host's disk or an address `gs://BUCKET/PATH`, as text; or a path
            object.

    Raises:
        UserError: The address has another scheme, names no folder or file in the bucket, or needs a
            package that is not installed.
    """
    text = os.fspath(path)
    require(bool(text), "The path is empty; give a folder or a file.")
    require("\0" not in text, f"{text!r} is no path: it has a null character.")
    if is_remote(text):
        return path if isinstance(path, Path) else buckets.address(text)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", text)
    if scheme and scheme[1] == "gs":
        raise UserError(
            f"{text} is no address: give it as text with two slashes, gs://BUCKET/PATH."
        )
    if scheme and text.startswith(f"{scheme[1]}://"):
        raise UserError(
            f"{text} has the scheme {scheme[1]}://, which is not supported; give a folder or file "
            "on a disk, or gs://BUCKET/PATH."
        )
    return Path(os.path.expanduser(text) if isinstance(path, str) else text)


def absolute(path: PathLike) -> Path:
    """Returns the absolute path; an address in a bucket is returned as it is.

    Symbolic links are kept. (`absolute` of an epath path would put an address below the working
    directory.)
    """
    path = path_of(path)
    return path if is_remote(path) else Path(os.path.abspath(path))


def resolved(path: PathLike) -> Path:
    """Returns the absolute path without symbolic links and without `..`."""
    path = path_of(path)
    if is_remote(path):
        inside = os.fspath(path).removeprefix(buckets.SCHEME)
        return Path(buckets.SCHEME + posixpath.normpath(inside))
    return Path(os.path.realpath(path))


def local(path: PathLike, what: str) -> pathlib.Path:
    """Returns a path on this host's disk; `~` in a text is expanded.

    Args:
        path: The path.
        what: The path's name in the message, such as a flag.

    Raises:
        UserError: The path is an address in a bucket.
    """
    found = path_of(path)
    require(
        not is_remote(found),
        f"{what} is {found}; it must be a path on this host's disk, not in a bucket.",
    )
    return pathlib.Path(found)


def kind_of(path: PathLike) -> str | None:
    """Returns what is at a path: file, folder, or other (a device or a pipe); None if nothing is.

    Raises FileError if that cannot be known, such as in a folder without permission.
    """
    path = path_of(path)
    with explained(path, "read"):
        if is_remote(path):
            found = buckets.facts(path)
            return None if found is None else "folder" if found["type"] == "directory" else "file"
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def exists(path: PathLike) -> bool:
    """Returns whether there is a file, a folder or anything else at a path (`kind_of`)."""
    return kind_of(path) is not None


def is_folder(path: PathLike) -> bool:
    """Returns whether there is a folder at a path (`kind_of`)."""
    return kind_of(path) == "folder"


def is_file(path: PathLike) -> bool:
    """Returns whether there is a file at a path (`kind_of`); a device or a pipe is none."""
    return kind_of(path) == "file"


def size(path: PathLike) -> int:
    """Returns the size of a file in bytes."""
    path = path_of(path)
    with explained(path, "read"):
        if is_remote(path):
            return int((buckets.facts(path) or {}).get("size") or 0)
        return os.stat(path).st_size


def listing(folder: PathLike, pattern: str = "*") -> list[Path]:
    """Returns the files and folders in a folder whose names fit a pattern, sorted by name.

    Special characters in the folder's own path have no meaning. A missing folder gives [].

    Args:
        folder: The folder.
        pattern: The pattern of names, with `*`, `?` and `[...]`.
    """
    where = path_of(folder)
    with explained(where, "read"):
        try:
            if is_remote(where):
                found = buckets.client().ls(os.fspath(where), detail=False, refresh=True)
                names = {name.rstrip("/").rpartition("/")[2] for name in found} - {where.name}
            else:
                names = set(os.listdir(where))
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [where / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def tree(folder: PathLike) -> dict[str, int]:
    """Returns the sizes in bytes of all files below a folder, by their path relative to it, sorted.

    A missing folder gives {}.
    """
    where = path_of(folder)
    with explained(where, "read"):
        if is_remote(where):
            found = {name: int(about["size"]) for name, about in buckets.tree(where).items()}
        else:
            found = {
                os.path.relpath(os.path.join(root, name), where): os.path.getsize(
                    os.path.join(root, name)
                )
                for root, _, names in os.walk(where)
                for name in names
                if os.path.isfile(os.path.join(root, name))
            }
    return dict(sorted(found.items()))


def folder_bytes(folder: PathLike) -> int:
    """Returns the total size of all files below a folder, in bytes."""
    return sum(tree(folder).values())


def make_folder(folder: PathLike) -> Path:
    """Makes a folder with its parents if it does not exist; returns its path.

    A bucket needs no folders, so nothing is made in it.

    Raises FileError if the folder cannot be made.
    """
    made = path_of(folder)
    if not is_remote(made):
        with explained(made, "made"):
            os.makedirs(made, exist_ok=True)
    return made


def remove(path: PathLike) -> None:
    """Deletes a file, or a folder with all that is in it; does nothing if there is neither.

    Raises FileError if it cannot be deleted.
    """
    path = path_of(path)
    with explained(path, "deleted"):
        try:
            if is_remote(path):
                buckets.remove(path)
            elif os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass


def move(path: PathLike, to: PathLike) -> None:
    """Renames a file or folder on this host's disk; a file replaces an existing one.

    Raises FileError if that is not possible, and ValueError for paths in buckets, where renaming is
    a copy that can stop half-way.
    """
    path, to = path_of(path), path_of(to)
    if is_remote(path) or is_remote(to):
        raise ValueError("a path in a bucket cannot be renamed")
    with explained(to, "written"):
        os.replace(path, to)


def read_bytes(path: PathLike) -> bytes:
    """Returns the content of a file; raises FileError if it cannot be read."""
    path = path_of(path)
    with explained(path, "read"):
        if is_remote(path):
            return buckets.client().cat_file(os.fspath(path))
        with open(path, "rb") as file:
            return file.read()


def read_text(path: PathLike) -> str:
    """Returns the content of a UTF-8 text file; raises FileError if it cannot be read, and
    UserError if it is not UTF-8.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file so that a reader or a crash sees either the old content or the new.

    Missing folders are made. On a disk the content goes to a temporary file in the same folder,
    which is then renamed; what a killed process left of such a file is deleted. An object in a
    bucket appears when its upload is complete.

    Raises FileError if the file cannot be written; the old content stays.
    """
    path = path_of(path)
    with explained(path, "written"):
        if is_remote(path):
            buckets.client().pipe_file(os.fspath(path), content)
            return
        # A link stays a link, and a device or a pipe is written to.
        target = pathlib.Path(os.path.realpath(path))
        if kind_of(target) == "other":
            with open(target, "wb") as file:
                file.write(content)
            return
        os.makedirs(target.parent, exist_ok=True)
        remove_dead(target)
        temporary = target.with_name(scratch_name(target.name))
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: PathLike, text: str) -> None:
    """Writes a UTF-8 text file so that a reader or a crash sees either the old content or the new
    (`write_bytes`).
    """
    write_bytes(path, text.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Writes a value as JSON with sorted keys to a file, atomically (`write_bytes`)."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: PathLike) -> Any:
    """Returns the content of a JSON file.

    Raises UserError that names the file if it is missing, is no regular file or a very large one,
    cannot be read, or is not valid JSON.
    """
    require_regular(path, largest=_LARGEST_JSON)
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except FileError as error:
        raise UserError(f"There is no file {path}.") if error.missing else error from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits, brackets without end
        raise UserError(f"{path} is not valid JSON ({error}).") from error


def read_object(path: PathLike) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises UserError as `read_json` does, and if the file holds another value.
    """
    value = read_json(path)
    require(isinstance(value, dict), f"{path} does not hold a JSON object.")
    return value


def require_regular(path: PathLike, *, largest: int | None = None) -> None:
    """Raises UserError unless a path is that of a regular file; call it before opening the file.

    Opening a named pipe or a device could wait for ever or never end.

    Args:
        path: The path, whose links are followed. An object in a bucket passes.
        largest: The largest size in bytes; None allows any.
    """
    where = path_of(path)
    if is_remote(where):
        return
    try:
        with explained(where, "read"):
            found = os.stat(where)
    except FileError as error:
        raise UserError(f"There is no file {path}.") if error.missing else error from error
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(found.st_mode))
    require(kind is None, f"{path} is {kind}; it must be a file.")
    require(
        largest is None or found.st_size <= largest,
        f"{path} has {found.st_size} bytes; a file of this kind has at most {largest}.",
    )


def file_hash(path: PathLike) -> str:
    """Returns the blake2b hash of a file's bytes, as hex digits."""
    found = path_of(path)
    with explained(found, "read"), found.open("rb") as file:
        return hashlib.file_digest(typing.cast(Any, file), "blake2b").hexdigest()


def copy(path: PathLike, to: PathLike) -> None:
    """Copies a file's content to a file on this host's disk, which is replaced."""
    path, to = path_of(path), local(to, "the copy")
    with explained(to, "written"):
        if is_remote(path):
            buckets.client().get_file(os.fspath(path), os.fspath(to))
        else:
            shutil.copyfile(path, to)
