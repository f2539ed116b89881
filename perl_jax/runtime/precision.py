"""Matrix products that multiply float32 operands in float32 on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perl_jax.types import Array


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """Returns the precision of a product: HIGHEST for float32 and float64 operands, else None.

    By default TPUs round float32 operands to bfloat16, and GPUs to TF32, before they multiply.
    Products of bfloat16 numbers are exact in float32, so there the default (None) rounds nothing.
    The gradient of a product uses the precision of the product.
    """
    return (
        jax.lax.Precision.HIGHEST
        if jnp.result_type(*operands) in (jnp.float32, jnp.float64)
        else None
    )


def einsum(dimensions: str, *operands: Array, dtype: object = None) -> jax.Array:
    """Returns jnp.einsum with the precision of `precision_of`.

    Args:
        dimensions: The subscripts, such as "bnxk,bnsk->bnxs".
        operands: The arrays.
        dtype: Dtype of accumulation and result; None: the operands' dtype.
    """
    return jnp.einsum(
        dimensions, *operands, precision=precision_of(*operands), preferred_element_type=dtype
    )


def matmul(left: Array, right: Array, dtype: object = None) -> jax.Array:
    """Returns jnp.matmul with the precision of `precision_of`.

    Args:
        left: Left operand.
        right: Right operand.
        dtype: Dtype of accumulation and result; None: the operands' dtype.
    """
    return jnp.matmul(
        left, right, precision=precision_of(left, right), preferred_element_type=dtype
    )
