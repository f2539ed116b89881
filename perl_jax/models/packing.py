"""Packing: a batch's real tokens side by side in a few rows, each token once.

Most of a decoder computes each token by itself: projections, feed-forward layers and norms are over
nine tenths of its operations. On packed rows [W, U] they skip padding, and all copies but one of
the prompt that the rows of a group share (a prompt's samples, or the two responses of a
comparison). Only attention relates tokens. It gets queries, keys and values unpacked, in their
sequences [B, T]. So every attention implementation works unchanged, and no token sees another
sequence.

Packing and unpacking are gathers, and so are their gradients, because a scatter would run serially
on TPUs. Only U must be known beforehand (`types.Layout.capacity`). W packed rows keep their tokens
on their devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.runtime.masked import at_least_float32
from perl_jax.types import Array, Tokens


@flax.struct.dataclass
class Packing:
    """Where the tokens of a batch are in packed rows. b = B / W rows share one packed row.

    Attributes:
        index_BT: Index of each real token in its packed row. Copies have the same index.
        token_WU: Index in [b T], the tokens of the part's rows, of the token at each position of a
            packed row.
        filled_WU: True on positions of packed rows that hold a token.
        own_BT: True on real tokens that are not copies.
        shared_BT: True on the tokens of shared prompts, in every row of their group.
        group: Number of consecutive rows that may share tokens (static).
    """

    index_BT: Array
    token_WU: Array
    filled_WU: Array
    own_BT: Array
    shared_BT: Array
    group: int = flax.struct.field(pytree_node=False)

    @property
    def parts(self) -> int:
        """W, the number of packed rows."""
        return self.token_WU.shape[0]

    def packed(self, x_BT: Array) -> jax.Array:
        """Returns [W, U, ...] from [B, T, ...]; empty positions hold their part's first entry."""
        return gather(_by_part(x_BT, self.parts), self.token_WU)

    def spread(self, x_WU: Array) -> jax.Array:
        """Returns [B, T, ...] from [W, U, ...]; padding holds arbitrary values."""
        spread = gather(x_WU, _by_part(self.index_BT, self.parts))
        return spread.reshape(*self.index_BT.shape, *x_WU.shape[2:])

    def spread_gradient(self, cotangent_BT: Array) -> jax.Array:
        """Returns the gradient [W, U, ...] of `spread`'s input: summed over a token and its copies.

        Args:
            cotangent_BT: Gradient of the spread output.
        """
        if self.group > 1:
            # The gradients of all copies are added to the group's first row.
            grouped = cotangent_BT.reshape(-1, self.group, *cotangent_BT.shape[1:])
            shared_PT = self.shared_BT[:: self.group]
            # Added one by one, because XLA's CPU backend sums over this axis slowly; in float32, as
            # a sum would be.
            total_PT = functools.reduce(
                jnp.add, (at_least_float32(grouped[:, row]) for row in range(self.group))
            ).astype(grouped.dtype)
            first_PT = jnp.where(_wide(shared_PT, grouped.ndim - 1), total_PT, grouped[:, 0])
            cotangent_BT = jnp.concatenate([first_PT[:, None], grouped[:, 1:]], axis=1).reshape(
                cotangent_BT.shape
            )
        return _masked(self.packed(cotangent_BT), self.filled_WU)

    def packed_gradient(self, cotangent_WU: Array) -> jax.Array:
        """Returns the gradient [B, T, ...] of `packed`'s input: 0 on copies and on padding.

        Args:
            cotangent_WU: Gradient of the packed output.
        """
        return _masked(self.spread(cotangent_WU), self.own_BT)

    def packed_index(self, column_BY: Array) -> jax.Array:
        """Returns [W, b Y]: the indices in packed rows of the tokens in some columns.

        Args:
            column_BY: Y columns of each row.
        """
        return _by_part(jnp.take_along_axis(self.index_BT, column_BY, axis=1), self.parts)

    def read_tokens(self, x_WU: Array, taken_WY: Array) -> jax.Array:
        """Returns [W, Y, ...]: the packed values of some tokens.

        Args:
            x_WU: Values of packed tokens, [W, U, ...].
            taken_WY: Indices of the tokens in [b T] of each part.
        """
        return gather(x_WU, gather(_by_part(self.index_BT, self.parts), taken_WY))

    def to_sequences(self, x_WU: Array) -> jax.Array:
        """Returns `spread(x_WU)`, [B, T, ...], with a gradient that is computed by gathers."""
        return _to_sequences(self, x_WU)

    def unpacked(self, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Returns `attend` as a function of packed queries, keys and values [W, U, heads, K].

        Args:
            attend: Attention over sequences: (queries, keys, values) [B, T, heads, K] -> [B, T, H,
                K].
        """

        def over_packed(*qkv: Array) -> jax.Array:
            return _to_packed(self, attend(*(_to_sequences(self, x_WUHK) for x_WUHK in qkv)))

        return over_packed


def pack(tokens: Tokens) -> Packing | None:
    """Returns the packing that the batch's layout describes; None if it has no layout."""
    layout = tokens.layout
    if layout is None:
        return None
    chex.assert_is_divisible(tokens.tokens_BT.shape[0], layout.parts * layout.group)
    valid_BT, response_BT = (
        jnp.asarray(tokens.valid_BT, bool),
        jnp.asarray(tokens.response_BT, bool),
    )
    first_B = jnp.arange(valid_BT.shape[0]) % layout.group == 0
    # Tokens after a response (the end of a chat template's turn) are not shared.
    shared_BT = valid_BT & (jnp.cumsum(response_BT, axis=1) == 0) & (layout.group > 1)
    own_BT = valid_BT & (first_B[:, None] | ~shared_BT)
    own_WX = _by_part(own_BT, layout.parts)
    packed_WX = jnp.cumsum(own_WX, axis=1) - 1
    # A copy has the index of the same column in its group's first row.
    packed_PGT = packed_WX.reshape(-1, layout.group, valid_BT.shape[1])
    packed_BT = jnp.where(
        shared_BT,
        jnp.repeat(packed_PGT[:, 0], layout.group, axis=0),
        packed_WX.reshape(valid_BT.shape),
    )
    index_BT = jnp.where(valid_BT, packed_BT, 0)
    token_WU = jax.vmap(
        lambda own_X: jnp.nonzero(own_X, size=layout.total_capacity, fill_value=0)[0]
    )(own_WX)
    filled_WU = jnp.arange(layout.total_capacity)[None, :] < jnp.sum(own_WX, axis=1, keepdims=True)
    return Packing(index_BT, token_WU, filled_WU, own_BT, shared_BT, layout.group)


def _by_part(x_BT: Array, parts: int) -> jax.Array:
    """Returns [W, b T, ...] from [B, T, ...]: the tokens of each part's b = B / W rows joined."""
    return jnp.reshape(x_BT, (parts, -1, *x_BT.shape[2:]))


def gather(x_WX: Array, index_WY: Array) -> jax.Array:
    """Returns the entries [W, Y, ...] of each row of x at the row's own indices.

    Args:
        x_WX: Rows of X entries, [W, X, ...].
        index_WY: Indices of Y entries per row; indices outside the row are clipped to its first or
            last entry.
    """
    take = lambda x_X, index_Y: jnp.take(x_X, index_Y, axis=0, mode="clip")
    return jax.vmap(take)(x_WX, index_WY)


def _masked(x: Array, mask: Array) -> jax.Array:
    """Returns x where the mask of its leading axes is True, and 0 elsewhere."""
    return jnp.where(_wide(mask, x.ndim), x, 0)


def _wide(mask: Array, ndim: int) -> jax.Array:
    """Returns the mask with trailing axes of size 1, up to `ndim` dimensions."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


@jax.custom_vjp
def _to_sequences(packing: Packing, x_WU: jax.Array) -> jax.Array:
    """Returns packing.spread(x_WU): [B, T, ...] from packed [W, U, ...].

    Its gradient is computed by gathers.
    """
    return packing.spread(x_WU)


_to_sequences.defvjp(
    lambda packing, x_WU: (packing.spread(x_WU), packing),
    lambda packing, cotangent_BT: (None, packing.spread_gradient(cotangent_BT)),
)


@jax.custom_vjp
def _to_packed(packing: Packing, x_BT: jax.Array) -> jax.Array:
    """Returns packing.packed(x_BT): packed [W, U, ...] from [B, T, ...].

    Its gradient is computed by a gather.
    """
    return packing.packed(x_BT)


_to_packed.defvjp(
    lambda packing, x_BT: (packing.packed(x_BT), packing),
    lambda packing, cotangent_WU: (None, packing.packed_gradient(cotangent_WU)),
)


def select_tokens(
    packing: Packing, wanted_BT: Array, number: int
) -> tuple[jax.Array, Callable[[Array], jax.Array]]:
    """Returns the places of the wanted tokens, and a function that maps their values back.

    The places are indices in [b T] of each part, int32 [W, number]; surplus places are 1. The
    function maps values [W, number] of the selected tokens to [B, T], 0 elsewhere.

    Args:
        packing: How the batch is packed.
        wanted_BT: True on wanted tokens.
        number: Number of places, at least the number of wanted tokens of any part.
    """
    wanted_WX = _by_part(jnp.asarray(wanted_BT, bool), packing.parts)
    taken_WY = jax.vmap(lambda wanted_X: jnp.nonzero(wanted_X, size=number, fill_value=1)[0])(
        wanted_WX
    )
    rank_WX = jnp.where(wanted_WX, jnp.cumsum(wanted_WX, axis=1) - 1, 0)
    back = lambda x_WY: jnp.where(wanted_BT, gather(x_WY, rank_WX).reshape(wanted_BT.shape), 0)
    return taken_WY, back


def token_values(packing: Packing, x_BT: Array, taken_WY: Array) -> jax.Array:
    """Returns [W, Y]: the values of some tokens of a padded array.

    Args:
        packing: How the batch is packed.
        x_BT: One value per token of the padded batch.
        taken_WY: Indices of the tokens in [b T] of each part.
    """
    return gather(_by_part(x_BT, packing.parts), taken_WY)
