"""Log-probabilities, entropies and state values of the tokens of a sequence, in one alignment.

The alignment of every per-token array of this package:

    logp_BT[b, t] = log p(token t | tokens < t)

After reading token t - 1, at position t - 1, a causal model gives the logits of token t and the
value of the state before token t. `shift_right` is the only function that applies this offset.
Column 0 has no prediction and is 0; a response mask must be False there.
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
    """Returns out[:, t] = values[:, t - 1], out[:, 0] = 0.

    It turns the values that a value model gives at each position into V(state before token t). So
    they are aligned with the log-probability of token t, whose baseline V is.
    """
    chex.assert_rank(values_BT, 2)
    return jnp.pad(values_BT[:, :-1], ((0, 0), (1, 0)))


def token_logprobs(logits_V: Array, tokens: Array, temperature: float = 1.0) -> jax.Array:
    """Returns log softmax(logits / temperature)[token], float32, in the shape of `tokens`.

    An id of V or more gives NaN. Differentiable in reverse mode only.

    Args:
        logits_V: Logits [..., V], each row predicting the token at the same index of `tokens`.
        tokens: Token ids [...].
        temperature: Static number.

    Raises ValueError unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    chex.assert_shape(logits_V, (*tokens.shape, None))
    return _token_logprobs(jnp.asarray(logits_V), jnp.asarray(tokens), float(temperature))


# It has its own gradient, because JAX's gradient keeps exp(logits) for the backward pass. For
# bfloat16 logits JAX's gradient also adds -1 and the softmax in bfloat16, where the gradient of a
# confident token vanishes.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _token_logprobs(logits_V: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
    """Returns `token_logprobs`, with a gradient of its own."""
    return _token_logprobs_forward(logits_V, tokens, temperature)[0]


def _token_logprobs_forward(
    logits_V: jax.Array, tokens: jax.Array, temperature: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the log-probabilities, and the residuals (logits, tokens, log-normalisers)."""
    picked = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    logz = jax.nn.logsumexp(_scaled(logits_V, temperature), axis=-1)
    return _scaled(picked, temperature) - logz, (logits_V, tokens, logz)


def _token_logprobs_backward(
    temperature: float, residuals: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    """Returns (one-hot(token) - softmax) cotangent / temperature, computed in float32."""
    logits_V, tokens, logz = residuals
    p_V = jnp.exp(_scaled(logits_V, temperature) - logz[..., None])
    ids_V = jax.lax.broadcasted_iota(tokens.dtype, p_V.shape, p_V.ndim - 1)
    one_hot_V = (ids_V == tokens[..., None]).astype(p_V.dtype)
    gradient_V = (one_hot_V - p_V) * (cotangent / temperature)[..., None]
    return gradient_V.astype(logits_V.dtype), None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def next_token_logprobs(logits_BTV: Array, tokens_BT: Array, temperature: float = 1.0) -> jax.Array:
    """Returns logp_BT[b, t] = log softmax(logits_BTV[b, t - 1] / temperature)[tokens_BT[b, t]].

    The result is float32 [B, T], 0 at t = 0. At most one float32 [B, T, V] array exists besides the
    logits, because the log-softmax itself is never formed.

    Args:
        logits_BTV: Logits; position t predicts token t + 1.
        tokens_BT: Token ids.
        temperature: Divides the logits. Use the sampler's for new, old and reference
            log-probabilities alike.

    Raises ValueError unless the temperature is finite and above 0 (greedy sampling has no finite
    log-probabilities).
    """
    chex.assert_rank([logits_BTV, tokens_BT], [3, 2])
    chex.assert_equal_shape_prefix([logits_BTV, tokens_BT], 2)
    # The last column predicts a token that is not in the batch. It is computed and dropped: slicing
    # [B, T] is free, slicing [B, T, V] would copy the logits.
    following_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return shift_right(token_logprobs(logits_BTV, following_BT, temperature))


def next_token_entropy(logits_BTV: Array, temperature: float = 1.0) -> jax.Array:
    """Returns entropy_BT[b, t] in nats of softmax(logits_BTV[b, t - 1] / temperature), 0 at t = 0.

    This is the distribution that token t is drawn from. Raises ValueError unless the temperature is
    finite and above 0.
    """
    chex.assert_rank(logits_BTV, 3)
    return shift_right(entropy(logits_BTV, temperature))


def entropy(logits_V: Array, temperature: float = 1.0) -> jax.Array:
    """Returns the entropy -sum_v p_v log p_v in nats of p = softmax(logits / temperature).

    The sum is over the last axis, in float32. A logit of -inf (an excluded token) contributes 0.
    Raises ValueError unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    # Flattened, because XLA's CPU backend sums [1, N, V] 60 times as slowly as [N, V].
    scaled_NV = _scaled(logits_V, temperature).reshape(-1, logits_V.shape[-1])
    logz_N1 = jax.nn.logsumexp(scaled_NV, axis=-1, keepdims=True)
    # Not logz - sum p logit: with large logits that is a small difference of large numbers. The
    # lower bound -1e4 turns 0 times infinity of an excluded token into 0. It changes no other term,
    # because p is already 0 there.
    logp_NV = jnp.maximum(scaled_NV - logz_N1, -1e4)
    return -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1).reshape(logits_V.shape[:-1])


def logprobs_from_hidden(
    head: Callable[[jax.Array], jax.Array],
    hidden_BTD: Array,
    tokens_BT: Array,
    temperature: float = 1.0,
    *,
    start: int = 0,
    columns: int,
    frozen: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns logp_BT and entropy_BT of hidden states, with logits of a few columns at a time.

    They equal `next_token_logprobs` and `next_token_entropy`. The entropy has no gradient.

    Args:
        head: hidden_BCD -> logits_BCV, for any number C of columns.
        hidden_BTD: Hidden states after the final norm.
        tokens_BT: Token ids.
        temperature: Divides the logits.
        start: First column that is computed; earlier columns are 0.
        columns: Number of columns whose logits exist at a time.
        frozen: Whether the head's weights are frozen. If not, the backward pass computes the logits
            again, unless all columns are computed at once.

    Raises ValueError unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    chex.assert_rank([hidden_BTD, tokens_BT], [3, 2])
    chex.assert_equal_shape_prefix([hidden_BTD, tokens_BT], 2)
    length = tokens_BT.shape[1]
    # Column t predicts token t + 1, and the last column predicts none. It is kept only if all
    # columns are, which saves a slice.
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
    """Returns log-probability and entropy [B, T] of the token that follows each hidden state.

    The logits exist for a few columns at a time. The entropy has no gradient.

    Args:
        head: hidden_BCD -> logits_BCV, for any number C of columns.
        hidden_BTD: Hidden states after the final norm.
        following_BT: Ids of the tokens that the hidden states predict.
        temperature: Divides the logits.
        columns: Number of columns whose logits exist at a time.
        frozen: Whether the head's weights are frozen; if so, gradients go to the hidden states
            only.
    """

    def piece(hidden_BCD: jax.Array, following_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns log-probabilities and entropies of a few columns."""
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
    """Returns piece(hidden, following), computed for equal runs of columns one after the other.

    Args:
        piece: (hidden_BCD, following_BC) -> a tree of leaves [B, C, ...].
        hidden_BTD: Hidden states.
        following_BT: Ids of the tokens that the hidden states predict.
        pieces: Number of runs; their results are concatenated along the columns.
    """
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
    """Returns `_by_pieces`, with a gradient for the hidden states only.

    The gradient needs d logp / d hidden = (onehot(token) - softmax(logits / temperature)) W^T /
    temperature. The forward pass computes it together with the logits. The backward pass then only
    multiplies it by the cotangent of each token: no logits are kept or computed twice.

    Args:
        piece: (hidden_BCD, following_BC) -> (log-probabilities, entropies), [B, C] each.
        pieces: Number of runs of columns.
        hidden_BTD: Hidden states.
        following_BT: Ids of the tokens that the hidden states predict.
    """
    return _by_pieces(piece, hidden_BTD, following_BT, pieces)


def _with_slopes_forward(piece, pieces, hidden_BTD, following_BT):
    """Returns the results of all pieces, and d logp / d hidden [B, T, D] as residual."""

    def with_slope(hidden_BCD, following_BC):
        """Returns log-probabilities, entropies and d logp / d hidden of a few columns."""
        logp_BC, backward, entropy_BC = jax.vjp(
            lambda hidden_BCD: piece(hidden_BCD, following_BC), hidden_BCD, has_aux=True
        )
        return logp_BC, entropy_BC, *backward(jnp.ones_like(logp_BC))

    logp_BT, entropy_BT, slope_BTD = _by_pieces(with_slope, hidden_BTD, following_BT, pieces)
    return (logp_BT, entropy_BT), slope_BTD


def _with_slopes_backward(piece, pieces, slope_BTD, cotangents):
    """Returns the gradient of the hidden states: cotangent times d logp / d hidden."""
    logp_BT, _ = cotangents
    return (logp_BT[..., None] * slope_BTD).astype(slope_BTD.dtype), None


_with_slopes.defvjp(_with_slopes_forward, _with_slopes_backward)


def _scaled(logits_V: Array, temperature: float) -> jax.Array:
    """Returns logits / temperature in at least float32; the division is never in bfloat16."""
    return at_least_float32(logits_V) / temperature


def _check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is finite and above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"the temperature of log-probabilities must be finite and above 0, got {temperature}"
        )
