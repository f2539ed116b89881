"""A run's folder in a bucket: the same numbers as on a disk, however it is interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest

from perl_jax.errors import UserError
from perl_jax.runs import owner
from perl_jax.runs.owner import Lost, owned
from perl_jax.runtime import files
from perl_jax.training import commands
from tests.training import tiny
from tests.training.processes import PATIENCE, Limit, settings
from tests.training.test_hosts import Started
from tests.training.test_killed import finish, start
from tests.training.test_run import HARD, Interrupted, assert_same_runs, interrupt_at

RUN = "gs://bucket/runs/a"


def make(job: str, run, jobs) -> None:
    """A small run of a job in a folder or at an address."""
    if job == "sft":
        config = tiny.sft_config(pathlib.Path("x"), jobs.base, **HARD)
        commands.run_sft(dataclasses.replace(config, run=str(run)))
    elif job == "reward":
        config = tiny.reward_config(pathlib.Path("x"), jobs.base, **HARD)
        commands.run_reward(dataclasses.replace(config, run=str(run)))
    else:
        config = tiny.rl_config(
            pathlib.Path("x"), jobs.base, None, jobs.reward, max_mismatch=10.0, **HARD
        )
        commands.run_rl(dataclasses.replace(config, run=str(run)))


ROLES = {"sft": ("policy",), "reward": ("reward",), "rl": ("policy", "value")}


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


def names(folder: pathlib.Path) -> set[str]:
    """What a run's folder has, but for the folders of single steps and pieces of arrays."""
    return {path.name for path in folder.iterdir()} | {
        path.name for path in (folder / "adapters").iterdir()
    }


@pytest.mark.parametrize(
    "job",
    [
        pytest.param("sft", marks=pytest.mark.slow),
        pytest.param("reward", marks=pytest.mark.exhaustive),
        pytest.param("rl", marks=pytest.mark.exhaustive),
    ],
)
def test_an_interrupted_run_in_a_bucket_is_that_of_a_disk(
    job, jobs, model, tmp_path, monkeypatch, bucket
):
    make(job, tmp_path / "disk", jobs)
    for step in (3, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                make(job, RUN, jobs)
    make(job, RUN, jobs)
    # Finished: it is left as it is.
    before = dict(bucket.storage.objects["bucket"])
    make(job, RUN, jobs)
    assert bucket.storage.objects["bucket"] == before
    found = bucket.download("runs/a", tmp_path / "bucket")
    assert_same_runs(tmp_path / "disk", found, ROLES[job], model)
    # The first interruption was before any checkpoint, or at one.
    assert names(found) - {"metrics.previous.jsonl", "samples.previous.jsonl"} == names(
        tmp_path / "disk"
    )


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_copied_to(jobs, model, tmp_path, monkeypatch, bucket):
    """On a disk, in a bucket, and on a disk again."""
    make("sft", tmp_path / "whole", jobs)
    for step, where, to in ((4, tmp_path / "first", RUN), (6, RUN, tmp_path / "last")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                make("sft", where, jobs)
        if to == RUN:
            bucket.upload(where, "runs/a")
        else:
            bucket.download("runs/a", to)
    # Rows that wait in parts are read on a disk too: the run stopped before it merged them.
    make("sft", tmp_path / "last", jobs)
    assert_same_runs(tmp_path / "whole", tmp_path / "last", ("policy",), model)


def test_a_run_that_lost_its_folder_stops_at_the_next_step(jobs, monkeypatch, bucket):
    written = []

    def lose(folder):
        if bucket.names("runs/a/checkpoints/2/commit_success"):
            monkeypatch.setattr(owner._leases[RUN], "_lost", True)
            written[:] = bucket.names()
        check(folder)

    check = owner.check_held
    monkeypatch.setattr(owner, "check_held", lose)
    with pytest.raises(Lost, match=f"{RUN} was taken over by another command"):
        make("sft", RUN, jobs)
    assert written and bucket.names() == written


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "credentials"), (403, "credentials"), (404, "there is no bucket nobody")],
)
def test_a_bucket_that_refuses_is_one_sentence(jobs, bucket, status, said):
    bucket.failing, bucket.status = 1.0, status
    run = "gs://nobody/runs/a" if status == 404 else RUN
    bucket.failing = 0.0 if status == 404 else 1.0
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        make("sft", run, jobs)
    text = str(error.value)
    assert text.startswith("gs://") and said in text and "\n" not in text
    assert time.monotonic() - begin < 20 and bucket.names() == []


STEPS = 16
SETTINGS = settings(steps=STEPS, batch_size=8, checkpoint_every=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("job", ["sft", "rl"])
def test_kills_faults_and_slow_answers_leave_no_trace(job, jobs, tmp_path, bucket):
    model = tiny.open_model(jobs.base)
    arguments = ("--model", jobs.base, *SETTINGS)
    if job == "rl":
        arguments += ("--reward", str(jobs.reward), "--max-mismatch", "10")
    (tmp_path / "logs").mkdir()
    whole, log = tmp_path / "whole", tmp_path / "logs" / "bucket"
    finish(start(job, whole, arguments), whole)
    draw, kills = random.Random(f"{job} in a bucket"), []
    # One request in twenty fails and is tried again, and each is late.
    bucket.failing, bucket.delay = 0.05, 0.005
    while len(kills) < 4:
        process = start(job, log, (*arguments, "--run", RUN))
        step = draw.randrange(1, STEPS)
        while process.poll() is None and not any(
            int(name.rpartition("/")[2].split(".")[0]) >= step
            for name in bucket.names("runs/a/metrics.jsonl.parts/")
        ):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.0))
        process.kill()
        process.wait()
        kills.append((step, len(bucket.names())))
    print(f"{job}: killed at {kills}")
    finish(start(job, log, (*arguments, "--run", RUN)), log)
    found = bucket.download("runs/a", tmp_path / "found")
    assert_same_runs(whole, found, ROLES[job], model)
    assert [row["step"] for row in tiny.timeless(found)] == list(range(1, STEPS + 1))
    assert json.loads((found / "config.json").read_text())["config"]["run"] == RUN
    assert not any("orbax-checkpoint-tmp" in name for name in bucket.names())
    assert not files.exists(f"{RUN}/{owner.FILE_NAME}")


@pytest.mark.exhaustive
def test_two_processes_in_a_bucket_give_the_numbers_of_a_disk(jobs, tmp_path, bucket):
    """Also after an end by SIGTERM; and a second command on the folder ends in every process."""
    arguments = ("sft", "--model", jobs.base, *SETTINGS, "--optimizer.name", "adamw")
    disk = (*arguments, "--run", str(tmp_path / "disk"))
    with owned(tmp_path / "disk"), processes(disk, tmp_path / "z") as refused:
        refused.wait(2)
        for index in range(2):
            (said,) = refused.sentences(index)
            assert f"perl-jax sft: {tmp_path}/disk is in use by" in said
    assert not (tmp_path / "disk").exists()
    with processes(disk, tmp_path / "a") as started:
        started.wait()
    address = (*arguments, "--run", RUN)
    with processes(address, tmp_path / "b") as started:
        wait_for_part(bucket, 2, started)
        # So that it lasts as long as the others need to start.
        bucket.delay = 0.2
        with processes(address, tmp_path / "c") as refused:
            refused.wait(2)
            for index in range(2):
                assert [
                    re.sub(r"process \d+ on .*UTC", "...", said)
                    for said in refused.sentences(index)
                ] == [
                    f"perl-jax sft: {RUN} is in use by perl-jax sft (...); wait until that ends, "
                    "or use another folder."
                ]
        bucket.delay = 0.0
        started.processes[1].send_signal(signal.SIGTERM)
        started.wait(143)
    with processes(address, tmp_path / "d") as started:
        started.wait()
    found = bucket.download("runs/a", tmp_path / "found")
    assert_same_runs(tmp_path / "disk", found, ("policy",), tiny.open_model(jobs.base))
    assert bucket.names("runs/a/owner") == []


@contextlib.contextmanager
def processes(arguments: tuple[str, ...], log: pathlib.Path) -> Iterator[Started]:
    """One run of two processes; ended at the end."""
    started = Started(log, arguments, 2, 1)
    try:
        yield started
    finally:
        started.end()


def wait_for_part(bucket, step: int, started: Started) -> None:
    """Until metrics up to a step are in the bucket."""
    limit = Limit(started.processes, PATIENCE)
    while not any(
        int(name.rpartition("/")[2].split(".")[0]) >= step
        for name in bucket.names("runs/a/metrics.jsonl.parts/")
    ):
        assert not limit.passed() and started.processes[0].poll() is None, started.printed()
        time.sleep(0.01)
