"""Compilations are counted and bounded; the memory account adds up; donated buffers are reused."""

from __future__ import annotations

import ctypes
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.runtime import programs
from perl_jax.runtime.programs import Memory, Program


def test_one_compilation_a_shape():
    calls = []

    def double(x, tree):
        calls.append(x.shape)
        return 2 * x + tree["y"]

    program = Program("double", double)
    assert program.compilations == 0 and program.memory() is None
    for n in (3, 4, 3, 4, 3):
        result = program(jnp.full(n, 2.0), {"y": np.ones(n, np.float32)})
        np.testing.assert_array_equal(result, np.full(n, 5.0))
    assert program.compilations == 2 and calls == [(3,), (4,)]
    # Another dtype or another tree is another program.
    program(jnp.full(3, 2), {"y": np.ones(3, np.float32)})
    program(jnp.full(3, 2.0), {"y": np.ones(3, np.float32), "z": np.ones(1)})
    assert program.compilations == 4


@pytest.mark.parametrize(
    ("backend", "devices", "ends"), [("cpu", 8, 1), ("cpu", 1, 0), ("tpu", 8, 0)]
)
def test_on_several_cpu_devices_a_program_ends_before_the_next_begins(
    backend, devices, ends, monkeypatch
):
    waited = []
    program = Program("one", lambda x: x + 1)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    result = program(np.ones(3, np.float32))
    assert [one is result for one in waited] == [True] * ends


def test_growing_shapes_are_a_defect():
    program = Program("total", jnp.sum, limit=2)
    for n in (1, 2, 1):
        program(jnp.ones(n))
    with pytest.raises(RuntimeError, match="'total' met more than 2 argument shapes"):
        program(jnp.ones(3))
    # The known shapes go on working.
    assert program(jnp.ones(2)) == 2 and program.compilations == 2


def test_memory_of_a_known_program():
    # A (256 x 256) @ itself, twice: one input and one output of 256 KiB, at least one temporary.
    program = Program("cube", lambda x: jnp.tanh(x @ x) @ x)
    program(jnp.ones((4, 4)))
    program(jnp.ones((256, 256)))
    memory = program.memory()
    assert memory.arguments == memory.outputs == 256 * 256 * 4
    assert memory.temporaries >= 256 * 256 * 4 and memory.aliased == 0
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries
    assert memory.beyond_arguments == memory.peak - memory.arguments > 0


def test_peak_counts_aliased_bytes_once():
    assert Memory(arguments=10, outputs=7, temporaries=5, aliased=4).peak == 18
    assert Memory(arguments=10, outputs=7, temporaries=5, aliased=4).beyond_arguments == 8


def test_donated_arguments_are_taken_over_and_others_are_not():
    program = Program("add", lambda state, other: state + other, donate=(0,))
    state, other = jnp.arange(1000.0), jnp.ones(1000)
    pointer = state.unsafe_buffer_pointer()
    result = program(state, other)
    assert state.is_deleted() and not other.is_deleted()
    assert result.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(result, np.arange(1000) + 1)
    assert program.memory().aliased == 4000
    kept = Program("add", lambda state, other: state + other)
    kept(result, other)
    assert not result.is_deleted()


def test_outputs_go_where_they_are_told():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    whole = jax.device_put(
        np.arange(16.0, dtype=np.float32),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    result = Program("spread", lambda x: x + 1, out_shardings=place)(whole)
    assert result.sharding == place
    np.testing.assert_array_equal(result, np.arange(16) + 1)


def test_compiler_options_reach_the_compiler():
    program = Program("double", lambda x: 2 * x, compiler_options={"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        program(jnp.ones(2))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_goes_back_to_the_system():
    libc, size, number = ctypes.CDLL(None), 2**16, 2000
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    resident = lambda: (
        int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    )
    pieces = [libc.malloc(ctypes.c_size_t(size)) for _ in range(number)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    # The last one stays: what is freed below it is not the end of the heap, which would go back by
    # itself.
    for piece in pieces[:-1]:
        libc.free(piece)
    before = resident()
    programs.release_freed_memory()
    assert before - resident() > 0.9 * size * number
    libc.free(pieces[-1])


def test_what_compiling_leaves_is_given_back_once_a_shape(monkeypatch):
    times = []
    monkeypatch.setattr(programs, "release_freed_memory", lambda: times.append(1))
    double = Program("double", lambda x: 2 * x)
    for size in (3, 3, 4, 3):
        double(jnp.ones(size))
    assert len(times) == 2


def test_an_unwritable_cache_of_the_environment_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "programs"))
    programs._check_environments_cache.cache_clear()
    with warnings.catch_warnings():
        for _ in range(2):
            programs.use_compilation_cache(None)
    said = capsys.readouterr().err
    jax.config.update("jax_compilation_cache_dir", before)
    programs._check_environments_cache.cache_clear()
    assert said.count("JAX_COMPILATION_CACHE_DIR: ") == 1
    assert "a part of the path is a file" in said and "Compiled programs are not kept." in said
