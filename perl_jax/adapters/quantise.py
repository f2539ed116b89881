"""A frozen base with its matrices in 8 or 4 bits, by qwix (QLoRA's idea, arXiv 2305.14314).

Only the layers' matrices are quantised, weight-only and symmetric: w ~ q * scale, with one scale
for each output, or for each block of inputs of an output: the largest |w| over 127.5 (int8) or 7.5
(int4), which half a step is lost of at the largest weight, or over 1 (nf4's levels). Embedding,
norms and biases stay as they are, and adapters stay float32. A quantised matrix is made dense where
it is used, in the activations' dtype, and is never differentiated.
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
    """In how many bits the frozen base's matrices are kept.

    Attributes:
        kind: none, int8, int4, or nf4 (4 bits, levels at a normal distribution's quantiles).
        block: Inputs that share a scale; None: all inputs of an output. QLoRA's is 64.
    """

    kind: Literal["none", "int8", "int4", "nf4"] = "none"
    block: int | None = None

    def __post_init__(self) -> None:
        errors.one_of("quantise.kind", self.kind, ("none", *KINDS))
        if self.block is not None:
            errors.whole("quantise.block", self.block)
            used = self.kind != "none"
            errors.require(
                used, f"quantise.block is {self.block}; it needs a quantise.kind other than none."
            )


def quantise_leaf(name: str, leaf: jax.Array, config: QuantiseConfig) -> Tree:
    """A base leaf in its quantised form; leaves that are no matrix of a layer come back as they
    are.

    UserError names a matrix whose inputs the block does not divide.
    """
    if config.kind == "none" or not is_matrix(name):
        return leaf
    inputs = leaf.shape[1]
    block = config.block or inputs
    errors.require(
        inputs % block == 0,
        f"quantise.block is {block}; it must divide the {inputs} inputs of {name}.",
    )
    return trees.awaited(quantised(leaf, config.kind, block))


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantised(kernel_LDF: jax.Array, kind: str, block: int) -> Tree:
    """Matrices of all layers in so many bits; block: inputs that share a scale."""
    return qwix.quantize(kernel_LDF, KINDS[kind], channelwise_axes=[0, 2], tiled_axes={1: block})


def is_matrix(name: str) -> bool:
    """Whether a base leaf is the stacked matrix of a projection, which `quantise_leaf` changes."""
    return name.startswith("layers/") and name.endswith("/kernel")


def is_quantised(leaf: Tree) -> bool:
    """Whether a node of a base tree is a quantised matrix."""
    return isinstance(leaf, qwix.QArray)


def dense(kernel: Tree) -> jax.Array:
    """A matrix as an array, whether quantised (q * scale) or not."""
    return qwix.dequantize(kernel) if is_quantised(kernel) else kernel
