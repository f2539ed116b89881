"""Direct preference optimisation (DPO, IPO): losses on comparisons without a reward model."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.passes import interleave, interleaved_pairs, sequence_logprobs, split_pairs
from perl_jax.objectives import losses
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.objectives.supervised import accuracy
from perl_jax.runtime.masked import masked_sum
from perl_jax.types import Array, Pairs, Tree


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
