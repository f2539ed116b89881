"""Sharding constraints of activations on a mesh, and how a pass reads sharded weights.

There are two layouts, because the cheaper thing to move differs:

  * over whole sequences ("gathered") activations are large: every device keeps its rows, and the
    parts of a layer's weights that are split along `fsdp` are gathered layer by layer (FSDP, arXiv
    2304.11277); what is split along `tensor` stays split (Shoeybi et al. 2019, arXiv 1909.08053);
  * a decoding step reads every weight for a few tokens: weights stay where they are ("stationary",
    Pope et al. 2022, arXiv 2211.05102), the width of the activations is split along `fsdp`, and
    the small activations move. Only attention, beside its cache, is split over rows.

Without these constraints the compiler replicates the batch in some cases.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.extend
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from perl_jax.runtime import sharding, trees
from perl_jax.types import Array, Tree

ROWS = sharding.BATCH_AXES
# Mesh axes that split the vocabulary of logits. Rows are gathered along fsdp for it: that moves
# hidden states instead of the far larger output matrix.
VOCABULARY = ("tensor", "fsdp")
GATHERED = "gathered weights"


def save_all_but_weights(
    primitive: jax.extend.core.Primitive, *_: object, **settings: object
) -> bool:
    """Returns whether an operation's result is kept for the backward pass; weights are not.

    This function is a policy of `jax.checkpoint`, called with the operation (`primitive`) and its
    parameters; `name` is GATHERED for gathered weights. Weights that were gathered from other
    devices or taken out of a stack are not kept: kept for the backward pass, those of all layers
    would be a second base on every device. Before gathered weights get their name they are the
    result of a constraint or a cast, so results of these operations are not kept either; for
    activations they cost little to compute again.
    """
    return settings.get("name") != GATHERED and primitive.name not in (
        "sharding_constraint",
        "convert_element_type",
        "dynamic_slice",
        "squeeze",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(
    leaf: jax.Array, there: NamedSharding, own: NamedSharding, dtype: str
) -> jax.Array:
    """Returns a weight with the sharding `there`, moved between devices in `dtype`.

    The result has the weight's own dtype. The gradient goes directly to the sharding `own`. JAX's
    derived gradient would have the constraint of the gathered weight, so that every device would
    get the sum of the whole matrix. Here each device gets the sum of its part (a reduce-scatter,
    half the bytes), in the weight's dtype instead of `dtype`.

    Args:
        leaf: The weight.
        there: Sharding of the result.
        own: Sharding that the weight is stored with.
        dtype: Name of the dtype.
    """
    return jax.lax.with_sharding_constraint(leaf.astype(dtype), there).astype(leaf.dtype)


def _gather_weight_forward(leaf, there, own, dtype):
    return gather_weight(leaf, there, own, dtype), None


def _gather_weight_backward(there, own, dtype, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, own),)


gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Sharding constraints of one layout. Without a mesh, or on one device, they change nothing.

    Attributes:
        mesh: The mesh; None: a single device.
        split_heads: Whether heads are split along `tensor`; their number must divide.
        stationary: The layout of decoding steps; False: that of whole sequences.
    """

    mesh: Mesh | None = None
    split_heads: bool = True
    stationary: bool = False

    def residual(self, x_BTD: Array) -> jax.Array:
        """Returns the activations between layers with their constraint.

        Rows are split over data and fsdp; when stationary, rows over data and the width over fsdp.
        """
        if self.stationary:
            return sharding.constrain(x_BTD, self.mesh, "data", None, "fsdp")
        return sharding.constrain(x_BTD, self.mesh, ROWS, None, None)

    def features(self, x_BTF: Array, split: bool = True) -> jax.Array:
        """Returns inputs of the projections `o` or `down` with their constraint.

        Args:
            x_BTF: Heads or hidden features of a layer.
            split: Whether F is split along `tensor`; rows are split in any case.
        """
        return sharding.constrain(
            x_BTF, self.mesh, "data" if self.stationary else ROWS, None, "tensor" if split else None
        )

    def heads(self, x_BTHK: Array) -> jax.Array:
        """Returns queries, keys or values, constrained: rows split, and heads over `tensor`.

        It is the same in both layouts, so that they are on the devices of their part of the cache.
        """
        return sharding.constrain(
            x_BTHK, self.mesh, ROWS, None, "tensor" if self.split_heads else None, None
        )

    def cache(self, part: Tree) -> Tree:
        """Returns a cache entry of stacked layers, [L, B, N, S, ...], constrained like `heads`."""
        entries = (None, ROWS, "tensor" if self.split_heads else None, None, None)
        return jax.tree.map(
            lambda leaf: sharding.constrain(leaf, self.mesh, *entries[: leaf.ndim]), part
        )

    def ids_to_look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns token ids with their constraint before the embedding lookup.

        Rows are split along `data` only. If they were split further, the compiler could choose to
        move the embedding table instead of the ids, which it does on many devices.
        """
        return sharding.constrain(tokens_BT, self.mesh, "data", None)

    def looked_up(self, x_BTD: Array) -> jax.Array:
        """Returns embeddings, constrained after the lookup: the width is split as in the table."""
        return sharding.constrain(x_BTD, self.mesh, "data", None, "fsdp")

    def before_logits(self, hidden_BTD: Array) -> jax.Array:
        """Returns hidden states, constrained before the output projection: rows over `data`."""
        return sharding.constrain(hidden_BTD, self.mesh, "data", None, None)

    def output_matrix(
        self, weight_DV: Array, own: tuple[str | None, str | None], dtype: str
    ) -> jax.Array:
        """Returns the output projection [D, V], split over the vocabulary only.

        Args:
            weight_DV: The output projection.
            own: Mesh axes of its two dimensions, as it is stored.
            dtype: Name of the dtype in which it is moved between devices.
        """
        if self.mesh is None or self.mesh.size == 1:
            return weight_DV
        fitted = functools.partial(sharding.fitted_sharding, self.mesh, weight_DV.shape)
        return gather_weight(weight_DV, fitted(None, VOCABULARY), fitted(*own), dtype)

    def logits(self, logits_BTV: Array) -> jax.Array:
        """Returns logits, constrained: rows over `data`, the vocabulary over tensor and fsdp."""
        return sharding.constrain(logits_BTV, self.mesh, "data", None, VOCABULARY)

    def next_logits(self, logits_BV: Array) -> jax.Array:
        """Returns logits to sample from, constrained: rows over data and fsdp, whole vocabulary."""
        return sharding.constrain(logits_BV, self.mesh, ROWS, None)

    def weights(
        self, layer: Tree, shardings: Mapping[str, NamedSharding], dtype: str | None = None
    ) -> Tree:
        """Returns one layer's leaves as the layout reads them.

        When stationary they are unchanged. Otherwise matrices that are split along `fsdp` are
        gathered; what is split along `tensor` stays split.

        Args:
            layer: The layer's leaves.
            shardings: Shardings of the stacked leaves, keyed by path within a layer.
            dtype: For trained weights: the dtype in which they are moved; their gradients go
                directly to where they are stored (`gather_weight`). If they are float32 and
                activations are not, that halves the bytes. None: frozen weights, which move as they
                are, and adapters, whose whole gradient every device has.
        """
        if self.mesh is None or self.mesh.size == 1 or self.stationary:
            return layer

        def read(name: str, leaf: Array) -> Array:
            """Returns the leaf at path `name` as the layout reads it."""
            # A quantised matrix is a node of several leaves with one sharding.
            stored = shardings.get(name) or shardings.get(name.rpartition("/")[0])
            if stored is None or leaf.ndim < 2:
                return leaf
            entries = stored.spec[1:]
            there = sharding.fitted_sharding(
                self.mesh,
                leaf.shape,
                *["tensor" if entry == "tensor" else None for entry in entries],
            )
            if dtype is not None and name in shardings:
                leaf = gather_weight(
                    leaf, there, sharding.fitted_sharding(self.mesh, leaf.shape, *entries), dtype
                )
            else:
                leaf = jax.lax.with_sharding_constraint(leaf, there)
            return checkpoint_name(leaf, GATHERED)

        return trees.map_named(read, layer)
