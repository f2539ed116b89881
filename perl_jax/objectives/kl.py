"""Estimators of KL(policy || reference) per token, and the adaptive KL coefficient.

With tokens sampled from the policy and d = logp - ref_logp (clipped to +-20):

    k1 = d                    unbiased, high variance, may be negative
    k2 = d^2 / 2              biased, low variance, never negative
    k3 = exp(-d) - 1 + d      unbiased, low variance, never negative

Source: Schulman, "Approximating KL Divergence" (2020). An estimator with a good value may have a
wrong gradient (Tang and Munos 2025, arXiv 2506.09477). In a loss the estimator is differentiated:

    E[grad k1] = 0                             no signal
    E[grad k2] = grad KL(policy || reference)  the wanted gradient
    E[grad k3] = grad KL(reference || policy)  the gradient of the forward KL

In a reward the estimator is not differentiated; it multiplies grad log policy:

    E[k1 grad log policy] = grad KL(policy || reference)  the wanted gradient
    E[k3 grad log policy] = grad KL(policy || reference) - grad KL(reference || policy)
                                                          almost 0 near the reference

and k2 is no better than k3 there. Therefore a KL in the reward is `kl_in_reward`, k1 without
gradient. A KL in the loss is `kl_in_loss`, which has the gradient of k2 whatever its value. Both
are per token, given the tokens before it. Only the reward form counts the effect of a token on the
KL of later tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp

from perl_jax.runtime.masked import at_least_float32, masked_sum
from perl_jax.types import Array

MAX_LOG_RATIO = 20.0


def log_ratio(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns clip(logp - ref, -20, 20) in at least float32; any shape.

    A clipped element has gradient 0.
    """
    chex.assert_equal_shape([logp_BT, ref_BT])
    difference_BT = at_least_float32(logp_BT) - at_least_float32(ref_BT)
    return jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k1(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the estimator k1 = d = logp - ref, per token; d is clipped to +-20."""
    return log_ratio(logp_BT, ref_BT)


def k2(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the estimator k2 = d^2 / 2, d = logp - ref, per token; d is clipped to +-20."""
    return 0.5 * jnp.square(log_ratio(logp_BT, ref_BT))


def k3(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the estimator k3 = exp(-d) - 1 + d, d = logp - ref, per token.

    d is clipped to +-20.
    """
    d_BT = log_ratio(logp_BT, ref_BT)
    return jnp.expm1(-d_BT) + d_BT


def k3_straight_through(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the value of k3 with the gradient of k2, per token.

    The value has a low variance, and the gradient is that of KL(policy || reference).
    """
    surrogate_BT = k2(logp_BT, ref_BT)
    value_BT = jax.lax.stop_gradient(k3(logp_BT, ref_BT))
    return value_BT + (surrogate_BT - jax.lax.stop_gradient(surrogate_BT))


Estimator = Callable[[Array, Array], jax.Array]
LOSS_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"k2": k2, "k3": k3_straight_through})


def kl_in_reward(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the KL of each token for rewards and logs: k1 = logp - ref, without gradient."""
    return jax.lax.stop_gradient(k1(logp_BT, ref_BT))


def kl_in_loss(name: str, logp_BT: Array, ref_BT: Array) -> jax.Array:
    """Returns the KL of each token for a loss: the estimator's value with the gradient of k2.

    Args:
        name: The estimator, a key of LOSS_ESTIMATORS. "k1" is not among them, because its gradient
            is 0 in expectation.
        logp_BT: Log-probabilities under the trained policy; differentiated.
        ref_BT: Log-probabilities under the reference; without gradient.

    Raises ValueError for an unknown name.
    """
    if name not in LOSS_ESTIMATORS:
        raise ValueError(
            f"unknown KL estimator {name!r} for the loss; known: "
            f"{', '.join(sorted(LOSS_ESTIMATORS))}"
        )
    return LOSS_ESTIMATORS[name](logp_BT, jax.lax.stop_gradient(ref_BT))


def sequence_kl(kl_BT: Array, mask_BT: Array) -> jax.Array:
    """Returns kl_B, the sum of kl_BT over the response tokens of each row."""
    chex.assert_rank([kl_BT, mask_BT], 2)
    return masked_sum(kl_BT, mask_BT, axis=1)


def adaptive_beta(
    beta: Array | float,
    kl: Array | float,
    target: float,
    *,
    episodes: int,
    horizon: int,
    maximum: float = 1.0,
) -> jax.Array:
    """Returns the next KL coefficient, min(beta (1 + e episodes / horizon), maximum).

    e = clip(kl / target - 1, -0.2, 0.2). Source: Ziegler et al. 2019 (arXiv 1909.08593), section
    2.2, with the gain episodes / horizon: beta changes by at most 20 % per `horizon` episodes.
    Departure from the paper: the upper bound `maximum`, because PERL weights the score by 1 - beta,
    which would be negative for beta above 1.

    Args:
        beta: Current coefficient.
        kl: Mean KL of a response in this update, in nats.
        target: Wanted mean KL of a response, in nats.
        episodes: Number of responses in this update.
        horizon: Number of responses over which beta may change by 20 %.
        maximum: Upper bound of the coefficient.

    Raises ValueError for a target or horizon that is not above 0, or a gain of 5 or more, which
    could make beta negative.
    """
    chex.assert_rank([beta, kl], 0)
    if not target > 0:
        raise ValueError(f"the KL target must be above 0, got {target}")
    if not horizon > 0 or not 0 < episodes < 5 * horizon:
        raise ValueError(
            f"the KL horizon must be above a fifth of the episodes ({episodes}), got {horizon}"
        )
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jnp.minimum(beta * (1 + error * episodes / horizon), maximum)
