"""Several processes: settings, shares of a batch, what they gather and agree on, and one alone."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from perl_jax.adapters.lora import Adapter
from perl_jax.cli import main as command
from perl_jax.errors import UserError
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import connecting, hosts, sharding
from perl_jax.runtime.connecting import Settings
from perl_jax.runtime.hosts import Share
from perl_jax.training.state import TrainState
from tests.xla import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
# For two processes to end, on a machine that does other things too.
PATIENCE = 300
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "node0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


# Settings.


def test_without_settings_there_is_one_process():
    assert connecting.read_settings({}) is None
    assert connecting.read_settings(dict.fromkeys((*EXPLICIT, "PERL_JAX_HOSTS"), "")) is None
    assert (
        connecting.read_settings({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
        is None
    )


def test_settings_of_several_processes():
    assert connecting.read_settings(EXPLICIT) == Settings("node0:1234", 4, 3, 60, 60)
    assert (
        connecting.read_settings({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "[::1]:80"}).address
        == "[::1]:80"
    )
    seconds = {"PERL_JAX_CONNECT_SECONDS": "7", "PERL_JAX_HEARTBEAT_SECONDS": "9"}
    assert connecting.read_settings({"PERL_JAX_HOSTS": "auto", **seconds}) == Settings(
        None, None, None, 7, 9
    )
    assert connecting.read_settings({**EXPLICIT, **seconds}) == Settings("node0:1234", 4, 3, 7, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PERL_JAX_HOSTS": "yes"}, "PERL_JAX_HOSTS is 'yes'; it must be auto"),
        (
            {"JAX_PROCESS_ID": ""},
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES without JAX_PROCESS_ID: several processes "
            "need all three",
        ),
        (
            {"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""},
            "JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES, JAX_PROCESS_ID: ",
        ),
        (
            {"JAX_NUM_PROCESSES": "0"},
            "JAX_NUM_PROCESSES is '0'; it must be a whole number at least 1.",
        ),
        (
            {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is 'two'; it must be a whole number at least 1.",
        ),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is '4'; it must be a whole number from 0 to 3."),
        (
            {"JAX_PROCESS_ID": "-1"},
            "JAX_PROCESS_ID is '-1'; it must be a whole number from 0 to 3.",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node0"},
            "JAX_COORDINATOR_ADDRESS is 'node0'; it must be process 0's host:port.",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node0:70000"},
            "JAX_COORDINATOR_ADDRESS is 'node0:70000'; it must be",
        ),
        (
            {"PERL_JAX_HEARTBEAT_SECONDS": "0"},
            "PERL_JAX_HEARTBEAT_SECONDS is '0'; it must be a whole number at least 1.",
        ),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError) as error:
        connecting.read_settings({**EXPLICIT, **change})
    assert str(error.value).startswith(message) and str(error.value).endswith(".")


def test_commands_of_one_process_refuse_to_be_several(capsys, monkeypatch):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    connected = []
    monkeypatch.setattr(
        connecting, "connect", lambda name, settings: connected.append(settings) or 1 / 0
    )
    assert command.main(["show", "folder"]) == 2
    said = (
        "perl-jax show: show runs in one process; unset PERL_JAX_HOSTS and "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID for it.\n"
    )
    assert capsys.readouterr().err == said and not connected
    # One that can be several comes as far as connecting.
    with pytest.raises(ZeroDivisionError):
        command.main(["sft", "--run", "r", "--model", "m"])
    assert connected == [Settings("node0:1234", 4, 3)]


def test_every_command_is_said_to_be_for_one_or_for_several():
    assert set(command.TOGETHER) <= set(command.COMMANDS)
    assert set(command.COMMANDS) - set(command.TOGETHER) == {
        "generate",
        "score",
        "report",
        "export",
        "import",
        "average",
        "show",
        "plan",
    }


# Shares of a batch.


@dataclasses.dataclass(frozen=True)
class Place:
    """A sharding over rows as `share` sees it: part of the batch and process of each device."""

    rows: tuple[int, ...]
    processes: tuple[int, ...]

    @property
    def mesh(self):
        return type("Mesh", (), {"size": len(self.rows)})

    def devices_indices_map(self, shape):
        width = shape[0] // (max(self.rows) + 1)
        device = lambda process: type("Device", (), {"process_index": process})()
        return {
            device(process): (slice(row * width, (row + 1) * width),)
            for row, process in zip(self.rows, self.processes, strict=True)
        }


@pytest.fixture
def process(monkeypatch):
    """Makes this process look like one of several."""

    def be(index: int) -> None:
        monkeypatch.setattr(hosts, "is_distributed", lambda: True)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        hosts.share.cache_clear()

    yield be
    hosts.share.cache_clear()


@pytest.mark.parametrize(
    ("rows", "processes", "expected"),
    [
        # Two hosts of four devices: rows over all; over pairs of devices; over hosts.
        (range(8), (0, 0, 0, 0, 1, 1, 1, 1), {0: Share(0, 2, (0, 1)), 1: Share(1, 2, (0, 1))}),
        (
            (0, 0, 1, 1, 2, 2, 3, 3),
            (0, 0, 0, 0, 1, 1, 1, 1),
            {0: Share(0, 2, (0, 1)), 1: Share(1, 2, (0, 1))},
        ),
        # A row on every device of both.
        ((0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1), {0: Share(0, 1, (0,)), 1: Share(0, 1, (0,))}),
        # Four hosts of two devices, a row spread over two hosts.
        (
            (0, 0, 0, 0, 1, 1, 1, 1),
            (0, 0, 1, 1, 2, 2, 3, 3),
            {1: Share(0, 2, (0, 2)), 2: Share(1, 2, (0, 2)), 3: Share(1, 2, (0, 2))},
        ),
        # Hosts in another order than their parts.
        (range(4), (1, 1, 0, 0), {0: Share(1, 2, (1, 0)), 1: Share(0, 2, (1, 0))}),
    ],
)
def test_shares(rows, processes, expected, process):
    for index, found in expected.items():
        process(index)
        assert hosts.share(Place(tuple(rows), processes)) == found
        assert found.leads == (index in found.leaders)


@pytest.mark.parametrize(
    ("rows", "processes"),
    [(range(4), (0, 1, 0, 1)), (range(4), (0, 0, 0, 1)), ((0, 0, 1, 1), (0, 1, 1, 1))],
)
def test_rows_that_are_not_one_run_a_process_are_refused(rows, processes, process):
    process(0)
    with pytest.raises(
        UserError, match="The mesh does not give every process contiguous rows of a batch"
    ):
        hosts.share(Place(tuple(rows), processes))


def test_the_rows_of_a_share():
    rows = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(Share(1, 3, (0, 1, 2)).part(rows), rows[2:4])
    np.testing.assert_array_equal(Share(0, 1, (0,)).part(rows), rows)


# One process.


def test_alone_everything_is_as_it_was():
    assert not hosts.is_distributed() and hosts.is_writer() and not hosts.connected()
    x = np.array([1 / 3, 2**60 + 1])
    np.testing.assert_array_equal(hosts.all_gather(x), x[None])
    assert hosts.any_process(True) is True and hosts.broadcast_flag(False) is False
    assert hosts.writer_first(lambda: 5) == 5 and connecting.leave(7) == 7
    tree = {"a": jax.numpy.ones(3)}
    assert hosts.fetch(tree) is tree
    mesh = sharding.make_mesh(sharding.MeshConfig())
    assert hosts.replicated(x, mesh) is x
    share = sharding.row_share(mesh)
    assert share == Share(0, 1, (0,)) and share.leads
    np.testing.assert_array_equal(share.gather(x), x)
    assert hosts.broadcast_json({"a": "é"}) == {"a": "é"}
    hosts.barrier("nobody")
    connecting.disconnect()


def test_one_of_several_that_was_not_told_is_stopped(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    hosts.share.cache_clear()
    with pytest.raises(
        UserError,
        match=r"This process is one of 4 on these devices; set PERL_JAX_HOSTS=auto on all of "
        r"them\.",
    ):
        hosts.share(sharding.batch_sharding(sharding.make_mesh(sharding.MeshConfig())))
    hosts.share.cache_clear()


def test_a_signal_that_comes_after_the_last_step_is_not_lost():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("as ever"))
    try:
        with hosts.Termination() as termination:
            assert not termination.asked()
            signal.raise_signal(signal.SIGTERM)
            assert termination.asked() and got == []
        assert got == ["as ever"]
    finally:
        signal.signal(signal.SIGTERM, before)


# Two processes.


def two_processes() -> None:
    """What each of two processes with two devices runs, by `python -m tests.runtime.test_hosts`."""
    connecting.connect("test", connecting.read_settings(os.environ))
    index, mesh = jax.process_index(), sharding.make_mesh(sharding.MeshConfig(fsdp=2))
    assert jax.device_count() == 4 and hosts.is_distributed() and hosts.is_writer() == (index == 0)
    exact = np.array([1 / 3, -0.0, np.nan, np.pi]) * (1 + index)
    np.testing.assert_array_equal(
        hosts.all_gather(exact), np.array([1 / 3, -0.0, np.nan, np.pi]) * np.array([[1], [2]])
    )
    np.testing.assert_array_equal(
        hosts.all_gather(np.asarray(2**60 + index)), [[2**60], [2**60 + 1]]
    )
    assert hosts.any_process(index == 1) and not hosts.any_process(False)
    assert hosts.broadcast_flag(index == 0) and not hosts.broadcast_flag(index == 1)
    # Of other lengths on the processes.
    assert hosts.broadcast_json({"a": [1, None, "é" * (1 + 7 * index)]}) == {"a": [1, None, "é"]}
    share = sharding.row_share(mesh)
    assert share == Share(index, 2, (0, 1)) and share.leads
    rows = np.arange(16).reshape(8, 2)
    batch = sharding.put_batch(share.part(rows), mesh)
    assert batch.shape == (8, 2) and not batch.is_fully_addressable
    np.testing.assert_array_equal(hosts.fetch(batch), rows)
    np.testing.assert_array_equal(share.gather(share.part(rows)), rows)
    np.testing.assert_array_equal(np.asarray(hosts.replicated(rows, mesh)), rows)
    spread = sharding.row_share(sharding.make_mesh(sharding.MeshConfig(tensor=4)))
    assert spread == Share(0, 1, (0,)) and spread.leads == (index == 0)
    np.testing.assert_array_equal(spread.gather(rows if index == 0 else 0 * rows), rows)
    made = pathlib.Path(sys.argv[2])
    assert hosts.writer_first(lambda: made.exists() or made.touch()) is (
        None if index == 0 else True
    )
    connecting.disconnect()
    assert not hosts.connected()


def damaged_checkpoints() -> None:
    """Two processes with two devices each, and three checkpoints of weights that all four devices
    share.

    Of step 5 process 1 alone cannot read its part; of step 4 the data cursor is another; step 3 is
    whole.
    """
    connecting.connect("test", connecting.read_settings(os.environ))
    folder, mesh = pathlib.Path(sys.argv[2]), sharding.make_mesh(sharding.MeshConfig(fsdp=4))
    whole, parts = sharding.replicated(mesh), jax.NamedSharding(mesh, jax.P("fsdp"))
    place = lambda array, sharding: jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )
    kernel = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

    def state(step: int) -> TrainState:
        roles = {
            "policy": Adapter(
                weights={
                    "kernel": place(kernel + step, parts),
                    "scale": place(kernel[0] + step, whole),
                }
            )
        }
        return TrainState(
            place(np.int32(step), whole), roles, {}, {}, place(np.zeros(2, np.uint32), whole)
        )

    checkpoints = Checkpoints(folder, keep=3)
    for step in (3, 4, 5):
        checkpoints.save(state(step), {"cursor": step})
    checkpoints.close()
    if hosts.is_writer():
        (folder / "4" / "host" / "metadata").write_text('{"cursor": 9}')
        written = [
            path
            for path in (folder / "5" / "state" / "ocdbt.process_1" / "d").iterdir()
            if path.stat().st_size > kernel.nbytes // 4
        ]
        assert written
        for path in written:
            path.unlink()
    hosts.barrier("damaged")
    again = Checkpoints(folder, keep=3)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    found, host = again.restore_newest(abstract)
    assert int(found.step) == 3 and host == {"cursor": 3}
    np.testing.assert_array_equal(hosts.fetch(found.roles["policy"].weights["kernel"]), kernel + 3)
    # All go on together from there.
    assert again.latest_step() == 3
    again.save(state(4), {"cursor": 4})
    assert int(again.restore(abstract)[0].step) == 4
    again.close()
    connecting.disconnect()


def slurm(index: int) -> dict[str, str]:
    """What Slurm says to each of two tasks of a step."""
    own = {"SLURM_PROCID": index, "SLURM_LOCALID": index}
    step = {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": 2,
        "SLURM_STEP_NUM_NODES": 1,
    }
    return {name: str(value) for name, value in {**own, **step}.items()}


def run_two(part: Callable[[], None], folder: pathlib.Path, cluster: str = "explicit") -> list[str]:
    """What two processes print that run a part of this file; both must end well."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    flags = {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT), "PERL_JAX_HEARTBEAT_SECONDS": "10"}
    processes, printed = [], []
    try:
        for index in range(2):
            explicit = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            chosen = (
                explicit
                if cluster == "explicit"
                else {"PERL_JAX_HOSTS": "auto", "JAX_COORDINATOR_PORT": port, **slurm(index)}
            )
            line = [sys.executable, "-m", "tests.runtime.test_hosts", part.__name__, str(folder)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(
                subprocess.Popen(line, cwd=ROOT, env={**os.environ, **flags, **chosen}, **pipes)
            )
        for process in processes:
            printed.append(process.communicate(timeout=PATIENCE)[0])
            assert process.returncode == 0, printed[-1][-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return printed


@pytest.mark.parametrize(
    "cluster", [pytest.param("explicit"), pytest.param("auto", marks=pytest.mark.slow)]
)
def test_two_processes_meet(cluster, tmp_path):
    run_two(two_processes, tmp_path / "made", cluster)


@pytest.mark.exhaustive
def test_two_processes_go_on_from_the_same_whole_checkpoint(tmp_path):
    """One alone cannot read the newest; that of both is what both leave, and one says so."""
    first, second = run_two(damaged_checkpoints, tmp_path / "checkpoints")
    said = [line for line in first.splitlines() if "It is removed" in line]
    assert [line.partition(" in ")[0] for line in said] == [
        "The checkpoint of step 5",
        "The checkpoint of step 4",
    ]
    assert "(another process cannot read its part)" in said[0] and "(its data cursor)" in said[1]
    assert (
        all(line.endswith("and the run goes on from step 3.") for line in said)
        and "It is removed" not in second
    )


if __name__ == "__main__":
    globals()[sys.argv[1]]()


# The loss of another process, as JAX 0.10 says it: collected from survivors of killed processes,
# and from the messages in jaxlib.
LOSSES = (
    (
        jax.errors.JaxRuntimeError,
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
        "Connection closed by peer [127.0.0.1]:35220",
    ),
    (
        jax.errors.JaxRuntimeError,
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read "
        "error [127.0.0.1]:15788: Connection reset by peer",
    ),
    (
        jax.errors.JaxRuntimeError,
        "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: [external/gloo/gloo/"
        "transport/tcp/buffer.cc:72] Timed out waiting 30000ms for send operation to complete",
    ),
    (
        ValueError,
        "UNKNOWN: Gloo context initialization failed: [external/gloo/gloo/transport/tcp/pair."
        "cc:144] Connection closed by peer [127.0.0.1]:4002",
    ),
    (ValueError, "UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.0.0.2]:1"),
    (RuntimeError, "[external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    (RuntimeError, "Connection reset by peer [10.0.0.2]:4002"),
    (
        jax.errors.JaxRuntimeError,
        "DEADLINE_EXCEEDED: Barrier timed out. Id: b17::0. This usually happens because a task "
        "triggered the barrier too early or too slowly.",
    ),
    (
        jax.errors.JaxRuntimeError,
        "INTERNAL: Barrier failed because: The following tasks are unhealthy (stopped sending "
        "heartbeats)",
    ),
    (
        jax.errors.JaxRuntimeError,
        "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
        "preempted/died/restarted unexpectedly",
    ),
    (jax.errors.JaxRuntimeError, "UNAVAILABLE: Socket closed"),
    (
        jax.errors.JaxRuntimeError,
        "ABORTED: Leader incarnation ID mismatch: the coordination leader has restarted",
    ),
    (
        jax.errors.JaxRuntimeError,
        "DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/0/1 and duration: 20s",
    ),
    (RuntimeError, "CoordinationServiceAgent is in ERROR state"),
    (RuntimeError, "/job:jax_worker/replica:0/task:1 heartbeat timeout"),
)
OTHERS = (
    ValueError("operands could not be broadcast together with shapes (3,) (4,)"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes"),
    jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile"),
    ValueError("UNAVAILABLE: Error reading gs://b/x: HTTP 503 [tensorstore_spec='{}']"),
    ConnectionResetError(104, "Connection reset by peer"),
    BrokenPipeError(32, "Broken pipe"),
    TimeoutError("timed out"),
    UserError("template is 'gloo'; it must be auto, none, or a file."),
    KeyError("igloos"),
)


@pytest.mark.parametrize(("kind", "text"), LOSSES)
def test_the_loss_of_a_process_is_known_in_every_form(kind, text):
    lost = kind(text)
    assert hosts.is_peer_failure(lost)
    # Beneath another error, as its cause, its context, or one of a group.
    for wrapped in (UserError("The tree in x is damaged."), ValueError("no restore"), OSError()):
        wrapped.__cause__ = lost
        assert hosts.is_peer_failure(wrapped)
    after = KeyError("x")
    after.__context__ = ValueError("y")
    after.__context__.__context__ = lost
    assert hosts.is_peer_failure(after)
    group = RuntimeError("several")
    group.exceptions = (ValueError("a"), lost)
    assert hosts.is_peer_failure(group)


@pytest.mark.parametrize("error", OTHERS, ids=[type(error).__name__ for error in OTHERS])
def test_other_errors_are_no_loss_of_a_process(error):
    assert not hosts.is_peer_failure(error)
    # An error that is its own context ends the search too.
    error.__context__ = ValueError("first")
    error.__context__.__context__ = error
    assert not hosts.is_peer_failure(error)


@pytest.mark.parametrize(
    ("error", "connected", "status", "said"),
    [
        (ValueError(LOSSES[3][1]), True, 1, connecting.LOST),
        (UserError("Wrong."), True, 2, "Wrong."),
        (UserError("Wrong."), False, 2, "Wrong."),
        (MemoryError(), False, 1, "out of memory (no memory is left)"),
        (OTHERS[1], False, 1, "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 68"),
    ],
)
def test_a_command_says_why_it_failed(error, connected, status, said, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "connected", lambda: connected)
    monkeypatch.setattr(connecting, "leave", lambda status: status)
    monkeypatch.setattr(command, "_command", lambda _: raised(error))
    assert command.main(["show", "x"]) == status
    assert f"perl-jax show: {said}" in capsys.readouterr().err


def raised(error: Exception):
    raise error


def test_an_unknown_error_of_a_process_alone_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command, "_command", lambda _: raised(KeyError("x")))
    with pytest.raises(KeyError):
        command.main(["show", "x"])
