"""Operations of traced functions against 2 m n k, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from perl_jax.planning.flops import flops

from .compile_only import layers

B, D, F, L = 8, 16, 24, 5
PRODUCT = 2 * B * D * D


def of(function, *shapes, **options) -> int:
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return flops(jax.jit(function).trace(*args).jaxpr, **options)


def test_products():
    assert of(lambda a, b: a @ b, (B, D), (D, F)) == 2 * B * D * F
    assert of(lambda a: jnp.tanh(a) + 1, (B, D)) == 0
    # Batched, and with several contracted dimensions.
    assert (
        of(lambda a, b: jnp.einsum("hbd,hdf->hbf", a, b), (3, B, D), (3, D, F)) == 3 * 2 * B * D * F
    )
    assert of(lambda a, b: jnp.einsum("bhk,hkd->bd", a, b), (B, 3, 4), (3, 4, D)) == 2 * B * D * 12
    assert of(jnp.vdot, (D,), (D,)) == 2 * D
    assert of(jnp.outer, (B,), (D,)) == 0  # no matrix product: elementwise


def test_convolutions():
    def conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=groups)

    # 10 x 10, window 3 x 3 -> 8 x 8; 4 features to 6.
    assert of(conv, (2, 4, 10, 10), (6, 4, 3, 3)) == 2 * (2 * 6 * 8 * 8) * (4 * 3 * 3)
    # In 2 groups each output feature sees 2 of the 4.
    assert of(lambda x, w: conv(x, w, 2), (2, 4, 10, 10), (6, 2, 3, 3)) == 2 * (2 * 6 * 8 * 8) * (
        2 * 3 * 3
    )


def test_a_scan_forwards_and_backwards():
    shapes = (B, D), (L, D, D)
    assert of(layers, *shapes) == L * PRODUCT
    assert of(lambda x, w: layers(layers(x, w), w), *shapes) == 2 * L * PRODUCT
    # Backward: one product for the weights and one for what goes on, a layer.
    assert of(jax.grad(lambda x, w: layers(x, w).sum(), argnums=1), *shapes) == 3 * L * PRODUCT


def test_what_is_computed_again_counts_again():
    def loss(x, w):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, w)[0].sum()

    shapes = (B, D), (L, D, D)
    assert of(loss, *shapes) == L * PRODUCT
    assert of(jax.grad(loss, argnums=1), *shapes) == 4 * L * PRODUCT


def test_frozen_weights_under_a_trained_adapter():
    """Of a frozen product only the gradient that goes on is computed: 2, not 3."""
    r = 2

    def loss(adapter, x, w):
        def layer(x, inputs):
            w, a, b = inputs
            return jnp.tanh(x @ w + (x @ a) @ b), None

        return jax.lax.scan(layer, x, (w, *adapter))[0].sum()

    adapter = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((L, D, r), (L, r, D))]
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, D), (L, D, D)))
    low = 2 * B * D * r
    assert flops(jax.jit(jax.grad(loss)).trace(adapter, x, w).jaxpr) == L * (
        2 * PRODUCT + 3 * 2 * low
    )


def test_custom_derivatives():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def cube(x):
        return x @ x @ x

    cube.defjvp(lambda p, t: (cube(p[0]), t[0]))
    one = 2 * D**3
    assert of(square, (D, D)) == one and of(cube, (D, D)) == 2 * one
    assert of(jax.grad(lambda x: square(x).sum()), (D, D)) == 3 * one
    assert of(jax.grad(lambda x: cube(x).sum()), (D, D)) == 2 * one


def test_branches_and_loops():
    def branches(p, x):
        return jax.lax.cond(p[0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert of(branches, (1,), (D, D)) == 2 * 2 * D**3

    def loop(x):
        return jax.lax.while_loop(lambda x: (x @ x)[0, 0] < 1, lambda x: x @ x @ x, x)

    with pytest.raises(ValueError, match=r"while loop.*unknown_trips"):
        of(loop, (D, D))
    # 7 bodies of two products, 8 conditions of one.
    assert of(loop, (D, D), unknown_trips=7) == (7 * 2 + 8) * 2 * D**3
    # A loop with fixed ends is a scan: no count needed.
    assert of(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x), (D, D)) == 3 * 2 * D**3


def test_every_shard_of_a_shard_map_works():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
    a, b = PartitionSpec("a"), PartitionSpec(None, "b")
    split = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(a, b), out_specs=PartitionSpec("a", "b"))
    assert of(split, (B, D), (D, F)) == 2 * B * D * F
    # Over b nothing is split: 4 devices do the same.
    doubled = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(a, PartitionSpec()), out_specs=a)
    assert of(doubled, (B, D), (D, F)) == 4 * 2 * B * D * F
    # Axes that stay automatic are split by the compiler: work is counted once.
    half = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(a, PartitionSpec()), out_specs=a, axis_names={"a"}
    )
    assert of(half, (B, D), (D, F)) == 2 * B * D * F


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [(None, 4 * 2 * 2**3), (pl.CostEstimate(flops=99, bytes_accessed=0, transcendentals=0), 99)],
)
def test_pallas_kernels(estimate, expected):
    def kernel(x, out):
        out[...] = x[...] @ x[...]

    def call(x):
        block = pl.BlockSpec((2, 2), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((8, 2), jnp.float32)
        return pl.pallas_call(
            kernel,
            out_shape=shape,
            grid=(4,),
            in_specs=[block],
            out_specs=block,
            cost_estimate=estimate,
        )(x)

    assert of(call, (8, 2)) == expected
    assert of(jax.vmap(call), (3, 8, 2)) == 3 * expected
