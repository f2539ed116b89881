"""Programs that run before the first step and beside the steps: loading a base, first values of
roles, checkpoints.

The programs work leaf by leaf and are planned once for each shape and sharding of a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from perl_jax.adapters.initial_values import apply_to_layer, initial_value_function
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.adapters.quantise import is_matrix, is_quantised, quantised
from perl_jax.hub import naming, weights
from perl_jax.hub.model import Model, merge_program, weights_program
from perl_jax.planning.pieces import Jitted, Piece, key_data, placed, result, with_role_shardings
from perl_jax.runtime import sharding, trees
from perl_jax.training.fit import begin_program
from perl_jax.training.optimizers import Optimizers
from perl_jax.training.state import TrainState
from perl_jax.types import Tree

_BASE = ("base",)


def loading(model: Model) -> list[Piece]:
    """Returns the programs that load a base: those that write pieces of leaves, fingerprint leaves
    and, if the base is quantised, quantise leaves.

    The files are assumed to hold the dtype in which the base is loaded.
    """
    shardings = model.lm.base_shardings()
    dense = trees.map_named(
        lambda name, spec: placed(spec, shardings[name]), model.lm.abstract_base()
    )
    leaves = _distinct(trees.named_leaves(dense))
    quantises = model.quantise.kind != "none"
    # A quantised base has one unquantised leaf beside it; else the leaf is part of the base.
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
        matrices = {name: leaf for name, leaf in leaves.items() if is_matrix(name)}
        for name, leaf in matrices.items():
            program = Jitted(
                "quantise",
                quantised,
                after=(model.quantise.kind, model.quantise.block or leaf.shape[1]),
            )
            pieces.append(Piece(program, (leaf,), leaf, phase="start", resident=_BASE, of=name))
    return pieces


def _written(model: Model, name: str, leaf: jax.ShapeDtypeStruct, own: Tree) -> Piece:
    """Returns the program that writes one piece of a leaf, read from a file, into one device's part
    of the leaf.

    Args:
        model: The planned model.
        name: The leaf's name.
        leaf: The leaf's shape and sharding.
        own: What is on the devices besides the base: the leaf, or None if it is part of the base.
    """
    device = jax.sharding.SingleDeviceSharding(model.mesh.devices.flat[0])
    part = leaf.sharding.shard_shape(leaf.shape)
    layered = name.startswith("layers/")
    shape = weights.piece_shape(
        part[1:] if layered else part, naming.transposed(name), np.dtype(leaf.dtype).itemsize
    )
    piece = jax.ShapeDtypeStruct((1, *shape) if layered else shape, leaf.dtype, sharding=device)
    start = tuple(jax.ShapeDtypeStruct((), np.int32, sharding=device) for _ in part)
    whole = jax.ShapeDtypeStruct(part, leaf.dtype, sharding=device)
    return Piece(
        Jitted("place", weights.write_piece),
        (whole, piece, start),
        (own, piece),
        phase="start",
        resident=_BASE,
        of=name,
    )


def first_values(model: Model, config: LoRAConfig) -> Iterator[Piece]:
    """Yields the programs that compute first values of adapters from the base, one layer at a time:
    those of DoRA and PiSSA.

    Yields nothing for an adapter whose first values do not depend on the base.
    """
    kernels = trees.named_leaves(model.base, is_leaf=is_quantised)
    modules = dict.fromkeys(
        name.rsplit("/", 1)[0] for name in trees.named_leaves(model.lm.abstract_lora(config))
    )
    layer = placed(jax.ShapeDtypeStruct((), np.int32), sharding.replicated(model.mesh))
    done = set()
    for module in modules:
        function, kernel = initial_value_function(config, module), kernels[f"{module}/kernel"]
        kind = (str(function), *((leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(kernel)))
        if function is not None and kind not in done:
            done.add(kind)
            yield Piece(
                Jitted("first values", apply_to_layer, before=(function,)),
                (kernel, layer),
                None,
                phase="start",
                resident=_BASE,
                of=module,
            )


def full_weights(model: Model) -> Piece:
    """Returns the program that makes full tuning's float32 weights from the base, which is freed
    afterwards.
    """
    return Piece(weights_program(model.lm), (model.base,), model.base, phase="start", resident=())


def merging(model: Model, adapter: Adapter) -> Piece:
    """Returns the program that merges an adapter (its shapes) into the base; full tuning starts
    from the result.
    """
    args = model.base, with_role_shardings(model, adapter)
    return Piece(merge_program(model.lm), args, args, phase="start", resident=())


def beginning(
    model: Model,
    roles: dict[str, Adapter],
    optimizers: Optimizers,
    frozen: dict[str, Adapter],
    controls: Any,
    loaded: Tree,
    base: bool,
) -> tuple[Piece, TrainState]:
    """Returns (the program that makes the state of step 0, the state's shapes).

    Args:
        model: The planned model.
        roles: The shapes of the trained roles, by name.
        optimizers: The optimizer of each role.
        frozen: The shapes of the frozen roles, by name.
        controls: The initial control values, such as the KL coefficient.
        loaded: The shapes of what else is on the devices: artefacts as loaded.
        base: Whether the base is on the devices too.
    """
    args = with_role_shardings(model, roles), with_role_shardings(model, frozen), key_data(model)
    program = begin_program(model, optimizers, controls, *args)
    return Piece(
        program,
        args,
        with_role_shardings(model, loaded),
        phase="start",
        resident=_BASE if base else (),
    ), with_role_shardings(model, result(program, *args))


def digests(state: Tree) -> Iterator[Piece]:
    """Yields the programs that compute checksums of a tree's leaves when it is saved or restored.

    One program for each distinct shape, dtype and sharding.

    Args:
        state: A tree of shapes with shardings.
    """
    for name, leaf in _distinct(trees.named_leaves(state)).items():
        yield Piece(Jitted("checksums", trees.content_sums), (leaf,), None, phase="start", of=name)


def _distinct(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns, by name, the first leaf of each distinct shape, dtype and sharding."""
    found: dict[Any, tuple[str, jax.ShapeDtypeStruct]] = {}
    for name, leaf in leaves.items():
        found.setdefault((leaf.shape, leaf.dtype, leaf.sharding), (name, leaf))
    return dict(found.values())
