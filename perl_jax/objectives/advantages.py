"""From sequence scores to returns and advantages: what a policy gradient multiplies log p by.

Per-token arrays follow the alignment of `perl_jax.models.logprobs`: column t belongs to the choice
of token t, and `values_BT` holds the value of the state before it. Columns where the mask is False
are skipped: they take no discount, contribute no reward or value (whatever they contain), and come
out as 0. Here P counts prompts, and G the samples of each.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from perl_jax.runtime.masked import (
    at_least_float32,
    masked_deviation,
    masked_values,
    masked_var,
    masked_whiten,
)
from perl_jax.types import Array


def missing_eos_penalty(score_B: Array, finished_B: Array, penalty: float) -> jax.Array:
    """score - penalty where the response has no end-of-sequence token of its own; else the score.

    finished_B: bool. Raises ValueError for a negative penalty, which would reward rambling.
    """
    chex.assert_rank([score_B, finished_B], 1)
    chex.assert_equal_shape([score_B, finished_B])
    chex.assert_type(finished_B, bool)
    if not penalty >= 0:
        raise ValueError(f"the missing-eos penalty must be 0 or more, got {penalty}")
    score_B = at_least_float32(score_B)
    return jnp.where(finished_B, score_B, score_B - penalty)


def overlong_penalty(
    score_B: Array, length_B: Array, limit: int, buffer: int, penalty: float
) -> jax.Array:
    """score - penalty clip((length - (limit - buffer)) / buffer, 0, 1): the last `buffer` tokens
    cost.

    Source: Yu et al. 2025 (arXiv 2503.14476), DAPO, equation 13. length_B: response tokens. A
    buffer of 0 takes nothing. Raises ValueError for a buffer beyond the limit or a negative
    penalty.
    """
    chex.assert_rank([score_B, length_B], 1)
    chex.assert_equal_shape([score_B, length_B])
    if not 0 <= buffer <= limit or not penalty >= 0:
        raise ValueError(
            f"the over-length buffer must lie in [0, {limit}] and the penalty be 0 or more, got "
            f"{buffer}, {penalty}"
        )
    score_B = at_least_float32(score_B)
    if buffer == 0:
        return score_B
    return score_B - penalty * jnp.clip((length_B - (limit - buffer)) / buffer, 0, 1)


def shape_scores(
    score_B: Array, real_B: Array, *, clip: float | None = None, whiten: bool = False
) -> jax.Array:
    """Scores kept within +-clip, then divided by their deviation over the batch, their mean kept.

    The mean stays because moving it would reward or punish every response alike, and with it length
    (Ziegler et al. 2019, arXiv 1909.08593, as released). real_B: False on filler rows, which do not
    count and may hold anything.
    """
    chex.assert_rank([score_B, real_B], 1)
    score_B = at_least_float32(score_B)
    if clip is not None:
        score_B = jnp.clip(score_B, -clip, clip)
    return masked_whiten(score_B, real_B, shift_mean=False) if whiten else score_B


def token_rewards(end_B: Array, kl_BT: Array, mask_BT: Array, beta: Array | float) -> jax.Array:
    """r_t = -beta kl_t, plus end_B on a response's last token: the terminal return, token by token.

    Their sum over a row is `terminal_return` when end_B is its weighted score. No gradient.
    """
    chex.assert_rank([end_B, kl_BT, mask_BT], [1, 2, 2])
    columns_T = jnp.arange(mask_BT.shape[1])
    last_B = jnp.max(jnp.where(mask_BT, columns_T, -1), axis=1)
    ends_BT = columns_T[None, :] == last_B[:, None]
    rewards_BT = jnp.where(ends_BT, at_least_float32(end_B)[:, None], 0) - beta * masked_values(
        kl_BT, mask_BT
    )
    return jax.lax.stop_gradient(rewards_BT)


def terminal_return(
    score_B: Array, kl_B: Array, beta: Array | float, score_weight: Array | float | None = None
) -> jax.Array:
    """R = (1 - beta) score - beta KL, with no gradient through it.

    Source: PERL (arXiv 2403.10704), the RL objective; Lee et al. (arXiv 2309.00267). kl_B is the
    sum over a sequence's response tokens of k1 (`perl_jax.objectives.kl.sequence_kl`).
    `score_weight` replaces 1 - beta: 1.0 gives the more common score - beta KL.
    """
    chex.assert_rank([score_B, kl_B], 1)
    chex.assert_equal_shape([score_B, kl_B])
    weight = 1 - beta if score_weight is None else score_weight
    return_B = weight * at_least_float32(score_B) - beta * at_least_float32(kl_B)
    return jax.lax.stop_gradient(return_B)


def returns_to_tokens(return_B: Array, mask_BT: Array) -> jax.Array:
    """Z_t = R on every response token, 0 elsewhere: gamma = 1 and a reward only at the end.

    Source: PERL (arXiv 2403.10704): "Z_t = R_T".
    """
    chex.assert_rank([return_B, mask_BT], [1, 2])
    chex.assert_equal_shape_prefix([return_B, mask_BT], 1)
    return masked_values(jnp.broadcast_to(return_B[:, None], mask_BT.shape), mask_BT)


def discounted_returns(rewards_BT: Array, mask_BT: Array, gamma: float) -> jax.Array:
    """Z_t = r_t + gamma Z_t', t' the next unmasked column, Z = 0 after the last one.

    This is `gae` with values 0 and lambda = 1. A reward in a masked column is dropped.
    """
    chex.assert_rank([rewards_BT, mask_BT], 2)
    return gae(rewards_BT, jnp.zeros_like(rewards_BT), mask_BT, gamma, 1.0)


def gae(rewards_BT: Array, values_BT: Array, mask_BT: Array, gamma: float, lam: float) -> jax.Array:
    """A_t = delta_t + gamma lambda A_t' with delta_t = r_t + gamma V_t' - V_t.

    t' is the next unmasked column; after the last one both V and A are 0: the episode has ended
    (or been cut, which is treated alike). The value target that belongs to it is A_t + V_t.
    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16. Raises ValueError for a gamma or
    lambda outside [0, 1].
    """
    chex.assert_rank([rewards_BT, values_BT, mask_BT], 2)
    chex.assert_equal_shape([rewards_BT, values_BT, mask_BT])
    for name, number in (("gamma", gamma), ("lambda", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    rewards_BT, values_BT = masked_values(rewards_BT, mask_BT), masked_values(values_BT, mask_BT)
    start_B = jnp.zeros_like(rewards_BT[:, 0])
    step = functools.partial(_gae_step, gamma, lam)
    columns = (rewards_BT.T, values_BT.T, jnp.asarray(mask_BT).T)
    _, advantages_TB = jax.lax.scan(step, (start_B, start_B), columns, reverse=True)
    return advantages_TB.T


def _gae_step(
    gamma: float,
    lam: float,
    carry: tuple[Array, Array],
    column: tuple[Array, Array, Array],
) -> tuple[tuple[Array, Array], Array]:
    """One column of `gae`, from the last to the first: a masked one hands on what it was given."""
    next_advantage_B, next_value_B = carry
    reward_B, value_B, mask_B = column
    delta_B = reward_B + gamma * next_value_B - value_B
    advantage_B = delta_B + gamma * lam * next_advantage_B
    carry = (
        jnp.where(mask_B, advantage_B, next_advantage_B),
        jnp.where(mask_B, value_B, next_value_B),
    )
    return carry, jnp.where(mask_B, advantage_B, 0)


def leave_one_out(returns_PG: Array) -> jax.Array:
    """A_i = R_i - mean of the other G - 1 returns of the same prompt = G / (G - 1) (R_i - mean).

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740), RLOO. Equal returns give
    exactly 0. Raises ValueError for G = 1, where there is nothing to compare with.
    """
    samples = _samples(returns_PG)
    everything_PG = jnp.ones(returns_PG.shape, bool)
    return masked_deviation(returns_PG, everything_PG, axis=1) * (samples / (samples - 1))


def group_advantages(
    returns_PG: Array, *, normalise_std: bool = True, ddof: int = 1, epsilon: float = 1e-4
) -> jax.Array:
    """A_i = (R_i - mean) / (std + epsilon), mean and std over the G samples of a prompt.

    Source: Shao et al. 2024 (arXiv 2402.03300), GRPO. std divides by G - ddof. A group of equal
    returns gives exactly 0. `normalise_std=False` leaves the division out: Liu et al. 2025 (arXiv
    2503.20783), Dr. GRPO. Raises ValueError for G = 1 or a ddof that is not 0 or 1.
    """
    _samples(returns_PG)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    everything_PG = jnp.ones(returns_PG.shape, bool)
    deviation_PG = masked_deviation(returns_PG, everything_PG, axis=1)
    if not normalise_std:
        return deviation_PG
    std_P = jnp.sqrt(masked_var(returns_PG, everything_PG, axis=1, ddof=ddof))
    divisor_P = jnp.where(std_P > 0, std_P + epsilon, 1)
    return deviation_PG / divisor_P[:, None]


def _samples(returns_PG: Array) -> int:
    """G, checked to be 2 or more."""
    chex.assert_rank(returns_PG, 2)
    samples = returns_PG.shape[1]
    if samples < 2:
        raise ValueError(f"a group baseline needs 2 or more samples per prompt, got {samples}")
    return samples
