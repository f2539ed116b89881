"""The parts of a plan: programs with abstract arguments, and the arrays that stay on the devices
while the programs run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import numpy as np

from perl_jax.generation.cache import own_columns
from perl_jax.hub.model import Model
from perl_jax.runtime import sharding, trees
from perl_jax.types import Tree

# step: every step of training (or every batch of a command that does not train). measure:
# validation and test. start: loading, first values, checkpoints.
Phase = Literal["start", "step", "measure"]


class Traceable(Protocol):
    """Anything with a name that can be traced: a `Program`, or a `Jitted` function."""

    @property
    def name(self) -> str:
        """The program's name in the plan."""
        ...

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Traces the program for arguments of these shapes, without compiling it."""


@dataclasses.dataclass(frozen=True)
class Jitted:
    """A jitted function with its static arguments.

    Attributes:
        name: The name in the plan.
        function: The jitted function.
        before: Static arguments before the others.
        after: Static arguments after the others.
    """

    name: str
    function: Any
    before: tuple = ()
    after: tuple = ()

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Traces the function for arguments of these shapes, with the static arguments before and
        after them; compiles nothing.
        """
        return self.function.trace(*self.before, *args, *self.after)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One program of a job, for one set of shapes.

    Attributes:
        program: The program.
        args: Its arguments: shapes with shardings.
        own: The arrays that are on the devices for this program only (a batch, a rollout).
        cache: The key/value caches inside the program; None without a cache.
        loop: The iterations of a loop whose number depends on the data (the decode loop); None
            without one.
        phase: When the program runs.
        resident: The components of `Planned.resident` that are on the devices while it runs; None
            means all.
        of: The name of the one leaf or module that the program works on; "" if it works on more.
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
        """The program's name."""
        return self.program.name


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job's programs and what stays on the devices.

    Attributes:
        resident: The trees that stay on the devices, by component: base, trained roles, frozen
            roles, optimizer.
        pieces: The programs.
    """

    resident: dict[str, Tree]
    pieces: tuple[Piece, ...]

    def resident_bytes(self, names: tuple[str, ...] | None = None) -> dict[str, int]:
        """Returns {component: bytes on one device} of what stays on the devices.

        Args:
            names: The components; None takes all.
        """
        return {
            name: device_bytes(tree)
            for name, tree in self.resident.items()
            if names is None or name in names
        }


def device_bytes(tree: Tree) -> int:
    """Returns the bytes of a tree on one device. Each leaf needs a sharding; None is an empty
    tree.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * trees.bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def placed(spec: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of `spec` with the sharding `where`."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=where)


def with_role_shardings(model: Model, tree: Tree) -> Tree:
    """Returns the shapes of roles, or of a train state, with the shardings that the model gives
    them.
    """
    return jax.tree.map(placed, tree, model.adapter_shardings(tree))


def rows_of(model: Model, tree: Tree) -> Tree:
    """Returns the shapes of a batch with shardings: rows are divided over the mesh, scalars
    replicated.
    """
    rows, whole = sharding.batch_sharding(model.mesh), sharding.replicated(model.mesh)
    return jax.tree.map(lambda leaf: placed(leaf, rows if leaf.ndim else whole), tree)


def key_data(model: Model) -> jax.ShapeDtypeStruct:
    """Returns the shape of a random key's data, replicated over the mesh."""
    return placed(
        jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        sharding.replicated(model.mesh),
    )


def ids(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of token ids [rows, columns]."""
    return jax.ShapeDtypeStruct((rows, columns), np.int32)


def flags(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a mask [rows, columns]."""
    return jax.ShapeDtypeStruct((rows, columns), bool)


def result(program: Traceable, *args: Any) -> Tree:
    """Returns the shapes of a program's results for these arguments, with shardings if the program
    sets them; traces the program and compiles nothing.
    """
    return program.trace(*args).out_info


def cache_of(model: Model, rows: int, positions: int) -> Tree:
    """Returns the shapes of a decode loop's key/value caches, with shardings: a list with keys and
    values for each distinct window.

    Args:
        model: The model.
        rows: The number of rows.
        positions: The number of key positions; layers with a window keep at most the window.
    """
    config, found = model.lm.config, []
    for window, layers in collections.Counter(config.windows).items():
        shape = (layers, rows, config.kv_heads, own_columns(positions, window), config.head_dim)
        target = sharding.fitted_sharding(
            model.mesh,
            shape,
            None,
            sharding.BATCH_AXES,
            "tensor" if model.lm.split_heads else None,
            None,
            None,
        )
        found += [jax.ShapeDtypeStruct(shape, config.dtype, sharding=target)] * 2
    return found
