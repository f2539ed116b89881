"""Policy-gradient RL: the training function, its roles and its optimizers.

`rl_step.advance` makes one step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import jax

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.initial_values import init_head
from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context, load_batches, noted
from perl_jax.hub import artefacts
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.rewards import scoring
from perl_jax.rewards.models import RewardTotal, total_of
from perl_jax.rewards.scoring import Scorer
from perl_jax.runs.owner import owned
from perl_jax.runs.provenance import source_of
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts
from perl_jax.runtime.seeds import random_key
from perl_jax.training import cost
from perl_jax.training.fit import initial_state
from perl_jax.training.loop import Loop, OnStep, train
from perl_jax.training.optimizers import Optimizers, make_optimizer
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.rl_programs import Programs
from perl_jax.training.rl_step import Rollouts, advance
from perl_jax.training.rl_validation import (
    SELECTED_BY,
    held_out_prompts,
    kept_step,
    sample_prompts,
    shown_prompts,
    validate,
)
from perl_jax.training.roles import starting_role
from perl_jax.training.start import say_start
from perl_jax.training.trained import Trained, content_of, load_finished, open_library_run


def make_optimizers(config: RLConfig, roles: Iterable[str], width: int) -> Optimizers:
    """Returns one optimizer for each trained role, by name, with the role's own learning rate.

    Args:
        config: Settings of RL.
        roles: The names of the trained roles: policy and, for algorithms with a critic, value.
        width: The size of the base's hidden states; decides the default learning rate.
    """
    rates = {
        "policy": config.optimizer.learning_rate,
        "value": config.value_learning_rate or config.optimizer.learning_rate,
    }
    updates = config.steps * config.algorithm.updates
    make = lambda rate: make_optimizer(
        dataclasses.replace(config.optimizer, learning_rate=rate), updates, config.tuning, width
    )
    return {name: make(rates[name]) for name in roles}


def paid_head(
    config: RLConfig, weight: float, reward: Adapter, record: Record
) -> dict[str, jax.Array]:
    """Returns a reward model's head, {"kernel", "bias"}, rescaled to the units of returns.

    The rescaled head gives w (s - mean) / std for a score s of the reward model. w is `weight`,
    times 1 - beta if the KL is in the reward and `kl.whole_score` is False.

    Args:
        config: Settings of RL.
        weight: The reward model's weight in the total reward.
        reward: The reward model.
        record: Has the mean and the standard deviation of the reward model's scores.

    Raises:
        ValueError: If the reward model has no head.
    """
    whole = config.kl_in_loss or config.kl.whole_score
    weight *= 1.0 if whole else 1.0 - config.kl.beta
    if reward.head is None:
        raise ValueError("The reward model has no scalar head.")
    return {
        "kernel": weight * reward.head["kernel"] / record.score_std,
        "bias": weight * record.normalise(reward.head["bias"]),
    }


def initial_roles(
    model: Model, config: RLConfig, start: Adapter, rewards: RewardTotal
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Returns the trained and the frozen roles that RL begins with, each by name.

    The trained roles are `policy` and, for algorithms with a critic, `value`. The frozen ones are
    the reward models and, unless the base is the reference or there is none, `reference`; they are
    in the dtype of frozen roles.

    Args:
        model: The base.
        config: Settings of RL.
        start: The initial values of the policy, of the body of the critic and, with `kl.reference`
            start, of the reference.
        rewards: The loaded rewards.
    """
    trained = {"policy": start}
    frozen = rewards.roles
    if config.algorithm.rule.critic:
        head = init_head(None, model.lm.config.width)
        if config.value_head == "reward":
            first = rewards.loaded_models[0]
            head = paid_head(config, rewards.first_weight, first.adapter, first.record)
        trained["value"] = dataclasses.replace(start, head=head)
    if config.kl.reference == "start":
        frozen["reference"] = start
    elif config.kl.reference not in ("base", "none"):
        frozen["reference"] = model.load_role(config.kl.reference, "policy")[0]
    dtype = model.lm.config.dtype
    return trained, {name: cast_frozen_role(role, dtype) for name, role in frozen.items()}


def train_rl(
    model: Model,
    rows: Iterable[Row] | Dataset,
    config: RLConfig | None = None,
    *,
    rewards: Iterable[Any] | RewardTotal,
    policy: Adapter | files.PathLike | None = None,
    validation: Iterable[Row] = (),
    frozen: Adapter | files.PathLike | None = None,
    run: files.PathLike | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Returns a policy improved against rewards by a policy gradient.

    With validation prompts the step with the best mean reward on them is kept (`config.select`).
    The critic, if the algorithm has one, is in `Trained.others["value"]`.

    Args:
        model: The base (`load_model`).
        rows: Rows with `prompt`, or an opened data set; rewards see all columns of the rows.
        config: Settings; None: the defaults.
        rewards: Reward models (`Trained.reward`), functions (`reward`) and other terms. The reward
            is the sum of their weighted scores.
        policy: A policy, or the folder of a policy artefact, to start from. None: the base.
        validation: Held-out prompts.
        frozen: An adapter, or the folder of one, that stays unchanged beneath the fresh one. None:
            there is none.
        run: A folder for checkpoints, metrics, samples and artefacts, or an opened run. The same
            call continues from the last checkpoint, bit for bit; a finished run is read and not
            trained again. None: nothing is written.
        on_step: Called after each step with the row {"step": step, metric: number, ...}, on the
            process that writes. None: nothing is called.

    Raises:
        UserError: For rows, settings, rewards or a policy that do not fit.
        TrainingError: For NaN or infinity, or a sampler that disagrees with the trainer.
    """
    config = config or RLConfig()
    with owned(run):
        dataset = of_rows("prompts", rows, validation)
        rewards = total_of(rewards)
        config.check_value_head(len(rewards.models))
        start = starting_role(model, config, policy, random_key(config.seed), frozen)
        rewards = rewards.loaded(model)
        depends_on = functools.partial(_depends_on, start, rewards)
        run = open_library_run("rl", config, run, model, dataset, depends_on)
        # It would keep the float32 weights of fully tuned roles.
        del depends_on
        if done := load_finished(run, model, "policy", "cost.json"):
            return done
        check_context(model, config.data)
        config.check_stale(0.0 if start.config is None else start.config.dropout)
        paid = _paid(config, rewards)
        records, terms = rewards.records, rewards.terms
        combine, weight = rewards.combine, rewards.weight
        roles, frozen_roles = initial_roles(model, config, start, rewards)
        # Frees the float32 weights of fully tuned reward models; `frozen_roles` has them in the
        # frozen dtype.
        del rewards
        if config.kl.reference != "base":
            model = model.relieved((*roles.values(), *frozen_roles.values()))
        optimizers = make_optimizers(config, roles, model.lm.config.width)
        state = initial_state(
            model, config, roles, optimizers, frozen_roles, {"beta": config.kl.beta}
        )
        # The state has copies of these roles, which would stay on the devices a second time.
        del start, roles, frozen_roles
        prompts = config.batch_size // config.algorithm.group
        batches = load_batches(model, dataset, "train", config.data, prompts, config.seed)
        scores = None
        if records:
            scores = scoring.reward_program(model, records, combine, config.microbatches)
        programs = Programs(model, config, scores, state, optimizers)
        base = None if config.tuning == "full" else model.base
        with Scorer(model, scores, terms, weight, dataset.rows("train")) as scorer:
            job = Rollouts(model, base, programs, scorer, dataset, dataset.rows("train"), config)
            shown = ("reward/score", "reward/gold", "kl/sequence", "response/eos_rate", SELECTED_BY)
            facts = noted(dataset, "train", config.data, batches)
            measure = best = None
            held_out = held_out_prompts(job, batches.lengths)
            examples = shown_prompts(job, batches.lengths, held_out)
            if held_out is not None:
                measure = functools.partial(validate, *held_out)
                best = SELECTED_BY if config.select == "best" else None
                facts |= noted(dataset, "validation", config.data, held_out[1])
            step = functools.partial(advance, job)
            sample = functools.partial(sample_prompts, examples)
            loop = Loop(
                "rl",
                step,
                iter(batches),
                measure,
                best,
                shown,
                facts,
                sample=sample,
                show_samples=config.show_samples,
            )
            read = {"train": batches} | ({} if held_out is None else {"validation": held_out[1]})
            say_start("rl", model, dataset, config, state, read, {"rewards": paid})
            state, timings, metrics = train(config, state, loop, run, on_step)
        number, measured = int(state.step), {}
        if hosts.is_writer():
            measured = kept_step(run, metrics, config, number, best is not None)
        made = {
            name: model.record(name, adapter, step=number, metrics=measured)
            for name, adapter in state.roles.items()
        }
        others = {name: adapter for name, adapter in state.roles.items() if name != "policy"}
        trained = Trained(state.roles["policy"], made["policy"], metrics, others=others)
        if run is None:
            return trained
        for name, adapter in state.roles.items():
            artefacts.save_artefact(run.artefact(name), adapter, made[name])
        cost.write_cost(run.folder, model, state, programs.by_name(), timings)
        return dataclasses.replace(trained, folder=run.artefact("policy"))


def _paid(config: RLConfig, rewards: RewardTotal) -> str:
    """Returns what a response is paid by, as text: reward models, terms, and the loss of one that
    does not end.

    Args:
        config: Settings of RL.
        rewards: The rewards.
    """
    number = len(rewards.models)
    models = [f"{number} reward model{'s' if number > 1 else ''}"] if number else []
    text = ", ".join([*models, *(term.name for term in rewards.terms)])
    penalty = config.shaping.missing_eos_penalty
    if penalty:
        text += (
            f"; a response that does not end within {config.data.max_response_length} tokens "
            f"loses {penalty:g} (--shaping.missing-eos-penalty)"
        )
    return text


def _depends_on(policy: Adapter, rewards: RewardTotal) -> dict[str, Any]:
    """Returns JSON values of everything besides rows and base that decides a run's numbers, by
    name.

    Args:
        policy: The role that RL starts from.
        rewards: The loaded rewards.
    """
    values = {
        "the policy": content_of(policy),
        "the weights of rewards": [rewards.combine, rewards.weight],
    }
    for index, model in enumerate(rewards.loaded_models):
        values[f"reward model {index + 1}"] = [content_of(model.adapter), model.weight]
    for term in rewards.terms:
        texts = ["special tokens"] if term.special_tokens else []
        values[f"the reward {term.name}"] = [_source(term.reward), term.weight, *texts]
    return values


def _source(reward: Any) -> str:
    """Returns a text that changes when a reward term's numbers may change.

    It is the source code of the term's function, or the settings of a term without a function. For
    a function without source code it is the term's name.

    Args:
        reward: The reward of a term.
    """
    function = getattr(reward, "function", None)
    if isinstance(function, str):
        return files.file_hash(source_of(function)) + repr(reward)
    if function is None:
        return repr(reward)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        # Typed at a prompt, or an object that is called: its name is all that stays the same.
        return reward.name
