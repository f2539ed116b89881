"""The objective of RL: losses of policy and value model on scored rollouts."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.passes import logprobs_and_entropy, values
from perl_jax.objectives import algorithms, losses, pairs, ratios
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.runtime.masked import masked_sum
from perl_jax.types import Array, Tokens, Tree


@flax.struct.dataclass
class Experience:
    """A batch of scored rollouts, as an RL update reads it.

    Attributes:
        sequences: Tokens of [prompt | response].
        old_logp_BT: Log-probabilities under the policy that sampled, at the sampling temperature,
            computed by the trainer (not by the sampler).
        advantage_BT: Advantage of each token. None: the update computes it from its value model.
        target_BT: What the value model is fitted to. None: no value model.
        old_value_BT: Values at sampling time. None: the value loss is not clipped.
        reference_BT: Log-probabilities under the reference. None: the loss does not read them.
        kl_weight_B: KL coefficient of each row. None: the loss does not read it.
        compared: Number of consecutive rows whose losses belong together: the samples of a prompt
            for algorithms that compare them in the loss.
    """

    sequences: Tokens
    old_logp_BT: Array
    advantage_BT: Array | None = None
    target_BT: Array | None = None
    old_value_BT: Array | None = None
    reference_BT: Array | None = None
    kl_weight_B: Array | None = None
    compared: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def group(self) -> int:
        """Number of consecutive rows that have to stay in one microbatch.

        They share a packed prompt, or their losses belong together.
        """
        return max(self.sequences.group, self.compared)


# (batch, log-probabilities under the policy) -> (scored rollouts, metrics of the rollouts).
ExperienceOf = Callable[[Tree, jax.Array], tuple[Experience, Logs]]


def policy_gradient_objective(
    lm: LanguageModel,
    config: AlgorithmConfig,
    temperature: float,
    estimator: str,
    max_response_length: int,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Experience | Tree,
    key: jax.Array | None,
    *,
    experience_of: ExperienceOf | None = None,
) -> tuple[LossSum, Logs]:
    """Returns the sum of the policy loss, the value loss and the KL loss, and the metrics to log.

    Which terms there are depends on the algorithm (`perl_jax.objectives.algorithms`). Policy and
    value model share no trained leaf and each has its own optimizer, so their losses can be added.

    The metrics are policy/loss, policy/ratio, policy/ratio_deviation, response/entropy,
    advantage/mean and advantage/square (of x^2); of a policy gradient policy/clip_fraction; with a
    KL in the loss kl/loss; with a critic value/loss and mean and square of return and value/error;
    with a loss of pairs those of `pairs.pair_loss`; and those of `experience_of`.

    Args:
        lm: The model's functions.
        config: The algorithm.
        temperature: Sampling temperature; divides the logits.
        estimator: Estimator of a KL in the loss (`kl.LOSS_ESTIMATORS`).
        max_response_length: Largest number of response tokens; responses lie in that many last
            columns.
        roles: Adapters by name: "policy" and, for algorithms with a critic, "value".
        base: The frozen base.
        batch: Scored rollouts, or what `experience_of` makes scored rollouts of.
        key: Random key of dropout; None: no dropout.
        experience_of: (batch, log-probabilities of this pass) -> (scored rollouts, metrics), for a
            batch that lacks the log-probabilities of the policy that sampled. The trained policy
            still is that policy. None: `batch` is complete.

    Raises ValueError if the algorithm has a critic and the batch has no target_BT, or if it has a
    loss of pairs and the batch has no reference_BT.
    """
    sequences, mask_BT = batch.sequences, batch.sequences.response_BT
    policy_key, value_key = (None, None) if key is None else jax.random.split(key)
    logp_BT, entropy_BT = logprobs_and_entropy(
        lm,
        base,
        roles["policy"],
        sequences,
        temperature,
        policy_key,
        max_response_length=max_response_length,
    )
    batch, known = (batch, {}) if experience_of is None else experience_of(batch, logp_BT)
    advantage_BT, terms, critic_logs = batch.advantage_BT, {}, {}
    length = config.constant_length(max_response_length)
    if config.rule.critic:
        target_BT = batch.target_BT
        if target_BT is None:
            raise ValueError(
                f"the algorithm {config.name} has a value model, which needs target_BT"
            )
        values_BT = values(lm, base, roles["value"], sequences, value_key)
        clipping = (
            {}
            if batch.old_value_BT is None
            else {"old_BT": batch.old_value_BT, "clip": config.value_clip}
        )
        terms["value/loss"] = losses.value_loss(
            values_BT, target_BT, mask_BT, config.reduction, length=length, **clipping
        )
        if advantage_BT is None:
            advantage_BT = algorithms.critic_advantages(target_BT, values_BT, mask_BT)
        critic_logs = _moments("return", target_BT, mask_BT) | _moments(
            "value/error", target_BT - values_BT, mask_BT
        )
    pair_logs = {}
    if config.rule.pairs is not None:
        if batch.reference_BT is None:
            raise ValueError(f"the algorithm {config.name} needs reference_BT")
        terms["policy/loss"], pair_logs = pairs.pair_loss(
            config, logp_BT, batch.reference_BT, advantage_BT, mask_BT, batch.kl_weight_B
        )
    else:
        terms["policy/loss"] = algorithms.policy_loss(
            config, logp_BT, batch.old_logp_BT, advantage_BT, mask_BT, max_response_length
        )
    if batch.reference_BT is not None and config.rule.pairs is None:
        terms["kl/loss"] = losses.kl_loss(
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
        **terms,
        **_token_means(
            mask_BT,
            {
                "response/entropy": entropy_BT,
                **_ratio_logs(config, logp_BT, batch.old_logp_BT, mask_BT),
            },
        ),
        **_moments("advantage", advantage_BT, mask_BT),
        **critic_logs,
        **pair_logs,
    }
    return LossSum(sum(term.total for term in terms.values()), terms["policy/loss"].weight), logs


def _ratio_logs(
    config: AlgorithmConfig, logp_BT: Array, old_BT: Array, mask_BT: Array
) -> dict[str, jax.Array]:
    """Returns metrics of the importance ratio, each an array [B, T] without gradient.

    policy/ratio: the ratio. policy/ratio_deviation: its distance from 1. policy/clip_fraction, of a
    policy gradient: whether it lies outside the algorithm's bounds.

    Args:
        config: The algorithm.
        logp_BT: Log-probabilities under the trained policy.
        old_BT: Log-probabilities under the policy that sampled.
        mask_BT: True on response tokens.
    """
    ratio_BT = jax.lax.stop_gradient(
        ratios.importance_ratio(logp_BT, old_BT, mask_BT, config.rule.ratio or "token")
    )
    found = {"policy/ratio": ratio_BT, "policy/ratio_deviation": jnp.abs(ratio_BT - 1)}
    if config.rule.pairs is not None:
        return found
    low, high = (
        1 - config.clip,
        1 + (config.clip if config.clip_high is None else config.clip_high),
    )
    outside_BT = (
        (ratio_BT < low) | (ratio_BT > high) if config.rule.ratio else ratio_BT > config.max_ratio
    )
    return found | {"policy/clip_fraction": outside_BT}


def _token_means(mask_BT: Array, values: dict[str, Array]) -> Logs:
    """Returns a `LossSum` for each array, whose mean is the array's mean over response tokens.

    Args:
        mask_BT: True on response tokens.
        values: The arrays [B, T]; the result has the same keys.
    """
    tokens = losses.count_tokens(mask_BT)
    return {name: LossSum(masked_sum(x_BT, mask_BT), tokens) for name, x_BT in values.items()}


def _moments(name: str, x_BT: Array, mask_BT: Array) -> Logs:
    """Returns the mean of x and of x^2 over response tokens, under NAME/mean and NAME/square.

    Args:
        name: NAME.
        x_BT: x.
        mask_BT: True on response tokens.
    """
    return _token_means(mask_BT, {f"{name}/mean": x_BT, f"{name}/square": jnp.square(x_BT)})
