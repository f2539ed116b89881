"""Reward models: a scalar head and an adapter fitted to comparisons, labels or ratings."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from perl_jax import errors
from perl_jax.adapters.initial_values import init_head
from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context, load_batches, noted
from perl_jax.data.pipeline import Batches, with_progress
from perl_jax.data.store import group_of
from perl_jax.data.targets import (
    both_classes,
    differing_weights,
    pair_weights,
    ratings,
)
from perl_jax.evaluation import calibration, intervals, statistics
from perl_jax.evaluation.examples import reward_examples
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.microbatches import each_microbatch
from perl_jax.objectives import supervised
from perl_jax.runs import shown
from perl_jax.runs.folder import write_results
from perl_jax.runs.metrics import EVALUATION_SAMPLES_NAME
from perl_jax.runs.owner import owned
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts, progress, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.runtime.seeds import random_key
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
    """Returns `validation/loss` and `validation/accuracy`.

    The accuracy is the weighted share of pairs whose chosen response has the higher score; a pair
    of equal scores counts half. Pairs of equal responses count in the loss only.

    Args:
        model: The base and its mesh.
        held_out: state -> the means over the held-out rows.
        state: Has the trained role `reward`.
        batches: The held-out comparisons.
        weights: The weight of each comparison, [rows] (`data.targets.pair_weights`).
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
    """Returns `validation/loss`, and `validation/auc` of the scores.

    Args:
        model: The base and its mesh.
        held_out: state -> the means over the held-out rows.
        state: Has the trained role `reward`.
        batches: The held-out labelled rows.
        labels: The label of each row, [rows]; a soft label above 0.5 counts as positive.
    """
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {
        "validation/loss": held_out(state)["loss"],
        "validation/auc": statistics.auc(scores, labels > 0.5),
    }


def validate_regression(
    model: Model, held_out: HeldOut, state: TrainState, batches: Batches, truth: np.ndarray
) -> dict[str, float]:
    """Returns `validation/loss`, and `validation/correlation` of the scores with the ratings.

    Args:
        model: The base and its mesh.
        held_out: state -> the means over the held-out rows.
        state: Has the trained role `reward`.
        batches: The held-out rated rows.
        truth: The rating of each row, [rows].
    """
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {
        "validation/loss": held_out(state)["loss"],
        "validation/correlation": statistics.correlation(scores, truth),
    }


@functools.lru_cache(maxsize=8)
def score_program(lm: LanguageModel, microbatches: int) -> Program:
    """Returns the compiled program (base or None, adapter, batch) -> scores, not normalised.

    The scores are (chosen_B, rejected_B) for comparisons and (score_B,) for labelled or rated rows.
    The base is None if the adapter has weights of its own (full tuning).

    Args:
        lm: The model's functions.
        microbatches: Number of parts that a batch is computed in, one after the other.
    """
    return Program("score", functools.partial(_scores, lm, microbatches), limit=SHAPES)


def _scores(
    lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, batch: Pairs | Labelled
) -> tuple[jax.Array, ...]:
    """Returns the scores of a batch, not normalised.

    They are (chosen_B, rejected_B) for comparisons and (score_B,) for labelled or rated rows.

    Args:
        lm: The model's functions.
        microbatches: Number of parts that the batch is computed in, one after the other.
        base: The base's weights; None in full tuning.
        adapter: The reward model, with a scalar head.
        batch: The rows.
    """

    def of_rows(part: Pairs | Labelled) -> tuple[jax.Array, ...]:
        if isinstance(part, Pairs):
            return passes.pair_scores(lm, base, adapter, part)
        return (passes.scores(lm, base, adapter, part.tokens),)

    return each_microbatch(of_rows, batch, microbatches)


def score_batches(model: Model, adapter: Adapter, batches: Batches) -> tuple[np.ndarray, ...]:
    """Returns the scores of all rows in the order of the split, without filler rows.

    The scores are (chosen [rows], rejected [rows]) for comparisons and (score [rows],) for labelled
    or rated rows. They are the head's outputs, not normalised.

    Args:
        model: The base and its mesh.
        adapter: The reward model.
        batches: All batches of a split.
    """
    program = score_program(model.lm, batches.microbatches)
    base = model.base if adapter.weights is None else None
    sides: tuple[list, list] = ([], [])
    order: list[np.ndarray] = []
    for index, batch in enumerate(with_progress(batches, "scoring")):
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
    """Returns a supervised job that trains the role `reward`.

    Args:
        kind: The kind of rows, one of `data.store.KINDS`.
        objective: What is minimised.
        best: The validation metric whose best step is kept.
        validate: Computes the validation metrics.
        truth: Returns what `validate` compares scores with.
    """
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
    """Returns the supervised job of `config.objective`, with `soft_labels` and `centring` set."""
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
    frozen: Adapter | files.PathLike | None = None,
    run: files.PathLike | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Returns an adapter with a scalar head, trained to score responses.

    With validation rows the step with the best validation metric is kept: the accuracy of pairs,
    the AUC of labels or the correlation with ratings. The record holds the mean and the standard
    deviation of the scores of training responses; `Trained.reward` normalises scores by them. With
    test rows, `Trained.evaluation` holds the measures of `evaluate_reward`.

    Args:
        model: The base (`load_model`).
        rows: An opened data set, or rows of the kind that `config.objective` needs: `prompt`,
            `chosen`, `rejected` (pairwise); `prompt`, `response` and `label` (pointwise) or
            `rating` (regression).
        config: Settings; None: the defaults.
        validation: Rows to choose the best step by.
        test: Rows that the model is evaluated on at the end.
        frozen: An adapter, or the folder of one, that stays unchanged beneath the fresh one. None:
            there is none.
        run: A folder for checkpoints, metrics, evaluation and artefact, or an opened run. The same
            call continues from the last checkpoint, bit for bit; a finished run is read and not
            trained again. None: nothing is written.
        on_step: Called after each step with the row {"step": step, metric: number, ...}, on the
            process that writes. None: nothing is called.

    Raises:
        UserError: For rows or settings that do not fit, or if all training responses get equal
            scores.
        TrainingError: For NaN or infinity.
    """
    config = config or RewardConfig()
    with owned(run):
        job = reward_job(config)
        dataset = of_rows(job.kind, rows, validation, test)
        depends_on = lambda: {"the frozen adapter": content_of(frozen)}
        run = open_library_run("reward", config, run, model, dataset, depends_on)
        if done := load_finished(run, model, "reward", "evaluation.json"):
            return done
        check_context(model, config.data)
        # Fold 1 makes the train state's key.
        body_key, head_key = (jax.random.fold_in(random_key(config.seed), fold) for fold in (0, 2))
        role = fresh_role(model, config, body_key, frozen)
        role = dataclasses.replace(role, head=init_head(head_key, model.lm.config.width))
        model = model.relieved((role,))
        state, optimizers = begin(model, config, job, role)
        del role
        loop, program = supervised_loop(
            model, dataset, config.split, config, job, state, optimizers
        )
        state, timings, metrics = train(config, state, loop, run, on_step)
        adapter = state.roles["reward"]
        results, scores = {}, {}
        with progress.activity("reward"):
            mean, std = reference_moments(model, dataset, config, adapter)
            if "test" in dataset.splits:
                results, scores = evaluate_reward(model, dataset, config, adapter)
                progress.say(shown.test_text("reward", results))
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
        if scores and hosts.is_writer():
            found = reward_examples(dataset.kind, dataset.rows("test"), scores, record.normalise)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
            files.write_atomically(run.folder / EVALUATION_SAMPLES_NAME, "".join(lines))
        write_results(run.folder, {"scores.json": scores, "evaluation.json": results})
        return Trained(adapter, record, metrics, results, folder=artefact)


def reference_moments(
    model: Model, dataset: Dataset, config: RewardConfig, adapter: Adapter
) -> tuple[float, float]:
    """Returns the mean and the standard deviation of the scores of the first training responses.

    The responses are those of the first 512 rows; a comparison has two of them.

    Args:
        model: The base and its mesh.
        dataset: Has the training split, `config.split`.
        config: Settings of the reward model.
        adapter: The reward model.

    Raises:
        UserError: If all scores are equal, or one is not finite.
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
    """Evaluates a reward model on the test split; returns (measures, scores).

    The measures are JSON values for `evaluation.json`:

        n, groups                    number of rows, and of groups (`data.store.group_of`)
        data                         facts about the rows
        pairwise_accuracy            comparisons; differing responses only
        noise_ceiling                comparisons whose true probabilities are all known: the best
                                     accuracy that the noise in the labels allows
        auc, balanced_accuracy,      labels; the threshold is `validation_threshold`
        accuracy
        correlation,                 ratings
        mean_squared_error
        ece, brier, reliability      comparisons and labels: calibration

    Those with an interval are the fields of an `Estimate`; intervals take groups, not rows, to be
    independent. The scores, not normalised, are one list [rows] for each of `chosen` and
    `rejected`, or `score`.

    Args:
        model: The base and its mesh.
        dataset: Has the split `test` and, for labels, `validation`.
        config: Settings of the reward model.
        adapter: The reward model.
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
    """Returns the score threshold with the best balanced accuracy on the labelled validation rows.

    Args:
        model: The base and its mesh.
        dataset: Has the split `validation`; a label above 0.5 counts as positive.
        config: Settings of the reward model.
        adapter: The reward model.
    """
    batches = load_batches(
        model, dataset, "validation", config.data, config.batch_size, None, config.microbatches
    )
    (scores,) = score_batches(model, adapter, batches)
    labels = np.asarray([row["label"] for row in dataset.rows("validation")])
    return statistics.best_threshold(scores, labels > 0.5)


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """Returns the values of the main measures by name, without intervals, for the artefact's
    record.

    Args:
        results: The measures of `evaluate_reward`.
    """
    names = ("auc", "balanced_accuracy", "correlation", "pairwise_accuracy")
    out = {name: results[name]["value"] for name in names if name in results}
    return out | ({"ece": results["ece"]} if "ece" in results else {})
