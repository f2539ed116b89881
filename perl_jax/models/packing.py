"""Packing: the real tokens of a batch, each once, side by side; attention alone sees padded
sequences.

All that a decoder does with a token by itself (projections, feed-forward layers, norms: nine tenths
of its operations and more) is done on packed rows [W, U]: padding is left out, and so are all but
the first copy of what the rows of a group begin with together (a prompt's samples, a pair's
prompt). Attention is what relates tokens, and gets queries, keys and values where they stand in
their sequences [B, T]: every attention path works unchanged, and no token can see another
sequence's.

Both ways are gathers, and so are both gradients: a scatter would be serial on TPUs. U is the only
size that has to be known beforehand (`types.Layout.slots`); W parts of rows keep their tokens on
their devices.
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
    """Where tokens stand in packed rows. b = B / W rows lie in one packed row.

    slot_BT: each real token's place among the U of its packed row; copies have one place.
    token_WU: the place [b T] of the token that a slot holds; filled_WU: slots that hold one.
    own_BT: real tokens that are not copies. shared_BT: tokens of shared prompts, in every row of
    their group. group: consecutive rows that may share slots.
    """

    slot_BT: Array
    token_WU: Array
    filled_WU: Array
    own_BT: Array
    shared_BT: Array
    group: int = flax.struct.field(pytree_node=False)

    @property
    def parts(self) -> int:
        """W."""
        return self.token_WU.shape[0]

    def packed(self, x_BT: Array) -> jax.Array:
        """[B, T, ...] -> [W, U, ...]; spare slots hold the first token of their part."""
        return gather(_by_part(x_BT, self.parts), self.token_WU)

    def spread(self, x_WU: Array) -> jax.Array:
        """[W, U, ...] -> [B, T, ...]; padding gets any token's numbers."""
        spread = gather(x_WU, _by_part(self.slot_BT, self.parts))
        return spread.reshape(*self.slot_BT.shape, *x_WU.shape[2:])

    def spread_gradient(self, cotangent_BT: Array) -> jax.Array:
        """[W, U, ...]: a slot's gradient is its own token's and its copies' together."""
        if self.group > 1:
            # The copies' part goes to the group's first row.
            grouped = cotangent_BT.reshape(-1, self.group, *cotangent_BT.shape[1:])
            shared_PT = self.shared_BT[:: self.group]
            # One after the other: a sum over the axis is slow in XLA's CPU backend. In float32, as
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
        """[B, T, ...]: copies and padding have no gradient."""
        return _masked(self.spread(cotangent_WU), self.own_BT)

    def slot_at(self, column_BY: Array) -> jax.Array:
        """[W, b Y]: the slots that hold the tokens at these columns of each row."""
        return _by_part(jnp.take_along_axis(self.slot_BT, column_BY, axis=1), self.parts)

    def read(self, x_WU: Array, place_WY: Array) -> jax.Array:
        """[W, Y, ...]: what the slots hold of the tokens at places [b T] of each part."""
        return gather(x_WU, gather(_by_part(self.slot_BT, self.parts), place_WY))

    def to_sequences(self, x_WU: Array) -> jax.Array:
        """`spread` with a gradient by gathers."""
        return _to_sequences(self, x_WU)

    def attending(self, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """attend over sequences [B, T, heads, K] as a function of packed tokens [W, U, heads,
        K].
        """

        def over_packed(*qkv: Array) -> jax.Array:
            return _to_packed(self, attend(*(_to_sequences(self, x_WUHK) for x_WUHK in qkv)))

        return over_packed


def pack(tokens: Tokens) -> Packing | None:
    """The packing that a batch's layout asks for; None: the batch stays padded."""
    layout = tokens.layout
    if layout is None:
        return None
    chex.assert_is_divisible(tokens.tokens_BT.shape[0], layout.parts * layout.group)
    valid_BT, response_BT = (
        jnp.asarray(tokens.valid_BT, bool),
        jnp.asarray(tokens.response_BT, bool),
    )
    first_B = jnp.arange(valid_BT.shape[0]) % layout.group == 0
    # What follows a response (the end of a chat template's turn) is each row's own.
    shared_BT = valid_BT & (jnp.cumsum(response_BT, axis=1) == 0) & (layout.group > 1)
    own_BT = valid_BT & (first_B[:, None] | ~shared_BT)
    own_WX = _by_part(own_BT, layout.parts)
    place_WX = jnp.cumsum(own_WX, axis=1) - 1
    # A copy has the place of the same column in its group's first row.
    place_PGT = place_WX.reshape(-1, layout.group, valid_BT.shape[1])
    place_BT = jnp.where(
        shared_BT,
        jnp.repeat(place_PGT[:, 0], layout.group, axis=0),
        place_WX.reshape(valid_BT.shape),
    )
    slot_BT = jnp.where(valid_BT, place_BT, 0)
    token_WU = jax.vmap(lambda own_X: jnp.nonzero(own_X, size=layout.room, fill_value=0)[0])(own_WX)
    filled_WU = jnp.arange(layout.room)[None, :] < jnp.sum(own_WX, axis=1, keepdims=True)
    return Packing(slot_BT, token_WU, filled_WU, own_BT, shared_BT, layout.group)


def _by_part(x_BT: Array, parts: int) -> jax.Array:
    """[B, T, ...] -> [W, b T, ...]."""
    return jnp.reshape(x_BT, (parts, -1, *x_BT.shape[2:]))


def gather(x_WX: Array, index_WY: Array) -> jax.Array:
    """Each row's entries by its own indices."""
    take = lambda x_X, index_Y: jnp.take(x_X, index_Y, axis=0, mode="clip")
    return jax.vmap(take)(x_WX, index_WY)


def _masked(x: Array, mask: Array) -> jax.Array:
    """x where the mask of its leading axes is True, 0 elsewhere."""
    return jnp.where(_wide(mask, x.ndim), x, 0)


def _wide(mask: Array, ndim: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


@jax.custom_vjp
def _to_sequences(packing: Packing, x_WU: jax.Array) -> jax.Array:
    """`spread` with a gradient by gathers."""
    return packing.spread(x_WU)


_to_sequences.defvjp(
    lambda packing, x_WU: (packing.spread(x_WU), packing),
    lambda packing, cotangent_BT: (None, packing.spread_gradient(cotangent_BT)),
)


@jax.custom_vjp
def _to_packed(packing: Packing, x_BT: jax.Array) -> jax.Array:
    """`packed` with a gradient by a gather."""
    return packing.packed(x_BT)


_to_packed.defvjp(
    lambda packing, x_BT: (packing.packed(x_BT), packing),
    lambda packing, cotangent_WU: (None, packing.packed_gradient(cotangent_WU)),
)


def chosen(
    packing: Packing, wanted_BT: Array, number: int
) -> tuple[jax.Array, Callable[[Array], jax.Array]]:
    """At most `number` wanted tokens of each part: their places [W, number] in it, and what puts
    numbers back.

    The second is a function from [W, number] to [B, T], 0 elsewhere.
    """
    wanted_WX = _by_part(jnp.asarray(wanted_BT, bool), packing.parts)
    place_WY = jax.vmap(lambda wanted_X: jnp.nonzero(wanted_X, size=number, fill_value=1)[0])(
        wanted_WX
    )
    rank_WX = jnp.where(wanted_WX, jnp.cumsum(wanted_WX, axis=1) - 1, 0)
    back = lambda x_WY: jnp.where(wanted_BT, gather(x_WY, rank_WX).reshape(wanted_BT.shape), 0)
    return place_WY, back


def of_tokens(packing: Packing, x_BT: Array, place_WY: Array) -> jax.Array:
    """[W, Y]: what tokens at places [b T] of each part have."""
    return gather(_by_part(x_BT, packing.parts), place_WY)
