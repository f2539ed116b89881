"""The programs of training jobs, with abstract arguments: shapes with shardings.

The programs are made by the functions that the jobs themselves call, so what is planned is what
runs. Only weights and rows are missing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import QuantiseConfig, quantise_leaf
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model
from perl_jax.hub.tokenizer import word_tokenizer
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import preference
from perl_jax.planning import starting
from perl_jax.planning.pieces import (
    Jitted,
    Piece,
    Planned,
    flags,
    ids,
    key_data,
    placed,
    result,
    rows_of,
)
from perl_jax.planning.reading import RECORD, sampling
from perl_jax.rewards import scoring
from perl_jax.runtime import sharding, trees
from perl_jax.training import dpo, fit, rl, rl_programs, sft, step
from perl_jax.training.commands import (
    DPOCommand,
    PolicyCommand,
    RewardCommand,
    RLCommand,
    SFTCommand,
    TrainingCommand,
)
from perl_jax.training.configs import DPOConfig
from perl_jax.training.experience import Judged
from perl_jax.training.optimizers import make_optimizer
from perl_jax.training.reward import reward_job, score_program
from perl_jax.training.state import TrainState
from perl_jax.types import Labelled, Pairs, Tokens, Tree


def planned_model(
    lm: LanguageModel, name: str, quantise: QuantiseConfig, shard_adapters: bool
) -> Model:
    """Returns a model whose base weights are shapes with shardings instead of arrays.

    Args:
        lm: The language model, with the mesh to plan for.
        name: The model's name.
        quantise: How the base's matrices are stored.
        shard_adapters: Whether adapters are split like the weights that they adapt; if not, every
            device holds a copy.
    """
    shardings = lm.base_shardings()

    def leaf(path: str, spec: jax.ShapeDtypeStruct) -> Tree:
        """Returns the shapes of a leaf of the base as the devices hold it (possibly quantised),
        with shardings.
        """
        held = jax.eval_shape(lambda kernel: quantise_leaf(path, kernel, quantise), spec)
        return jax.tree.map(
            lambda part: placed(
                part, sharding.fitted_sharding(lm.mesh, part.shape, *shardings[path].spec)
            ),
            held,
        )

    base = trees.map_named(leaf, lm.abstract_base())
    # The programs read only the tokenizer's special ids, whose values change no program's size.
    tokenizer = word_tokenizer(())
    return Model(name, lm, base, tokenizer, "-", quantise, shard_adapters)


def plan_job(model: Model, config: TrainingCommand) -> Planned:
    """Returns a training job's programs at its longest batch: those of a step, of validation and
    test, then of its start.
    """
    return {SFTCommand: _sft, RewardCommand: _reward, DPOCommand: _dpo, RLCommand: _rl}[
        type(config)
    ](model, config)


def _sft(model: Model, config: SFTCommand) -> Planned:
    """Returns the plan of an SFT job."""
    return _supervised(model, config, sft.SFT, {"policy": _role(model, config, head=False)})


def _reward(model: Model, config: RewardCommand) -> Planned:
    """Returns the plan of a reward-model job."""
    return _supervised(
        model, config, reward_job(config), {"reward": _role(model, config, head=True)}
    )


def _dpo(model: Model, config: DPOCommand) -> Planned:
    """Returns the plan of a job of preference training."""
    role = _role(model, config, head=False)
    frozen = {"reference": _resting(model, role)} if config.objective.reference else None
    return _supervised(model, config, dpo.job_of(config), {"policy": role}, frozen)


def _supervised(
    model: Model,
    config: TrainingCommand,
    job: fit.Supervised,
    roles: dict[str, Adapter],
    frozen: dict[str, Adapter] | None = None,
) -> Planned:
    """Returns the plan of a supervised job.

    Args:
        model: The planned model.
        config: The job's config.
        job: What distinguishes the job: its role, rows and objective.
        roles: The shapes of the trained roles, by name.
        frozen: The shapes of the frozen roles, by name; None if there are none.
    """
    optimizers = {
        name: make_optimizer(config.optimizer, config.steps, config.tuning, model.lm.config.width)
        for name in roles
    }
    loaded = (roles, frozen or {})
    begin, state = starting.beginning(
        model, roles, optimizers, frozen or {}, None, loaded, base=config.tuning == "lora"
    )
    rows = batch = rows_of(model, _batch(config, job.kind, job.others))
    objective = functools.partial(job.objective, model.lm)
    program = fit.learn_program(model, config, objective, state, optimizers)
    base = _base(model, config)
    pieces, measures = [], []
    if isinstance(config, DPOConfig):
        before, batch = _compared(model, config, state, batch)
        pieces += before
        measures.append(
            Piece(
                dpo.implicit_program(model, config),
                (base, state.roles["policy"], batch),
                batch,
                phase="measure",
            )
        )
    pieces.append(Piece(program, (state, base, batch), batch))
    measures.insert(
        0,
        Piece(
            fit.held_out_program(model, config, job),
            (state.roles, base, batch),
            batch,
            phase="measure",
        ),
    )
    if job.role == "reward":
        adapter = state.roles["reward"]
        program = score_program(model.lm, config.microbatches)
        measures.append(
            Piece(
                program,
                (None if adapter.weights is not None else model.base, adapter, rows),
                rows,
                phase="measure",
            )
        )
    return Planned(
        _resident(base, state), (*pieces, *measures, *_start(model, config, begin, state))
    )


def _compared(
    model: Model, config: DPOConfig, state: TrainState, batch: Pairs | Labelled
) -> tuple[list[Piece], Tree]:
    """Returns the programs that compare a batch with the reference, and the shapes of the batch
    that the update reads.

    Args:
        model: The planned model.
        config: The settings of preference training.
        state: The state's shapes.
        batch: The shapes of the rows.
    """
    if not config.objective.reference:
        return [], batch
    reference = state.frozen["reference"]
    base = None if reference.weights is not None else model.base
    rows, columns = (batch.chosen if isinstance(batch, Pairs) else batch.tokens).tokens_BT.shape
    logp_BT = rows_of(model, jax.ShapeDtypeStruct((rows, columns), jnp.float32))
    if isinstance(batch, Pairs):
        both = rows_of(model, jax.eval_shape(passes.interleaved_pairs, batch))
        program = dpo.reference_program(model.lm, config.microbatches)
        piece = Piece(program, (base, reference, both), both)
        return [piece], preference.Preferences(batch, logp_BT, logp_BT)
    program = dpo.unpaired_program(model.lm, config.microbatches)
    piece = Piece(program, (base, reference, state.roles["policy"], batch), batch)
    kl_B = rows_of(model, jax.ShapeDtypeStruct((rows,), jnp.float32))
    read = dataclasses.replace(batch, mismatched=None)
    return [piece], preference.Unpaired(read, logp_BT, kl_B)


def _start(model: Model, config: TrainingCommand, begin: Piece, state: TrainState) -> list[Piece]:
    """Returns the programs of the start: loading, first values of roles, the state of step 0,
    checksums of checkpoints.

    Args:
        model: The planned model.
        config: The job's config.
        begin: The program that makes the state of step 0.
        state: The state's shapes.
    """
    own = (
        [starting.full_weights(model)]
        if config.tuning == "full"
        else list(starting.first_values(model, config.lora))
    )
    if config.tuning == "full" and isinstance(config, PolicyCommand) and config.policy is not None:
        # The policy may be an adapter whose size only its artefact tells; config.lora is assumed.
        own.insert(
            0,
            starting.merging(
                model, artefacts.abstract_adapter(model.lm, "lora", config.lora, False)
            ),
        )
    return [*starting.loading(model), *own, begin, *starting.digests(state)]


def _rl(model: Model, config: RLCommand) -> Planned:
    """Returns the plan of an RL job: every program that it runs, and what stays on the devices.

    Reward models are planned as roles of the same tuning and size as the job's own.
    """
    algorithm = config.algorithm
    policy = _role(model, config, head=False)
    reward = _role(model, config, head=True)
    roles = {"policy": policy} | ({"value": reward} if algorithm.rule.critic else {})
    rewards = {scoring.role_name(index): reward for index in range(len(config.reward))}
    frozen = {name: _resting(model, role) for name, role in rewards.items()}
    if config.kl.reference not in ("base", "none"):
        frozen["reference"] = _resting(model, policy)
    optimizers = rl.make_optimizers(config, roles, model.lm.config.width)
    reads_base = config.tuning == "lora" or config.kl.reference == "base"
    # The value model starts from the policy's arrays, so no artefact of its own is loaded.
    begin, state = starting.beginning(
        model,
        roles,
        optimizers,
        frozen,
        {"beta": config.kl.beta},
        (policy, frozen),
        base=reads_base,
    )
    scores = None
    if rewards:
        records = (RECORD,) * len(rewards)
        scores = scoring.reward_program(model, records, config.combine, config.microbatches)
    programs = rl_programs.Programs(model, config, scores, state, optimizers)
    base, batch = _base(model, config), config.batch_size
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    sampled = lambda program, rows, samples: sampling(
        model, program, state.roles["policy"], base, rows, samples, prompt, response
    )
    pieces, rollout = sampled(programs.sample, batch, model.shared_prompts(batch, algorithm.group))
    greedy = None
    if programs.greedy is not None:
        more, greedy = sampled(programs.greedy, batch // algorithm.group, 1)
        pieces += more
    sequences = rollout.sequences
    reading = lambda program, role, tree: Piece(
        program, (None if role.weights is not None else model.base, tree, sequences), rollout
    )
    if programs.reward is not None:
        pieces.append(
            reading(programs.reward, frozen["reward"], [state.frozen[name] for name in rewards])
        )
    before = not programs.one_pass or config.kl.reference != "none"
    if before:
        pieces.append(reading(programs.logprobs, policy, state.roles["policy"]))
        if config.kl.reference == "base":
            pieces.append(Piece(programs.logprobs, (model.base, None, sequences), rollout))
    numbers = lambda rows: rows_of(model, jax.ShapeDtypeStruct((rows,), jnp.float32))
    each_BT = rows_of(model, jax.ShapeDtypeStruct((batch, prompt + response), jnp.float32))
    values_BT = None
    if programs.values is not None:
        pieces.append(reading(programs.values, reward, state.roles["value"]))
        values_BT = each_BT
    judged = Judged(
        rollout,
        numbers(batch),
        each_BT if before else None,
        state.controls["beta"],
        each_BT if config.kl.reference != "none" else None,
        rows_of(model, jax.ShapeDtypeStruct((), bool)),
        values_BT,
        greedy=greedy,
        greedy_score_P=None if greedy is None else numbers(batch // algorithm.group),
    )
    pieces += _learning(model, config, programs, state, rollout, judged)
    planned = _resident(model.base if reads_base else None, state)
    return Planned(planned, (*pieces, *_start(model, config, begin, state)))


def _learning(
    model: Model,
    config: RLCommand,
    programs: rl_programs.Programs,
    state: TrainState,
    rollout: Tree,
    judged: Judged,
) -> list[Piece]:
    """Returns the programs that make experience of scored rollouts and learn from it.

    Args:
        model: The planned model.
        config: The job's config.
        programs: The job's programs.
        state: The shapes of the train state.
        rollout: The shapes of a rollout.
        judged: The shapes of a scored rollout.
    """
    algorithm, base = config.algorithm, _base(model, config)
    pieces = [Piece(programs.assemble, (judged,), judged)]
    experience = rows_of(model, result(programs.assemble, judged)[0])
    orders = ()
    if algorithm.updates > 1:
        orders = (
            placed(
                ids(algorithm.updates, config.batch_size // algorithm.minibatches),
                sharding.replicated(model.mesh),
            ),
        )
        dealing = Jitted(
            "dealt",
            step.dealt,
            after=(config.batch_size, algorithm.epochs, algorithm.minibatches),
        )
        pieces.append(Piece(dealing, (key_data(model),), None))
    pieces.append(Piece(programs.learn, (state, base, experience, *orders), (rollout, experience)))
    if programs.refresh is not None:
        pieces.append(Piece(programs.refresh, (state.roles["policy"],), None))
    return pieces


# Shapes.


def _batch(config: TrainingCommand, kind: str, others: bool = False) -> Tree:
    """Returns the shapes of a batch whose rows all have the largest length.

    Args:
        config: The job's config.
        kind: The kind of rows: demonstrations, comparisons or labels.
        others: Whether labelled rows come with the responses of other rows.
    """
    rows, columns = (
        config.batch_size,
        config.data.max_prompt_length + config.data.max_response_length,
    )
    tokens = Tokens(ids(rows, columns), flags(rows, columns), flags(rows, columns))
    number_B = jax.ShapeDtypeStruct((rows,), np.float32)
    if kind == "demonstrations":
        return tokens
    return (
        Pairs(tokens, tokens, number_B, number_B, number_B)
        if kind == "comparisons"
        else Labelled(tokens, number_B, number_B, tokens if others else None)
    )


def _role(model: Model, config: TrainingCommand, head: bool) -> Adapter:
    """Returns the shapes of a trained role: an adapter or full weights, as the config's tuning
    says.

    Args:
        model: The planned model.
        config: The job's config.
        head: Whether the role has a scalar head.
    """
    return artefacts.abstract_adapter(
        model.lm, config.tuning, config.lora if config.tuning == "lora" else None, head
    )


def _resting(model: Model, role: Adapter) -> Adapter:
    """Returns the shapes of a frozen role, in the dtype in which the devices hold frozen roles."""
    return jax.eval_shape(lambda role: cast_frozen_role(role, model.lm.config.dtype), role)


def _base(model: Model, config: TrainingCommand) -> Tree | None:
    """Returns the shapes of the base weights that the update reads; None in full tuning."""
    return None if config.tuning == "full" else model.base


def _resident(base: Tree | None, state: TrainState) -> dict[str, Tree]:
    """Returns the trees that stay on the devices during a job, by component: base, trained roles,
    frozen roles, optimizer.
    """
    return {
        "base": base,
        "trained roles": state.roles,
        "frozen roles": state.frozen,
        "optimizer": state.optimizers,
    }
