"""What experiments share: the commands of a whole job, run one after the other, and its report.

Every stage is a `perl-jax` command in a process of its own, printed as a user would type it: its
peak memory is then its own, and a killed experiment goes on where it was when started again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from perl_jax.evaluation.report import write_report
from perl_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command. name: its folder below the experiment's; tuning: lora, full, or none (a base);
    shown: in the report.
    """

    name: str
    job: str
    tuning: str
    arguments: tuple[str, ...]
    shown: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the report's first lines say."""

    title: str
    summary: str
    task: str
    hardware: str


def flags(**values: object) -> tuple[str, ...]:
    """`--data.task jsonl --steps 100` for data__task="jsonl", steps=100; several values for a list;
    None is left out.
    """
    out: list[str] = []
    for name, value in values.items():
        if value is not None:
            values_of = value if isinstance(value, (tuple, list)) else (value,)
            out += ["--" + name.replace("__", ".").replace("_", "-"), *map(str, values_of)]
    return tuple(out)


# For what experiments start from, such as small bases that are trained on the spot; the jobs that
# they compare take the commands' own defaults.
PRETRAINING = flags(
    optimizer__name="adamw",
    optimizer__schedule="linear",
    optimizer__warmup_steps=20,
    optimizer__b2=0.98,
    optimizer__learning_rate=3e-3,
)


def ensemble(
    name: str, tuning: str, arguments: tuple[str, ...], seed: int, members: int
) -> list[Stage]:
    """Reward models that differ by their seed alone, `name` the first one's folder, which the
    report shows.
    """
    folder = lambda member: name if member == 0 else f"{name}_{member}"
    return [
        Stage(
            folder(member),
            "reward",
            tuning,
            (*arguments, *flags(seed=seed + member)),
            shown=member == 0,
        )
        for member in range(members)
    ]


def artefacts(root: pathlib.Path, name: str, members: int) -> list[pathlib.Path]:
    """What `ensemble` leaves."""
    return [root / stage.name / "adapters/reward" for stage in ensemble(name, "", (), 0, members)]


def whole_job(
    root: pathlib.Path,
    tuning: str,
    *,
    common: tuple[str, ...],
    seed: int,
    sft: tuple[str, ...],
    reward: tuple[str, ...],
    rl: tuple[str, ...],
    evaluate: tuple[str, ...],
    reward_of: str = "lora",
    members: int = 1,
) -> list[Stage]:
    """SFT, reward, RL and evaluation of one tuning.

    Policies of both tunings are trained and measured against one reward model (`reward_of`'s), as
    in the paper: what differs between the columns is then the policy's tuning alone. members:
    reward models of as many seeds, whose mean score is the reward.
    """
    policy, model = (
        root / tuning / "sft/adapters/policy",
        artefacts(root, f"{reward_of}/reward", members),
    )
    common, of_reward = (*common, *flags(seed=seed)), common
    return [
        Stage(f"{tuning}/sft", "sft", tuning, (*common, "--tuning", tuning, *sft)),
        *ensemble(
            f"{tuning}/reward", tuning, (*of_reward, "--tuning", tuning, *reward), seed, members
        ),
        Stage(
            f"{tuning}/rl",
            "rl",
            tuning,
            (*common, "--tuning", tuning, *flags(policy=policy, reward=model), *rl),
        ),
        Stage(
            f"{tuning}/rl",
            "evaluate",
            tuning,
            (
                *common,
                *flags(policy=root / tuning / "rl/adapters/policy", baseline=policy, reward=model),
                *evaluate,
            ),
        ),
    ]


def run_stages(
    root: pathlib.Path,
    experiment: Experiment,
    stages: Sequence[Stage],
    finish: Callable[[], None] | None = None,
) -> int:
    """Runs the stages in order and writes the report; returns the first status that is not 0.

    finish: called after the last stage, before the report is written. Stages that finished before
    are left as they are by the commands themselves.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "experiment.json"
    seconds = files.read_json(path).get("stage_seconds", {}) if path.exists() else {}
    for index, stage in enumerate(stages, 1):
        command = ["perl-jax", stage.job, "--run", str(root / stage.name), *stage.arguments]
        print(f"\n[{index}/{len(stages)}] {shlex.join(command)}", flush=True)
        began = time.perf_counter()
        status = subprocess.run(
            [sys.executable, "-m", "perl_jax", *command[1:]], check=False
        ).returncode
        if status:
            print(
                f"{stage.job} of {stage.name} stopped with status {status}; the same command "
                "resumes.",
                file=sys.stderr,
            )
            return status
        key = f"{stage.name}:{stage.job}"
        # A stage that was already done comes back at once and must not overwrite its real time.
        seconds[key] = max(seconds.get(key, 0.0), time.perf_counter() - began)
        _write(path, experiment, stages[:index], seconds)
    if finish is not None:
        finish()
    page = write_report(root)
    total = sum(seconds.values())
    print(f"\nDone in {total / 60:.1f} minutes. Open {page} in a browser.")
    return 0


def _write(
    path: pathlib.Path, experiment: Experiment, stages: Sequence[Stage], seconds: dict[str, float]
) -> None:
    runs = [
        {"name": stage.name, "job": stage.job, "tuning": stage.tuning, "folder": stage.name}
        for stage in stages
        if stage.job != "evaluate" and stage.shown
    ]
    files.write_json(
        path,
        {
            **dataclasses.asdict(experiment),
            "command": shlex.join(["python", *sys.argv]),
            "seconds": sum(seconds.values()),
            "stage_seconds": seconds,
            "runs": runs,
        },
    )
