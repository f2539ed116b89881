"""Policy-gradient RL: sample responses, score them, compare them with the reference, learn.

Each phase of a step is a compiled program of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.lora import Adapter, init_head
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context, load_batches, noted
from perl_jax.data.pipeline import Batches
from perl_jax.errors import TrainingError
from perl_jax.generation.programs import sample_program
from perl_jax.generation.sampling import Rollout
from perl_jax.hub import artefacts
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, say_attention
from perl_jax.models import passes
from perl_jax.models.language_model import cast_frozen_role
from perl_jax.objectives import kl, policy_gradient
from perl_jax.rewards import scoring
from perl_jax.rewards.models import RewardTotal, total_of
from perl_jax.rewards.scoring import Scorer, response_texts, role_name
from perl_jax.runs.provenance import source_of
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.training import cost
from perl_jax.training.experience import Judged, assemble, experience_of, one_pass
from perl_jax.training.fit import initial_state, step_program
from perl_jax.training.layouts import rollout_layout, updates_rows
from perl_jax.training.loop import Loop, OnStep, train
from perl_jax.training.optimizers import Optimizers, make_optimizer
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.roles import starting_role
from perl_jax.training.state import SAMPLE, SHUFFLE, TrainState
from perl_jax.training.step import train_epochs, train_step
from perl_jax.training.trained import Trained, content_of, load_finished, open_library_run
from perl_jax.types import Layout, Prompts, Tree

# The validation metric whose best step the artefacts hold.
SELECTED_BY = "validation/reward"
# How many prompts of a validation have their first response written to the run's folder.
_KEPT = 8
# Folded into the seed's key for the samples of validations. Fold 1 makes the train state's key and
# fold 2 the key of a head.
_VALIDATION = 3


class Programs:
    """The compiled programs of one RL step; None for a program that the algorithm does not need.

    Attributes:
        sample: Samples responses.
        greedy: Decodes the greedy responses of a greedy baseline.
        reward: Scores responses with the reward models.
        logprobs: Computes log-probabilities, of the policy or of the reference.
        values: Computes the critic's values.
        assemble: Makes the update's input from scored rollouts (`experience.assemble`).
        learn: Updates the trained roles.
        refresh: Copies the policy to become the new reference.
        one_pass: Whether the update itself computes the policy's log-probabilities.
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
        room = config.data.max_response_length
        shared = model.shared_prompts(config.batch_size, algorithm.group)
        rows = sharding.batch_sharding(model.mesh)
        # The adapter's own settings count: it may come from an artefact.
        lora = state.roles["policy"].config
        self.one_pass = one_pass(config, model.row_parts, 0.0 if lora is None else lora.dropout)
        made_of = functools.partial(experience_of, config) if self.one_pass else None
        objective = functools.partial(
            policy_gradient.policy_gradient_objective,
            lm,
            algorithm,
            config.temperature,
            config.estimator,
            room,
            experience_of=made_of,
        )
        update = functools.partial(
            train_step if algorithm.updates == 1 else train_epochs,
            objective,
            optimizers,
            config.microbatches,
        )
        self.sample = sample_program(model, room, config.temperature, config.rollout, shared)
        self.greedy = (
            sample_program(model, room, 0.0, config.rollout) if algorithm.rule.greedy else None
        )
        self.reward = reward
        self.logprobs = Program(
            "logprobs",
            functools.partial(
                passes.logprobs_in_microbatches,
                lm,
                config.microbatches,
                temperature=config.temperature,
                max_response_length=room,
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
        self.learn = step_program(model, update, state)
        refreshed = functools.partial(_refreshed, lm.config.dtype)
        places = model.adapter_shardings(state.frozen.get("reference"))
        self.refresh = (
            Program("refresh", refreshed, out_shardings=places)
            if config.kl.refresh is not None
            else None
        )

    def by_name(self) -> dict[str, Program]:
        """Returns the programs that are not None, by name."""
        names = ("sample", "greedy", "reward", "logprobs", "values", "assemble", "learn", "refresh")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What an RL step needs besides the state and the batch.

    Attributes:
        model: The base, its tokenizer and its mesh.
        base: The base's weights; None in full tuning, where the roles have their own.
        programs: The compiled programs.
        scorer: Scores rollouts.
        dataset: The prompts, and their true reward where one is known.
        rows: The rows of `dataset` that `row_B` of a batch is an index into.
        config: Settings of RL.
    """

    model: Model
    base: Tree | None
    programs: Programs
    scorer: Scorer
    dataset: Dataset
    rows: Sequence[Row]
    config: RLConfig


def advance(
    job: Rollouts, state: TrainState, batch: Prompts
) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
    """Makes one RL step: samples responses, scores them, updates the policy.

    Sampling and the update have different keys, both derived from the state's key and step.

    Args:
        job: Model, programs, rewards and settings.
        state: Of step s; it is donated.
        batch: The prompts of the step.

    Returns:
        The state of step s + 1, the metrics, and the seconds of the phases sample, score and learn.

    Raises:
        TrainingError: If sampler and trainer disagree on log-probabilities (`max_mismatch`).
    """
    config, programs, base = job.config, job.programs, job.base
    clocks = [time.perf_counter()]
    key = jax.random.key_data(state.step_key(SAMPLE))
    policy = state.roles["policy"]
    repeated = batch.repeated(config.algorithm.group)
    shared = job.model.shared_prompts(config.batch_size, config.algorithm.group)
    prompts = batch.repeated(config.algorithm.group // shared)
    rollout = jax.block_until_ready(
        programs.sample(base, policy, sharding.put_batch(prompts, job.model.mesh), key)
    )
    greedy = (
        None
        if programs.greedy is None
        else programs.greedy(base, policy, sharding.put_batch(batch, job.model.mesh), key)
    )
    clocks.append(time.perf_counter())
    # With several updates: the rows of each, which decide how long its packed rows must be.
    orders_XY = updates_rows(config, state.step_key(SHUFFLE))
    whole, part = _layouts(job, rollout, batch.tokens_BP.shape[1], orders_XY)
    packed = rollout.replace(sequences=rollout.sequences.replace(layout=whole))
    score_B, scores = job.scorer(state.frozen, packed, repeated.row_B)
    reference_BT = _reference(job, state, packed)
    measured = not programs.one_pass or (
        reference_BT is not None and _may_be_one(config, int(state.step))
    )
    judged = Judged(
        rollout=rollout,
        score_B=score_B,
        # If the policy is not measured, nothing reads this array. The reference's is passed in its
        # place, so that `assemble` has arguments of the same shapes.
        policy_BT=programs.logprobs(base, policy, packed.sequences) if measured else reference_BT,
        beta=state.controls["beta"],
        reference_BT=reference_BT,
        measured=np.bool_(measured),
        values_BT=None
        if programs.values is None
        else programs.values(base, state.roles["value"], packed.sequences),
        greedy=greedy,
        greedy_score_P=None if greedy is None else job.scorer(state.frozen, greedy, batch.row_B)[0],
    )
    experience, statistics = jax.block_until_ready(programs.assemble(judged))
    experience = experience.replace(sequences=experience.sequences.replace(layout=part))
    clocks.append(time.perf_counter())
    state, metrics = jax.block_until_ready(
        programs.learn(state, base, experience, *(() if orders_XY is None else (orders_XY,)))
    )
    metrics |= statistics.values
    state = _controlled(config, programs.refresh, state, metrics["kl/sequence"])
    clocks.append(time.perf_counter())
    values = {name: value.item() for name, value in to_host(metrics).items()} | scores
    values["finite"] = values["finite"] and bool(statistics.finite)
    _check_mismatch(values["sampler/mismatch"], config, int(state.step))
    if job.dataset.gold is not None:
        values["reward/gold"] = float(np.mean(gold_rewards(job, repeated.row_B, rollout)))
    values |= _derived(values)
    seconds = np.diff(clocks)
    return state, values, {"sample": seconds[0], "score": seconds[1], "learn": seconds[2]}


def _layouts(
    job: Rollouts, rollout: Rollout, columns: int, orders_XY: np.ndarray | None
) -> tuple[Layout | None, Layout | None]:
    """Returns the layouts of the passes over all rollouts, and of the updates; None: padded.

    Args:
        job: Model and settings.
        rollout: The sampled responses.
        columns: The padded length of the prompts.
        orders_XY: The rows of each update. All updates get the layout that the fullest one needs.
            None: a single update reads all rows.
    """
    count = lambda mask_BT: to_host(jnp.sum(mask_BT, axis=1))
    response_B = count(rollout.sequences.response_BT)
    prompt_B = count(rollout.sequences.valid_BT) - response_B
    layout = functools.partial(rollout_layout, job.model, job.config, prompt_B, response_B, columns)
    return layout(job.config.microbatches), layout(job.config.microbatches, orders_XY)


def _may_be_one(config: RLConfig, step: int) -> bool:
    """Returns whether policy and reference may be equal when this step begins.

    They may be at the first step and after each refresh. The KL is then computed from one program,
    so that it is exactly 0.
    """
    return step == 0 or (config.kl.refresh is not None and step % config.kl.refresh == 0)


def _reference(job: Rollouts, state: TrainState, rollout: Rollout) -> jax.Array | None:
    """Returns the log-probabilities of the rollouts under the reference; None: no reference."""
    kind = job.config.kl.reference
    if kind == "none":
        return None
    if kind == "base":
        return job.programs.logprobs(job.model.base, None, rollout.sequences)
    role = state.frozen["reference"]
    return job.programs.logprobs(
        job.model.base if role.weights is None else None, role, rollout.sequences
    )


def _controlled(
    config: RLConfig, refresh: Program | None, state: TrainState, mean_kl: jax.Array
) -> TrainState:
    """Adapts the KL's coefficient and refreshes the reference where the settings ask for it."""
    settings = config.kl
    if settings.target is not None:
        # The coefficient stays below 1: at 1 the score would have weight 1 - beta = 0.
        beta = kl.adaptive_beta(
            state.controls["beta"],
            mean_kl,
            settings.target,
            episodes=config.batch_size,
            horizon=settings.horizon,
            maximum=0.99,
        )
        state = state.replace(
            controls={"beta": jax.device_put(beta, state.controls["beta"].sharding)}
        )
    if settings.refresh is not None and int(state.step) % settings.refresh == 0:
        # `refresh` copies the policy, whose own buffers are donated to the next update.
        state = state.replace(frozen=state.frozen | {"reference": refresh(state.roles["policy"])})
    return state


def _refreshed(dtype: str, policy: Adapter) -> Adapter:
    """Returns a copy of the policy as a frozen role, in the dtype of frozen roles."""
    return jax.tree.map(jnp.copy, cast_frozen_role(policy, dtype))


def _check_mismatch(mismatch: float, config: RLConfig, step: int) -> None:
    """Raises TrainingError if sampler and trainer disagree by more than `max_mismatch`."""
    if mismatch > config.max_mismatch:
        raise TrainingError(
            f"Step {step}: the sampler and the trainer disagree on log-probabilities, mean "
            f"exp|difference| = {mismatch:.4f}, "
            f"above max_mismatch = {config.max_mismatch}; the run stopped and its last checkpoint "
            "is untouched."
        )


def _derived(values: dict[str, float]) -> dict[str, float]:
    """Returns the advantages' standard deviation and the critic's explained variance.

    They are computed from means of squares, which are taken out of `values`.
    """
    variance = lambda name: max(values.pop(f"{name}/square") - values[f"{name}/mean"] ** 2, 0.0)
    out = {"advantage/std": variance("advantage") ** 0.5}
    if "return/mean" in values:
        error, returns = variance("value/error"), variance("return")
        out["value/explained_variance"] = 1.0 - error / returns if returns > 0 else 0.0
    return out


def gold_rewards(job: Rollouts, row_B: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Returns the true reward of each sampled response, [B].

    Args:
        job: Has the dataset that knows the true reward.
        row_B: Indices into `job.rows`, of this process's rows.
        rollout: The responses.
    """
    share = sharding.row_share(job.model.mesh)
    texts = response_texts(job.model.tokenizer, rollout, share)
    return share.gather(job.dataset.gold([job.rows[int(row)]["prompt"] for row in row_B], texts))


def held_out_prompts(job: Rollouts, lengths: tuple[int, ...]) -> tuple[Rollouts, Batches] | None:
    """Returns the job with the first validation prompts, and their batches, for `validate`.

    Returns None for a run without validation. A batch has as many prompts as a training batch. It
    has one of the training batches' padded `lengths` if that holds its prompts, so that training
    and validation share compiled programs.
    """
    config, dataset = job.config, job.dataset
    if config.validation_prompts == 0:
        return None
    if "validation" not in dataset.splits:
        if hosts.is_writer():
            print(
                f"There are no validation prompts in {dataset.name}: nothing is validated, and "
                "the last step is kept.",
                flush=True,
            )
        return None
    longest, most = config.data.max_prompt_length, config.validation_prompts
    lengths = lengths if lengths[-1] >= longest else (*lengths, longest)
    number = config.batch_size // config.algorithm.group
    batches = load_batches(
        job.model, dataset, "validation", config.data, number, None, most=most, lengths=lengths
    )
    source = dataset.rows("validation")
    rows = [source[index] for index in range(min(most, len(source)))]
    return dataclasses.replace(job, rows=rows, scorer=job.scorer.over(rows)), batches


def validate(
    job: Rollouts, batches: Batches, state: TrainState
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples responses to held-out prompts; returns means over them, and a few of them to read.

    Each prompt gets as many responses as in training. The sampling keys depend on the seed and not
    on the step, so that the validations of a run are comparable.

    The means are: `reward`, the score before shaping; `kl`, E[sum_t log pi - log pi_ref] to the
    current reference; `length` in tokens; `eos_rate`, the share of finished responses; and `gold`,
    the true reward where it is known. Their names begin with `validation/`.

    Raises:
        TrainingError: If a mean is NaN or infinite.
    """
    config, programs, base, policy = job.config, job.programs, job.base, state.roles["policy"]
    group, key = (
        config.algorithm.group,
        jax.random.fold_in(jax.random.key(config.seed), _VALIDATION),
    )
    shared = job.model.shared_prompts(config.batch_size, group)
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        prompts = sharding.put_batch(batch.repeated(group // shared), job.model.mesh)
        # The key has the same sharding as in training; with another `sample` would compile again.
        data = jax.device_put(
            np.asarray(jax.random.key_data(jax.random.fold_in(key, index))),
            sharding.replicated(job.model.mesh),
        )
        rollout = programs.sample(base, policy, prompts, data)
        whole, _ = _layouts(job, rollout, batch.tokens_BP.shape[1], None)
        rollout = rollout.replace(sequences=rollout.sequences.replace(layout=whole))
        mask_BT = rollout.sequences.response_BT
        # Filler prompts have row -1; the reward terms read row 0 for them.
        row_B = np.maximum(batch.repeated(group).row_B, 0)
        measured = {
            "reward": job.scorer(state.frozen, rollout, row_B)[0],
            "length": jnp.sum(mask_BT, axis=1),
            "eos_rate": rollout.finished_B,
        }
        reference_BT = _reference(job, state, rollout)
        if reference_BT is not None:
            measured["kl"] = kl.sequence_kl(
                kl.k1(programs.logprobs(base, policy, rollout.sequences), reference_BT), mask_BT
            )
        measured = {
            name: np.asarray(to_host(value_B), np.float64) for name, value_B in measured.items()
        }
        if job.dataset.gold is not None:
            measured["gold"] = np.asarray(gold_rewards(job, row_B, rollout), np.float64)
        rows_B = np.repeat(batches.rows_of(index), group)
        for name, value_B in measured.items():
            columns.setdefault(name, []).append(value_B[rows_B >= 0])
        texts = response_texts(job.model.tokenizer, rollout)
        for place in np.flatnonzero(rows_B >= 0)[::group].tolist():
            if len(samples) < _KEPT:
                measures = {
                    name: float(measured[name][place])
                    for name in ("reward", "gold")
                    if name in measured
                }
                samples.append(
                    {
                        "prompt": job.rows[int(rows_B[place])]["prompt"],
                        "response": texts[place],
                        **measures,
                    }
                )
    means = {
        f"validation/{name}": float(np.mean(np.concatenate(parts)))
        for name, parts in columns.items()
    }
    bad = [name for name, value in means.items() if not np.isfinite(value)]
    if bad:
        raise TrainingError(
            f"The validation of step {int(state.step)} gave NaN or infinity ({', '.join(bad)}); "
            "the run stopped, its last checkpoint is untouched."
        )
    return means, samples


def kept_step(
    folder: pathlib.Path | None,
    metrics: Sequence[Mapping[str, Any]],
    config: RLConfig,
    step: int,
    selected: bool,
) -> dict[str, float]:
    """Prints which step the artefacts hold; returns the validation metrics of that step.

    Args:
        folder: Of the run; None: the run has none.
        metrics: One row per step.
        config: Settings of RL.
        step: The step that the artefacts hold.
        selected: Whether the best validated step was chosen.
    """
    found = next((row for row in metrics if row["step"] == step), {})
    measured = {name: value for name, value in found.items() if name.startswith("validation/")}
    if selected:
        reason = f"the best {SELECTED_BY} ({measured[SELECTED_BY]:.4g}) of all validated steps"
        last = "" if folder is None else f"; the last step is in {folder / 'checkpoints'}"
        print(
            f"rl: the artefacts are of step {step} of {config.steps}, {reason}{last}.", flush=True
        )
    else:
        print(f"rl: the artefacts are of step {step}, the last.", flush=True)
    return measured


def make_optimizers(config: RLConfig, roles: Iterable[str], width: int) -> Optimizers:
    """Returns one optimizer for each trained role, with the role's own learning rate."""
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
    """Returns a reward model's head in the units of returns: w (s - mean) / std for a raw score s.

    w is `weight`, times 1 - beta where the KL is in the reward.
    """
    whole = config.kl_in_loss or config.kl.whole_score
    weight *= 1.0 if whole else 1.0 - config.kl.beta
    return {
        "kernel": weight * reward.head["kernel"] / record.score_std,
        "bias": weight * record.normalise(reward.head["bias"]),
    }


def train_rl(
    model: Model,
    rows: Iterable[Row] | Dataset,
    config: RLConfig | None = None,
    *,
    rewards: Iterable[Any] | RewardTotal,
    policy: Adapter | str | pathlib.Path | None = None,
    validation: Iterable[Row] = (),
    frozen: Adapter | str | pathlib.Path | None = None,
    run: str | pathlib.Path | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Improves a policy against rewards by a policy gradient.

    With validation prompts the step with the best mean reward on them is kept
    (`config.select`).

    Args:
        model: The base (`load_model`).
        rows: Rows with `prompt`; rewards see all their columns.
        config: Settings; None: the defaults.
        rewards: Reward models (`Trained.reward`), functions (`reward`) and other terms, summed by
            their weights.
        policy: A policy, or the folder of a policy artefact, to start from. None: the base.
        validation: Held-out prompts.
        frozen: An adapter that stays as it is beneath a fresh one.
        run: A folder for checkpoints, metrics, samples and artefacts; the same call goes on from
            the last checkpoint, bit for bit. None: nothing is written.
        on_step: Is called with each step's metrics.

    Raises:
        UserError: For rows, settings, rewards or a policy that do not fit.
        TrainingError: For NaN or infinity, or a sampler that disagrees with the trainer.
    """
    config = config or RLConfig()
    dataset = of_rows("prompts", rows, validation)
    rewards = total_of(rewards)
    config.check_value_head(len(rewards.models))
    start = starting_role(model, config, policy, jax.random.key(config.seed), frozen)
    rewards = rewards.loaded(model)
    depends_on = functools.partial(_depends_on, start, rewards)
    run = open_library_run("rl", config, run, model, dataset, depends_on)
    # It would keep the float32 weights of fully tuned roles.
    del depends_on
    if done := load_finished(run, model, "policy", "cost.json"):
        return done
    check_context(model, config.data)
    config.check_stale(0.0 if start.config is None else start.config.dropout)
    algorithm, records, terms = config.algorithm, rewards.records, rewards.terms
    combine, weight = rewards.combine, rewards.weight
    # Policy, reference and critic all begin as `start`.
    roles = {"policy": start}
    fixed = rewards.roles
    if algorithm.rule.critic:
        head = init_head(None, model.lm.config.width)
        if config.value_head == "reward":
            head = paid_head(config, rewards.first_weight, fixed[role_name(0)], records[0])
        roles["value"] = start.replace(head=head)
    if config.kl.reference == "start":
        fixed["reference"] = start
    elif config.kl.reference not in ("base", "none"):
        fixed["reference"] = model.load_role(config.kl.reference, "policy")[0]
    fixed = {name: cast_frozen_role(role, model.lm.config.dtype) for name, role in fixed.items()}
    # Frees the float32 weights of fully tuned reward models; `fixed` has them in the frozen dtype.
    del rewards
    if config.kl.reference != "base":
        model = model.relieved((*roles.values(), *fixed.values()))
    optimizers = make_optimizers(config, roles, model.lm.config.width)
    state = initial_state(model, config, roles, optimizers, fixed, {"beta": config.kl.beta})
    # The state has copies of these roles, which would stay on the devices a second time.
    del start, roles, fixed
    prompts = config.batch_size // algorithm.group
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
        if held_out := held_out_prompts(job, batches.lengths):
            measure = functools.partial(validate, *held_out)
            best = SELECTED_BY if config.select == "best" else None
            facts |= noted(dataset, "validation", config.data, held_out[1])
        step = functools.partial(advance, job)
        loop = Loop("rl", step, iter(batches), measure, best, shown, facts)
        say_attention("rl", model.lm)
        folder = None if run is None else run.folder
        state, timings, metrics = train(config, state, loop, folder, on_step)
    number, measured = int(state.step), {}
    if hosts.is_writer():
        measured = kept_step(folder, metrics, config, number, best is not None)
    made = {
        name: model.record(name, adapter, step=number, metrics=measured)
        for name, adapter in state.roles.items()
    }
    others = {name: adapter for name, adapter in state.roles.items() if name != "policy"}
    if run is None:
        return Trained(state.roles["policy"], made["policy"], metrics, others=others)
    for name, adapter in state.roles.items():
        artefacts.save_artefact(run.artefact(name), adapter, made[name])
    cost.write_cost(run.folder, model, state, programs.by_name(), timings)
    folder = run.artefact("policy")
    return Trained(state.roles["policy"], made["policy"], metrics, others=others, folder=folder)


def _depends_on(policy: Adapter, rewards: RewardTotal) -> dict[str, Any]:
    """Returns JSON values of what a run depends on besides rows and base, by name."""
    values = {
        "the policy": content_of(policy),
        "the weights of rewards": [rewards.combine, rewards.weight],
    }
    for index, model in enumerate(rewards.loaded_models):
        values[f"reward model {index + 1}"] = [content_of(model.adapter), model.weight]
    for term in rewards.terms:
        values[f"the reward {term.name}"] = [_source(term.reward), term.weight]
    return values


def _source(reward: Any) -> str:
    """Returns what decides a term's numbers: the source of its function, or its settings."""
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
