"""One RL step: sample responses, score them, compare them with the reference, learn.

Each phase of a step is a compiled program of its own (`rl_programs.Programs`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.data.dataset import Dataset, Row
from perl_jax.errors import TrainingError
from perl_jax.generation.sampling import Rollout
from perl_jax.hub.model import Model
from perl_jax.objectives import kl
from perl_jax.objectives.policy_gradient import Experience
from perl_jax.rewards.scoring import Scorer, response_texts
from perl_jax.runtime import sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import Program
from perl_jax.training.experience import Judged, Rewarded
from perl_jax.training.layouts import rollout_layout, updates_rows
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.rl_programs import Programs
from perl_jax.training.state import SAMPLE, SHUFFLE, TrainState
from perl_jax.types import Layout, Prompts, Tree

# Rollouts in each form that an RL step gives them.
Packed = TypeVar("Packed", Rollout, Rewarded, Experience)


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
    """Makes one RL step: samples responses, scores them, updates the trained roles.

    Sampling and the update have different keys, both derived from the state's key and step.

    Args:
        job: Model, programs, rewards and settings.
        state: The state of step s; it is donated.
        batch: The prompts of the step, on the host.

    Returns:
        The state of step s + 1, the metrics as Python numbers, and the seconds of the phases
        `sample`, `score` and `learn`.

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
    whole, part = layouts_of(job, rollout, batch.tokens_BP.shape[1], orders_XY)
    packed = with_layout(rollout, whole)
    score_B, scores = job.scorer(state.frozen, packed, repeated.row_B)
    reference_BT = reference_logprobs(job, state, packed)
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
    experience = with_layout(experience, part)
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
    gold_B = gold_rewards(job, repeated.row_B, rollout)
    if gold_B is not None:
        values["reward/gold"] = float(np.mean(gold_B))
    values |= _derived(values)
    seconds = np.diff(clocks)
    return state, values, {"sample": seconds[0], "score": seconds[1], "learn": seconds[2]}


def layouts_of(
    job: Rollouts, rollout: Rollout, columns: int, orders_XY: np.ndarray | None
) -> tuple[Layout | None, Layout | None]:
    """Returns the layouts of the passes over all rollouts, and of the updates; None: padded.

    Args:
        job: Model and settings.
        rollout: The sampled responses.
        columns: Padded length of the prompts, in tokens.
        orders_XY: Row indices of each update. All updates get the layout that the fullest one
            needs. None: a single update reads all rows.
    """
    count = lambda mask_BT: to_host(jnp.sum(mask_BT, axis=1))
    response_B = count(rollout.sequences.response_BT)
    prompt_B = count(rollout.sequences.valid_BT) - response_B
    layout = functools.partial(rollout_layout, job.model, job.config, prompt_B, response_B, columns)
    return layout(job.config.microbatches), layout(job.config.microbatches, orders_XY)


def with_layout(rollout: Packed, layout: Layout | None) -> Packed:
    """Returns the rollouts or the experience with another layout of its sequences; None: padded."""
    sequences = dataclasses.replace(rollout.sequences, layout=layout)
    return dataclasses.replace(rollout, sequences=sequences)


def _may_be_one(config: RLConfig, step: int) -> bool:
    """Returns whether policy and reference may be equal when a step begins.

    They may be at the first step and after each refresh. The KL is then computed from one program,
    so that it is exactly 0.

    Args:
        config: Settings of RL.
        step: Number of steps that are done.
    """
    return step == 0 or (config.kl.refresh is not None and step % config.kl.refresh == 0)


def reference_logprobs(job: Rollouts, state: TrainState, rollout: Rollout) -> jax.Array | None:
    """Returns the reference's log-probabilities of the sampled tokens, [B, T].

    Returns None if `kl.reference` is none.

    Args:
        job: Programs and settings.
        state: Has the frozen role `reference`, unless the base is the reference.
        rollout: The sampled responses.
    """
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
    """Returns the state with an adapted KL coefficient and a refreshed reference, as the settings
    say.

    Args:
        config: Settings of RL.
        refresh: The program that copies the policy; None: the reference is never refreshed.
        state: The state after the update.
        mean_kl: The mean KL of a response to the reference, [].
    """
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
        placed = jax.device_put(beta, state.controls["beta"].sharding)
        state = dataclasses.replace(state, controls={"beta": placed})
    if refresh is not None and settings.refresh and int(state.step) % settings.refresh == 0:
        # `refresh` copies the policy, whose own buffers are donated to the next update.
        reference = refresh(state.roles["policy"])
        state = dataclasses.replace(state, frozen=state.frozen | {"reference": reference})
    return state


def _check_mismatch(mismatch: float, config: RLConfig, step: int) -> None:
    """Raises TrainingError if sampler and trainer disagree by more than `max_mismatch`.

    Args:
        mismatch: The mean of exp|difference of log-probabilities| over the sampled tokens.
        config: Settings of RL.
        step: The step, for the message.
    """
    if mismatch > config.max_mismatch:
        raise TrainingError(
            f"Step {step}: the sampler and the trainer disagree on log-probabilities, mean "
            f"exp|difference| = {mismatch:.4f}, "
            f"above max_mismatch = {config.max_mismatch}; the run stopped and its last checkpoint "
            "is untouched."
        )


def _derived(values: dict[str, float]) -> dict[str, float]:
    """Returns `advantage/std` and, with a critic, `value/explained_variance`.

    They are computed from the means of squares, `NAME/square`, which are removed from `values`.

    Args:
        values: The step's metrics; changed in place.
    """
    variance = lambda name: max(values.pop(f"{name}/square") - values[f"{name}/mean"] ** 2, 0.0)
    out = {"advantage/std": variance("advantage") ** 0.5}
    if "return/mean" in values:
        error, returns = variance("value/error"), variance("return")
        out["value/explained_variance"] = 1.0 - error / returns if returns > 0 else 0.0
    return out


def gold_rewards(job: Rollouts, row_B: np.ndarray, rollout: Rollout) -> np.ndarray | None:
    """Returns the true reward of each response, [B]; None if the data set knows no true reward.

    Args:
        job: Has the data set.
        row_B: Indices into `job.rows`, of this process's rows.
        rollout: The responses.
    """
    if job.dataset.gold is None:
        return None
    share = sharding.row_share(job.model.mesh)
    texts = response_texts(job.model.tokenizer, rollout, share)
    return share.gather(job.dataset.gold([job.rows[int(row)]["prompt"] for row in row_B], texts))
