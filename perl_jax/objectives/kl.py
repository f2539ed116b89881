"""Per-token estimators of KL(policy || reference), and the adaptive coefficient.

With tokens drawn from the policy and d = logp - ref_logp (clamped to +-20):

    k1 = d                    unbiased, high variance, may be negative
    k2 = d^2 / 2              biased, low variance, never negative
    k3 = exp(-d) - 1 + d      unbiased, low variance, never negative

Source: Schulman, "Approximating KL Divergence" (2020). Which one may be differentiated is another
question than which one estimates well (Tang and Munos 2025, arXiv 2506.09477):

    E[grad k1] = 0                             no signal at all
    E[grad k2] = grad KL(policy || reference)  the one wanted
    E[grad k3] = grad KL(reference || policy)  the forward KL

In a reward an estimator is not differentiated but multiplies grad log policy:

    E[k1 grad log policy] = grad KL(policy || reference)  the one wanted
    E[k3 grad log policy] = that minus grad KL(reference || policy), which near the reference is
    nothing

and k2 is no better. So a KL inside the reward is `kl_in_reward`, k1 without a gradient, and a KL
inside the loss is `kl_in_loss`, whose gradient is k2's under every name it accepts. Both are per
token, given the tokens before it: the effect of a token on the KL of later ones is in the reward
form only.
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
    """clip(logp - ref, -20, 20), any shape; beyond the clamp the gradient is 0."""
    chex.assert_equal_shape([logp_BT, ref_BT])
    difference_BT = at_least_float32(logp_BT) - at_least_float32(ref_BT)
    return jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k1(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """d = logp - ref (module docstring)."""
    return log_ratio(logp_BT, ref_BT)


def k2(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """d^2 / 2 (module docstring)."""
    return 0.5 * jnp.square(log_ratio(logp_BT, ref_BT))


def k3(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """exp(-d) - 1 + d (module docstring)."""
    d_BT = log_ratio(logp_BT, ref_BT)
    return jnp.expm1(-d_BT) + d_BT


def k3_straight_through(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """The value of k3 with the gradient of k2: a low-variance number that pulls the right way."""
    surrogate_BT = k2(logp_BT, ref_BT)
    value_BT = jax.lax.stop_gradient(k3(logp_BT, ref_BT))
    return value_BT + (surrogate_BT - jax.lax.stop_gradient(surrogate_BT))


Estimator = Callable[[Array, Array], jax.Array]
LOSS_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"k2": k2, "k3": k3_straight_through})


def kl_in_reward(logp_BT: Array, ref_BT: Array) -> jax.Array:
    """k1 with no gradient through it, for rewards and for logs (module docstring)."""
    return jax.lax.stop_gradient(k1(logp_BT, ref_BT))


def kl_in_loss(name: str, logp_BT: Array, ref_BT: Array) -> jax.Array:
    """The value of the estimator called `name`, with the gradient of k2 and none to the reference.

    Raises ValueError naming the known estimators for any other name, "k1" included: its gradient
    is zero in expectation.
    """
    if name not in LOSS_ESTIMATORS:
        raise ValueError(
            f"unknown KL estimator {name!r} for the loss; known: "
            f"{', '.join(sorted(LOSS_ESTIMATORS))}"
        )
    return LOSS_ESTIMATORS[name](logp_BT, jax.lax.stop_gradient(ref_BT))


def sequence_kl(kl_BT: Array, mask_BT: Array) -> jax.Array:
    """kl_B = sum over response tokens of kl_BT: a sum, divided by nothing."""
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
    """The next KL coefficient: beta (1 + e episodes / horizon).

    e = clip(kl / target - 1, -0.2, 0.2). Source: Ziegler et al. 2019 (arXiv 1909.08593), section
    2.2, its gain being episodes / horizon: 20 % at most for each `horizon` episodes.
    kl: mean over sequences of the sequence KL. episodes: sequences in this update.

    Departure: the result is at most `maximum`, because PERL weighs the score by 1 - beta, which
    beyond 1 would ask for low scores. Raises ValueError for a target or horizon not above 0, or
    for a gain of 5 or more, which could turn the coefficient's sign.
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
