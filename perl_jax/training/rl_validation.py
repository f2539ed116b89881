"""Validation in RL: responses to held-out prompts, samples to read, and the step that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.data.loading import load_batches
from perl_jax.data.pipeline import Batches, with_progress
from perl_jax.errors import TrainingError
from perl_jax.generation.sampling import Rollout
from perl_jax.objectives import kl
from perl_jax.rewards.scoring import response_texts
from perl_jax.runs.run import Run
from perl_jax.runtime import hosts, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.seeds import random_key
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.rl_step import (
    Rollouts,
    gold_rewards,
    layouts_of,
    reference_logprobs,
    with_layout,
)
from perl_jax.training.state import TrainState
from perl_jax.types import Array, Prompts

# The validation metric whose best step the artefacts hold.
SELECTED_BY = "validation/reward"
# How many prompts at least have their first response written to the run's folder.
_KEPT = 8
# Folded into the seed's key for the samples of validations. Fold 1 makes the train state's key and
# fold 2 the key of a head.
_VALIDATION = 3


def held_out_prompts(job: Rollouts, lengths: tuple[int, ...]) -> tuple[Rollouts, Batches] | None:
    """Returns the job with the first validation prompts as its rows, and their batches.

    Returns None if `validation_prompts` is 0, and, with a printed message, if the data set has no
    validation split. A batch has as many prompts as a training batch. Its padded length is one of
    the training batches' lengths if the longest of these holds every prompt, so that training and
    validation share compiled programs.

    Args:
        job: The job of the training steps.
        lengths: The padded lengths of the training batches in tokens, ascending.
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
    return _first_prompts(job, "validation", config.validation_prompts, lengths)


def _first_prompts(
    job: Rollouts, split: str, most: int, lengths: tuple[int, ...]
) -> tuple[Rollouts, Batches]:
    """Returns the job with the first prompts of a split as its rows, and their batches.

    Args:
        job: The job of the training steps.
        split: The split.
        most: The largest number of prompts.
        lengths: The padded lengths of the training batches in tokens, ascending.
    """
    config, dataset = job.config, job.dataset
    longest = config.data.max_prompt_length
    lengths = lengths if lengths[-1] >= longest else (*lengths, longest)
    number = config.batch_size // config.algorithm.group
    batches = load_batches(
        job.model, dataset, split, config.data, number, None, most=most, lengths=lengths
    )
    source = dataset.rows(split)
    rows = [source[index] for index in range(min(most, len(source)))]
    return dataclasses.replace(job, rows=rows, scorer=job.scorer.over(rows)), batches


@dataclasses.dataclass(frozen=True)
class Shown:
    """The prompts whose responses are samples, the same ones at each step.

    Attributes:
        job: The job, with the rows of the prompts.
        batches: The batches of the prompts.
        split: The split that they are from.
    """

    job: Rollouts
    batches: Batches
    split: str


def shown_prompts(
    job: Rollouts, lengths: tuple[int, ...], held_out: tuple[Rollouts, Batches] | None
) -> Shown:
    """Returns the prompts to sample for a reader: those of the validation where there is one.

    Without validation they are the first prompts of the validation split or, if the data set has
    none, of the training split.

    Args:
        job: The job of the training steps.
        lengths: The padded lengths of the training batches in tokens, ascending.
        held_out: The result of `held_out_prompts`.
    """
    if held_out is not None:
        return Shown(*held_out, "validation")
    split = "validation" if "validation" in job.dataset.splits else "train"
    return Shown(*_first_prompts(job, split, most_samples(job.config), lengths), split)


def most_samples(config: RLConfig) -> int:
    """Returns how many responses at a time are samples, each to another prompt."""
    return max(_KEPT, config.show_samples)


def validate(
    job: Rollouts, batches: Batches, state: TrainState
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples responses to held-out prompts; returns (means over them, some of them as samples).

    Each prompt gets as many responses as in training. The sampling keys depend on the seed and not
    on the step, so that the validations of a run are comparable.

    The means are `validation/NAME` for each measure of `measured_responses`. The samples are the
    first responses to the first prompts (`most_samples`, `samples_of`).

    Args:
        job: The result of `held_out_prompts`.
        batches: The batches of the held-out prompts.
        state: Has the policy and the reference.

    Raises:
        TrainingError: If a mean is NaN or infinite.
    """
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[dict[str, Any]] = []
    most = most_samples(job.config)
    for answered in answers(job, batches, state):
        for name, value_B in answered.measures.items():
            columns.setdefault(name, []).append(value_B[answered.row_B >= 0])
        samples += samples_of(job, answered, "validation", most - len(samples))
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


def sample_prompts(shown: Shown, state: TrainState) -> list[dict[str, Any]]:
    """Returns samples of a policy's responses to the prompts that are shown (`samples_of`).

    The keys of sampling are those of `validate`, so the samples of all steps differ by the policy
    alone. Nothing that training reads is changed.

    Args:
        shown: The prompts.
        state: Has the policy.
    """
    samples: list[dict[str, Any]] = []
    most = most_samples(shown.job.config)
    for answered in answers(shown.job, shown.batches, state, whole=False):
        samples += samples_of(shown.job, answered, shown.split, most - len(samples))
        if len(samples) >= most:
            break
    return samples


@dataclasses.dataclass(frozen=True)
class Answered:
    """The responses to one batch of prompts, and what was measured of them.

    Attributes:
        row_B: The index of each response's row in the job's rows; -1 for filler.
        texts: The responses as text.
        measures: float64 [B] by name (`measured_responses`).
        parts: float64 [B] by name: what the reward is made of, if it has several parts.
    """

    row_B: np.ndarray
    texts: list[str]
    measures: dict[str, np.ndarray]
    parts: dict[str, np.ndarray]


def answers(
    job: Rollouts, batches: Batches, state: TrainState, whole: bool = True
) -> Iterator[Answered]:
    """Yields the responses to each batch of prompts, and their measures.

    Args:
        job: Programs, rewards, settings, and the rows of the prompts.
        batches: The batches.
        state: Has the policy and the reference.
        whole: Whether everything is measured (`measured_responses`).
    """
    group = job.config.algorithm.group
    key = jax.random.fold_in(random_key(job.config.seed), _VALIDATION)
    stage = "validating" if whole else "sampling"
    for index, batch in enumerate(with_progress(batches, stage, "prompts")):
        rollout, measures, parts = measured_responses(
            job, state, batch, jax.random.fold_in(key, index), whole
        )
        texts = response_texts(job.model.tokenizer, rollout)
        yield Answered(np.repeat(batches.rows_of(index), group), texts, measures, parts)


def samples_of(job: Rollouts, answered: Answered, split: str, most: int) -> list[dict[str, Any]]:
    """Returns the first response to each of the first `most` prompts of a batch, as JSON objects.

    A sample has `split`, `prompt`, `response`, `reward` (before shaping) and `finished` (false if
    it was cut at max_response_length); and, where they are known, `parts` (of the reward, by name),
    `gold` (the true reward) and `kl`. A number that is not finite is null.

    Args:
        job: Has the rows and the number of responses to a prompt.
        answered: The responses to the batch.
        split: The split of the prompts.
        most: The largest number of samples.
    """
    number = lambda value: float(value) if np.isfinite(value) else None
    samples = []
    first = np.flatnonzero(answered.row_B >= 0)[:: job.config.algorithm.group]
    for row in first[: max(0, most)].tolist():
        sample = {
            "split": split,
            "prompt": job.rows[int(answered.row_B[row])]["prompt"],
            "response": answered.texts[row],
            "reward": number(answered.measures["reward"][row]),
        }
        if answered.parts:
            sample["parts"] = {name: number(part_B[row]) for name, part_B in answered.parts.items()}
        sample |= {
            name: number(answered.measures[name][row])
            for name in ("gold", "kl")
            if name in answered.measures
        }
        samples.append(sample | {"finished": bool(answered.measures["eos_rate"][row])})
    return samples


def measured_responses(
    job: Rollouts, state: TrainState, batch: Prompts, key: jax.Array, whole: bool = True
) -> tuple[Rollout, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Samples responses to a batch of prompts; returns (rollout, measures by name, parts by name).

    A measure is float64 [B], where B is prompts times samples per prompt:

        reward      the score before shaping
        length      number of tokens
        eos_rate    1 for a response that has ended by itself, else 0
        kl          sum_t log pi - log pi_ref to the current reference; only with a reference
        gold        the true reward; only if the data set knows it

    The parts, float64 [B] too, are what the reward is made of: `model` or `model_0`, `model_1` and
    so on, the normalised score of each reward model, and `term/NAME` of each term, before their
    weights. A reward of a single part has no parts.

    Filler prompts (row -1) have measures too, which the caller must leave out.

    Args:
        job: Programs, rewards and settings.
        state: Has the policy and the reference.
        batch: The prompts, on the host.
        key: The key of sampling.
        whole: Whether everything is measured. Otherwise there is no KL, and terms score the first
            response to each prompt alone, which samples show: a judge is paid for each response.
    """
    config, programs, base, policy = job.config, job.programs, job.base, state.roles["policy"]
    group = config.algorithm.group
    shared = job.model.shared_prompts(config.batch_size, group)
    prompts = sharding.put_batch(batch.repeated(group // shared), job.model.mesh)
    # The key has the same sharding as in training; with another `sample` would compile again.
    data = jax.device_put(np.asarray(jax.random.key_data(key)), sharding.replicated(job.model.mesh))
    rollout = programs.sample(base, policy, prompts, data)
    layout, _ = layouts_of(job, rollout, batch.tokens_BP.shape[1], None)
    rollout = with_layout(rollout, layout)
    mask_BT = rollout.sequences.response_BT
    row_B = batch.repeated(group).row_B
    scored_B = row_B if whole else np.where(np.arange(len(row_B)) % group == 0, row_B, -1)
    score_B, scores_MB, columns = job.scorer.parts(state.frozen, rollout, scored_B)
    measured = {
        "reward": score_B,
        "length": jnp.sum(mask_BT, axis=1),
        "eos_rate": rollout.finished_B,
    }
    reference_BT = reference_logprobs(job, state, rollout) if whole else None
    if reference_BT is not None:
        measured["kl"] = kl.sequence_kl(
            kl.k1(programs.logprobs(base, policy, rollout.sequences), reference_BT), mask_BT
        )
    measured = {name: np.asarray(to_host(values), np.float64) for name, values in measured.items()}
    # Filler prompts have row -1; the true reward reads row 0 for them.
    gold_B = gold_rewards(job, np.maximum(row_B, 0), rollout)
    if gold_B is not None:
        measured["gold"] = np.asarray(gold_B, np.float64)
    return rollout, measured, _parts(scores_MB, columns)


def _parts(scores_MB: Array | None, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parts of a reward by name, float64 [B]; {} if it has a single part.

    Args:
        scores_MB: The score of each reward model; None: there is none.
        columns: The rewards of each term, by its name.
    """
    models = [] if scores_MB is None else list(np.asarray(to_host(scores_MB), np.float64))
    names = ["model"] if len(models) == 1 else [f"model_{i}" for i in range(len(models))]
    parts = dict(zip(names, models, strict=True))
    parts |= {f"term/{name}": column for name, column in columns.items()}
    return parts if len(parts) > 1 else {}


def kept_step(
    run: Run | None,
    metrics: Sequence[Mapping[str, Any]],
    config: RLConfig,
    step: int,
    selected: bool,
) -> dict[str, float]:
    """Prints which step the artefacts hold; returns the validation metrics of that step, by name.

    Args:
        run: The opened run; None: a run without a folder.
        metrics: One row per step.
        config: Settings of RL.
        step: The step that the artefacts hold.
        selected: Whether it was chosen as the best validated step.
    """
    found = next((row for row in metrics if row["step"] == step), {})
    measured = {name: value for name, value in found.items() if name.startswith("validation/")}
    if selected:
        reason = f"the best {SELECTED_BY} ({measured[SELECTED_BY]:.4g}) of all validated steps"
        last = "" if run is None else f"; the last step is in {run.folder / 'checkpoints'}"
        print(
            f"rl: the artefacts are of step {step} of {config.steps}, {reason}{last}.", flush=True
        )
    else:
        print(f"rl: the artefacts are of step {step}, the last.", flush=True)
    return measured
