"""SFT, reward models and small bases trained on the spot: one loop over labelled batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any, Callable, Mapping

import jax
import numpy as np

from perl_jax import checkpoint, config as config_lib, evaluate, hosts, intervals, sharding, state as state_lib, steps
from perl_jax.data.counts import said_of
from perl_jax.data.pipeline import Batches, BatchSpec, make_batches
from perl_jax.data.store import group_of
from perl_jax.data.tasks import get_task
from perl_jax.data.tokenise import RowError
from perl_jax.lora import Adapter, init_head
from perl_jax.loops import run as run_lib
from perl_jax.loops.jobs import DataConfig, JobConfig, RewardConfig, SFTConfig
from perl_jax.loops.model import Model, check_context, data_options, fresh_role, host, load_model, say_attention
from perl_jax.loops.run import Loop, Timings
from perl_jax.loops.splits import check_splits
from perl_jax.models.language_model import LanguageModel
from perl_jax.programs import SHAPES, Program
from perl_jax.state import TrainState
from perl_jax.types import Labelled, Pairs, Tree

# Rows of the training split whose scores define mean 0 and variance 1.
_REFERENCE_ROWS = 512


def load_batches(
    model: Model, config: DataConfig, kind: str, split: str, batch_size: int, seed: int | None, microbatches: int = 1,
    *, most: int | None = None, lengths: tuple[int, ...] | None = None,
) -> tuple[Batches, Any]:  # fmt: skip
    """Batches of a task's rows and the rows; seed None: in order, once, the last batch filled up.

    most: the first so many rows only. lengths: padded lengths to take where they hold the rows, so that programs
    compiled for them are used again.
    """
    task = get_task(config.task)
    rows = hosts.in_turn(lambda: task.open(kind, split, data_options(config)))
    if most is not None:
        rows = [rows[index] for index in range(min(most, len(rows)))]
    share = sharding.row_share(model.mesh)
    spec = BatchSpec(
        batch_size=batch_size,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        bucket_count=config.bucket_count,
        buckets=lengths,
        shuffle_seed=seed,
        epochs=None if seed is not None else 1,
        process_index=share.index,
        process_count=share.count,
        packed=model.packs(config.packing),
        parts=model.row_parts,
        microbatches=microbatches,
    )
    try:
        return make_batches(rows, kind, model.tokenizer, spec), rows
    except RowError as error:
        raise config_lib.UserError(f"{task.place(kind, split, data_options(config), error.index)}: {error.reason}") from error


def training_batches(model: Model, config: JobConfig, kind: str, split: str, batch_size: int, microbatches: int = 1) -> tuple[Batches, Any]:
    """`load_batches` shuffled, of what a job trains on."""
    return load_batches(model, config.data, kind, split, batch_size, config.seed, microbatches)


def noted(config: DataConfig, split: str, batches: Batches) -> dict[str, float]:
    """Says what a split's rows lost to fit (`tokenise.said_of`); returns its numbers as metrics, written with a run's first step.

    UserError where no two responses of any comparison differ.
    """
    rows = batches.rows
    apart = f"Every comparison of the {split} split of {config.task} has two equal responses, cut to max_response_length {config.max_response_length} as they are; some must differ."
    config_lib.require(rows.equal is None or not rows.equal.all(), apart)
    if hosts.is_writer():
        for sentence in said_of(rows.facts, config.max_prompt_length, config.max_response_length):
            print(f"{config.task}, {split}: {sentence}", flush=True)
    return {f"data/{split}/{name}": number for name, number in rows.facts.items()}


def step_program(model: Model, update: Callable, state: TrainState) -> Program:
    """A jitted update(state, base, batch, ...): state donated, the others not, results where the state is."""
    places = (model.adapter_shardings(state), sharding.replicated(model.mesh))
    # Every padded length may come packed too.
    return Program("learn", update, donate=(0,), out_shardings=places, limit=SHAPES)


def initial_state(
    model: Model, config: JobConfig, roles: dict[str, Adapter], optimizers: state_lib.Optimizers, frozen: Mapping[str, Adapter] | None = None,
    controls: Mapping[str, float] | None = None,
) -> TrainState:  # fmt: skip
    """Step 0, placed on the mesh; its arrays are its own."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))
    given = model.place(roles), model.place(dict(frozen or {})), jax.device_put(np.asarray(key), sharding.replicated(model.mesh))
    return begin_program(model, optimizers, controls, *given)(*given)


def begin_program(
    model: Model, optimizers: state_lib.Optimizers, controls: Mapping[str, float] | None, roles: Tree, frozen: Tree, key: jax.Array | jax.ShapeDtypeStruct
) -> Program:  # fmt: skip
    """(roles, frozen roles, key data) -> the state of step 0, for arguments of these shapes."""

    def make(roles: dict[str, Adapter], frozen: dict[str, Adapter], data: jax.Array) -> TrainState:
        return state_lib.init_state(roles, optimizers, jax.random.wrap_key_data(data), frozen, controls)

    places = model.adapter_shardings(jax.eval_shape(make, roles, frozen, key))
    return Program("begin", make, out_shardings=places, limit=1)


# A state's mean of each held-out sum: the loss first, then the logs.
HeldOut = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """What a supervised job is made of: role, kind of rows, objective, validation.

    prepare(model, state, batch): what is added to a placed batch before the update; None: nothing.
    truth(rows, task, split): what scores are held against, where it is not the comparison itself.
    """

    job: str
    role: str
    kind: str
    objective: Callable
    validate: Callable[[Model, HeldOut, TrainState, Batches, np.ndarray | None], dict[str, float]]
    best: str | None
    shown: tuple[str, ...]
    prepare: Callable[[Model, TrainState, Tree], Tree] | None = None
    truth: Callable[[Any, str, str], np.ndarray] | None = None

    def ready(self, model: Model, state: TrainState, batch: Tree) -> Tree:
        """A batch as the objective takes it, on its devices."""
        batch = sharding.put_batch(batch, model.mesh)
        return batch if self.prepare is None else self.prepare(model, state, batch)


def begin(
    model: Model, config: JobConfig, job: Supervised, role: Adapter, frozen_roles: Mapping[str, Adapter] | None = None
) -> tuple[TrainState, state_lib.Optimizers]:
    """The state that one role is trained from, and its optimizer.

    The state's arrays are its own: let go of the role that is given, or its weights are on the devices twice.
    """
    optimizers = {job.role: state_lib.make_optimizer(config.optimizer, config.steps, config.tuning, model.lm.config.width)}
    return initial_state(model, config, {job.role: role}, optimizers, frozen_roles), optimizers


def fit(
    folder: pathlib.Path, config: JobConfig, model: Model, state: TrainState, optimizers: state_lib.Optimizers, job: Supervised, split: str
) -> tuple[TrainState, Timings, Program]:
    """Trains the role of a fresh state, whose arrays are used up; returns its (best or last) state."""
    batches, _ = training_batches(model, config, job.kind, split, config.batch_size, config.microbatches)
    held_out, rows = load_batches(model, config.data, job.kind, "validation", config.batch_size, None, config.microbatches)
    program = learn_program(model, config, job, state, optimizers)
    measure = held_out_program(model, config, job)
    frozen = None if config.tuning == "full" else model.base
    truth = None if job.truth is None else job.truth(rows, config.data.task, "validation")
    facts = noted(config.data, split, batches) | noted(config.data, "validation", held_out)

    def advance(state: TrainState, batch: Tree) -> tuple[TrainState, dict, dict]:
        state, metrics = program(state, frozen, job.ready(model, state, batch))
        return state, {name: value.item() for name, value in host(metrics).items()}, {}

    loss = lambda state: held_out_loss(model, job, measure, state, held_out)
    validate = lambda state: (job.validate(model, loss, state, held_out, truth), [])
    loop = Loop(job.job, advance, iter(batches), validate, job.best, job.shown, facts)
    say_attention(job.job, model.lm)
    state, timings = run_lib.train(folder, config, state, loop)
    return state, timings, program


def learn_program(model: Model, config: JobConfig, job: Supervised, state: TrainState, optimizers: state_lib.Optimizers) -> Program:
    """(state, base or None, batch) -> (state, metrics)."""
    update = functools.partial(steps.train_step, functools.partial(job.objective, model.lm), optimizers, config.microbatches)
    return step_program(model, update, state)


def held_out_program(model: Model, config: JobConfig, job: Supervised) -> Program:
    """(roles, base or None, batch) -> the objective's sums over a held-out batch, in the update's microbatches."""
    return Program("validate", functools.partial(_held_out, functools.partial(job.objective, model.lm), config.microbatches), limit=SHAPES)


def _held_out(objective: Callable, microbatches: int, roles: dict, frozen: Tree, batch: Tree) -> tuple:
    """The objective without dropout: (loss, logs) as sums."""
    return steps.summed_microbatches(lambda part: objective(roles, frozen, part, None), batch, microbatches)


def held_out_loss(model: Model, job: Supervised, measure: Program, state: TrainState, batches: Batches) -> dict[str, float]:
    """Means over all held-out rows, `loss` and the objective's logs: sums and weights added, divided once."""
    frozen = model.base if any(role.weights is None for role in state.roles.values()) else None
    sums: dict[str, list[float]] = {}
    for batch in batches:
        loss, logs = host(measure(state.roles, frozen, job.ready(model, state, batch)))
        for name, part in {"loss": loss, **logs}.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + float(part.total), total[1] + float(part.weight)
    return {name: total / weight if weight > 0 else 0.0 for name, (total, weight) in sums.items()}


def validate_policy(model: Model, held_out: HeldOut, state: TrainState, batches: Batches, truth: None) -> dict[str, float]:
    """Returns the held-out loss and, for comparisons, the share of pairs in the right order."""
    found = held_out(state)
    accuracy = {"validation/accuracy": found["train/accuracy"]} if "train/accuracy" in found else {}
    return {"validation/loss": found["loss"], **accuracy}


def validate_pairs(model: Model, held_out: HeldOut, state: TrainState, batches: Batches, weights: np.ndarray) -> dict[str, float]:
    """Returns the held-out loss and the weighted share of pairs that are scored in the right order.

    Pairs of equal responses count in the loss but not in that share.
    """
    scores = score_batches(model, state.roles["reward"], batches)
    return {"validation/loss": held_out(state)["loss"], "validation/accuracy": evaluate.pairwise_accuracy(*scores, weights * ~batches.rows.equal).value}


def validate_labels(model: Model, held_out: HeldOut, state: TrainState, batches: Batches, labels: np.ndarray) -> dict[str, float]:
    """Returns the held-out loss and the AUC of the scores; a soft label above 0.5 counts as a yes."""
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {"validation/loss": held_out(state)["loss"], "validation/auc": evaluate.auc(scores, labels > 0.5)}


def validate_regression(model: Model, held_out: HeldOut, state: TrainState, batches: Batches, truth: np.ndarray) -> dict[str, float]:
    """Returns the held-out loss and the correlation of scores with ratings."""
    (scores,) = score_batches(model, state.roles["reward"], batches)
    return {"validation/loss": held_out(state)["loss"], "validation/correlation": evaluate.correlation(scores, truth)}


@functools.lru_cache(maxsize=8)
def score_program(lm: LanguageModel, microbatches: int) -> Program:
    """(base, adapter, batch) -> the scores of its rows: (chosen_B, rejected_B), or (score_B,)."""
    return Program("score", functools.partial(_scores, lm, microbatches), limit=SHAPES)


def _scores(lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, batch: Pairs | Labelled) -> tuple[jax.Array, ...]:
    def of_rows(part: Pairs | Labelled) -> tuple[jax.Array, ...]:
        if isinstance(part, Pairs):
            return steps.pair_scores(lm, base, adapter, part)
        return (steps.scores(lm, base, adapter, part.tokens),)

    return steps.each_microbatch(of_rows, batch, microbatches)


def score_batches(model: Model, adapter: Adapter, batches: Batches) -> tuple[np.ndarray, ...]:
    """Raw scores in the source's order: (chosen, rejected) of pairs, (score,) of labelled rows."""
    program = score_program(model.lm, batches.spec.microbatches)
    base = model.base if adapter.weights is None else None
    sides: tuple[list, list] = ([], [])
    order: list[np.ndarray] = []
    for index, batch in enumerate(batches):
        order.append(batches.rows_of(index))
        for out, score_B in zip(sides, program(base, adapter, sharding.put_batch(batch, model.mesh))):
            out.append(host(score_B))
    rows = np.concatenate(order)
    real = rows >= 0
    back = np.argsort(rows[real])
    return tuple(np.concatenate(side)[real][back] for side in sides if side)


def both_classes(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' labels, in [0, 1]; AUC and balanced accuracy need some above 0.5 and some below."""
    labels = np.asarray([row["label"] for row in rows])
    config_lib.require(
        bool((labels > 0.5).any() and (labels <= 0.5).any()),
        f"The {split} split of {task} has labels of one class only; it needs rows with label 0 and rows with label 1.",
    )
    return labels


def pair_weights(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' weights: the pairs of one ranking count as much as its line says together."""
    weights = np.asarray([row["weight"] for row in rows], np.float64)
    counts = any(row["weight"] > 0 and row["chosen"] != row["rejected"] for row in rows)
    config_lib.require(counts, f"Every comparison of the {split} split of {task} has weight 0 or two equal responses; some must count.")
    return weights


def differing_weights(rows: Any, task: str, split: str, batches: Batches) -> np.ndarray:
    """`pair_weights`, 0 where the two responses are equal as they were cut: those are in no order, right or wrong."""
    weights = pair_weights(rows, task, split) * ~batches.rows.equal
    config_lib.require(bool(weights.any()), f"Every comparison of the {split} split of {task} has weight 0, or two responses that are equal as they were cut; some must count.")
    return weights


def check_pairs(soft: str | None, rows: Any, task: str, split: str) -> None:
    """UserError for comparisons that weigh nothing, and where in the split `soft`, whose labels are to be probabilities, none is known."""
    pair_weights(rows, task, split)
    known = split != soft or bool(np.isfinite([row["probability"] for row in rows]).any())
    config_lib.require(known, f"soft_labels is for comparisons with a probability; none of the {split} split of {task} has one: leave it out.")


def ratings(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' ratings; a correlation needs two different ones."""
    found = np.asarray([row["rating"] for row in rows])
    config_lib.require(len(np.unique(found)) > 1, f"The {split} split of {task} has one rating only, {found[0]}; it needs different ones.")
    return found


SFT = Supervised("sft", "policy", "demonstrations", steps.sft_objective, validate_policy, None, ("train/loss", "validation/loss"))


def _reward(kind: str, objective: Callable, best: str, validate: Callable, truth: Callable) -> Supervised:
    return Supervised("reward", "reward", kind, objective, validate, best, ("train/loss", best), truth=truth)


REWARD = {
    "pairwise": _reward("comparisons", steps.pairwise_objective, "validation/accuracy", validate_pairs, pair_weights),
    "pointwise": _reward("labels", steps.pointwise_objective, "validation/auc", validate_labels, both_classes),
    "regression": _reward("ratings", steps.regression_objective, "validation/correlation", validate_regression, ratings),
}


def reward_job(config: RewardConfig) -> Supervised:
    """The supervised job that an objective is."""
    job = REWARD[config.objective]
    if config.objective != "pairwise":
        return job
    objective = functools.partial(job.objective, soft_labels=config.soft_labels, centring=config.centring)
    return dataclasses.replace(job, objective=objective)


def run_sft(config: SFTConfig) -> pathlib.Path:
    """The SFT job; returns the artefact's folder. A finished run is left as it is."""
    folder = run_lib.open_run("sft", config)
    artefact = folder / "adapters" / "policy"
    if run_lib.finished(artefact, folder / "cost.json"):
        return artefact
    check_splits(config.data, SFT.kind, ("train", "validation"))
    model = load_model(config)
    check_context(model, config.data)
    role = fresh_role(model, config, jax.random.key(config.seed))
    model = model.relieved((role,))
    state, optimizers = begin(model, config, SFT, role)
    del role
    state, timings, program = fit(folder, config, model, state, optimizers, SFT, "train")
    policy = state.roles["policy"]
    checkpoint.save_artefact(artefact, policy, model.record("policy", policy, step=int(state.step)))
    run_lib.write_cost(folder, model, state, {"learn": program}, timings)
    return artefact


def run_reward(config: RewardConfig) -> pathlib.Path:
    """The reward job: train, keep the best step, normalise, evaluate on the test split."""
    folder = run_lib.open_run("reward", config)
    artefact = folder / "adapters" / "reward"
    if run_lib.finished(artefact, folder / "evaluation.json"):
        return artefact
    job = reward_job(config)
    check = functools.partial(check_pairs, config.split if config.soft_labels else None) if config.objective == "pairwise" else job.truth
    check_splits(config.data, job.kind, (config.split, "validation", "test"), check)
    model = load_model(config)
    check_context(model, config.data)
    # Not fold 1, which the train state's key is made of.
    body_key, head_key = (jax.random.fold_in(jax.random.key(config.seed), fold) for fold in (0, 2))
    role = fresh_role(model, config, body_key).replace(head=init_head(head_key, model.lm.config.width))
    model = model.relieved((role,))
    state, optimizers = begin(model, config, job, role)
    del role
    state, timings, program = fit(folder, config, model, state, optimizers, job, config.split)
    adapter = state.roles["reward"]
    mean, std = reference_moments(model, config, adapter, job.kind)
    results, rows = evaluate_reward(model, config, adapter, job.kind)
    record = model.record("reward", adapter, step=int(state.step), metrics=_headline(results), score_mean=mean, score_std=std)
    checkpoint.save_artefact(artefact, adapter, record)
    run_lib.write_cost(folder, model, state, {"learn": program}, timings)
    run_lib.write_results(folder, {"scores.json": rows, "evaluation.json": results})
    return artefact


def reference_moments(model: Model, config: RewardConfig, adapter: Adapter, kind: str) -> tuple[float, float]:
    """Mean and standard deviation of raw scores over the first responses of the training split."""
    data = dataclasses.replace(config.data, train_size=min(_REFERENCE_ROWS, config.data.train_size or _REFERENCE_ROWS))
    batches, _ = load_batches(model, data, kind, config.split, config.batch_size, None, config.microbatches)
    scores = np.concatenate(score_batches(model, adapter, batches)).astype(np.float64)[: 2 * _REFERENCE_ROWS]
    std = float(scores.std())
    config_lib.require(math.isfinite(std) and std > 0, "The reward model gives every reference response the same score; train it longer.")
    return float(scores.mean()), std


def evaluate_reward(model: Model, config: RewardConfig, adapter: Adapter, kind: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Held-out quality on the test split, for `evaluation.json`, and the raw score of every row.

    n: rows. groups: what they are independent draws of (`data.store.group_of`), which intervals are over.
    """
    batches, rows = load_batches(model, config.data, kind, "test", config.batch_size, None, config.microbatches)
    facts = {"data": noted(config.data, "test", batches)}
    scores = score_batches(model, adapter, batches)
    names = ("chosen", "rejected") if kind == "comparisons" else ("score",)
    named = {name: side.tolist() for name, side in zip(names, scores, strict=True)}
    groups = [group_of(row) for row in rows]
    results: dict[str, Any] = {"n": len(groups), "groups": len(set(groups))}
    if kind == "ratings":
        truth = ratings(rows, config.data.task, "test")
        error = intervals.mean_ci(np.square(scores[0] - truth), groups)
        measures = {"correlation": evaluate.correlation_estimate(scores[0], truth, groups), "mean_squared_error": error}
        return results | facts | {name: dataclasses.asdict(found) for name, found in measures.items()}, named
    if kind == "comparisons":
        weights = differing_weights(rows, config.data.task, "test", batches)
        counted = np.flatnonzero(weights > 0)
        scores, groups = tuple(side[counted] for side in scores), [groups[row] for row in counted]
        results["pairwise_accuracy"] = dataclasses.asdict(evaluate.pairwise_accuracy(*scores, weights[counted], groups))
        known = np.asarray([row["probability"] for row in rows])[counted]
        if np.isfinite(known).all():
            results["noise_ceiling"] = float(np.mean(np.maximum(known, 1 - known)))
        probabilities, labels = evaluate.preference_probabilities(*scores)
        groups = [*groups, *groups]
    else:
        labels = both_classes(rows, config.data.task, "test")
        threshold, yes = validation_threshold(model, config, adapter), labels > 0.5
        measures = {
            "auc": evaluate.auc_estimate(scores[0], yes, groups),
            "balanced_accuracy": evaluate.balanced_accuracy_estimate(scores[0], yes, threshold, groups),
            "accuracy": intervals.proportion((scores[0] >= threshold) == yes, groups),
        }
        results |= {name: dataclasses.asdict(found) for name, found in measures.items()}
        probabilities = evaluate.sigmoid(scores[0])
    table = evaluate.reliability(probabilities, labels, groups=groups)
    results |= {
        "ece": evaluate.expected_calibration_error(table),
        "brier": evaluate.brier(probabilities, labels),
        "reliability": [dataclasses.asdict(row) for row in table],
    }
    return results | facts, named


def validation_threshold(model: Model, config: RewardConfig, adapter: Adapter) -> float:
    """The score threshold with the best balanced accuracy on the validation split."""
    batches, rows = load_batches(model, config.data, "labels", "validation", config.batch_size, None, config.microbatches)
    (scores,) = score_batches(model, adapter, batches)
    return evaluate.best_threshold(scores, np.asarray([row["label"] for row in rows]) > 0.5)


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """The numbers that travel with the artefact."""
    names = ("auc", "balanced_accuracy", "correlation", "pairwise_accuracy")
    out = {name: results[name]["value"] for name in names if name in results}
    return out | ({"ece": results["ece"]} if "ece" in results else {})
