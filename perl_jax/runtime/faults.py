"""Sentences for what goes wrong with disks and buckets.

An operating system, a bucket's client, Orbax and array_record each report a full disk, a missing
right or a bucket that is not there in another form. This module recognises these forms and says
what failed and what would be right.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import re
from collections.abc import Iterator

from perl_jax.errors import UserError

# What is wrong and what would be right, by the operating system's code.
_REASONS: dict[int, str] = {
    errno.ENOSPC: "the disk is full; free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up; delete files, or choose a folder on another disk",
    errno.EFBIG: "the file would be larger than the system allows; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "the user {user} has no permission; change the permissions, or choose another "
    "path",
    errno.EPERM: "the user {user} has no permission; change the permissions, or choose another "
    "path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "something of that name is there already; choose another path",
    errno.ENOTEMPTY: "a folder with files is there already; choose another path",
    errno.EISDIR: "it is a folder, not a file; give the path of a file",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENAMETOOLONG: "a name in the path is longer than the file system allows; choose a "
    "shorter one",
    errno.ELOOP: "its symbolic links form a circle; choose another path",
    errno.EIO: "the disk reports an input/output error; choose another disk",
    errno.ESTALE: "the network file system has lost the file; mount the file system anew",
    errno.EMFILE: "this process has too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files; close other programs",
    errno.ENODEV: "there is no such device; choose another path",
    errno.ENXIO: "there is no such device; choose another path",
    errno.EBUSY: "another program uses it; try again, or choose another path",
    errno.ETIMEDOUT: "the file system does not answer; try again later",
    errno.EINVAL: "the file system does not allow such a name or operation; choose another path",
}
# Codes whose text in a library's error is certain enough to recognise the fault by.
_IN_TEXT = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EMFILE,
    errno.ESTALE,
    errno.EIO,
)
# What a bucket's client reports, by the status of the reply.
_STATUS = {
    401: "the bucket does not accept the credentials; log in with `gcloud auth application-default "
    "login`, or give the machine's service account access to the bucket",
    403: "the credentials give no access to the bucket; give the account the role Storage Object "
    "User, or choose another bucket",
    404: "there is no such file, folder or bucket; check the path",
    412: "another process has written the object at the same time",
    429: "the bucket gets too many requests, also after several tries; try again later",
}
_NO_CREDENTIALS = (
    "there are no credentials for the bucket; log in with `gcloud auth application-default login`, "
    "or give the machine a service account"
)
_NO_ANSWER = "the bucket's server cannot be reached; check the network, and try again"
_SERVER = "the bucket's server fails (status {status}), also after several tries; try again later"
# Modules whose errors come from a bucket's client.
_CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "urllib3", "fsspec")


class FileError(UserError):
    """A file or folder could not be read, written or deleted; the message is one sentence.

    Attributes:
        missing: Whether the reason is that there is no such file, folder or bucket.
        passing: Whether the same command may succeed later: a bucket's server fails or does not
            answer.
    """

    def __init__(self, message: str, missing: bool = False, passing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.passing = passing


def reason(error: BaseException) -> str | None:
    """Returns what is wrong and what would be right, without a full stop; None for an error that is
    not a fault of a disk or a bucket.

    Args:
        error: The error of the operating system, or of a library. Errors that it was raised from
            are looked at too.
    """
    for found, raised_from in _chain(error):
        said = _system_reason(found) or _bucket_reason(found) or _text_reason(found)
        # An error that was raised while another one was handled may be a mistake of a program: it
        # is explained by a full disk, but not by a file that is missing.
        certain = raised_from or getattr(found, "errno", None) in _IN_TEXT
        if said is not None and certain:
            return said
    return None


def sentence(error: BaseException, unnamed: object = "A file or folder") -> str | None:
    """Returns one sentence about a fault of a disk or a bucket; None for any other error.

    Args:
        error: The error of the operating system, or of a library.
        unnamed: What the sentence names if the error has no path.
    """
    said = reason(error)
    if said is None:
        return None
    paths = [
        os.fsdecode(found.filename)
        for found, _ in _chain(error)
        if isinstance(found, OSError) and isinstance(found.filename, (str, bytes))
    ]
    return f"{paths[0] if paths else unnamed} cannot be used: {said}."


@contextlib.contextmanager
def explained(path: object, action: str) -> Iterator[None]:
    """Context manager that turns a fault of a disk or a bucket into a FileError of one sentence.

    Other errors pass unchanged.

    Args:
        path: The file or folder, for the message.
        action: What was tried: read, written, made or deleted.

    Raises:
        FileError: "PATH cannot be ACTION: REASON."
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = reason(error)
        if said is None:
            raise
        missing = any(isinstance(found, FileNotFoundError) for found, _ in _chain(error))
        passing = said in (_NO_ANSWER, _STATUS[429]) or said.startswith(_SERVER.partition("(")[0])
        raise FileError(f"{path} cannot be {action}: {said}.", missing, passing) from error


def _chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """Yields (error, True) for an error, the parts of a group of errors and what they were raised
    from, and (error, False) for errors that were being handled when one of these was raised.
    """
    waiting, seen = [(error, True)], set()
    while waiting:
        found, raised_from = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found, raised_from
        if isinstance(found, BaseExceptionGroup):
            waiting += [(part, raised_from) for part in found.exceptions]
        if found.__cause__ is not None:
            waiting.append((found.__cause__, raised_from))
        if found.__context__ is not None:
            waiting.append((found.__context__, False))


def _system_reason(error: BaseException) -> str | None:
    """Returns the reason of an error that carries the operating system's code; None for others."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if isinstance(error, (ConnectionError, BlockingIOError, ChildProcessError)):
        return None
    if error.errno == errno.ENOSPC and _no_inodes(error.filename):
        return (
            "the file system can hold no more files (it has no free inodes); delete files, or "
            "choose a folder on another disk"
        )
    said = _REASONS.get(error.errno)
    return None if said is None else said.format(user=_user())


def _no_inodes(path: object) -> bool:
    """Returns whether the file system of a path, or of the nearest folder above it, has free space
    but no free inodes.
    """
    if not isinstance(path, (str, bytes)):
        return False
    here = os.path.abspath(os.fsdecode(path))
    while not os.path.exists(here):
        here = os.path.dirname(here)
    try:
        found = os.statvfs(here)
    except OSError:
        return False
    return found.f_files > 0 and found.f_ffree == 0 and found.f_bavail > 0


def _user() -> str:
    """Returns the name of this process's user, or its number if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _bucket_reason(error: BaseException) -> str | None:
    """Returns the reason of an error of a bucket's client; None for other errors."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None:
        if text.startswith("Forbidden"):
            return _NO_CREDENTIALS if "nonymous caller" in text else _STATUS[403]
        # As the clients of buckets raise them, without a code.
        if isinstance(error, FileNotFoundError):
            return _STATUS[404]
        if isinstance(error, FileExistsError):
            return _STATUS[412]
        if isinstance(error, TimeoutError):
            return _NO_ANSWER
    if type(error).__module__.partition(".")[0] not in _CLIENTS:
        return None
    name = type(error).__name__
    if "Credentials" in name or name in ("RefreshError", "GoogleAuthError", "TransportError"):
        return _NO_CREDENTIALS
    code = str(getattr(error, "code", None) or getattr(error, "status", None))
    status = int(code) if code.isdecimal() else None
    if "nonymous caller" in text:
        return _NO_CREDENTIALS
    if status in _STATUS:
        return _STATUS[status]
    if status is not None and status >= 500:
        return _SERVER.format(status=status)
    if any(part in name for part in ("Connection", "Connect", "Timeout", "Proxy", "Disconnected")):
        return _NO_ANSWER
    return None


def _text_reason(error: BaseException) -> str | None:
    """Returns the reason of an error whose text quotes the operating system or a bucket's server;
    None for other errors. Orbax, tensorstore and array_record raise such errors.
    """
    # Short texts of Python errors could contain the words by chance in a value; these libraries
    # quote them at the end or in brackets.
    text = str(error)
    for code in _IN_TEXT:
        if re.search(rf"\b{re.escape(os.strerror(code))}\b", text):
            return _REASONS[code].format(user=_user())
    if "tensorstore" in text or "storage.googleapis" in text or "gs://" in text:
        found = re.search(r"HTTP response code: (\d+)|status code:? (\d+)", text)
        if found:
            status = int(found[1] or found[2])
            return _STATUS.get(status) or (_SERVER.format(status=status) if status >= 500 else None)
        if "UNAUTHENTICATED" in text or "Credentials" in text:
            return _NO_CREDENTIALS
        if "PERMISSION_DENIED" in text:
            return _STATUS[403]
        if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text:
            return _NO_ANSWER
    return None
