"""Multi-process runs: connecting processes, communication between them, and shutting down.

Every process runs the same program on the same global arrays. With a single process, the functions
of this module return their argument (or the obvious constant) without communication.

A process that is killed leaves the others waiting in a collective operation. On CPUs the operation
fails at once. On other platforms it hangs until the coordination service of JAX misses the
heartbeats, or notices at once that process 0, which runs the service, is gone. Then JAX aborts the
process from a thread of its own. `connect` makes both cases end with one sentence and exit status
1.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perl_jax.errors import UserError, require
from perl_jax.types import Tree

# Environment variables.
CLUSTER = "PERL_JAX_HOSTS"
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
# Parts of the text of errors that the loss of another process causes.
_SIGNS = ("Gloo", "coordination service", "CoordinationService", "heartbeat")


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
    """Reads the settings from environment variables; None: a single process.

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
    """Returns an environment variable as an integer in [least, most]; raises UserError."""
    text = environment.get(name) or str(DEFAULT_SECONDS.get(name, ""))
    good = text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
    bound = f"at least {least}" if most is None else f"from {least} to {most}"
    require(good, f"{name} is {text!r}; it must be a whole number {bound}.")
    return int(text)


# Connecting and disconnecting.


def connect(command: str, settings: Settings | None) -> None:
    """Makes this process one of several; call it before anything uses a device.

    Afterwards the death of another process ends this one, with exit status 1 and a sentence that
    begins with `command`, at the latest after the heartbeat timeout.

    Args:
        command: Name of the command, for messages.
        settings: How to connect. None: nothing happens, the process stays alone.

    Raises UserError if no cluster is found or the address cannot be used.
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
_handler: Any = None


def _end_on_abort(sentence: str, status: int = 1) -> None:
    """Makes an abort of this process, by any thread, print `sentence` and exit with `status`.

    The handler is installed through C. A Python handler would run in the main thread, which may
    wait in a collective operation for ever, and an abort does not wait for it.
    """
    global _handler  # noqa: PLW0603  C calls the newest one: it must not be collected
    text = f"{sentence}\n".encode() if sentence else b""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        """Prints the sentence and ends the process."""
        os.write(2, text)
        os._exit(status)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(end, ctypes.c_void_p))
    _handler = end  # Keeps the handler alive: C holds no Python reference to it.


def connected() -> bool:
    """Returns whether `connect` made this process one of several."""
    return jax.distributed.is_initialized()


def is_peer_failure(error: BaseException) -> bool:
    """Returns whether an error was caused by the loss of another process."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def disconnect() -> None:
    """Waits until all processes have come to this call, then disconnects from them."""
    if connected():
        barrier("end")
        jax.distributed.shutdown()


def leave(status: int) -> int:
    """Ends this process without waiting for the others; a single process only returns `status`.

    The normal exit of JAX waits for the others, which may be waiting for this process.
    """
    if not connected():
        return status
    _end_on_abort("", status)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        time.sleep(_FAREWELL)
    os._exit(status)


# Communication.


def is_distributed() -> bool:
    """Returns whether there are other processes.

    For a process that is not connected, JAX is not asked: the question would initialise its
    devices.
    """
    return connected() and jax.process_count() > 1


def is_writer() -> bool:
    """Returns whether this process writes the run's files: process 0 does."""
    return not is_distributed() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier `name`."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def writer_first(make: Callable[[], Any]) -> Any:
    """Returns make(), called by the writer first and by the other processes afterwards.

    So the others find on a shared disk what the first call wrote.
    """
    if is_writer():
        made = make()
        barrier("writer first")
        return made
    barrier("writer first")
    return make()


def all_gather(array: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, [processes, ...], bit for bit.

    All processes must pass an array of the same shape and dtype.
    """
    array = np.ascontiguousarray(array)
    if not is_distributed():
        return array[None]
    # As bytes, because devices would round float64 and int64 to 32 bits.
    bytes_ = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return bytes_.reshape(-1).view(array.dtype).reshape(-1, *array.shape)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is True on any process: the same answer on all."""
    return bool(all_gather(np.asarray(flag)).any())


def broadcast_flag(flag: bool) -> bool:
    """Returns the flag of process 0 on all processes.

    For facts about a file system, which one process may see earlier than another.
    """
    return bool(all_gather(np.asarray(flag))[0])


# Arrays.


def fetch(tree: Any) -> Any:
    """Returns the tree with every array that lies partly on other hosts copied to this one."""
    if not is_distributed():
        return tree
    away = lambda leaf: (
        isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    )
    return jax.tree.map(
        lambda leaf: multihost_utils.process_allgather(leaf, tiled=True) if away(leaf) else leaf,
        tree,
    )


def replicated(array: np.ndarray, mesh: Mesh) -> jax.Array | np.ndarray:
    """Returns a host array as a device array that is whole on every device.

    All processes must pass the same array. A single process gets its array back.
    """
    if not is_distributed():
        return array
    place = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class Share:
    """The contiguous part of every batch's rows that a process loads.

    Attributes:
        index: Number of this process's part.
        count: Number of parts.
        leaders: For each part, the first process that has it. Several processes have the same part
            where a row is spread over hosts (tensor parallelism); the leader then does what must be
            done once per row.
    """

    index: int
    count: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this process is the leader of its part."""
        return self.leaders[self.index] == jax.process_index()

    def part(self, rows: np.ndarray) -> np.ndarray:
        """Returns this process's part of the rows of a whole batch."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of the whole batch on every process, from each process's part.

        Of several processes with the same part, the leader's rows are taken.
        """
        found = all_gather(rows)
        return np.concatenate([found[leader] for leader in self.leaders])


@functools.lru_cache(maxsize=8)
def share(sharding: NamedSharding) -> Share:
    """Returns this process's share of batches that are sharded over rows.

    Raises UserError if a process would have rows that are not contiguous, or parts would differ in
    size.
    """
    if not is_distributed():
        require(
            jax.process_count() == 1,
            f"This process is one of {jax.process_count()} on these devices; set {CLUSTER}=auto "
            "on all of them.",
        )
        return Share(0, 1, (0,))
    size = sharding.mesh.size
    owned: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((size,)).items():
        owned.setdefault(device.process_index, set()).update(range(size)[rows])
    parts = sorted({tuple(sorted(rows)) for rows in owned.values()})
    width = size // len(parts)
    good = parts == [tuple(range(start, start + width)) for start in range(0, size, width)]
    require(
        good,
        "The mesh does not give every process contiguous rows of a batch; choose mesh.fsdp x "
        "mesh.tensor as a multiple or a divisor of a host's devices.",
    )
    mine = {process: parts.index(tuple(sorted(rows))) for process, rows in owned.items()}
    leaders = tuple(
        min(process for process, part in mine.items() if part == index)
        for index in range(len(parts))
    )
    return Share(mine[jax.process_index()], len(parts), leaders)


# Termination.


class Termination:
    """Context manager that records SIGTERM instead of ending the process; SIGINT works as usual.

    SIGTERM may come several times (Slurm sends it twice). Call `asked` at the end of a step. It is
    a collective operation, so that all processes stop at the same step. Python runs the handler
    between two instructions of the main thread: a SIGTERM during a long device program is recorded
    when the program has ended.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        # Only the main thread can install handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
            signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handler of SIGTERM."""
        self.noted = True

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.noted and kind is None:
            # SIGTERM came after the end of the last step: deliver it now.
            signal.raise_signal(signal.SIGTERM)

    def asked(self) -> bool:
        """Returns whether any process has received SIGTERM; all must call it at the same step."""
        return any_process(self.noted)


def to_host(tree: Tree) -> Tree:
    """Returns a tree of device arrays as whole numpy arrays on this host.

    All processes must call it.
    """
    return jax.tree.map(np.asarray, jax.device_get(fetch(tree)))
