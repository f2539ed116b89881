"""Rotary positions, masks and grouped-query attention, in plain XLA operations.

`attend` is one formula for every platform. `attend_blocked` is the same numbers, queries in blocks:
the [B, H, T, T] weights never exist whole. On a CPU, whose XLA backend streams them through memory
several times, pieces that stay in the cache are 2 to 4 times as fast; on a GPU it stands in where
no kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.models.config import Rope
from perl_jax.models.packing import Packing
from perl_jax.runtime import precision
from perl_jax.runtime.masked import at_least_float32
from perl_jax.types import Array

# Large and finite: a row with no visible key (a padded query) then averages its keys instead of
# becoming NaN, which would spread through the gradients of every other row.
MASKED = -1e30


def positions(valid_BT: Array) -> jax.Array:
    """Rotary position of each token: how many real tokens precede it; 0 on leading padding."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position, float32 [K/2] (Su et al. 2021, arXiv 2104.09864), scaled as `rope`
    says.
    """
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
    angles = (
        positions_BT.astype(jnp.float32)[:, :, None, None]
        * frequencies(rope, head_dim)[None, None, None, :]
    )
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
    """[B, T, S]: keys fewer than `window` positions back (later keys too; a causal mask has
    those).
    """
    return query_positions_BT[:, :, None] - key_positions_BS[:, None, :] < window


def capped(logits: Array, cap: float | None) -> Array:
    """cap tanh(x / cap) (Gemma 2, arXiv 2408.00118); None: x."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def rounded_sum(*terms: Array) -> jax.Array:
    """The sum of terms of one dtype, taken in float32 and rounded once.

    Of two terms it is what adding them gives. XLA's GPU backend has a product add to the other term
    where it can, and makes a copy of that for it: where terms are small, one more kernel than to
    add them with what comes next.
    """
    return functools.reduce(jnp.add, map(at_least_float32, terms)).astype(terms[0].dtype)


def attend(
    q_BTHK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    mask_BTS: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(cap(scale q k^T)) v, query heads in groups over key/value heads; softmax in float32.

    scale: default 1 / sqrt(K).
    """
    batch, length, heads, head_dim = q_BTHK.shape
    kv_heads = k_BSNK.shape[2]
    chex.assert_equal_shape([k_BSNK, v_BSNK])
    chex.assert_shape(mask_BTS, (batch, length, k_BSNK.shape[1]))
    q_BTNGK = q_BTHK.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = precision.einsum("btngk,bsnk->bngts", q_BTNGK, k_BSNK, dtype=jnp.float32)
    logits = capped(logits * (head_dim**-0.5 if scale is None else scale), cap)
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    out_BTNGK = precision.einsum("bngts,bsnk->btngk", weights, v_BSNK)
    return out_BTNGK.reshape(batch, length, heads, head_dim)


QUERY_BLOCK = 128
# Bytes of attention weights that are worked on at a time: within the caches.
CACHED_BYTES = 2**22
# The same on an accelerator, which needs many rows at a time to be busy; and the most blocks, each
# of which is compiled.
WIDE_BYTES, WIDE_BLOCKS = 2**28, 32


def attend_blocked(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    mask_BTS: Array,
    scale: float | None = None,
    cap: float | None = None,
    *,
    read_BT: Array | None = None,
    packing: Packing | None = None,
    wide: bool = False,
) -> jax.Array:
    """`attend` of a causal mask, row by row, queries in blocks that skip later keys.

    read_BT: queries whose output is read; blocks without any are left out, and their outputs are 0.
    None: those that see themselves. wide: as an accelerator has it, so many rows together as have
    WIDE_BYTES of weights, no block left out. packing: queries, keys, values and outputs are packed
    tokens [W, U, heads, K] of the sequences that the masks are about.

    The backward pass recomputes the weights from the inputs and each query's largest logit and sum
    (Dao et al. 2022, arXiv 2205.14135): nothing of size T x T is kept, and packed tokens are kept
    packed. Queries that see no key give a finite output, not the same one as `attend`.
    """
    chex.assert_equal_shape([k_BTNK, v_BTNK])
    chex.assert_shape(mask_BTS, (mask_BTS.shape[0], mask_BTS.shape[2], mask_BTS.shape[2]))
    read_BT = jnp.diagonal(mask_BTS, axis1=1, axis2=2) if read_BT is None else read_BT
    q_BTHK = (q_BTHK * (q_BTHK.shape[-1] ** -0.5 if scale is None else scale)).astype(q_BTHK.dtype)
    return _blocked(cap, wide, q_BTHK, k_BTNK, v_BTNK, mask_BTS, read_BT, packing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    cap: float | None,
    wide: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_BTS: jax.Array,
    read_BT: jax.Array,
    packing: Packing | None,
) -> jax.Array:
    """`attend_blocked` of scaled queries."""
    return _blocked_forward(cap, wide, q, k, v, mask_BTS, read_BT, packing)[0]


def _blocked_forward(cap, wide, q, k, v, mask_BTS, read_BT, packing):
    spread = packing.spread if packing is not None else lambda x_BT: x_BT
    heads, kv_heads = q.shape[2], k.shape[2]
    inputs = (_by_heads(spread(x), kv_heads) for x in (q, k, v))
    out_BNGTK, *sums = _by_rows(_row, (*inputs, mask_BTS, read_BT), heads, cap, wide)
    out = _by_tokens(out_BNGTK)
    out = out if packing is None else packing.packed(out)
    return out, (q, k, v, out, *sums, mask_BTS, read_BT, packing)


def _blocked_backward(cap, wide, kept, cotangent):
    q, k, v, out, *sums, mask_BTS, read_BT, packing = kept
    spread = packing.spread if packing is not None else lambda x_BT: x_BT
    heads, kv_heads = q.shape[2], k.shape[2]
    d_out = cotangent if packing is None else packing.packed_gradient(cotangent)
    inputs = (_by_heads(x, kv_heads) for x in (spread(q), spread(k), spread(v), spread(out), d_out))
    gradients = map(
        _by_tokens, _by_rows(_row_gradients, (*inputs, *sums, mask_BTS, read_BT), heads, cap, wide)
    )
    gradients = gradients if packing is None else map(packing.spread_gradient, gradients)
    return *gradients, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _by_heads(x_BTHK: Array, kv_heads: int) -> jax.Array:
    """[B, N, G, T, K]: heads in groups over key/value heads; keys and values are groups of one."""
    return jnp.moveaxis(x_BTHK.reshape(*x_BTHK.shape[:2], kv_heads, -1, x_BTHK.shape[-1]), 1, 3)


def _by_tokens(x_BNGTK: Array) -> jax.Array:
    """Back to [B, T, H, K]."""
    x_BTNGK = jnp.moveaxis(x_BNGTK, 3, 1)
    return x_BTNGK.reshape(*x_BTNGK.shape[:2], -1, x_BTNGK.shape[-1])


def _by_rows(
    of_row: Callable, rows: tuple[jax.Array, ...], heads: int, cap: float | None, wide: bool
) -> tuple[jax.Array, ...]:
    """One row after the other; those of a single block together, as many as stay in the caches.
    wide: as many as have WIDE_BYTES.
    """
    batch, length = rows[-1].shape
    held = WIDE_BYTES if wide else CACHED_BYTES
    together = max(1, min(batch, held // (heads * min(_block(length, wide), length) * length * 4)))
    of_row = functools.partial(of_row, cap=cap, wide=wide)
    return jax.lax.map(of_row, rows, batch_size=together if wide or length <= QUERY_BLOCK else None)


def _block(length: int, wide: bool) -> int:
    """Queries of a block."""
    return QUERY_BLOCK * (-(-length // (QUERY_BLOCK * WIDE_BLOCKS)) if wide else 1)


def _blocks(read_T: jax.Array, wide: bool) -> Iterator[tuple[int, int, Callable]]:
    """(start, stop, either) of a row's blocks of queries: either(do, otherwise, *arguments) does
    where any is read.
    """
    length, block = read_T.shape[0], _block(read_T.shape[0], wide)
    for start in range(0, length, block):
        stop = min(start + block, length)
        # Of rows that are worked on together nothing is left out.
        alone = length > QUERY_BLOCK and not wide
        yield (
            start,
            stop,
            functools.partial(jax.lax.cond, jnp.any(read_T[start:stop]))
            if alone
            else lambda do, _, *arguments: do(*arguments),
        )


def _row(
    row: tuple[jax.Array, ...], cap: float | None, wide: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(q k^T) v of one row: the output [N, G, T, K], each query's largest logit and sum [N,
    G, T, 1].
    """
    q_NGTK, k_N1TK, v_N1TK, mask_TT, read_T = row

    def attended(q_NGXK, k_N1SK, v_N1SK, mask_XS):
        logits_NYS = _masked(capped(_logits(q_NGXK, k_N1SK), cap), mask_XS)
        largest_NY1 = jnp.max(logits_NYS, axis=-1, keepdims=True)
        weights_NYS = jnp.exp(logits_NYS - largest_NY1)
        sum_NY1 = jnp.sum(weights_NYS, axis=-1, keepdims=True)
        out_NYK = _product("nys,nsk->nyk", weights_NYS.astype(v_N1SK.dtype), v_N1SK[:, 0]) / sum_NY1
        return tuple(
            x.reshape(*q_NGXK.shape[:3], -1)
            for x in (out_NYK.astype(v_N1SK.dtype), largest_NY1, sum_NY1)
        )

    def skipped(q_NGXK, k_N1SK, v_N1SK, mask_XS):
        sums = (*q_NGXK.shape[:3], 1)
        return jnp.zeros(q_NGXK.shape, v_N1SK.dtype), jnp.zeros(sums), jnp.ones(sums)

    blocks = [
        either(
            attended,
            skipped,
            q_NGTK[:, :, start:stop],
            k_N1TK[:, :, :stop],
            v_N1TK[:, :, :stop],
            mask_TT[start:stop, :stop],
        )
        for start, stop, either in _blocks(read_T, wide)
    ]
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True))


def _row_gradients(
    row: tuple[jax.Array, ...], cap: float | None, wide: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With weights p and d = p (dp - sum_k do o): dq = d k, dk = d^T q, dv = p^T do, summed in
    float32. Of capped logits d is times 1 - (logit / cap)^2.
    """
    q_NGTK, k_N1TK, v_N1TK, out_NGTK, d_out_NGTK, largest_NGT1, sum_NGT1, mask_TT, read_T = row
    shared_NGT1 = jnp.sum(d_out_NGTK.astype(jnp.float32) * out_NGTK, axis=-1, keepdims=True)
    dk_NTK, dv_NTK = (
        jnp.zeros(k_N1TK[:, 0].shape, jnp.float32),
        jnp.zeros(v_N1TK[:, 0].shape, jnp.float32),
    )
    dq = []
    for start, stop, either in _blocks(read_T, wide):

        def attended(dk_NTK, dv_NTK, start=start, stop=stop):
            mine = lambda x_NGTK: x_NGTK[:, :, start:stop].reshape(
                x_NGTK.shape[0], -1, x_NGTK.shape[-1]
            )
            k_N1SK, v_NSK, d_out_NYK = k_N1TK[:, :, :stop], v_N1TK[:, 0, :stop], mine(d_out_NGTK)
            seen_NYS = capped(_logits(q_NGTK[:, :, start:stop], k_N1SK), cap)
            logits_NYS = _masked(seen_NYS, mask_TT[start:stop, :stop])
            p_NYS = jnp.exp(logits_NYS - mine(largest_NGT1)) / mine(sum_NGT1)
            d_NYS = p_NYS * (_product("nyk,nsk->nys", d_out_NYK, v_NSK) - mine(shared_NGT1))
            d_NYS = (d_NYS if cap is None else d_NYS * (1 - jnp.square(seen_NYS / cap))).astype(
                q_NGTK.dtype
            )
            dk_NTK = dk_NTK.at[:, :stop].add(_product("nys,nyk->nsk", d_NYS, mine(q_NGTK)))
            dv_NTK = dv_NTK.at[:, :stop].add(
                _product("nys,nyk->nsk", p_NYS.astype(v_NSK.dtype), d_out_NYK)
            )
            dq_NYK = _product("nys,nsk->nyk", d_NYS, k_N1SK[:, 0]).astype(q_NGTK.dtype)
            return dq_NYK.reshape(*q_NGTK.shape[:2], stop - start, -1), dk_NTK, dv_NTK

        def skipped(dk_NTK, dv_NTK, start=start, stop=stop):
            return jnp.zeros_like(q_NGTK[:, :, start:stop]), dk_NTK, dv_NTK

        part, dk_NTK, dv_NTK = either(attended, skipped, dk_NTK, dv_NTK)
        dq.append(part)
    return (
        jnp.concatenate(dq, axis=2),
        dk_NTK[:, None].astype(k_N1TK.dtype),
        dv_NTK[:, None].astype(v_N1TK.dtype),
    )


_product = functools.partial(precision.einsum, dtype=jnp.float32)


def _logits(q_NGXK: jax.Array, k_N1SK: jax.Array) -> jax.Array:
    """q k^T, [N, G X, S]."""
    return _product(
        "nyk,nsk->nys", q_NGXK.reshape(q_NGXK.shape[0], -1, q_NGXK.shape[-1]), k_N1SK[:, 0]
    )


def _masked(logits_NYS: jax.Array, mask_XS: jax.Array) -> jax.Array:
    masked_NGXS = jnp.where(
        mask_XS[None, None], logits_NYS.reshape(logits_NYS.shape[0], -1, *mask_XS.shape), MASKED
    )
    return masked_NGXS.reshape(logits_NYS.shape)
