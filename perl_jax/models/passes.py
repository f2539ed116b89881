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
    room: int | None = None,
) -> jax.Array:
    """logp_BT of every token under softmax(logits / temperature); column 0 is 0.

    room: only of the last `room` columns, where responses are; 0 before.
    """
    return token_logprobs(lm, base, adapter, tokens, temperature, key, room=room)[0]


def token_logprobs(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    tokens: Tokens,
    temperature: float = 1.0,
    key: jax.Array | None = None,
    *,
    room: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """logp_BT and entropy_BT (`LanguageModel.logprobs`); of response tokens alone where the batch
    is packed.
    """
    packed = {"packing": pack(tokens), "wanted_BT": tokens.response_BT} if tokens.layout else {}
    return lm.logprobs(
        base,
        adapter,
        tokens.tokens_BT,
        tokens.valid_BT,
        temperature,
        key,
        start=response_start(tokens, room),
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
    room: int | None = None,
) -> jax.Array:
    """`sequence_logprobs`, one microbatch of rows after the other."""
    return each_microbatch(
        lambda part: sequence_logprobs(lm, base, adapter, part, temperature=temperature, room=room),
        tokens,
        microbatches,
    )


def values_in_microbatches(
    lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, tokens: Tokens
) -> jax.Array:
    """`values`, one microbatch of rows after the other."""
    return each_microbatch(lambda part: values(lm, base, adapter, part), tokens, microbatches)


def scores(
    lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None
) -> jax.Array:
    """score_B."""
    return lm.score(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))


def values(
    lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None
) -> jax.Array:
    """V(x_t) [B, T] of the state before each token: read where it ends, one position to the
    left.
    """
    return shift_right(
        lm.values(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))
    )


def response_start(tokens: Tokens, room: int | None) -> int:
    """The first of the last `room` columns; None: of all."""
    return 0 if room is None else max(tokens.tokens_BT.shape[1] - room, 0)


def both_sides(batch: Pairs) -> Tokens:
    """Each chosen response above its rejected one, [2 B, T]: rows that share a prompt lie
    together.
    """
    return jax.tree.map(in_turn, batch.chosen, batch.rejected)


def in_turn(chosen: Array, rejected: Array) -> jax.Array:
    """Rows of both in the order of `both_sides`."""
    return jnp.stack([chosen, rejected], axis=1).reshape(-1, *chosen.shape[1:])


def sides(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen and the rejected rows of `both_sides`."""
    return both[0::2], both[1::2]


def differing(batch: Pairs) -> jax.Array:
    """Which pairs have two different responses; two equal ones are in no order, neither right nor
    wrong.
    """
    chosen, rejected = batch.chosen, batch.rejected
    same_BT = (chosen.tokens_BT == rejected.tokens_BT) | ~chosen.valid_BT
    return ~jnp.all(same_BT & (chosen.valid_BT == rejected.valid_BT), axis=1)


def pair_scores(
    lm: LanguageModel, base: Tree, adapter: Adapter, batch: Pairs, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores of chosen and rejected, both sides in one pass over the base."""
    return sides(scores(lm, base, adapter, both_sides(batch), key))
