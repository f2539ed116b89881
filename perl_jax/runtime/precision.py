"""Products as every module takes them: float32 operands are multiplied as float32, on every
platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perl_jax.types import Array


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """Returns HIGHEST for a product that multiplies in float32 or float64, None (the platform's
    default) for others.

    By default TPUs round float32 operands to bfloat16, and GPUs to TF32, before they multiply.
    Products of bfloat16 numbers are exact in float32: the default rounds none of them. A derived
    gradient multiplies with the precision of the product that it is the gradient of.
    """
    return (
        jax.lax.Precision.HIGHEST
        if jnp.result_type(*operands) in (jnp.float32, jnp.float64)
        else None
    )


def einsum(dimensions: str, *operands: Array, dtype: object = None) -> jax.Array:
    """jnp.einsum with the precision of `precision_of`. dtype: of sums and result; None: the
    operands'.
    """
    return jnp.einsum(
        dimensions, *operands, precision=precision_of(*operands), preferred_element_type=dtype
    )


def matmul(left: Array, right: Array, dtype: object = None) -> jax.Array:
    """jnp.matmul with the precision of `precision_of`. dtype: of sums and result; None: the
    operands'.
    """
    return jnp.matmul(
        left, right, precision=precision_of(left, right), preferred_element_type=dtype
    )
