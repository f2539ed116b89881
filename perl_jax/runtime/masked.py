"""Sums, means, variances and whitening over the True positions of a boolean mask.

What every function here promises:

- masked positions are replaced, never multiplied by zero: NaN or inf in padding changes neither
  the value nor the gradient;
- bfloat16 and float16 are accumulated in float32 (float64, where enabled, stays float64);
- an empty mask gives 0, not NaN;
- a reduction over a sharded axis is a reduction over the global array: inside `jax.jit` the
  numbers do not depend on how the batch is laid out over devices (up to rounding).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from perl_jax.types import Array

Axis = int | tuple[int, ...] | None


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """sum_i mask_i x_i over `axis` (all axes by default). `x` and bool `mask` have one shape."""
    return jnp.sum(masked_values(x, mask), axis=axis)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """sum_i mask_i x_i / max(sum_i mask_i, 1): divides by the number of True positions.

    Over all axes that number is the whole (global) batch's: long rows weigh more than short ones.
    """
    total = masked_sum(x, mask, axis)
    return total / _count(mask, axis, total.dtype)


def masked_deviation(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """x_i - masked mean over `axis`, in the shape of `x`; 0 where the mask is False.

    Equal elements give exactly 0, whatever the rounding of their mean would have been: a later
    division by a (tiny) standard deviation then cannot turn rounding into a signal.
    """
    return _mean_and_deviation(x, mask, axis)[1]


def masked_var(x: Array, mask: Array, axis: Axis = None, *, ddof: int = 0) -> jax.Array:
    """sum_i mask_i (x_i - mean)^2 / max(n - ddof, 1), n the number of True positions.

    Two passes (deviations, then their squares). n <= 1 and equal elements give exactly 0.
    """
    return _variance(masked_deviation(x, mask, axis), mask, axis, ddof)


def masked_whiten(
    x: Array, mask: Array, *, shift_mean: bool, epsilon: float = 1e-8, ddof: int = 1
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon), plus the mean again unless `shift_mean`; 0 where masked.

    Mean and variance (over n - ddof) are those of all True positions. As in the code released with
    Ziegler et al. 2019 (arXiv 1909.08593): advantages with the mean shifted to 0, rewards without.

    A single True position (and any set of equal values) becomes 0 when shifting and stays as it is
    otherwise, because its deviation is exactly 0.
    """
    mean, deviation = _mean_and_deviation(x, mask, None)
    whitened = deviation * jax.lax.rsqrt(_variance(deviation, mask, None, ddof) + epsilon)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0)


def masked_values(x: Array, mask: Array) -> jax.Array:
    """`x` in at least float32, with 0 written over the positions where bool `mask` is False."""
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, at_least_float32(x), 0)


def at_least_float32(x: Array | float) -> jax.Array:
    """`x` as float32, or float64 if it is: bfloat16, float16, integers and bools are widened."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _variance(deviation: jax.Array, mask: Array, axis: Axis, ddof: int) -> jax.Array:
    """sum deviation^2 / max(n - ddof, 1); the deviations are 0 where masked."""
    count = jnp.sum(mask, axis=axis, dtype=deviation.dtype)
    return jnp.sum(jnp.square(deviation), axis=axis) / jnp.maximum(count - ddof, 1)


def _count(mask: Array, axis: Axis, dtype: jnp.dtype, keepdims: bool = False) -> jax.Array:
    """max(number of True positions, 1)."""
    return jnp.maximum(jnp.sum(mask, axis=axis, dtype=dtype, keepdims=keepdims), 1)


def _mean_and_deviation(x: Array, mask: Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """The masked mean (broadcast to the shape of `x`) and the deviations from it."""
    values = masked_values(x, mask)
    # Differences from an element of the set are exact zeros for equal elements; differences from
    # a rounded mean are not. The choice of element does not change the result, so no gradient.
    constant = jax.lax.stop_gradient(values)
    smallest = jnp.min(constant, axis=axis, keepdims=True, initial=jnp.inf, where=mask)
    offset = jnp.broadcast_to(jnp.where(jnp.isfinite(smallest), smallest, 0), values.shape)
    shifted = jnp.where(mask, values - offset, 0)
    mean = jnp.sum(shifted, axis=axis, keepdims=True) / _count(mask, axis, values.dtype, True)
    mean = jnp.broadcast_to(mean, values.shape)
    return offset + mean, jnp.where(mask, shifted - mean, 0)
