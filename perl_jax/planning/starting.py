"""Programs that run before the first step and beside the steps: loading a base, first values of
roles, checkpoints.

They work leaf by leaf, and are planned once for each shape and place of a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters import quantise as quantise_lib
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.hub import families
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.model import Model, merge_program, weights_program
from perl_jax.planning.pieces import Jitted, Piece, in_place, key_data, placed, result
from perl_jax.runtime import sharding, trees
from perl_jax.training import optimizers as optimizers_lib
from perl_jax.training import state as state_lib
from perl_jax.training.fit import begin_program
from perl_jax.types import Tree

_BASE = ("base",)


def loading(model: Model) -> list[Piece]:
    """A base from its files to its places: pieces of each leaf written, its fingerprint, its
    quantised form.

    The files are taken to hold the dtype that the base is loaded in.
    """
    places = model.lm.base_shardings()
    dense = trees.map_named(lambda name, spec: placed(spec, places[name]), model.lm.abstract_base())
    leaves = _distinct(trees.named_leaves(dense))
    quantises = model.quantise.kind != "none"
    # Beside a quantised base one leaf as it was stored; otherwise the leaf is part of the base.
    own = lambda leaf: leaf if quantises else None
    pieces = [_written(model, name, leaf, own(leaf)) for name, leaf in leaves.items()]
    pieces += [
        Piece(
            Jitted("fingerprint", trees.sample_leaf, after=(leaf.sharding,)),
            (leaf,),
            own(leaf),
            phase="start",
            resident=_BASE,
            of=name,
        )
        for name, leaf in leaves.items()
    ]
    if quantises:
        matrices = {name: leaf for name, leaf in leaves.items() if quantise_lib.is_matrix(name)}
        for name, leaf in matrices.items():
            program = Jitted(
                "quantise",
                quantise_lib.quantised,
                after=(model.quantise.kind, model.quantise.block or leaf.shape[1]),
            )
            pieces.append(Piece(program, (leaf,), leaf, phase="start", resident=_BASE, of=name))
    return pieces


def _written(model: Model, name: str, leaf: jax.ShapeDtypeStruct, own: Tree) -> Piece:
    """One piece of a leaf's tensor into the part of one device."""
    device = jax.sharding.SingleDeviceSharding(model.mesh.devices.flat[0])
    part = leaf.sharding.shard_shape(leaf.shape)
    layered = name.startswith("layers/")
    shape = hf_checkpoint.piece_shape(
        part[1:] if layered else part, families.transposed(name), np.dtype(leaf.dtype).itemsize
    )
    piece = jax.ShapeDtypeStruct((1, *shape) if layered else shape, leaf.dtype, sharding=device)
    start = tuple(jax.ShapeDtypeStruct((), np.int32, sharding=device) for _ in part)
    whole = jax.ShapeDtypeStruct(part, leaf.dtype, sharding=device)
    return Piece(
        Jitted("place", hf_checkpoint.write_piece),
        (whole, piece, start),
        (own, piece),
        phase="start",
        resident=_BASE,
        of=name,
    )


def first_values(model: Model, config: LoRAConfig) -> Iterator[Piece]:
    """What DoRA and PiSSA read of the base, a layer at a time."""
    kernels = trees.named_leaves(model.base, is_leaf=quantise_lib.is_quantised)
    modules = dict.fromkeys(
        name.rsplit("/", 1)[0] for name in trees.named_leaves(model.lm.abstract_lora(config))
    )
    layer = placed(jax.ShapeDtypeStruct((), np.int32), sharding.replicated(model.mesh))
    done = set()
    for module in modules:
        function, kernel = lora_lib.layer_function(config, module), kernels[f"{module}/kernel"]
        kind = (str(function), *((leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(kernel)))
        if function is not None and kind not in done:
            done.add(kind)
            yield Piece(
                Jitted("first values", lora_lib.on_layer, before=(function,)),
                (kernel, layer),
                None,
                phase="start",
                resident=_BASE,
                of=module,
            )


def weights(model: Model) -> Piece:
    """Full tuning's float32 weights, of a base that is let go of afterwards."""
    return Piece(weights_program(model.lm), (model.base,), model.base, phase="start", resident=())


def merging(model: Model, adapter: Adapter) -> Piece:
    """The base with an adapter in it, where full tuning goes on from one."""
    args = model.base, in_place(model, adapter)
    return Piece(merge_program(model.lm), args, args, phase="start", resident=())


def beginning(
    model: Model,
    roles: dict[str, Adapter],
    optimizers: optimizers_lib.Optimizers,
    frozen: dict[str, Adapter],
    controls: Any,
    loaded: Tree,
    base: bool,
) -> tuple[Piece, state_lib.TrainState]:
    """The state of step 0 as a copy of the roles, and its shapes. loaded: what lies beside
    (artefacts as they were read). base: whether the base does too.
    """
    args = in_place(model, roles), in_place(model, frozen), key_data(model)
    program = begin_program(model, optimizers, controls, *args)
    return Piece(
        program, args, in_place(model, loaded), phase="start", resident=_BASE if base else ()
    ), in_place(model, result(program, *args))


def digests(state: Tree) -> Iterator[Piece]:
    """Checksums of a state's leaves, where it is saved and restored, or an artefact is."""
    for name, leaf in _distinct(trees.named_leaves(state)).items():
        yield Piece(Jitted("checksums", trees.content_sums), (leaf,), None, phase="start", of=name)


def _distinct(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """The first leaf of each shape, dtype and place."""
    found: dict[Any, tuple[str, jax.ShapeDtypeStruct]] = {}
    for name, leaf in leaves.items():
        found.setdefault((leaf.shape, leaf.dtype, leaf.sharding), (name, leaf))
    return dict(found.values())
