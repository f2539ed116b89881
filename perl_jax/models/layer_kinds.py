"""What differs from layer to layer besides weights: which have an adapter, windows, rotary
tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from perl_jax.models import attention
from perl_jax.models.config import ModelConfig, Rope
from perl_jax.types import Array, Tree


def runs(chosen: tuple[int, ...], number: int, apart: bool = False) -> list[tuple[int, int, bool]]:
    """Runs of consecutive layers that all have an adapter, or all have none: (start, stop,
    adapted). apart: the last layer is a run.
    """
    found: list[tuple[int, int, bool]] = []
    for index in range(number):
        adapted = index in chosen
        if found and found[-1][2] == adapted and not (apart and index == number - 1):
            found[-1] = (found[-1][0], index + 1, adapted)
        else:
            found.append((index, index + 1, adapted))
    return found


# Layers that a turn of a scan inlines at most.
LONGEST_TURN = 8


def turns(kinds: Sequence[Hashable], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cuts layers start to stop into scans (start, stop, period), of which each turn is `period`
    layers with the same kinds in each turn.

    As few layers as possible are inlined in all turns together, then in as few scans as possible,
    the first as long as can be: five local layers and a global one, four times, and two local ones
    are (0, 24, 6), (24, 26, 1).
    """
    best: dict[int, tuple[int, int, list]] = {stop: (0, 0, [])}
    for first in range(stop - 1, start - 1, -1):
        found = []
        for period in range(1, min(LONGEST_TURN, stop - first) + 1):
            for end in range(first + period, stop + 1, period):
                if tuple(kinds[end - period : end]) != tuple(kinds[first : first + period]):
                    break
                inlined, scans, rest = best[end]
                found.append((period + inlined, 1 + scans, [(first, end, period), *rest]))
        best[first] = min(found, key=lambda cut: (cut[0], cut[1], -cut[2][0][1]))
    return best[start][2]


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """What differs from layer to layer besides weights: rotary tables and windows.

    Models whose layers are all alike carry nothing through the layer scan; in the others each layer
    has the number of its rotary table and its window.

    cos_J, sin_J: a table for each different rotary embedding. by_layer: {rope, window}, int32 [L].
    """

    cos_J: tuple[jax.Array, ...]
    sin_J: tuple[jax.Array, ...]
    by_layer: Tree | None
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig, positions_BT: Array) -> LayerKinds:
        windowed, unrotated = set(config.windowed), set(config.unrotated)
        local = config.local_rope or config.rope
        ropes = [
            None if i in unrotated else local if i in windowed else config.rope
            for i in range(config.layers)
        ]
        different = list(dict.fromkeys(ropes))
        tables = [_rotary_table(positions_BT, config.head_dim, rope) for rope in different]
        cos_J, sin_J = zip(*tables, strict=True)
        if len(different) == 1 and len(windowed) in (0, config.layers):
            return cls(cos_J, sin_J, None, config.window if windowed else None)
        # Further back than any position: no window.
        window_L = [config.window if i in windowed else 2**30 for i in range(config.layers)]
        rope_L = [different.index(rope) for rope in ropes]
        return cls(
            cos_J,
            sin_J,
            {"rope": jnp.array(rope_L, jnp.int32), "window": jnp.array(window_L, jnp.int32)},
            None,
        )

    def rotary(self, kind: Tree | None) -> tuple[jax.Array, jax.Array]:
        """cos and sin of a layer."""
        if len(self.cos_J) == 1:
            return self.cos_J[0], self.sin_J[0]
        return jnp.stack(self.cos_J)[kind["rope"]], jnp.stack(self.sin_J)[kind["rope"]]

    def mask(
        self, kind: Tree | None, mask_BTS: Array, query_positions_BT: Array, key_positions_BS: Array
    ) -> Array:
        """The mask of a layer: its window's share of `mask_BTS`."""
        window = self.window if kind is None else kind["window"]
        return (
            mask_BTS
            if window is None
            else mask_BTS & attention.within(window, query_positions_BT, key_positions_BS)
        )


def _rotary_table(
    positions_BT: Array, head_dim: int, rope: Rope | None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin; without a rope those of angle 0, which leave queries and keys bit for bit as
    they are.
    """
    if rope is not None:
        return attention.rotary_angles(positions_BT, head_dim, rope)
    shape = (*positions_BT.shape, 1, head_dim // 2)
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
