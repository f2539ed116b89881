"""Direct preference optimisation: a policy fitted to comparisons, near where it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

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
from perl_jax.objectives.preference import Preferences
from perl_jax.runs import shown
from perl_jax.runs.folder import write_results
from perl_jax.runs.owner import holding, run_of
from perl_jax.runs.run import Run
from perl_jax.runtime import files, progress
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
from perl_jax.types import Pairs


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


def job_of(config: DPOConfig) -> Supervised:
    """Returns DPO as a supervised job, whose batches get the reference's log-probabilities."""
    settings = {
        "kind": config.loss,
        "beta": config.strength,
        "label_smoothing": config.label_smoothing,
        "mean": config.token_mean,
        "soft_labels": config.soft_labels,
    }
    objective = functools.partial(preference.preference_objective, **settings)
    shown = ("train/loss", "train/accuracy", "validation/accuracy")
    return Supervised(
        "dpo",
        "policy",
        "comparisons",
        objective,
        validate_policy,
        None,
        shown,
        functools.partial(with_reference, config.microbatches),
    )


@holding(run_of)
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
    """Returns a policy trained on comparisons without a reward model (DPO or IPO).

    The reference is the policy that training starts from. With test rows, `Trained.evaluation`
    holds the result of `evaluate_dpo`.

    Args:
        model: The base (`load_model`).
        rows: Rows with `prompt`, `chosen`, `rejected`, or an opened data set.
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
    dataset = of_rows("comparisons", rows, validation, test)
    start = starting_role(model, config, policy, random_key(config.seed), frozen)
    depends_on = lambda start=start: {"the policy": content_of(start)}
    run = open_library_run("dpo", config, run, model, dataset, depends_on)
    if done := load_finished(run, model, "policy", "evaluation.json"):
        return done
    check_context(model, config.data)
    job, model = job_of(config), model.relieved((start,))
    state, optimizers = begin(
        model, config, job, start, {"reference": cast_frozen_role(start, model.lm.config.dtype)}
    )
    del start, depends_on
    loop, program = supervised_loop(model, dataset, "train", config, job, state, optimizers)
    state, timings, metrics = train(config, state, loop, run, on_step)
    policy = state.roles["policy"]
    results, measured = {}, {}
    if "test" in dataset.splits:
        results = evaluate_dpo(model, dataset, config, job, state)
        progress.say(shown.test_text("dpo", results))
        measured = {"pairwise_accuracy": results["pairwise_accuracy"]["value"]}
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
    """Measures how often the implicit reward, beta log(pi / pi_ref), orders the test comparisons.

    Returns {"pairwise_accuracy": the fields of an `Estimate`, "data": facts about the rows}.
    Comparisons of equal responses do not count, and those with equal rewards count half.

    Args:
        model: The base and its mesh.
        dataset: Has the split `test`.
        config: Settings of DPO.
        job: Prepares the batches (`job_of`).
        state: Has the trained role `policy` and the frozen role `reference`.
    """
    rows = dataset.rows("test")
    batches = load_batches(
        model, dataset, "test", config.data, config.batch_size, None, config.microbatches
    )
    facts = noted(dataset, "test", config.data, batches)
    program = implicit_program(model, config)
    base = model.base if state.roles["policy"].weights is None else None
    order, chosen, rejected = [], [], []
    for index, batch in enumerate(with_progress(batches, "evaluating", "pairs")):
        real_B = batches.rows_of(index) >= 0
        order += batches.rows_of(index)[real_B].tolist()
        chosen_B, rejected_B = to_host(
            program(base, state.roles["policy"], job.ready(model, state, batch))
        )
        chosen += (config.strength * chosen_B[real_B]).tolist()
        rejected += (config.strength * rejected_B[real_B]).tolist()
    weights = targets.differing_weights(rows, dataset.name, "test", batches)[order]
    counted = weights > 0
    groups = [group_of(rows[row]) for row, counts in zip(order, counted, strict=True) if counts]
    accuracy = statistics.pairwise_accuracy(
        np.asarray(chosen)[counted], np.asarray(rejected)[counted], weights[counted], groups
    )
    return {"pairwise_accuracy": dataclasses.asdict(accuracy), "data": facts}


def implicit_program(model: Model, config: DPOConfig) -> Program:
    """Returns the compiled program (base or None, policy, preferences) -> (chosen_B, rejected_B).

    The two arrays hold log(pi / pi_ref) of the chosen and the rejected responses: the sum over a
    response's tokens, or their mean with `config.token_mean`.
    """
    return Program(
        "implicit",
        functools.partial(_implicit, model.lm, config.token_mean, config.microbatches),
        limit=SHAPES,
    )


def _implicit(
    lm: LanguageModel, mean: bool, microbatches: int, base, policy, batch: Preferences
) -> tuple:
    """Returns log(pi / pi_ref) of the chosen and the rejected responses, (chosen_B, rejected_B).

    Args:
        lm: The model's functions.
        mean: Whether to take the mean over a response's tokens instead of the sum.
        microbatches: Number of parts that the batch is computed in, one after the other.
        base: The base's weights; None in full tuning.
        policy: The policy.
        batch: Comparisons with the reference's log-probabilities.
    """

    def of_rows(part: Preferences) -> tuple:
        both = passes.interleaved_pairs(part.pairs)
        logp_BT = passes.sequence_logprobs(lm, base, policy, both)
        return passes.split_pairs(
            preference.response_log_ratio(logp_BT, part.reference_BT, both.response_BT, mean)
        )

    return each_microbatch(of_rows, batch, microbatches)
