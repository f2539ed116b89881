"""Where activations live on a mesh, and how a pass meets the weights there.

Two layouts, because the cheaper thing to move differs:

  * over whole sequences ("gathered") activations are large: every device keeps its rows, and the
    parts of a layer's weights that lie along `fsdp` come to it layer by layer (FSDP, arXiv
    2304.11277); what is split along `tensor` stays split (Shoeybi et al. 2019, arXiv 1909.08053);
  * a decoding step reads every weight for a few tokens: weights stay where they are ("stationary",
    Pope et al. 2022, arXiv 2211.05102), the width of the activations is split along `fsdp` and the
    small activations move. Only attention, beside its cache, is split over rows.

Without these constraints the compiler may replicate the batch instead, which it does.
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
# The axes that the vocabulary of logits is split over: rows are put together along fsdp for it,
# which moves hidden states instead of the far larger output matrix.
VOCABULARY = ("tensor", "fsdp")
GATHERED = "gathered weights"


def all_but_weights(primitive: jax.extend.core.Primitive, *_: object, **settings: object) -> bool:
    """A policy of `jax.checkpoint`: keep everything but weights that came from other devices or out
    of a stack.

    Kept for the backward pass, those of all layers would be a second base, on every device. Before
    gathered ones have their name they are the result of a constraint or of a cast; those of
    activations cost next to nothing again.
    """
    return settings.get("name") != GATHERED and primitive.name not in (
        "sharding_constraint",
        "convert_element_type",
        "dynamic_slice",
        "squeeze",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(leaf: jax.Array, there: NamedSharding, own: NamedSharding, dtype: str) -> jax.Array:
    """A weight at another place, moved as `dtype`, in its own dtype; its gradient goes straight to
    `own`.

    The derived gradient would have the constraint of the weight itself, so that every device got
    the sum of the whole matrix; this way devices get the sums of their parts (a reduce-scatter,
    half the bytes), in the weight's dtype and not in that of the journey.
    """
    return jax.lax.with_sharding_constraint(leaf.astype(dtype), there).astype(leaf.dtype)


def _gathered_forward(leaf, there, own, dtype):
    return gathered(leaf, there, own, dtype), None


def _gathered_backward(there, own, dtype, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, own),)


gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Constraints of one layout; without a mesh, or with one device, everything stays as it is.

    split_heads: heads are split along `tensor` (their number must divide; otherwise they are
    whole).
    """

    mesh: Mesh | None = None
    split_heads: bool = True
    stationary: bool = False

    def residual(self, x_BTD: Array) -> jax.Array:
        """The stream between layers."""
        if self.stationary:
            return sharding.constrain(x_BTD, self.mesh, "data", None, "fsdp")
        return sharding.constrain(x_BTD, self.mesh, ROWS, None, None)

    def features(self, x_BTF: Array, split: bool = True) -> jax.Array:
        """What a layer's first products give and its last ones take, split along `tensor`."""
        return sharding.constrain(
            x_BTF, self.mesh, "data" if self.stationary else ROWS, None, "tensor" if split else None
        )

    def heads(self, x_BTHK: Array) -> jax.Array:
        """Queries, keys and values: beside the cache in either layout."""
        return sharding.constrain(
            x_BTHK, self.mesh, ROWS, None, "tensor" if self.split_heads else None, None
        )

    def cache(self, part: Tree) -> Tree:
        """Keys or values of all layers, [L, B, N, S, ...]: beside the queries that read them."""
        entries = (None, ROWS, "tensor" if self.split_heads else None, None, None)
        return jax.tree.map(
            lambda leaf: sharding.constrain(leaf, self.mesh, *entries[: leaf.ndim]), part
        )

    def looking_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Ids of all rows whose part of the width a device looks up.

        Rows that are split further leave the compiler a choice, and beside many devices it moves
        the table instead.
        """
        return sharding.constrain(tokens_BT, self.mesh, "data", None)

    def looked_up(self, x_BTD: Array) -> jax.Array:
        """Embeddings as the lookup gives them: their width where the table has it."""
        return sharding.constrain(x_BTD, self.mesh, "data", None, "fsdp")

    def before_logits(self, hidden_BTD: Array) -> jax.Array:
        """Hidden states of all rows that a slice of the vocabulary is computed for."""
        return sharding.constrain(hidden_BTD, self.mesh, "data", None, None)

    def output_matrix(
        self, weight_DV: Array, own: tuple[str | None, str | None], dtype: str
    ) -> jax.Array:
        """The output projection, split over its outputs alone. own: the axes it lies along; dtype:
        it moves in.
        """
        if self.mesh is None or self.mesh.size == 1:
            return weight_DV
        place = functools.partial(sharding.fitting, self.mesh, weight_DV.shape)
        return gathered(weight_DV, place(None, VOCABULARY), place(*own), dtype)

    def logits(self, logits_BTV: Array) -> jax.Array:
        return sharding.constrain(logits_BTV, self.mesh, "data", None, VOCABULARY)

    def next_logits(self, logits_BV: Array) -> jax.Array:
        """Logits to sample from: whole rows."""
        return sharding.constrain(logits_BV, self.mesh, ROWS, None)

    def weights(
        self, layer: Tree, places: Mapping[str, NamedSharding], dtype: str | None = None
    ) -> Tree:
        """One layer's leaves as the layout reads them; places: of the stacked leaves, by path name.

        dtype: of trained weights, which move in it (half as many bytes where they are float32 and
        activations are not) and their gradients to where they are kept (`gathered`). None: frozen
        ones, which move as they are, and adapters, of which every device has the whole gradient.
        """
        if self.mesh is None or self.mesh.size == 1 or self.stationary:
            return layer

        def read(name: str, leaf: Array) -> Array:
            # A quantised matrix is a node of several leaves, of one place.
            place = places.get(name) or places.get(name.rpartition("/")[0])
            if place is None or leaf.ndim < 2:
                return leaf
            entries = place.spec[1:]
            there = sharding.fitting(
                self.mesh,
                leaf.shape,
                *["tensor" if entry == "tensor" else None for entry in entries],
            )
            if dtype is not None and name in places:
                leaf = gathered(
                    leaf, there, sharding.fitting(self.mesh, leaf.shape, *entries), dtype
                )
            else:
                leaf = jax.lax.with_sharding_constraint(leaf, there)
            return checkpoint_name(leaf, GATHERED)

        return trees.map_named(read, layer)
