"""The losses of policy and value model on scored rollouts."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.passes import token_logprobs, values
from perl_jax.objectives import algorithms, losses
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.runtime.masked import masked_sum
from perl_jax.types import Array, Tokens, Tree


@flax.struct.dataclass
class Experience:
    """Scored rollouts: what an RL update learns from.

    sequences: [prompt | response]. old_logp_BT: the policy's that sampled them, by the trainer, at
    the sampling temperature. advantage_BT: None where the value model of the update is the
    baseline. target_BT: what values are fitted to; None without a value model. old_value_BT: at
    sampling time, where values are clipped. reference_BT: log-probabilities under the reference and
    kl_weight_B the coefficient, where a KL is in the loss.
    """

    sequences: Tokens
    old_logp_BT: Array
    advantage_BT: Array | None = None
    target_BT: Array | None = None
    old_value_BT: Array | None = None
    reference_BT: Array | None = None
    kl_weight_B: Array | None = None

    @property
    def group(self) -> int:
        """Rows that share a packed prompt."""
        return 1 if self.sequences.layout is None else self.sequences.layout.group


# (batch, the policy's log-probabilities) -> experience, and what the log says of it.
ExperienceOf = Callable[[Tree, jax.Array], tuple[Experience, Logs]]


def policy_gradient_objective(
    lm: LanguageModel,
    config: AlgorithmConfig,
    temperature: float,
    estimator: str,
    room: int,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Experience | Tree,
    key: jax.Array | None,
    *,
    experience_of: ExperienceOf | None = None,
) -> tuple[LossSum, Logs]:
    """The losses of policy and value model (`perl_jax.objectives.algorithms`), added.

    The sum is safe: the two share no trained leaf, and each role has its own optimizer. V(x_t) is
    read where the state before token t ends, one position to the left. estimator: of a KL in the
    loss. room: the most tokens a response may have; responses lie in so many last columns.
    experience_of: for a batch that is no experience yet, because the log-probabilities it lacks are
    those that this very pass computes: the policy is still the one that sampled.
    """
    sequences, mask_BT = batch.sequences, batch.sequences.response_BT
    policy_key, value_key = (None, None) if key is None else jax.random.split(key)
    logp_BT, entropy_BT = token_logprobs(
        lm, base, roles["policy"], sequences, temperature, policy_key, room=room
    )
    batch, known = (batch, {}) if experience_of is None else experience_of(batch, logp_BT)
    advantage_BT, losses_found, length = batch.advantage_BT, {}, config.length(room)
    if config.rule.critic:
        values_BT = values(lm, base, roles["value"], sequences, value_key)
        clipping = (
            {}
            if batch.old_value_BT is None
            else {"old_BT": batch.old_value_BT, "clip": config.value_clip}
        )
        losses_found["value/loss"] = losses.value_loss(
            values_BT, batch.target_BT, mask_BT, config.reduction, length=length, **clipping
        )
        if advantage_BT is None:
            advantage_BT = algorithms.critic_advantages(batch.target_BT, values_BT, mask_BT)
    losses_found["policy/loss"] = algorithms.policy_loss(
        config, logp_BT, batch.old_logp_BT, advantage_BT, mask_BT, room
    )
    if batch.reference_BT is not None:
        losses_found["kl/loss"] = losses.kl_loss(
            logp_BT,
            batch.reference_BT,
            mask_BT,
            estimator,
            config.kl_reduction,
            length=length,
            weight_B=batch.kl_weight_B,
        )
    logs = {
        **known,
        **losses_found,
        **_token_means(
            mask_BT,
            {
                "response/entropy": entropy_BT,
                **_ratio_logs(config, logp_BT, batch.old_logp_BT, mask_BT),
            },
        ),
        **_moments("advantage", advantage_BT, mask_BT),
    }
    if config.rule.critic:
        logs |= _moments("return", batch.target_BT, mask_BT) | _moments(
            "value/error", batch.target_BT - values_BT, mask_BT
        )
    return LossSum(
        sum(found.total for found in losses_found.values()), losses_found["policy/loss"].weight
    ), logs


def _ratio_logs(
    config: AlgorithmConfig, logp_BT: Array, old_BT: Array, mask_BT: Array
) -> dict[str, jax.Array]:
    """How far the update's policy is from the one that sampled, and where the objective stops
    that.
    """
    ratio_BT = jax.lax.stop_gradient(
        losses.importance_ratio(logp_BT, old_BT, mask_BT, config.rule.ratio or "token")
    )
    low, high = (
        1 - config.clip,
        1 + (config.clip if config.clip_high is None else config.clip_high),
    )
    outside_BT = (
        (ratio_BT < low) | (ratio_BT > high) if config.rule.ratio else ratio_BT > config.max_ratio
    )
    return {
        "policy/ratio": ratio_BT,
        "policy/ratio_deviation": jnp.abs(ratio_BT - 1),
        "policy/clip_fraction": outside_BT,
    }


def _token_means(mask_BT: Array, values: dict[str, Array]) -> Logs:
    """Means over response tokens, which add over microbatches."""
    tokens = losses.count_tokens(mask_BT)
    return {name: LossSum(masked_sum(x_BT, mask_BT), tokens) for name, x_BT in values.items()}


def _moments(name: str, x_BT: Array, mask_BT: Array) -> Logs:
    """Mean and mean of squares over response tokens."""
    return _token_means(mask_BT, {f"{name}/mean": x_BT, f"{name}/square": jnp.square(x_BT)})
