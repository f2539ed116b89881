"""Validation in RL: responses to held-out prompts, and the step that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.data.loading import load_batches
from perl_jax.data.pipeline import Batches
from perl_jax.errors import TrainingError
from perl_jax.generation.sampling import Rollout
from perl_jax.objectives import kl
from perl_jax.rewards.scoring import response_texts
from perl_jax.runs.run import Run
from perl_jax.runtime import hosts, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.rl_step import (
    Rollouts,
    gold_rewards,
    layouts_of,
    reference_logprobs,
    with_layout,
)
from perl_jax.training.state import TrainState
from perl_jax.types import Prompts

# The validation metric whose best step the artefacts hold.
SELECTED_BY = "validation/reward"
# How many prompts of a validation have their first response written to the run's folder.
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
    """Samples responses to held-out prompts; returns (means over them, some of them as samples).

    Each prompt gets as many responses as in training. The sampling keys depend on the seed and not
    on the step, so that the validations of a run are comparable.

    The means are `validation/NAME` for each measure of `measured_responses`. A sample is a
    dictionary with `prompt`, `response` and the response's `reward` and, if it is known, `gold`;
    there is one for each of the first 8 prompts.

    Args:
        job: The result of `held_out_prompts`.
        batches: The batches of the held-out prompts.
        state: Has the policy and the reference.

    Raises:
        TrainingError: If a mean is NaN or infinite.
    """
    group = job.config.algorithm.group
    key = jax.random.fold_in(jax.random.key(job.config.seed), _VALIDATION)
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        rollout, measured = measured_responses(job, state, batch, jax.random.fold_in(key, index))
        rows_B = np.repeat(batches.rows_of(index), group)
        for name, value_B in measured.items():
            columns.setdefault(name, []).append(value_B[rows_B >= 0])
        texts = response_texts(job.model.tokenizer, rollout)
        for row in np.flatnonzero(rows_B >= 0)[::group].tolist():
            if len(samples) < _KEPT:
                measures = {
                    name: float(measured[name][row])
                    for name in ("reward", "gold")
                    if name in measured
                }
                samples.append(
                    {
                        "prompt": job.rows[int(rows_B[row])]["prompt"],
                        "response": texts[row],
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


def measured_responses(
    job: Rollouts, state: TrainState, batch: Prompts, key: jax.Array
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Samples responses to a batch of prompts; returns (rollout, measures by name).

    A measure is float64 [B], where B is prompts times samples per prompt:

        reward      the score before shaping
        length      number of tokens
        eos_rate    1 for a response that has ended by itself, else 0
        kl          sum_t log pi - log pi_ref to the current reference; only with a reference
        gold        the true reward; only if the data set knows it

    Filler prompts (row -1) have measures too, which the caller must leave out.

    Args:
        job: Programs, rewards and settings.
        state: Has the policy and the reference.
        batch: The prompts, on the host.
        key: The key of sampling.
    """
    config, programs, base, policy = job.config, job.programs, job.base, state.roles["policy"]
    group = config.algorithm.group
    shared = job.model.shared_prompts(config.batch_size, group)
    prompts = sharding.put_batch(batch.repeated(group // shared), job.model.mesh)
    # The key has the same sharding as in training; with another `sample` would compile again.
    data = jax.device_put(np.asarray(jax.random.key_data(key)), sharding.replicated(job.model.mesh))
    rollout = programs.sample(base, policy, prompts, data)
    whole, _ = layouts_of(job, rollout, batch.tokens_BP.shape[1], None)
    rollout = with_layout(rollout, whole)
    mask_BT = rollout.sequences.response_BT
    # Filler prompts have row -1; the reward terms read row 0 for them.
    row_B = np.maximum(batch.repeated(group).row_B, 0)
    measured = {
        "reward": job.scorer(state.frozen, rollout, row_B)[0],
        "length": jnp.sum(mask_BT, axis=1),
        "eos_rate": rollout.finished_B,
    }
    reference_BT = reference_logprobs(job, state, rollout)
    if reference_BT is not None:
        measured["kl"] = kl.sequence_kl(
            kl.k1(programs.logprobs(base, policy, rollout.sequences), reference_BT), mask_BT
        )
    measured = {name: np.asarray(to_host(values), np.float64) for name, values in measured.items()}
    gold_B = gold_rewards(job, row_B, rollout)
    if gold_B is not None:
        measured["gold"] = np.asarray(gold_B, np.float64)
    return rollout, measured


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
