"""The device mesh, and the table that maps logical axis names to mesh axes.

The logical axes of an array and `RULES` decide its sharding. Matrices of the base are split.
Vectors (norms, biases), scalar heads and, by default, adapters with their optimizer state are
replicated, because they are small. Batches are split over rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perl_jax import errors
from perl_jax.runtime import hosts, trees
from perl_jax.types import Tree

RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
}
BATCH_AXES = ("data", "fsdp")
# Axes that only stack leaves. `partition_spec` does not count them when it distinguishes vectors
# from matrices.
_STACKED = ("layers",)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis.

    Attributes:
        data: Copies of the base, each with its share of a batch; -1: all devices that fsdp and
            tensor leave.
        fsdp: Parts that the base's width is split into; each part also has its share of a batch.
        tensor: Parts that heads, feed-forward layers and vocabulary are split into.
        adapters: replicated: every device holds whole adapters; sharded: adapters are split like
            the weights that they belong to.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    adapters: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
        errors.in_range(self, "mesh")
        for field in ("fsdp", "tensor"):
            errors.positive(f"mesh.{field}", getattr(self, field))
        errors.one_of("mesh.adapters", self.adapters, ("replicated", "sharded"))
        good = self.data == -1 or self.data > 0
        errors.require(
            good,
            f"mesh.data is {self.data}; it must be greater than 0, or -1 for all remaining "
            "devices.",
        )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a (data, fsdp, tensor) mesh over the devices, in their order.

    Only the data axis crosses slices (groups of devices that a slow network connects), if the
    devices are sorted by slice.

    Args:
        config: Number of devices along each axis; data = -1: all remaining devices.
        devices: The devices; None: all devices, sorted by slice and host.

    Raises UserError if the config does not use all devices.
    """
    # An order that follows the links within a slice more closely would spread the rows of a host,
    # and each host must load contiguous rows.
    whole = lambda device: (getattr(device, "slice_index", None) or 0, device.process_index)
    devices = sorted(jax.devices(), key=whole) if devices is None else list(devices)
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    errors.require(
        data * inner == len(devices) and data > 0,
        f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fill "
        f"{len(devices)} devices.",
    )
    return Mesh(
        np.asarray(devices).reshape(data, config.fsdp, config.tensor), ("data", "fsdp", "tensor")
    )


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, pieces: Mapping[str, int] | None = None
) -> PartitionSpec:
    """Returns the PartitionSpec of one leaf, by its logical axes and RULES.

    Vectors are replicated, and so are dimensions that their mesh axis does not divide.

    Args:
        axes: Logical axis name of each dimension.
        shape: Shape of the leaf.
        mesh: The mesh.
        pieces: Number of parts that a logical axis can be cut into, where it is not the size of the
            dimension: attention heads stay whole. None: always the size.

    Raises KeyError for a logical axis without a rule, and ValueError if two dimensions map to one
    mesh axis.
    """
    entries = [RULES[axis] for axis in axes]
    if sum(axis not in _STACKED for axis in axes) < 2:
        return PartitionSpec(*[None] * len(entries))
    counts = [(pieces or {}).get(axis, size) for axis, size in zip(axes, shape, strict=True)]
    entries = [
        e if e is not None and count % mesh.shape[e] == 0 else None
        for e, count in zip(entries, counts, strict=True)
    ]
    used = [entry for entry in entries if entry is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} map two dimensions to one mesh axis: {entries}")
    return PartitionSpec(*entries)


def leaf_shardings(
    axes: Tree, abstract: Tree, mesh: Mesh, pieces: Mapping[str, int] | None = None
) -> dict[str, NamedSharding]:
    """Returns the sharding of every leaf, keyed by path.

    Args:
        axes: Tree of tuples of logical axis names, one tuple per leaf.
        abstract: Tree of shapes.
        mesh: The mesh.
        pieces: Number of parts that a logical axis can be cut into, as in `partition_spec`.
    """
    flat = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    leaves = trees.named_leaves(abstract)
    return {
        name: NamedSharding(mesh, partition_spec(a, leaf.shape, mesh, pieces))
        for (name, leaf), a in zip(leaves.items(), flat, strict=True)
    }


def state_shardings(abstract_state: Tree, placed: Mapping[str, NamedSharding], mesh: Mesh) -> Tree:
    """Returns the sharding of every leaf of a training state, as a tree like `abstract_state`.

    Args:
        abstract_state: Tree of shapes.
        placed: Shardings keyed by the end of a path, such as `weights/layers/attention/q/kernel`.
            They apply to a leaf whose path has this end: a trained weight and its optimizer moments
            of the same shape. Other leaves (heads, factored moments, counters) are replicated.
        mesh: The mesh.
    """

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> NamedSharding:
        """Returns the sharding of one leaf of the state."""
        for end, sharding in placed.items():
            if name.endswith(end) and len(sharding.spec) == len(spec.shape):
                sizes = [mesh.shape[axis] if axis else 1 for axis in sharding.spec]
                if all(size % parts == 0 for size, parts in zip(spec.shape, sizes, strict=True)):
                    return sharding
        return NamedSharding(mesh, PartitionSpec())

    return trees.map_named(leaf, abstract_state)


def fitted_sharding(
    mesh: Mesh, shape: Sequence[int], *entries: str | tuple[str, ...] | None
) -> NamedSharding:
    """Returns a sharding of dimensions over mesh axes, without the axes that do not divide them.

    Args:
        mesh: The mesh.
        shape: Shape of the array.
        entries: Mesh axis (or tuple of axes) of each dimension; None: replicated.
    """
    sizes = [
        math.prod(
            mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ())
        )
        for entry in entries
    ]
    return NamedSharding(
        mesh,
        PartitionSpec(
            *[
                entry if size % parts == 0 else None
                for entry, size, parts in zip(entries, shape, sizes, strict=True)
            ]
        ),
    )


def constrain(x: jax.Array, mesh: Mesh | None, *entries: str | tuple[str, ...] | None) -> jax.Array:
    """Returns x constrained to `fitted_sharding`; unchanged on a single device.

    Args:
        x: The array.
        mesh: The mesh; None: a single device.
        entries: Mesh axis (or tuple of axes) of each dimension; None: replicated.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted_sharding(mesh, x.shape, *entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_share(mesh: Mesh) -> hosts.Share:
    """Returns the part of a batch's rows that this process loads; batches are split over `mesh`."""
    return hosts.share(batch_sharding(mesh))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Returns host arrays as global arrays that are sharded over rows.

    Args:
        batch: Tree of host arrays, this process's rows of a batch (`row_share`).
        mesh: The mesh.

    Raises UserError if the number of rows of the whole batch is not a multiple of data x fsdp.
    """
    sharding = batch_sharding(mesh)
    rows = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    total = next(iter(rows)) * row_share(mesh).count
    errors.require(
        total % parts == 0,
        f"A batch of {total} rows does not divide over the mesh's data x fsdp = {parts} parts; "
        "change batch_size or mesh.",
    )
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )
