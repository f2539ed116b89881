"""Log-probabilities, entropies and state values of the tokens of a sequence: one alignment.

The convention, for every per-token array of this package:

    logp_BT[b, t] = log p(token t | tokens < t)

A causal model that has read token t - 1 emits, at position t - 1, the logits of token t and the
value of the state in which token t is chosen. `shift_right` is the only place where that offset is
applied. Column 0 has no prediction and is 0; a response mask must be False there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from perl_jax.runtime.masked import at_least_float32
from perl_jax.types import Array, Tree


def shift_right(values_BT: Array) -> jax.Array:
    """out[:, t] = values[:, t - 1], out[:, 0] = 0: from "read at" to "about token" columns.

    Turns the values a critic reads at each position into V(state before token t), the column of
    the token whose log-probability they are a baseline for.
    """
    chex.assert_rank(values_BT, 2)
    return jnp.pad(values_BT[:, :-1], ((0, 0), (1, 0)))


def token_logprobs(logits_V: Array, tokens: Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature)[token] = logit[token] / temperature - logsumexp; float32.

    logits_V: [..., V], each row predicting the token at the same place of `tokens` [...]: what a
    sampler holds after one decoding step. An id of V or more gives NaN. Raises ValueError unless
    `temperature` (a static number) is finite and above 0. Differentiable in reverse mode only.
    """
    _check_temperature(temperature)
    chex.assert_shape(logits_V, (*tokens.shape, None))
    return _token_logprobs(jnp.asarray(logits_V), jnp.asarray(tokens), float(temperature))


# A gradient of its own, because the derived one keeps exp(logits) for the backward pass and, for
# bfloat16 logits, adds -1 and the rounded softmax in bfloat16, where a confident token's vanishes.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _token_logprobs(logits_V: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
    return _token_logprobs_forward(logits_V, tokens, temperature)[0]


def _token_logprobs_forward(
    logits_V: jax.Array, tokens: jax.Array, temperature: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    picked = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    logz = jax.nn.logsumexp(_scaled(logits_V, temperature), axis=-1)
    return _scaled(picked, temperature) - logz, (logits_V, tokens, logz)


def _token_logprobs_backward(
    temperature: float, residuals: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    """(one-hot(token) - softmax) cotangent / temperature, formed in float32."""
    logits_V, tokens, logz = residuals
    p_V = jnp.exp(_scaled(logits_V, temperature) - logz[..., None])
    ids_V = jax.lax.broadcasted_iota(tokens.dtype, p_V.shape, p_V.ndim - 1)
    chosen_V = (ids_V == tokens[..., None]).astype(p_V.dtype)
    gradient_V = (chosen_V - p_V) * (cotangent / temperature)[..., None]
    return gradient_V.astype(logits_V.dtype), None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def next_token_logprobs(logits_BTV: Array, tokens_BT: Array, temperature: float = 1.0) -> jax.Array:
    """logp_BT[b, t] = log softmax(logits_BTV[b, t - 1] / temperature)[tokens_BT[b, t]], 0 at t = 0.

    float32, shape [B, T]. At most one float32 [B, T, V] is alive beside the logits: the
    log-softmax itself is never formed. The temperature is the sampler's, for new, old and
    reference log-probabilities alike; 0 (greedy) has no finite log-probabilities and raises
    ValueError.
    """
    chex.assert_rank([logits_BTV, tokens_BT], [3, 2])
    chex.assert_equal_shape_prefix([logits_BTV, tokens_BT], 2)
    # The last column's prediction (of a token not in the batch) is computed and dropped: slicing
    # [B, T] is free, slicing [B, T, V] would copy the logits.
    following_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return shift_right(token_logprobs(logits_BTV, following_BT, temperature))


def next_token_entropy(logits_BTV: Array, temperature: float = 1.0) -> jax.Array:
    """entropy_BT[b, t] of the distribution token t is drawn from, softmax(logits_BTV[b, t - 1] /
    temperature); 0 at t = 0.
    """
    chex.assert_rank(logits_BTV, 3)
    return shift_right(entropy(logits_BTV, temperature))


def entropy(logits_V: Array, temperature: float = 1.0) -> jax.Array:
    """-sum_v p_v log p_v (nats) of p = softmax(logits / temperature) over the last axis; float32.

    A logit of -inf (a banned token) contributes 0. Raises ValueError for a temperature that is not
    finite and above 0.
    """
    _check_temperature(temperature)
    # Flat: sums over [1, N, V] take XLA's CPU backend 60 times as long as over [N, V].
    scaled_NV = _scaled(logits_V, temperature).reshape(-1, logits_V.shape[-1])
    logz_N1 = jax.nn.logsumexp(scaled_NV, axis=-1, keepdims=True)
    # Not logz - sum p logit: with large logits that is a small difference of large numbers. The
    # bound changes no sum, as p is 0 long before, and makes 0 of a banned token's 0 times infinity.
    logp_NV = jnp.maximum(scaled_NV - logz_N1, -1e4)
    return -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1).reshape(logits_V.shape[:-1])


def sequence_logprobs(
    head: Callable[[jax.Array], jax.Array],
    hidden_BTD: Array,
    tokens_BT: Array,
    temperature: float = 1.0,
    *,
    start: int = 0,
    columns: int,
    frozen: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """logp_BT and entropy_BT (`next_token_logprobs`, `next_token_entropy`) from hidden states,
    logits by pieces.

    head: hidden_BCD -> logits_BCV. columns: how many columns have logits at a time. frozen: whether
    the head's weights are; trained ones have their logits computed again in the backward pass,
    unless all columns fit into one piece. start: columns before it are 0, and no logits are
    computed for them. The entropy has no gradient.
    """
    _check_temperature(temperature)
    chex.assert_rank([hidden_BTD, tokens_BT], [3, 2])
    chex.assert_equal_shape_prefix([hidden_BTD, tokens_BT], 2)
    length = tokens_BT.shape[1]
    # What is read at column t is about token t + 1. The last column is about none: kept where all
    # are.
    first = max(start - 1, 0)
    last = length if first == 0 else length - 1
    hidden_BTD = hidden_BTD[:, first:last]
    following_BT = jnp.pad(tokens_BT[:, first + 1 :], ((0, 0), (0, last - length + 1)))

    logp_BT, entropy_BT = following_logprobs(
        head, hidden_BTD, following_BT, temperature, columns, frozen
    )
    back = lambda x_BT: jnp.pad(x_BT, ((0, 0), (first + 1, 0)))[:, :length]
    return back(logp_BT), back(entropy_BT)


def following_logprobs(
    head: Callable[[jax.Array], jax.Array],
    hidden_BTD: Array,
    following_BT: Array,
    temperature: float,
    columns: int,
    frozen: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of the token that follows each hidden state, logits by pieces of
    `columns`; see `sequence_logprobs`.
    """

    def piece(hidden_BCD: jax.Array, following_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = head(hidden_BCD)
        return token_logprobs(logits_BCV, following_BC, temperature), entropy(
            jax.lax.stop_gradient(logits_BCV), temperature
        )

    pieces = -(-following_BT.shape[1] // columns)
    if frozen:
        return _with_slopes(piece, pieces, hidden_BTD, following_BT)
    return _by_pieces(
        piece if pieces == 1 else jax.checkpoint(piece, prevent_cse=False),
        hidden_BTD,
        following_BT,
        pieces,
    )


def _by_pieces(
    piece: Callable[..., Tree], hidden_BTD: jax.Array, following_BT: jax.Array, pieces: int
) -> Tree:
    """piece over equal runs of columns, one after the other."""
    if pieces == 1:
        return piece(hidden_BTD, following_BT)
    batch, length, width = hidden_BTD.shape
    columns = -(-length // pieces)
    more = ((0, 0), (0, pieces * columns - length))
    hidden_PBCD = jnp.moveaxis(
        jnp.pad(hidden_BTD, (*more, (0, 0))).reshape(batch, pieces, columns, width), 1, 0
    )
    following_PBC = jnp.moveaxis(jnp.pad(following_BT, more).reshape(batch, pieces, columns), 1, 0)
    _, found = jax.lax.scan(
        lambda _, inputs: (None, piece(*inputs)), None, (hidden_PBCD, following_PBC)
    )
    return jax.tree.map(
        lambda x_PBC: jnp.moveaxis(x_PBC, 0, 1).reshape(batch, -1, *x_PBC.shape[3:])[:, :length],
        found,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_slopes(
    piece: Callable, pieces: int, hidden_BTD: jax.Array, following_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_by_pieces` with a gradient for the hidden states alone, of which no logits are kept and
    none computed twice.

    d logp / d hidden = (onehot(token) - softmax(logits / temperature)) W^T / temperature needs the
    logits; what comes back from a loss is but a factor of it for each token. So it is made where
    the logits are.
    """
    return _by_pieces(piece, hidden_BTD, following_BT, pieces)


def _with_slopes_forward(piece, pieces, hidden_BTD, following_BT):
    def with_slope(hidden_BCD, following_BC):
        logp_BC, backward, entropy_BC = jax.vjp(
            lambda hidden_BCD: piece(hidden_BCD, following_BC), hidden_BCD, has_aux=True
        )
        return logp_BC, entropy_BC, *backward(jnp.ones_like(logp_BC))

    logp_BT, entropy_BT, slope_BTD = _by_pieces(with_slope, hidden_BTD, following_BT, pieces)
    return (logp_BT, entropy_BT), slope_BTD


def _with_slopes_backward(piece, pieces, slope_BTD, cotangents):
    logp_BT, _ = cotangents
    return (logp_BT[..., None] * slope_BTD).astype(slope_BTD.dtype), None


_with_slopes.defvjp(_with_slopes_forward, _with_slopes_backward)


def _scaled(logits_V: Array, temperature: float) -> jax.Array:
    """logits / temperature in at least float32: the division is not done in bfloat16."""
    return at_least_float32(logits_V) / temperature


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"the temperature of log-probabilities must be finite and above 0, got {temperature}"
        )
