"""A lease on an object in a bucket: at most one process at a time holds it.

The holder makes the object under the precondition that there is none, and rewrites it every few
seconds under the precondition that nobody else has. So its generation changes as long as the holder
lives. Another process that finds the object watches the generation for one lease time, on its own
clock: if it changes the holder lives; otherwise the process takes the object over, under the
precondition that it still has that generation. No clocks of two hosts are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from perl_jax.runtime import buckets, files
from perl_jax.runtime.faults import FileError, explained

# Seconds after which a holder that does not renew its lease has lost it.
SECONDS = 60.0
# How many times in a lease it is renewed, and looked at by who waits for it.
_BEATS = 6
_LOOKS = 20


class Held(Exception):
    """Another process holds the lease.

    Attributes:
        said: What the holder wrote; {} if that cannot be read.
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__("another process holds the lease")
        self.said = said


class Lease:
    """Holds an object in a bucket from its making until `release`, and renews it in a thread.

    Args:
        address: The object.
        said: What the object says of the holder, JSON values by name.
        seconds: The lease time; the same for all that may hold the object.

    Raises:
        Held: Another process holds the lease.
        FileError: The bucket cannot be read or written.
    """

    def __init__(
        self, address: files.Path, said: Mapping[str, Any], seconds: float | None = None
    ) -> None:
        self._address = address
        self._seconds = SECONDS if seconds is None else seconds
        self._token = uuid.uuid4().hex
        self._content = json.dumps({**said, **_process(), "token": self._token}).encode()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost = False
        with explained(address, "written"):
            self._generation = self._take()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew_often, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        """Returns the generation of the object that this process has made or taken over."""
        while True:
            with contextlib.suppress(FileExistsError):
                return _write(self._address, self._content, 0)
            found = _read(self._address)
            if found is None:
                continue
            content, generation = found
            said = _parse(content)
            # The reply to the first try did not arrive.
            if said.get("token") == self._token:
                return generation
            if not _is_dead(said) and not self._expires(said, generation):
                raise Held(said)
            with contextlib.suppress(FileExistsError):
                return _write(self._address, self._content, generation)

    def _expires(self, said: Mapping[str, Any], generation: int) -> bool:
        """Returns whether a lease is not renewed for the lease time, which this call waits."""
        if _is_here(said):
            return False
        print(
            f"{self._address} was held by process {said.get('pid')} on {said.get('host')}: waiting "
            f"{self._seconds:.0f} s to see whether that still runs.",
            flush=True,
        )
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(self._seconds / _LOOKS)
            found = _generation(self._address)
            if found != generation:
                # The holder has let go, or it has renewed the lease.
                return found is None
        return True

    def _renew_often(self) -> None:
        """Renews the lease until it is released or lost."""
        while not self._ended.wait(self._seconds / _BEATS) and not self._lost:
            # The bucket may be out of reach for a while; the precondition tells later.
            with contextlib.suppress(Exception):
                self._renew()

    def _renew(self) -> None:
        """Rewrites the object; notes if another process has taken it over or deleted it."""
        with self._lock:
            if self._lost or self._ended.is_set():
                return
            try:
                self._generation = _write(self._address, self._content, self._generation)
            except FileExistsError:
                found = _read(self._address)
                if found is None or _parse(found[0]).get("token") != self._token:
                    self._lost = True
                    return
                # The reply to the write before did not arrive.
                self._generation = found[1]
            self._renewed = time.monotonic()

    def is_lost(self) -> bool:
        """Returns whether another process has taken the lease over.

        Asks the bucket if the last renewal is longer ago than a lease. Raises FileError if the
        bucket cannot be reached then.
        """
        if not self._lost and time.monotonic() - self._renewed > self._seconds:
            with explained(self._address, "written"):
                self._renew()
        return self._lost

    def release(self) -> None:
        """Deletes the object if this process still holds it; a second call does nothing."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            if not self._lost:
                # A bucket out of reach keeps it; another process takes it over after a lease.
                with contextlib.suppress(Exception):
                    _delete(self._address, self._generation)
        self._thread.join(timeout=self._seconds)


def _parts(address: files.Path) -> tuple[str, str]:
    """Returns (bucket, name of the object)."""
    bucket, _, name = os.fspath(address).removeprefix(buckets.SCHEME).partition("/")
    return bucket, name


def _generation(address: files.Path) -> int | None:
    """Returns the generation of an object; None: there is none."""
    with explained(address, "read"):
        try:
            reply = buckets.client().call("GET", "b/{}/o/{}", *_parts(address), json_out=True)
        except FileNotFoundError:
            return None
        return int(reply["generation"])


def _read(address: files.Path) -> tuple[bytes, int] | None:
    """Returns (content, generation) of an object; None: there is none."""
    while True:
        generation = _generation(address)
        if generation is None:
            return None
        try:
            content = buckets.client().cat_file(os.fspath(address))
        except FileNotFoundError:
            continue
        if _generation(address) == generation:
            return content, generation


def _write(address: files.Path, content: bytes, generation: int) -> int:
    """Writes an object that has a generation; returns its new generation.

    Args:
        address: The object.
        content: The new content.
        generation: The generation that it must have; 0: there must be none.

    Raises FileExistsError if it has another generation, and FileError if there is no such bucket.
    """
    client = buckets.client()
    bucket, name = _parts(address)
    try:
        reply = client.call(
            "POST",
            client.base.replace("/storage/", "/upload/storage/", 1) + "b/{}/o",
            bucket,
            uploadType="media",
            name=name,
            ifGenerationMatch=str(generation),
            data=content,
            headers={"Content-Type": "application/octet-stream"},
            json_out=True,
        )
    except FileNotFoundError as error:
        raise FileError(
            f"{address} cannot be written: there is no bucket {bucket}; check the address, or make "
            "the bucket.",
            missing=True,
        ) from error
    return int(reply["generation"])


def _delete(address: files.Path, generation: int) -> None:
    """Deletes an object that has a generation; raises FileExistsError if it has another."""
    buckets.client().call(
        "DELETE", "b/{}/o/{}", *_parts(address), ifGenerationMatch=str(generation)
    )


def _parse(content: bytes) -> dict[str, Any]:
    """Returns the JSON object that a holder wrote; {} for any other content."""
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _process() -> dict[str, Any]:
    """Returns what identifies this process: `host`, `pid`, `boot`, `space` and `start`.

    The last three are the number of the system's start, of the process's name space and of the
    process's start; None where the system does not say.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _system("/proc/sys/kernel/random/boot_id"),
        "space": _name_space(),
        "start": _start_of(os.getpid()),
    }


def _system(path: str) -> str | None:
    """Returns the text of a file of the system; None if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _name_space() -> str | None:
    """Returns the number of the name space in which this process has its number."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Returns when a process of this host started, in ticks since the system's start; None: there
    is no such process.
    """
    stat = _system(f"/proc/{pid}/stat")
    # The second field, the program's name in brackets, may hold spaces.
    fields = [] if stat is None else stat.rpartition(")")[2].split()
    # One that has ended stays listed until its parent asks for its status.
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _is_here(said: Mapping[str, Any]) -> bool:
    """Returns whether a holder is a process of this system, with numbers as this process sees
    them.
    """
    here = _process()
    names = ("host", "boot", "space")
    return all(here[name] is not None and said.get(name) == here[name] for name in names)


def _is_dead(said: Mapping[str, Any]) -> bool:
    """Returns whether a holder was a process of this system that has ended."""
    pid = said.get("pid")
    return _is_here(said) and isinstance(pid, int) and _start_of(pid) != said.get("start")
