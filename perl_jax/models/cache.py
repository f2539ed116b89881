"""The cache of keys and values that decoding reads: each prompt's once, and each response's own.

The samples of a prompt are rows next to each other and read one copy of its keys and values
together. What a row has decoded lies in columns of its own, at one common column for all rows: one
in-place write a step. The columns are used in turn, so that rows may begin at different steps; a
row that decodes no more tokens than there are columns never meets its own end. Layers with a
sliding window keep no more tokens than the window has, of the prompt and of the row: there the
columns go round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.models.attention import MASKED, capped, rounded_sum, within
from perl_jax.models.stacks import Apart, each, is_apart
from perl_jax.runtime import precision
from perl_jax.types import Array

CACHES = ("auto", "float32", "bfloat16", "int8")
CacheKind = Literal["auto", "float32", "bfloat16", "int8"]


@flax.struct.dataclass
class Kept:
    """Keys or values [..., S, K]; int8 ones with a scale [..., S] for each token and head. turned:
    [..., K, S].
    """

    values: Array
    scale: Array | None = None
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    def grown(self, more: int) -> Kept:
        """With so many more tokens' room behind the last."""
        pad = lambda x, axis: jnp.pad(
            x, [(0, more if i == x.ndim + axis else 0) for i in range(x.ndim)]
        )
        return self.replace(
            values=pad(self.values, self._tokens),
            scale=None if self.scale is None else pad(self.scale, -1),
        )

    def written(self, new: Kept, column: Array) -> Kept:
        """With one token's [..., 1, K], kept in the same way but never turned, in a column."""
        put = lambda slots, x, axis: jax.lax.dynamic_update_slice_in_dim(
            slots, x.astype(slots.dtype), column, axis=x.ndim + axis
        )
        values = put(
            self.values,
            jnp.swapaxes(new.values, -2, -1) if self.turned else new.values,
            self._tokens,
        )
        return self.replace(
            values=values, scale=None if self.scale is None else put(self.scale, new.scale, -1)
        )

    def vacant(self, rows: int, room: int, turned: bool = False) -> Kept:
        """Zeros for so many rows and tokens, kept in the same way. Of one that is not turned."""
        *layers, _, heads, _, width = self.values.shape
        zeros = lambda x, *last: jnp.zeros((*layers, rows, heads, *last), x.dtype)
        values = zeros(self.values, *((width, room) if turned else (room, width)))
        return Kept(values, None if self.scale is None else zeros(self.scale, room), turned)

    @property
    def _tokens(self) -> int:
        """The axis of tokens in the values."""
        return -1 if self.turned else -2


def keep(x_SK: Array, kind: CacheKind) -> Kept:
    """Keys or values as the cache holds them; auto: as they are. int8: round(127 x / max|x|) a
    token and head.
    """
    if kind == "auto":
        return Kept(x_SK)
    if kind != "int8":
        return Kept(x_SK.astype(kind))
    x_SK = x_SK.astype(jnp.float32)
    scale_S = jnp.maximum(jnp.max(jnp.abs(x_SK), axis=-1), 1e-30) / 127
    return Kept(jnp.round(x_SK / scale_S[..., None]).astype(jnp.int8), scale_S)


@flax.struct.dataclass
class Part:
    """Keys and values of the layers that have one window, or of those that have none. P prompts, B
    = P G rows.

    prompt_k, prompt_v: [L, P, N, S, K] of left-, right- or unpadded prompts, prompt_visible_PS
    their real tokens, prompt_position_PS the positions of these. own_k, own_v: [L, B, N, C, K] of
    what rows have decoded; own_visible_BC: columns that hold tokens of this row; own_position_BC:
    their rotary positions. window: tokens that a token sees, itself included; None: all before it.
    With a window S is at most the window, the last real tokens of each prompt (`last_tokens`), and
    so is C: token after token goes around them, and the column that is written next holds a token
    that nobody sees any more. Keys and values may lie apart, layer by layer (`stacks.Apart`): own_k
    is turned then, for a CPU, which has nothing but sums of products of it that stand beside each
    other.
    """

    prompt_k: Kept | Apart
    prompt_v: Kept | Apart
    own_k: Kept | Apart
    own_v: Kept | Apart
    prompt_visible_PS: Array
    prompt_position_PS: Array
    own_visible_BC: Array
    own_position_BC: Array
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def by_layer(self) -> tuple[Kept | Apart, Kept | Apart, Kept | Apart, Kept | Apart]:
        """What one layer reads, stacked over layers."""
        return self.prompt_k, self.prompt_v, self.own_k, self.own_v

    @property
    def samples(self) -> int:
        """G, rows that share a prompt."""
        return self.own_visible_BC.shape[0] // self.prompt_visible_PS.shape[0]

    def column(self, step: Array) -> jax.Array:
        """Where the token goes that is decoded after `step` others: the columns are used in
        turn.
        """
        return step % self.own_visible_BC.shape[1]

    def visible(self, position_B: Array) -> jax.Array:
        """[B, S + C]: keys that a token at this position sees of each row, the prompt's first."""
        both = lambda of_prompt_PS, own_BC: jnp.concatenate(
            [jnp.repeat(of_prompt_PS, self.samples, axis=0), own_BC], axis=1
        )
        visible_BS = both(self.prompt_visible_PS, self.own_visible_BC)
        if self.window is None:
            return visible_BS
        return (
            visible_BS
            & within(
                self.window,
                position_B[:, None],
                both(self.prompt_position_PS, self.own_position_BC),
            )[:, 0]
        )

    def grown(self, room: int) -> Part:
        """With more columns for what rows decode, the new ones behind the old."""
        more = own_room(room, self.window) - self.own_visible_BC.shape[1]
        pad = lambda x_BC: jnp.pad(x_BC, ((0, 0), (0, more)))
        return self.replace(
            own_k=each(lambda part: part.grown(more), self.own_k),
            own_v=each(lambda part: part.grown(more), self.own_v),
            own_visible_BC=pad(self.own_visible_BC),
            own_position_BC=pad(self.own_position_BC),
        )

    def appended(
        self, k_LB1NK: Array, v_LB1NK: Array, position_B: Array, step: Array, kind: CacheKind
    ) -> Part:
        """With every row's newest token in its column, in a stack of layers."""
        pairs = ((self.own_k, k_LB1NK), (self.own_v, v_LB1NK))
        return self.advanced(
            *(written(part, new, self.column(step), kind) for part, new in pairs), position_B, step
        )

    def advanced(
        self, own_k: Kept | Apart, own_v: Kept | Apart, position_B: Array, step: Array
    ) -> Part:
        """With the newest token's keys and values, which `written` put into its column."""
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

    parts: by window, in the order of the first layer that has it. position_B: rotary position of
    each row's next token. step: tokens decoded so far by every row, those of rows that were in a
    slot before included.
    """

    parts: tuple[Part, ...]
    position_B: Array
    step: Array

    @property
    def row_axis(self) -> int:
        """The axis of prompts or rows in keys and values: the first where layers are apart."""
        return 0 if is_apart(self.parts[0].own_k) else 1

    def grown(self, room: int) -> KVCache:
        """With room for so many tokens of each row; before any column is used again."""
        return self.replace(parts=tuple(part.grown(room) for part in self.parts))


def own_room(room: int, window: int | None) -> int:
    """Columns for `room` tokens of a row in layers with this window."""
    return room if window is None else min(room, window)


def last_tokens(valid_PS: Array, window: int | None) -> Callable[[Array], Array]:
    """Returns what takes the last `window` real tokens of each prompt out of [P, S, ...]; fewer,
    and padding, where there are no more.
    """
    if window is None or window >= valid_PS.shape[1]:
        return lambda x_PS: x_PS
    # Padding first, then real tokens in their order: wherever padding is, the last columns are the
    # last tokens.
    index_PW = jnp.argsort(valid_PS.astype(bool), axis=1, stable=True)[:, -window:]
    return lambda x_PS: jnp.take_along_axis(
        x_PS, index_PW.reshape(*index_PW.shape, *[1] * (x_PS.ndim - 2)), axis=1
    )


def written(part: Kept, new_B1NK: Array, column: Array, kind: CacheKind) -> Kept:
    """Keys or values [..., B, N, C, K] with those of one token [..., B, 1, N, K] in a column."""
    return part.written(keep(jnp.swapaxes(new_B1NK, -3, -2), kind), column)


def attend_cached(
    q_B1HK: Array,
    k_B1NK: Array,
    v_B1NK: Array,
    layer: tuple[Kept, Kept, Kept, Kept],
    visible_BS: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One new token's attention over its prompt, over what its row has decoded, and over itself.

    layer: one layer of `Part.by_layer`. visible_BS: over prompt and own columns side by side.
    The new key and value are not seen in the cache: keeping it read-only lets a scan over layers
    return one token a layer, and the caller write all layers with a single in-place update.
    """
    prompt_k, prompt_v, own_k, own_v = layer
    batch, _, heads, head_dim = q_B1HK.shape
    prompts, kv_heads, length, _ = prompt_k.values.shape
    grouped = (prompts, batch // prompts, kv_heads, heads // kv_heads)
    q_BNGK = q_B1HK.reshape(batch, kv_heads, -1, head_dim)
    # All queries that read a prompt's keys of one head, in one product: [P, N, samples x group, K].
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
        capped(jnp.concatenate([prompt_BNGS, own_BNGC], axis=-1) * scale, cap),
        MASKED,
    )
    own = capped(self_BNG[..., None] * scale, cap)
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


def _logits(q_BNXK: Array, k_BNSK: Kept) -> jax.Array:
    """q k^T, float32."""
    if k_BNSK.turned:
        q_BNXK, k_BNKS = q_BNXK.astype(jnp.float32), k_BNSK.values.astype(jnp.float32)
        logits = jnp.sum(q_BNXK[..., None] * k_BNKS[:, :, None], axis=-2)
        return logits if k_BNSK.scale is None else logits * k_BNSK.scale[:, :, None, :]
    logits = precision.einsum(
        "bnxk,bnsk->bnxs", q_BNXK, k_BNSK.values.astype(q_BNXK.dtype), dtype=jnp.float32
    )
    return logits if k_BNSK.scale is None else logits * k_BNSK.scale[:, :, None, :]


def _mixed(weights_BNXS: Array, v_BNSK: Kept, dtype: jnp.dtype) -> jax.Array:
    """weights times values; a value's scale goes to its weight."""
    if v_BNSK.scale is not None:
        weights_BNXS = weights_BNXS * v_BNSK.scale[:, :, None, :]
    return precision.einsum(
        "bnxs,bnsk->bnxk", weights_BNXS.astype(dtype), v_BNSK.values.astype(dtype)
    )
