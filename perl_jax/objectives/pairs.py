"""The loss of algorithms that compare a policy's own samples: online DPO and online IPO."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perl_jax.objectives import losses
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.objectives.supervised import in_order
from perl_jax.runtime.masked import masked_sum
from perl_jax.types import Array


def pair_loss(
    config: AlgorithmConfig,
    logp_BT: Array,
    reference_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    beta_B: Array,
) -> tuple[LossSum, Logs]:
    """Returns the `LossSum` of DPO or IPO of each prompt's best sample against its worst, and
    metrics.

    A prompt without a preference has weight 0. The metrics are means over prompts.
    preference/chosen_reward and preference/rejected_reward: implicit rewards beta log(pi / pi_ref)
    of the two samples. preference/accuracy: share of pairs whose chosen sample has the higher one;
    equal ones count half. preference/untied: share of prompts with a preference. Source: Guo et al.
    2024 (arXiv 2402.04792), equations 1 and 2.

    Args:
        config: The algorithm. The rows of a prompt are consecutive.
        logp_BT: Log-probabilities under the trained policy; differentiated.
        reference_BT: Log-probabilities under the reference.
        advantage_BT: On the tokens of a row 1, -1 or 0: the sample is the prompt's best, its worst,
            or neither.
        mask_BT: True on response tokens.
        beta_B: The coefficient beta, the same number on all rows.

    Raises ValueError for a policy gradient, which has no loss of pairs.
    """
    if config.rule.pairs is None:
        raise ValueError(f"{config.name} is a policy gradient and has no loss of pairs")
    inside = lambda x_BT: masked_sum(x_BT, mask_BT, axis=1)
    ratio_PG = (inside(logp_BT) - inside(reference_BT)).reshape(-1, config.group)
    sign_B = jnp.max(jnp.where(mask_BT, advantage_BT, -1), axis=1)
    sign_PG = jax.lax.stop_gradient(sign_B * jnp.any(mask_BT, axis=1)).reshape(ratio_PG.shape)
    best_PG, worst_PG = sign_PG > 0, sign_PG < 0
    untied_P = jnp.any(best_PG, axis=1) & jnp.any(worst_PG, axis=1)
    beta = jax.lax.stop_gradient(jnp.max(beta_B))
    chosen_P = beta * masked_sum(ratio_PG, best_PG, axis=1)
    rejected_P = beta * masked_sum(ratio_PG, worst_PG, axis=1)
    weight_P = untied_P.astype(jnp.float32)
    # Beta may change from step to step, and `losses.preference` takes a constant. The log-ratios
    # are multiplied by it instead; (h - 1 / (2 beta))^2 = (beta h - 1/2)^2 / beta^2.
    loss = losses.preference(chosen_P, rejected_P, weight_P, beta=1.0, kind=config.rule.pairs)
    if config.rule.pairs == "ipo":
        loss = LossSum(loss.total / jnp.square(beta), loss.weight)
    real_P = jnp.any(mask_BT.reshape(len(weight_P), -1), axis=1).astype(jnp.float32)
    return loss, {
        "preference/chosen_reward": losses.weighted(chosen_P, weight_P),
        "preference/rejected_reward": losses.weighted(rejected_P, weight_P),
        "preference/accuracy": losses.weighted(in_order(chosen_P, rejected_P), weight_P),
        "preference/untied": losses.weighted(weight_P, real_P),
    }
