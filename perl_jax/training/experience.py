"""Turns scored rollouts into experience, the batch that an RL update learns from.

With several updates per rollout, a separate pass computes the policy's log-probabilities before
the first update, and experience is made from them. With a single update per rollout, the update
computes these log-probabilities itself and makes the experience in the same pass (`one_pass`).
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.generation.sampling import Rollout
from perl_jax.objectives import advantages, algorithms, kl, losses, ratios
from perl_jax.objectives.algorithms import Outcomes
from perl_jax.objectives.losses import LossSum
from perl_jax.objectives.policy_gradient import Experience
from perl_jax.rewards.shaping import shaped
from perl_jax.training.layouts import dealt_group
from perl_jax.training.rl_config import RLConfig
from perl_jax.types import Array, Tokens


@flax.struct.dataclass
class RolloutStatistics:
    """Statistics of one batch of rollouts, for the log.

    Attributes:
        values: Means over rows or response tokens, by name.
        finite: Whether all scores and returns are finite, bool [].
    """

    values: dict[str, Array]
    finite: Array


@flax.struct.dataclass
class Judged:
    """A batch of scored rollouts with their log-probabilities and values.

    Attributes:
        rollout: The sampled responses.
        score_B: Scores before shaping.
        policy_BT: The policy's log-probabilities. With `one_pass` only the KL reads them, and only
            if `measured` is true; otherwise the update computes its own. None: not computed.
        beta: The KL's coefficient, [].
        reference_BT: The reference's log-probabilities, by the same program as `policy_BT`. None:
            no reference.
        measured: Whether `policy_BT` holds the policy's log-probabilities, bool [].
        values_BT: The critic's value of the state before each token. None: no critic.
        greedy: The greedy response to each prompt, if the algorithm's baseline is its score.
        greedy_score_P: The scores of `greedy`.
    """

    rollout: Rollout
    score_B: Array
    policy_BT: Array | None
    beta: Array
    reference_BT: Array | None = None
    measured: Array | bool = True
    values_BT: Array | None = None
    greedy: Rollout | None = None
    greedy_score_P: Array | None = None


@flax.struct.dataclass
class Rewarded:
    """Rollouts with shaped scores; with the policy's log-probabilities they become experience.

    The first axis of every array is the rows, so that microbatches can be split off.

    Attributes:
        sequences: Prompts and responses.
        sampled_BT: The sampler's log-probabilities.
        score_B: Shaped scores.
        beta_B: `Judged.beta` on every row.
        measured_B: `Judged.measured` on every row.
        policy_BT: As in `Judged`.
        reference_BT: As in `Judged`.
        values_BT: As in `Judged`.
        greedy_B: The shaped score of the greedy response to the row's prompt. None: no such
            baseline.
        group: How many consecutive rows have to stay in one microbatch.
    """

    sequences: Tokens
    sampled_BT: Array
    score_B: Array
    beta_B: Array
    measured_B: Array
    policy_BT: Array | None
    reference_BT: Array | None
    values_BT: Array | None
    greedy_B: Array | None
    group: int = flax.struct.field(pytree_node=False, default=1)


def one_pass(config: RLConfig, parts: int, dropout: float) -> bool:
    """Returns whether the update itself computes the policy's log-probabilities.

    No separate pass is needed then. There must be a single update per rollout and no dropout, so
    that the policy in the update is the policy that sampled. All rows that an advantage compares (a
    prompt's samples, or the whole batch if it is whitened) must be in one microbatch.

    Args:
        config: Settings of RL.
        parts: Number of parts that the mesh divides a batch's rows into.
        dropout: The dropout rate of the policy's adapter.
    """
    algorithm = config.algorithm
    if algorithm.updates > 1 or dropout > 0:
        return False
    compares_batch = algorithm.whitened or algorithm.rule.advantage == "batch-mean"
    together = (
        dealt_group(config, config.batch_size, parts * config.microbatches) == algorithm.group
    )
    return config.microbatches == 1 or (together and not compares_batch)


def assemble(
    config: RLConfig, parts: int, one: bool, judged: Judged
) -> tuple[Experience | Rewarded, RolloutStatistics]:
    """Returns the input of the update, and the statistics of the rollouts for the log.

    The input is `Rewarded` if the update computes the policy's log-probabilities, and otherwise
    `Experience`. The statistics are `reward/score` and `reward/score_std` (before shaping),
    `kl/beta`, `response/length` in tokens, `response/eos_rate`, and, with `Experience`, the logs of
    `experience_of`.

    Args:
        config: Settings of RL.
        parts: Number of parts that the mesh divides a batch's rows into.
        one: The result of `one_pass`.
        judged: The scored rollouts.
    """
    rollout, mask_BT = judged.rollout, judged.rollout.sequences.response_BT
    paid = functools.partial(shaped, config.shaping, config.data.max_response_length)
    score_B, rows = paid(judged.score_B, rollout), mask_BT.shape[0]
    greedy_B = None
    if judged.greedy is not None:
        greedy_B = jnp.repeat(paid(judged.greedy_score_P, judged.greedy), config.algorithm.group)
    rewarded = Rewarded(
        sequences=rollout.sequences,
        sampled_BT=rollout.logp_BT,
        score_B=score_B,
        beta_B=jnp.full_like(score_B, judged.beta),
        measured_B=jnp.broadcast_to(jnp.asarray(judged.measured), (rows,)),
        policy_BT=judged.policy_BT,
        reference_BT=judged.reference_BT,
        values_BT=judged.values_BT,
        greedy_B=greedy_B,
        group=dealt_group(config, rows, parts * config.microbatches),
    )
    real_B = jnp.any(mask_BT, axis=1)
    mean = lambda x_B: jnp.sum(jnp.where(real_B, x_B, 0.0)) / jnp.maximum(jnp.sum(real_B), 1)
    values = {
        "reward/score": mean(judged.score_B),
        "reward/score_std": jnp.sqrt(mean(jnp.square(judged.score_B - mean(judged.score_B)))),
        "kl/beta": judged.beta,
        "response/length": mean(jnp.sum(mask_BT, axis=1).astype(jnp.float32)),
        "response/eos_rate": mean(rollout.finished_B.astype(jnp.float32)),
    }
    finite = jnp.all(jnp.isfinite(score_B))
    if one:
        return rewarded, RolloutStatistics(values, finite)
    experience, logs = experience_of(config, rewarded, judged.policy_BT)
    finite &= jnp.all(jnp.isfinite(jnp.where(mask_BT, judged.policy_BT, 0.0))) & jnp.isfinite(
        logs["reward/return"].total
    )
    return experience, RolloutStatistics(
        values | {name: value.mean for name, value in logs.items()}, finite
    )


def experience_of(
    config: RLConfig, rewarded: Rewarded, policy_BT: Array
) -> tuple[Experience, losses.Logs]:
    """Returns experience, and LossSums for the log; no gradient flows through either.

    With the KL in the reward the return is R = (1 - beta) s - beta sum_t kl_t for a shaped score s
    (with `kl.whole_score` R = s - beta sum_t kl_t). With the KL in the loss R = s. The logs are
    `reward/return`, `kl/sequence`, `kl/token` and `sampler/mismatch`.

    If `rewarded.policy_BT` was measured, the KL reads it instead of `policy_BT`: the same program
    computed it and the reference's log-probabilities, so that the KL of a policy to itself is
    exactly 0.

    Args:
        config: Settings of RL.
        rewarded: Rollouts with shaped scores.
        policy_BT: The log-probabilities of the policy before the first update.
    """
    policy_BT, mask_BT = jax.lax.stop_gradient(policy_BT), rewarded.sequences.response_BT
    reference_BT = from_BT = policy_BT
    if rewarded.reference_BT is not None:
        reference_BT = rewarded.reference_BT
        from_BT = jnp.where(rewarded.measured_B[:, None], rewarded.policy_BT, policy_BT)
    kl_BT = kl.kl_in_reward(from_BT, reference_BT)
    kl_B = kl.sequence_kl(kl_BT, mask_BT)
    beta_B = jnp.zeros_like(rewarded.beta_B) if config.kl_in_loss else rewarded.beta_B
    weight_B = jnp.ones_like(beta_B) if config.kl.whole_score else 1 - beta_B
    return_B = advantages.terminal_return(rewarded.score_B, kl_B, beta_B, weight_B)
    rewards_BT = advantages.token_rewards(
        weight_B * rewarded.score_B, kl_BT, mask_BT, beta_B[:, None]
    )
    outcomes = Outcomes(return_B, rewards_BT, mask_BT, rewarded.values_BT)
    if rewarded.greedy_B is not None:
        # The greedy response's KL is left out of this baseline. The gradient stays unbiased,
        # because the baseline depends on the prompt alone.
        greedy_P = (weight_B * rewarded.greedy_B)[:: config.algorithm.group]
        outcomes = dataclasses.replace(outcomes, greedy_P=greedy_P)
    advantage_BT, target_BT = algorithms.compute_advantages(config.algorithm, outcomes)
    in_loss = config.kl_in_loss and rewarded.reference_BT is not None
    experience = Experience(
        rewarded.sequences,
        policy_BT,
        advantage_BT,
        target_BT,
        old_value_BT=rewarded.values_BT if config.algorithm.value_clip is not None else None,
        reference_BT=reference_BT if in_loss else None,
        kl_weight_B=rewarded.beta_B if in_loss else None,
        compared=config.algorithm.group if config.algorithm.rule.pairs else 1,
    )
    real_B, rows, tokens = (
        jnp.any(mask_BT, axis=1),
        losses.count_sequences(mask_BT),
        losses.count_tokens(mask_BT),
    )
    total = lambda x_B: jnp.sum(jnp.where(real_B, x_B, 0.0))
    logs = {
        "reward/return": LossSum(total(return_B), rows),
        "kl/sequence": LossSum(total(kl_B), rows),
        "kl/token": LossSum(total(kl_B), tokens),
        "sampler/mismatch": LossSum(
            ratios.sampler_mismatch(rewarded.sampled_BT, policy_BT, mask_BT) * tokens, tokens
        ),
    }
    return experience, logs
