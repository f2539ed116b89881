"""The decoder's modules, built once as shapes and split into what is static and what is arrays."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import Block, Embedder
from perl_jax.models.linear import AdapterSpec, LoRAParam, UnderParam
from perl_jax.types import Tree


@dataclasses.dataclass(frozen=True)
class Network:
    """A decoder that is split by `nnx.split`; it holds no arrays.

    Attributes:
        block: Graph definition of one layer.
        outer: Graph definition of the embedder.
        base: Shapes of the base: {layers: leaves stacked over L, outer: the embedder's leaves}.
        lora: Shapes of an adapter's leaves: {layers: leaves stacked over the adapted layers}.
        base_axes: Logical axis names of each leaf of `base`.
        lora_axes: Logical axis names of each leaf of `lora`.
    """

    block: nnx.GraphDef
    outer: nnx.GraphDef
    base: Tree
    lora: Tree
    base_axes: Tree
    lora_axes: Tree


@functools.lru_cache(maxsize=64)
def network(config: ModelConfig, adapted: AdapterSpec) -> Network:
    """Returns the split network of a model; results are cached.

    Args:
        config: The model.
        adapted: Which adapters its linear layers have.
    """
    block = nnx.eval_shape(lambda: Block(config, adapted, nnx.Rngs(0)))
    outer = nnx.eval_shape(lambda: Embedder(config, nnx.Rngs(0)))
    block_graph, base, adapter, _ = nnx.split(block, nnx.Param, LoRAParam, UnderParam)
    outer_graph, around = nnx.split(outer, nnx.Param)
    stack = lambda number: lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype)
    number = 0 if adapted.lora is None else len(adapted.lora.adapted_layers(config.layers))
    return Network(
        block=block_graph,
        outer=outer_graph,
        base={
            "layers": jax.tree.map(stack(config.layers), nnx.to_pure_dict(base)),
            "outer": nnx.to_pure_dict(around),
        },
        lora={"layers": jax.tree.map(stack(number), nnx.to_pure_dict(adapter))},
        base_axes={"layers": _axes(base, ("layers",)), "outer": _axes(around, ())},
        lora_axes={"layers": _axes(adapter, ("layers",))},
    )


def _axes(state: nnx.State, prefix: tuple[str, ...]) -> dict:
    """Returns the logical axis names of each leaf, as nested dicts of tuples.

    Args:
        state: Variables with the metadata `axes`.
        prefix: Names that come first in each tuple.
    """
    out: dict = {}
    for path, variable in nnx.to_flat_state(state):
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = prefix + tuple(variable.get_metadata()["axes"])
    return out
