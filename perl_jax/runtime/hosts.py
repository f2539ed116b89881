"""Several processes as one run: how they meet, what they agree on, whose rows are whose, how they
end.

Every process runs the same program on the same global arrays. With one process everything here is
the identity, and costs nothing.

A process that is killed leaves the others in the middle of a collective. On CPUs that fails at
once; elsewhere it hangs until the heartbeats of JAX's coordination service stop being answered, and
then (at once where the process killed is number 0, which runs that service) JAX aborts the process
from a thread of its own. `connect` sees to it that both end in one sentence and status 1.
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

CLUSTER = "PERL_JAX_HOSTS"


ADDRESS, COUNT, INDEX = EXPLICIT = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)


CONNECT_SECONDS, HEARTBEAT_SECONDS = "PERL_JAX_CONNECT_SECONDS", "PERL_JAX_HEARTBEAT_SECONDS"


DEFAULT_SECONDS = {CONNECT_SECONDS: 60, HEARTBEAT_SECONDS: 60}


# Seconds that process 0, without which the others are aborted, stays for them to say why they fail
# too.
_FAREWELL = 2.0


# What an error says when the reason is another process.
_SIGNS = ("Gloo", "coordination service", "CoordinationService", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the processes of a run find each other.

    address: of process 0, host:port; None, with count and index: JAX finds out from the cluster.
    connect_seconds: how long they wait for each other at the start. heartbeat_seconds: how long one
    may be silent before the others give it up.
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None
    connect_seconds: int = DEFAULT_SECONDS[CONNECT_SECONDS]
    heartbeat_seconds: int = DEFAULT_SECONDS[HEARTBEAT_SECONDS]


def read_settings(environment: Mapping[str, str]) -> Settings | None:
    """What the environment asks for; None: one process. UserError for what is incomplete or
    impossible.
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
    text = environment.get(name) or str(DEFAULT_SECONDS.get(name, ""))
    good = text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
    bound = f"at least {least}" if most is None else f"from {least} to {most}"
    require(good, f"{name} is {text!r}; it must be a whole number {bound}.")
    return int(text)


# Meeting and parting.


def connect(command: str, settings: Settings | None) -> None:
    """Makes this process one of several, before anything touches a device; None: it stays alone.

    From here on the death of another process ends this one, with a sentence that begins with the
    command and with status 1, at the latest after the heartbeat's time-out. UserError when there is
    no cluster to be found or the address cannot be served.
    """
    if settings is None:
        return
    # Its handler of SIGTERM would take the place of ours, or of none.
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
            f"This process cannot take part at {where}: {str(error).splitlines()[0]}."
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


_AGAIN = "the same command, on all of them, goes on from what is saved."


LOST = f"{_GONE}, so this one stops too; {_AGAIN}"


ABORTED = f"JAX aborted this process, as it does when {_GONE}; {_AGAIN}"


_handler: Any = None


def _end_on_abort(sentence: str, status: int = 1) -> None:
    """Makes an abort of this process, by whatever thread, print the sentence and exit with the
    status.

    Through C: Python would run a handler of its own in the main thread, which may be waiting in a
    collective for ever, and an abort does not wait for it.
    """
    global _handler  # noqa: PLW0603  C calls the newest one: it must not be collected
    text = f"{sentence}\n".encode() if sentence else b""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        os.write(2, text)
        os._exit(status)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(end, ctypes.c_void_p))
    _handler = end  # C has no reference to it


def connected() -> bool:
    """Whether `connect` made this process one of several."""
    return jax.distributed.is_initialized()


def lost(error: BaseException) -> bool:
    """Whether an error comes of another process being gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def disconnect() -> None:
    """Parts from the others when all have come as far as this."""
    if connected():
        barrier("end")
        jax.distributed.shutdown()


def leave(status: int) -> int:
    """Ends this process without waiting for the others; alone, it only returns the status.

    JAX's own way out waits for the others, who may be in a collective with this one.
    """
    if not connected():
        return status
    _end_on_abort("", status)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        time.sleep(_FAREWELL)
    os._exit(status)


# Agreement.


def several() -> bool:
    """Whether there are other processes. A process alone is not asked for its devices here."""
    return connected() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes the run's files: one does."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of that name."""
    if several():
        multihost_utils.sync_global_devices(name)


def in_turn(make: Callable[[], Any]) -> Any:
    """make() by process 0, then by the others: what it leaves on a shared disk they find there."""
    if is_writer():
        made = make()
        barrier("in turn")
        return made
    barrier("in turn")
    return make()


def every(array: np.ndarray) -> np.ndarray:
    """[processes, ...]: an array of one shape and dtype from each process, exactly."""
    array = np.ascontiguousarray(array)
    if not several():
        return array[None]
    # As bytes: devices would round float64 and int64 to half their width.
    bytes_ = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return bytes_.reshape(-1).view(array.dtype).reshape(-1, *array.shape)


def anyone(flag: bool) -> bool:
    """Whether the flag is up on any process: the same answer on all."""
    return bool(every(np.asarray(flag)).any())


def agreed(flag: bool) -> bool:
    """Process 0's flag, on all: what one sees of a file system another may not see yet."""
    return bool(every(np.asarray(flag))[0])


# Arrays.


def whole(tree: Any) -> Any:
    """The tree with every array that lies partly on other hosts fetched to this one."""
    if not several():
        return tree
    away = lambda leaf: (
        isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    )
    return jax.tree.map(
        lambda leaf: multihost_utils.process_allgather(leaf, tiled=True) if away(leaf) else leaf,
        tree,
    )


def replicated(array: np.ndarray, mesh: Mesh) -> jax.Array | np.ndarray:
    """A host array that is the same on all processes, whole on every device; one process's as it
    is.
    """
    if not several():
        return array
    place = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class Share:
    """The contiguous part of every batch that a process loads: number `index` of `count`.

    leaders: of each part the first process that has it. Where a row is spread over hosts (tensor
    parallelism) several have the same part, and what is to be done once for a row the leader does.
    """

    index: int
    count: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this process does what is to be done once for each of its rows."""
        return self.leaders[self.index] == jax.process_index()

    def part(self, rows: np.ndarray) -> np.ndarray:
        """The whole batch's rows -> this part's."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """This part's rows -> the whole batch's, each as its leader has it, on every process."""
        found = every(rows)
        return np.concatenate([found[leader] for leader in self.leaders])


@functools.lru_cache(maxsize=8)
def share(sharding: NamedSharding) -> Share:
    """This process's share of batches that are sharded over rows.

    UserError where a process would have rows that do not follow each other, or a share of another
    size.
    """
    if not several():
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
        "The mesh does not give every process one run of a batch's rows; make mesh.fsdp and "
        "mesh.tensor fill whole hosts, or divide one.",
    )
    mine = {process: parts.index(tuple(sorted(rows))) for process, rows in owned.items()}
    leaders = tuple(
        min(process for process, part in mine.items() if part == index)
        for index in range(len(parts))
    )
    return Share(mine[jax.process_index()], len(parts), leaders)


# Being told to end.


class Termination:
    """While entered, SIGTERM is only noted, however often it comes (Slurm sends it twice); SIGINT
    acts as ever.

    `asked` is for the end of a step: a collective, in which one process's note counts for all. The
    handler is Python's, which runs it between two instructions of the main thread: a SIGTERM during
    a long program on the devices is noted when that is done.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        # Only the main thread may have handlers; elsewhere SIGTERM stays what it was.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
            signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.noted and kind is None:
            # It came after the last step's end.
            signal.raise_signal(signal.SIGTERM)

    def asked(self) -> bool:
        """Whether any process was told to end; all call it at the same step."""
        return anyone(self.noted)


def to_host(tree: Tree) -> Tree:
    """Device arrays, whole, as numpy arrays on this host; with several hosts all of them have to
    ask.
    """
    return jax.tree.map(np.asarray, jax.device_get(whole(tree)))
