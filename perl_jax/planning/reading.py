"""The programs of commands that train nothing but read artefacts: evaluate, best-of, generate,
score, export.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.evaluation import compare, score
from perl_jax.evaluation.best_of import BestOfConfig
from perl_jax.evaluation.compare import EvaluateConfig
from perl_jax.evaluation.score import ScoreConfig
from perl_jax.generation import programs
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.prepare import adapted_kernels, cast_pairs, should_merge
from perl_jax.generation.sampling import Rollout
from perl_jax.generation.slots import Slots, map_rows
from perl_jax.generation.text import GenerateConfig
from perl_jax.hub import artefacts
from perl_jax.hub.artefacts import Record
from perl_jax.hub.export import ExportConfig
from perl_jax.hub.model import Model, ModelOptions
from perl_jax.hub.verify import PROBE
from perl_jax.planning import starting
from perl_jax.planning.pieces import (
    Jitted,
    Piece,
    Planned,
    cache_of,
    flags,
    ids,
    key_data,
    placed,
    result,
    rows_of,
    with_role_shardings,
)
from perl_jax.rewards import scoring
from perl_jax.runtime import sharding
from perl_jax.runtime.programs import Program
from perl_jax.types import Prompts, Tokens, Tree

# A reward's record; its numbers do not change the size of the program.
RECORD = Record(
    "reward", "lora", None, True, "planned", "-", "-", 0, {}, score_mean=0.0, score_std=1.0
)


@dataclasses.dataclass(frozen=True)
class Role:
    """The artefacts that a command reads; all have the same tuning and configuration.

    Attributes:
        lora: The adapters' configuration; None for full weights.
    """

    lora: LoRAConfig | None

    def shapes(self, model: Model, head: bool) -> Adapter:
        """Returns the shapes of an artefact as loaded: float32, with shardings.

        Args:
            model: The planned model.
            head: Whether the artefact has a scalar head.
        """
        tuning = "full" if self.lora is None else "lora"
        return with_role_shardings(
            model, artefacts.abstract_adapter(model.lm, tuning, self.lora, head)
        )


def plan_command(model: Model, config: ModelOptions, role: Role) -> Planned:
    """Returns a command's programs at its longest batch, then those of its start.

    Args:
        model: The planned model.
        config: The command's config: evaluate, best-of, generate, score or export.
        role: The artefacts that the command reads.
    """
    return {
        EvaluateConfig: _evaluate,
        BestOfConfig: _best_of,
        GenerateConfig: _generate,
        ScoreConfig: _score,
        ExportConfig: _export,
    }[type(config)](model, config, role)


def _planned(model: Model, roles: dict[str, Adapter], pieces: list[Piece]) -> Planned:
    """Returns the plan of a command: its programs, then those of loading and of checksums.

    Args:
        model: The planned model.
        roles: The shapes of the artefacts that the command reads, by name.
        pieces: The command's own programs.
    """
    return Planned(
        {"base": model.base, "frozen roles": roles},
        (*pieces, *starting.loading(model), *starting.digests(roles)),
    )


def sampling(
    model: Model,
    program: Program | ContinuousSampler,
    policy: Adapter | None,
    base: Tree | None,
    rows: int,
    samples: int,
    prompt: int,
    response: int,
) -> tuple[list[Piece], Rollout]:
    """Returns (the programs of a sampler, the shapes of its rollout).

    Args:
        model: The planned model.
        program: The sampler, of whole batches or continuous.
        policy: The shapes of the policy; None is the base.
        base: The shapes of the base weights; None if the policy has its own.
        rows: Number of responses.
        samples: Number of responses that share one copy of their prompt; not used by a continuous
            sampler, which knows its own.
        prompt: The prompt's padded length in tokens.
        response: The response's padded length in tokens.
    """
    columns = prompt + response
    sequences = Tokens(ids(rows, columns), flags(rows, columns), flags(rows, columns))
    each = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    rollout = rows_of(
        model,
        Rollout(sequences, each(jnp.float32, rows, columns), each(bool, rows), each(jnp.int32)),
    )
    if isinstance(program, ContinuousSampler):
        return _slots(model, program, policy, base, prompt), rollout
    number = rows // samples
    prompts = rows_of(
        model, Prompts(ids(number, prompt), flags(number, prompt), each(jnp.int32, number))
    )
    args = (base, policy, prompts, key_data(model))
    return [
        Piece(
            program,
            args,
            prompts,
            (cache_of(model, number, prompt), cache_of(model, rows, response)),
            response - 1,
        )
    ], rollout


def _slots(
    model: Model, sampler: ContinuousSampler, policy: Adapter | None, base: Tree | None, prompt: int
) -> list[Piece]:
    """Returns the programs of continuous batching: merge the adapter if the sampler does so, make
    an empty cache, admit prompts to all slots, decode a chunk, move the unfinished rows into half
    of the slots.

    Args:
        model: The planned model.
        sampler: The sampler.
        policy: The shapes of the policy; None is the base.
        base: The shapes of the base weights; None if the policy has its own.
        prompt: The prompt's padded length in tokens.
    """
    pieces, own, slots = [], None, sampler.slots
    if policy is not None and policy.weights is not None:
        weights = jax.eval_shape(
            lambda role: cast_frozen_role(role, model.lm.config.dtype).weights, policy
        )
        base, policy = (
            jax.tree.map(lambda spec, leaf: placed(spec, leaf.sharding), weights, policy.weights),
            None,
        )
        own = base
    elif policy is not None and should_merge(base, policy, sampler.config, sampler.TOKENS):
        # Merged copies of the adapted matrices are held beside the base during sampling.
        own = adapted_kernels(base, policy)
        pieces, policy = [Piece(sampler.merge, (own, policy), None)], None
    elif policy is not None:
        policy = with_role_shardings(
            model, jax.eval_shape(lambda role: cast_pairs(role, model.lm.config.dtype), policy)
        )
    prompts = slots // sampler.samples
    number, key = _everywhere(model, jax.ShapeDtypeStruct((), jnp.int32)), key_data(model)
    let_in = _everywhere(
        model,
        (
            ids(prompts, prompt),
            flags(prompts, prompt),
            ids(prompts, sampler.samples),
            ids(prompts, sampler.samples),
        ),
    )
    first, stays = _everywhere(
        model, (ids(1, prompt), jax.ShapeDtypeStruct((slots // 2,), jnp.int32))
    )
    state = _slots_placed(model, result(sampler.vacant, base, policy, first))
    return [
        *pieces,
        Piece(sampler.vacant, (base, policy, first), own),
        Piece(sampler.admit, (base, policy, state, *let_in, key), (own, state)),
        Piece(sampler.decode, (base, policy, state, number, key), (own, state), loop=sampler.chunk),
        Piece(sampler.fewer, (state, stays), (own, state)),
    ]


def _slots_placed(model: Model, state: Slots) -> Slots:
    """Returns the shapes of continuous batching's state with the shardings that
    `perl_jax.generation.continuous` uses.

    Args:
        model: The planned model.
        state: The shapes of the state.
    """
    keys = (None, sharding.BATCH_AXES, "tensor" if model.lm.split_heads else None, None, None)
    layers = lambda spec: placed(
        spec, sharding.fitted_sharding(model.mesh, spec.shape, *keys[: len(spec.shape)])
    )
    rows = lambda spec: placed(
        spec,
        sharding.fitted_sharding(
            model.mesh, spec.shape, sharding.BATCH_AXES, *[None] * (len(spec.shape) - 1)
        ),
    )
    found = map_rows(state, layers, rows)
    cache = dataclasses.replace(found.cache, step=_everywhere(model, state.cache.step))
    return dataclasses.replace(found, cache=cache)


def _evaluate(model: Model, config: EvaluateConfig, role: Role) -> Planned:
    """Returns the plan of `evaluate`: sampling, log-probabilities and reward models.

    The policy and the baseline are planned as artefacts of the same size. The judge's reward models
    are not planned.
    """
    policy, reward = role.shapes(model, head=False), role.shapes(model, head=True)
    rewards = {scoring.role_name(index): reward for index in range(len(config.reward))}
    roles = {"policy": policy, "baseline": policy} | rewards
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    program = programs.sample_program(model, response, config.temperature, config.rollout)
    sampled, rollout = sampling(
        model, program, policy, model.base, config.batch_size, 1, prompt, response
    )
    logprobs = compare.logprob_program(model, config.temperature, response)
    pieces = [*sampled, Piece(logprobs, (model.base, policy, rollout.sequences), rollout)]
    return _planned(model, roles, pieces + _rewarded(model, config.combine, rewards, rollout))


def _rewarded(
    model: Model, combine: str, rewards: dict[str, Adapter], rollout: Tree
) -> list[Piece]:
    """Returns [the program that scores a rollout], or [] without reward models.

    Args:
        model: The planned model.
        combine: How several reward models' scores become one: mean or min.
        rewards: The shapes of the reward models, by role name.
        rollout: The shapes of the rollout.
    """
    if not rewards:
        return []
    base = model.base if any(role.weights is None for role in rewards.values()) else None
    program = scoring.reward_program(model, (RECORD,) * len(rewards), combine)
    return [Piece(program, (base, list(rewards.values()), rollout.sequences), rollout)]


def _best_of(model: Model, config: BestOfConfig, role: Role) -> Planned:
    """Returns the plan of `best-of`: sampling and reward models."""
    policy, reward = role.shapes(model, head=False), role.shapes(model, head=True)
    rewards = {scoring.role_name(index): reward for index in range(len(config.reward))}
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    shared = model.shared_prompts(config.batch_size, config.n)
    program = programs.sample_program(model, response, config.temperature, config.rollout, shared)
    base = model.base if policy.weights is None else None
    sampled, rollout = sampling(
        model, program, policy, base, config.batch_size, shared, prompt, response
    )
    return _planned(
        model,
        {"policy": policy} | rewards,
        [*sampled, *_rewarded(model, config.combine, rewards, rollout)],
    )


def _everywhere(model: Model, tree: Tree) -> Tree:
    """Returns the shapes of a tree, replicated over the mesh."""
    return jax.tree.map(lambda leaf: placed(leaf, sharding.replicated(model.mesh)), tree)


def _generate(model: Model, config: GenerateConfig, role: Role) -> Planned:
    """Returns the plan of `generate`; the prompt is planned with one token per character of
    `config.prompt`.
    """
    policy, columns, response = (
        role.shapes(model, head=False),
        len(config.prompt),
        config.max_new_tokens,
    )
    sampler: SamplingConfig = programs.sampling_config(
        model, response, config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    program = programs.batch_sampler(model, sampler, config.samples)
    prompts = _everywhere(
        model, Prompts(ids(1, columns), flags(1, columns), jax.ShapeDtypeStruct((1,), jnp.int32))
    )
    piece = Piece(
        program,
        (model.base, policy, prompts, key_data(model)),
        prompts,
        (cache_of(model, 1, columns), cache_of(model, config.samples, response)),
        response - 1,
    )
    return _planned(model, {"policy": policy}, [piece])


def _score(model: Model, config: ScoreConfig, role: Role) -> Planned:
    """Returns the plan of `score`."""
    adapter = role.shapes(model, head=True)
    rows, columns = config.batch_size, config.max_prompt_length + config.max_response_length
    tokens = rows_of(model, Tokens(ids(rows, columns), flags(rows, columns), flags(rows, columns)))
    return _planned(
        model,
        {"adapter": adapter},
        [
            Piece(
                score.measure_program(model.lm, config.temperature),
                (model.base, adapter, tokens),
                tokens,
            )
        ],
    )


def _export(model: Model, config: ExportConfig, role: Role) -> Planned:
    """Returns the plan of `export`, whose programs compare the export with the artefact.

    A merged export holds two bases on the devices: the model's and the one that is read back.

    Args:
        model: The planned model.
        config: The command's config.
        role: Gives the shapes of the exported adapter.
    """
    adapter = role.shapes(model, head=True)
    rows, columns = PROBE
    probe = _everywhere(
        model,
        (
            ids(rows, min(columns, model.lm.config.max_positions)),
            flags(rows, min(columns, model.lm.config.max_positions)),
        ),
    )
    own = (model.base, probe) if config.format == "merged" else probe
    pieces = []
    for function, read in (
        (model.lm.score, adapter),
        (model.lm.logits, dataclasses.replace(adapter, head=None)),
    ):
        pieces.append(
            Piece(Jitted(function.__name__, jax.jit(function)), (model.base, read, *probe), own)
        )
    if config.format == "merged":
        exact = dataclasses.replace(
            model.lm,
            config=dataclasses.replace(model.lm.config, dtype="float32", attention="plain"),
        )
        pieces.append(
            Piece(Jitted("hidden", jax.jit(exact.hidden)), (model.base, adapter, *probe), own)
        )
    return _planned(model, {"adapter": adapter}, pieces)
