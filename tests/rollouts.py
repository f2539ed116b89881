"""What an RL update is made of, without a folder or data: a placed model, a state, its programs."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from perl_jax.adapters.initial_values import init_head
from perl_jax.adapters.lora import Adapter
from perl_jax.data.config import DataConfig
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.models.language_model import LanguageModel
from perl_jax.rewards.scoring import Scorer, reward_program
from perl_jax.runtime import sharding, trees
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training import rl_programs, rl_step
from perl_jax.training.commands import RLCommand
from perl_jax.training.fit import initial_state
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import TrainState
from perl_jax.types import Prompts, Tree
from tests import small

EOS = 2
RECORD = Record(
    "reward", "lora", None, True, "tiny", "f", "t", 1, {}, score_mean=0.25, score_std=2.0
)
# Adam with an epsilon of 1 updates in proportion to the gradient: with a small one, rounding in a
# gradient near 0 would be blown up to the size of the rate.
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=0.05, epsilon=1.0)


def placed_model(
    lm: LanguageModel,
    base: Tree,
    mesh: MeshConfig = MeshConfig(data=1),
    devices: Sequence[jax.Device] | None = None,
) -> Model:
    """A model on a mesh (one device by default), its tokenizer only a set of ids."""
    devices = jax.devices()[:1] if devices is None else devices
    lm = dataclasses.replace(lm, mesh=sharding.make_mesh(mesh, devices=devices))
    shardings = lm.base_shardings()
    place = lambda name, leaf: jax.device_put(leaf, shardings[name])
    ends = {
        "stop_ids": (EOS,),
        "stop_part": (EOS,),
        "tail_ids": (),
        "without_end": lambda ids: [i for i in ids if i != EOS],
    }
    tokenizer = types.SimpleNamespace(
        **ends, pad_id=0, text=lambda ids, special=False: " ".join(map(str, ids))
    )
    return Model(
        "tiny",
        lm,
        trees.map_named(place, base),
        tokenizer,
        trees.fingerprint(base),
        shard_adapters=mesh.adapters == "sharded",
    )


def even_base(lm: LanguageModel, seed: int = 0) -> Tree:
    """Weights that keep activations at their size, so that rounding is not blown up on its way."""
    noise = np.random.default_rng(seed)

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if name.endswith("scale"):
            return np.ones(spec.shape, spec.dtype)
        inputs = spec.shape[-1] if name.endswith("embedding") else spec.shape[-2]
        return (noise.standard_normal(spec.shape) / inputs**0.5).astype(spec.dtype)

    return trees.map_named(leaf, lm.abstract_base())


def rl_config(**fields: Any) -> RLCommand:
    data = DataConfig(max_prompt_length=8, max_response_length=fields.pop("max_response", 6))
    return RLCommand(
        **{
            "run": "-",
            "model": "-",
            "reward": ("-",),
            "data": data,
            "optimizer": OPTIMIZER,
            "batch_size": 8,
            **fields,
        }
    )


def prompts(lm: LanguageModel = small.LM, seed: int = 0) -> Prompts:
    """Eight left-padded prompts of 2 to 8 tokens."""
    tokens = small.make_tokens(
        [("left", n) for n in (8, 2, 3, 8, 5, 6, 7, 4)], 8, seed, lm.config.vocab_size
    )
    return Prompts(tokens.tokens_BT, tokens.valid_BT, np.arange(8, dtype=np.int32))


class Rehearsal:
    """The RL job's own programs and update on given roles; `step()` makes one update."""

    def __init__(self, model: Model, policy: Adapter, reward: Adapter, config: RLCommand):
        self.model, self.config = model, config
        roles = {"policy": policy}
        if config.algorithm.rule.critic:
            roles["value"] = policy.replace(head=init_head(None, model.lm.config.width))
        optimizers = {name: make_optimizer(config.optimizer, 10, config.tuning) for name in roles}
        frozen = {"reward": reward} | (
            {"reference": policy} if config.kl.reference == "start" else {}
        )
        self.state: TrainState = initial_state(
            model, config, roles, optimizers, frozen, {"beta": config.kl.beta}
        )
        scores = reward_program(model, (RECORD,), config.combine, config.microbatches)
        self.programs = rl_programs.Programs(model, config, scores, self.state, optimizers)
        base = None if config.tuning == "full" else model.base
        scorer = Scorer(model, self.programs.reward, (), 1.0, None)
        task = types.SimpleNamespace(gold=None)
        job = rl_step.Rollouts(model, base, self.programs, scorer, task, None, config)
        self._advance = functools.partial(rl_step.advance, job)

    def step(self, batch: Prompts) -> dict[str, float]:
        """One update; returns its metrics."""
        self.state, metrics, _ = self._advance(self.state, batch)
        return metrics
