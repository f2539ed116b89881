"""Sums, means, variances and whitening over the True positions of a boolean mask.

Guarantees of every function:

- Masked positions are replaced, not multiplied by 0. NaN or infinity there changes neither the
  value nor the gradient.
- bfloat16 and float16 are accumulated in float32; float64, where enabled, stays float64.
- An empty mask gives 0, not NaN.
- A reduction over a sharded axis is over the global array: inside `jax.jit`, the result does not
  depend on the sharding, up to rounding.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from perl_jax.types import Array

Axis = int | tuple[int, ...] | None


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Returns sum_i mask_i x_i, in at least float32; x and mask have one shape.

    Args:
        x: Values.
        mask: True on positions that count.
        axis: Axes of the sum; None: all axes.
    """
    return jnp.sum(masked_values(x, mask), axis=axis)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Returns sum_i mask_i x_i / max(sum_i mask_i, 1), in at least float32.

    Args:
        x: Values.
        mask: True on positions that count, in the shape of x.
        axis: Axes of the mean; None: all axes. Over all axes it divides by the number of True
            positions of the whole batch, so rows with more True positions have more weight.
    """
    total = masked_sum(x, mask, axis)
    return total / _count(mask, axis, total.dtype)


def masked_deviation(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Returns x_i - mean, in the shape of x; 0 where the mask is False.

    Equal elements give exactly 0, even if their mean would be rounded. So a later division by a
    tiny standard deviation cannot turn rounding errors into a signal.

    Args:
        x: Values.
        mask: True on positions that count, in the shape of x.
        axis: Axes of the mean; None: all axes.
    """
    return _mean_and_deviation(x, mask, axis)[1]


def masked_var(x: Array, mask: Array, axis: Axis = None, *, ddof: int = 0) -> jax.Array:
    """Returns sum_i mask_i (x_i - mean)^2 / max(n - ddof, 1), n the number of True positions.

    One True position, or equal elements, give exactly 0.

    Args:
        x: Values.
        mask: True on positions that count, in the shape of x.
        axis: Axes of the variance; None: all axes.
        ddof: Subtracted from n in the divisor.
    """
    return _variance(masked_deviation(x, mask, axis), mask, axis, ddof)


def masked_whiten(
    x: Array, mask: Array, *, shift_mean: bool, epsilon: float = 1e-8, ddof: int = 1
) -> jax.Array:
    """Returns (x - mean) / sqrt(var + epsilon), plus the mean unless `shift_mean`; 0 where masked.

    Mean and variance are over all True positions. Advantages are whitened with shift_mean, rewards
    without, as in the code released with Ziegler et al. 2019 (arXiv 1909.08593). Equal elements
    become 0 with shift_mean and stay as they are without.

    Args:
        x: Values.
        mask: True on positions that count, in the shape of x.
        shift_mean: Whether the result has mean 0; False: it keeps the mean of x.
        epsilon: Added to the variance.
        ddof: The variance divides by n - ddof, n the number of True positions.
    """
    mean, deviation = _mean_and_deviation(x, mask, None)
    whitened = deviation * jax.lax.rsqrt(_variance(deviation, mask, None, ddof) + epsilon)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0)


def masked_values(x: Array, mask: Array) -> jax.Array:
    """Returns x in at least float32, with 0 where the bool mask is False."""
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, at_least_float32(x), 0)


def at_least_float32(x: Array | float) -> jax.Array:
    """Returns x as float32; float64 stays float64."""
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _variance(deviation: jax.Array, mask: Array, axis: Axis, ddof: int) -> jax.Array:
    """Returns sum deviation^2 / max(n - ddof, 1) over `axis`; deviations must be 0 where masked."""
    count = jnp.sum(mask, axis=axis, dtype=deviation.dtype)
    return jnp.sum(jnp.square(deviation), axis=axis) / jnp.maximum(count - ddof, 1)


def _count(mask: Array, axis: Axis, dtype: jnp.dtype, keepdims: bool = False) -> jax.Array:
    """Returns max(number of True positions of the mask, 1) over `axis`, in `dtype`.

    With axis None it counts over all axes; with `keepdims` the counted axes keep size 1.
    """
    return jnp.maximum(jnp.sum(mask, axis=axis, dtype=dtype, keepdims=keepdims), 1)


def _mean_and_deviation(x: Array, mask: Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Returns the masked mean over `axis`, broadcast to the shape of x, and x - mean.

    The deviation is 0 where the mask is False. With axis None the mean is over all axes.
    """
    values = masked_values(x, mask)
    # The smallest element is subtracted first: for equal elements that gives exact zeros, which a
    # subtraction of a rounded mean does not. The offset does not change the result, so it needs no
    # gradient.
    constant = jax.lax.stop_gradient(values)
    smallest = jnp.min(constant, axis=axis, keepdims=True, initial=jnp.inf, where=mask)
    offset = jnp.broadcast_to(jnp.where(jnp.isfinite(smallest), smallest, 0), values.shape)
    shifted = jnp.where(mask, values - offset, 0)
    mean = jnp.sum(shifted, axis=axis, keepdims=True) / _count(mask, axis, values.dtype, True)
    mean = jnp.broadcast_to(mean, values.shape)
    return offset + mean, jnp.where(mask, shifted - mean, 0)
