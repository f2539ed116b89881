"""Multi-process runs: communication between processes, and the end of a run by SIGTERM or Ctrl-C.

Every process runs the same program on the same global arrays. With a single process, the functions
of this module return their argument (or the obvious constant) without communication.
`connecting` makes a process one of several.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perl_jax.errors import UserError, require
from perl_jax.runtime import stopping
from perl_jax.types import Tree

# The environment variable that says whether JAX finds the processes of a cluster.
CLUSTER = "PERL_JAX_HOSTS"
# What the text of an error says when another process is lost: of gloo, which carries collective
# operations between CPUs; of the coordination service, to which every process is connected; and of
# the barriers of both.
_SIGNS = re.compile(
    r"\bgloo\b|coordination[ _]?(service|agent|leader)|heartbeat|(closed|reset) by peer"
    r"|barrier (timed out|failed|has failed)|tasks? (is|are|have) (unhealthy|crashed)|another task"
    r"|failed to send rpc|preempted/died",
    re.IGNORECASE,
)
# Statuses that JAX's own errors begin with when another process does not answer.
_STATUSES = ("UNAVAILABLE:", "DEADLINE_EXCEEDED:", "ABORTED:")


def connected() -> bool:
    """Returns whether `connecting.connect` made this process one of several."""
    return jax.distributed.is_initialized()


def is_peer_failure(error: BaseException) -> bool:
    """Returns whether an error was caused by the loss of another process, judged by its text.

    JAX raises it as different types (JaxRuntimeError, ValueError, RuntimeError), and libraries wrap
    it, so the errors that it was raised from are judged too. Errors of files and of sockets that
    Python opened are none of it; nor are those of a bucket's storage.
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or found in seen:
            continue
        seen.append(found)
        waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]
    return any(map(_lost_a_peer, seen))


def _lost_a_peer(error: BaseException) -> bool:
    """Returns whether one error, without those that it was raised from, says that another process
    is lost.
    """
    text = str(error)
    if isinstance(error, (OSError, UserError)) or not isinstance(error, Exception):
        return False
    if "tensorstore" in text or "gs://" in text:
        return False
    jax_says = isinstance(error, jax.errors.JaxRuntimeError) and text.startswith(_STATUSES)
    return jax_says or _SIGNS.search(text) is not None


def is_distributed() -> bool:
    """Returns whether there are other processes.

    A process that is not connected gets False without a call of JAX, which would initialise
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
    """Returns make(), called by process 0 first and by the other processes afterwards.

    So the others find on a shared disk what the first call wrote. All processes must call this
    function.
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
    """Returns whether the flag is True on any process: the same answer on all.

    All processes must call this function.
    """
    return bool(all_gather(np.asarray(flag)).any())


def broadcast_flag(flag: bool) -> bool:
    """Returns the flag of process 0 on all processes, which must all call this function.

    For facts about a file system, which one process may see earlier than another.
    """
    return bool(all_gather(np.asarray(flag))[0])


def broadcast_json(value: Any) -> Any:
    """Returns the JSON value of process 0 on all processes, which must all call this function."""
    if not is_distributed():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = all_gather(np.asarray(text.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    return json.loads(all_gather(padded)[0][: int(sizes[0])].tobytes())


def by_writer(make: Callable[[], Any]) -> Any:
    """Returns the JSON value make(), called by process 0 alone, on all processes.

    All processes must call this function. A UserError of make() is raised on all of them, so that
    none waits for a process that has given up.
    """
    made, refused = None, None
    if is_writer():
        try:
            made = make()
        except UserError as error:
            refused = error
    said, made = broadcast_json([None if refused is None else str(refused), made])
    if said is not None:
        raise refused or UserError(said)
    return made


# Arrays.


def fetch(tree: Any) -> Any:
    """Returns the tree with every array that lies partly on other hosts copied to this one.

    Such arrays become whole numpy arrays; other leaves are unchanged. All processes must call this
    function.
    """
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
    """Returns a host array as a device array that is whole on every device of the mesh.

    All processes must pass the same array. A single process gets its array back, unchanged.
    """
    if not is_distributed():
        return array
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])


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
        """Returns this process's part of the rows of a whole batch, [rows, ...]."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of the whole batch on every process, from each process's part.

        Of several processes with the same part, the leader's rows are taken. All processes must
        call this method.
        """
        found = all_gather(rows)
        return np.concatenate([found[leader] for leader in self.leaders])


@functools.lru_cache(maxsize=8)
def share(sharding: NamedSharding) -> Share:
    """Returns this process's share of batches that are sharded over rows.

    Args:
        sharding: Sharding of the batches: rows over the mesh's batch axes.

    Raises UserError if a process would have rows that are not contiguous, if parts would differ in
    size, or if there are other processes and this one is not connected to them.
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
    """Context manager that records SIGTERM and Ctrl-C (SIGINT) instead of ending the process.

    SIGTERM may come several times (Slurm sends it twice). Ctrl-C after another Ctrl-C or SIGTERM
    raises KeyboardInterrupt at once. A process that ignores SIGINT, as `nohup` makes it, goes on to
    ignore it. Call `asked` at the end of a step. It is a collective operation, so that all
    processes stop at the same step. Python runs the handler between two instructions of the main
    thread: a signal during a long device program is recorded when the program has ended. The
    signal is recorded for `stopping` too, so that rewards that wait for a server can stop.

    Attributes:
        current: The context that records signals now; None: there is none.
    """

    current: ClassVar[Termination | None] = None

    def __init__(self) -> None:
        self.noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        stopping.forget()
        # Only the main thread can install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(number) or signal.SIG_DFL
                if before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
            Termination.current = self
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handler of both signals."""
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = max(self.noted, number)
        stopping.tell()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        stopping.forget()
        if self._before:
            Termination.current = None
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.noted and kind is None:
            # The signal came after the end of the last step: deliver it now.
            signal.raise_signal(self.noted)

    def asked(self) -> int:
        """Returns the number of the signal that any process has received so far; 0: no process has
        received one.

        If processes have received both signals, it is SIGTERM. All processes must call this method
        at the same step.
        """
        return int(all_gather(np.asarray(self.noted)).max())


def to_host(tree: Tree) -> Tree:
    """Returns a tree of device arrays as whole numpy arrays on this host.

    All processes must call this function.
    """
    return jax.tree.map(np.asarray, jax.device_get(fetch(tree)))
