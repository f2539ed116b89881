"""The whole job on PERL's own released data: real dialogues, real thumbs.

Claim     On Taskmaster Coffee (TM-4) and Ticketing (TM-3), split so that no dialogue is on both
          sides, the whole job runs on a small base trained from dialogues (Coffee's; for Ticketing
          both), and reports whether its reward model ranks turns better than a bag-of-words
          regression, and whether RL raises the score of a judge trained on a disjoint part.
Command   python -m experiments.taskmaster.run --task coffee --tuning lora --data-dir PATH
          (PATH: a checkout of the Taskmaster repository;
          without --data-dir the data are downloaded; --model uses a model of yours as the base;
          Ticketing's numbers are without TM-3's 23,789 dialogues, on which a whole checkout would
          train base and SFT too: not run)
Hardware  2 CPU cores
Time      about 1 hour, 2 hours with three members
Numbers   coffee, adapters, the commands' default hyperparameters: test AUC 0.655 (0.556 to 0.764),
          bag of words 0.612 (difference -0.026 to +0.103); judge's win rate of RL over SFT 0.527
          (0.480 to 0.574), its mean score +0.054. Ticketing: test AUC 0.514 (0.436 to 0.607; 0.611
          and 0.608 with other seeds), win rate 0.524 (0.488 to 0.561); with --members 3 (RL of
          seeds 0, 1, 2) 0.548 (0.511 to 0.584), 0.514 (0.477 to 0.550), 0.542 (0.505 to 0.578).
          (The intervals of win rates took contexts for independent; this version's are over
          dialogues, and wider.) See docs/log/taskmaster.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import numpy as np

from experiments.stages import (
    PRETRAINING,
    Experiment,
    Stage,
    artefacts,
    ensemble,
    flags,
    run_stages,
    whole_job,
)
from experiments.taskmaster.bag_of_words import baseline
from perl_jax.data.config import DataConfig
from perl_jax.data.store import group_of
from perl_jax.data.tasks import get_task
from perl_jax.evaluation import statistics
from perl_jax.evaluation.report import formats
from perl_jax.runtime import files

LENGTHS = {"coffee": (320, 64), "ticketing": (448, 64)}
DATA = "experiments/taskmaster/data.py"
TASKS = {"coffee": f"{DATA}:COFFEE", "ticketing": f"{DATA}:TICKETING"}
# What the small base is trained on: the 138 contexts of ticketing's reward rows alone are learned
# by heart.
CORPORA = {"coffee": TASKS["coffee"], "ticketing": f"{DATA}:BOTH"}


def add_baseline(root: pathlib.Path, task: str, data_dir: str | None) -> None:
    """Adds the AUC of bag-of-words regressions to the evaluation of every reward model, for the
    report; prints them.

    Updates each `*/reward/evaluation.json` in place: `auc` of the reward model with its interval
    over dialogues, and `baselines`, the results of each regression with `auc_difference`.

    Args:
        root: The folder of the experiment.
        task: The task, PATH.py:NAME.
        data_dir: A local copy of upstream's repository; None downloads the data.
    """
    config = DataConfig(data_dir=data_dir)
    splits = {
        split: list(get_task(task).open("labels", split, config))
        for split in ("train", "validation", "test")
    }
    labels = np.asarray([row["label"] for row in splits["test"]])
    # Turns of one dialogue are not independent.
    dialogues = [group_of(row) for row in splits["test"]]
    views = {
        "bag of words, response": lambda row: row["response"],
        "bag of words, context and response": lambda row: row["prompt"] + row["response"],
    }
    results, scores = {}, {}
    for name, view in views.items():
        sides = [
            side
            for rows in splits.values()
            for side in ([view(row) for row in rows], [row["label"] for row in rows])
        ]
        results[name], scores[name] = baseline(*sides)
        results[name]["auc"] = dataclasses.asdict(
            statistics.auc_estimate(scores[name], labels, dialogues)
        )
    for path in sorted(root.glob("*/reward/evaluation.json")):
        model = np.asarray(files.read_json(path.parent / "scores.json")["score"])
        area = statistics.auc_estimate(model, labels, dialogues)
        against = {
            name: statistics.auc_difference(model, other, labels, dialogues)
            for name, other in scores.items()
        }
        rows = {
            name: values | {"auc_difference": dataclasses.asdict(against[name])}
            for name, values in results.items()
        }
        files.write_json(
            path, files.read_json(path) | {"auc": dataclasses.asdict(area), "baselines": rows}
        )
        print(
            f"{path.parent.parent.name} reward model: AUC {formats.interval(area)}, {area.n} "
            f"turns of {area.groups} dialogues"
        )
        for name, difference in against.items():
            print(
                f"  {name}: AUC {results[name]['auc']['value']:.3f}; reward model minus it "
                f"{formats.interval(difference, with_sign=True)}"
            )


def main() -> int:
    """Runs the experiment that the command line describes; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("coffee", "ticketing"), required=True)
    parser.add_argument(
        "--data-dir", help="a checkout of the Taskmaster repository; downloaded when left out"
    )
    parser.add_argument(
        "--model",
        help="a Hugging Face folder or hub name to use as the base instead of a small one",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        help="in tokens; default 320 for coffee and 448 for ticketing",
    )
    parser.add_argument("--run", help="folder of the experiment; default runs/taskmaster_TASK")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuning", choices=("lora", "full", "both"), default="both")
    parser.add_argument(
        "--members",
        type=int,
        default=1,
        help="reward models, and judges, of as many seeds: their mean scores are the reward, and "
        "judge",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    root = pathlib.Path(arguments.run or f"runs/taskmaster_{arguments.task}")
    steps = lambda n: max(2, round(n * arguments.scale))
    prompt, response = LENGTHS[arguments.task]
    prompt = arguments.max_prompt_length or prompt
    data = flags(data__task=task, data__data_dir=arguments.data_dir)
    model = arguments.model or root / "base" / "model"
    stages = []
    if arguments.model is None:
        shape = flags(width=192, ffn_width=512, layers=4, heads=6, kv_heads=3, vocab_size=2048)
        lengths = flags(data__max_prompt_length=prompt, data__max_response_length=response)
        training = flags(steps=steps(1000), batch_size=16, evaluate_every=100)
        corpus = flags(data__task=CORPORA[arguments.task], data__data_dir=arguments.data_dir)
        stages.append(
            Stage(
                "base",
                "base",
                "full",
                (*flags(model=model), *shape, *corpus, *lengths, *PRETRAINING, *training),
            )
        )
    lengths = flags(data__max_prompt_length=prompt, data__max_response_length=response)
    common = (*flags(model=model), *data, *lengths)

    train = lambda count, batch, **more: flags(steps=steps(count), batch_size=batch, **more)
    reward = lambda split: train(200, 16, evaluate_every=25, objective="pointwise", split=split)
    stages += ensemble(
        "judge/reward", "judge", (*common, *reward("judge")), arguments.seed, arguments.members
    )
    for tuning in ("lora", "full") if arguments.tuning == "both" else (arguments.tuning,):
        stages += whole_job(
            root,
            tuning,
            common=common,
            seed=arguments.seed,
            members=arguments.members,
            sft=train(120, 16, evaluate_every=40),
            reward=reward("train"),
            rl=train(100, 32, checkpoint_every=20),
            evaluate=flags(batch_size=32, judge=artefacts(root, "judge/reward", arguments.members)),
            reward_of="lora" if arguments.tuning == "both" else tuning,
        )
    name = {"coffee": "Taskmaster Coffee", "ticketing": "Taskmaster Ticketing"}[arguments.task]
    summary = (
        f"{name}: people marked single turns of an assistant with a thumb up or down. A reward "
        "model learns the thumbs, "
        "and a policy learns from the reward model; a second reward model, trained on dialogues "
        "that the first has not seen, judges."
    )
    experiment = Experiment(
        title=f"{name}: adapters against full tuning",
        summary=summary,
        task=f"taskmaster_{arguments.task}",
        hardware="2 CPU cores",
    )
    return run_stages(
        root, experiment, stages, finish=lambda: add_baseline(root, task, arguments.data_dir)
    )


if __name__ == "__main__":
    sys.exit(main())
