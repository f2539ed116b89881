"""Names, counts, norms and fingerprints of trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.lora import Adapter
from perl_jax.planning.topology import topology
from perl_jax.runtime import trees

TREE = {
    "b": {"y": np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)},
    "a": [np.full(4, 2.0, jnp.bfloat16), np.zeros((), np.int32)],
}


def test_names_follow_the_path():
    assert list(trees.named_leaves(TREE)) == ["a/0", "a/1", "b/y"]
    adapter = Adapter(lora={"layers": {"q": {"lora_a": np.zeros(2)}}}, head={"bias": np.zeros(())})
    assert list(trees.named_leaves(adapter)) == ["lora/layers/q/lora_a", "head/bias"]
    assert trees.named_leaves(adapter)["head/bias"] is adapter.head["bias"]


def test_map_named_gets_the_name_and_every_trees_leaf():
    result = trees.map_named(
        lambda name, a, b: f"{name} {a} {b}", {"x": 1, "y": [2]}, {"x": 3, "y": [4]}
    )
    assert result == {"x": "x 1 3", "y": ["y/0 2 4"]}


def test_counts_and_bytes():
    assert trees.count(TREE) == 6 + 4 + 1
    assert trees.size_bytes(TREE) == 6 * 4 + 4 * 2 + 4
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    assert (trees.count(abstract), trees.size_bytes(abstract)) == (11, 36)
    assert trees.count({}) == trees.size_bytes(None) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_looks_at_every_element(bad):
    assert bool(trees.all_finite(TREE))
    for name in ("a/0", "b/y"):
        broken = trees.map_named(
            lambda n, leaf: jnp.asarray(leaf).ravel().at[-1].set(bad) if n == name else leaf, TREE
        )
        assert not bool(jax.jit(trees.all_finite)(broken))


def test_global_norm_by_hand():
    # sqrt(3^2 + 4 * 2^2) = 5.
    assert float(trees.global_norm(TREE)) == 5.0
    # Squares are added in float32: 4,097 ones in bfloat16 would add up to fewer.
    np.testing.assert_allclose(
        trees.global_norm({"x": jnp.ones(4097, jnp.bfloat16)}), np.sqrt(4097), rtol=1e-6
    )


def test_fingerprint_tells_names_shapes_and_values():
    x = np.arange(6, dtype=np.float32)
    trees_to_tell = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(2, 3)},
        {"x": x.reshape(3, 2)},
        {"x": x + 1},
        {"x": x[:5]},
        {"x": x, "y": x},
    ]
    prints = [trees.fingerprint(tree) for tree in trees_to_tell]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)
    assert (
        prints[0] == trees.fingerprint({"x": jnp.asarray(x)}) == trees.fingerprint({"x": x.copy()})
    )
    # Order of insertion does not matter, the last element does.
    assert trees.fingerprint({"b": x, "a": 2 * x}) == trees.fingerprint({"a": 2 * x, "b": x})
    assert trees.fingerprint({"x": np.append(x[:5], 99).astype(np.float32)}) != prints[0]


def test_fingerprint_is_of_values_rounded_to_bfloat16():
    x = np.random.default_rng(0).standard_normal((30, 700)).astype(np.float32)
    first = trees.fingerprint({"x": x})
    assert (
        first
        == trees.fingerprint({"x": x.astype(jnp.bfloat16)})
        == trees.fingerprint({"x": jnp.asarray(x, jnp.bfloat16)})
    )
    # A change of one row among many is seen although only some elements are read.
    for row in (0, 13, 29):
        assert (
            trees.fingerprint({"x": np.where(np.arange(30)[:, None] == row, 1.02 * x, x)}) != first
        )


def mark_by_flattening(name: str, array: np.ndarray) -> bytes:
    """A leaf's mark by its definition: every stride-th element of the flattened array, in
    bfloat16.
    """
    flat = array.reshape(-1)
    sample = flat[:: max(1, flat.size // 4096)].astype(np.float32).astype(jnp.bfloat16)
    return f"{name}{array.shape}".encode() + sample.view(np.uint16).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 8, 1200), (None, "a", "b")),
        ((3, 8, 1200), (None, ("b", "a"))),
        ((3, 8, 1200), (None, None, "b")),
        ((4, 6, 4, 90), ("b", None, "a")),
        ((4100,), ("b",)),
        ((5, 7), ()),
        ((), ()),
    ],
)
def test_a_mark_does_not_depend_on_where_the_leaf_lies(shape, spec, dtype):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    # Signed zeros among them: a sum over devices would lose their sign.
    array = np.random.default_rng(0).integers(-2, 3, shape).astype(np.float32) * np.float32(-0.3)
    array = np.asarray(array, jnp.dtype(dtype))
    expected = mark_by_flattening("x", array)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    assert trees.leaf_mark("x", array) == expected
    assert trees.leaf_mark("x", jnp.asarray(array)) == expected
    assert trees.leaf_mark("x", jax.device_put(array, place)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(80, 8192, 28672), (80, 8192, 8192)])
def test_a_mark_of_a_large_sharded_leaf_takes_no_memory_of_its_size(shape, dtype):
    """The gate and the query kernel of Llama 70B on v5e:4x4: a flattened one is replicated, 72 GiB
    a chip.
    """
    pytest.importorskip("libtpu")
    mesh = jax.sharding.Mesh(
        np.asarray(topology("v5e:4x4")).reshape(1, 4, 4), ("data", "fsdp", "tensor")
    )
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    compiled = trees.sample_leaf.lower(
        jax.ShapeDtypeStruct(shape, dtype, sharding=place), place
    ).compile()
    account = compiled.memory_analysis()
    assert account.argument_size_in_bytes >= np.prod(shape) * jnp.dtype(dtype).itemsize // 16
    assert account.temp_size_in_bytes < 2**20


# Checksums of content.


def content_sums(array: np.ndarray) -> str:
    """The digits of `trees.digests`, element by element in whole numbers of Python."""
    word = 2**32
    mixture = lambda x: (lambda y: (lambda z: z ^ z >> 16)((y ^ y >> 13) * 0xC2B2AE35 % word))(
        (x ^ x >> 16) * 0x85EBCA6B % word
    )
    one = two = 0
    for index, bits in enumerate(array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist()):
        first = mixture(bits ^ mixture((index + 0x9E3779B9) % word))
        one, two = one + first, two + mixture((first + 0x85EBCA77 + index) % word)
    return f"{one % word:08x}{two % word:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8"])
def test_digests_by_hand(dtype):
    array = np.asarray(100 * np.random.default_rng(0).random((3, 4, 5)), jnp.dtype(dtype))
    assert (
        trees.digests({"x": array})
        == trees.digests({"x": jnp.asarray(array)})
        == {"x": f"{dtype}[3,4,5]:{content_sums(array)}"}
    )
    assert trees.digests({"x": array[0, 0, :1].reshape(())}) == {
        "x": f"{dtype}[]:{content_sums(array[0, 0, :1])}"
    }


def test_digests_are_read_leaf_by_leaf(monkeypatch):
    # Many programs with collectives at one time have hung the CPU's devices: the next begins when
    # the last is read.
    events, sums = [], trees.content_sums

    class Read:
        def __init__(self, part):
            self.part = part

        def __int__(self):
            events.append("read")
            return int(self.part)

    def watched(leaf):
        events.append("begun")
        return tuple(Read(part) for part in sums(leaf))

    monkeypatch.setattr(trees, "content_sums", watched)
    trees.digests({"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.int32)})
    assert events == ["begun", "read", "read"] * 2


def test_digests_see_every_bit_and_no_placement():
    array = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    expected = trees.digests(array)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (("a", "b"), (None, "a"), (("b", "a"),), ()):
        assert (
            trees.digests(
                jax.device_put(
                    array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
                )
            )
            == expected
        )
    found = {expected[""]}
    for bit in range(0, 32 * array.size, 7):
        changed = array.copy()
        changed.reshape(-1).view(np.uint32)[bit // 32] ^= 1 << bit % 32
        found.add(trees.digests(changed)[""])
    # Elements that change places, NaN and the sign of zero are seen too.
    found |= {
        trees.digests(other)[""]
        for other in (
            array[::-1].copy(),
            array[:, ::-1].copy(),
            np.where(array > 1, np.nan, array),
            0 * array,
            0 * -np.abs(array),
        )
    }
    assert len(found) == 1 + len(range(0, 32 * array.size, 7)) + 5
