"""What differs between layers besides their weights: adapters, windows, rotary tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from perl_jax.models import attention
from perl_jax.models.config import ModelConfig, Rope
from perl_jax.types import Array, Tree


def adapter_runs(
    adapted_layers: tuple[int, ...], number: int, last_apart: bool = False
) -> list[tuple[int, int, bool]]:
    """Returns runs of consecutive layers that all have an adapter or all have none.

    Each run is (start, stop, whether its layers have an adapter).

    Args:
        adapted_layers: Indices of the layers with an adapter.
        number: Number of layers.
        last_apart: Whether the last layer is a run of its own.
    """
    found: list[tuple[int, int, bool]] = []
    for index in range(number):
        adapted = index in adapted_layers
        if found and found[-1][2] == adapted and not (last_apart and index == number - 1):
            found[-1] = (found[-1][0], index + 1, adapted)
        else:
            found.append((index, index + 1, adapted))
    return found


# Largest number of layers that one repetition of a scan inlines.
LONGEST_PERIOD = 8


def periodic_scans(kinds: Sequence[Hashable], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Returns scans (start, stop, period) that together cover the layers from start to stop.

    A scan repeats `period` consecutive layers, whose kinds are the same in each repetition. Of all
    cuts the result has the smallest sum of periods (layers to compile), then the fewest scans, then
    the longest first scan. Example: four times five local layers and a global one, then two local
    ones, give (0, 24, 6), (24, 26, 1).

    Args:
        kinds: Kind of each layer of the model; layers of the same kind are equal here.
        start: Index of the first layer.
        stop: Index after the last layer.
    """
    best: dict[int, tuple[int, int, list]] = {stop: (0, 0, [])}
    for first in range(stop - 1, start - 1, -1):
        found = []
        for period in range(1, min(LONGEST_PERIOD, stop - first) + 1):
            for end in range(first + period, stop + 1, period):
                if tuple(kinds[end - period : end]) != tuple(kinds[first : first + period]):
                    break
                inlined, scans, rest = best[end]
                found.append((period + inlined, 1 + scans, [(first, end, period), *rest]))
        best[first] = min(found, key=lambda cut: (cut[0], cut[1], -cut[2][0][1]))
    return best[start][2]


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """Rotary tables and windows of all layers.

    If all layers are alike, the layer scan carries nothing. Otherwise it carries, for each layer,
    the index of its rotary table and its window.

    Attributes:
        cos_J: cos of each different rotary table, J arrays [B, T, 1, K/2].
        sin_J: sin of each different rotary table.
        by_layer: {rope: index of the table, window: number of tokens}, int32 [L] each. None: all
            layers are alike.
        window: The common window if all layers are alike; None: no window.
    """

    cos_J: tuple[jax.Array, ...]
    sin_J: tuple[jax.Array, ...]
    by_layer: Tree | None
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig, positions_BT: Array) -> LayerKinds:
        """Returns the kinds of a model's layers for tokens at the given rotary positions.

        Args:
            config: The model.
            positions_BT: Rotary position of each token.
        """
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
        # 2**30 exceeds any position: no window.
        window_L = [config.window if i in windowed else 2**30 for i in range(config.layers)]
        rope_L = [different.index(rope) for rope in ropes]
        return cls(
            cos_J,
            sin_J,
            {"rope": jnp.array(rope_L, jnp.int32), "window": jnp.array(window_L, jnp.int32)},
            None,
        )

    def rotary(self, kind: Tree | None) -> tuple[jax.Array, jax.Array]:
        """Returns cos and sin, [B, T, 1, K/2] each, of one layer.

        Args:
            kind: The layer's entry of `by_layer`; None: all layers are alike.
        """
        if kind is None or len(self.cos_J) == 1:
            return self.cos_J[0], self.sin_J[0]
        return jnp.stack(self.cos_J)[kind["rope"]], jnp.stack(self.sin_J)[kind["rope"]]

    def mask(
        self, kind: Tree | None, mask_BTS: Array, query_positions_BT: Array, key_positions_BS: Array
    ) -> Array:
        """Returns a layer's attention mask [B, T, S]: `mask_BTS` restricted to the layer's window.

        Args:
            kind: The layer's entry of `by_layer`; None: all layers are alike.
            mask_BTS: True where a query may see a key, without regard to windows.
            query_positions_BT: Rotary positions of the queries.
            key_positions_BS: Rotary positions of the keys.
        """
        window = self.window if kind is None else kind["window"]
        return (
            mask_BTS
            if window is None
            else mask_BTS & attention.within_window(window, query_positions_BT, key_positions_BS)
        )


def _rotary_table(
    positions_BT: Array, head_dim: int, rope: Rope | None
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin [B, T, 1, K/2] of a rope; None: those of angle 0, no rotation."""
    if rope is not None:
        return attention.rotary_angles(positions_BT, head_dim, rope)
    shape = (*positions_BT.shape, 1, head_dim // 2)
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
