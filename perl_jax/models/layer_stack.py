"""Runs all layers of a model as scans over their stacked weights.

Layers form runs with and without an adapter, and a run is scanned by its repeating pattern of layer
kinds. So the number of layers that are compiled does not grow with the depth of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import Block
from perl_jax.models.layer_kinds import adapter_runs, periodic_scans
from perl_jax.models.linear import FUSED, AdapterSpec
from perl_jax.models.network import network
from perl_jax.models.placement import Placement, save_all_but_weights
from perl_jax.types import Array, Tree

# (block, x, the layer's entries of `per_layer`, its window, its entry of `caches`) -> (x, output).
Layer = Callable[[Block, jax.Array, Any, int | None, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """The layers of a model with their weights and adapters, ready to run.

    Attributes:
        config: Shape and options of the decoder.
        placement: Sharding constraints of the pass.
        weights: The layers' weights, leaves stacked over L.
        lora: The adapter's leaves, stacked over the adapted layers; None: no adapter.
        lora_config: The adapter's config; None: no adapter.
        under: The frozen pairs under the adapter, leaves stacked over L; None: there are none.
        trained: Whether the weights themselves are trained, as in full tuning.
        base_shardings: Shardings of `weights`, keyed by path within a layer.
        lora_shardings: Shardings of the adapter's leaves, keyed by path within a layer.
    """

    config: ModelConfig
    placement: Placement
    weights: Tree
    lora: Tree
    lora_config: LoRAConfig | None
    under: Tree
    trained: bool
    base_shardings: Mapping[str, NamedSharding]
    lora_shardings: Mapping[str, NamedSharding]

    def run(
        self,
        layer: Layer,
        x: jax.Array,
        per_layer: Tree = None,
        *,
        windows: Sequence[int | None] | None = None,
        caches: Mapping[int | None, Tree] | None = None,
        backward: bool = False,
        last: Layer | None = None,
    ) -> tuple[jax.Array, dict[int | None, Tree]]:
        """Runs all layers; returns x after the last one, and the layers' outputs.

        The outputs are a dict from each window to the outputs of the layers with it, stacked.
        Layers below the lowest adapted one have no backward pass, because nothing in them is
        trained.

        Args:
            layer: Runs one layer.
            x: Input of the first layer.
            per_layer: Leaves [L, ...] of which each layer gets its own entry; None: nothing.
            windows: Each layer's window, for layers that need it while they are compiled. Layers
                of several windows are scanned by their repeating pattern. None: every layer gets
                None, and all of them are alike to the compiler.
            caches: For each window, leaves stacked over the layers with it, of which each layer
                gets its own entry. None: every layer gets None.
            backward: Whether there may be a backward pass. Only then `config.remat` and
                `config.unroll` are read.
            last: Replaces `layer` for the last layer; its x may have another shape.
        """
        number = self.config.layers
        windows = (None,) * number if windows is None else tuple(windows)
        members: dict[int | None, list[int]] = {}
        for index, window in enumerate(windows):
            members.setdefault(window, []).append(index)
        caches = dict.fromkeys(members) if caches is None else caches
        # Index of each layer among those with its window.
        order_L = jnp.array(
            [members[window].index(i) for i, window in enumerate(windows)], jnp.int32
        )
        stacks = (self.weights, self.under, per_layer)
        outs: dict[int | None, list[Tree]] = {window: [] for window in members}
        for start, stop, period, adapted in self._scans(windows, last is not None):
            alike = windows[start : start + period]
            through = layer if last is None or stop < number else last
            # One scan of all layers reads the stacks as its inputs. Otherwise each layer picks its
            # own entries: slicing a run out of the stacks would copy the run.
            whole = stop - start == number and period == 1

            def turn(x: jax.Array, inputs: tuple) -> tuple[jax.Array, list[Tree]]:
                """Runs the consecutive layers of one repetition of the scan."""
                index, loras, taken = inputs
                made = []
                for offset, window in enumerate(alike):
                    if whole:
                        (weights, under, leaves), cache = taken
                    else:
                        pick = functools.partial(_picked, index + offset)
                        weights, under, leaves = jax.tree.map(pick, stacks)
                        order = (
                            index + offset
                            if len(members) == 1
                            else _picked(index + offset, order_L)
                        )
                        cache = jax.tree.map(functools.partial(_picked, order), caches[window])
                    # With period 1 the adapter's leaves are inputs of the scan: leaves taken by an
                    # index would be kept for the backward pass a second time.
                    mine = loras if period == 1 else jax.tree.map(lambda leaf: leaf[offset], loras)
                    block = self._block(weights, mine, under)
                    x, out = through(block, x, leaves, window, cache)
                    made.append(out)
                return x, made

            turn = self._rematerialised(turn, picked=not whole) if backward else turn
            inputs = (
                jnp.arange(start, stop, period),
                self._loras(start, stop, period) if adapted else None,
                (stacks, caches[windows[0]]) if whole else None,
            )
            if through is last:
                x, made = turn(x, jax.tree.map(lambda leaf: leaf[0], inputs))
                made = jax.tree.map(lambda leaf: leaf[None], made)
            else:
                unroll = min(self.config.unroll, stop - start) if backward else 1
                x, made = jax.lax.scan(turn, x, inputs, unroll=unroll)
            for window in dict.fromkeys(alike):
                own = [out for out, other in zip(made, alike, strict=True) if other == window]
                outs[window].append(jax.tree.map(_interleaved, *own))
        return x, {window: jax.tree.map(_concatenated, *parts) for window, parts in outs.items()}

    def _scans(
        self, windows: Sequence[int | None], last_apart: bool
    ) -> list[tuple[int, int, int, bool]]:
        """Returns the scans of all layers, each (start, stop, period, has an adapter).

        Args:
            windows: Window of each layer; None: no window.
            last_apart: Whether the last layer is a scan of its own.
        """
        return [
            (*scan, adapted)
            for first, stop, adapted in adapter_runs(
                self._adapted_layers, self.config.layers, last_apart
            )
            for scan in periodic_scans(windows, first, stop)
        ]

    @property
    def _adapted_layers(self) -> tuple[int, ...]:
        """Indices of the layers with an adapter."""
        if self.lora_config is None:
            return ()
        return self.lora_config.adapted_layers(self.config.layers)

    def _loras(self, start: int, stop: int, period: int) -> Tree:
        """Returns the adapter's leaves of layers start to stop - 1, as the scan reads them.

        The shape is [(stop - start) / period, period, ...]; with period 1 it is
        [stop - start, ...].

        Args:
            start: Index of the first layer.
            stop: Index after the last layer. All layers in between must be adapted.
            period: Number of layers in one step of the scan; it divides stop - start.
        """
        first = self._adapted_layers.index(start)
        shape = (-1,) if period == 1 else (-1, period)
        return jax.tree.map(
            lambda leaf: leaf[first : first + stop - start].reshape(*shape, *leaf.shape[1:]),
            self.lora,
        )

    def _block(self, weights: Tree, mine: Tree | None, under: Tree | None) -> Block:
        """Returns the module of one layer with its leaves, sharded as `placement` reads them.

        Args:
            weights: The layer's weights.
            mine: The leaves of the layer's adapter; None: the layer has no adapter.
            under: The layer's frozen pairs; None: the layer has none.
        """
        # Trained weights are moved in the activations' dtype; frozen ones already have it.
        weights = self.placement.weights(
            weights, self.base_shardings, self.config.dtype if self.trained else None
        )
        mine = self.placement.weights(mine, self.lora_shardings)
        attention = weights["attention"]
        spec = AdapterSpec(
            lora=None if mine is None else self.lora_config,
            under=() if under is None else tuple(lora_lib.under_ranks(under) or ()),
            fused=tuple(name for name in FUSED if "up" in attention[name])
            if "qkv" in attention
            else None,
        )
        leaves = (part for part in (weights, mine, under) if part is not None)
        return nnx.merge(network(self.config, spec).block, *leaves)

    def _rematerialised(self, turn: Callable, picked: bool) -> Callable:
        """Returns `turn`, keeping for the backward pass only what `config.remat` says.

        Gathered weights are never kept.

        Args:
            turn: Runs the layers of one repetition of a scan.
            picked: Whether a layer takes its weights out of a stack.
        """
        if self.config.remat == "none":
            if not picked and (
                self.placement.mesh is None or self.placement.mesh.shape["fsdp"] == 1
            ):
                return turn
            return jax.checkpoint(turn, prevent_cse=False, policy=save_all_but_weights)
        policies = jax.checkpoint_policies
        kept = {
            "dots": policies.dots_with_no_batch_dims_saveable,
            "full": policies.nothing_saveable,
        }[self.config.remat]
        return jax.checkpoint(turn, prevent_cse=False, policy=kept)


def within_a_layer(shardings: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Returns the shardings of the layers' leaves, keyed by path within a layer.

    Args:
        shardings: Shardings of a whole tree, keyed by path; paths outside `layers/` are left out.
    """
    return {
        name.removeprefix("layers/"): sharding
        for name, sharding in shardings.items()
        if name.startswith("layers/")
    }


def _picked(index: jax.Array, leaf_L: Array) -> jax.Array:
    """Returns entry `index` of a leaf that is stacked over layers."""
    return jax.lax.dynamic_index_in_dim(leaf_L, index, keepdims=False)


def _interleaved(*leaves: jax.Array) -> jax.Array:
    """Returns [layers, ...] in the order of the layers.

    Args:
        leaves: One array [repetitions, ...] for each layer of a scan's period.
    """
    if len(leaves) == 1:
        return leaves[0]
    return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])


def _concatenated(*parts: jax.Array) -> jax.Array:
    """Returns the outputs of several scans, concatenated along the layers."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
