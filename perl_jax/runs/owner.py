"""One owner a run: the process that writes into a run's folder holds it, and others are refused.

On a disk the owner holds a lock of the operating system on a small file in the folder. The lock
ends with its process, however that ends, and works on network file systems. In a bucket the file is
an object on which the owner has a lease (`runs.lease`). The file says who holds the folder, and is
deleted when the owner lets go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from typing import Any

from perl_jax.errors import TrainingError, UserError
from perl_jax.runs.lease import Held, Lease
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts
from perl_jax.runtime.faults import reason
from perl_jax.runtime.storage import check_address

# The file in a run's folder that says who holds it; there is none while nobody does.
FILE_NAME = "owner.json"
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Where nothing can be written, there is nothing to guard.
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# Largest number of bytes of a refusal that process 0 tells the others.
_SAID = 2000
# The owners of this process by the folder's device and inode. A lock of POSIX is one of its
# process: the process itself would get it twice, and would lose it by closing the file once.
_held: dict[tuple[int, int], Owner] = {}
_guard = threading.Lock()
# The leases of this process by the folder's address.
_leases: dict[str, Lease] = {}


class InUse(UserError):
    """Another command holds the run's folder."""


class Lost(TrainingError):
    """Another command has taken over the run's folder in a bucket."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a run's folder.

    Attributes:
        host: The host's name.
        pid: The number of the process on that host.
        command: The program and its command, such as `perl-jax rl`.
        since: When the process took the folder, in UTC.
    """

    host: str
    pid: int
    command: str
    since: str

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host}, since {self.since} UTC)"


def this_process() -> Holder:
    """Returns the holder that describes this process, now."""
    # Without the options: they may hold what no file should.
    program, *words = sys.argv[:2] or ["python"]
    name = pathlib.PurePath(program).name or "python"
    if name == "__main__.py":
        name = "perl-jax"
    command = " ".join([name, *(word for word in words if word[:1].isalpha())])
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return Holder(socket.gethostname(), os.getpid(), command, now)


def holder_of(text: bytes | str | dict[str, Any]) -> Holder | None:
    """Returns the holder that an owner's file describes; None if it does not describe one.

    Args:
        text: The content of the file, or the JSON object in it.
    """
    try:
        values = text if isinstance(text, dict) else json.loads(text)
        return Holder(**{field.name: values[field.name] for field in dataclasses.fields(Holder)})
    # An owner may be writing it, and a user may have.
    except (ValueError, TypeError, KeyError):
        return None


def refusal(folder: object, holder: Holder | None) -> str:
    """Returns the sentence that says who holds a folder.

    Args:
        folder: The run's folder.
        holder: Who holds it; None: not known.
    """
    return (
        f"{folder} is in use by {holder or 'another process'}; wait until that ends, or use "
        "another folder."
    )


class Owner:
    """Holds a run's folder on a disk from its making until `release`.

    The folder is made if it does not exist.

    Args:
        folder: The run's folder.

    Raises:
        InUse: Another process, or this one, holds the folder.
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._pid = os.getpid()
        self._made: list[pathlib.Path] = []
        self._descriptor: int | None = None
        self._key: tuple[int, int] | None = None
        with _guard:
            try:
                self._make_folder()
                found = os.stat(folder)
                key = (found.st_dev, found.st_ino)
                if key in _held:
                    raise InUse(refusal(folder, this_process()))
                self._descriptor = self._lock()
                self._key = key
                _held[key] = self
            except OSError as error:
                self._remove_made()
                said = None if error.errno == errno.EEXIST else reason(error)
                raise UserError(
                    f"{folder} cannot be used as a run's folder: {said or error.strerror or error}."
                ) from error
            except BaseException:
                self._remove_made()
                raise

    def _make_folder(self) -> None:
        """Makes the folder and those above it that do not exist, and remembers which."""
        missing = [self.folder, *self.folder.parents]
        missing = [path for path in missing if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _lock(self) -> int | None:
        """Locks the file and writes the holder into it; returns its descriptor.

        Returns None where nothing can be written, and where the file system has no locks.

        Raises InUse if another process has locked it.
        """
        path = self.folder / FILE_NAME
        while True:
            try:
                # Not blocked by a pipe of that name. Children do not inherit the descriptor.
                descriptor = os.open(
                    path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
                )
            except OSError as error:
                if error.errno in _READ_ONLY and self.folder.is_dir():
                    return None
                raise
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EEXIST, f"its {FILE_NAME} is not a file")
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The owner before may have deleted the file since it was opened here.
                if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(vars(this_process())).encode(), 0)
                    return descriptor
                os.close(descriptor)
            except OSError as error:
                said = os.pread(descriptor, _SAID, 0) if error.errno not in _NO_LOCKS else b""
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise InUse(refusal(self.folder, holder_of(said))) from error
                if error.errno not in _NO_LOCKS:
                    raise
                print(
                    f"The file system of {self.folder} has no locks: nothing keeps a second "
                    "command from writing there.",
                    flush=True,
                )
                return None

    def _remove_made(self) -> None:
        """Removes the folders that were made here and are empty."""
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()
        self._made = []

    def release(self) -> None:
        """Lets go of the folder; removes it if it was made here and is empty. Does nothing if the
        folder is no longer held, and in a child of the process that holds it.
        """
        with _guard:
            if self._key is None or os.getpid() != self._pid:
                return
            del _held[self._key]
            self._key = None
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    path = self.folder / FILE_NAME
                    # While it is still locked, so that nobody else's is deleted.
                    if os.path.samestat(os.fstat(self._descriptor), os.stat(path)):
                        path.unlink()
                os.close(self._descriptor)
                self._descriptor = None
            self._remove_made()


class Leaseholder:
    """Holds a run's folder in a bucket from its making until `release`.

    Args:
        folder: The run's folder.

    Raises:
        InUse: Another process, or this one, holds the folder. Waits for a lease time (a minute)
            if the other one may have ended without letting go.
        FileError: The bucket cannot be used.
    """

    def __init__(self, folder: files.Path) -> None:
        self._key = os.fspath(folder)
        if self._key in _leases:
            raise InUse(refusal(folder, this_process()))
        try:
            _leases[self._key] = Lease(folder / FILE_NAME, vars(this_process()))
        except Held as error:
            raise InUse(refusal(folder, holder_of(dict(error.said)))) from error

    def release(self) -> None:
        """Lets go of the folder."""
        _leases.pop(self._key).release()


@contextlib.contextmanager
def owned(folder: files.PathLike | Run | None) -> Iterator[None]:
    """Context manager that holds a run's folder for this command.

    With several processes process 0 holds it, and all of them must call this function; all hear a
    refusal. Take the folder before anything is read or written there.

    Args:
        folder: The run's folder. For None (a run without a folder) nothing is held, nor for an
            opened run, which the caller holds.

    Raises:
        InUse: Another command holds the folder; the sentence says which.
        UserError: The folder cannot be made, or its address has a character that a run's may not
            have.
    """
    if folder is None or isinstance(folder, Run):
        yield
        return
    path = files.path_of(folder)
    check_address(path)
    holds: list[Owner | Leaseholder] = []

    def take() -> None:
        """Takes the folder; called by process 0."""
        holds.append(Leaseholder(path) if files.is_remote(path) else Owner(pathlib.Path(path)))

    try:
        hosts.by_writer(take)
        yield
    finally:
        for held in holds:
            held.release()


def check_held(folder: files.Path) -> None:
    """Checks that this command still holds a run's folder in a bucket; call it before writing.

    A folder on a disk is held as long as the process lives. All processes must call this function.

    Raises:
        Lost: Another command has taken the folder over.
    """
    if files.is_remote(folder):
        lease = _leases.get(os.fspath(folder))
        if hosts.any_process(lease is not None and lease.is_lost()):
            raise Lost(
                f"{folder} was taken over by another command, because this one did not renew its "
                "lease in time: it stops without writing anything more."
            )
