"""Options that a command would not read are refused by name, and pass where they are read. The
table of RL's own is in test_run.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.data.config import DataConfig
from perl_jax.errors import UserError
from perl_jax.evaluation.best_of import BestOfConfig
from perl_jax.evaluation.compare import EvaluateConfig
from perl_jax.evaluation.score import ScoreConfig
from perl_jax.generation.config import RolloutConfig
from perl_jax.generation.text import GenerateConfig
from perl_jax.hub.average import AverageConfig
from perl_jax.hub.export import ExportConfig
from perl_jax.hub.import_peft import ImportConfig
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.planning.config import PlanConfig
from perl_jax.rewards.judge import Judge
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training.base import BaseConfig, train_base
from perl_jax.training.commands import DPOCommand, RewardCommand, RLCommand, SFTCommand, run_sft
from perl_jax.training.rl_config import KLConfig
from tests.paths import ORDERS

# A value of each LoRA option that is not its default.
LORA = {
    "rank": 32,
    "alpha": 4.0,
    "targets": "q,v",
    "ranks": "q=4",
    "alphas": "q=4",
    "layers": "1-2",
    "rank_stabilised": True,
    "dora": True,
    "init": "pissa",
    "dropout": 0.1,
}
NEEDED: dict[type, dict[str, Any]] = {
    SFTCommand: {"run": "r", "model": "m"},
    RewardCommand: {"run": "r", "model": "m"},
    DPOCommand: {"run": "r", "model": "m"},
    RLCommand: {"run": "r", "model": "m", "reward": ("x",)},
    BaseConfig: {"run": "r", "model": "m"},
    EvaluateConfig: {"run": "r", "model": "m", "policy": "p", "reward": ("x",)},
    BestOfConfig: {"model": "m", "output": "o", "reward": ("x",)},
    GenerateConfig: {"model": "m", "prompt": "p"},
    ScoreConfig: {"model": "m", "input": "i"},
    ExportConfig: {"model": "m", "adapter": "a", "format": "peft", "to": "t"},
    ImportConfig: {"model": "m", "peft": "p", "to": "t"},
    AverageConfig: {"model": "m", "adapters": ("a",), "to": "t"},
    PlanConfig: {"job": "sft", "model": "m", "topology": "v5e:1x1"},
    Judge: {"url": "http://localhost:8000", "model": "m"},
}


def test_every_lora_option_has_a_value_here():
    assert set(LORA) == {field.name for field in dataclasses.fields(LoRAConfig)} - {"dtype"}


FULL = [
    (
        make,
        lambda name=name, value=value: {"lora": LoRAConfig(**{name: value}), "tuning": "full"},
        f"lora.{name} is {value!r}, which tuning full does not read; leave it out (tuning lora reads it).",
    )
    for name, value in LORA.items()
    for make in (SFTCommand, BaseConfig)
]
REFUSED: list[tuple[type, Callable[[], dict[str, Any]], str]] = [
    *FULL,
    *(
        (
            make,
            lambda: {"lora": LoRAConfig(rank=3), "tuning": "full"},
            "lora.rank is 3, which tuning full does not read",
        )
        for make in (RewardCommand, DPOCommand, RLCommand, PlanConfig)
    ),
    (
        SFTCommand,
        lambda: {"lora": LoRAConfig(rank=32, targets="q,v", ranks="q=4,v=2")},
        "lora.rank is 32, which no target has: lora.ranks names them all; leave it out.",
    ),
    (
        SFTCommand,
        lambda: {"lora": LoRAConfig(alpha=3.0, targets="q", alphas="q=4")},
        "lora.alpha is 3.0, which no target has: lora.alphas names them all; leave it out.",
    ),
    *(
        (
            make,
            lambda: {"mesh": MeshConfig(adapters="sharded"), "tuning": "full"},
            "mesh.adapters is 'sharded', which tuning full does not read",
        )
        for make in (SFTCommand, RewardCommand, DPOCommand, BaseConfig)
    ),
    (
        RLCommand,
        lambda: {
            "mesh": MeshConfig(adapters="sharded"),
            "tuning": "full",
            "reward": (),
            "terms": "[]",
        },
        "mesh.adapters is 'sharded', which tuning full does not read",
    ),
    (
        PlanConfig,
        lambda: {"adapters": "sharded", "tuning": "full"},
        "adapters is 'sharded', which tuning full does not read; leave it out (tuning lora, rl read it).",
    ),
    *(
        (
            make,
            lambda: {"remat": "full"},
            "remat is 'full', which " + name + " does not read; leave it out (training reads it).",
        )
        for name, make in {
            "evaluate": EvaluateConfig,
            "best-of": BestOfConfig,
            "generate": GenerateConfig,
            "score": ScoreConfig,
            "export": ExportConfig,
            "import": ImportConfig,
            "average": AverageConfig,
        }.items()
    ),
    *(
        (
            make,
            lambda: {"data": DataConfig(packing="off")},
            f"data.packing is 'off', which {name} does not read",
        )
        for name, make in {"evaluate": EvaluateConfig, "best-of": BestOfConfig}.items()
    ),
    *(
        (
            EvaluateConfig,
            lambda field=field, value=value: {
                "temperature": 0.0,
                "rollout": RolloutConfig(**{field: value}),
            },
            f"rollout.{field} is {value!r}, which temperature 0 (greedy) does not read; leave it out (a temperature above 0 reads it).",
        )
        for field, value in (("top_k", 5), ("top_p", 0.9))
    ),
    (
        EvaluateConfig,
        lambda: {"temperature": 0.0, "seed": 3},
        "seed is 3, which temperature 0 (greedy) does not read",
    ),
    *(
        (
            GenerateConfig,
            lambda field=field, value=value: {"temperature": 0.0, field: value},
            f"{field} is {value!r}, which temperature 0 (greedy) does not read",
        )
        for field, value in (("top_k", 5), ("top_p", 0.9), ("seed", 3))
    ),
    (
        BestOfConfig,
        lambda: {"rollout": RolloutConfig(adapters="merged")},
        "rollout.adapters is 'merged', which best-of without a policy does not read",
    ),
    (
        BaseConfig,
        lambda: {"quantise": QuantiseConfig("int8")},
        "quantise.kind is 'int8', which base does not read",
    ),
    (
        BaseConfig,
        lambda: {"data": DataConfig(template="none")},
        "data.template is 'none', which base does not read",
    ),
    (
        BaseConfig,
        lambda: {"data": DataConfig(template_date="2025-02-01")},
        "data.template_date is '2025-02-01', which base does not read",
    ),
    (
        RLCommand,
        lambda: {"rollout": RolloutConfig(adapters="merged"), "tuning": "full"},
        "rollout.adapters is 'merged', which tuning full does not read",
    ),
    (
        RLCommand,
        lambda: {"validation_prompts": 0, "evaluate_every": 7},
        "evaluate_every is 7, which rl without validation_prompts does not read",
    ),
    (
        RLCommand,
        lambda: {"kl": KLConfig(beta=0.0, whole_score=True)},
        "kl.whole_score is True, which nothing reads while kl.beta is 0; leave it out, or give kl.beta.",
    ),
    *(
        (
            RLCommand,
            lambda fields=fields: {"algorithm": AlgorithmConfig(**fields)},
            f"algorithm.{list(fields)[-1]} is {list(fields.values())[-1]!r}, which nothing reads in one update of each rollout: all ratios are 1 there; leave it out, or give algorithm.epochs or algorithm.minibatches.",
        )
        for fields in (
            {"name": "grpo", "clip": 0.1},
            {"name": "ppo", "clip_high": 0.3},
            {"name": "reinforce", "max_ratio": 3.0},
            {"name": "ppo", "value_clip": None},
        )
    ),
    (
        Judge,
        lambda: {"top_logprobs": 5},
        "judge.top_logprobs is 5, which mode number does not "
        "read; leave it out (mode expected reads it).",
    ),
]
READ: list[tuple[type, Callable[[], dict[str, Any]]]] = [
    *(
        (make, lambda: {"tuning": "full", "lora": LoRAConfig()})
        for make in (SFTCommand, RewardCommand, DPOCommand, RLCommand, BaseConfig, PlanConfig)
    ),
    (
        SFTCommand,
        lambda: {
            "lora": LoRAConfig(**{**LORA, "dora": False, "layers": "0"}),
            "remat": "full",
            "mesh": MeshConfig(adapters="sharded"),
        },
    ),
    (RLCommand, lambda: {"mesh": MeshConfig(adapters="sharded"), "tuning": "full"}),
    (DPOCommand, lambda: {"mesh": MeshConfig(adapters="sharded"), "tuning": "full", "policy": "p"}),
    (
        EvaluateConfig,
        lambda: {
            "seed": 3,
            "rollout": RolloutConfig(top_k=5, top_p=0.9, adapters="merged"),
            "data": DataConfig(template="none", template_date="2025-02-01"),
        },
    ),
    (EvaluateConfig, lambda: {"temperature": 0.0}),
    (GenerateConfig, lambda: {"seed": 3, "top_k": 5, "top_p": 0.9, "samples": 4}),
    (BestOfConfig, lambda: {"rollout": RolloutConfig(adapters="merged"), "policy": "p"}),
    (BaseConfig, lambda: {"vocab_size": 99, "data": DataConfig(task="jsonl", data_dir="d")}),
    (RLCommand, lambda: {"validation_prompts": 0}),
    # Stale samples: by further updates, by dropout, and perhaps by that of the adapter that is gone
    # on from.
    (
        RLCommand,
        lambda: {"algorithm": AlgorithmConfig("grpo", clip=0.1, clip_high=0.3, minibatches=2)},
    ),
    (
        RLCommand,
        lambda: {
            "algorithm": AlgorithmConfig("ppo", clip=0.1, value_clip=None),
            "lora": LoRAConfig(dropout=0.1),
        },
    ),
    (RLCommand, lambda: {"algorithm": AlgorithmConfig("reinforce", max_ratio=3.0), "policy": "p"}),
    (Judge, lambda: {"mode": "expected", "highest": 9.0, "top_logprobs": 5}),
]


@pytest.mark.parametrize(("make", "fields", "message"), REFUSED)
def test_options_that_nothing_reads_are_refused_by_name(make, fields, message):
    with pytest.raises(UserError) as error:
        make(**NEEDED[make] | fields())
    assert message in str(error.value)


@pytest.mark.parametrize(("make", "fields"), READ)
def test_options_that_are_read_are_taken(make, fields):
    values = fields()
    config = make(**NEEDED[make] | values)
    assert all(getattr(config, name) == value for name, value in values.items())


def test_a_closed_vocabulary_has_no_size(tmp_path):
    data = DataConfig(task=ORDERS)
    with pytest.raises(UserError) as error:
        train_base(BaseConfig(run=str(tmp_path / "r"), model="m", data=data, vocab_size=99))
    assert str(error.value) == (
        "vocab_size is 99, which the task orders, whose words are its vocabulary, does not read; "
        "leave it out (a task with any words reads it)."
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(), "The task jsonl needs --data.data-dir"),
        (DataConfig(data_dir="nowhere"), "There is no file or folder nowhere"),
        (DataConfig(task="chess"), "data.task is 'chess'; it must be jsonl"),
        (DataConfig(task=ORDERS, data_dir="d"), "data.data_dir is 'd', which the task orders"),
    ],
)
def test_rows_that_cannot_be_read_leave_no_folder(data, message, tmp_path):
    """The corrected command may use the folder: no run with other settings is in it."""
    with pytest.raises(UserError) as error:
        run_sft(SFTCommand(run=str(tmp_path / "run"), model="m", data=data))
    assert str(error.value).startswith(message)
    assert not (tmp_path / "run").exists()
