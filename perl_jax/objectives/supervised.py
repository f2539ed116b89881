"""Objectives on labelled rows: demonstrations, comparisons, labels and ratings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.passes import pair_scores, responses_differ, scores, sequence_logprobs
from perl_jax.objectives import losses
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.types import Array, Labelled, Pairs, Tokens, Tree


def sft_objective(
    lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Tokens, key: jax.Array | None
) -> tuple[LossSum, Logs]:
    """Returns the `LossSum` of -log p of response tokens, averaged over tokens, and no metrics.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "policy".
        base: The frozen base.
        batch: Demonstrations: prompts with their responses.
        key: Random key of dropout; None: no dropout.
    """
    logp_BT = sequence_logprobs(lm, base, roles["policy"], batch, key=key)
    return losses.sft_loss(logp_BT, batch.response_BT), {}


def in_order(chosen_B: Array, rejected_B: Array) -> jax.Array:
    """Returns 1 where the chosen score is higher, 1/2 where both are equal, 0 elsewhere; [B]."""
    return jnp.where(chosen_B > rejected_B, 1.0, jnp.where(chosen_B == rejected_B, 0.5, 0.0))


def accuracy(batch: Pairs, chosen_B: Array, rejected_B: Array) -> LossSum:
    """Returns the accuracy of scores, as a `LossSum` whose mean is the weighted share of pairs.

    A pair counts 1 if its chosen score is the higher one, 1/2 if both are equal, and 0 otherwise.
    Pairs of two equal responses do not count at all.

    Args:
        batch: The comparisons, with their weights.
        chosen_B: Scores of the preferred responses.
        rejected_B: Scores of the other responses.
    """
    weight_B = batch.weight_B * responses_differ(batch)
    return losses.weighted(in_order(chosen_B, rejected_B), weight_B)


def pairwise_objective(
    lm: LanguageModel,
    roles: dict[str, Adapter],
    base: Tree,
    batch: Pairs,
    key: jax.Array | None,
    *,
    soft_labels: bool = False,
    centring: float = 0.0,
) -> tuple[LossSum, Logs]:
    """Returns the Bradley-Terry loss (`losses.bradley_terry`) with the rows' margins, and metrics.

    The only metric is train/accuracy (`accuracy`).

    Args:
        lm: The model's functions.
        roles: Adapters by name: "reward".
        base: The frozen base.
        batch: Comparisons.
        key: Random key of dropout; None: no dropout.
        soft_labels: Whether a row's known preference probability is its label; otherwise it is 1.
        centring: Coefficient that keeps the mean score of a pair near 0.
    """
    chosen_B, rejected_B = pair_scores(lm, base, roles["reward"], batch, key)
    right = accuracy(batch, chosen_B, rejected_B)
    margin_B = 0.0 if batch.margin_B is None else batch.margin_B
    known = soft_labels and batch.probability_B is not None
    probability_B = (
        jnp.where(jnp.isnan(batch.probability_B), 1.0, batch.probability_B) if known else 1.0
    )
    loss = losses.bradley_terry(
        chosen_B, rejected_B, batch.weight_B, margin_B, probability=probability_B, centring=centring
    )
    return loss, {"train/accuracy": right}


def pointwise_objective(
    lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Labelled, key: jax.Array | None
) -> tuple[LossSum, Logs]:
    """Returns the `LossSum` of the binary cross-entropy of labels, and metrics.

    The only metric is train/accuracy: the weighted share of rows whose score is above 0 exactly if
    the label is above 1/2.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "reward".
        base: The frozen base.
        batch: Responses with labels in [0, 1].
        key: Random key of dropout; None: no dropout.
    """
    score_B = scores(lm, base, roles["reward"], batch.tokens, key)
    right = LossSum(
        jnp.sum(((score_B > 0) == (batch.label_B > 0.5)) * batch.weight_B), jnp.sum(batch.weight_B)
    )
    return losses.binary_cross_entropy(score_B, batch.label_B, batch.weight_B), {
        "train/accuracy": right
    }


def regression_objective(
    lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Labelled, key: jax.Array | None
) -> tuple[LossSum, Logs]:
    """Returns the `LossSum` of squared errors of scores against ratings, and no metrics.

    Args:
        lm: The model's functions.
        roles: Adapters by name: "reward".
        base: The frozen base.
        batch: Responses with ratings.
        key: Random key of dropout; None: no dropout.
    """
    score_B = scores(lm, base, roles["reward"], batch.tokens, key)
    return losses.squared_error(score_B, batch.label_B, batch.weight_B), {}
