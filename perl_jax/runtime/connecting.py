"""Connects the processes of a multi-process run, and disconnects them at its end.

A process that is killed leaves the others waiting in a collective operation. On CPUs the operation
fails at once. On other platforms it hangs until the coordination service of JAX misses the
heartbeats, or notices at once that process 0, which runs the service, is gone. Then JAX aborts the
process from a thread of its own. `connect` makes both cases end with one sentence and exit status
1.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from perl_jax.errors import UserError, require
from perl_jax.runtime.hosts import CLUSTER, barrier, connected, is_writer

# Environment variables.
ADDRESS, COUNT, INDEX = EXPLICIT = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
CONNECT_SECONDS, HEARTBEAT_SECONDS = "PERL_JAX_CONNECT_SECONDS", "PERL_JAX_HEARTBEAT_SECONDS"
DEFAULT_SECONDS = {CONNECT_SECONDS: 60, HEARTBEAT_SECONDS: 60}
# Seconds that process 0 waits before it leaves. JAX aborts the others when it is gone, and they
# should print their own errors first.
_FAREWELL = 2.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the processes of a run find each other.

    Attributes:
        address: host:port of process 0. None (with count and index): JAX detects the cluster.
        count: Number of processes.
        index: Number of this process, from 0.
        connect_seconds: Longest wait for the other processes at the start.
        heartbeat_seconds: Silence after which a process counts as lost.
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None
    connect_seconds: int = DEFAULT_SECONDS[CONNECT_SECONDS]
    heartbeat_seconds: int = DEFAULT_SECONDS[HEARTBEAT_SECONDS]


def read_settings(environment: Mapping[str, str]) -> Settings | None:
    """Returns the settings in environment variables; None if they describe a single process.

    The variables are PERL_JAX_HOSTS=auto, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID together; and PERL_JAX_CONNECT_SECONDS and PERL_JAX_HEARTBEAT_SECONDS.

    Raises UserError for settings that are incomplete or impossible.
    """
    cluster = environment.get(CLUSTER)
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if not cluster and not given:
        return None
    seconds = [_whole(environment, name, 1, None) for name in (CONNECT_SECONDS, HEARTBEAT_SECONDS)]
    if cluster:
        require(
            cluster == "auto",
            f"{CLUSTER} is {cluster!r}; it must be auto (JAX finds the cluster's processes), or "
            "not set.",
        )
        return Settings(None, None, None, *seconds)
    missing = [name for name in EXPLICIT if name not in given]
    require(
        not missing,
        f"{', '.join(given)} without {', '.join(missing)}: several processes need all three, or "
        f"{CLUSTER}=auto.",
    )
    count = _whole(environment, COUNT, 1, None)
    index = _whole(environment, INDEX, 0, count - 1)
    host, _, port = given[ADDRESS].rpartition(":")
    good = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
    require(good, f"{ADDRESS} is {given[ADDRESS]!r}; it must be process 0's host:port.")
    return None if count == 1 else Settings(given[ADDRESS], count, index, *seconds)


def _whole(environment: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    """Returns an environment variable as an integer.

    Args:
        environment: The environment variables.
        name: Name of the variable. If it is not set, its entry of DEFAULT_SECONDS is used.
        least: Smallest allowed value.
        most: Largest allowed value; None: no limit.

    Raises UserError for a value that is not an integer in [least, most].
    """
    text = environment.get(name) or str(DEFAULT_SECONDS.get(name, ""))
    good = text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
    bound = f"at least {least}" if most is None else f"from {least} to {most}"
    require(good, f"{name} is {text!r}; it must be a whole number {bound}.")
    return int(text)


# Connecting and disconnecting.


def connect(command: str, settings: Settings | None) -> None:
    """Makes this process one of several; call it before anything uses a device.

    It waits until all processes have called it. Afterwards the death of another process ends this
    one, with exit status 1 and a sentence that begins with `command`, at the latest after the
    heartbeat timeout. If the others do not come in time, it ends this process likewise.

    Args:
        command: Name of the command, for messages.
        settings: How to connect. None: nothing happens, the process stays alone.

    Raises UserError if no cluster is found, if the address cannot be used, or if several processes
    run on CPUs without gloo.
    """
    if settings is None:
        return
    # The preemption service would install its own handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    where = "the cluster's coordinator" if settings.address is None else settings.address
    _end_on_abort(
        f"perl-jax {command}: the processes of this run did not all meet at {where} within "
        f"{settings.connect_seconds} s."
    )
    explicit = (
        {}
        if settings.address is None
        else {
            "coordinator_address": settings.address,
            "num_processes": settings.count,
            "process_id": settings.index,
        }
    )
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=settings.connect_seconds,
            heartbeat_timeout_seconds=settings.heartbeat_seconds,
        )
    except ValueError as error:
        raise UserError(
            f"{CLUSTER} is auto, but JAX finds no cluster here ({error}); set "
            f"{', '.join(EXPLICIT)} instead."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"This process cannot join the run at {where}: {str(error).splitlines()[0]}."
        ) from error
    _end_on_abort(f"perl-jax {command}: {ABORTED}")
    if jax.default_backend() == "cpu":
        name, found = (
            "jax_cpu_collectives_implementation",
            jax.config.jax_cpu_collectives_implementation,
        )
        require(
            found not in (None, "none"),
            f"{name.upper()} is {found!r}; several processes on CPUs need gloo.",
        )


_GONE = "another process of this run was killed, failed or cannot be reached any more"
_AGAIN = "start the same command again on all of them; it goes on from the last checkpoint."
LOST = f"{_GONE}, so this one stops too; {_AGAIN}"
ABORTED = f"JAX aborted this process, as it does when {_GONE}; {_AGAIN}"
# Handlers that C may call. C holds no Python reference to them: they must not be collected.
_handlers: list[Any] = []


def _end_on_abort(sentence: str, status: int = 1) -> None:
    """Makes an abort of this process, by any thread, print `sentence` and exit with `status`.

    It replaces what an earlier call installed. The handler is installed through C. A Python handler
    would run in the main thread, which may wait in a collective operation for ever, and an abort
    does not wait for it.

    Args:
        sentence: Text on standard error; "": nothing is printed.
        status: Exit status.
    """
    text = f"{sentence}\n".encode() if sentence else b""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        """Prints the sentence and ends the process."""
        os.write(2, text)
        os._exit(status)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(end, ctypes.c_void_p))
    _handlers.append(end)


def disconnect() -> None:
    """Waits until all processes have come to this call, then disconnects from them.

    A single process returns at once.
    """
    if connected():
        barrier("end")
        jax.distributed.shutdown()


def leave(status: int) -> int:
    """Ends this process with exit status `status`, without waiting for the others.

    A single process is not ended: the function returns `status`. Process 0 waits two seconds first,
    so that the others can print their own errors. The normal exit of JAX would wait for the others,
    which may be waiting for this process.
    """
    if not connected():
        return status
    _end_on_abort("", status)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        time.sleep(_FAREWELL)
    os._exit(status)
