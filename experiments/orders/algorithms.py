"""Every policy gradient, and DPO, from one SFT adapter, with the default hyperparameters.

Claim     REINFORCE (with a learned and with a mean baseline), RLOO, ReMax, GRPO, Dr. GRPO, GSPO,
          PPO, DPO and IPO each raise the true (gold) reward of the orders task by adapters alone,
          over three seeds. Every setting but the number of steps is the command's default; two
          defaults (the floor of GRPO's deviation, DPO's beta) were set after a first round of these
          runs had failed without them.
Command   python -m experiments.orders.algorithms
Hardware  2 CPU cores
Time      45 minutes
Numbers   mean gains over 0.773: reinforce +0.142; reinforce-mean +0.136; rloo +0.135; remax +0.135;
          grpo +0.136; dr-grpo +0.132; gspo +0.136; ppo +0.143; dpo +0.145; ipo +0.149
          (runs/algorithms/table.md and algorithms.png are made by the command)
          The numbers are older than KTO, ORPO, online DPO and online IPO, which the command runs
          too.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.orders.quickstart import LENGTHS, TASK, base_stage
from experiments.stages import PRETRAINING, Stage, flags
from perl_jax.objectives.algorithms import ALGORITHMS
from perl_jax.objectives.preference import OBJECTIVES
from perl_jax.runs.metrics import read_metrics
from perl_jax.runtime import files

EPISODES = 64
SMOOTH = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one algorithm with one seed.

    Attributes:
        gold: Mean gold reward of the trained policy on the test prompts.
        start: That of the SFT policy.
        gain: The mean of the paired differences of the two.
        kl: The KL divergence of the trained policy from the SFT policy.
        seconds: Median time of a training step in seconds.
        curve: Mean gold reward of the rollouts at each step that measured it.
    """

    gold: float
    start: float
    gain: float
    kl: float
    seconds: float
    curve: tuple[float, ...]


def run(stage: Stage, root: pathlib.Path) -> None:
    """Prints a stage's command and runs it in a process of its own; a finished stage returns at
    once.

    Args:
        stage: The stage.
        root: The folder of the experiment.

    Raises:
        subprocess.CalledProcessError: The command fails.
    """
    command = ["perl-jax", stage.job, "--run", str(root / stage.name), *stage.arguments]
    print(f"\n{shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "perl_jax", *command[1:]], check=True)


def shared_stages(model: pathlib.Path, scale: float) -> list[Stage]:
    """Returns the stages that all runs start from: the base, one SFT adapter and one reward model.

    Args:
        model: The folder of the base model.
        scale: Multiplies the steps of each stage; at least 2 steps are left.
    """
    steps = lambda n: max(2, round(n * scale))
    train = lambda n, **more: (
        *flags(model=model),
        *TASK,
        *LENGTHS,
        *PRETRAINING,
        *flags(steps=steps(n), batch_size=32, **more),
    )
    return [
        base_stage(model, steps(600)),
        Stage("sft", "sft", "lora", train(100, evaluate_every=50)),
        Stage("reward", "reward", "lora", train(700, evaluate_every=100)),
    ]


def stages_of(
    name: str, seed: int, root: pathlib.Path, model: pathlib.Path, steps: int
) -> list[Stage]:
    """Returns the stages that train and evaluate one algorithm with one seed.

    Args:
        name: A key of `ALGORITHMS`, or a key of the preference objectives `OBJECTIVES`.
        seed: The seed of training.
        root: The folder of the experiment.
        model: The folder of the base model.
        steps: Training steps.
    """
    policy, reward = root / "sft/adapters/policy", root / "reward/adapters/reward"
    folder = f"{name}/{seed}"
    common = (*flags(model=model, seed=seed), *TASK, *LENGTHS)
    if name in OBJECTIVES:
        # As many comparisons or labels as the others have episodes.
        train = (
            "dpo",
            flags(policy=policy, loss=name, steps=steps, batch_size=EPISODES, evaluate_every=steps),
        )
    else:
        train = (
            "rl",
            flags(
                policy=policy,
                reward=reward,
                algorithm__name=name,
                steps=steps,
                batch_size=EPISODES,
                data__bucket_count=1,
            ),
        )
    measure = flags(
        policy=root / folder / "adapters/policy", baseline=policy, reward=reward, batch_size=128
    )
    return [
        Stage(folder, train[0], "lora", (*common, *train[1], *flags(checkpoint_every=steps))),
        Stage(
            f"{folder}/test", "evaluate", "lora", (*flags(model=model), *TASK, *LENGTHS, *measure)
        ),
    ]


def outcome(folder: pathlib.Path) -> Outcome:
    """Returns the results of a finished run, read from its `metrics.jsonl` and its evaluation.

    Args:
        folder: The run's folder.
    """
    found = files.read_json(folder / "test/evaluation.json")
    rows = read_metrics(folder / "metrics.jsonl")
    policies = found["policies"]
    return Outcome(
        gold=policies["rl"]["gold_reward"]["value"],
        start=policies["sft"]["gold_reward"]["value"],
        gain=found["gold_gain"]["value"],
        kl=policies["rl"]["kl"]["value"],
        seconds=float(np.median([row["time/step"] for row in rows])),
        curve=tuple(row["reward/gold"] for row in rows if "reward/gold" in row),
    )


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Returns a Markdown table: for each algorithm the means over seeds, and the gain with each
    seed.

    Args:
        outcomes: The outcomes of all seeds, by algorithm.
    """
    lines = [
        "| algorithm | gold reward, start | after | gain: mean (each seed) | KL to the start | s "
        "a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        mean = lambda field: float(np.mean([getattr(one, field) for one in found]))
        each = ", ".join(f"{one.gain:+.3f}" for one in found)
        lines.append(
            f"| {name} | {mean('start'):.3f} | {mean('gold'):.3f} | {mean('gain'):+.3f} ({each}) "
            f"| {mean('kl'):.2f} | {mean('seconds'):.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(outcomes: dict[str, list[Outcome]], path: pathlib.Path) -> None:
    """Writes a picture of the gold reward of the rollouts over steps, and of the gain on the test
    set, by algorithm.

    Args:
        outcomes: The outcomes of all seeds, by algorithm.
        path: The file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=[3, 2])
    names = list(outcomes)
    colours = {name: plt.get_cmap("tab20")(index) for index, name in enumerate(names)}
    for name, found in outcomes.items():
        curves = [one.curve for one in found if one.curve]
        if curves:
            mean = np.mean(curves, axis=0)
            window = min(SMOOTH, len(mean))
            smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
            left.plot(
                np.arange(window, len(mean) + 1),
                smooth,
                color=colours[name],
                label=name,
                linewidth=1.5,
            )
    left.set(
        xlabel="step (64 episodes each)",
        ylabel="gold reward of the rollouts",
        title=f"Mean of {len(found)} seeds, over {SMOOTH} steps",
    )
    left.legend(fontsize=8, ncols=2)
    for index, (name, found) in enumerate(outcomes.items()):
        right.barh(index, np.mean([one.gain for one in found]), color=colours[name], alpha=0.6)
        right.plot(
            [one.gain for one in found], [index] * len(found), "o", color="black", markersize=3
        )
    right.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlabel="gain in gold reward over the SFT policy, test prompts",
        title="Mean; dots: seeds",
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Runs the experiment that the command line describes, and prints and writes its table and
    picture; returns the exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=pathlib.Path,
        default=pathlib.Path("runs/algorithms"),
        help="folder of the experiment",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the steps of base, SFT and reward"
    )
    parser.add_argument("--only", nargs="*", default=[*ALGORITHMS, *OBJECTIVES], help="algorithms")
    arguments = parser.parse_args()
    root, model = arguments.run, arguments.run / "base" / "model"
    for stage in shared_stages(model, arguments.scale):
        run(stage, root)
    for seed in range(arguments.seeds):
        for name in arguments.only:
            for stage in stages_of(name, seed, root, model, arguments.steps):
                run(stage, root)
    outcomes = {
        name: [outcome(root / name / str(seed)) for seed in range(arguments.seeds)]
        for name in arguments.only
    }
    text = table(outcomes)
    files.write_atomically(root / "table.md", text)
    files.write_json(
        root / "outcomes.json",
        {name: [dataclasses.asdict(one) for one in found] for name, found in outcomes.items()},
    )
    plot(outcomes, root / "algorithms.png")
    print(f"\n{text}\n{root / 'table.md'}, {root / 'algorithms.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
