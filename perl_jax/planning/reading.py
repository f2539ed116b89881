"""The programs of commands that train nothing: evaluate, best-of, generate, score, export."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.evaluation import compare, score
from perl_jax.evaluation.best_of import BestOfConfig
from perl_jax.evaluation.compare import EvaluateConfig
from perl_jax.evaluation.score import ScoreConfig
from perl_jax.generation import programs
from perl_jax.generation.continuous import ContinuousSampler, Slots, rearranged
from perl_jax.generation.sampling import (
    Rollout,
    SamplingConfig,
    merges,
    moved_kernels,
    rounded_once,
)
from perl_jax.generation.text import GenerateConfig
from perl_jax.hub import artefacts
from perl_jax.hub.artefacts import Record
from perl_jax.hub.export import ExportConfig
from perl_jax.hub.model import Model, ModelOptions
from perl_jax.hub.verify import PROBE
from perl_jax.models.language_model import resting
from perl_jax.planning import starting
from perl_jax.planning.pieces import (
    Jitted,
    Piece,
    Planned,
    cache_of,
    flags,
    ids,
    in_place,
    key_data,
    placed,
    result,
    rows_of,
)
from perl_jax.rewards import scoring
from perl_jax.runtime import sharding, trees
from perl_jax.runtime.programs import Program
from perl_jax.types import Prompts, Tokens, Tree

# What a reward model's normalisation is does not change its program's size.
RECORD = Record(
    "reward", "lora", None, True, "planned", "-", "-", 0, {}, score_mean=0.0, score_std=1.0
)


@dataclasses.dataclass(frozen=True)
class Role:
    """What the artefacts that a command reads are: adapters of a size, or whole weights (lora
    None).
    """

    lora: LoRAConfig | None

    def shapes(self, model: Model, head: bool) -> Adapter:
        """An artefact as it is loaded: in float32, where roles live."""
        tuning = "full" if self.lora is None else "lora"
        return in_place(model, artefacts.abstract_adapter(model.lm, tuning, self.lora, head))


def plan_command(model: Model, config: ModelOptions, role: Role) -> Planned:
    """The programs of a command at its longest batch, then those of its start."""
    return {
        EvaluateConfig: _evaluate,
        BestOfConfig: _best_of,
        GenerateConfig: _generate,
        ScoreConfig: _score,
        ExportConfig: _export,
    }[type(config)](model, config, role)


def _planned(model: Model, roles: dict[str, Adapter], pieces: list[Piece]) -> Planned:
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
    room: int,
) -> tuple[list[Piece], Rollout]:
    """The programs of a sampler, and the shapes of its rollout."""
    columns = prompt + room
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
            (cache_of(model, number, prompt), cache_of(model, rows, room)),
            room - 1,
        )
    ], rollout


def _slots(
    model: Model, sampler: ContinuousSampler, policy: Adapter | None, base: Tree | None, prompt: int
) -> list[Piece]:
    """Continuous batching: prompts let into all slots at once, a chunk of decoding, half of the
    slots kept.
    """
    pieces, own, slots = [], None, sampler.slots
    if policy is not None and policy.weights is not None:
        weights = jax.eval_shape(lambda role: resting(role, model.lm.config.dtype).weights, policy)
        base, policy = (
            jax.tree.map(lambda spec, leaf: placed(spec, leaf.sharding), weights, policy.weights),
            None,
        )
        own = base
    elif merges(base, policy, sampler.config, sampler.TOKENS):
        # The copies are there beside the base, of its matrices' shapes, while responses are
        # sampled.
        own = {}
        for name, kernel in moved_kernels(base, policy).items():
            trees.insert(own, name, kernel)
        pieces, policy = [Piece(sampler.merge, (own, policy), None)], None
    elif policy is not None:
        policy = in_place(
            model, jax.eval_shape(lambda role: rounded_once(role, model.lm.config.dtype), policy)
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
    """The rows that are decoded, where `perl_jax.generation.continuous` keeps them."""
    keys = (None, sharding.BATCH_AXES, "tensor" if model.lm.split_heads else None, None, None)
    layers = lambda spec: placed(
        spec, sharding.fitting(model.mesh, spec.shape, *keys[: len(spec.shape)])
    )
    rows = lambda spec: placed(
        spec,
        sharding.fitting(
            model.mesh, spec.shape, sharding.BATCH_AXES, *[None] * (len(spec.shape) - 1)
        ),
    )
    found = rearranged(state, layers, rows)
    return found.replace(cache=found.cache.replace(step=_everywhere(model, state.cache.step)))


def _evaluate(model: Model, config: EvaluateConfig, role: Role) -> Planned:
    policy, reward = role.shapes(model, head=False), role.shapes(model, head=True)
    rewards = {scoring.role_name(index): reward for index in range(len(config.reward))}
    roles = {"policy": policy, "baseline": policy} | rewards
    prompt, room = config.data.max_prompt_length, config.data.max_response_length
    program = programs.sample_program(model, room, config.temperature, config.rollout)
    sampled, rollout = sampling(
        model, program, policy, model.base, config.batch_size, 1, prompt, room
    )
    logprobs = compare.logprob_program(model, config.temperature, room)
    pieces = [*sampled, Piece(logprobs, (model.base, policy, rollout.sequences), rollout)]
    return _planned(model, roles, pieces + _rewarded(model, config.combine, rewards, rollout))


def _rewarded(
    model: Model, combine: str, rewards: dict[str, Adapter], rollout: Tree
) -> list[Piece]:
    if not rewards:
        return []
    base = model.base if any(role.weights is None for role in rewards.values()) else None
    program = scoring.reward_program(model, (RECORD,) * len(rewards), combine)
    return [Piece(program, (base, list(rewards.values()), rollout.sequences), rollout)]


def _best_of(model: Model, config: BestOfConfig, role: Role) -> Planned:
    policy, reward = role.shapes(model, head=False), role.shapes(model, head=True)
    rewards = {scoring.role_name(index): reward for index in range(len(config.reward))}
    prompt, room = config.data.max_prompt_length, config.data.max_response_length
    shared = model.shared_prompts(config.batch_size, config.n)
    program = programs.sample_program(model, room, config.temperature, config.rollout, shared)
    base = model.base if policy.weights is None else None
    sampled, rollout = sampling(
        model, program, policy, base, config.batch_size, shared, prompt, room
    )
    return _planned(
        model,
        {"policy": policy} | rewards,
        [*sampled, *_rewarded(model, config.combine, rewards, rollout)],
    )


def _everywhere(model: Model, tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: placed(leaf, sharding.replicated(model.mesh)), tree)


def _generate(model: Model, config: GenerateConfig, role: Role) -> Planned:
    """config.prompt: stands for one of as many tokens as it has characters."""
    policy, columns, room = (
        role.shapes(model, head=False),
        len(config.prompt),
        config.max_new_tokens,
    )
    sampler: SamplingConfig = programs.sampling_config(
        model, room, config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    program = programs.batch_sampler(model, sampler, config.samples)
    prompts = _everywhere(
        model, Prompts(ids(1, columns), flags(1, columns), jax.ShapeDtypeStruct((1,), jnp.int32))
    )
    piece = Piece(
        program,
        (model.base, policy, prompts, key_data(model)),
        prompts,
        (cache_of(model, 1, columns), cache_of(model, config.samples, room)),
        room - 1,
    )
    return _planned(model, {"policy": policy}, [piece])


def _score(model: Model, config: ScoreConfig, role: Role) -> Planned:
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
    """Both bases are there: the model's, and the one that was written and read back."""
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
        (model.lm.logits, adapter.replace(head=None)),
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
