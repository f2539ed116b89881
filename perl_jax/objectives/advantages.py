"""Returns and advantages of responses, computed from their scores.

An advantage is the factor A_t of a token's log-probability in a policy-gradient loss.

Per-token arrays follow the alignment of `perl_jax.models.logprobs`: column t belongs to the choice
of token t, and `values_BT` holds the value of the state before token t. Columns where the mask is
False are skipped: they are not discounted, their rewards and values are ignored (NaN included), and
their results are 0. In this module P is the number of prompts and G the number of samples per
prompt.
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
    """Returns each score, reduced by `penalty` where the response has no end-of-sequence token.

    Args:
        score_B: Score of each response.
        finished_B: Whether each response has an end-of-sequence token, bool.
        penalty: Subtracted from the score, in units of the score.

    Raises ValueError for a negative penalty, which would reward unfinished responses.
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
    """Returns score - penalty clip((length - (limit - buffer)) / buffer, 0, 1).

    The penalty grows linearly over the last `buffer` tokens before the limit. Source: Yu et al.
    2025 (arXiv 2503.14476), DAPO, equation 13.

    Args:
        score_B: Score of each response.
        length_B: Number of response tokens.
        limit: Largest number of response tokens.
        buffer: Number of tokens below the limit that are penalised; 0: no penalty.
        penalty: Penalty of a response that reaches the limit, in units of the score.

    Raises ValueError for a buffer outside [0, limit] or a negative penalty.
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
    """Returns the scores [B], clipped to [-clip, clip] and, with `whiten`, then whitened.

    Whitening divides the scores by their standard deviation over the batch and keeps their mean. A
    shifted mean would reward or punish every response alike, and thereby change the length of
    responses (Ziegler et al. 2019, arXiv 1909.08593, released code).

    Args:
        score_B: Score of each response.
        real_B: False on filler rows, which do not count and may hold NaN.
        clip: Largest absolute score; None: no clipping.
        whiten: Whether scores are whitened.
    """
    chex.assert_rank([score_B, real_B], 1)
    score_B = at_least_float32(score_B)
    if clip is not None:
        score_B = jnp.clip(score_B, -clip, clip)
    return masked_whiten(score_B, real_B, shift_mean=False) if whiten else score_B


def token_rewards(end_B: Array, kl_BT: Array, mask_BT: Array, beta: Array | float) -> jax.Array:
    """Returns r_t = -beta kl_t, plus end_B on the last token of each response; without gradient.

    With end_B the weighted score, the sum of a row's rewards is its `terminal_return`.

    Args:
        end_B: Reward of each response's last token.
        kl_BT: KL of each token (`perl_jax.objectives.kl.kl_in_reward`).
        mask_BT: True on response tokens.
        beta: KL coefficient.
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
    """Returns R = (1 - beta) score - beta KL of each response, without gradient.

    Source: PERL (arXiv 2403.10704), the RL objective; Lee et al. 2023 (arXiv 2309.00267).

    Args:
        score_B: Score of each response.
        kl_B: KL of each response: the sum of k1 over its tokens
            (`perl_jax.objectives.kl.sequence_kl`).
        beta: KL coefficient.
        score_weight: Replaces 1 - beta. 1.0 gives the more common score - beta KL.
    """
    chex.assert_rank([score_B, kl_B], 1)
    chex.assert_equal_shape([score_B, kl_B])
    weight = 1 - beta if score_weight is None else score_weight
    return_B = weight * at_least_float32(score_B) - beta * at_least_float32(kl_B)
    return jax.lax.stop_gradient(return_B)


def returns_to_tokens(return_B: Array, mask_BT: Array) -> jax.Array:
    """Returns Z_t [B, T]: the row's return R on every response token, and 0 elsewhere.

    This is the return of each token for gamma = 1 and a reward on the last token only. Source: PERL
    (arXiv 2403.10704): "Z_t = R_T".
    """
    chex.assert_rank([return_B, mask_BT], [1, 2])
    chex.assert_equal_shape_prefix([return_B, mask_BT], 1)
    return masked_values(jnp.broadcast_to(return_B[:, None], mask_BT.shape), mask_BT)


def discounted_returns(rewards_BT: Array, mask_BT: Array, gamma: float) -> jax.Array:
    """Returns Z_t = r_t + gamma Z_t' [B, T], with t' the next column inside the mask.

    Z after the last column is 0. The result is `gae` with all values 0 and lambda = 1.

    Args:
        rewards_BT: r, the reward of each token; ignored outside the mask.
        mask_BT: True on response tokens.
        gamma: Discount of one token, in [0, 1].
    """
    chex.assert_rank([rewards_BT, mask_BT], 2)
    return gae(rewards_BT, jnp.zeros_like(rewards_BT), mask_BT, gamma, 1.0)


def gae(rewards_BT: Array, values_BT: Array, mask_BT: Array, gamma: float, lam: float) -> jax.Array:
    """Returns generalised advantage estimates (GAE) of every token.

        A_t = delta_t + gamma lambda A_t',  delta_t = r_t + gamma V_t' - V_t

    t' is the next column inside the mask. After the last one V and A are 0: the episode has ended.
    An episode that was cut at its largest length counts as ended too. The target of a value model
    is A_t + V_t. Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16.

    Args:
        rewards_BT: Reward of each token.
        values_BT: Value of the state before each token.
        mask_BT: True on response tokens.
        gamma: Discount of one token, in [0, 1].
        lam: Lambda, in [0, 1].

    Raises ValueError for a gamma or lambda outside [0, 1].
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
    """Computes one column of `gae` in a scan from the last column to the first.

    Returns the new carry, and A of the column (0 outside the mask).

    Args:
        gamma: Discount of one token.
        lam: Lambda.
        carry: (A, V) of the next column inside the mask; a column outside it leaves the carry as it
            is.
        column: (reward, value, mask) of the column, [B] each.
    """
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
    """Returns [P, G]: each sample's return minus the mean return of the prompt's other samples.

        A_i = R_i - (mean of the other G - 1 returns) = G / (G - 1) (R_i - mean)

    Equal returns give exactly 0. Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline
    for free!"; Ahmadian et al. 2024 (arXiv 2402.14740), RLOO.

    Args:
        returns_PG: R, the return of each sample.

    Raises ValueError for G = 1.
    """
    samples = _samples(returns_PG)
    everything_PG = jnp.ones(returns_PG.shape, bool)
    return masked_deviation(returns_PG, everything_PG, axis=1) * (samples / (samples - 1))


def group_advantages(
    returns_PG: Array, *, normalise_std: bool = True, ddof: int = 1, epsilon: float = 1e-4
) -> jax.Array:
    """Returns A_i = (R_i - mean) / (std + epsilon), mean and std over the G samples of a prompt.

    Equal returns give exactly 0. Source: Shao et al. 2024 (arXiv 2402.03300), GRPO.

    Args:
        returns_PG: Return of each sample.
        normalise_std: False omits the division: Liu et al. 2025 (arXiv 2503.20783), Dr. GRPO.
        ddof: The variance divides by G - ddof; 0 or 1.
        epsilon: Added to the standard deviation, in units of the return.

    Raises ValueError for G = 1 or another ddof.
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


def best_and_worst(returns_PG: Array) -> jax.Array:
    """Returns [P, G]: 1 for the prompt's best sample, -1 for its worst, 0 for the others.

    Of equal samples the first counts. A prompt whose samples are all equal has no preference and
    gives 0 for all of them. Source: Guo et al. 2024 (arXiv 2402.04792), online DPO, where G = 2.

    Args:
        returns_PG: Return of each sample.

    Raises ValueError for G = 1.
    """
    samples = _samples(returns_PG)
    one_hot = lambda index_P: jnp.arange(samples)[None, :] == index_P[:, None]
    best_PG = one_hot(jnp.argmax(returns_PG, axis=1))
    worst_PG = one_hot(jnp.argmin(returns_PG, axis=1))
    # For equal returns best and worst are one sample.
    return best_PG.astype(jnp.float32) - worst_PG.astype(jnp.float32)


def _samples(returns_PG: Array) -> int:
    """Returns G, the number of samples per prompt; raises ValueError if G < 2."""
    chex.assert_rank(returns_PG, 2)
    samples = returns_PG.shape[1]
    if samples < 2:
        raise ValueError(f"a group baseline needs 2 or more samples per prompt, got {samples}")
    return samples
