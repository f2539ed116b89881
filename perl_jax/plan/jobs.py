"""The programs that a job runs, over shapes with shardings instead of arrays.

They come from the functions that the jobs call, so that what is planned is what will run; only the
weights and the rows are missing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax import checkpoint, sharding, state as state_lib, steps, trees
from perl_jax.checkpoint import Record
from perl_jax.loops import policy_gradient, preference, supervised
from perl_jax.loops.experience import Judged
from perl_jax.loops.jobs import DPOConfig, JobConfig, RewardConfig, RLConfig, SFTConfig
from perl_jax.loops.model import Model
from perl_jax.lora import Adapter
from perl_jax.models.cache import own_room
from perl_jax.models.language_model import LanguageModel, resting
from perl_jax.programs import Program
from perl_jax.quantise import QuantiseConfig, quantise_leaf
from perl_jax.types import Pairs, Prompts, Tokens, Tree

# No program's size depends on which ids these are.
_TOKENIZER = types.SimpleNamespace(stop_ids=(1,), stop_part=(1,), tail_ids=(), pad_id=0)
_RECORD = Record("reward", "lora", None, True, "planned", "-", "-", 0, {}, score_mean=0.0, score_std=1.0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One program of a job.

    args: shapes with shardings. own: those of them that only this program holds (a batch, a rollout);
    the base and the state stay on the devices whatever runs. cache: keys and values inside it.
    loop: turns of a loop whose number depends on the data (the decode loop); None: there is none.
    """

    program: Program
    args: tuple
    own: Tree
    cache: Tree = None
    loop: int | None = None

    @property
    def name(self) -> str:
        return self.program.name


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job's programs and what stays on the devices: base, trained roles, frozen roles, optimizer."""

    resident: dict[str, Tree]
    pieces: tuple[Piece, ...]

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of one device by component."""
        return {name: device_bytes(tree) for name, tree in self.resident.items()}


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree on one device, by its leaves' shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * trees.bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def planned_model(lm: LanguageModel, name: str, quantise: QuantiseConfig, shard_adapters: bool) -> Model:
    """A model whose base is shapes with shardings."""
    places = lm.base_shardings()

    def leaf(path: str, spec: jax.ShapeDtypeStruct) -> Tree:
        held = jax.eval_shape(lambda kernel: quantise_leaf(path, kernel, quantise), spec)
        return jax.tree.map(lambda part: _placed(part, sharding.fitting(lm.mesh, part.shape, *places[path].spec)), held)

    base = trees.map_named(leaf, lm.abstract_base())
    return Model(name, lm, base, _TOKENIZER, "-", quantise, shard_adapters)


def plan_job(model: Model, config: JobConfig) -> Planned:
    """The job's programs at its longest batch."""
    return {SFTConfig: _sft, RewardConfig: _reward, DPOConfig: _dpo, RLConfig: _rl}[type(config)](model, config)


def _sft(model: Model, config: SFTConfig) -> Planned:
    return _supervised(model, config, supervised.SFT, {"policy": _role(model, config, head=False)})


def _reward(model: Model, config: RewardConfig) -> Planned:
    return _supervised(model, config, supervised.reward_job(config), {"reward": _role(model, config, head=True)})


def _dpo(model: Model, config: DPOConfig) -> Planned:
    role = _role(model, config, head=False)
    return _supervised(model, config, preference.job_of(config), {"policy": role}, {"reference": _resting(model, role)})


def _supervised(model: Model, config: JobConfig, job: supervised.Supervised, roles: dict[str, Adapter], frozen: dict[str, Adapter] | None = None) -> Planned:
    optimizers = {name: state_lib.make_optimizer(config.optimizer, config.steps, config.tuning, model.lm.config.width) for name in roles}
    state = _state(model, roles, optimizers, frozen or {})
    rows = batch = _rows(model, _batch(config, job.kind))
    program = supervised.learn_program(model, config, job, state, optimizers)
    base = _base(model, config)
    pieces = []
    if job.prepare is not None:
        both, reference = jax.eval_shape(steps.both_sides, batch), state.frozen["reference"]
        before = preference.reference_program(model.lm, config.microbatches)
        args = (None if reference.weights is not None else model.base, reference, _rows(model, both))
        pieces.append(Piece(before, args, args[2]))
        logp_BT = _rows(model, jax.ShapeDtypeStruct(batch.chosen.tokens_BT.shape, jnp.float32))
        batch = steps.Preferences(batch, logp_BT, logp_BT)
    pieces.append(Piece(program, (state, base, batch), batch))
    pieces.append(Piece(supervised.held_out_program(model, config, job), (state.roles, base, batch), batch))
    if job.role == "reward":
        adapter = state.roles["reward"]
        program = supervised.score_program(model.lm, config.microbatches)
        pieces.append(Piece(program, (None if adapter.weights is not None else model.base, adapter, rows), rows))
    return Planned(_resident(base, state), tuple(pieces))


def _rl(model: Model, config: RLConfig) -> Planned:
    """Samples, scores, log-probabilities (values) and the update; the reward model is of the same kind.

    The whole batch is decoded at once, which is the most that slots would hold.
    """
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=None))
    policy = _role(model, config, head=False)
    reward = _role(model, config, head=True)
    roles = {"policy": policy} | ({"value": reward} if config.algorithm.rule.critic else {})
    frozen = {"reward": _resting(model, reward)}
    if config.kl.reference == "start":
        frozen["reference"] = _resting(model, policy)
    optimizers = policy_gradient.make_optimizers(config, roles, model.lm.config.width)
    state = _state(model, roles, optimizers, frozen, {"beta": config.kl.beta})
    programs = policy_gradient.Programs(model, config, (_RECORD,), state, optimizers)
    base, batch = _base(model, config), config.batch_size
    prompt, room = config.data.max_prompt_length, config.data.max_response_length
    number = batch // model.shared_prompts(batch, config.algorithm.group)
    prompts = _rows(model, Prompts(_ids(number, prompt), _flags(number, prompt), jax.ShapeDtypeStruct((number,), np.int32)))
    key = _placed(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), sharding.replicated(model.mesh))
    rollout = _rows(model, _result(programs.sample, base, state.roles["policy"], prompts, key))
    pieces = [Piece(programs.sample, (base, state.roles["policy"], prompts, key), prompts, (_cache(model, number, prompt), _cache(model, batch, room)), room - 1)]
    sequences = rollout.sequences
    reading = lambda program, role, tree: Piece(program, (None if role.weights is not None else base, tree, sequences), rollout)
    pieces.append(reading(programs.reward, frozen["reward"], [state.frozen["reward"]]))
    before = not programs.one_pass or config.kl.reference != "none"
    if before:
        pieces.append(reading(programs.logprobs, policy, state.roles["policy"]))
    number_B = _rows(model, jax.ShapeDtypeStruct((batch,), jnp.float32))
    each_BT = _rows(model, jax.ShapeDtypeStruct((batch, prompt + room), jnp.float32))
    values_BT = None
    if programs.values is not None:
        pieces.append(reading(programs.values, reward, state.roles["value"]))
        values_BT = each_BT
    greedy = config.algorithm.rule.greedy
    judged = Judged(
        rollout, number_B, each_BT if before else None, state.controls["beta"],
        each_BT if config.kl.reference != "none" else None, np.bool_(True), values_BT,
        greedy=rollout if greedy else None, greedy_score_P=number_B if greedy else None,
    )  # fmt: skip
    experience = _rows(model, _result(programs.assemble, judged)[0])
    algorithm = config.algorithm
    orders_XY = _placed(_ids(algorithm.updates, batch // algorithm.minibatches), sharding.replicated(model.mesh))
    pieces.append(Piece(programs.learn, (state, base, experience, *([orders_XY] if algorithm.updates > 1 else [])), (rollout, experience)))
    return Planned(_resident(base, state), tuple(pieces))


# Shapes.


def _placed(spec: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)


def _rows(model: Model, tree: Tree) -> Tree:
    """Leaves split over rows; numbers are everywhere."""
    rows, whole = sharding.batch_sharding(model.mesh), sharding.replicated(model.mesh)
    return jax.tree.map(lambda leaf: _placed(leaf, rows if leaf.ndim else whole), tree)


def _result(program: Program, *args: Any) -> Tree:
    return program.trace(*args).out_info


def _ids(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), np.int32)


def _flags(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), bool)


def _batch(config: JobConfig, kind: str) -> Tree:
    """The longest batch of a kind of rows."""
    rows, columns = config.batch_size, config.data.max_prompt_length + config.data.max_response_length
    tokens = Tokens(_ids(rows, columns), _flags(rows, columns), _flags(rows, columns))
    weight_B = jax.ShapeDtypeStruct((rows,), np.float32)
    return Pairs(tokens, tokens, weight_B, weight_B, weight_B) if kind == "comparisons" else tokens


def _role(model: Model, config: JobConfig, head: bool) -> Adapter:
    return checkpoint.abstract_adapter(model.lm, config.tuning, config.lora if config.tuning == "lora" else None, head)


def _resting(model: Model, role: Adapter) -> Adapter:
    return jax.eval_shape(lambda role: resting(role, model.lm.config.dtype), role)


def _state(model: Model, roles: dict, optimizers: state_lib.Optimizers, frozen: dict, controls: dict | None = None) -> state_lib.TrainState:
    make = lambda roles, frozen, key: state_lib.init_state(roles, optimizers, key, frozen, controls)
    state = jax.eval_shape(make, roles, frozen, jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(_placed, state, model.adapter_shardings(state))


def _base(model: Model, config: JobConfig) -> Tree | None:
    return None if config.tuning == "full" else model.base


def _cache(model: Model, rows: int, slots: int) -> Tree:
    """The keys and values of a decode loop, where they live."""
    config, found = model.lm.config, []
    for window, layers in collections.Counter(config.windows).items():
        shape = (layers, rows, config.kv_heads, own_room(slots, window), config.head_dim)
        place = sharding.fitting(model.mesh, shape, None, sharding.BATCH_AXES, "tensor" if model.lm.split_heads else None, None, None)
        found += [jax.ShapeDtypeStruct(shape, config.dtype, sharding=place)] * 2
    return found


def _resident(base: Tree | None, state: state_lib.TrainState) -> dict[str, Tree]:
    return {"base": base, "trained roles": state.roles, "frozen roles": state.frozen, "optimizer": state.optimizers}
