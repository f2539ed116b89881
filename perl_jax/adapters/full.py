"""Full tuning as an adapter: a role that holds the whole weights instead of low-rank pairs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.runtime import trees
from perl_jax.types import Tree


def full_weights(base: Tree) -> Adapter:
    """Returns an adapter for full tuning: a trainable float32 copy of the whole base.

    It is float32 whatever the base's dtype, because bfloat16 would round small updates away.
    """
    return Adapter(
        weights=jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.float32, copy=True), base)
    )


def cast_frozen_role(adapter: Adapter, dtype: str) -> Adapter:
    """Returns a role that is read but not trained, with its full-tuning matrices in `dtype`.

    Norms and biases keep their dtype. The results are the same in less memory, because matrices are
    cast to the activations' dtype where they are used. A role without full weights is returned
    unchanged.

    Args:
        adapter: The role.
        dtype: Name of the activations' dtype.
    """
    if adapter.weights is None:
        return adapter
    cast = lambda name, leaf: (
        leaf.astype(dtype) if name.endswith(("kernel", "embedding", "lm_head")) else leaf
    )
    return dataclasses.replace(adapter, weights=trees.map_named(cast, adapter.weights))
