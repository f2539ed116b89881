"""Frozen bases whose matrices are kept in 8 or 4 bits, by qwix (QLoRA, arXiv 2305.14314).

Only the layers' matrices are quantised, weights only and symmetrically: w ~ q * scale. There is one
scale per output, or per block of inputs of an output. The scale is the largest |w| divided by 127.5
(int8) or 7.5 (int4), so that the largest weight loses at most half a step, or by 1 (nf4's levels).
Embedding, norms and biases keep their dtype, and adapters are float32. A quantised matrix is
converted to the activations' dtype where it is used, and is never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import qwix

from perl_jax import errors
from perl_jax.runtime import trees
from perl_jax.types import Tree

KINDS = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}


@dataclasses.dataclass(frozen=True)
class QuantiseConfig:
    """How the frozen base's matrices are quantised.

    Attributes:
        kind: none, int8, int4, or nf4 (4 bits, levels at the quantiles of a normal distribution).
        block: Number of inputs that share a scale; None: all inputs of an output. QLoRA uses 64.
    """

    kind: Literal["none", "int8", "int4", "nf4"] = "none"
    block: int | None = None

    def __post_init__(self) -> None:
        errors.in_range(self, "quantise")
        errors.one_of("quantise.kind", self.kind, ("none", *KINDS))
        if self.block is not None:
            errors.whole("quantise.block", self.block)
            used = self.kind != "none"
            errors.require(
                used, f"quantise.block is {self.block}; it needs a quantise.kind other than none."
            )


def quantise_leaf(name: str, leaf: jax.Array, config: QuantiseConfig) -> Tree:
    """Returns a base leaf in its quantised form, or unchanged if it is not a matrix of a layer.

    Args:
        name: Path of the leaf, `layers/attention/q/kernel`.
        leaf: The leaf; matrices are stacked over layers, [L, D, F].
        config: How matrices are quantised; kind none returns the leaf unchanged.

    Raises UserError for a matrix whose number of inputs `config.block` does not divide.
    """
    if config.kind == "none" or not is_matrix(name):
        return leaf
    inputs = leaf.shape[1]
    block = config.block or inputs
    errors.require(
        inputs % block == 0,
        f"quantise.block is {block}; it must divide the {inputs} inputs of {name}.",
    )
    return trees.block_on_cpu(quantised(leaf, config.kind, block))


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantised(kernel_LDF: jax.Array, kind: str, block: int) -> Tree:
    """Returns the matrices of all layers as one `qwix.QArray`.

    Args:
        kernel_LDF: The matrices.
        kind: A key of KINDS (static).
        block: Number of inputs that share a scale; it must divide D (static).
    """
    return qwix.quantize(kernel_LDF, KINDS[kind], channelwise_axes=[0, 2], tiled_axes={1: block})


def is_matrix(name: str) -> bool:
    """Returns whether the base leaf at path `name` is a projection's matrix, stacked over layers.

    Only these leaves are quantised.
    """
    return name.startswith("layers/") and name.endswith("/kernel")


def is_quantised(leaf: Tree) -> bool:
    """Returns whether a node of a base tree is a quantised matrix."""
    return isinstance(leaf, qwix.QArray)


def dense(kernel: Tree) -> jax.Array:
    """Returns a matrix as an array: q * scale if it is quantised, unchanged otherwise."""
    return qwix.dequantize(kernel) if is_quantised(kernel) else kernel
