"""Preference training: a policy fitted to comparisons (DPO, IPO, ORPO) or labels (KTO) directly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.lora import Adapter
from perl_jax.data import targets
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context, load_batches, noted
from perl_jax.data.pipeline import with_progress
from perl_jax.data.store import group_of
from perl_jax.evaluation import statistics
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.microbatches import each_microbatch
from perl_jax.objectives import preference
from perl_jax.objectives.preference import Preferences, Unpaired
from perl_jax.runs import shown
from perl_jax.runs.folder import write_results
from perl_jax.runs.owner import owned
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts, progress, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.runtime.seeds import random_key
from perl_jax.training import cost
from perl_jax.training.configs import DPOConfig
from perl_jax.training.fit import Supervised, begin, supervised_loop, validate_policy
from perl_jax.training.loop import OnStep, train
from perl_jax.training.roles import starting_role
from perl_jax.training.state import TrainState
from perl_jax.training.trained import Trained, content_of, load_finished, open_library_run
from perl_jax.types import Array, Labelled, Pairs, Tree


@functools.lru_cache(maxsize=8)
def reference_program(lm: LanguageModel, microbatches: int) -> Program:
    """Returns the compiled program (base or None, reference, tokens) -> logp_BT.

    The base is None if the reference has weights of its own (full tuning).

    Args:
        lm: The model's functions.
        microbatches: Number of parts that a batch is computed in, one after the other.
    """
    return Program(
        "reference",
        functools.partial(passes.logprobs_in_microbatches, lm, microbatches),
        limit=SHAPES,
    )


def with_reference(microbatches: int, model: Model, state: TrainState, pairs: Pairs) -> Preferences:
    """Returns comparisons with the reference's log-probabilities of both responses.

    Args:
        microbatches: Number of parts that a batch is computed in, one after the other.
        model: The base and its mesh.
        state: Has the frozen role `reference`.
        pairs: The comparisons, on the devices.
    """
    reference = state.frozen["reference"]
    both = passes.interleaved_pairs(pairs)
    logp_BT = reference_program(model.lm, microbatches)(
        model.base if reference.weights is None else None, reference, both
    )
    return Preferences(pairs, *passes.split_pairs(logp_BT))


@functools.lru_cache(maxsize=8)
def unpaired_program(lm: LanguageModel, microbatches: int) -> Program:
    """Returns the compiled program (base or None, reference, policy, labelled rows) ->
    (reference_BT, kl_B), which KTO's update reads (`preference.Unpaired`).

    The base is None in full tuning.

    Args:
        lm: The model's functions.
        microbatches: Number of parts that a batch is computed in, one after the other.
    """
    return Program(
        "reference",
        functools.partial(compared, lm, microbatches),
        out_shardings=sharding.batch_sharding(lm.mesh),
        limit=SHAPES,
    )


def compared(
    lm: LanguageModel,
    microbatches: int,
    base: Tree,
    reference: Adapter,
    policy: Adapter,
    batch: Labelled,
) -> tuple[Array, Array]:
    """Returns the reference's log-probabilities of the responses [B, T], and KTO's KL on each row.

    The KL is one number for the whole batch (`preference.mismatched_kl`), whatever the number of
    microbatches and devices.

    Args:
        lm: The model's functions.
        microbatches: Number of parts that the batch is computed in, one after the other.
        base: The base's weights; None in full tuning.
        reference: The reference.
        policy: The policy.
        batch: Labelled rows with mismatched responses.

    Raises ValueError if the batch has no mismatched responses.
    """
    others = batch.mismatched
    if others is None:
        raise ValueError("KTO needs the responses of other rows")
    logprobs = functools.partial(passes.logprobs_in_microbatches, lm, microbatches, base)
    ratio_B = preference.response_log_ratio(
        logprobs(policy, others), logprobs(reference, others), others.response_BT
    )
    kl = preference.mismatched_kl(ratio_B, batch.weight_B)
    return logprobs(reference, batch.tokens), jnp.broadcast_to(kl, ratio_B.shape)


def with_kl(microbatches: int, model: Model, state: TrainState, batch: Labelled) -> Unpaired:
    """Returns labelled rows with the reference's log-probabilities and the batch's KL.

    Args:
        microbatches: Number of parts that a batch is computed in, one after the other.
        model: The base and its mesh.
        state: Has the trained role `policy` and the frozen role `reference`.
        batch: The rows with mismatched responses, on the devices.
    """
    reference = state.frozen["reference"]
    reference_BT, kl_B = unpaired_program(model.lm, microbatches)(
        model.base if reference.weights is None else None,
        reference,
        state.roles["policy"],
        batch,
    )
    return Unpaired(dataclasses.replace(batch, mismatched=None), reference_BT, kl_B)


def job_of(config: DPOConfig) -> Supervised:
    """Returns the supervised job of `config.loss`.

    The batches of an objective with a reference get the reference's log-probabilities.
    """
    prepare = None
    if config.loss == "kto":
        objective = functools.partial(
            preference.kto_objective,
            beta=config.strength,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        prepare = functools.partial(with_kl, config.microbatches)
    elif config.loss == "orpo":
        objective = functools.partial(preference.orpo_objective, odds_weight=config.odds_weight)
    else:
        objective = functools.partial(
            preference.preference_objective,
            kind=config.loss,
            beta=config.strength,
            label_smoothing=config.label_smoothing,
            mean=config.token_mean,
            soft_labels=config.soft_labels,
        )
        prepare = functools.partial(with_reference, config.microbatches)
    return Supervised(
        "dpo",
        "policy",
        config.objective.kind,
        objective,
        validate_policy,
        None,
        ("train/loss", "train/accuracy", "validation/accuracy"),
        prepare,
        others=config.loss == "kto",
    )


def said_balance(config: DPOConfig, labels: np.ndarray) -> str | None:
    """Returns a sentence that advises weights for KTO's two classes; None if the weights fit.

    They fit if w_D n_D / (w_U n_U) lies in [1, 4/3] for n_D desirable and n_U undesirable rows.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.2.

    Args:
        config: Has the weights w_D and w_U.
        labels: The labels of the training rows, of both classes; above 1/2 is desirable.
    """
    desirable = int((labels > 0.5).sum())
    undesirable = len(labels) - desirable
    share = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    # The weights that people give have few digits.
    if 0.99 <= share <= 1.34:
        return None
    return (
        f"{desirable} desirable and {undesirable} undesirable responses count as {share:.2f} to 1; "
        "KTO's paper advises 1 to 1.33: set undesirable_weight to "
        f"{config.undesirable_weight * share:.3g}, or desirable_weight to "
        f"{config.desirable_weight / share:.3g}."
    )


def train_dpo(
    model: Model,
    rows: Iterable[Row] | Dataset,
    config: DPOConfig | None = None,
    *,
    policy: Adapter | files.PathLike | None = None,
    validation: Iterable[Row] = (),
    test: Iterable[Row] = (),
    frozen: Adapter | files.PathLike | None = None,
    run: files.PathLike | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Returns a policy trained on preferences without a reward model (DPO, IPO, KTO or ORPO).

    The reference is the policy that training starts from; ORPO has none. With test rows,
    `Trained.evaluation` holds the result of `evaluate_dpo`.

    Args:
        model: The base (`load_model`).
        rows: Rows with `prompt`, `chosen`, `rejected`; for KTO rows with `prompt`, `response`,
            `label`. Or an opened data set.
        config: Settings; None: the defaults.
        policy: A policy, or the folder of a policy artefact, to start from. None: the base.
        validation: Rows whose loss and accuracy are measured every `config.evaluate_every` steps.
        test: Rows that the policy is evaluated on at the end.
        frozen: An adapter, or the folder of one, that stays unchanged beneath the fresh one. None:
            there is none.
        run: A folder for checkpoints, metrics, evaluation and artefact, or an opened run. The same
            call continues from the last checkpoint, bit for bit; a finished run is read and not
            trained again. None: nothing is written.
        on_step: Called after each step with the row {"step": step, metric: number, ...}, on the
            process that writes. None: nothing is called.

    Raises:
        UserError: For rows, settings or a policy that do not fit.
        TrainingError: For NaN or infinity.
    """
    config = config or DPOConfig()
    with owned(run):
        job = job_of(config)
        dataset = of_rows(job.kind, rows, validation, test)
        if config.loss == "kto":
            labels = targets.both_classes(dataset.rows("train"), dataset.name, "train")
            if (advice := said_balance(config, labels)) and hosts.is_writer():
                print(f"{dataset.name}, train: {advice}", flush=True)
        start = starting_role(model, config, policy, random_key(config.seed), frozen)
        depends_on = lambda start=start: {"the policy": content_of(start)}
        run = open_library_run("dpo", config, run, model, dataset, depends_on)
        if done := load_finished(run, model, "policy", "evaluation.json"):
            return done
        check_context(model, config.data)
        model, frozen_roles = model.relieved((start,)), {}
        if config.objective.reference:
            frozen_roles["reference"] = cast_frozen_role(start, model.lm.config.dtype)
        state, optimizers = begin(model, config, job, start, frozen_roles)
        del start, frozen_roles, depends_on
        loop, program = supervised_loop(model, dataset, "train", config, job, state, optimizers)
        state, timings, metrics = train(config, state, loop, run, on_step)
        policy = state.roles["policy"]
        results, measured = {}, {}
        if "test" in dataset.splits:
            with progress.activity("dpo"):
                results = evaluate_dpo(model, dataset, config, job, state)
            progress.say(shown.test_text("dpo", results))
            measured = {name: found["value"] for name, found in results.items() if name != "data"}
        record = model.record("policy", policy, step=int(state.step), metrics=measured)
        if run is None:
            return Trained(policy, record, metrics, results)
        artefact = run.artefact("policy")
        artefacts.save_artefact(artefact, policy, record)
        cost.write_cost(run.folder, model, state, {"learn": program}, timings)
        write_results(run.folder, {"evaluation.json": results})
        return Trained(policy, record, metrics, results, folder=artefact)


def evaluate_dpo(
    model: Model, dataset: Dataset, config: DPOConfig, job: Supervised, state: TrainState
) -> dict:
    """Measures how well the implicit reward orders the test rows.

    The implicit reward is beta log(pi / pi_ref); without a reference it is the mean log-probability
    of the response's tokens.

    Returns JSON values. "data": facts about the rows. "pairwise_accuracy", for comparisons: the
    share of pairs in which the chosen response has the higher reward. Comparisons of equal
    responses do not count, and those with equal rewards count half. "auc", for labels: the area
    under the ROC curve of the reward. Both have the fields of an `Estimate`.

    Args:
        model: The base and its mesh.
        dataset: Has the split `test`.
        config: Settings of the job.
        job: Prepares the batches (`job_of`).
        state: Has the trained role `policy` and, for an objective with a reference, the frozen role
            `reference`.
    """
    rows = dataset.rows("test")
    batches = load_batches(
        model,
        dataset,
        "test",
        config.data,
        config.batch_size,
        None,
        config.microbatches,
        others=job.others,
    )
    facts = noted(dataset, "test", config.data, batches)
    program = implicit_program(model, config)
    base = model.base if state.roles["policy"].weights is None else None
    scale = config.strength if config.objective.reference else 1.0
    order, found = [], []
    unit = "pairs" if job.kind == "comparisons" else "rows"
    for index, batch in enumerate(with_progress(batches, "evaluating", unit)):
        real_B = batches.rows_of(index) >= 0
        order += batches.rows_of(index)[real_B].tolist()
        sides = to_host(program(base, state.roles["policy"], job.ready(model, state, batch)))
        found.append([scale * side_B[real_B] for side_B in sides])
    rewards = [np.concatenate(side).astype(np.float64) for side in zip(*found, strict=True)]
    groups = [group_of(rows[row]) for row in order]
    if job.kind == "labels":
        labels = targets.both_classes(rows, dataset.name, "test")[order]
        auc = statistics.auc_estimate(rewards[0], labels > 0.5, groups)
        return {"auc": dataclasses.asdict(auc), "data": facts}
    weights = targets.differing_weights(rows, dataset.name, "test", batches)[order]
    counted = weights > 0
    chosen, rejected = rewards
    groups = [group for group, counts in zip(groups, counted, strict=True) if counts]
    accuracy = statistics.pairwise_accuracy(
        np.asarray(chosen)[counted], np.asarray(rejected)[counted], weights[counted], groups
    )
    return {"pairwise_accuracy": dataclasses.asdict(accuracy), "data": facts}


def implicit_program(model: Model, config: DPOConfig) -> Program:
    """Returns the compiled program (base or None, policy, prepared batch) -> log-ratios.

    The result is (chosen_B, rejected_B) for comparisons and (ratio_B,) for labels. They hold
    log(pi / pi_ref) of the responses: the sum over a response's tokens, or their mean with
    `config.token_mean`. Without a reference they hold the mean of log pi.
    """
    return Program(
        "implicit",
        functools.partial(_implicit, model.lm, config.token_mean, config.microbatches),
        limit=SHAPES,
    )


def _implicit(
    lm: LanguageModel,
    mean: bool,
    microbatches: int,
    base: Tree,
    policy: Adapter,
    batch: Preferences | Pairs | Unpaired,
) -> tuple[Array, ...]:
    """Returns log-ratios of responses, as `implicit_program` does.

    Args:
        lm: The model's functions.
        mean: Whether to take the mean over a response's tokens instead of the sum.
        microbatches: Number of parts that the batch is computed in, one after the other.
        base: The base's weights; None in full tuning.
        policy: The policy.
        batch: The batch that the objective reads.
    """

    def of_rows(part: Preferences | Pairs | Unpaired) -> tuple[Array, ...]:
        if isinstance(part, Unpaired):
            tokens = part.labelled.tokens
            logp_BT = passes.sequence_logprobs(lm, base, policy, tokens)
            return (
                preference.response_log_ratio(logp_BT, part.reference_BT, tokens.response_BT, mean),
            )
        both = passes.interleaved_pairs(part if isinstance(part, Pairs) else part.pairs)
        logp_BT = passes.sequence_logprobs(lm, base, policy, both)
        if isinstance(part, Pairs):
            return passes.split_pairs(preference.mean_logprob(logp_BT, both.response_BT))
        return passes.split_pairs(
            preference.response_log_ratio(logp_BT, part.reference_BT, both.response_BT, mean)
        )

    return each_microbatch(of_rows, batch, microbatches)
