"""Programs with sizes known by hand, and their text from the CPU's or a TPU's compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, ROWS, WIDTH, HIDDEN = 5, 64, 256, 512


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Two rows of half the devices each, axes data and model."""
    return Mesh(np.asarray(devices).reshape(2, -1), ("data", "model"))


def array(
    mesh: Mesh, shape: tuple[int, ...], *spec: str | None, dtype: str = "float32"
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compiled(function: Callable, *args: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    return jax.jit(function).lower(*args).compile()


def layers(x_BD: jax.Array, w_LDD: jax.Array) -> jax.Array:
    """tanh(x w) a layer."""
    return jax.lax.scan(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None), x_BD, w_LDD)[0]


def mlps(x_BD: jax.Array, up_LDF: jax.Array, down_LFD: jax.Array) -> jax.Array:
    """x + relu(x up) down a layer."""

    def layer(x_BD, weights):
        up_DF, down_FD = weights
        return x_BD + jax.nn.relu(x_BD @ up_DF) @ down_FD, None

    return jax.lax.scan(layer, x_BD, (up_LDF, down_LFD))[0]


def twice(x_BD: jax.Array, up_LDF: jax.Array, down_LFD: jax.Array) -> jax.Array:
    """The layers again and again: a loop in a loop."""
    return jax.lax.scan(lambda x_BD, _: (mlps(x_BD, up_LDF, down_LFD), None), x_BD, length=2)[0]


def tensor_parallel(mesh: Mesh, dtype: str = "float32") -> tuple[jax.ShapeDtypeStruct, ...]:
    """Rows over data; up split by columns and down by rows, over model: one all-reduce a layer."""
    return (
        array(mesh, (ROWS, WIDTH), "data", dtype=dtype),
        array(mesh, (LAYERS, WIDTH, HIDDEN), None, None, "model", dtype=dtype),
        array(mesh, (LAYERS, HIDDEN, WIDTH), None, "model", dtype=dtype),
    )
