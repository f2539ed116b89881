"""The mesh, and one table from logical axis names to mesh axes.

Every array's place follows from its logical axes and `RULES`. The base's matrices are split;
vectors (norms, biases), scalar heads and, unless asked otherwise, adapters are replicated with
their optimizer state, because they are small; batches are split over rows.
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
# Axes that number copies of a leaf rather than being a dimension of its own.
_STACKED = ("layers",)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Attributes:
        data: Copies of the base, each with its share of a batch; -1 takes what the others leave.
        fsdp: Parts the base's width is split into; each has its share of a batch too.
        tensor: Parts that heads, feed-forward layers and vocabulary are split into.
        adapters: Every device has all of an adapter, or adapters are split like the weights they
            sit on.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    adapters: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
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
    """A (data, fsdp, tensor) mesh over the devices (default: all, slice by slice and host by host),
    in their order.

    The outermost axis, data, is then the one that spans slices, which the slow network joins.
    Orders that follow a slice's links more closely deal out a host's rows, and a host loads one run
    of rows.
    """
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


def partition(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, pieces: Mapping[str, int] | None = None
) -> PartitionSpec:
    """The spec of one leaf; vectors, and dimensions that their mesh axis does not divide, are
    replicated.

    pieces: into how many parts a logical axis can be cut, where that is not its size (whole heads).
    Raises KeyError for a logical axis without a rule, ValueError when two dimensions of a leaf
    would use one mesh axis.
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
    """Sharding of every leaf by path name. axes: a tree of tuples of logical names, one for each
    leaf.
    """
    flat = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    leaves = trees.named_leaves(abstract)
    return {
        name: NamedSharding(mesh, partition(a, leaf.shape, mesh, pieces))
        for (name, leaf), a in zip(leaves.items(), flat, strict=True)
    }


def state_shardings(abstract_state: Tree, placed: Mapping[str, NamedSharding], mesh: Mesh) -> Tree:
    """Shardings of a train state: replicated, save leaves that mirror a placed one.

    placed: by the end of a path (`weights/layers/attention/q/kernel`). A weight in training, and
    optimizer moments of its shape, end in it; other leaves (heads, factored moments, counts) are
    replicated.
    """

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> NamedSharding:
        for end, sharding in placed.items():
            if name.endswith(end) and len(sharding.spec) == len(spec.shape):
                sizes = [mesh.shape[axis] if axis else 1 for axis in sharding.spec]
                if all(size % parts == 0 for size, parts in zip(spec.shape, sizes, strict=True)):
                    return sharding
        return NamedSharding(mesh, PartitionSpec())

    return trees.map_named(leaf, abstract_state)


def fitting(
    mesh: Mesh, shape: Sequence[int], *entries: str | tuple[str, ...] | None
) -> NamedSharding:
    """Dimensions over mesh axes; one that its axes do not divide is replicated."""
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
    """`with_sharding_constraint` to what fits, where there are several devices."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, x.shape, *entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_share(mesh: Mesh) -> hosts.Share:
    """Which rows of a batch this process has."""
    return hosts.share(batch_sharding(mesh))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays (this process's rows) -> global arrays sharded over rows."""
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
