"""Jobs as several processes on one machine: the numbers of one, ends of every kind, other layouts
on resuming.

Tolerances: partial sums of a gradient are added within a process in one order, between processes by
gloo in another, so that numbers differ in their last bits, and grow apart as training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from perl_jax.cli import main as command
from perl_jax.errors import Interrupted, Stopped
from perl_jax.training import commands, loop
from perl_jax.training.configs import SFTConfig
from perl_jax.training.sft import train_sft
from tests.paths import ORDERS
from tests.training import tiny
from tests.training.processes import PATIENCE, ROOT, Limit, settings, steps_done
from tests.training.test_run import assert_same_runs, saved_state
from tests.xla import xla_flags

STEPS = 8
BATCH = 16
SETTINGS = settings("--optimizer.name", "adamw", steps=STEPS, batch_size=BATCH, checkpoint_every=3)
# What goes on from the jobs' policy has its dropout, which is none; a later option takes the place
# of an earlier one.
UNDROPPED = ("--lora.dropout", "0")
# And there is no adapter in full tuning.
FULL = ("--tuning", "full", "--lora.rank", "8", "--lora.dropout", "0")
HEARTBEAT = 10
# Within which the others end: heartbeats, and time for a busy machine to notice.
BOUND = 9 * HEARTBEAT
RULE = (
    '[{"kind": "length", "maximum": 3, "scale": 4}, {"kind": "regex", "pattern": "coffee|tea", '
    '"weight": 0.5}]'
)
LOST = "another process of this run was killed, failed or cannot be reached any more"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Started:
    """The processes of one run; what they print goes to files beside the run. arguments: of all, or
    of each.
    """

    def __init__(
        self,
        run: pathlib.Path,
        arguments: Sequence[str] | list[tuple[str, ...]],
        count: int,
        devices: int,
    ) -> None:
        shared = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROCESS"))
            },
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags(devices),
        }
        address = f"localhost:{free_port()}"
        together = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            # On a busy machine one may start much later than the other.
            "PERL_JAX_CONNECT_SECONDS": str(PATIENCE),
            "PERL_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
        }
        self.run, self.logs, self.processes = (
            run,
            [pathlib.Path(f"{run}.{index}.log") for index in range(count)],
            [],
        )
        for index, log in enumerate(self.logs):
            environment = (
                shared if count == 1 else {**shared, **together, "JAX_PROCESS_ID": str(index)}
            )
            with open(log, "wb") as file:
                line = [
                    sys.executable,
                    "-m",
                    "perl_jax",
                    *(arguments[index] if isinstance(arguments, list) else arguments),
                ]
                self.processes.append(
                    subprocess.Popen(line, env=environment, stdout=file, stderr=file, cwd=ROOT)
                )

    def printed(self, index: int = 0) -> str:
        return self.logs[index].read_text(errors="replace")

    def sentences(self, index: int = 0) -> list[str]:
        """What the command itself said; libraries say more."""
        return re.findall(r"^perl-jax \w.*$", self.printed(index), re.MULTILINE)

    def wait(
        self, status: int = 0, indices: Sequence[int] | None = None, seconds: float = PATIENCE
    ) -> None:
        """Until these (all) have ended with the status. seconds: of `Limit`."""
        limit = Limit(self.processes, seconds)
        for index in range(len(self.processes)) if indices is None else indices:
            found = limit.wait(self.processes[index])
            assert found == status, (
                f"process {index}: status {found}\n{self.printed(index)[-4000:]}"
            )

    def wait_for_step(self, step: int) -> None:
        """Until the row of a step is written."""
        limit = Limit(self.processes, PATIENCE)
        while steps_done(self.run) < step:
            assert not limit.passed() and self.processes[0].poll() is None, self.printed()[-4000:]
            time.sleep(0.005)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@contextlib.contextmanager
def running(processes: Started) -> Iterator[Started]:
    """None of them outlives the block."""
    try:
        yield processes
    finally:
        processes.end()


def started(
    job: str, run: pathlib.Path, arguments: Sequence[str], *, count: int = 2, devices: int = 4
):
    """`perl-jax JOB --run RUN ...` as so many processes with so many devices each, as a block."""
    return running(Started(run, (job, "--run", str(run), *arguments), count, devices))


def whole(job: str, run: pathlib.Path, arguments: Sequence[str], **layout: int) -> None:
    """A run from where it is to its end."""
    with started(job, run, arguments, **layout) as processes:
        processes.wait()


def assert_close_runs(
    left: pathlib.Path,
    right: pathlib.Path,
    *,
    relative: float,
    absolute: float,
    aside: Sequence[str] = (),
) -> None:
    """Metrics of every step, and the last checkpoint's leaves, each against its largest element."""
    rows = [tiny.timeless(run) for run in (left, right)]
    assert [list(row) for row in rows[0]] == [list(row) for row in rows[1]]
    states = [
        {name: leaf for name, leaf in saved_state(run).items() if not name.endswith(tuple(aside))}
        for run in (left, right)
    ]
    assert states[0].keys() == states[1].keys()
    metrics = {
        (row["step"], name): abs(row[name] - other[name]) / (absolute + relative * abs(row[name]))
        for row, other in zip(*rows, strict=True)
        for name in row
    }
    away = lambda one, other: (
        float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-30))
        if one.dtype.kind == "f"
        else float(np.any(one != other))
    )
    leaves = {
        name: away(leaf, states[1][name]) / (10 * relative) for name, leaf in states[0].items()
    }
    for kind, found in (("metric", metrics), ("leaf", leaves)):
        # Shown when a test fails, or by -rP: how much of what is allowed is used.
        worst = max(found, key=found.get)
        print(f"{kind} that is furthest away: {worst}, {found[worst]:.3f} of the tolerance")
        assert found[worst] <= 1


# The same numbers.


@pytest.fixture
def counting(tmp_path) -> tuple[str, pathlib.Path]:
    """Terms of a reward, one of them a function of the user's, and the file in which it counts what
    it scored.
    """
    counts, source = tmp_path / "counts", tmp_path / "mine.py"
    source.write_text(
        "def score(prompts, responses):\n"
        f"    open({str(counts)!r}, 'a').write('x' * len(responses))\n"
        "    return [len(response.split()) / 10 + len(prompt) % 7 / 30 for prompt, response in "
        "zip(prompts, responses)]\n"
    )
    return json.dumps(
        [
            {"kind": "length", "maximum": 3, "scale": 4},
            {"kind": "function", "function": f"{source}:score"},
        ]
    ), counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["sft", "full", "reward", "dpo", "grpo", "slots", "reinforce", "spread"]
)
def test_two_processes_give_the_numbers_of_one(job, jobs, counting, tmp_path):
    terms, counts = counting
    rl = ("--policy", str(jobs.policy), *UNDROPPED, "--max-mismatch", "10")
    two = ("--mesh.data", "2", "--mesh.fsdp", "1", "--mesh.tensor", "4")
    name, more = {
        "full": ("sft", (*FULL, "--mesh.fsdp", "8")),
        "grpo": ("rl", (*rl, "--algorithm.name", "grpo", "--terms", terms)),
        # Two prompts at a time of four; slots, packed rows and their microbatches divide over two
        # devices, and so do minibatches.
        "slots": (
            "rl",
            (
                *rl,
                *two,
                "--algorithm.name",
                "grpo",
                "--terms",
                terms,
                "--rollout.slots",
                "8",
                "--algorithm.minibatches",
                "2",
            ),
        ),
        "reinforce": ("rl", (*rl, "--reward", str(jobs.reward))),
        # Every row is on every device, and still its terms are computed once.
        "spread": (
            "rl",
            (
                *rl,
                "--algorithm.name",
                "ppo",
                "--reward",
                str(jobs.reward),
                "--terms",
                terms,
                "--mesh.tensor",
                "8",
                "--algorithm.minibatches",
                "2",
            ),
        ),
    }.get(job, (job, ()))
    for run, layout in (("one", {"count": 1, "devices": 8}), ("two", {"count": 2, "devices": 4})):
        counts.unlink(missing_ok=True)
        whole(name, tmp_path / run, ("--model", jobs.base, *SETTINGS, *more), **layout)
        # Each response once: those that are learned from, those to the 16 held-out prompts at steps
        # 4 and 8, and the first one to each prompt before the first step, in batches up to 8.
        shown = 2 * 16 * 4 + 8 if "grpo" in more else 2 * 16 + 16
        assert terms not in more or len(counts.read_text()) == STEPS * BATCH + shown
    # Comparisons leave the head's bias a gradient of rounding errors alone, which Adam blows up.
    aside = ("head/bias",) if job == "reward" else ()
    assert_close_runs(tmp_path / "one", tmp_path / "two", relative=1e-5, absolute=2e-6, aside=aside)
    memory = tiny.read(tmp_path / "two" / "cost.json")
    assert len(memory["peak_bytes_measured_by_process"]) == 2 and memory[
        "peak_bytes_measured"
    ] == max(memory["peak_bytes_measured_by_process"])


@pytest.mark.slow
def test_evaluation_and_best_of_n_see_all_rows(jobs, tmp_path):
    data = (
        "--data.task",
        ORDERS,
        "--data.train-size",
        "32",
        "--data.evaluation-size",
        "19",
        "--data.max-prompt-length",
        "8",
        "--data.max-response-length",
        "8",
    )
    common = (
        "--model",
        jobs.base,
        "--batch-size",
        "16",
        "--policy",
        str(jobs.tuned),
        "--reward",
        str(jobs.reward),
        *data,
    )
    for run, layout in (("one", {"count": 1, "devices": 8}), ("two", {"count": 2, "devices": 4})):
        whole("evaluate", tmp_path / run, common, **layout)
        arguments = (
            "best-of",
            *common,
            "--n",
            "4",
            "--terms",
            RULE,
            "--output",
            str(tmp_path / f"{run}.jsonl"),
        )
        with running(Started(tmp_path / f"best-{run}", arguments, **layout)) as processes:
            processes.wait()
    # No sum goes over processes here: they are the same to the last bit.
    for file in ("{}/evaluation_samples.jsonl", "{}.jsonl"):
        one, two = ((tmp_path / file.format(run)).read_text() for run in ("one", "two"))
        assert one == two and len(one.splitlines()) == (19 if "samples" in file else 32)
    one, two = (tiny.read(tmp_path / run / "evaluation.json") for run in ("one", "two"))
    assert one["policies"] == two["policies"] and one["win_rate"] == two["win_rate"]


# Other layouts on resuming.


LAYOUTS = {
    "8": {"count": 1, "devices": 8},
    "2": {"count": 1, "devices": 2},
    "2x4": {"count": 2, "devices": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("8", "2"), ("2x4", "8"), ("8", "2x4")])
def test_a_run_goes_on_in_another_layout(before, after, base, tmp_path):
    arguments = ("--model", base, *SETTINGS, *FULL, "--mesh.fsdp")
    width = {"8": "8", "2": "2", "2x4": "4"}
    whole("sft", tmp_path / "whole", (*arguments, width[before]), **LAYOUTS[before])
    with started(
        "sft", tmp_path / "moved", (*arguments, width[before]), **LAYOUTS[before]
    ) as processes:
        processes.wait_for_step(4)
        processes.processes[-1].send_signal(signal.SIGTERM)
        processes.wait(143)
    stopped = last_checkpoint(tmp_path / "moved")
    assert 4 <= stopped < STEPS and cursor(tmp_path / "moved")["grain"]["next_index"] == stopped
    whole("sft", tmp_path / "moved", (*arguments, width[after]), **LAYOUTS[after])
    assert cursor(tmp_path / "moved") == cursor(tmp_path / "whole")
    assert_close_runs(tmp_path / "whole", tmp_path / "moved", relative=1e-5, absolute=2e-6)


def last_checkpoint(run: pathlib.Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


def cursor(run: pathlib.Path) -> dict:
    """The data cursor of the last checkpoint."""
    return tiny.read(run / "checkpoints" / str(last_checkpoint(run)) / "host" / "metadata")[
        "cursor"
    ]


# Killed.


@pytest.mark.slow
@pytest.mark.parametrize(("job", "victim"), [("reward", 0), ("rl", 1)])
def test_a_killed_process_ends_the_others_and_leaves_no_trace(job, victim, jobs, tmp_path):
    arguments = ("--model", jobs.base, *SETTINGS)
    if job == "rl":
        arguments += (
            "--policy",
            str(jobs.policy),
            *UNDROPPED,
            "--max-mismatch",
            "10",
            "--terms",
            RULE,
            "--algorithm.name",
            "ppo",
            "--algorithm.epochs",
            "2",
        )
    whole(job, tmp_path / "whole", arguments, **LAYOUTS["2x4"])
    with started(job, tmp_path / "killed", arguments) as processes:
        processes.wait_for_step(4)
        processes.processes[victim].kill()
        processes.wait(1, [1 - victim], seconds=BOUND)
        assert [LOST in said for said in processes.sentences(1 - victim)] == [True]
    assert (
        not (tmp_path / "killed" / "cost.json").exists()
        and last_checkpoint(tmp_path / "killed") < STEPS
    )
    whole(job, tmp_path / "killed", arguments, **LAYOUTS["2x4"])
    roles = {"reward": ("reward",), "rl": ("policy", "value")}[job]
    assert_same_runs(tmp_path / "whole", tmp_path / "killed", roles, tiny.open_model(jobs.base))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6))
def test_a_process_killed_at_any_moment_is_named_by_the_other(seed, base, tmp_path):
    """From the connection on: while programs compile, in a step, in a checkpoint, at the end."""
    draw = random.Random(seed)
    victim, sent = draw.randrange(2), draw.choice([signal.SIGKILL, signal.SIGSEGV])
    arguments = ("--model", base, *SETTINGS, "--checkpoint-every", "1", "--steps", "40")
    with started("sft", tmp_path / "run", arguments) as processes:
        limit = Limit(processes.processes, PATIENCE)
        while not (tmp_path / "run").exists():
            assert not limit.passed()
            assert processes.processes[0].poll() is None, processes.printed()[-4000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 20))
        processes.processes[victim].send_signal(sent)
        processes.wait(1, [1 - victim], seconds=BOUND)
        assert [LOST in said for said in processes.sentences(1 - victim)] == [True]
        assert "Traceback" not in processes.printed(1 - victim)
        assert "this process failed" not in processes.printed(1 - victim)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_others(victim, base, tmp_path):
    # Its connections stay open: the others are inside a collective, and only heartbeats can tell.
    with started("sft", tmp_path / "run", ("--model", base, *SETTINGS)) as processes:
        processes.wait_for_step(2)
        processes.processes[victim].send_signal(signal.SIGSTOP)
        processes.wait(1, [1 - victim], seconds=BOUND)
        assert [LOST in said for said in processes.sentences(1 - victim)] == [True]


# Told to stop.


def test_sigterm_saves_the_step_and_the_same_command_goes_on(base, tmp_path):
    """Two processes, then one: the quick look at most of what this file is about."""
    arguments = ("--model", base, *SETTINGS)
    with started("sft", tmp_path / "run", arguments) as processes:
        processes.wait_for_step(2)
        processes.processes[1].send_signal(signal.SIGTERM)
        processes.wait(143)
        step = last_checkpoint(tmp_path / "run")
        said = (
            f"perl-jax sft: stopped by SIGTERM after step {step}, which is saved; the same "
            "command resumes from there."
        )
        assert processes.sentences(0) == processes.sentences(1) == [said]
    assert steps_done(tmp_path / "run") == step < STEPS
    whole("sft", tmp_path / "run", arguments, **LAYOUTS["8"])
    whole("sft", tmp_path / "whole", arguments, **LAYOUTS["8"])
    assert_close_runs(tmp_path / "whole", tmp_path / "run", relative=1e-5, absolute=2e-6)


@pytest.mark.slow
def test_sigterm_to_all_leaves_no_trace(jobs, tmp_path):
    arguments = (
        "--model",
        jobs.base,
        *SETTINGS,
        "--policy",
        str(jobs.policy),
        *UNDROPPED,
        "--max-mismatch",
        "10",
        "--reward",
        str(jobs.reward),
    )
    whole("rl", tmp_path / "whole", arguments, **LAYOUTS["2x4"])
    with started("rl", tmp_path / "parts", arguments) as processes:
        processes.wait_for_step(4)
        for process in processes.processes:
            process.send_signal(signal.SIGTERM)
        processes.wait(143)
    whole("rl", tmp_path / "parts", arguments, **LAYOUTS["2x4"])
    assert_same_runs(
        tmp_path / "whole", tmp_path / "parts", ("policy", "value"), tiny.open_model(jobs.base)
    )


def signal_at(patch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Sends this process signals in the middle of a step."""
    check = loop.check_finite

    def signalled(folder, at, metrics):
        for number in numbers if at == step else ():
            signal.raise_signal(number)
        check(folder, at, metrics)

    patch.setattr(loop, "check_finite", signalled)


def test_sigterm_in_one_process(base, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    commands.run_sft(tiny.sft_config(tmp_path / "whole", base))
    config = tiny.sft_config(tmp_path / "parts", base)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        patch.setattr(command, "_report", lambda _: commands.run_sft(config))
        assert command.main(["report", "x"]) == 143
    assert capsys.readouterr().err.endswith(
        "perl-jax report: stopped by SIGTERM after step 3, which is saved; the same command "
        "resumes from there.\n"
    )
    # Step 3 is no multiple of checkpoint_every.
    assert last_checkpoint(tmp_path / "parts") == 3 and signal.getsignal(signal.SIGTERM) == handler
    commands.run_sft(config)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", ("policy",), tiny.open_model(base))


@pytest.mark.parametrize(
    ("numbers", "error", "saved"),
    [
        # Another SIGTERM changes nothing, because clusters send several.
        ((signal.SIGTERM, signal.SIGTERM), Stopped, [1]),
        ((signal.SIGINT,), Interrupted, [1]),
        ((signal.SIGINT, signal.SIGTERM), Stopped, [1]),
        # Ctrl-C after either ends the run at once.
        ((signal.SIGTERM, signal.SIGINT), KeyboardInterrupt, []),
        ((signal.SIGINT, signal.SIGINT), KeyboardInterrupt, []),
    ],
)
def test_signals_save_the_step_and_ctrl_c_again_ends_it(
    numbers, error, saved, base, tmp_path, monkeypatch
):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_at(patch, 1, *numbers)
        with pytest.raises(error) as ended:
            commands.run_sft(tiny.sft_config(tmp_path / "run", base))
    assert ended.type is error
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    steps = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert [int(path.name) for path in steps] == saved


def test_ctrl_c_without_a_folder_is_that_of_python(base, monkeypatch):
    signal_at(monkeypatch, 1, signal.SIGINT)
    model, rows = tiny.open_model(base), [{"prompt": "a", "response": "b"}] * 8
    config = tiny.sft_config("-", base)
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    settings = {name: value for name, value in vars(config).items() if name in fields}
    with pytest.raises(KeyboardInterrupt) as ended:
        train_sft(model, rows, SFTConfig(**settings))
    assert ended.type is KeyboardInterrupt


def test_ctrl_c_on_one_of_two_processes_saves_the_step_of_both(base, tmp_path):
    arguments = ("--model", base, *SETTINGS)
    with started("sft", tmp_path / "run", arguments) as processes:
        processes.wait_for_step(2)
        processes.processes[0].send_signal(signal.SIGINT)
        processes.wait(130)
        step = last_checkpoint(tmp_path / "run")
        said = (
            f"perl-jax sft: stopped by Ctrl-C after step {step}, which is saved; the same command "
            "resumes from there."
        )
        first = "perl-jax sft: finishing and saving this step; Ctrl-C again ends at once."
        assert processes.sentences(0) == [first, said] and processes.sentences(1) == [said]
    assert steps_done(tmp_path / "run") == step < STEPS


# Refused.


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(base, tmp_path):
    settings = [
        ("sft", "--run", str(tmp_path / "run"), "--model", base, *SETTINGS, "--seed", seed)
        for seed in ("0", "1")
    ]
    with running(Started(tmp_path / "run", settings, 2, 4)) as processes:
        processes.wait(2, [1])
        assert processes.sentences(1) == [
            "perl-jax sft: This process has other settings than the first process of the run "
            "(seed is 1, there 0); give all of them the same command."
        ]
        processes.wait(1, [0], seconds=BOUND)
        assert [LOST in said for said in processes.sentences(0)] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_fellows_do_not_come_says_so(index, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PERL_JAX_CONNECT_SECONDS": "3",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    line = [sys.executable, "-m", "perl_jax", "sft", "--run", str(tmp_path / "run"), "--model", "m"]
    done = subprocess.run(
        line,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    address = environment["JAX_COORDINATOR_ADDRESS"]
    assert (
        done.returncode == 1
        and f"perl-jax sft: the processes of this run did not all meet at {address} within 3 s.\n"
        in done.stderr
    )
    assert not (tmp_path / "run").exists()
