"""Refusals as data: from the compiler, and in every wording seen of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from perl_jax.planning.refusal import Buffer, Refusal, attempt, parse
from perl_jax.planning.topology import CHIPS, topology

from . import compile_only as programs

G, M, K = 2**30, 2**20, 2**10

# A real one, shortened: libtpu 0.0.42, a scatter-add beyond 227 MiB.
LATE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 227.55M of 227.00M hbm. Exceeded hbm capacity by 565.0K.

Total hbm usage >= 469.55M:
    reserved        258.00M 
    program         130.55M 
    arguments        81.00M 

Output size 16.00M; shares 0B with arguments.

Program hbm requirement 130.55M:
    HLO temp        128.02M (50.0% utilization: Unpadded (64.00M) Padded (128.00M), 0.0% fragmentation (15.5K))
    overlays          2.54M

  Largest program allocations in hbm:

  1. Size: 128.00M
     Operator: op_name="jit(f)/while/u" source_file="/home/me/f.py" source_line=12
     Shape: f32[262144,64]{1,0:T(8,128)}
     Unpadded size: 64.00M
     Extra memory due to padding: 64.00M (2.0x expansion)
     XLA label: copy.1.remat2 = copy(param.2), sharding={replicated}
     Allocation type: HLO temp
     ==========================

  2. Size: 2.54M
     XLA label: overlays
     Allocation type: overlays
     ==========================


  Largest program arguments and outputs in hbm:

  1. Size: 64.00M
     Shape: f32[262144,64]{0,1:T(8,128)}
     XLA label: Argument 2 index {}
     ==========================

  2. Size: 16.00M
     Shape: f32[65536,64]{0,1:T(8,128)}
     XLA label: Output index {}
     ==========================


See https://openxla.org/xla/errors/error_1000 for more details. [type.googleapis.com/tensorflow.tpu.CompilationResultProto='Used 1.00M of 1.00M hbm']"""


def test_a_late_refusal():
    found = parse(LATE)
    assert (found.space, found.asked, found.available, found.exceeded) == (
        "hbm",
        round(227.55 * M),
        227 * M,
        565 * K,
    )
    assert (found.arguments, found.program, found.reserved) == (81 * M, round(130.55 * M), 258 * M)
    assert found.text == LATE and found.buffers == (
        Buffer(
            128 * M, "temp", "f32[262144,64]{1,0:T(8,128)}", "jit(f)/while/u", "/home/me/f.py:12"
        ),
        Buffer(64 * M, "argument", "f32[262144,64]{0,1:T(8,128)}", argument=2),
        Buffer(16 * M, "output", "f32[65536,64]{0,1:T(8,128)}"),
        Buffer(round(2.54 * M), "overlays"),
    )


EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (32.00G) exceeds available HBM (15.75G)."
)
TWO = (
    "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 34.00G, SparseCore Hbm usage 64.00G, "
    "exceeding available bytes: 95.50G"
)
VMEM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
    "vmem. Used 32.50M of 16.00M vmem. Exceeded vmem capacity by 16.50M"
)
ABORTED = (
    "RESOURCE_EXHAUSTED: Compilation failure: Aborting compilation early because it's "
    "unlikely to have enough device memory. Requires 20.00G, has 15.75G available."
)


@pytest.mark.parametrize(
    ("text", "space", "asked", "available", "exceeded"),
    [
        (EARLY, "hbm", 32 * G, round(15.75 * G), round(16.25 * G)),
        (EARLY.replace("15.75G", "1000.00M"), "hbm", 32 * G, 1000 * M, 32 * G - 1000 * M),
        (TWO, "hbm", 98 * G, round(95.5 * G), round(2.5 * G)),
        (VMEM, "vmem", round(32.5 * M), 16 * M, round(16.5 * M)),
        (ABORTED, None, 20 * G, round(15.75 * G), round(4.25 * G)),
        # What a device says when it has run out, not the compiler.
        (
            "RESOURCE_EXHAUSTED: Attempting to allocate 64.00G. That was not possible. There are "
            "10.51G free.",
            None,
            64 * G,
            None,
            None,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.", None, 1024, None, None),
        ("RESOURCE_EXHAUSTED: no room", None, None, None, None),
    ],
)
def test_other_wordings(text, space, asked, available, exceeded):
    assert parse(text) == Refusal(text, space, asked, available, exceeded)


def test_one_buffer_larger_than_the_memory():
    text = (
        "RESOURCE_EXHAUSTED: Allocation (size=18253611008) would exceed memory "
        "(size=17179869184) :: %s0 = inlined_call_operand.hbm [shape: f32[4456448,1024], "
        "index: 0, kind: input, shape index: {}] /* operand 0 */ :: reduce"
    )
    buffer = Buffer(17 * G, "argument", "f32[4456448,1024]", argument=0)
    assert parse(text) == Refusal(text, None, 17 * G, 16 * G, G, buffers=(buffer,))
    text = (
        "RESOURCE_EXHAUSTED: Allocation (size=21474836480) would exceed memory "
        "(size=17179869184) :: #allocation1 [shape = 'f32[320,4096,4096]{1,2,0:T(8,128)}', "
        "space=hbm, size = 0x0, tag = 'output of fusion.1'] :: <no-hlo-instruction>"
    )
    assert parse(text).buffers == (Buffer(20 * G, "temp", "f32[320,4096,4096]{1,2,0:T(8,128)}"),)


def test_other_errors_pass():
    def fail(error):
        raise error

    assert attempt(lambda: 7) == 7
    for error in (
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no"),
        ValueError("RESOURCE_EXHAUSTED"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)):
            attempt(lambda: fail(error))
    assert (
        attempt(lambda: fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"))).asked
        is None
    )


# -- from the compiler ---------------------------------------------------------------------------


def compile_on(name: str, function, *shapes, **options):
    mesh = programs.mesh_of(topology(name))
    args = [programs.array(mesh, shape) for shape in shapes]
    return attempt(lambda: jax.jit(function, keep_unused=True).lower(*args).compile(**options))


def test_arguments_beyond_the_memory():
    pytest.importorskip("libtpu")
    found = compile_on("v5e:2x2", lambda x: x.sum(), (17 * 2**18, 1024))
    assert (found.space, found.asked, found.buffers) == ("hbm", 17 * G, ())
    assert abs(found.available - CHIPS["v5e"].usable) < 10 * M


def test_temporaries_beyond_the_memory():
    pytest.importorskip("libtpu")

    def square(x):
        scores = jnp.exp(jnp.sin(x)[:, None] * jnp.cos(x)[None, :])
        return jnp.sort(scores @ scores, axis=0)[:4]

    found = compile_on("v5e:2x2", square, (65536,))
    assert found.asked >= 2 * 65536**2 * 4 and found.arguments is None


@pytest.mark.parametrize("name", ["v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1"])
def test_usable_memory(name):
    """Arguments of exactly what is usable are refused with a list; 1 MiB less is compiled."""
    pytest.importorskip("libtpu")
    usable = CHIPS[name.split(":")[0]].usable
    rows = usable // 4096  # of 4 KiB

    def first(x, y):
        return x[0, 0] + y[0, 0]

    fits = compile_on(name, first, (rows // 2, 1024), (rows - rows // 2 - 256, 1024))
    assert not isinstance(fits, Refusal)
    found = compile_on(name, first, (rows // 2, 1024), (rows - rows // 2 - 20, 1024))
    assert found.exceeded < M and abs(found.available - usable) < 10 * M
    assert {(b.kind, b.argument) for b in found.buffers[:2]} == {("argument", 0), ("argument", 1)}
    assert {"output", "temp"} < {b.kind for b in found.buffers}


def test_a_wrong_compiler_option_is_no_refusal():
    pytest.importorskip("libtpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        compile_on("v5e:2x2", lambda x: x, (8, 8), compiler_options={"no_such_option": 1})
