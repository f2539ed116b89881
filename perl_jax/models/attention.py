"""Rotary positions, masks and grouped-query attention, in plain XLA operations.

`attend` is one formula for every platform. `attend_blocked` computes the same, one block of queries
at a time, so that the [B, H, T, T] attention weights never exist whole. On a CPU, whose XLA backend
streams whole weights through memory several times, blocks that fit into the caches are 2 to 4 times
as fast. On a GPU it is used where no kernel applies.
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

# Logit of a hidden key. It is large but finite: a query that sees no key (padding) then averages
# all values. With -inf its output would be NaN, which would spread through the gradients of every
# other row.
MASKED = -1e30


def positions(valid_BT: Array) -> jax.Array:
    """Returns each token's rotary position [B, T]: the number of real tokens before it.

    Leading padding has position 0, and later padding that of the last real token. `valid_BT` is
    True on real tokens.
    """
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the rotary frequencies in radians per position, float32 [K/2].

    They are theta^(-2i/K) for i = 0 .. K/2 - 1 (Su et al. 2021, arXiv 2104.09864), scaled as
    `rope.scaling` says. `head_dim` is K.
    """
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.scaling == "none":
        return plain.astype(np.float32)
    if rope.scaling == "linear":
        return (plain / rope.factor).astype(np.float32)
    # Number of full rotations of each frequency over the context of the original training.
    turns = rope.original_positions * plain / (2 * np.pi)
    share = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
    return (plain * (share + (1 - share) / rope.factor)).astype(np.float32)


def rotary_angles(positions_BT: Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of position * frequency, float32 [B, T, 1, K/2] each.

    Args:
        positions_BT: Rotary position of each token (`positions`).
        head_dim: K.
        rope: The frequencies.
    """
    angles = (
        positions_BT.astype(jnp.float32)[:, :, None, None]
        * frequencies(rope, head_dim)[None, None, None, :]
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: Array, cos: Array, sin: Array) -> jax.Array:
    """Returns x with each pair (i, i + K/2) of its last axis rotated, computed in float32.

    The pairs have the layout of Hugging Face checkpoints.

    Args:
        x_BTHK: Queries or keys.
        cos: Cosines of the angles, [B, T, 1, K/2] (`rotary_angles`).
        sin: Sines of the angles.
    """
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def causal_mask(valid_BT: Array) -> jax.Array:
    """Returns mask_BTS: True where a query sees a real key at its own column or before."""
    length = valid_BT.shape[1]
    columns = jnp.arange(length)
    causal_TS = columns[:, None] >= columns[None, :]
    return causal_TS[None, :, :] & valid_BT[:, None, :].astype(bool)


def within_window(
    window: Array | int, query_positions_BT: Array, key_positions_BS: Array
) -> jax.Array:
    """Returns [B, T, S]: whether a key is fewer than `window` positions before the query.

    Later keys count as inside; combine it with a causal mask, which hides them.

    Args:
        window: Number of positions, the query's own included.
        query_positions_BT: Rotary positions of the queries.
        key_positions_BS: Rotary positions of the keys.
    """
    return query_positions_BT[:, :, None] - key_positions_BS[:, None, :] < window


def soft_cap(logits: Array, cap: float | None) -> Array:
    """Returns cap tanh(x / cap) (Gemma 2, arXiv 2408.00118), or x if the cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def rounded_sum(*terms: Array) -> jax.Array:
    """Returns the sum of terms of one dtype, computed in float32 and rounded to that dtype once.

    For two terms the result equals their plain sum.
    """
    # For a plain sum of two terms XLA's GPU backend copies one term and makes a product add onto
    # the copy, which costs one more kernel.
    return functools.reduce(jnp.add, map(at_least_float32, terms)).astype(terms[0].dtype)


def attend(
    q_BTHK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    mask_BTS: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Returns softmax(cap(scale q k^T)) v, [B, T, H, K]; query heads share key/value heads.

    The softmax is in float32. A query that sees no key averages all values.

    Args:
        q_BTHK: Queries.
        k_BSNK: Keys; each serves H / N consecutive query heads.
        v_BSNK: Values.
        mask_BTS: True where a query sees a key.
        scale: Factor of q k^T; None: 1 / sqrt(K).
        cap: Cap of the logits (`soft_cap`); None: no cap.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    kv_heads = k_BSNK.shape[2]
    chex.assert_equal_shape([k_BSNK, v_BSNK])
    chex.assert_shape(mask_BTS, (batch, length, k_BSNK.shape[1]))
    q_BTNGK = q_BTHK.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = precision.einsum("btngk,bsnk->bngts", q_BTNGK, k_BSNK, dtype=jnp.float32)
    logits = soft_cap(logits * (head_dim**-0.5 if scale is None else scale), cap)
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    out_BTNGK = precision.einsum("bngts,bsnk->btngk", weights, v_BSNK)
    return out_BTNGK.reshape(batch, length, heads, head_dim)


QUERY_BLOCK = 128
# Largest number of bytes of attention weights that are computed at a time on a CPU: they fit into
# its caches.
CACHED_BYTES = 2**22
# WIDE_BYTES: the same on an accelerator, which needs many rows at a time to be busy. WIDE_BLOCKS:
# largest number of blocks there, each of which is compiled separately.
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
    """Returns `attend` for a causal mask, computed in blocks of queries that skip later keys.

    The backward pass recomputes the weights from the inputs and from each query's largest logit and
    sum (Dao et al. 2022, arXiv 2205.14135). No array of size T x T is kept, and packed tokens are
    kept packed. Queries that see no key give a finite output, which differs from that of `attend`.

    Args:
        q_BTHK: Queries; packed tokens [W, U, H, K] if `packing` is given.
        k_BTNK: Keys, likewise.
        v_BTNK: Values, likewise.
        mask_BTS: Causal mask of the padded sequences.
        scale: Factor of q k^T; None: 1 / sqrt(K).
        cap: Cap of the logits (`soft_cap`); None: no cap.
        read_BT: True on queries whose output is used. Blocks without any are skipped, and their
            output is 0. None: queries that see themselves.
        packing: How the inputs and outputs are packed. None: they are padded.
        wide: For accelerators: compute as many rows at a time as have WIDE_BYTES of weights, and
            skip no block.
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
    """Returns `attend_blocked` for queries that are already scaled, with a gradient of its own."""
    return _blocked_forward(cap, wide, q, k, v, mask_BTS, read_BT, packing)[0]


def _blocked_forward(cap, wide, q, k, v, mask_BTS, read_BT, packing):
    """Returns the output of `attend_blocked`, and the residuals of the backward pass.

    The residuals are (q, k, v, output, largest logits, sums, mask_BTS, read_BT, packing).
    """
    spread = packing.spread if packing is not None else lambda x_BT: x_BT
    heads, kv_heads = q.shape[2], k.shape[2]
    inputs = (_group_heads(spread(x), kv_heads) for x in (q, k, v))
    out_BNGTK, *sums = _map_rows(_row, (*inputs, mask_BTS, read_BT), heads, cap, wide)
    out = _ungroup_heads(out_BNGTK)
    out = out if packing is None else packing.packed(out)
    return out, (q, k, v, out, *sums, mask_BTS, read_BT, packing)


def _blocked_backward(cap, wide, kept, cotangent):
    """Returns the gradients of q, k and v; masks and packing have none.

    Args:
        cap: Cap of the logits; None: no cap.
        wide: Whether the device is an accelerator.
        kept: The residuals of `_blocked_forward`.
        cotangent: Gradient of the output, packed if the output is.
    """
    q, k, v, out, *sums, mask_BTS, read_BT, packing = kept
    spread = packing.spread if packing is not None else lambda x_BT: x_BT
    heads, kv_heads = q.shape[2], k.shape[2]
    d_out = cotangent if packing is None else packing.packed_gradient(cotangent)
    inputs = (
        _group_heads(x, kv_heads) for x in (spread(q), spread(k), spread(v), spread(out), d_out)
    )
    gradients = map(
        _ungroup_heads,
        _map_rows(_row_gradients, (*inputs, *sums, mask_BTS, read_BT), heads, cap, wide),
    )
    gradients = gradients if packing is None else map(packing.spread_gradient, gradients)
    return *gradients, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _group_heads(x_BTHK: Array, kv_heads: int) -> jax.Array:
    """Returns [B, N, G, T, K]: heads grouped over key/value heads; keys and values have G = 1."""
    return jnp.moveaxis(x_BTHK.reshape(*x_BTHK.shape[:2], kv_heads, -1, x_BTHK.shape[-1]), 1, 3)


def _ungroup_heads(x_BNGTK: Array) -> jax.Array:
    """Returns [B, T, H, K] from [B, N, G, T, K]."""
    x_BTNGK = jnp.moveaxis(x_BNGTK, 3, 1)
    return x_BTNGK.reshape(*x_BTNGK.shape[:2], -1, x_BTNGK.shape[-1])


def _map_rows(
    of_row: Callable, rows: tuple[jax.Array, ...], heads: int, cap: float | None, wide: bool
) -> tuple[jax.Array, ...]:
    """Returns the results of `of_row` for every row, a limited number of rows at a time.

    On a CPU, rows of a single block are computed together as far as their weights fit into the
    caches (CACHED_BYTES), longer rows one by one. With `wide`, as many as have WIDE_BYTES of
    weights.

    Args:
        of_row: (the row's entry of each array, cap, wide) -> a tuple of arrays.
        rows: Arrays [B, ...]; the last one is read_BT.
        heads: H.
        cap: Cap of the logits; None: no cap.
        wide: Whether the device is an accelerator.
    """
    batch, length = rows[-1].shape
    held = WIDE_BYTES if wide else CACHED_BYTES
    together = max(1, min(batch, held // (heads * min(_block(length, wide), length) * length * 4)))
    of_row = functools.partial(of_row, cap=cap, wide=wide)
    return jax.lax.map(of_row, rows, batch_size=together if wide or length <= QUERY_BLOCK else None)


def _block(length: int, wide: bool) -> int:
    """Returns the number of queries in a block, for rows of `length` tokens.

    With `wide` (on accelerators), long rows have longer blocks.
    """
    return QUERY_BLOCK * (-(-length // (QUERY_BLOCK * WIDE_BLOCKS)) if wide else 1)


def _blocks(read_T: jax.Array, wide: bool) -> Iterator[tuple[int, int, Callable]]:
    """Yields (start, stop, either) for each block of queries of a row.

    either(do, otherwise, *arguments) calls `do` if any query of the block is read, else
    `otherwise`. If blocks are not skipped, it always calls `do`.

    Args:
        read_T: True on queries whose output is used.
        wide: Whether the device is an accelerator, where blocks are not skipped.
    """
    length, block = read_T.shape[0], _block(read_T.shape[0], wide)
    for start in range(0, length, block):
        stop = min(start + block, length)
        # Blocks are skipped only if rows are computed one by one.
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
    """Returns the attention of one row of the batch: (output, largest, total).

    `output` is [N, G, T, K]. For each query, `largest` is its largest logit and `total` the sum of
    exp(logit - largest) over the keys, [N, G, T, 1] each; the backward pass needs both.

    Args:
        row: (queries [N, G, T, K], keys [N, 1, T, K], values [N, 1, T, K], mask [T, T], read [T]).
        cap: Cap of the logits; None: no cap.
        wide: Whether the device is an accelerator.
    """
    q_NGTK, k_N1TK, v_N1TK, mask_TT, read_T = row

    def attended(q_NGXK, k_N1SK, v_N1SK, mask_XS):
        """Returns output, largest logits and sums of one block of X queries."""
        logits_NYS = _masked(soft_cap(_logits(q_NGXK, k_N1SK), cap), mask_XS)
        largest_NY1 = jnp.max(logits_NYS, axis=-1, keepdims=True)
        weights_NYS = jnp.exp(logits_NYS - largest_NY1)
        sum_NY1 = jnp.sum(weights_NYS, axis=-1, keepdims=True)
        out_NYK = _product("nys,nsk->nyk", weights_NYS.astype(v_N1SK.dtype), v_N1SK[:, 0]) / sum_NY1
        return tuple(
            x.reshape(*q_NGXK.shape[:3], -1)
            for x in (out_NYK.astype(v_N1SK.dtype), largest_NY1, sum_NY1)
        )

    def skipped(q_NGXK, k_N1SK, v_N1SK, mask_XS):
        """Returns zeros for a block of queries that is not read."""
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
    """Returns the gradients (dq, dk, dv) of one row, summed in float32.

    With weights p and d = p (dp - sum_k do o): dq = d k, dk = d^T q, dv = p^T do. For capped
    logits, d also has the factor 1 - (logit / cap)^2.

    Args:
        row: (queries, keys, values, output, gradient of the output, largest logits, sums, mask,
            read), shaped as in `_row`.
        cap: Cap of the logits; None: no cap.
        wide: Whether the device is an accelerator.
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
            """Returns dq of the block, and dk and dv with the block's part added."""
            mine = lambda x_NGTK: x_NGTK[:, :, start:stop].reshape(
                x_NGTK.shape[0], -1, x_NGTK.shape[-1]
            )
            k_N1SK, v_NSK, d_out_NYK = k_N1TK[:, :, :stop], v_N1TK[:, 0, :stop], mine(d_out_NGTK)
            seen_NYS = soft_cap(_logits(q_NGTK[:, :, start:stop], k_N1SK), cap)
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
            """Returns a zero dq for a block that is not read, and dk and dv as they are."""
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
    """Returns q k^T, float32 [N, G X, S], for X queries of each head."""
    return _product(
        "nyk,nsk->nys", q_NGXK.reshape(q_NGXK.shape[0], -1, q_NGXK.shape[-1]), k_N1SK[:, 0]
    )


def _masked(logits_NYS: jax.Array, mask_XS: jax.Array) -> jax.Array:
    """Returns the logits [N, G X, S] with MASKED where the mask [X, S] is False."""
    masked_NGXS = jnp.where(
        mask_XS[None, None], logits_NYS.reshape(logits_NYS.shape[0], -1, *mask_XS.shape), MASKED
    )
    return masked_NGXS.reshape(logits_NYS.shape)
