"""Rotary positions, masks and grouped-query attention, in plain XLA operations.

`attend` is one formula for every platform. `attend_blocked` is the same numbers for a CPU, whose
XLA backend streams the [B, H, T, S] weights through memory several times: in pieces that stay in
the cache it is 2 to 4 times as fast.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.models.config import Rope
from perl_jax.types import Array

# Large and finite: a row with no visible key (a padded query) then averages its keys instead of
# becoming NaN, which would spread through the gradients of every other row.
MASKED = -1e30


def positions(valid_BT: Array) -> jax.Array:
    """Rotary position of each token: how many real tokens precede it; 0 on leading padding."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position, float32 [K/2] (Su et al. 2021, arXiv 2104.09864), scaled as `rope` says."""
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.scaling == "none":
        return plain.astype(np.float32)
    if rope.scaling == "linear":
        return (plain / rope.factor).astype(np.float32)
    # Turns that a frequency makes over the positions of the original training.
    turns = rope.original_positions * plain / (2 * np.pi)
    share = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
    return (plain * (share + (1 - share) / rope.factor)).astype(np.float32)


def rotary_angles(positions_BT: Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, K/2] of position * frequency."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies(rope, head_dim)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: Array, cos: Array, sin: Array) -> jax.Array:
    """Rotates pairs (i, i + K/2), the layout of Hugging Face checkpoints; float32 inside."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def causal_mask(valid_BT: Array) -> jax.Array:
    """mask_BTS: a query sees real keys at its own column and before."""
    length = valid_BT.shape[1]
    columns = jnp.arange(length)
    causal_TS = columns[:, None] >= columns[None, :]
    return causal_TS[None, :, :] & valid_BT[:, None, :].astype(bool)


def within(window: Array | int, query_positions_BT: Array, key_positions_BS: Array) -> jax.Array:
    """[B, T, S]: keys fewer than `window` positions back (later keys too; a causal mask has those)."""
    return query_positions_BT[:, :, None] - key_positions_BS[:, None, :] < window


def capped(logits: Array, cap: float | None) -> Array:
    """cap tanh(x / cap) (Gemma 2, arXiv 2408.00118); None: x."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attend(q_BTHK: Array, k_BSNK: Array, v_BSNK: Array, mask_BTS: Array, scale: float | None = None, cap: float | None = None) -> jax.Array:
    """softmax(cap(scale q k^T)) v, query heads in groups over key/value heads; softmax in float32.

    scale: default 1 / sqrt(K).
    """
    batch, length, heads, head_dim = q_BTHK.shape
    kv_heads = k_BSNK.shape[2]
    chex.assert_equal_shape([k_BSNK, v_BSNK])
    chex.assert_shape(mask_BTS, (batch, length, k_BSNK.shape[1]))
    q_BTNGK = q_BTHK.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("btngk,bsnk->bngts", q_BTNGK, k_BSNK, preferred_element_type=jnp.float32)
    logits = capped(logits * (head_dim**-0.5 if scale is None else scale), cap)
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    out_BTNGK = jnp.einsum("bngts,bsnk->btngk", weights, v_BSNK)
    return out_BTNGK.reshape(batch, length, heads, head_dim)


QUERY_BLOCK = 128
# Bytes of attention weights that are worked on at a time: within the caches.
CACHED_BYTES = 2**22


def attend_blocked(
    q_BTHK: Array, k_BTNK: Array, v_BTNK: Array, mask_BTS: Array, scale: float | None = None, cap: None = None, *, read_BT: Array | None = None
) -> jax.Array:
    """`attend` of a causal mask, row by row, queries in blocks that skip later keys; no cap.

    read_BT: queries whose output is read; blocks without any are left out, and their outputs are 0.
    None: those that see themselves. The backward pass recomputes the weights from the inputs and each
    query's largest logit and sum (Dao et al. 2022, arXiv 2205.14135), so nothing of size T x T is kept.
    Queries that see no key give a finite output, not the same one as `attend`.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    kv_heads = k_BTNK.shape[2]
    chex.assert_equal_shape([k_BTNK, v_BTNK])
    chex.assert_shape(mask_BTS, (batch, length, length))
    if cap is not None:
        raise ValueError("attention in blocks has no cap")
    q_BTNGK = (q_BTHK * (head_dim**-0.5 if scale is None else scale)).astype(q_BTHK.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    q_BNGTK, k_BNTK, v_BNTK = jnp.moveaxis(q_BTNGK, 1, 3), jnp.swapaxes(k_BTNK, 1, 2), jnp.swapaxes(v_BTNK, 1, 2)
    bias_BTT = jnp.where(mask_BTS, 0.0, MASKED)
    read_BT = jnp.diagonal(mask_BTS, axis1=1, axis2=2) if read_BT is None else read_BT

    def block(start: int, inputs: tuple[jax.Array, ...]) -> jax.Array:
        q_NGTK, k_NTK, v_NTK, bias_TT, _ = inputs
        stop = min(start + QUERY_BLOCK, length)
        q_NXK = q_NGTK[:, :, start:stop].reshape(kv_heads, -1, head_dim)
        out_NXK = _softmax_sum(q_NXK, k_NTK[:, :stop], v_NTK[:, :stop], bias_TT[start:stop, :stop])
        return out_NXK.reshape(kv_heads, -1, stop - start, head_dim)

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        blocks = []
        for start in range(0, length, QUERY_BLOCK):
            empty = jnp.zeros((kv_heads, heads // kv_heads, min(QUERY_BLOCK, length - start), head_dim), v_BNTK.dtype)
            some = jnp.any(inputs[4][start : start + QUERY_BLOCK])
            blocks.append(jax.lax.cond(some, functools.partial(block, start), lambda _, empty=empty: empty, inputs))
        return jnp.concatenate(blocks, axis=2)

    inputs = (q_BNGTK, k_BNTK, v_BNTK, bias_BTT, read_BT)
    if length > QUERY_BLOCK:
        out_BNGTK = jax.lax.map(row, inputs)
    else:
        # Rows this short are worked on together, as many as stay in the caches.
        rows = max(1, min(batch, CACHED_BYTES // (heads * length * length * 4)))
        out_BNGTK = jax.lax.map(functools.partial(block, 0), inputs, batch_size=rows)
    return jnp.moveaxis(out_BNGTK, 3, 1).reshape(batch, length, heads, head_dim)


@jax.custom_vjp
def _softmax_sum(q_NXK: jax.Array, k_NSK: jax.Array, v_NSK: jax.Array, bias_TS: jax.Array) -> jax.Array:
    """softmax(q k^T + bias) v; X = G T queries of one key/value head, scaled before."""
    return _softmax_sum_forward(q_NXK, k_NSK, v_NSK, bias_TS)[0]


def _biased(q_NXK: jax.Array, k_NSK: jax.Array, bias_TS: jax.Array) -> jax.Array:
    logits_NXS = jnp.einsum("nxk,nsk->nxs", q_NXK, k_NSK, preferred_element_type=jnp.float32)
    grouped = (*logits_NXS.shape[:1], -1, *bias_TS.shape)
    return (logits_NXS.reshape(grouped) + bias_TS[None, None]).reshape(logits_NXS.shape)


def _softmax_sum_forward(q_NXK, k_NSK, v_NSK, bias_TS):
    logits_NXS = _biased(q_NXK, k_NSK, bias_TS)
    largest_NX1 = jnp.max(logits_NXS, axis=-1, keepdims=True)
    weights_NXS = jnp.exp(logits_NXS - largest_NX1)
    sum_NX1 = jnp.sum(weights_NXS, axis=-1, keepdims=True)
    out_NXK = jnp.einsum("nxs,nsk->nxk", weights_NXS.astype(v_NSK.dtype), v_NSK, preferred_element_type=jnp.float32) / sum_NX1
    out_NXK = out_NXK.astype(v_NSK.dtype)
    return out_NXK, (q_NXK, k_NSK, v_NSK, bias_TS, largest_NX1, sum_NX1, out_NXK)


def _softmax_sum_backward(kept, cotangent_NXK):
    """With weights p and d = p (dp - sum_k do o): dv = p^T do, dq = d k, dk = d^T q."""
    q_NXK, k_NSK, v_NSK, bias_TS, largest_NX1, sum_NX1, out_NXK = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    p_NXS = jnp.exp(_biased(q_NXK, k_NSK, bias_TS) - largest_NX1) / sum_NX1
    shared_NX1 = jnp.sum(cotangent_NXK.astype(jnp.float32) * out_NXK, axis=-1, keepdims=True)
    d_NXS = (p_NXS * (product("nxk,nsk->nxs", cotangent_NXK, v_NSK) - shared_NX1)).astype(q_NXK.dtype)
    dv_NSK = product("nxs,nxk->nsk", p_NXS.astype(v_NSK.dtype), cotangent_NXK)
    dq_NXK, dk_NSK = product("nxs,nsk->nxk", d_NXS, k_NSK), product("nxs,nxk->nsk", d_NXS, q_NXK)
    return dq_NXK.astype(q_NXK.dtype), dk_NSK.astype(k_NSK.dtype), dv_NSK.astype(v_NSK.dtype), jnp.zeros_like(bias_TS)


_softmax_sum.defvjp(_softmax_sum_forward, _softmax_sum_backward)

ATTENTION = {"plain": attend, "blocked": attend_blocked}
