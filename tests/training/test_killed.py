"""Jobs as processes, killed at moments drawn by a seed, run again to the end: nothing shows."""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from tests.training import tiny
from tests.training.processes import PATIENCE, ROOT, Limit, settings, steps_done
from tests.training.test_run import assert_same_runs
from tests.xla import xla_flags

STEPS = 24
SETTINGS = settings(steps=STEPS, batch_size=8, checkpoint_every=2)

pytestmark = pytest.mark.slow


def start(job: str, run: pathlib.Path, arguments: tuple[str, ...]) -> subprocess.Popen:
    """`perl-jax JOB` on one device; its output goes to a file beside the run."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "perl_jax", job, "--run", str(run), *arguments]
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)


def finish(process: subprocess.Popen, run: pathlib.Path) -> None:
    status = Limit([process], PATIENCE).wait(process)
    assert status == 0, pathlib.Path(f"{run}.log").read_text()[-3000:]


def kill_at(process: subprocess.Popen, run: pathlib.Path, step: int, delay: float) -> int:
    """SIGKILL a moment after the row of a step was written; returns the rows there were then."""
    while steps_done(run) < step and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    return steps_done(run)


@pytest.mark.parametrize("job", ["sft", "reward", "rl"])
def test_three_kills_leave_no_trace(job, jobs, tmp_path):
    model = tiny.open_model(jobs.base)
    arguments = ("--model", jobs.base, *SETTINGS)
    if job == "rl":
        # From a fresh adapter: one that goes on from an artefact has the artefact's dropout.
        arguments += ("--reward", str(jobs.reward), "--max-mismatch", "10")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(job, whole, arguments), whole)
    seed = {"sft": 1, "reward": 2, "rl": 3}[job]
    draw = random.Random(seed)
    moments = []
    for low, high in ((1, 7), (8, 14), (15, 21)):
        process = start(job, killed, arguments)
        step, delay = draw.randint(low, high), draw.uniform(0, 0.05)
        moments.append((step, round(delay, 3), kill_at(process, killed, step, delay)))
    # Shown when the test fails: (step waited for, seconds after it, rows written when it died).
    print(f"{job}, seed {seed}: killed at {moments}")
    assert not (killed / "cost.json").exists() and all(rows < STEPS for *_, rows in moments)
    finish(start(job, killed, arguments), killed)
    assert_same_runs(
        whole,
        killed,
        {"sft": ("policy",), "reward": ("reward",), "rl": ("policy", "value")}[job],
        model,
    )
    assert [row["step"] for row in tiny.timeless(killed)] == list(range(1, STEPS + 1))
    if job == "reward":
        assert tiny.read(whole / "evaluation.json") == tiny.read(killed / "evaluation.json")
