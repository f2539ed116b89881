"""Plain facts about trees of arrays: leaf paths, counts, bytes, finiteness, fingerprints."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from perl_jax.types import Array, Tree

_FINGERPRINT_SAMPLES = 4096


def path_name(path: tuple) -> str:
    """`layers/attention/q/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> dict[str, Array]:
    """Every leaf under its path's name, in the tree's order; is_leaf: as in `jax.tree.map`."""
    return {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    }


def map_named(function: Callable[..., Array], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function receives the leaf's path name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def insert(tree: dict, name: str, leaf: Array) -> None:
    """Puts a leaf into nested dicts at its path's name."""
    *above, last = name.split("/")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = leaf


def count(tree: Tree) -> int:
    """Number of array elements."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Bytes of all leaves (global shapes, one copy)."""
    return sum(int(np.prod(leaf.shape)) * bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def bits(dtype: np.dtype) -> int:
    """Bits of one element."""
    # NumPy's own account gives the 4-bit types a whole byte; devices pack two into one.
    return 4 if jnp.dtype(dtype).name in ("int4", "uint4") else 8 * jnp.dtype(dtype).itemsize


def all_finite(tree: Tree) -> jax.Array:
    """Scalar bool: no NaN and no infinity in any leaf."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def global_norm(tree: Tree) -> jax.Array:
    """sqrt of the sum of squares of all leaves, in float32."""
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    )


def fingerprint(tree: Tree) -> str:
    """16 hex digits that tell one base model from another.

    SHA-256 over every leaf's path and shape and up to 4,096 evenly spaced elements rounded to
    bfloat16: rounding makes the same checkpoint give the same digits whether it was loaded in
    bfloat16 or in float32; sampling keeps it quick on large models.
    """
    return joined_marks({name: leaf_mark(name, leaf) for name, leaf in named_leaves(tree).items()})


def leaf_mark(name: str, leaf: Array) -> bytes:
    """A leaf's part of the fingerprint; for trees whose leaves do not exist at one time."""
    if isinstance(leaf, jax.Array):
        sample = np.asarray(sample_leaf(leaf, leaf.sharding))
    else:
        sample = np.asarray(leaf)[_sample_index(leaf.shape)]
    sample = sample.reshape(-1).astype(np.float32).astype(ml_dtypes.bfloat16)
    return f"{name}{tuple(leaf.shape)}".encode() + sample.view(np.uint16).tobytes()


def _sample_index(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """One index array a dimension, [X] each: every stride-th element of the flattened leaf."""
    size = math.prod(shape)
    positions = np.arange(0, size, max(1, size // _FINGERPRINT_SAMPLES))
    return np.unravel_index(positions, shape) if shape else ()


@functools.partial(jax.jit, static_argnums=1)
def sample_leaf(leaf: jax.Array, place: Sharding) -> jax.Array:
    """The elements that a leaf's mark is of, [X] (a scalar leaf: itself), whole on every device.

    place: the leaf's sharding. Each device reads the elements of its own part by their indices:
    flattening a sharded leaf would put all of it on every device first, and so may a bitcast of it.
    """
    index = _sample_index(leaf.shape)
    if not index or not isinstance(place, NamedSharding):
        return leaf[index]
    entries = (*place.spec, *[None] * (leaf.ndim - len(place.spec)))
    axes = [
        () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for entry in entries
    ]
    local = functools.partial(_sample_part, index=index, axes=axes)
    return jax.shard_map(
        local, mesh=place.mesh, in_specs=place.spec, out_specs=PartitionSpec(), check_vma=False
    )(leaf)


def _sample_part(
    part: jax.Array, index: tuple[np.ndarray, ...], axes: Sequence[tuple[str, ...]]
) -> jax.Array:
    """A device's part -> the whole sample: its own elements, and by a sum those of the others.

    axes: mesh axes of each dimension. Bits are added, not numbers: -0 + 0 would be 0.
    """
    mine_X, local = jnp.ones(index[0].shape, bool), []
    for positions_X, size, names in zip(index, part.shape, axes, strict=True):
        offset_X = positions_X.astype(np.int32) - (jax.lax.axis_index(names) * size if names else 0)
        mine_X &= (offset_X >= 0) & (offset_X < size)
        local.append(jnp.clip(offset_X, 0, size - 1))
    bits_X = _as_bits(part[tuple(local)])
    total_X = jax.lax.psum(
        jnp.where(mine_X, bits_X, jnp.zeros_like(bits_X)),
        [name for names in axes for name in names],
    )
    return (
        total_X if bits_X.dtype == part.dtype else jax.lax.bitcast_convert_type(total_X, part.dtype)
    )


def _as_bits(x: jax.Array) -> jax.Array:
    """Floating-point numbers as whole ones of the same bits; whole numbers as they are."""
    return (
        jax.lax.bitcast_convert_type(x, f"uint{bits(x.dtype)}")
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
    )


def awaited(tree: Tree) -> Tree:
    """The tree. On several CPU devices, returns when it is computed; elsewhere at once.

    For results of programs with collectives: two that run at one time on a CPU can wait for each
    other's threads for ever. Accelerators run programs one after the other.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(tree)
    return tree


def joined_marks(marks: Mapping[str, bytes]) -> str:
    """The fingerprint of leaves by name."""
    digest = hashlib.sha256()
    for _, mark in sorted(marks.items()):
        digest.update(mark)
    return digest.hexdigest()[:16]


def digests(tree: Tree) -> dict[str, str]:
    """Of each leaf `dtype[shape]:16 hex digits`, by its name: what tells that an array came back as
    it was.

    The digits are two sums, modulo 2^32, of a mixture of each element's bits with its index. A
    changed bit changes the sums for certain; other changes pass with a probability of 2^-64. A sum
    does not depend on how a leaf is split, and devices form it where the leaf lies. No protection
    against forgery.
    """
    # One leaf after the other: on CPUs, programs with collectives that run at one time can wait for
    # each other's threads for ever.
    return {
        name: f"{kind(leaf)}:{''.join(f'{int(part):08x}' for part in content_sums(leaf))}"
        for name, leaf in named_leaves(tree).items()
    }


def kind(leaf: Array | jax.ShapeDtypeStruct) -> str:
    """`float32[3,5]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


@jax.jit
def content_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two uint32 sums of `digests`."""
    bits_ = _as_bits(leaf).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    # The second lane continues the first: it is cheaper than another mixture of the index.
    first = _mixed(bits_ ^ _mixed(index + jnp.uint32(0x9E3779B9)))
    second = _mixed(first + jnp.uint32(0x85EBCA77) + index)
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit (the finaliser of
    MurmurHash3, public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
