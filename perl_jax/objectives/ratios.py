"""Importance ratios of the trained policy to the policy that sampled, and their numerical error."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from perl_jax.objectives.kl import log_ratio
from perl_jax.runtime.masked import masked_mean, masked_values
from perl_jax.types import Array

RATIOS = ("token", "sequence", "product")


def importance_ratio(logp_BT: Array, old_BT: Array, mask_BT: Array, level: str) -> jax.Array:
    """Returns the ratio pi / pi_old for every token [B, T], 1 outside the mask.

        "token"     exp(l_t), l_t = log pi - log pi_old of each token
        "sequence"  exp(mean_t l_t), the same for all tokens of a row: the geometric mean
                    (Zheng et al. 2025, arXiv 2507.18071, GSPO)
        "product"   exp(sum_t l_t), the same for all tokens of a row: the ratio of whole sequences

    The exponent is clipped to +-20.

    Args:
        logp_BT: log pi, under the trained policy; differentiated.
        old_BT: log pi_old, under the policy that sampled.
        mask_BT: True on response tokens.
        level: One of RATIOS, as above.

    Raises ValueError for another level.
    """
    chex.assert_rank([logp_BT, old_BT, mask_BT], 2)
    if level not in RATIOS:
        raise ValueError(f"unknown importance ratio {level!r}; known: {', '.join(RATIOS)}")
    logp_BT, old_BT = masked_values(logp_BT, mask_BT), masked_values(old_BT, mask_BT)
    if level == "token":
        return jnp.exp(log_ratio(logp_BT, old_BT))
    total_B1 = jnp.sum(logp_BT - old_BT, axis=1, keepdims=True)
    if level == "sequence":
        total_B1 = total_B1 / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
    ratio_B1 = jnp.exp(log_ratio(total_B1, jnp.zeros_like(total_B1)))
    return jnp.where(mask_BT, ratio_B1, 1.0)


def sampler_mismatch(logp_sampler_BT: Array, logp_trainer_BT: Array, mask_BT: Array) -> jax.Array:
    """Returns the mean over response tokens of exp |logp_sampler - logp_trainer|; at least 1.

    Both use the same weights and temperature, so a value above 1 shows a numerical difference or a
    bug. 0 without response tokens.

    Args:
        logp_sampler_BT: Log-probabilities that the sampler computed while decoding.
        logp_trainer_BT: Log-probabilities that a pass over whole sequences computed.
        mask_BT: True on response tokens.
    """
    chex.assert_rank([logp_sampler_BT, logp_trainer_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_sampler_BT, logp_trainer_BT, mask_BT])
    return masked_mean(jnp.exp(jnp.abs(log_ratio(logp_sampler_BT, logp_trainer_BT))), mask_BT)
