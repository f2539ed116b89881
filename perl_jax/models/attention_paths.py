"""Chooses the attention implementation of a layer over whole sequences."""

from __future__ import annotations

import functools

from jax.sharding import Mesh

from perl_jax.models import attention, kernels
from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import Attend
from perl_jax.models.layer_kinds import LayerKinds
from perl_jax.models.packing import Packing
from perl_jax.runtime.platforms import platform_of
from perl_jax.types import Array, Tree

# Implementations that take `valid_BT` and a window instead of a mask.
KERNELS = {"splash": kernels.splash, "cudnn": kernels.cudnn}


def attend_whole(
    config: ModelConfig,
    mesh: Mesh | None,
    kinds: LayerKinds,
    kind: Tree | None,
    valid_BT: Array,
    read_BT: Array,
    packing: Packing | None,
) -> Attend:
    """Returns one layer's attention function (queries, keys, values) -> outputs.

    Args:
        config: Names the implementation, `config.attention`.
        mesh: Mesh of the arguments; None: a single device.
        kinds: What differs between layers.
        kind: The layer's entry of `kinds.by_layer`; None: all layers are alike.
        valid_BT: True on real tokens.
        read_BT: True on queries whose output is used.
        packing: How the arguments are packed; None: they are padded sequences.
    """
    whole = mesh is None or mesh.size == 1
    if packing is not None and not (whole and config.attention == "blocked"):
        return packing.unpacked(attend_whole(config, mesh, kinds, kind, valid_BT, read_BT, None))
    scale, cap = config.attention_scale, config.attention_cap
    if config.attention not in KERNELS:
        positions_BT = attention.positions(valid_BT)
        mask_BTS = kinds.mask(kind, attention.causal_mask(valid_BT), positions_BT, positions_BT)
        if config.attention == "plain":
            return functools.partial(attention.attend, mask_BTS=mask_BTS, scale=scale, cap=cap)
        blocked = functools.partial(
            attention.attend_blocked if whole else kernels.blocked,
            mask_BTS=mask_BTS,
            scale=scale,
            cap=cap,
            read_BT=read_BT,
            wide=platform_of(mesh) != "cpu",
        )
        return functools.partial(blocked, **({"packing": packing} if whole else {"mesh": mesh}))
    over = functools.partial(
        KERNELS[config.attention], valid_BT=valid_BT, mesh=mesh, scale=scale, cap=cap
    )
    window = kernels.effective_window(config.window if config.windowed else None, valid_BT.shape[1])
    if window is None or kind is None:
        return functools.partial(over, window=window)
    windowed = kind["window"] == config.window
    return lambda q, k, v: kernels.cond_on_window(
        windowed, lambda: over(q, k, v, window=window), lambda: over(q, k, v, window=None)
    )
