"""A few steps of every kind of training, small enough to take seconds, whose metrics are kept in
metrics.json.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import pytest

from experiments.orders.language import vocabulary
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import of_task
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.model import ModelOptions, load_model
from perl_jax.hub.tokenizer import word_tokenizer
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.runs.metrics import read_metrics, without_timing
from perl_jax.runtime import sharding
from perl_jax.training.commands import (
    DPOCommand,
    RewardCommand,
    RLCommand,
    SFTCommand,
    run_dpo,
    run_reward,
    run_rl,
    run_sft,
)
from perl_jax.training.configs import RewardConfig
from perl_jax.training.optimizers import OptimizerConfig
from perl_jax.training.reward import train_reward
from tests import small
from tests.paths import ORDERS

FILE = pathlib.Path(__file__).with_name("metrics.json")
# Numbers of each step, by the name of the run.
Metrics = dict[str, list[dict[str, Any]]]


def make_base(folder: pathlib.Path) -> str:
    """Writes a small decoder, drawn by NumPy, with the words of the task `orders`; returns its
    folder.
    """
    tokenizer = word_tokenizer(vocabulary())
    words = -(-len(tokenizer) // 8) * 8
    config = ModelConfig(
        vocab_size=words,
        width=16,
        ffn_width=24,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        max_positions=64,
    )
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    hf_checkpoint.save_base(
        folder, config, small.make_base(LanguageModel(config)), tokenizer.token_ids()
    )
    return str(folder)


def run_all(root: pathlib.Path) -> Metrics:
    """SFT, reward models of comparisons and of labels, DPO and RL by two algorithms, on one device;
    returns their metrics but for those of the clock.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        )
        return _run_all(root)


def _run_all(root: pathlib.Path) -> Metrics:
    common = {
        "model": make_base(root / "base"),
        "data": DataConfig(
            task=ORDERS,
            train_size=32,
            evaluation_size=16,
            max_prompt_length=8,
            max_response_length=8,
        ),
        "lora": LoRAConfig(rank=4, alpha=8.0),
        "optimizer": OptimizerConfig(name="adamw", learning_rate=3e-3),
        "batch_size": 8,
        "evaluate_every": 2,
        "checkpoint_every": 4,
        "steps": 4,
    }
    policy = run_sft(SFTCommand(run=str(root / "sft"), **common))
    reward = run_reward(RewardCommand(run=str(root / "reward"), **common))
    run_dpo(DPOCommand(run=str(root / "dpo"), policy=str(policy), **common))
    for name in ("ppo", "rloo"):
        run_rl(
            RLCommand(
                run=str(root / name),
                policy=str(policy),
                reward=(str(reward),),
                algorithm=AlgorithmConfig(name=name),
                **common,
            )
        )
    found = {
        name: without_timing(read_metrics(root / name / "metrics.jsonl"))
        for name in ("sft", "reward", "dpo", "ppo", "rloo")
    }
    return found | {"labels": _labels(common)}


def _labels(common: dict[str, Any]) -> list[dict[str, Any]]:
    """Two steps of a reward model that learns from labels, without validation and a folder."""
    settings = {name: value for name, value in common.items() if name != "model"} | {"steps": 2}
    config = RewardConfig(objective="pointwise", **settings)
    rows = list(of_task(config.data, "labels", ("train",)).rows("train"))
    trained = train_reward(load_model(ModelOptions(model=common["model"])), rows, config)
    moments = {"score_mean": trained.record.score_mean, "score_std": trained.record.score_std}
    *steps, last = without_timing(trained.metrics)
    return [*steps, last | moments]


def read_file() -> Metrics:
    """The metrics that were kept."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def differences(found: Metrics, kept: Metrics, relative: float) -> list[str]:
    """A line for each number that is missing, new, or further than `relative` from the one that was
    kept.
    """
    lines = []
    for run in sorted(found.keys() | kept.keys()):
        mine, theirs = (
            {
                (row["step"], name): value
                for row in metrics.get(run, [])
                for name, value in row.items()
            }
            for metrics in (found, kept)
        )
        for step, name in sorted(mine.keys() | theirs.keys()):
            new, old = mine.get((step, name)), theirs.get((step, name))
            near = new == old or (
                isinstance(new, float)
                and isinstance(old, float)
                and abs(new - old) <= relative * max(abs(old), 1.0)
            )
            if not near:
                lines.append(f"{run}, step {step}, {name}: {new!r}, was {old!r}")
    return lines
