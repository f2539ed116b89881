"""Facts about trees of arrays: paths, counts, bytes, finiteness, fingerprints and digests."""

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
    """Returns a key path of `jax.tree_util` as text: `layers/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> dict[str, Array]:
    """Returns every leaf keyed by path (`path_name`), in the order of the tree.

    Args:
        tree: The tree.
        is_leaf: Whether a node counts as a leaf, as in `jax.tree.map`; None: arrays are leaves.
    """
    return {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    }


def map_named(function: Callable[..., Array], tree: Tree, *rest: Tree) -> Tree:
    """Returns `jax.tree.map` of a function that receives each leaf's path first.

    Args:
        function: (path, leaf, leaves of the other trees at this path) -> new leaf.
        tree: The first tree.
        rest: Further trees of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def insert(tree: dict, name: str, leaf: Array) -> None:
    """Puts a leaf into nested dicts, in place.

    Args:
        tree: The nested dicts; missing levels are added.
        name: Path of the leaf, such as `layers/attention/q/kernel`.
        leaf: The leaf.
    """
    *above, last = name.split("/")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = leaf


def count(tree: Tree) -> int:
    """Returns the number of array elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Returns the bytes of all leaves, in global shapes: copies on other devices do not count."""
    return sum(int(np.prod(leaf.shape)) * bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def bits(dtype: np.dtype) -> int:
    """Returns the bits of one element; 4 for the 4-bit types, which devices pack in pairs."""
    # NumPy counts a whole byte for the 4-bit types.
    return 4 if jnp.dtype(dtype).name in ("int4", "uint4") else 8 * jnp.dtype(dtype).itemsize


def all_finite(tree: Tree) -> jax.Array:
    """Returns a bool scalar: whether no leaf holds NaN or infinity."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def global_norm(tree: Tree) -> jax.Array:
    """Returns the square root of the sum of squares of all leaves, float32."""
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    )


def fingerprint(tree: Tree) -> str:
    """Returns 16 hex digits that identify the weights of a base model.

    They are the SHA-256 of every leaf's path, shape and evenly spaced elements (4,096 to 8,191 of a
    large leaf, all of a smaller one), rounded to bfloat16. Rounding makes them equal for a
    checkpoint loaded in bfloat16 and in float32. Sampling makes them quick for large models.
    """
    return fingerprint_of_marks(
        {name: leaf_mark(name, leaf) for name, leaf in named_leaves(tree).items()}
    )


def leaf_mark(name: str, leaf: Array) -> bytes:
    """Returns the bytes of one leaf that enter the fingerprint: path, shape and sampled elements.

    For trees whose leaves are never in memory together (`fingerprint_of_marks`).

    Args:
        name: Path of the leaf.
        leaf: The leaf.
    """
    if isinstance(leaf, jax.Array):
        sample = np.asarray(sample_leaf(leaf, leaf.sharding))
    else:
        sample = np.asarray(leaf)[_sample_index(leaf.shape)]
    sample = sample.reshape(-1).astype(np.float32).astype(ml_dtypes.bfloat16)
    return f"{name}{tuple(leaf.shape)}".encode() + sample.view(np.uint16).tobytes()


def _sample_index(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Returns the indices of evenly spaced elements of an array, one array [X] per dimension.

    X is 4,096 to 8,191, or all elements of a smaller array. The shape () gives ().
    """
    size = math.prod(shape)
    positions = np.arange(0, size, max(1, size // _FINGERPRINT_SAMPLES))
    return np.unravel_index(positions, shape) if shape else ()


@functools.partial(jax.jit, static_argnums=1)
def sample_leaf(leaf: jax.Array, target: Sharding) -> jax.Array:
    """Returns the sampled elements of a leaf for its fingerprint, [X], whole on every device.

    A scalar leaf is returned unchanged. Each device reads the elements of its own part by their
    indices. Flattening or bitcasting a sharded leaf could copy the whole leaf to every device
    first.

    Args:
        leaf: The leaf.
        target: Sharding of the leaf (static).
    """
    index = _sample_index(leaf.shape)
    if not index or not isinstance(target, NamedSharding):
        return leaf[index]
    entries = (*target.spec, *[None] * (leaf.ndim - len(target.spec)))
    axes = [
        () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for entry in entries
    ]
    local = functools.partial(_sample_part, index=index, axes=axes)
    return jax.shard_map(
        local, mesh=target.mesh, in_specs=target.spec, out_specs=PartitionSpec(), check_vma=False
    )(leaf)


def _sample_part(
    part: jax.Array, index: tuple[np.ndarray, ...], axes: Sequence[tuple[str, ...]]
) -> jax.Array:
    """Returns the whole sample from one device's part: its own elements plus a psum of the others'.

    The sum is over bit patterns, because a sum of numbers would turn -0 into 0.

    Args:
        part: This device's part of the leaf.
        index: Indices of the sampled elements in the whole leaf, one array per dimension.
        axes: Mesh axes of each dimension.
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
    """Returns floating-point numbers as integers with the same bits, and integers unchanged."""
    return (
        jax.lax.bitcast_convert_type(x, f"uint{bits(x.dtype)}")
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
    )


def block_on_cpu(tree: Tree) -> Tree:
    """Returns the tree; on several CPU devices only after it has been computed.

    For results of programs with collective operations: two such programs that run at the same time
    on CPU devices can deadlock. Accelerators run programs one after the other.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(tree)
    return tree


def fingerprint_of_marks(marks: Mapping[str, bytes]) -> str:
    """Returns the `fingerprint` of a tree from its leaves' marks, keyed by path (`leaf_mark`)."""
    digest = hashlib.sha256()
    for _, mark in sorted(marks.items()):
        digest.update(mark)
    return digest.hexdigest()[:16]


def digests(tree: Tree) -> dict[str, str]:
    """Returns `dtype[shape]:16 hex digits` of each leaf, keyed by path, to detect changed content.

    The digits are two sums, modulo 2^32, of a hash of each element's bits and index. One changed
    bit always changes the sums; other changes go unnoticed with probability 2^-64. The sums do not
    depend on a leaf's sharding, and devices compute them without moving the leaf. They do not
    protect against forgery.
    """
    # One leaf after the other, because programs with collectives can deadlock on CPUs when they run
    # at the same time.
    found = {}
    for name, leaf in named_leaves(tree).items():
        first, second = content_sums(leaf)
        found[name] = f"{dtype_and_shape(leaf)}:{int(first):08x}{int(second):08x}"
    return found


def not_finite(tree: Tree) -> list[str]:
    """Returns the paths of the leaves that hold NaN or infinity, in the parts on this host."""
    return [
        name
        for name, leaf in named_leaves(tree).items()
        if not all(
            np.isfinite(np.asarray(part.data)).all()
            for part in leaf.addressable_shards
            if part.replica_id == 0 or leaf.is_fully_replicated
        )
    ]


def dtype_and_shape(leaf: Array | jax.ShapeDtypeStruct) -> str:
    """Returns the dtype and shape as text: `float32[3,5]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


@jax.jit
def content_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the two uint32 sums of `digests`, two scalars, for one leaf."""
    bits_ = _as_bits(leaf).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    # The second sum hashes the first hash again: cheaper than another hash of the index.
    first = _mixed(bits_ ^ _mixed(index + jnp.uint32(0x9E3779B9)))
    second = _mixed(first + jnp.uint32(0x85EBCA77) + index)
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Returns a bijective hash of uint32 in which every output bit depends on every input bit.

    It is the finaliser of MurmurHash3 (public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
