"""Reward models: a scalar head and an adapter fitted to comparisons, labels or ratings."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from perl_jax import errors
from perl_jax.adapters.initial_values import init_head
from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context, load_batches, noted
from perl_jax.data.pipeline import Batches
from perl_jax.data.store import group_of
from perl_jax.data.targets import (
    both_classes,
    differing_weights,
    pair_weights,
    ratings,
)
from perl_jax.evaluation import calibration, intervals, statistics
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.microbatches import each_microbatch
from perl_jax.objectives import supervised
from perl_jax.runs.folder import write_results
from perl_jax.runs.run import Run
from perl_jax.runtime import sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.training import cost
from perl_jax.training.configs import RewardConfig
from perl_jax.training.fit import HeldOut, Supervised, begin, supervised_loop
from perl_jax.training.loop import OnStep, train
from perl_jax.training.roles import fresh_role
from perl_jax.training.state import TrainState
from perl_jax.training.trained import Trained, content_of, load_finished, open_library_run
from perl_jax.types import Labelled, Pairs, Tree

# How many rows of the training split are scored to normalise scores to mean 0 and variance 1.
_REFERENCE_ROWS = 512


def validate_pairs(
    model: Model, held_out: HeldOut, state: TrainState, batches: Batches, weights: np.ndarray
) -> dict[str, float]:
    """Returns the held-out loss and the weighted share of pairs that are scored in the right order.

    Pairs of equal responses count in the loss but not in that share.
    """
    chosen, rejected = score_batches(model, state.roles["reward"], batches)
    counted = weights * batches.rows.different
    return {
        "validation/loss": held_out(state)["loss"],
        "validation/accuracy": statistics.pairwise_accuracy(chosen, rejected, counted).value,
    }


def validate_labels(
    model: Model, held_out: HeldOut, state: TrainState, batches: Batches, labels: np.ndarray
) -> dict[str, float]:
    """Returns the held-out loss and the AUC of the scores; a soft label above 0.5 counts as a
    yes.
    """
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {
        "validation/loss": held_out(state)["loss"],
        "validation/auc": statistics.auc(scores, labels > 0.5),
    }


def validate_regression(
    model: Model, held_out: HeldOut, state: TrainState, batches: Batches, truth: np.ndarray
) -> dict[str, float]:
    """Returns the held-out loss and the correlation of scores with ratings."""
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {
        "validation/loss": held_out(state)["loss"],
        "validation/correlation": statistics.correlation(scores, truth),
    }


@functools.lru_cache(maxsize=8)
def score_program(lm: LanguageModel, microbatches: int) -> Program:
    """Returns the compiled program (base or None, adapter, batch) -> raw scores.

    The scores are (chosen_B, rejected_B) for comparisons and (score_B,) for labelled rows.
    """
    return Program("score", functools.partial(_scores, lm, microbatches), limit=SHAPES)


def _scores(
    lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, batch: Pairs | Labelled
) -> tuple[jax.Array, ...]:
    def of_rows(part: Pairs | Labelled) -> tuple[jax.Array, ...]:
        if isinstance(part, Pairs):
            return passes.pair_scores(lm, base, adapter, part)
        return (passes.scores(lm, base, adapter, part.tokens),)

    return each_microbatch(of_rows, batch, microbatches)


def score_batches(model: Model, adapter: Adapter, batches: Batches) -> tuple[np.ndarray, ...]:
    """Returns the raw scores of all rows in the order of the split, without filler.

    They are (chosen [rows], rejected [rows]) for comparisons and (score [rows],) for labelled rows.
    """
    program = score_program(model.lm, batches.microbatches)
    base = model.base if adapter.weights is None else None
    sides: tuple[list, list] = ([], [])
    order: list[np.ndarray] = []
    for index, batch in enumerate(batches):
        order.append(batches.rows_of(index))
        scores = program(base, adapter, sharding.put_batch(batch, model.mesh))
        # Labelled rows have one side.
        for out, score_B in zip(sides, scores, strict=False):
            out.append(to_host(score_B))
    rows = np.concatenate(order)
    real = rows >= 0
    back = np.argsort(rows[real])
    return tuple(np.concatenate(side)[real][back] for side in sides if side)


def _reward(
    kind: str, objective: Callable, best: str, validate: Callable, truth: Callable
) -> Supervised:
    return Supervised(
        "reward", "reward", kind, objective, validate, best, ("train/loss", best), truth=truth
    )


REWARD = {
    "pairwise": _reward(
        "comparisons",
        supervised.pairwise_objective,
        "validation/accuracy",
        validate_pairs,
        pair_weights,
    ),
    "pointwise": _reward(
        "labels", supervised.pointwise_objective, "validation/auc", validate_labels, both_classes
    ),
    "regression": _reward(
        "ratings",
        supervised.regression_objective,
        "validation/correlation",
        validate_regression,
        ratings,
    ),
}


def reward_job(config: RewardConfig) -> Supervised:
    """Returns the supervised job of `config.objective`."""
    job = REWARD[config.objective]
    if config.objective != "pairwise":
        return job
    objective = functools.partial(
        job.objective, soft_labels=config.soft_labels, centring=config.centring
    )
    return dataclasses.replace(job, objective=objective)


def train_reward(
    model: Model,
    rows: Iterable[Row] | Dataset,
    config: RewardConfig | None = None,
    *,
    validation: Iterable[Row] = (),
    test: Iterable[Row] = (),
    frozen: Adapter | str | pathlib.Path | None = None,
    run: str | pathlib.Path | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Trains an adapter with a scalar head to score responses.

    With validation rows the best validated step is kept. Raw scores are normalised to mean 0 and
    variance 1 over responses of the training rows.

    Args:
        model: The base (`load_model`).
        rows: Rows of the kind that `config.objective` needs: `prompt`, `chosen`, `rejected`
            (pairwise); `prompt`, `response`, `label` (pointwise) or `rating` (regression).
        config: Settings; None: the defaults.
        validation: Rows to choose the best step by.
        test: Rows that the model is evaluated on at the end.
        frozen: An adapter that stays as it is beneath the one that is trained.
        run: A folder for checkpoints, metrics, evaluation and artefact; the same call goes on from
            the last checkpoint, bit for bit. None: nothing is written.
        on_step: Is called with each step's metrics.

    Raises:
        UserError: For rows or settings that do not fit.
        TrainingError: For NaN or infinity.
    """
    config = config or RewardConfig()
    job = reward_job(config)
    dataset = of_rows(job.kind, rows, validation, test)
    depends_on = lambda: {"the frozen adapter": content_of(frozen)}
    run = open_library_run("reward", config, run, model, dataset, depends_on)
    if done := load_finished(run, model, "reward", "evaluation.json"):
        return done
    check_context(model, config.data)
    # Fold 1 makes the train state's key.
    body_key, head_key = (jax.random.fold_in(jax.random.key(config.seed), fold) for fold in (0, 2))
    role = fresh_role(model, config, body_key, frozen)
    role = dataclasses.replace(role, head=init_head(head_key, model.lm.config.width))
    model = model.relieved((role,))
    state, optimizers = begin(model, config, job, role)
    del role
    loop, program = supervised_loop(model, dataset, config.split, config, job, state, optimizers)
    state, timings, metrics = train(config, state, loop, run, on_step)
    adapter = state.roles["reward"]
    mean, std = reference_moments(model, dataset, config, adapter)
    results, scores = {}, {}
    if "test" in dataset.splits:
        results, scores = evaluate_reward(model, dataset, config, adapter)
    record = model.record(
        "reward",
        adapter,
        step=int(state.step),
        metrics=_headline(results),
        score_mean=mean,
        score_std=std,
    )
    if run is None:
        return Trained(adapter, record, metrics, results)
    artefact = run.artefact("reward")
    artefacts.save_artefact(artefact, adapter, record)
    cost.write_cost(run.folder, model, state, {"learn": program}, timings)
    write_results(run.folder, {"scores.json": scores, "evaluation.json": results})
    return Trained(adapter, record, metrics, results, folder=artefact)


def reference_moments(
    model: Model, dataset: Dataset, config: RewardConfig, adapter: Adapter
) -> tuple[float, float]:
    """Returns mean and standard deviation of the raw scores of the first training responses.

    Raises UserError if all scores are equal.
    """
    batches = load_batches(
        model,
        dataset,
        config.split,
        config.data,
        config.batch_size,
        None,
        config.microbatches,
        most=_REFERENCE_ROWS,
    )
    scores = np.concatenate(score_batches(model, adapter, batches)).astype(np.float64)[
        : 2 * _REFERENCE_ROWS
    ]
    std = float(scores.std())
    errors.require(
        math.isfinite(std) and std > 0,
        "The reward model gives every reference response the same score; train it longer.",
    )
    return float(scores.mean()), std


def evaluate_reward(
    model: Model, dataset: Dataset, config: RewardConfig, adapter: Adapter
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Evaluates a reward model on the test split.

    Returns:
        The measures for `evaluation.json`, and the raw scores of all rows by name. `n` is the
        number of rows and `groups` the number of groups (`data.store.group_of`); confidence
        intervals take groups, not rows, to be independent.
    """
    kind, rows = dataset.kind, dataset.rows("test")
    batches = load_batches(
        model, dataset, "test", config.data, config.batch_size, None, config.microbatches
    )
    facts = {"data": noted(dataset, "test", config.data, batches)}
    scores = score_batches(model, adapter, batches)
    names = ("chosen", "rejected") if kind == "comparisons" else ("score",)
    named = {name: side.tolist() for name, side in zip(names, scores, strict=True)}
    groups = [group_of(row) for row in rows]
    results: dict[str, Any] = {"n": len(groups), "groups": len(set(groups))}
    if kind == "ratings":
        truth = ratings(rows, dataset.name, "test")
        error = intervals.mean_ci(np.square(scores[0] - truth), groups)
        measures = {
            "correlation": statistics.correlation_estimate(scores[0], truth, groups),
            "mean_squared_error": error,
        }
        return results | facts | {
            name: dataclasses.asdict(found) for name, found in measures.items()
        }, named
    if kind == "comparisons":
        weights = differing_weights(rows, dataset.name, "test", batches)
        counted = np.flatnonzero(weights > 0)
        chosen, rejected = (side[counted] for side in scores)
        groups = [groups[row] for row in counted]
        results["pairwise_accuracy"] = dataclasses.asdict(
            statistics.pairwise_accuracy(chosen, rejected, weights[counted], groups)
        )
        known = np.asarray([row["probability"] for row in rows])[counted]
        if np.isfinite(known).all():
            results["noise_ceiling"] = float(np.mean(np.maximum(known, 1 - known)))
        probabilities, labels = calibration.preference_probabilities(chosen, rejected)
        groups = [*groups, *groups]
    else:
        labels = both_classes(rows, dataset.name, "test")
        threshold, yes = validation_threshold(model, dataset, config, adapter), labels > 0.5
        measures = {
            "auc": statistics.auc_estimate(scores[0], yes, groups),
            "balanced_accuracy": statistics.balanced_accuracy_estimate(
                scores[0], yes, threshold, groups
            ),
            "accuracy": intervals.proportion((scores[0] >= threshold) == yes, groups),
        }
        results |= {name: dataclasses.asdict(found) for name, found in measures.items()}
        probabilities = calibration.sigmoid(scores[0])
    table = calibration.reliability(probabilities, labels, groups=groups)
    results |= {
        "ece": calibration.expected_calibration_error(table),
        "brier": calibration.brier(probabilities, labels),
        "reliability": [dataclasses.asdict(row) for row in table],
    }
    return results | facts, named


def validation_threshold(
    model: Model, dataset: Dataset, config: RewardConfig, adapter: Adapter
) -> float:
    """Returns the score threshold with the best balanced accuracy on the validation rows."""
    batches = load_batches(
        model, dataset, "validation", config.data, config.batch_size, None, config.microbatches
    )
    (scores,) = score_batches(model, adapter, batches)
    labels = np.asarray([row["label"] for row in dataset.rows("validation")])
    return statistics.best_threshold(scores, labels > 0.5)


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """Returns the measures that the artefact's record holds."""
    names = ("auc", "balanced_accuracy", "correlation", "pairwise_accuracy")
    out = {name: results[name]["value"] for name in names if name in results}
    return out | ({"ece": results["ece"]} if "ece" in results else {})
