"""The compiled programs of an RL step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.lora import Adapter
from perl_jax.generation.programs import sample_program
from perl_jax.hub.model import Model
from perl_jax.models import passes
from perl_jax.objectives import policy_gradient
from perl_jax.runtime import sharding
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.training.experience import assemble, experience_of, one_pass
from perl_jax.training.fit import learn_program
from perl_jax.training.optimizers import Optimizers
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.state import TrainState


class Programs:
    """The compiled programs of one RL step; None for a program that the algorithm does not need.

    Attributes:
        sample: (base, policy, prompts, key data) -> the rollout: samples responses.
        greedy: As `sample`: the greedy responses of a greedy baseline.
        reward: Scores responses with the reward models (`scoring.reward_program`).
        logprobs: (base, adapter or None, sequences) -> logp_BT, of the policy or of the reference.
        values: (base, critic, sequences) -> the critic's values, [B, T].
        assemble: Judged -> (input of the update, statistics) (`experience.assemble`).
        learn: (state, base, input of the update) -> (state, metrics); with several updates per
            rollout also the rows of each (`fit.learn_program`).
        refresh: policy -> a copy of it, the new reference.
        one_pass: Whether the update itself computes the policy's log-probabilities.

    Args:
        model: The base and its mesh.
        config: Settings of RL.
        reward: The program that scores responses; None: there are no reward models.
        state: The state of step 0; only its adapter settings, shapes and shardings are read.
        optimizers: One for each trained role, by name.
    """

    def __init__(
        self,
        model: Model,
        config: RLConfig,
        reward: Program | None,
        state: TrainState,
        optimizers: Optimizers,
    ):
        lm, algorithm = model.lm, config.algorithm
        max_response = config.data.max_response_length
        shared = model.shared_prompts(config.batch_size, algorithm.group)
        rows = sharding.batch_sharding(model.mesh)
        # The adapter's own settings count: it may come from an artefact.
        lora = state.roles["policy"].config
        self.one_pass = one_pass(config, model.row_parts, 0.0 if lora is None else lora.dropout)
        self.sample = sample_program(
            model, max_response, config.temperature, config.rollout, shared
        )
        self.greedy = (
            sample_program(model, max_response, 0.0, config.rollout)
            if algorithm.rule.greedy
            else None
        )
        self.reward = reward
        self.logprobs = Program(
            "logprobs",
            functools.partial(
                passes.logprobs_in_microbatches,
                lm,
                config.microbatches,
                temperature=config.temperature,
                max_response_length=max_response,
            ),
            out_shardings=rows,
            limit=SHAPES,
        )
        self.values = (
            Program(
                "values",
                functools.partial(passes.values_in_microbatches, lm, config.microbatches),
                out_shardings=rows,
                limit=SHAPES,
            )
            if algorithm.rule.advantage == "gae"
            else None
        )
        assembled = functools.partial(assemble, config, model.row_parts, self.one_pass)
        self.assemble = Program(
            "assemble",
            assembled,
            out_shardings=(rows, sharding.replicated(model.mesh)),
            limit=SHAPES,
        )
        objective = functools.partial(
            policy_gradient.policy_gradient_objective,
            lm,
            algorithm,
            config.temperature,
            config.estimator,
            max_response,
            experience_of=functools.partial(experience_of, config) if self.one_pass else None,
        )
        self.learn = learn_program(model, config, objective, state, optimizers, algorithm.updates)
        refreshed = functools.partial(_refreshed, lm.config.dtype)
        shardings = model.adapter_shardings(state.frozen.get("reference"))
        self.refresh = (
            Program("refresh", refreshed, out_shardings=shardings)
            if config.kl.refresh is not None
            else None
        )

    def by_name(self) -> dict[str, Program]:
        """Returns the programs that are not None, by name."""
        names = ("sample", "greedy", "reward", "logprobs", "values", "assemble", "learn", "refresh")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _refreshed(dtype: str, policy: Adapter) -> Adapter:
    """Returns a copy of the policy as a frozen role, in the dtype of frozen roles.

    Args:
        dtype: The dtype of the model's activations.
        policy: The policy.
    """
    return jax.tree.map(jnp.copy, cast_frozen_role(policy, dtype))
