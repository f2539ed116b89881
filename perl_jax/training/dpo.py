"""The DPO job: a policy fitted to comparisons, held to the policy it starts from."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from perl_jax.data import loading, targets
from perl_jax.data.loading import check_context
from perl_jax.data.splits import check_splits
from perl_jax.data.store import group_of
from perl_jax.evaluation import statistics
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model, load_model
from perl_jax.models import microbatches as microbatches_lib
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel, resting
from perl_jax.objectives import preference
from perl_jax.objectives.preference import Preferences
from perl_jax.runs import folder as folder_lib
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.training import cost, fit
from perl_jax.training.configs import DPOConfig
from perl_jax.training.fit import Supervised
from perl_jax.training.roles import starting_role
from perl_jax.training.state import TrainState
from perl_jax.types import Pairs


@functools.lru_cache(maxsize=8)
def reference_program(lm: LanguageModel, microbatches: int) -> Program:
    """(base or None, reference, tokens) -> its log-probabilities."""
    return Program(
        "reference",
        functools.partial(passes.logprobs_in_microbatches, lm, microbatches),
        limit=SHAPES,
    )


def with_reference(microbatches: int, model: Model, state: TrainState, pairs: Pairs) -> Preferences:
    """Comparisons and what the frozen reference says of both sides."""
    reference = state.frozen["reference"]
    both = passes.both_sides(pairs)
    logp_BT = reference_program(model.lm, microbatches)(
        model.base if reference.weights is None else None, reference, both
    )
    return Preferences(pairs, *passes.sides(logp_BT))


def job_of(config: DPOConfig) -> Supervised:
    """The supervised job that DPO is, once the reference's log-probabilities are there."""
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
        fit.validate_policy,
        None,
        shown,
        functools.partial(with_reference, config.microbatches),
    )


def run_dpo(config: DPOConfig) -> pathlib.Path:
    """The DPO job; returns the policy artefact's folder. A finished run is left as it is."""
    folder = folder_lib.open_run("dpo", config)
    artefact = folder / "adapters" / "policy"
    if folder_lib.finished(artefact, folder / "evaluation.json"):
        return artefact
    check_splits(
        config.data,
        "comparisons",
        ("train", "validation", "test"),
        functools.partial(targets.check_pairs, "train" if config.soft_labels else None),
    )
    model = load_model(config)
    check_context(model, config.data)
    start = starting_role(model, config, config.policy, jax.random.key(config.seed))
    job, model = job_of(config), model.relieved((start,))
    state, optimizers = fit.begin(
        model, config, job, start, {"reference": resting(start, model.lm.config.dtype)}
    )
    del start
    state, timings, program = fit.fit(folder, config, model, state, optimizers, job, "train")
    policy = state.roles["policy"]
    results = evaluate_dpo(model, config, job, state)
    record = model.record(
        "policy",
        policy,
        step=int(state.step),
        metrics={"pairwise_accuracy": results["pairwise_accuracy"]["value"]},
    )
    artefacts.save_artefact(artefact, policy, record)
    cost.write_cost(folder, model, state, {"learn": program}, timings)
    folder_lib.write_results(folder, {"evaluation.json": results})
    return artefact


def evaluate_dpo(model: Model, config: DPOConfig, job: Supervised, state: TrainState) -> dict:
    """How often the implicit reward, beta log(pi / pi_ref), orders the test split's comparisons;
    those of equal responses do not count.
    """
    batches, rows = loading.load_batches(
        model, config.data, "comparisons", "test", config.batch_size, None, config.microbatches
    )
    facts = loading.noted(config.data, "test", batches)
    program = implicit_program(model, config)
    base = model.base if state.roles["policy"].weights is None else None
    order, chosen, rejected = [], [], []
    for index, batch in enumerate(batches):
        real_B = batches.rows_of(index) >= 0
        order += batches.rows_of(index)[real_B].tolist()
        chosen_B, rejected_B = to_host(
            program(base, state.roles["policy"], job.ready(model, state, batch))
        )
        chosen += (config.strength * chosen_B[real_B]).tolist()
        rejected += (config.strength * rejected_B[real_B]).tolist()
    weights = targets.differing_weights(rows, config.data.task, "test", batches)[order]
    counted = weights > 0
    groups = [group_of(rows[row]) for row, counts in zip(order, counted, strict=True) if counts]
    accuracy = statistics.pairwise_accuracy(
        np.asarray(chosen)[counted], np.asarray(rejected)[counted], weights[counted], groups
    )
    return {"pairwise_accuracy": dataclasses.asdict(accuracy), "data": facts}


def implicit_program(model: Model, config: DPOConfig) -> Program:
    """(base or None, policy, preferences) -> log pi / pi_ref of both sides."""
    return Program(
        "implicit",
        functools.partial(_implicit, model.lm, config.token_mean, config.microbatches),
        limit=SHAPES,
    )


def _implicit(
    lm: LanguageModel, mean: bool, microbatches: int, base, policy, batch: Preferences
) -> tuple:
    def of_rows(part: Preferences) -> tuple:
        both = passes.both_sides(part.pairs)
        logp_BT = passes.sequence_logprobs(lm, base, policy, both)
        return passes.sides(
            preference.response_log_ratio(logp_BT, part.reference_BT, both.response_BT, mean)
        )

    return microbatches_lib.each_microbatch(of_rows, batch, microbatches)
