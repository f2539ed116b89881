"""From judged rollouts to experience: what an RL update learns from, before it or inside it.

With several updates a rollout, the policy's log-probabilities are taken first, and experience is
made of them. A single update meets the policy as it sampled: it takes them itself, and makes
experience of them on its way (`one_pass`).
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.generation.sampling import Rollout
from perl_jax.objectives import advantages, algorithms, kl, losses
from perl_jax.objectives.algorithms import Outcomes
from perl_jax.objectives.losses import LossSum
from perl_jax.objectives.policy_gradient import Experience
from perl_jax.rewards.shaping import shaped
from perl_jax.training.layouts import dealt_group
from perl_jax.training.rl_config import RLConfig
from perl_jax.types import Array, Tokens


@flax.struct.dataclass
class RolloutStatistics:
    """Means over rows (or response tokens) of one batch of rollouts, for the log."""

    values: dict[str, Array]
    finite: Array


@flax.struct.dataclass
class Judged:
    """A batch of rollouts with all that was measured on it.

    score_B: before shaping. policy_BT, reference_BT: log-probabilities, by one program.
    reference_BT None: no reference. policy_BT: with `one_pass` read by the KL alone, and where
    `measured` says so; elsewhere the update's own are. values_BT: of the state before each token,
    where the algorithm needs them now. greedy, greedy_score_P: each prompt's greedy response and
    its score, where it is the baseline. beta: the KL's coefficient.
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
    """What experience is made of once the update has the policy's log-probabilities; rows lead in
    all.

    sampled_BT: the sampler's log-probabilities. score_B: shaped. policy_BT, reference_BT,
    measured_B, values_BT, beta_B: as in `Judged`. greedy_B: the shaped score of the prompt's greedy
    response. group: rows that have to be dealt out together.
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
    """Whether the update itself can take the policy's log-probabilities, so that no pass goes
    before it.

    A single update meets the policy as it sampled, unless there is dropout. What its advantages
    compare (a prompt's samples; the batch, where it is whitened) must be in one microbatch. parts:
    of the mesh's rows.
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
    """Judged rollouts -> experience, and what the log says of them.

    one: whether it will be one pass; what depends on the policy's log-probabilities is then left to
    the update (`experience_of`).
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
    """Experience from rewards and the policy's log-probabilities, without gradient; sums for the
    log.

    The KL is of numbers from one program where those are known, so that it is exactly 0 between
    equals. With the KL in the reward R = (1 - beta) s - beta sum_t kl_t, s the shaped score (or s -
    beta sum_t kl_t); with the KL in the loss R = s.
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
        # Without its KL: any number that depends on the prompt alone leaves the gradient exact.
        outcomes = outcomes.replace(
            greedy_P=(weight_B * rewarded.greedy_B)[:: config.algorithm.group]
        )
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
            losses.sampler_mismatch(rewarded.sampled_BT, policy_BT, mask_BT) * tokens, tokens
        ),
    }
    return experience, logs
