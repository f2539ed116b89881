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

# Public name -> the module that defines it.
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

if TYPE_CHECKING:
    # The same names for type checkers and editors; a test compares these imports with `_HOMES`.
    # `X as X` marks a name as public.
    from perl_jax.adapters.lora import Adapter as Adapter
    from perl_jax.adapters.lora import LoRAConfig as LoRAConfig
    from perl_jax.adapters.quantise import QuantiseConfig as QuantiseConfig
    from perl_jax.data.config import DataConfig as DataConfig
    from perl_jax.data.tasks import Task as Task
    from perl_jax.errors import TrainingError as TrainingError
    from perl_jax.errors import UserError as UserError
    from perl_jax.generation.config import RolloutConfig as RolloutConfig
    from perl_jax.generation.text import generate as generate
    from perl_jax.hub.export import export_peft as export_peft
    from perl_jax.hub.families import Family as Family
    from perl_jax.hub.families import register_family as register_family
    from perl_jax.hub.model import Model as Model
    from perl_jax.hub.model import load_model as load_model
    from perl_jax.objectives.algorithms import Algorithm as Algorithm
    from perl_jax.objectives.algorithms import AlgorithmConfig as AlgorithmConfig
    from perl_jax.objectives.algorithms import register_algorithm as register_algorithm
    from perl_jax.rewards.models import RewardModel as RewardModel
    from perl_jax.rewards.models import reward as reward
    from perl_jax.rewards.shaping import ShapingConfig as ShapingConfig
    from perl_jax.runtime.sharding import MeshConfig as MeshConfig
    from perl_jax.training.configs import DPOConfig as DPOConfig
    from perl_jax.training.configs import RewardConfig as RewardConfig
    from perl_jax.training.configs import SFTConfig as SFTConfig
    from perl_jax.training.dpo import train_dpo as train_dpo
    from perl_jax.training.optimizers import OptimizerConfig as OptimizerConfig
    from perl_jax.training.reward import train_reward as train_reward
    from perl_jax.training.rl import train_rl as train_rl
    from perl_jax.training.rl_config import KLConfig as KLConfig
    from perl_jax.training.rl_config import RLConfig as RLConfig
    from perl_jax.training.sft import train_sft as train_sft
    from perl_jax.training.trained import Trained as Trained
else:
    __all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, and returns its value.

    Raises AttributeError for a name that is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'perl_jax' has no attribute {name!r}")
    value = vars(importlib.import_module(f"perl_jax.{_HOMES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return [*_HOMES, "__version__"]
