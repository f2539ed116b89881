"""Configs of jobs that take a second, and the chain of a whole experiment."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.data.config import DataConfig
from perl_jax.evaluation.compare import EvaluateConfig, run_evaluate
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, ModelOptions, load_model
from perl_jax.runs.metrics import read_metrics, without_timing
from perl_jax.training.base import BaseConfig
from perl_jax.training.commands import (
    RewardCommand,
    RLCommand,
    SFTCommand,
    run_reward,
    run_rl,
    run_sft,
)
from perl_jax.training.optimizers import OptimizerConfig
from tests.paths import ORDERS

# Nearly every prompt is longer than this, so that all batches have one length.
DATA = DataConfig(
    task=ORDERS, train_size=32, evaluation_size=16, max_prompt_length=8, max_response_length=8
)
# No two kinds of leaf have one shape: rank 5 is no size of the base.
COMMON = {
    "data": DATA,
    "lora": LoRAConfig(rank=5, alpha=10.0),
    "optimizer": OptimizerConfig(name="adamw", learning_rate=3e-3),
    "batch_size": 8,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "steps": 4,
}


def common(**fields: Any) -> dict[str, Any]:
    """COMMON and these fields; full tuning has no adapter to give a size."""
    return {
        name: value
        for name, value in COMMON.items()
        if name != "lora" or fields.get("tuning") != "full"
    } | fields


def base_config(run: pathlib.Path, model: pathlib.Path, **fields: Any) -> BaseConfig:
    # Positions enough for tests with longer rows.
    data = dataclasses.replace(DATA, max_prompt_length=40, max_response_length=24)
    shape = {"width": 16, "ffn_width": 24, "layers": 2, "heads": 2, "kv_heads": 1}
    return BaseConfig(
        **common(
            tuning="full",
            **{**shape, "data": data, "steps": 2, "run": str(run), "model": str(model), **fields},
        )
    )


def sft_config(run: pathlib.Path, base: str, **fields: Any) -> SFTCommand:
    return SFTCommand(**common(run=str(run), model=base, **fields))


def reward_config(run: pathlib.Path, base: str, **fields: Any) -> RewardCommand:
    return RewardCommand(**common(run=str(run), model=base, **fields))


def rl_config(
    run: pathlib.Path,
    base: str,
    policy: pathlib.Path | str | None,
    reward: pathlib.Path | str,
    **fields: Any,
) -> RLCommand:
    policy = None if policy is None else str(policy)
    return RLCommand(
        **common(
            **{"run": str(run), "model": base, "policy": policy, "reward": (str(reward),), **fields}
        )
    )


def evaluate_config(run: pathlib.Path, base: str, **fields: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{"run": str(run), "model": base, "data": DATA, "batch_size": 8, **fields}
    )


@dataclasses.dataclass(frozen=True)
class Jobs:
    """A finished chain: the folders of its runs, below `root`, and the model's."""

    root: pathlib.Path
    base: str
    policy: pathlib.Path
    reward: pathlib.Path
    tuned: pathlib.Path


def run_jobs(root: pathlib.Path, base: str, tuning: str, **fields: Any) -> Jobs:
    """sft, reward, rl and evaluate in folders of these names."""
    fields = {"tuning": tuning, **fields}
    policy = run_sft(sft_config(root / "sft", base, **fields))
    reward = run_reward(reward_config(root / "reward", base, **fields))
    tuned = run_rl(rl_config(root / "rl", base, policy, reward, **fields))
    run_evaluate(
        evaluate_config(
            root / "rl", base, policy=str(tuned), baseline=str(policy), reward=(str(reward),)
        )
    )
    return Jobs(root, base, policy, reward, tuned)


def open_model(base: str) -> Model:
    return load_model(ModelOptions(model=base))


def load(folder: pathlib.Path, model: Model) -> tuple[Adapter, Record]:
    """An artefact, whatever its role."""
    return model.load_role(folder)


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def timeless(run: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics without what depends on the clock."""
    return without_timing(rows(run))


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time and content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
    }
