"""Log-probabilities, scores and values of batches of tokens, packed or padded."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.logprobs import shift_right
from perl_jax.models.microbatches import each_microbatch
from perl_jax.models.packing import pack
from perl_jax.types import Array, Pairs, Tokens, Tree


def sequence_logprobs(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    tokens: Tokens,
    temperature: float = 1.0,
    key: jax.Array | None = None,
    *,
    max_response_length: int | None = None,
) -> jax.Array:
    """Returns logp_BT of every token under softmax(logits / temperature); column 0 is 0.

    A packed batch has log-probabilities of response tokens only, and 0 elsewhere.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        tokens: The batch.
        temperature: Divides the logits.
        key: Random key of dropout; None: no dropout.
        max_response_length: Compute only that many last columns, which hold the responses, and
            return 0 before. None: all columns.
    """
    return logprobs_and_entropy(
        lm, base, adapter, tokens, temperature, key, max_response_length=max_response_length
    )[0]


def logprobs_and_entropy(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    tokens: Tokens,
    temperature: float = 1.0,
    key: jax.Array | None = None,
    *,
    max_response_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns logp_BT and entropy_BT of every token (`LanguageModel.logprobs`); column 0 is 0.

    A packed batch has those of response tokens only, and 0 elsewhere. The entropy has no gradient.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        tokens: The batch.
        temperature: Divides the logits.
        key: Random key of dropout; None: no dropout.
        max_response_length: Compute only that many last columns, which hold the responses, and
            return 0 before. None: all columns.
    """
    packed = {"packing": pack(tokens), "wanted_BT": tokens.response_BT} if tokens.layout else {}
    return lm.logprobs(
        base,
        adapter,
        tokens.tokens_BT,
        tokens.valid_BT,
        temperature,
        key,
        start=response_start(tokens, max_response_length),
        **packed,
    )


def logprobs_in_microbatches(
    lm: LanguageModel,
    microbatches: int,
    base: Tree,
    adapter: Adapter | None,
    tokens: Tokens,
    temperature: float = 1.0,
    *,
    max_response_length: int | None = None,
) -> jax.Array:
    """Returns `sequence_logprobs` without dropout, computed one microbatch at a time.

    Args:
        lm: The model's functions.
        microbatches: Number of microbatches (`microbatches.each_microbatch`).
        base: The frozen base.
        adapter: The policy; None: the base itself.
        tokens: The batch.
        temperature: Divides the logits.
        max_response_length: As in `sequence_logprobs`.
    """
    return each_microbatch(
        lambda part: sequence_logprobs(
            lm,
            base,
            adapter,
            part,
            temperature=temperature,
            max_response_length=max_response_length,
        ),
        tokens,
        microbatches,
    )


def values_in_microbatches(
    lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, tokens: Tokens
) -> jax.Array:
    """Returns `values` [B, T] without dropout, computed one microbatch at a time.

    Args:
        lm: The model's functions.
        microbatches: Number of microbatches (`microbatches.each_microbatch`).
        base: The frozen base.
        adapter: The critic; it must have a scalar head.
        tokens: The batch.
    """
    return each_microbatch(lambda part: values(lm, base, adapter, part), tokens, microbatches)


def scores(
    lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None
) -> jax.Array:
    """Returns score_B, float32: the scalar head's output at each row's last real token.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The reward model; it must have a scalar head.
        tokens: The batch.
        key: Random key of dropout; None: no dropout.
    """
    return lm.score(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))


def values(
    lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None
) -> jax.Array:
    """Returns V(x_t) [B, T], float32, of the state before each token; 0 in column 0.

    It is the scalar head's output one position to the left of the token.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The critic; it must have a scalar head.
        tokens: The batch.
        key: Random key of dropout; None: no dropout.
    """
    return shift_right(
        lm.values(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))
    )


def response_start(tokens: Tokens, max_response_length: int | None) -> int:
    """Returns the first of the last `max_response_length` columns, an index; 0 if that is None."""
    return (
        0
        if max_response_length is None
        else max(tokens.tokens_BT.shape[1] - max_response_length, 0)
    )


def interleaved_pairs(batch: Pairs) -> Tokens:
    """Returns the responses of comparisons as one batch [2 B, T].

    Each chosen response lies directly above its rejected one, so rows that share a prompt are
    consecutive.
    """
    return jax.tree.map(interleave, batch.chosen, batch.rejected)


def interleave(chosen: Array, rejected: Array) -> jax.Array:
    """Returns [2 B, ...]: the rows of two arrays [B, ...] in turn, as in `interleaved_pairs`."""
    return jnp.stack([chosen, rejected], axis=1).reshape(-1, *chosen.shape[1:])


def split_pairs(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the chosen rows and the rejected rows of an array ordered as `interleaved_pairs`."""
    return both[0::2], both[1::2]


def responses_differ(batch: Pairs) -> jax.Array:
    """Returns [B]: whether the two responses of each pair differ in a real token.

    Pairs of equal responses have no order, so an accuracy must not count them.
    """
    chosen, rejected = batch.chosen, batch.rejected
    same_BT = (chosen.tokens_BT == rejected.tokens_BT) | ~chosen.valid_BT
    return ~jnp.all(same_BT & (chosen.valid_BT == rejected.valid_BT), axis=1)


def pair_scores(
    lm: LanguageModel, base: Tree, adapter: Adapter, batch: Pairs, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores of chosen and rejected responses, [B] each, from one pass over both.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The reward model; it must have a scalar head.
        batch: The comparisons.
        key: Random key of dropout; None: no dropout.
    """
    return split_pairs(scores(lm, base, adapter, interleaved_pairs(batch), key))
