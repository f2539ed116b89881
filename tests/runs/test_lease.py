"""Leases on objects of a bucket: one holder at a time, however one ends and whatever is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from perl_jax.runs import lease as lease_lib
from perl_jax.runs import owner
from perl_jax.runs.lease import Held, Lease
from perl_jax.runs.owner import FILE_NAME, InUse, Lost, owned
from perl_jax.runtime import files
from perl_jax.runtime.faults import FileError
from tests.runs.test_owner import start
from tests.training.processes import PATIENCE

RUN = "gs://bucket/runs/a"
NAME = f"runs/a/{FILE_NAME}"
ADDRESS = f"{RUN}/{FILE_NAME}"


def take(seconds: float = 60.0, **said) -> Lease:
    return Lease(files.path_of(ADDRESS), said, seconds)


def elsewhere(**said) -> None:
    """The object of a holder on another host, which is not renewed."""
    values = {"host": "other", "pid": 7, "command": "perl-jax rl", "since": "then", **said}
    files.write_json(files.path_of(ADDRESS), values)


def test_a_lease_is_renewed_and_ends_with_its_release(bucket):
    held = take(0.6, who="first")
    first = bucket.generation(NAME)
    with pytest.raises(Held) as error:
        take(0.6)
    assert error.value.said["who"] == "first" and error.value.said["pid"] == os.getpid()
    deadline = time.monotonic() + PATIENCE
    while bucket.generation(NAME) == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bucket.generation(NAME) > first and not held.is_lost()
    held.release()
    held.release()
    assert bucket.names() == []
    take().release()


def test_another_hosts_lease_is_taken_over_when_it_is_not_renewed(bucket, capsys):
    elsewhere()
    begin = time.monotonic()
    held = take(0.5)
    assert time.monotonic() - begin >= 0.5 and json.loads(bucket.read(NAME))["pid"] == os.getpid()
    assert "was held by process 7 on other: waiting" in capsys.readouterr().out
    held.release()


def test_another_hosts_lease_that_is_renewed_is_refused(bucket):
    elsewhere()
    renews = threading.Timer(0.2, elsewhere)
    renews.start()
    with pytest.raises(Held) as error:
        take(1.0)
    renews.join()
    assert error.value.said["host"] == "other"


def test_a_holder_that_lets_go_meanwhile_is_followed_at_once(bucket):
    elsewhere()
    ends = threading.Timer(0.2, files.remove, (files.path_of(ADDRESS),))
    ends.start()
    take(6.0).release()
    ends.join()


def test_a_lease_that_was_taken_over_is_lost(bucket):
    held = take(0.3)
    elsewhere()
    deadline = time.monotonic() + PATIENCE
    while not held.is_lost() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.is_lost()
    held.release()
    # It is the other one's.
    assert json.loads(bucket.read(NAME))["host"] == "other"


def test_a_lost_reply_is_not_a_lost_lease(bucket, monkeypatch):
    """Writes that arrive, and whose replies do not: the client tries again and finds its own."""
    write = lease_lib._write

    def write_twice(address, content, generation):
        write(address, content, generation)
        return write(address, content, generation)

    monkeypatch.setattr(lease_lib, "_write", write_twice)
    held = take(60.0)
    for _ in range(3):
        held._renew()
    assert not held.is_lost() and held._generation == bucket.generation(NAME)
    monkeypatch.undo()
    held._renew()
    assert not held.is_lost()
    held.release()
    assert bucket.names() == []


def test_a_bucket_out_of_reach_costs_no_lease_by_itself(bucket, monkeypatch):
    held = take(0.3)
    write = lease_lib._write

    def fail(*_):
        raise FileError("out of reach")

    monkeypatch.setattr(lease_lib, "_write", fail)
    time.sleep(0.5)
    with pytest.raises(FileError):
        held.is_lost()
    monkeypatch.setattr(lease_lib, "_write", write)
    # Nobody has taken it meanwhile.
    assert not held.is_lost()
    held.release()


def test_a_killed_process_of_this_host_is_followed_at_once(bucket):
    process = start(RUN)
    said = f"{RUN} is in use by perl-jax rl .process {process.pid} on"
    with pytest.raises(InUse, match=said), owned(RUN):
        pass
    process.send_signal(signal.SIGKILL)
    # It has not been asked for its status yet.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    begin = time.monotonic()
    with owned(RUN):
        assert json.loads(bucket.read(NAME))["pid"] == os.getpid()
        owner.check_held(files.path_of(RUN))
    process.wait(PATIENCE)
    assert time.monotonic() - begin < 30 and bucket.names() == []


def test_one_process_does_not_hold_an_address_twice(bucket):
    with owned(RUN):
        with pytest.raises(InUse, match=f"process {os.getpid()} on"), owned(RUN):
            pass
        with owned("gs://bucket/runs/b"):
            pass
        assert bucket.names() == [NAME]
    assert bucket.names() == []


def test_who_lost_a_folder_stops(bucket, monkeypatch):
    monkeypatch.setattr(lease_lib, "SECONDS", 0.3)
    with owned(RUN):
        elsewhere()
        held = owner._leases[RUN]
        deadline = time.monotonic() + PATIENCE
        while not held.is_lost() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(Lost, match=f"{RUN} was taken over by another command"):
            owner.check_held(files.path_of(RUN))
    assert json.loads(bucket.read(NAME))["host"] == "other"


def test_twelve_at_once_are_one(bucket):
    held, refused = [], []

    def run() -> None:
        try:
            held.append(take(60.0))
        except Held:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert (len(held), len(refused)) == (1, 11)
    held[0].release()
