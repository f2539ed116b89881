"""Preference objectives without a reward model: DPO, IPO and ORPO on comparisons, KTO on labels.

`OBJECTIVES` is their table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.passes import interleave, interleaved_pairs, sequence_logprobs, split_pairs
from perl_jax.objectives import losses
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.objectives.supervised import accuracy, in_order
from perl_jax.runtime.masked import masked_mean, masked_sum, masked_values
from perl_jax.types import Array, Labelled, Pairs, Tree


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """One entry of `OBJECTIVES`.

    Attributes:
        kind: The kind of rows that it reads.
        beta: Default scale of the log-ratios of policy and reference. None: the objective has no
            reference.
    """

    kind: Literal["comparisons", "labels"]
    beta: float | None

    @property
    def reference(self) -> bool:
        """Whether the objective compares the policy with a reference."""
        return self.beta is not None


# The values of `DPOConfig.loss`.
OBJECTIVES: Mapping[str, PreferenceObjective] = MappingProxyType(
    {
        # Rafailov et al. 2023 (arXiv 2305.18290). Its value of beta for summaries is 0.5; with 0.1
        # short, noisily labelled responses drift (docs/log/algorithms.md).
        "dpo": PreferenceObjective("comparisons", 0.5),
        # Azar et al. 2023 (arXiv 2310.12036).
        "ipo": PreferenceObjective("comparisons", 0.1),
        # Ethayarajh et al. 2024 (arXiv 2402.01306).
        "kto": PreferenceObjective("labels", 0.1),
        # Hong et al. 2024 (arXiv 2403.07691).
        "orpo": PreferenceObjective("comparisons", None),
    }
)
# The largest mean log-probability that `log_odds` reads: at 0 the odds are infinite.
MOST_LIKELY = -1e-6


def response_log_ratio(
    logp_BT: Array, reference_BT: Array, response_BT: Array, mean: bool = False
) -> jax.Array:
    """Returns sum_t (log pi - log pi_ref) over each row's response tokens, [B].

    Args:
        logp_BT: Log-probabilities under the policy.
        reference_BT: Log-probabilities under the reference.
        response_BT: True on response tokens.
        mean: Divide the sum by the number of response tokens.
    """
    total_B = masked_sum(logp_BT, response_BT, axis=1) - masked_sum(
        reference_BT, response_BT, axis=1
    )
    return total_B / jnp.maximum(jnp.sum(response_BT, axis=1), 1) if mean else total_B


@flax.struct.dataclass
class Preferences:
    """Comparisons with the log-probabilities of both responses under the reference.

    Attributes:
        pairs: The comparisons.
        chosen_BT: Reference log-probabilities of the preferred responses.
        rejected_BT: Reference log-probabilities of the other responses.
    """

    pairs: Pairs
    chosen_BT: Array
    rejected_BT: Array

    @property
    def reference_BT(self) -> jax.Array:
        """Reference log-probabilities [2 B, T], with chosen and rejected rows in turn.

        It is the row order of `passes.interleaved_pairs`.
        """
        return interleave(self.chosen_BT, self.rejected_BT)


def preference_objective(
    lm: LanguageModel,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Preferences,
    key: jax.Array | None,
    *,
    kind: str,
    beta: float,
    label_smoothing: float,
    mean: bool,
    soft_labels: bool = False,
) -> tuple[LossSum, Logs]:
    """Returns the DPO or IPO loss (`losses.preference`) of a batch of comparisons, and metrics.

    The metrics are weighted means over pairs. dpo/chosen_reward and dpo/rejected_reward: implicit
    rewards beta log(pi / pi_ref). train/accuracy: share of pairs in which the chosen one is higher.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "policy".
        base: The frozen base.
        batch: Comparisons with reference log-probabilities.
        key: Random key of dropout; None: no dropout.
        kind: "dpo" or "ipo".
        beta: Scale of the log-ratios.
        label_smoothing: Probability that a preference is wrong.
        mean: Whether a response's log-ratio is the mean over its tokens; False: the sum.
        soft_labels: Whether rows with a known preference probability p use 1 - p as label
            smoothing.
    """
    both, weight_B = interleaved_pairs(batch.pairs), batch.pairs.weight_B
    logp_BT = sequence_logprobs(lm, base, roles["policy"], both, key=key)
    ratio_B = response_log_ratio(logp_BT, batch.reference_BT, both.response_BT, mean)
    chosen_B, rejected_B = split_pairs(ratio_B)
    total = jnp.sum(weight_B)
    measured = {"dpo/chosen_reward": beta * chosen_B, "dpo/rejected_reward": beta * rejected_B}
    logs = {"train/accuracy": accuracy(batch.pairs, chosen_B, rejected_B)}
    logs |= {
        name: LossSum(jnp.sum(jnp.where(weight_B > 0, value_B, 0) * weight_B), total)
        for name, value_B in measured.items()
    }
    smoothing = label_smoothing
    if soft_labels and batch.pairs.probability_B is not None:
        smoothing = jnp.where(
            jnp.isnan(batch.pairs.probability_B), label_smoothing, 1 - batch.pairs.probability_B
        )
    return losses.preference(
        chosen_B, rejected_B, weight_B, beta=beta, kind=kind, label_smoothing=smoothing
    ), logs


def kto(
    ratio_B: Array,
    label_B: Array,
    kl_B: Array,
    weight_B: Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossSum:
    """Returns the `LossSum` of the KTO loss of labelled responses, weighted by `weight_B`.

        desirable    w_D (1 - sigmoid(beta (r - z)))
        undesirable  w_U (1 - sigmoid(beta (z - r)))

    r is the log-ratio of a response and z the KL of policy and reference; z has no gradient.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), KTO: lambda_y - v(x, y) with the value
    function v.
    Departure from the paper: a label y strictly between 0 and 1 gives y times the first loss plus
    1 - y times the second.

    Args:
        ratio_B: r, sum_t (log pi - log pi_ref) over the response; differentiated.
        label_B: 1 for a desirable response, 0 for an undesirable one.
        kl_B: z, the same number on all rows of a batch (`mismatched_kl`).
        weight_B: Weight of each row in the mean; 0 on filler rows.
        beta: Scale of r - z, above 0.
        desirable_weight: w_D, lambda_D in the paper, above 0.
        undesirable_weight: w_U, lambda_U in the paper, above 0.

    Raises ValueError for a beta or a weight that is not above 0.
    """
    chex.assert_rank([ratio_B, label_B, kl_B, weight_B], 1)
    if not (beta > 0 and desirable_weight > 0 and undesirable_weight > 0):
        raise ValueError(
            f"beta {beta}, desirable_weight {desirable_weight} and undesirable_weight "
            f"{undesirable_weight} must be above 0"
        )
    real_B = weight_B > 0
    ratio_B, label_B, kl_B = (masked_values(x_B, real_B) for x_B in (ratio_B, label_B, kl_B))
    gain_B = beta * (ratio_B - jax.lax.stop_gradient(kl_B))
    # 1 - sigmoid(x) = sigmoid(-x), which does not round to 0 for large x.
    loss_B = desirable_weight * label_B * jax.nn.sigmoid(-gain_B)
    loss_B = loss_B + undesirable_weight * (1 - label_B) * jax.nn.sigmoid(gain_B)
    return losses.weighted(loss_B, weight_B)


def mismatched_kl(ratio_B: Array, weight_B: Array) -> jax.Array:
    """Returns KTO's estimate of KL(policy || reference), z = max(0, mean of the ratios), [].

    It has no gradient. The responses are those of other rows, not samples of the policy, so the
    estimate is biased. Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1.

    Args:
        ratio_B: sum_t (log pi - log pi_ref) of a response to the prompt of another row.
        weight_B: 0 on filler rows, which do not count.
    """
    chex.assert_rank([ratio_B, weight_B], 1)
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(ratio_B, weight_B > 0), 0.0))


@flax.struct.dataclass
class Unpaired:
    """Labelled responses with what KTO needs of the reference.

    Attributes:
        labelled: The responses and their labels.
        reference_BT: Reference log-probabilities of the responses.
        kl_B: The batch's `mismatched_kl`, on every row.
    """

    labelled: Labelled
    reference_BT: Array
    kl_B: Array


def kto_objective(
    lm: LanguageModel,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Unpaired,
    key: jax.Array | None,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[LossSum, Logs]:
    """Returns the KTO loss (`kto`) of a batch of labelled responses, and metrics.

    The metrics are weighted means over rows. kto/desirable_reward and kto/undesirable_reward:
    implicit rewards beta log(pi / pi_ref) of rows with a label above 1/2 and of the others. kto/kl:
    the estimate of the KL that rewards are compared with. train/accuracy: share of rows whose
    log-ratio lies above the KL exactly if the label is above 1/2; equal numbers count half.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "policy".
        base: The frozen base.
        batch: Labelled responses with reference log-probabilities and the KL.
        key: Random key of dropout; None: no dropout.
        beta: Scale of the log-ratios.
        desirable_weight: Weight of the loss of desirable responses.
        undesirable_weight: Weight of the loss of undesirable responses.
    """
    tokens, weight_B = batch.labelled.tokens, batch.labelled.weight_B
    label_B = batch.labelled.label_B
    logp_BT = sequence_logprobs(lm, base, roles["policy"], tokens, key=key)
    ratio_B = response_log_ratio(logp_BT, batch.reference_BT, tokens.response_BT)
    wanted_B = label_B > 0.5
    right_B = jnp.where(wanted_B, in_order(ratio_B, batch.kl_B), in_order(batch.kl_B, ratio_B))
    logs = {
        "train/accuracy": losses.weighted(right_B, weight_B),
        "kto/desirable_reward": losses.weighted(beta * ratio_B, weight_B * wanted_B),
        "kto/undesirable_reward": losses.weighted(beta * ratio_B, weight_B * ~wanted_B),
        "kto/kl": losses.weighted(batch.kl_B, weight_B),
    }
    loss = kto(
        ratio_B,
        label_B,
        batch.kl_B,
        weight_B,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return loss, logs


def mean_logprob(logp_BT: Array, response_BT: Array) -> jax.Array:
    """Returns (1 / n) sum_t log pi over the n tokens of each response, [B]; 0 on filler rows."""
    total_B = masked_sum(logp_BT, response_BT, axis=1)
    return total_B / jnp.maximum(jnp.sum(response_BT, axis=1), 1)


def log_odds(logp_B: Array) -> jax.Array:
    """Returns log(p / (1 - p)) with p = exp(logp), at most about 13.8.

    Source: Hong et al. 2024 (arXiv 2403.07691), equation 4. Departure from the paper: p is limited
    to exp(`MOST_LIKELY`), because the odds of a certain response are infinite.

    Args:
        logp_B: Mean log-probability of a response's tokens.
    """
    logp_B = jnp.minimum(logp_B, MOST_LIKELY)
    # log(1 - exp(x)) without cancellation: of two forms the one that is accurate for this x. The
    # other form gets an argument with a finite gradient.
    near_B = logp_B > -math.log(2)
    rest_B = jnp.where(
        near_B,
        jnp.log(-jnp.expm1(jnp.where(near_B, logp_B, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_B, -1.0, logp_B))),
    )
    return logp_B - rest_B


def odds_ratio(chosen_B: Array, rejected_B: Array, weight_B: Array) -> LossSum:
    """Returns the `LossSum` of ORPO's odds-ratio loss, weighted by `weight_B`.

        -log sigmoid(log odds(chosen) - log odds(rejected)),  odds = p / (1 - p)

    Source: Hong et al. 2024 (arXiv 2403.07691), equation 7.

    Args:
        chosen_B: log p of each preferred response: the mean log-probability of its tokens.
        rejected_B: That of each other response.
        weight_B: Weight of each pair; 0 on filler rows.
    """
    chex.assert_rank([chosen_B, rejected_B, weight_B], 1)
    real_B = weight_B > 0
    chosen_B, rejected_B = masked_values(chosen_B, real_B), masked_values(rejected_B, real_B)
    return losses.weighted(jax.nn.softplus(log_odds(rejected_B) - log_odds(chosen_B)), weight_B)


def orpo(
    chosen_B: Array, rejected_B: Array, weight_B: Array, *, odds_weight: float
) -> tuple[LossSum, Logs]:
    """Returns the `LossSum` of the ORPO loss of comparisons, weighted by `weight_B`, and its terms.

        -log p(chosen) + lambda L_OR,  L_OR: `odds_ratio`

    Source: Hong et al. 2024 (arXiv 2403.07691), equation 6. The loss needs no reference. The terms
    are orpo/sft_loss and orpo/odds_loss (L_OR).

    Args:
        chosen_B: log p of each preferred response: the mean log-probability of its tokens;
            differentiated.
        rejected_B: That of each other response; differentiated.
        weight_B: Weight of each pair; 0 on filler rows.
        odds_weight: lambda, above 0.

    Raises ValueError for a lambda that is not above 0.
    """
    if not odds_weight > 0:
        raise ValueError(f"odds_weight {odds_weight} must be above 0")
    odds = odds_ratio(chosen_B, rejected_B, weight_B)
    supervised = losses.weighted(-chosen_B, weight_B)
    loss = LossSum(supervised.total + odds_weight * odds.total, odds.weight)
    return loss, {"orpo/sft_loss": supervised, "orpo/odds_loss": odds}


def orpo_objective(
    lm: LanguageModel,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Pairs,
    key: jax.Array | None,
    *,
    odds_weight: float,
) -> tuple[LossSum, Logs]:
    """Returns the ORPO loss (`orpo`) of a batch of comparisons, and metrics.

    The metrics are weighted means over pairs: the terms of `orpo`, and train/accuracy, the share of
    pairs in which the chosen response has the higher mean log-probability.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "policy".
        base: The frozen base.
        batch: Comparisons.
        key: Random key of dropout; None: no dropout.
        odds_weight: Weight of the odds-ratio loss.
    """
    both, weight_B = interleaved_pairs(batch), batch.weight_B
    logp_BT = sequence_logprobs(lm, base, roles["policy"], both, key=key)
    chosen_B, rejected_B = split_pairs(mean_logprob(logp_BT, both.response_BT))
    loss, terms = orpo(chosen_B, rejected_B, weight_B, odds_weight=odds_weight)
    return loss, {"train/accuracy": accuracy(batch, chosen_B, rejected_B), **terms}
