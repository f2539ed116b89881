"""RL whose rewards come from outside: SIGTERM while they are awaited, and a term that fails."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from perl_jax.errors import Stopped, UserError, default_of
from perl_jax.training.commands import RLCommand, run_rl
from tests.rewards.servers import completion_bytes, reply_bytes, request_of, serving
from tests.training import tiny
from tests.training.processes import steps_done
from tests.training.test_run import assert_same_runs


def config(run: pathlib.Path, base: str, term: dict, **fields) -> RLCommand:
    """Four steps of eight responses; checkpoints only where the run is stopped."""
    settings = {
        "terms": json.dumps(term),
        "algorithm": "reinforce",
        "validation_prompts": 0,
        "evaluate_every": default_of(RLCommand, "evaluate_every"),
        "checkpoint_every": 100,
        "max_mismatch": 10.0,
    }
    return RLCommand(**tiny.common(run=str(run), model=base, **{**settings, **fields}))


def saved_steps(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


class Rater:
    """Rates a response by its length. Once a run has done so many steps, it is silent for a while:
    in the middle of a batch the process is told to stop.
    """

    def __init__(self) -> None:
        self.run, self.steps = pathlib.Path(), 10**9
        self.left, self.lock = 3, threading.Lock()

    def __call__(self, connection) -> None:
        request = request_of(connection)
        with self.lock:
            silent = steps_done(self.run) >= self.steps
            self.left -= silent
            left = self.left
        if silent and left < 0:
            if left == -1:
                os.kill(os.getpid(), signal.SIGTERM)
            connection.recv(1)
        connection.sendall(reply_bytes(completion_bytes(str(len(request) % 10))))


@pytest.mark.slow
def test_sigterm_while_the_judge_is_awaited_saves_the_step_before(base, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    rater = Rater()
    with serving(rater) as port:
        term = {"kind": "judge", "url": f"http://127.0.0.1:{port}/v1", "model": "m", "lowest": 0}
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        run_rl(config(whole, base, term))
        rater.run, rater.steps = stopped, 2  # in the middle of the third step
        begun = time.monotonic()
        with pytest.raises(Stopped) as caught:
            run_rl(config(stopped, base, term))
        assert time.monotonic() - begun < 50  # the judge's time-out is 60 s
        assert str(caught.value) == (
            "stopped by SIGTERM while rewards were awaited; the same command resumes from the last "
            "checkpoint."
        )
        assert saved_steps(stopped) == [2]
        rater.steps = 10**9
        run_rl(config(stopped, base, term))
    assert_same_runs(whole, stopped, ("policy",), tiny.open_model(base))


# Fails once, in the third step.
FAILS = """
import pathlib

HERE = pathlib.Path(__file__).parent

def score(prompts, responses):
    path = HERE / "run" / "metrics.jsonl"
    steps = len(path.read_text().splitlines()) if path.exists() else 0
    if steps == 2 and not (HERE / "failed").exists():
        (HERE / "failed").touch()
        raise ValueError("no more")
    return [float(len(response)) for response in responses]
"""


@pytest.mark.slow
def test_a_term_that_fails_ends_the_run_in_one_sentence_and_the_checkpoint_stays(base, tmp_path):
    (tmp_path / "mine.py").write_text(FAILS)
    term = {"kind": "function", "function": f"{tmp_path}/mine.py:score"}
    settings = config(tmp_path / "run", base, term, checkpoint_every=2)
    with pytest.raises(UserError) as caught:
        run_rl(settings)
    assert str(caught.value).startswith(f"The reward function {tmp_path}/mine.py:score raised")
    assert str(caught.value).count("\n") == 0
    assert saved_steps(tmp_path / "run") == [2]
    assert run_rl(settings).is_dir()
    assert [row["step"] for row in tiny.rows(tmp_path / "run")] == [1, 2, 3, 4]
