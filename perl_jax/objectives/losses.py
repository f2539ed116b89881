"""Losses as pairs of a sum and a weight, and diagnostics of an update.

A loss returns a `LossSum` instead of a mean. The sums and weights of microbatches are added, and
the division happens once, by the weight of the whole batch: microbatches of different lengths then
give the same loss as one batch. For gradients: differentiate `.total`, add the gradients of the
microbatches, and divide by the added `.weight`.

`normalise` names the reduction over tokens. n_b is the number of tokens inside row b's mask:

    "token"          sum over all tokens / number of tokens: every token has equal weight
    "sequence"       sum over tokens, mean over rows with a token: the expectation over episodes
    "sequence-mean"  (1/n_b) sum over tokens, mean over rows: a token of a long row has less weight
    "constant"       sum over tokens / (number of rows times a given length): "sequence" rescaled

Positions outside the mask and rows of weight 0 affect neither a loss nor its gradient, even if they
hold NaN. bfloat16 inputs are accumulated in float32.
"""

from __future__ import annotations

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.objectives.kl import kl_in_loss, log_ratio
from perl_jax.runtime.masked import masked_sum, masked_values
from perl_jax.types import Array


@flax.struct.dataclass
class LossSum:
    """A weighted sum of losses and the sum of the weights; microbatches add both.

    Attributes:
        total: Sum of weight times loss, float32 scalar.
        weight: Sum of the weights, float32 scalar.
    """

    total: Array
    weight: Array

    @property
    def mean(self) -> Array:
        """total / weight; 0 for an empty batch."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.total + other.total, self.weight + other.weight)


def count_tokens(mask_BT: Array) -> jax.Array:
    """Returns the number of True positions, float32 scalar."""
    chex.assert_rank(mask_BT, 2)
    return jnp.sum(mask_BT, dtype=jnp.float32)


def count_sequences(mask_BT: Array) -> jax.Array:
    """Returns the number of rows with a True position, float32 scalar; filler rows have none."""
    chex.assert_rank(mask_BT, 2)
    return jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


NORMALISERS = ("token", "sequence", "sequence-mean", "constant")


def reduce_tokens(
    loss_BT: Array, mask_BT: Array, normalise: str, length: int | None = None
) -> LossSum:
    """Returns the `LossSum` of token losses for one of the reductions of the module docstring.

    Args:
        loss_BT: Loss of each token.
        mask_BT: True on the tokens that count.
        normalise: The reduction over tokens, one of NORMALISERS.
        length: Divisor, required for "constant" and None for other reductions.

    Raises ValueError for an unknown reduction, or a length that is missing or not needed.
    """
    chex.assert_rank([loss_BT, mask_BT], 2)
    if normalise not in NORMALISERS:
        raise ValueError(
            f"unknown loss normalisation {normalise!r}; known: {', '.join(NORMALISERS)}"
        )
    if (normalise == "constant") != (length is not None):
        raise ValueError("the normalisation 'constant' needs a length, and no other has one")
    sum_B = masked_sum(loss_BT, mask_BT, axis=1)
    if normalise == "token":
        return LossSum(jnp.sum(sum_B), count_tokens(mask_BT))
    if normalise == "sequence-mean":
        sum_B = sum_B / jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
    if normalise == "constant":
        sum_B = sum_B / length
    return LossSum(jnp.sum(sum_B), count_sequences(mask_BT))


def sft_loss(logp_BT: Array, response_BT: Array, normalise: str = "token") -> LossSum:
    """Returns the `LossSum` of -log p(token t | tokens < t) of response tokens.

    Args:
        logp_BT: Log-probabilities of the tokens; differentiated.
        response_BT: True on response tokens.
        normalise: The reduction over tokens, one of NORMALISERS except "constant".
    """
    return reduce_tokens(-logp_BT, response_BT, normalise)


def bradley_terry(
    chosen_B: Array,
    rejected_B: Array,
    weight_B: Array,
    margin: Array | float = 0.0,
    *,
    probability: Array | float = 1.0,
    centring: float = 0.0,
) -> LossSum:
    """Returns the `LossSum` of the Bradley-Terry loss of score pairs, weighted by `weight_B`.

        -p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (chosen + rejected)^2,
        d = chosen - rejected - margin

    Source: PERL (arXiv 2403.10704), pairwise reward model (p = 1, c = 0).

    Args:
        chosen_B: Scores of the preferred responses.
        rejected_B: Scores of the other responses.
        weight_B: Weight of each pair.
        margin: Required score difference, a number or one per pair [B]. Source: Touvron et al. 2023
            (arXiv 2307.09288), equation 2.
        probability: p, the share of raters who prefer the chosen response, a number or one per pair
            [B].
        centring: c. It keeps the mean score of a pair near 0; score differences alone leave it
            free. Source: Eisenstein et al. 2023 (arXiv 2312.09244).
    """
    chex.assert_rank([chosen_B, rejected_B, weight_B], 1)
    chex.assert_rank([margin, probability], {0, 1})
    real_B = weight_B > 0
    chosen_B, rejected_B = masked_values(chosen_B, real_B), masked_values(rejected_B, real_B)
    margin_B, p_B = (
        masked_values(jnp.broadcast_to(x, real_B.shape), real_B) for x in (margin, probability)
    )
    d_B = chosen_B - rejected_B - margin_B
    loss_B = p_B * jax.nn.softplus(-d_B) + (1 - p_B) * jax.nn.softplus(d_B)
    # Skipped for c = 0: the square of a huge score is infinite, and 0 times infinity is NaN.
    if centring:
        loss_B = loss_B + centring * jnp.square(chosen_B + rejected_B)
    return weighted(loss_B, weight_B)


def squared_error(score_B: Array, label_B: Array, weight_B: Array) -> LossSum:
    """Returns the `LossSum` of (score - label)^2.

    Args:
        score_B: Scores.
        label_B: What the scores are fitted to.
        weight_B: Weight of each row.
    """
    chex.assert_rank([score_B, label_B, weight_B], 1)
    real_B = weight_B > 0
    error_B = masked_values(score_B, real_B) - masked_values(label_B, real_B)
    return weighted(jnp.square(error_B), weight_B)


def binary_cross_entropy(score_B: Array, label_B: Array, weight_B: Array) -> LossSum:
    """Returns the `LossSum` of -y log sigmoid(s) - (1 - y) log sigmoid(-s).

    Source: PERL (arXiv 2403.10704), pointwise reward model. The result is accurate for scores of
    any size.

    Args:
        score_B: s, the score.
        label_B: y, the label, in [0, 1].
        weight_B: Weight of each row.
    """
    chex.assert_rank([score_B, label_B, weight_B], 1)
    real_B = weight_B > 0
    score_B, label_B = masked_values(score_B, real_B), masked_values(label_B, real_B)
    # Not softplus(s) - y s: it is equal, but rounds to 0 for a confident correct answer.
    loss_B = label_B * jax.nn.softplus(-score_B) + (1 - label_B) * jax.nn.softplus(score_B)
    return weighted(loss_B, weight_B)


def reinforce(
    logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    normalise: str = "sequence",
    *,
    length: int | None = None,
    old_BT: Array | None = None,
    max_ratio: float | None = None,
) -> LossSum:
    """Returns the `LossSum` of the REINFORCE loss -sum_t w_t log pi(a_t | x_t) A_t.

    w_t and A_t have no gradient. With A_t = Z_t - V(x_t) it is the policy loss L_PG of PERL (arXiv
    2403.10704); ratios are not clipped. The default reduction sums over tokens and averages over
    sequences, because L_PG is an expectation over episodes.

    Without old_BT, w_t = 1. With old_BT, w_t = min(pi / pi_old, max_ratio): importance sampling
    with truncated weights for stale samples (Espeholt et al. 2018, arXiv 1802.01561, rho). w_t is
    exactly 1 while the policy is the one that sampled.

    Args:
        logp_BT: Log-probabilities under the trained policy; differentiated.
        advantage_BT: A_t.
        mask_BT: True on response tokens.
        normalise: The reduction over tokens, one of NORMALISERS.
        length: Divisor, required for "constant" and None for other reductions.
        old_BT: Log-probabilities under the policy that sampled; None: w_t = 1.
        max_ratio: Upper bound of w_t; given if and only if old_BT is.

    Raises ValueError if only one of old_BT and max_ratio is given.
    """
    chex.assert_rank([logp_BT, advantage_BT, mask_BT], 2)
    if (old_BT is None) != (max_ratio is None):
        raise ValueError("old_BT and max_ratio must be given together")
    advantage_BT = jax.lax.stop_gradient(masked_values(advantage_BT, mask_BT))
    if old_BT is not None:
        ratio_BT = jnp.exp(log_ratio(*_inside(mask_BT, logp_BT, old_BT)))
        advantage_BT = advantage_BT * jax.lax.stop_gradient(jnp.minimum(ratio_BT, max_ratio))
    return reduce_tokens(
        -masked_values(logp_BT, mask_BT) * advantage_BT, mask_BT, normalise, length
    )


def clipped(
    ratio_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    *,
    low: float,
    high: float,
    normalise: str,
    length: int | None = None,
) -> LossSum:
    """Returns the `LossSum` of PPO's clipped loss -min(r A, clip(r, 1 - low, 1 + high) A).

    A has no gradient. Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; separate bounds:
    Yu et al. 2025 (arXiv 2503.14476). For a ratio per sequence, `normalise="sequence-mean"` counts
    the term once per sequence. At r = 1 the gradient is that of `reinforce`.

    Args:
        ratio_BT: r, from `importance_ratio`.
        advantage_BT: A.
        mask_BT: True on response tokens.
        low: Distance of the lower bound from 1, in (0, 1).
        high: Distance of the upper bound from 1, above 0.
        normalise: The reduction over tokens, one of NORMALISERS.
        length: Divisor, required for "constant" and None for other reductions.

    Raises ValueError for bounds outside these ranges.
    """
    chex.assert_equal_shape([ratio_BT, advantage_BT, mask_BT])
    if not (0 < low < 1 and high > 0):
        raise ValueError(f"a ratio cannot be clipped to [1 - {low}, 1 + {high}]")
    advantage_BT = jax.lax.stop_gradient(masked_values(advantage_BT, mask_BT))
    bounded_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT)
    return reduce_tokens(-gain_BT, mask_BT, normalise, length)


def value_loss(
    values_BT: Array,
    returns_BT: Array,
    mask_BT: Array,
    normalise: str = "sequence",
    *,
    length: int | None = None,
    old_BT: Array | None = None,
    clip: float | None = None,
) -> LossSum:
    """Returns the `LossSum` of (Z_t - V(x_t))^2, without a factor 1/2; Z has no gradient.

    Source: PERL (arXiv 2403.10704), L_V. With old_BT, each term is the larger of this and the same
    with V limited to old_BT +- clip: PPO's clipped value loss (code released with Schulman et al.
    2017).

    Args:
        values_BT: V of the state before each token (`logprobs.shift_right`); differentiated.
        returns_BT: Z, what V is fitted to.
        mask_BT: True on response tokens.
        normalise: The reduction over tokens, one of NORMALISERS.
        length: Divisor, required for "constant" and None for other reductions.
        old_BT: Values at sampling time; None: no clipping.
        clip: Largest distance from old_BT; given if and only if old_BT is.

    Raises ValueError if only one of old_BT and clip is given.
    """
    chex.assert_rank([values_BT, returns_BT, mask_BT], 2)
    if (old_BT is None) != (clip is None):
        raise ValueError("old_BT and clip must be given together")
    returns_BT = jax.lax.stop_gradient(masked_values(returns_BT, mask_BT))
    values_BT = masked_values(values_BT, mask_BT)
    loss_BT = jnp.square(returns_BT - values_BT)
    if old_BT is not None and clip is not None:
        old_BT = jax.lax.stop_gradient(masked_values(old_BT, mask_BT))
        near_BT = old_BT + jnp.clip(values_BT - old_BT, -clip, clip)
        loss_BT = jnp.maximum(loss_BT, jnp.square(returns_BT - near_BT))
    return reduce_tokens(loss_BT, mask_BT, normalise, length)


def kl_loss(
    logp_BT: Array,
    ref_BT: Array,
    mask_BT: Array,
    estimator: str = "k2",
    normalise: str = "sequence",
    *,
    length: int | None = None,
    weight_B: Array | None = None,
) -> LossSum:
    """Returns the `LossSum` of the KL of each token (`kl.kl_in_loss`) times its row's weight.

    The gradient is that of the reverse KL per token, for tokens sampled from the current policy.
    Stale samples are not reweighted.

    Args:
        logp_BT: Log-probabilities under the trained policy; differentiated.
        ref_BT: Log-probabilities under the reference.
        mask_BT: True on response tokens.
        estimator: A key of `kl.LOSS_ESTIMATORS`.
        normalise: The reduction over tokens, one of NORMALISERS.
        length: Divisor, required for "constant" and None for other reductions.
        weight_B: Weight of each row, without gradient; None: 1. `LossSum.weight` does not contain
            it.
    """
    chex.assert_rank([logp_BT, ref_BT, mask_BT], 2)
    kl_BT = kl_in_loss(estimator, *_inside(mask_BT, logp_BT, ref_BT))
    if weight_B is not None:
        kl_BT = kl_BT * jax.lax.stop_gradient(weight_B)[:, None]
    return reduce_tokens(kl_BT, mask_BT, normalise, length)


def preference(
    chosen_B: Array,
    rejected_B: Array,
    weight_B: Array,
    *,
    beta: float,
    kind: str = "dpo",
    label_smoothing: float | Array = 0.0,
) -> LossSum:
    """Returns the `LossSum` of a preference loss of h = chosen - rejected, weighted by `weight_B`.

        "dpo"  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing
               (Rafailov et al. 2023, arXiv 2305.18290, equation 7; e: Mitchell 2023, "A note on DPO
               with noisy preferences", conservative DPO)
        "ipo"  (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17)

    Args:
        chosen_B: Log-ratio of each preferred response, sum_t (log pi - log pi_ref); for IPO it may
            be the mean over tokens.
        rejected_B: Log-ratio of each other response.
        weight_B: Weight of each pair.
        beta: Scale of h, above 0.
        kind: "dpo" or "ipo".
        label_smoothing: e, a number in [0, 1/2) or one per row [B]: 1 - p if raters prefer the
            chosen response with probability p. IPO has none.

    Raises ValueError for an unknown kind, or a beta or label smoothing outside these ranges.
    """
    chex.assert_rank([chosen_B, rejected_B, weight_B], 1)
    each = jnp.ndim(label_smoothing) > 0
    if not beta > 0 or not (each or 0 <= label_smoothing < 0.5):
        raise ValueError(
            f"beta {beta} must be above 0, label smoothing {label_smoothing} in [0, 1/2)"
        )
    real_B = weight_B > 0
    h_B = masked_values(chosen_B, real_B) - masked_values(rejected_B, real_B)
    if kind == "dpo":
        right_B, wrong_B = jax.nn.softplus(-beta * h_B), jax.nn.softplus(beta * h_B)
        return weighted((1 - label_smoothing) * right_B + label_smoothing * wrong_B, weight_B)
    if kind != "ipo" or each or label_smoothing:
        raise ValueError(
            f"unknown preference loss {kind!r} (smoothing {label_smoothing}); known: dpo, and ipo "
            "without smoothing"
        )
    return weighted(jnp.square(h_B - 1 / (2 * beta)), weight_B)


def _inside(mask_BT: Array, *arrays_BT: Array) -> tuple[jax.Array, ...]:
    """Returns each array with 0 outside the mask, so that NaN there does not spread."""
    return tuple(masked_values(x_BT, mask_BT) for x_BT in arrays_BT)


def weighted(x_B: Array, weight_B: Array) -> LossSum:
    """Returns the `LossSum` of one number of each row, weighted by `weight_B`.

    Rows of weight 0 do not count; their numbers may be NaN.
    """
    chex.assert_equal_shape([x_B, weight_B])
    x_B = masked_values(x_B, weight_B > 0)
    weight_B = weight_B.astype(x_B.dtype)
    return LossSum(jnp.sum(x_B * weight_B), jnp.sum(weight_B))


Logs = dict[str, LossSum]
