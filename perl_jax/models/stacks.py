"""Trees of all layers: one stack, for a scan over layers, or layers apart, for layers that are inlined.

A scan copies each layer out of its stack where its products cannot read it there, as on a CPU. In sampling that is as much to
move as the products read: beside others who use the machine's caches and memory, a decoding step takes twice as long for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from perl_jax.types import Tree


@flax.struct.dataclass
class Apart:
    """A tree for each layer, in the place of one tree of stacked leaves [L, ...]."""

    layers: tuple[Tree, ...]


def is_apart(tree: Any) -> bool:
    return isinstance(tree, Apart)


def apart(stack: Tree) -> Apart:
    """A stack's layers, each leaf in an array of its own."""
    number = jax.tree.leaves(stack)[0].shape[0]
    return Apart(tuple(jax.tree.map(lambda leaf: leaf[index], stack) for index in range(number)))


def each(function: Callable[..., Tree], *stacks: Tree) -> Tree:
    """function of stacks, or of the layers that are apart one by one."""
    if not is_apart(stacks[0]):
        return function(*stacks)
    return Apart(tuple(function(*layers) for layers in zip(*(stack.layers for stack in stacks), strict=True)))


def of_layer(tree: Tree, index: int) -> Tree:
    """One layer's leaves [...] of a tree of stacks, of which some may be apart."""
    return jax.tree.map(lambda part: part.layers[index] if is_apart(part) else part[index], tree, is_leaf=is_apart)


def collected(outs: list[tuple[Tree, ...] | None]) -> tuple[Apart, ...] | None:
    """What each layer gave, such as keys and values: each apart. None where layers gave nothing."""
    if outs[0] is None:
        return None
    return tuple(Apart(parts) for parts in zip(*outs, strict=True))
