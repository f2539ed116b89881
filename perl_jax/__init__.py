"""Parameter-efficient RLHF in JAX: reward model and policy are LoRA adapters over one frozen base.

    import perl_jax as pj

    model = pj.load_model("Qwen/Qwen3-0.6B", dtype="bfloat16")
    sft = pj.train_sft(model, demonstrations, pj.SFTConfig(steps=200))

Names are imported when they are first used, so that `import perl_jax` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from perl_jax.adapters.lora import Adapter, LoRAConfig
    from perl_jax.adapters.quantise import QuantiseConfig
    from perl_jax.data.config import DataConfig
    from perl_jax.data.tasks import Task
    from perl_jax.errors import TrainingError, UserError
    from perl_jax.generation.config import RolloutConfig
    from perl_jax.generation.text import generate
    from perl_jax.hub.export import export_peft
    from perl_jax.hub.families import Family, register_family
    from perl_jax.hub.model import Model, load_model
    from perl_jax.objectives.algorithms import Algorithm, AlgorithmConfig, register_algorithm
    from perl_jax.rewards.models import RewardModel, reward
    from perl_jax.rewards.shaping import ShapingConfig
    from perl_jax.runtime.sharding import MeshConfig
    from perl_jax.training.configs import DPOConfig, RewardConfig, SFTConfig
    from perl_jax.training.dpo import train_dpo
    from perl_jax.training.optimizers import OptimizerConfig
    from perl_jax.training.reward import train_reward
    from perl_jax.training.rl import train_rl
    from perl_jax.training.rl_config import KLConfig, RLConfig
    from perl_jax.training.sft import train_sft
    from perl_jax.training.trained import Trained

# Public name -> the module that defines it. The imports above are for type checkers and editors.
_HOMES = {
    "Adapter": "adapters.lora",
    "Algorithm": "objectives.algorithms",
    "AlgorithmConfig": "objectives.algorithms",
    "DPOConfig": "training.configs",
    "DataConfig": "data.config",
    "Family": "hub.families",
    "KLConfig": "training.rl_config",
    "LoRAConfig": "adapters.lora",
    "MeshConfig": "runtime.sharding",
    "Model": "hub.model",
    "OptimizerConfig": "training.optimizers",
    "QuantiseConfig": "adapters.quantise",
    "RLConfig": "training.rl_config",
    "RewardConfig": "training.configs",
    "RewardModel": "rewards.models",
    "RolloutConfig": "generation.config",
    "SFTConfig": "training.configs",
    "ShapingConfig": "rewards.shaping",
    "Task": "data.tasks",
    "Trained": "training.trained",
    "TrainingError": "errors",
    "UserError": "errors",
    "export_peft": "hub.export",
    "generate": "generation.text",
    "load_model": "hub.model",
    "register_algorithm": "objectives.algorithms",
    "register_family": "hub.families",
    "reward": "rewards.models",
    "train_dpo": "training.dpo",
    "train_reward": "training.reward",
    "train_rl": "training.rl",
    "train_sft": "training.sft",
}

__all__ = [
    "Adapter",
    "Algorithm",
    "AlgorithmConfig",
    "DPOConfig",
    "DataConfig",
    "Family",
    "KLConfig",
    "LoRAConfig",
    "MeshConfig",
    "Model",
    "OptimizerConfig",
    "QuantiseConfig",
    "RLConfig",
    "RewardConfig",
    "RewardModel",
    "RolloutConfig",
    "SFTConfig",
    "ShapingConfig",
    "Task",
    "Trained",
    "TrainingError",
    "UserError",
    "__version__",
    "export_peft",
    "generate",
    "load_model",
    "register_algorithm",
    "register_family",
    "reward",
    "train_dpo",
    "train_reward",
    "train_rl",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'perl_jax' has no attribute {name!r}")
    value = vars(importlib.import_module(f"perl_jax.{_HOMES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
