"""The key/value cache of decoding: keys and values of each prompt once, and of each response.

The samples of a prompt are consecutive rows and read one copy of its keys and values. The tokens
that a row has decoded have columns of their own. In one step all rows write into the same column,
which is one in-place update. Columns are reused in turn (a ring buffer), so that rows may start at
different steps. A row that decodes at most as many tokens as there are columns never overwrites its
own tokens. Layers with a sliding window keep no more tokens than the window holds, of the prompt
and of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.models.attention import within_window
from perl_jax.types import Array

CACHES = ("auto", "float32", "bfloat16", "int8")
CacheKind = Literal["auto", "float32", "bfloat16", "int8"]


@flax.struct.dataclass
class CacheEntry:
    """Keys or values in the cache.

    Attributes:
        values: Keys or values [..., S, K] of S tokens.
        scale: For int8 values: the factor [..., S] of each token and head that turns them into real
            values. None: no scale.
    """

    values: Array
    scale: Array | None = None

    def grown(self, more: int) -> CacheEntry:
        """Returns the entry with `more` further token columns of zeros after the last column."""
        pad = lambda x, axis: jnp.pad(
            x, [(0, more if i == x.ndim + axis else 0) for i in range(x.ndim)]
        )
        return CacheEntry(pad(self.values, -2), None if self.scale is None else pad(self.scale, -1))

    def with_token(self, new: CacheEntry, column: Array) -> CacheEntry:
        """Returns the entry with one token written to a column.

        Args:
            new: Entry of the token, with values [..., 1, K] and of the same kind (`cache_entry`).
            column: Index of the column, a scalar.
        """
        put = lambda old, x, axis: jax.lax.dynamic_update_slice_in_dim(
            old, x.astype(old.dtype), column, axis=x.ndim + axis
        )
        return CacheEntry(
            put(self.values, new.values, -2),
            None if self.scale is None else put(self.scale, new.scale, -1),
        )

    def vacant(self, rows: int, columns: int) -> CacheEntry:
        """Returns an entry of zeros of the same dtype for `rows` rows of `columns` tokens."""
        *layers, _, heads, _, width = self.values.shape
        zeros = lambda x, *last: jnp.zeros((*layers, rows, heads, columns, *last), x.dtype)
        return CacheEntry(
            zeros(self.values, width), None if self.scale is None else zeros(self.scale)
        )


def cache_entry(x_SK: Array, kind: CacheKind) -> CacheEntry:
    """Returns keys or values as a cache entry of the given kind.

    Args:
        x_SK: Keys or values [..., S, K].
        kind: auto: their own dtype; float32, bfloat16: this dtype; int8: round(127 x / max|x|),
            with one scale per token and head.
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
    """

    prompt_k: CacheEntry
    prompt_v: CacheEntry
    own_k: CacheEntry
    own_v: CacheEntry
    prompt_visible_PS: Array
    prompt_position_PS: Array
    own_visible_BC: Array
    own_position_BC: Array
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def by_layer(self) -> tuple[CacheEntry, CacheEntry, CacheEntry, CacheEntry]:
        """(prompt_k, prompt_v, own_k, own_v), each stacked over layers.

        The entries of one layer are the argument `layer` of `decoding.attend_cached`.
        """
        return self.prompt_k, self.prompt_v, self.own_k, self.own_v

    @property
    def samples(self) -> int:
        """G, the number of rows per prompt."""
        return self.own_visible_BC.shape[0] // self.prompt_visible_PS.shape[0]

    def column(self, step: Array) -> jax.Array:
        """Returns the index of the own column that the token of decoding step `step` is written to.

        The own columns are a ring buffer: the index is `step` modulo their number. `step` is the
        number of decoding steps before.
        """
        return step % self.own_visible_BC.shape[1]

    def visible(self, position_B: Array) -> jax.Array:
        """Returns a mask [B, S + C]: True where a row's next token sees the key in a column.

        The S columns of the prompt come before the C columns of the row.

        Args:
            position_B: Rotary position of each row's next token.
        """
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
        """Returns the cache with room for `max_new_tokens` decoded tokens per row.

        The new columns come last and are empty. With a window there are at most as many own columns
        as the window is long.

        Args:
            max_new_tokens: Number of decoded tokens in total, the tokens that the cache already
                holds included.
        """
        more = own_columns(max_new_tokens, self.window) - self.own_visible_BC.shape[1]
        pad = lambda x_BC: jnp.pad(x_BC, ((0, 0), (0, more)))
        return dataclasses.replace(
            self,
            own_k=self.own_k.grown(more),
            own_v=self.own_v.grown(more),
            own_visible_BC=pad(self.own_visible_BC),
            own_position_BC=pad(self.own_position_BC),
        )

    def appended(
        self, k_LB1NK: Array, v_LB1NK: Array, position_B: Array, step: Array, kind: CacheKind
    ) -> WindowCache:
        """Returns the cache with every row's newest token written to the column of this step.

        Args:
            k_LB1NK: Keys of the token in the layers of this part.
            v_LB1NK: Values of the token in these layers.
            position_B: Rotary position of the token.
            step: Number of decoding steps before this one, a scalar.
            kind: Dtype of the cache (`cache_entry`).
        """
        column = self.column(step)
        entry = lambda new_LB1NK: cache_entry(jnp.swapaxes(new_LB1NK, -3, -2), kind)
        here_C = jnp.arange(self.own_visible_BC.shape[1]) == column
        return dataclasses.replace(
            self,
            own_k=self.own_k.with_token(entry(k_LB1NK), column),
            own_v=self.own_v.with_token(entry(v_LB1NK), column),
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

    def grown(self, max_new_tokens: int) -> KVCache:
        """Returns the cache with room for `max_new_tokens` decoded tokens per row.

        With a window there are at most as many own columns as the window is long. Call it before
        the ring buffer overwrites a column, because new columns come after the existing ones.

        Args:
            max_new_tokens: Number of decoded tokens in total, the tokens that the cache already
                holds included.
        """
        return dataclasses.replace(
            self, parts=tuple(part.grown(max_new_tokens) for part in self.parts)
        )


def own_columns(max_new_tokens: int, window: int | None) -> int:
    """Returns the number of columns for `max_new_tokens` decoded tokens: at most the window.

    Args:
        max_new_tokens: Largest number of decoded tokens per row.
        window: Number of tokens that a token sees, itself included; None: all tokens before it.
    """
    return max_new_tokens if window is None else min(max_new_tokens, window)


def last_tokens(valid_PS: Array, window: int | None) -> Callable[[Array], Array]:
    """Returns a function that takes the last `window` real tokens of each prompt.

    It maps [P, S, ...] to [P, window, ...]. Prompts with fewer real tokens keep padding before the
    real tokens. If the window is None or at least S, it returns its argument.

    Args:
        valid_PS: True on real tokens of the prompts; padding may be on either side.
        window: Number of tokens to take; None: all.
    """
    if window is None or window >= valid_PS.shape[1]:
        return lambda x_PS: x_PS
    # The stable sort puts padding first, then real tokens in order, so the last columns are the
    # last real tokens wherever the padding was.
    index_PW = jnp.argsort(valid_PS.astype(bool), axis=1, stable=True)[:, -window:]
    return lambda x_PS: jnp.take_along_axis(
        x_PS, index_PW.reshape(*index_PW.shape, *[1] * (x_PS.ndim - 2)), axis=1
    )
