"""Collectives and bytes of compiled programs, against numbers worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from perl_jax.planning import hlo, hlo_text
from perl_jax.planning.hlo import Collective
from perl_jax.planning.topology import topology

from . import compile_only as programs
from .compile_only import HIDDEN, LAYERS, ROWS, WIDTH

ROWS_HERE = ROWS // 2  # rows of one device, split over data
X_BYTES = ROWS_HERE * WIDTH * 4


@pytest.fixture(scope="module")
def mesh():
    return programs.mesh_of(jax.devices())


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu")
    return programs.mesh_of(topology("v5e:2x4"))


def account(function, *args, **options) -> hlo.Account:
    return hlo.account(programs.compiled(function, *args).as_text(), **options)


# -- programs on the CPU -------------------------------------------------------------------------


def test_collectives_of_a_scan(mesh):
    found = account(programs.mlps, *programs.tensor_parallel(mesh))
    # One all-reduce of [rows, width] among 4 a layer; each of 4 sends 2 x 3/4 of it.
    assert found.collectives == (
        Collective("all-reduce", 4, LAYERS, LAYERS * X_BYTES, LAYERS * X_BYTES * 6 // 4),
    )
    assert found.link_bytes == LAYERS * X_BYTES * 3 // 2 and found.unknown_loops == ()


def test_collectives_of_nested_scans(mesh):
    found = account(programs.twice, *programs.tensor_parallel(mesh))
    assert found.collectives == (
        Collective(
            "all-reduce", 4, 2 * LAYERS, 2 * LAYERS * X_BYTES, 2 * LAYERS * X_BYTES * 6 // 4
        ),
    )


def test_split_weights_are_gathered_a_layer(mesh):
    split = programs.array(mesh, (LAYERS, WIDTH, HIDDEN), None, "model")
    other = programs.array(mesh, (LAYERS, HIDDEN, WIDTH), None, "model")
    rows = programs.array(mesh, (8 * ROWS, WIDTH), ("data", "model"))
    found = account(programs.mlps, rows, split, other)
    full = WIDTH * HIDDEN * 4
    assert found.collectives == (
        Collective("all-gather", 4, 2 * LAYERS, 2 * LAYERS * full, 2 * LAYERS * full * 3 // 4),
    )


def each_kind(mesh):
    """All-gather, reduce-scatter, all-reduce and all-to-all over model, once each."""

    def local(x):
        gathered = jnp.sin(jax.lax.all_gather(x, "model", tiled=True))
        scattered = jnp.cos(jax.lax.psum_scatter(gathered, "model", tiled=True))
        return jnp.tanh(
            jax.lax.all_to_all(jax.lax.psum(scattered, "model") + x, "model", 1, 0, tiled=True)
        )

    spec = PartitionSpec("model")
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def ring(mesh):
    """Every shard goes once around, n - 1 permutes in a loop."""

    def local(x):
        def turn(_, carry):
            total, moving = carry
            moving = jax.lax.ppermute(moving, "model", [(i, (i + 1) % 4) for i in range(4)])
            return total + moving, moving

        return jax.lax.fori_loop(0, 3, turn, (x, x))[0]

    return jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec("model"), out_specs=PartitionSpec("model")
    )


def test_every_kind(mesh):
    full, shard = 4096 * 256 * 4, 1024 * 256 * 4
    found = account(each_kind(mesh), programs.array(mesh, (4096, 256), "model"))
    assert found.collectives == (
        Collective("all-gather", 4, 1, full, full * 3 // 4),
        Collective("all-reduce", 4, 1, shard, shard * 6 // 4),
        Collective("all-to-all", 4, 1, shard, shard * 3 // 4),
        Collective("reduce-scatter", 4, 1, shard, full * 3 // 4),
    )


def test_permutes_in_a_loop(mesh):
    shard = 1024 * 256 * 4
    found = account(ring(mesh), programs.array(mesh, (4096, 256), "model"))
    assert found.collectives == (Collective("collective-permute", 4, 3, 3 * shard, 3 * shard),)


def until_large(x_BD, w_DF, v_FD):
    """Ends when the data say so."""
    return jax.lax.while_loop(
        lambda x: jnp.max(x) < 1e3, lambda x: x + jax.nn.relu(x @ w_DF) @ v_FD, x_BD
    )


def test_a_loop_of_unknown_length(mesh):
    args = (
        programs.array(mesh, (ROWS, WIDTH), "data"),
        programs.array(mesh, (WIDTH, HIDDEN), None, "model"),
        programs.array(mesh, (HIDDEN, WIDTH), "model"),
    )
    text = programs.compiled(until_large, *args).as_text()
    with pytest.raises(ValueError, match=r"until_large.*unknown_trips"):
        hlo.account(text)
    none, one, ten = (hlo.account(text, unknown_trips=n) for n in (0, 1, 10))
    assert len(ten.unknown_loops) == 1 and ten.unknown_loops[0].endswith("while")
    body = [c for c in ten.collectives if c.result_bytes == 10 * X_BYTES]
    assert body == [Collective("all-reduce", 4, 10, 10 * X_BYTES, 10 * X_BYTES * 6 // 4)]
    assert ten.hbm_bytes - none.hbm_bytes == 10 * (one.hbm_bytes - none.hbm_bytes) > 0


def test_a_stack_of_weights_is_read_a_layer_at_a_time(mesh):
    n, rows, width = 40, 8, 512
    found = account(
        programs.layers,
        programs.array(mesh, (rows, width)),
        programs.array(mesh, (n, width, width)),
    )
    layer, x = width * width * 4, rows * width * 4
    # Each layer is sliced out (read, written) and multiplied (read); x is read and written a few
    # times.
    assert n * layer <= found.hbm_read <= n * (2 * layer + 6 * x) + 8 * x
    assert found.hbm_written <= n * (layer + 6 * x) + 8 * x
    assert found.cycles == 0


def test_a_stack_of_results_is_written_a_layer_at_a_time(mesh):
    def powers(x):
        return jax.lax.scan(lambda x, _: (x * 1.5, x), x, length=50)[1]

    x = 1000 * 4
    found = account(powers, programs.array(mesh, (1000,)))
    # 50 rows of the result, the carry each turn, and the zeros the stack begins with: not 50
    # stacks.
    assert 50 * x <= found.hbm_written <= 50 * 4 * x + 60 * x
    assert found.hbm_read <= 50 * 4 * x + 60 * x


def test_an_update_of_a_donated_buffer_counts_the_update():
    def put(buffer, row, at):
        return jax.lax.dynamic_update_slice(buffer, row, (at, 0))

    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1000, 128), "float32"), ((1, 128), "float32"), ((), "int32"))
    ]
    text = jax.jit(put, donate_argnums=0).lower(*shapes).compile().as_text()
    found = hlo.account(text)
    assert found.hbm_written == 512 and found.hbm_read <= 512 + 64


def test_rows_gathered_from_a_table_count_the_rows():
    shapes = jax.ShapeDtypeStruct((5000, 128), "float32"), jax.ShapeDtypeStruct((64,), "int32")
    found = account(lambda table, rows: table[rows] * 2, *shapes)
    assert found.hbm_read == 64 * 128 * 4 + 64 * 4 and found.hbm_written == 64 * 128 * 4


def test_a_conditional_costs_its_dearest_branch(mesh):
    def either(p, x_BD, up_DF, down_FD):
        dear = lambda x: (
            jax.nn.relu(x @ up_DF) @ down_FD + jax.nn.relu(jnp.sin(x) @ up_DF) @ down_FD
        )
        return jax.lax.cond(p, dear, lambda x: x + 1, x_BD)

    def always(x_BD, up_DF, down_FD):
        return jax.nn.relu(x_BD @ up_DF) @ down_FD + jax.nn.relu(jnp.sin(x_BD) @ up_DF) @ down_FD

    x, up, down = (
        programs.array(mesh, s, *p)
        for s, p in (
            ((ROWS, WIDTH), ("data",)),
            ((WIDTH, HIDDEN), (None, "model")),
            ((HIDDEN, WIDTH), ("model",)),
        )
    )
    found = account(either, programs.array(mesh, (), dtype="bool"), x, up, down)
    assert found.collectives == account(always, x, up, down).collectives != ()


# -- programs on TPUs ----------------------------------------------------------------------------


def test_arguments_as_a_tpu_lays_them_out(v5e):
    shapes = [
        ((7, 100), "bfloat16"),
        ((3, 5), "float32"),
        ((1000,), "int8"),
        ((6, 33, 200), "bfloat16"),
        ((2, 2), "bool"),
    ]
    args = [programs.array(v5e, s, dtype=d) for s, d in shapes]
    program = programs.compiled(lambda *xs: sum(jnp.sum(x.astype(jnp.float32)) for x in xs), *args)
    module = hlo_text.parse_module(program.as_text())
    total = sum(p.shape.bytes for p in module.computations[module.entry].parameters)
    # Arguments are aligned, to 512 bytes or so.
    assert total <= program.memory_analysis().argument_size_in_bytes <= total + len(args) * 1024


def test_a_scan_on_a_tpu(v5e):
    args = programs.tensor_parallel(v5e, "bfloat16")
    found = account(programs.mlps, *args)
    x = X_BYTES // 2
    assert found.collectives == (
        Collective("all-reduce", 4, LAYERS, LAYERS * x, LAYERS * x * 6 // 4),
    )
    weights = LAYERS * 2 * WIDTH * HIDDEN // 4 * 2
    assert weights + x <= found.hbm_read <= weights + x * (1 + 8 * LAYERS)
    assert x <= found.hbm_written <= x * (1 + 8 * LAYERS)


def test_cycles_of_a_matrix_product(v5e):
    n, one = 2048, programs.mesh_of(v5e.devices.ravel()[:2])
    found = account(
        programs.layers,
        *(programs.array(one, s, dtype="bfloat16") for s in ((n, n), (LAYERS, n, n))),
    )
    least = LAYERS * 2 * n**3 / (197e12 / 1.5e9)
    assert least <= found.cycles <= 2 * least


def test_every_kind_on_a_tpu(v5e):
    full, shard = 4096 * 256 * 4, 1024 * 256 * 4
    found = {
        c.kind: c
        for c in account(each_kind(v5e), programs.array(v5e, (4096, 256), "model")).collectives
    }
    assert found["all-gather"] == Collective("all-gather", 4, 1, full, full * 3 // 4)
    assert found["all-reduce"] == Collective("all-reduce", 4, 1, shard, shard * 6 // 4)
    assert found["all-to-all"] == Collective("all-to-all", 4, 1, shard, shard * 3 // 4)
    # As such, or as a fusion of an all-reduce and a slice of a buffer padded a little.
    scattered = found["reduce-scatter"]
    assert scattered.runs == 1 and full * 3 // 4 <= scattered.link_bytes <= 1.2 * full * 3 // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "7x:2x2x1"])
def test_collectives_spread_over_fusions_count_once(name):
    pytest.importorskip("libtpu")
    mesh, n, d, f, rows = programs.mesh_of(topology(name)), 6, 1024, 4096, 4096
    args = (
        programs.array(mesh, (rows, d), ("data", "model"), dtype="bfloat16"),
        programs.array(mesh, (n, d, f), None, "model", dtype="bfloat16"),
        programs.array(mesh, (n, f, d), None, "model", dtype="bfloat16"),
    )
    gradient = jax.grad(lambda *a: programs.mlps(*a).astype(jnp.float32).sum(), argnums=(1, 2))
    text = programs.compiled(gradient, *args).as_text()
    found = {c.kind: c for c in hlo.account(text).collectives}
    weight, x = d * f * 2, rows * d // 2 * 2
    # Forward: both weights; backward: both again less what is not needed, and x among the 4.
    gathered = n * (3 * weight + x)
    assert (found["all-gather"].runs, found["all-gather"].result_bytes) == (4 * n, gathered)
    assert found["all-gather"].link_bytes == gathered * 3 // 4
    if name.startswith("v5e"):
        assert "async_collective_fusion" in text
