"""A program of a job over shapes with shardings, and what else is on the devices while it runs."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import numpy as np

from perl_jax.hub.model import Model
from perl_jax.models.cache import own_room
from perl_jax.runtime import sharding, trees
from perl_jax.types import Tree

# step: every step of training (or every batch of a command that does not train). measure:
# validation and test. start: loading, first values, checkpoints.
Phase = Literal["start", "step", "measure"]


class Traceable(Protocol):
    """A `Program`, or a jitted function with its static arguments (`Jitted`)."""

    @property
    def name(self) -> str: ...

    def trace(self, *args: Any) -> jax.stages.Traced: ...


@dataclasses.dataclass(frozen=True)
class Jitted:
    """A jitted function under a name; `before` and `after`: static arguments around the others."""

    name: str
    function: Any
    before: tuple = ()
    after: tuple = ()

    def trace(self, *args: Any) -> jax.stages.Traced:
        return self.function.trace(*self.before, *args, *self.after)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One program of a job, for one set of shapes.

    args: shapes with shardings. own: those of them that only this program holds (a batch, a
    rollout). cache: keys and values inside it. loop: turns of a loop whose number depends on the
    data (the decode loop); None: there is none. phase: when it runs. resident: names of the
    components that stay on the devices while it runs (`Planned.resident`); None: all. of: the leaf,
    where it is a leaf's program.
    """

    program: Traceable
    args: tuple
    own: Tree
    cache: Tree = None
    loop: int | None = None
    phase: Phase = "step"
    resident: tuple[str, ...] | None = None
    of: str = ""

    @property
    def name(self) -> str:
        return self.program.name


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job's programs and what stays on the devices: base, trained roles, frozen roles,
    optimizer.
    """

    resident: dict[str, Tree]
    pieces: tuple[Piece, ...]

    def resident_bytes(self, names: tuple[str, ...] | None = None) -> dict[str, int]:
        """Bytes of one device by component. names: of these alone; None: of all."""
        return {
            name: device_bytes(tree)
            for name, tree in self.resident.items()
            if names is None or name in names
        }


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree on one device, by its leaves' shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * trees.bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def placed(spec: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """A shape at a place."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)


def in_place(model: Model, tree: Tree) -> Tree:
    """Shapes of roles or of a train state where these live."""
    return jax.tree.map(placed, tree, model.adapter_shardings(tree))


def rows_of(model: Model, tree: Tree) -> Tree:
    """Leaves split over rows; numbers are everywhere."""
    rows, whole = sharding.batch_sharding(model.mesh), sharding.replicated(model.mesh)
    return jax.tree.map(lambda leaf: placed(leaf, rows if leaf.ndim else whole), tree)


def key_data(model: Model) -> jax.ShapeDtypeStruct:
    """A key as programs get it."""
    return placed(
        jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        sharding.replicated(model.mesh),
    )


def ids(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), np.int32)


def flags(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), bool)


def result(program: Traceable, *args: Any) -> Tree:
    """Shapes of what a program gives, with their places where the program says them."""
    return program.trace(*args).out_info


def cache_of(model: Model, rows: int, slots: int) -> Tree:
    """The keys and values of a decode loop, where they live."""
    config, found = model.lm.config, []
    for window, layers in collections.Counter(config.windows).items():
        shape = (layers, rows, config.kv_heads, own_room(slots, window), config.head_dim)
        place = sharding.fitting(
            model.mesh,
            shape,
            None,
            sharding.BATCH_AXES,
            "tensor" if model.lm.split_heads else None,
            None,
            None,
        )
        found += [jax.ShapeDtypeStruct(shape, config.dtype, sharding=place)] * 2
    return found
