"""The key/value cache of decoding: keys and values of each prompt once, and of each response.

The samples of a prompt are consecutive rows and read one copy of its keys and values. The tokens
that a row has decoded have columns of their own. In one step all rows write into the same column,
which is one in-place update. Columns are reused in turn (a ring buffer), so that rows may start at
different steps. A row that decodes at most as many tokens as there are columns never overwrites its
own tokens. Layers with a sliding window keep no more tokens than the window holds, of the prompt
and of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.models.attention import MASKED, rounded_sum, soft_cap, within_window
from perl_jax.models.stacks import Unstacked, is_unstacked, map_stacks
from perl_jax.runtime import precision
from perl_jax.types import Array

CACHES = ("auto", "float32", "bfloat16", "int8")
CacheKind = Literal["auto", "float32", "bfloat16", "int8"]


@flax.struct.dataclass
class CacheEntry:
    """Keys or values in the cache.

    Attributes:
        values: [..., S, K]; with `turned` [..., K, S].
        scale: For int8 values, the scale [..., S] of each token and head. None: no scale.
        turned: Whether the last two axes of `values` are exchanged (static).
    """

    values: Array
    scale: Array | None = None
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    def grown(self, more: int) -> CacheEntry:
        """Returns the entry with `more` empty token columns after the last."""
        pad = lambda x, axis: jnp.pad(
            x, [(0, more if i == x.ndim + axis else 0) for i in range(x.ndim)]
        )
        return self.replace(
            values=pad(self.values, self._tokens),
            scale=None if self.scale is None else pad(self.scale, -1),
        )

    def with_token(self, new: CacheEntry, column: Array) -> CacheEntry:
        """Returns the entry with one token written to a column.

        new: the token's entry [..., 1, K], of the same dtype, not turned.
        """
        put = lambda old, x, axis: jax.lax.dynamic_update_slice_in_dim(
            old, x.astype(old.dtype), column, axis=x.ndim + axis
        )
        values = put(
            self.values,
            jnp.swapaxes(new.values, -2, -1) if self.turned else new.values,
            self._tokens,
        )
        return self.replace(
            values=values, scale=None if self.scale is None else put(self.scale, new.scale, -1)
        )

    def vacant(self, rows: int, max_new_tokens: int, turned: bool = False) -> CacheEntry:
        """Returns an entry of zeros of the same dtype for `rows` rows and `max_new_tokens` tokens.

        This entry must not be turned; `turned` is of the result.
        """
        *layers, _, heads, _, width = self.values.shape
        zeros = lambda x, *last: jnp.zeros((*layers, rows, heads, *last), x.dtype)
        last = (width, max_new_tokens) if turned else (max_new_tokens, width)
        scale = None if self.scale is None else zeros(self.scale, max_new_tokens)
        return CacheEntry(zeros(self.values, *last), scale, turned)

    @property
    def _tokens(self) -> int:
        """The axis of tokens in `values`."""
        return -1 if self.turned else -2


def cache_entry(x_SK: Array, kind: CacheKind) -> CacheEntry:
    """Returns keys or values as a cache entry of the given kind.

    auto keeps their dtype. int8 stores round(127 x / max|x|) with one scale per token and head.
    """
    if kind == "auto":
        return CacheEntry(x_SK)
    if kind != "int8":
        return CacheEntry(x_SK.astype(kind))
    x_SK = x_SK.astype(jnp.float32)
    scale_S = jnp.maximum(jnp.max(jnp.abs(x_SK), axis=-1), 1e-30) / 127
    return CacheEntry(jnp.round(x_SK / scale_S[..., None]).astype(jnp.int8), scale_S)


@flax.struct.dataclass
class WindowCache:
    """Keys and values of the layers with one window size, or of the layers without a window.

    There are P prompts and B = P G rows. With a window, S and C are at most the window: the
    prompt's last real tokens are kept (`last_tokens`), and the column that is written next holds a
    token that no query sees any more.

    Attributes:
        prompt_k: Keys of the prompts, [L, P, N, S, K]; prompts may be padded on either side.
        prompt_v: Values of the prompts.
        own_k: Keys of the tokens that rows have decoded, [L, B, N, C, K].
        own_v: Values of these tokens.
        prompt_visible_PS: True on real tokens of the prompts.
        prompt_position_PS: Rotary positions of the prompts' tokens.
        own_visible_BC: True on columns that hold a token of this row.
        own_position_BC: Rotary positions of these tokens.
        window: Number of tokens that a token sees, itself included (static). None: all before it.

    Keys and values may be unstacked, one array per layer (`stacks.Unstacked`). own_k is then
    turned, which is faster on a CPU: its logits are sums of products over contiguous rows.
    """

    prompt_k: CacheEntry | Unstacked
    prompt_v: CacheEntry | Unstacked
    own_k: CacheEntry | Unstacked
    own_v: CacheEntry | Unstacked
    prompt_visible_PS: Array
    prompt_position_PS: Array
    own_visible_BC: Array
    own_position_BC: Array
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def by_layer(
        self,
    ) -> tuple[
        CacheEntry | Unstacked,
        CacheEntry | Unstacked,
        CacheEntry | Unstacked,
        CacheEntry | Unstacked,
    ]:
        """(prompt_k, prompt_v, own_k, own_v), stacked over layers.

        One layer of it is an argument of `attend_cached`.
        """
        return self.prompt_k, self.prompt_v, self.own_k, self.own_v

    @property
    def samples(self) -> int:
        """G, the number of rows per prompt."""
        return self.own_visible_BC.shape[0] // self.prompt_visible_PS.shape[0]

    def column(self, step: Array) -> jax.Array:
        """Returns the column of the token that is decoded after `step` other steps."""
        return step % self.own_visible_BC.shape[1]

    def visible(self, position_B: Array) -> jax.Array:
        """Returns [B, S + C]: whether a token at this position sees each key; prompts first."""
        both = lambda of_prompt_PS, own_BC: jnp.concatenate(
            [jnp.repeat(of_prompt_PS, self.samples, axis=0), own_BC], axis=1
        )
        visible_BS = both(self.prompt_visible_PS, self.own_visible_BC)
        if self.window is None:
            return visible_BS
        return (
            visible_BS
            & within_window(
                self.window,
                position_B[:, None],
                both(self.prompt_position_PS, self.own_position_BC),
            )[:, 0]
        )

    def grown(self, max_new_tokens: int) -> WindowCache:
        """Returns the cache with columns for `max_new_tokens` tokens; new columns come last."""
        more = own_columns(max_new_tokens, self.window) - self.own_visible_BC.shape[1]
        pad = lambda x_BC: jnp.pad(x_BC, ((0, 0), (0, more)))
        return self.replace(
            own_k=map_stacks(lambda part: part.grown(more), self.own_k),
            own_v=map_stacks(lambda part: part.grown(more), self.own_v),
            own_visible_BC=pad(self.own_visible_BC),
            own_position_BC=pad(self.own_position_BC),
        )

    def appended(
        self, k_LB1NK: Array, v_LB1NK: Array, position_B: Array, step: Array, kind: CacheKind
    ) -> WindowCache:
        """Returns the cache with every row's newest token [L, B, 1, N, K] written to its column."""
        pairs = ((self.own_k, k_LB1NK), (self.own_v, v_LB1NK))
        return self.advanced(
            *(write_token(part, new, self.column(step), kind) for part, new in pairs),
            position_B,
            step,
        )

    def advanced(
        self,
        own_k: CacheEntry | Unstacked,
        own_v: CacheEntry | Unstacked,
        position_B: Array,
        step: Array,
    ) -> WindowCache:
        """Returns the cache with new `own_k` and `own_v`, which hold the newest token."""
        here_C = jnp.arange(self.own_visible_BC.shape[1]) == self.column(step)
        return self.replace(
            own_k=own_k,
            own_v=own_v,
            own_visible_BC=self.own_visible_BC | here_C[None, :],
            own_position_BC=jnp.where(here_C[None, :], position_B[:, None], self.own_position_BC),
        )


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers.

    Attributes:
        parts: One part per window size, in the order of the first layer with it.
        position_B: Rotary position of each row's next token.
        step: Number of decoding steps so far, those of rows that have left their slot included.
    """

    parts: tuple[WindowCache, ...]
    position_B: Array
    step: Array

    @property
    def row_axis(self) -> int:
        """The axis of prompts or rows in keys and values: 0 if the layers are unstacked, else 1."""
        return 0 if is_unstacked(self.parts[0].own_k) else 1

    def grown(self, max_new_tokens: int) -> KVCache:
        """Returns the cache with columns for `max_new_tokens` tokens per row.

        Call it before any column is reused.
        """
        return self.replace(parts=tuple(part.grown(max_new_tokens) for part in self.parts))


def own_columns(max_new_tokens: int, window: int | None) -> int:
    """Returns the number of columns for `max_new_tokens` tokens in layers with a window."""
    return max_new_tokens if window is None else min(max_new_tokens, window)


def last_tokens(valid_PS: Array, window: int | None) -> Callable[[Array], Array]:
    """Returns a function that takes the last `window` real tokens of each prompt.

    It maps [P, S, ...] to [P, window, ...]. Prompts with fewer real tokens keep padding before
    them. It returns its argument if the window is None or at least S.
    """
    if window is None or window >= valid_PS.shape[1]:
        return lambda x_PS: x_PS
    # The stable sort puts padding first, then real tokens in order, so the last columns are the
    # last real tokens wherever the padding was.
    index_PW = jnp.argsort(valid_PS.astype(bool), axis=1, stable=True)[:, -window:]
    return lambda x_PS: jnp.take_along_axis(
        x_PS, index_PW.reshape(*index_PW.shape, *[1] * (x_PS.ndim - 2)), axis=1
    )


def write_token(part: CacheEntry, new_B1NK: Array, column: Array, kind: CacheKind) -> CacheEntry:
    """Returns keys or values [..., B, N, C, K] with one token written to a column.

    new_B1NK: the token's keys or values, [..., B, 1, N, K].
    """
    return part.with_token(cache_entry(jnp.swapaxes(new_B1NK, -3, -2), kind), column)


def attend_cached(
    q_B1HK: Array,
    k_B1NK: Array,
    v_B1NK: Array,
    layer: tuple[CacheEntry, CacheEntry, CacheEntry, CacheEntry],
    visible_BS: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Returns the attention output of one new token over its prompt, its row's tokens and itself.

    The new key and value are passed separately and not read from the cache. Because the cache is
    read-only here, a scan over layers returns one token per layer, and the caller writes all layers
    with one in-place update.

    Args:
        q_B1HK: Query of the new token.
        k_B1NK: Its key.
        v_B1NK: Its value.
        layer: One layer of `WindowCache.by_layer`.
        visible_BS: Whether the token sees each key of prompt and row (`WindowCache.visible`).
        scale: Factor of q k^T; None: 1 / sqrt(K).
        cap: See `attention.soft_cap`.
    """
    prompt_k, prompt_v, own_k, own_v = layer
    batch, _, heads, head_dim = q_B1HK.shape
    prompts, kv_heads, length, _ = prompt_k.values.shape
    grouped = (prompts, batch // prompts, kv_heads, heads // kv_heads)
    q_BNGK = q_B1HK.reshape(batch, kv_heads, -1, head_dim)
    # One product for all queries that read the same keys of a prompt: [P, N, samples x group, K].
    q_PNXK = jnp.swapaxes(q_B1HK.reshape(*grouped, head_dim), 1, 2).reshape(
        prompts, kv_heads, -1, head_dim
    )
    prompt_PNXS = _logits(q_PNXK, prompt_k)
    prompt_BNGS = jnp.swapaxes(
        prompt_PNXS.reshape(prompts, kv_heads, grouped[1], grouped[3], length), 1, 2
    ).reshape(batch, kv_heads, -1, length)
    own_BNGC = _logits(q_BNGK, own_k)
    self_BNG = precision.einsum("bngk,bnk->bng", q_BNGK, k_B1NK[:, 0], dtype=jnp.float32)
    scale = head_dim**-0.5 if scale is None else scale
    past = jnp.where(
        visible_BS[:, None, None, :],
        soft_cap(jnp.concatenate([prompt_BNGS, own_BNGC], axis=-1) * scale, cap),
        MASKED,
    )
    own = soft_cap(self_BNG[..., None] * scale, cap)
    most = jnp.maximum(jnp.max(past, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(past - most), jnp.exp(own - most)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    weights, own = weights / total, own / total
    prompt_PNXS = jnp.swapaxes(weights[..., :length].reshape(*grouped, length), 1, 2).reshape(
        prompts, kv_heads, -1, length
    )
    out_PNXK = _mixed(prompt_PNXS, prompt_v, v_B1NK.dtype)
    out_BNGK = jnp.swapaxes(
        out_PNXK.reshape(prompts, kv_heads, grouped[1], grouped[3], head_dim), 1, 2
    ).reshape(batch, kv_heads, -1, head_dim)
    own_BNGK = _mixed(weights[..., length:], own_v, v_B1NK.dtype)
    out_BNGK = rounded_sum(out_BNGK, own_BNGK, own.astype(v_B1NK.dtype) * v_B1NK[:, 0, :, None, :])
    return out_BNGK.reshape(batch, 1, heads, head_dim)


def _logits(q_BNXK: Array, k_BNSK: CacheEntry) -> jax.Array:
    """Returns q k^T, float32 [B, N, X, S]."""
    if k_BNSK.turned:
        q_BNXK, k_BNKS = q_BNXK.astype(jnp.float32), k_BNSK.values.astype(jnp.float32)
        logits = jnp.sum(q_BNXK[..., None] * k_BNKS[:, :, None], axis=-2)
        return logits if k_BNSK.scale is None else logits * k_BNSK.scale[:, :, None, :]
    logits = precision.einsum(
        "bnxk,bnsk->bnxs", q_BNXK, k_BNSK.values.astype(q_BNXK.dtype), dtype=jnp.float32
    )
    return logits if k_BNSK.scale is None else logits * k_BNSK.scale[:, :, None, :]


def _mixed(weights_BNXS: Array, v_BNSK: CacheEntry, dtype: jnp.dtype) -> jax.Array:
    """Returns weights times values; the scale of an int8 value is multiplied into its weight."""
    if v_BNSK.scale is not None:
        weights_BNXS = weights_BNXS * v_BNSK.scale[:, :, None, :]
    return precision.einsum(
        "bnxs,bnsk->bnxk", weights_BNXS.astype(dtype), v_BNSK.values.astype(dtype)
    )
