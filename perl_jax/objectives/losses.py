"""Losses as sums with the weight they are to be divided by, and diagnostics of an update.

A loss returns a `LossSum`, not a mean: microbatches of uneven lengths are added, and the division
happens once, by the weight of the whole batch. For gradients that means: differentiate `.total`,
add the gradients of the microbatches, divide by the added `.weight`.

`normalise` says how the losses of tokens become one number; n_b counts a row's masked-in tokens:

    "token"          sum over all tokens / number of tokens: all tokens count alike
    "sequence"       sum over tokens, mean over the rows with a token: the expectation over episodes
    "sequence-mean"  (1/n_b) sum over tokens, mean over rows: long responses count less a token
    "constant"       sum over tokens / (rows times a stated length): "sequence", on another scale

Positions outside the mask, and rows of weight 0, may hold anything, NaN included: they reach
neither the loss nor its gradient. Inputs in bfloat16 are accumulated in float32.
"""

from __future__ import annotations

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.objectives.kl import kl_in_loss, log_ratio
from perl_jax.runtime.masked import masked_mean, masked_sum, masked_values
from perl_jax.types import Array


@flax.struct.dataclass
class LossSum:
    """total: weighted sum of losses, weight: sum of the weights; float32 scalars. They add."""

    total: Array
    weight: Array

    @property
    def mean(self) -> Array:
        """total / weight; 0 for an empty batch."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.total + other.total, self.weight + other.weight)


def count_tokens(mask_BT: Array) -> jax.Array:
    """The number of True positions, float32."""
    chex.assert_rank(mask_BT, 2)
    return jnp.sum(mask_BT, dtype=jnp.float32)


def count_sequences(mask_BT: Array) -> jax.Array:
    """The number of rows with any True position, float32: filler rows do not count."""
    chex.assert_rank(mask_BT, 2)
    return jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


NORMALISERS = ("token", "sequence", "sequence-mean", "constant")


def reduce_tokens(
    loss_BT: Array, mask_BT: Array, normalise: str, length: int | None = None
) -> LossSum:
    """The losses of tokens as one `LossSum`, by the rules of the module's docstring.

    length: the stated length of "constant". Raises ValueError for another name, or without it.
    """
    chex.assert_rank([loss_BT, mask_BT], 2)
    if normalise not in NORMALISERS:
        raise ValueError(
            f"unknown loss normalisation {normalise!r}; known: {', '.join(NORMALISERS)}"
        )
    if (normalise == "constant") != (length is not None):
        raise ValueError("a length belongs to the normalisation 'constant', and to no other")
    sum_B = masked_sum(loss_BT, mask_BT, axis=1)
    if normalise == "token":
        return LossSum(jnp.sum(sum_B), count_tokens(mask_BT))
    if normalise == "sequence-mean":
        sum_B = sum_B / jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
    if normalise == "constant":
        sum_B = sum_B / length
    return LossSum(jnp.sum(sum_B), count_sequences(mask_BT))


def sft_loss(logp_BT: Array, response_BT: Array, normalise: str = "token") -> LossSum:
    """-sum_t log p(token t | tokens < t) over response tokens (maximum likelihood)."""
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
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (chosen + rejected)^2, rows times weights.

    d = chosen - rejected - margin. Source: PERL (arXiv 2403.10704), pairwise reward model (p = 1,
    c = 0). margin: Touvron et al. 2023 (arXiv 2307.09288), equation 2. probability: p, the share of
    raters who prefer the chosen response. centring: c, which keeps scores of a pair around 0, as
    differences alone do not (Eisenstein et al. 2023, arXiv 2312.09244). Numbers, or one a row.
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
    # Left out at 0, where the square of a huge score would be 0 times infinity.
    if centring:
        loss_B = loss_B + centring * jnp.square(chosen_B + rejected_B)
    return _weighted(loss_B, weight_B)


def squared_error(score_B: Array, label_B: Array, weight_B: Array) -> LossSum:
    """(score - label)^2, each row times its weight: a score fitted to numbers."""
    chex.assert_rank([score_B, label_B, weight_B], 1)
    real_B = weight_B > 0
    error_B = masked_values(score_B, real_B) - masked_values(label_B, real_B)
    return _weighted(jnp.square(error_B), weight_B)


def binary_cross_entropy(score_B: Array, label_B: Array, weight_B: Array) -> LossSum:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s), each row times its weight.

    Source: PERL (arXiv 2403.10704), pointwise reward model. Labels in [0, 1], soft ones included;
    stable for scores of any size.
    """
    chex.assert_rank([score_B, label_B, weight_B], 1)
    real_B = weight_B > 0
    score_B, label_B = masked_values(score_B, real_B), masked_values(label_B, real_B)
    # softplus(s) - y s is the same number, but rounds to 0 for a confident correct answer.
    loss_B = label_B * jax.nn.softplus(-score_B) + (1 - label_B) * jax.nn.softplus(score_B)
    return _weighted(loss_B, weight_B)


def reinforce(
    logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    normalise: str = "sequence",
    *,
    length: int | None = None,
    old_BT: Array | None = None,
    most: float | None = None,
) -> LossSum:
    """-sum_t w_t log pi(a_t | x_t) stopgrad(A_t); with A_t = Z_t - V(x_t) the paper's policy loss.

    Source: PERL (arXiv 2403.10704), L_PG; no clipping. By default summed over tokens and averaged
    over sequences, as the formula is an expectation over episodes.

    w_t = 1; with old_BT (log-probabilities under the policy that sampled) samples may be stale and
    w_t = stopgrad(min(pi / pi_old, most)), importance sampling truncated above (Espeholt et al.
    2018, arXiv 1802.01561, rho): exactly 1 while the policy has not moved.
    """
    chex.assert_rank([logp_BT, advantage_BT, mask_BT], 2)
    if (old_BT is None) != (most is None):
        raise ValueError("old log-probabilities and their ratio's largest value belong together")
    advantage_BT = jax.lax.stop_gradient(masked_values(advantage_BT, mask_BT))
    if old_BT is not None:
        ratio_BT = jnp.exp(log_ratio(*_inside(mask_BT, logp_BT, old_BT)))
        advantage_BT = advantage_BT * jax.lax.stop_gradient(jnp.minimum(ratio_BT, most))
    return reduce_tokens(
        -masked_values(logp_BT, mask_BT) * advantage_BT, mask_BT, normalise, length
    )


RATIOS = ("token", "sequence", "product")


def importance_ratio(logp_BT: Array, old_BT: Array, mask_BT: Array, level: str) -> jax.Array:
    """r_BT = pi / pi_old of each token, or one number for all of a row's tokens; 1 where masked.

    "token"     exp(l_t), l_t = log pi - log pi_old
    "sequence"  exp(mean_t l_t), the geometric mean (Zheng et al. 2025, arXiv 2507.18071, GSPO)
    "product"   exp(sum_t l_t), the ratio of the whole sequences

    The log-ratio, of a token or a sequence, is clamped to +-20. Raises ValueError for another name.
    """
    chex.assert_rank([logp_BT, old_BT, mask_BT], 2)
    if level not in RATIOS:
        raise ValueError(f"unknown importance ratio {level!r}; known: {', '.join(RATIOS)}")
    logp_BT, old_BT = _inside(mask_BT, logp_BT, old_BT)
    if level == "token":
        return jnp.exp(log_ratio(logp_BT, old_BT))
    total_B1 = jnp.sum(logp_BT - old_BT, axis=1, keepdims=True)
    if level == "sequence":
        total_B1 = total_B1 / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
    ratio_B1 = jnp.exp(log_ratio(total_B1, jnp.zeros_like(total_B1)))
    return jnp.where(mask_BT, ratio_B1, 1.0)


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
    """-min(r A, clip(r, 1 - low, 1 + high) A), r from `importance_ratio`, A without gradient.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; two bounds as in Yu et al. 2025
    (arXiv 2503.14476). With a ratio of sequences `normalise="sequence-mean"` gives one such term a
    sequence. At r = 1 its gradient is that of `reinforce`. Raises ValueError for a low outside
    (0, 1) or a high that is not above 0.
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
    """sum_t (Z_t - V(x_t))^2, no factor 1/2, no gradient to the returns.

    Source: PERL (arXiv 2403.10704), L_V. `values_BT` must be aligned by `logprobs.shift_right`.
    With old_BT, the values at sampling time, the larger of that and the same with V kept within
    +-clip of them: PPO's clipped value loss (as released with Schulman et al. 2017).
    """
    chex.assert_rank([values_BT, returns_BT, mask_BT], 2)
    if (old_BT is None) != (clip is None):
        raise ValueError("old values and the distance to keep to them belong together")
    returns_BT = jax.lax.stop_gradient(masked_values(returns_BT, mask_BT))
    values_BT = masked_values(values_BT, mask_BT)
    loss_BT = jnp.square(returns_BT - values_BT)
    if old_BT is not None:
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
    """`kl.kl_in_loss` of each token, times its row's weight (None: 1), which carries no gradient.

    Its gradient is the reverse KL's, per token, at the policy that sampled; samples that have grown
    stale carry no importance weight.
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
    """Preference losses on log-ratios: chosen_B = sum_t (log pi - log pi_ref) of the chosen
    response.

    h = chosen - rejected, each row times its weight, and

        "dpo"  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing
               (Rafailov et al. 2023, arXiv 2305.18290, equation 7; e: its section on noisy labels
               by Mitchell 2023, "A note on DPO with noisy preferences", conservative DPO)
        "ipo"  (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17)

    IPO's h may also be a difference of means over tokens: that is the caller's choice. e may be one
    for each row, [B]: 1 - p where raters prefer the chosen with probability p. Raises ValueError
    for another kind, a beta that is not above 0, or one smoothing for all rows outside [0, 1/2).
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
        return _weighted((1 - label_smoothing) * right_B + label_smoothing * wrong_B, weight_B)
    if kind != "ipo" or each or label_smoothing:
        raise ValueError(
            f"unknown preference loss {kind!r} (smoothing {label_smoothing}); known: dpo, and ipo "
            "without smoothing"
        )
    return _weighted(jnp.square(h_B - 1 / (2 * beta)), weight_B)


def sampler_mismatch(logp_sampler_BT: Array, logp_trainer_BT: Array, mask_BT: Array) -> jax.Array:
    """Mean over masked-in tokens of exp |logp_sampler - logp_trainer|: 1 when they agree.

    Both under the same weights and temperature, so anything above 1 is numerics or a bug.
    """
    chex.assert_rank([logp_sampler_BT, logp_trainer_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_sampler_BT, logp_trainer_BT, mask_BT])
    return masked_mean(jnp.exp(jnp.abs(log_ratio(logp_sampler_BT, logp_trainer_BT))), mask_BT)


def _inside(mask_BT: Array, *arrays_BT: Array) -> tuple[jax.Array, ...]:
    """The arrays with 0 outside the mask: what lies there reaches no difference."""
    return tuple(masked_values(x_BT, mask_BT) for x_BT in arrays_BT)


def _weighted(loss_B: Array, weight_B: Array) -> LossSum:
    """Rows times their weights; the losses of weight-0 rows are finite by now."""
    chex.assert_equal_shape([loss_B, weight_B])
    weight_B = weight_B.astype(loss_B.dtype)
    return LossSum(jnp.sum(loss_B * weight_B), jnp.sum(weight_B))


Logs = dict[str, LossSum]
