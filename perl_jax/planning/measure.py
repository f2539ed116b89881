"""Measures memory, operations and traffic of a job's programs, compiled for the devices of a
mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax

from perl_jax.planning import hlo, refusal
from perl_jax.planning.flops import flops
from perl_jax.planning.hlo import Account
from perl_jax.planning.pieces import Phase, Piece, Planned, device_bytes
from perl_jax.planning.refusal import Refusal

# The compiler spends most of its time on finding a faster program, which hardly changes the peak.
EFFORT = {"quick": {"exec_time_optimization_effort": -1.0}, "full": {}}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one program needs. Bytes are those of one device.

    Attributes:
        name: The program's name.
        memory: Bytes by component; their sum is the peak while the program runs. `padding` is what
            the compiler's tiles add to the arguments; `temporaries` are activations, gathered
            weights, gradients, and outputs that reuse no argument's buffer. Of a refused program
            only the components that are known without compiling.
        flops: Operations of all devices together; 0 for programs of the start, which are not
            counted.
        account: Traffic and cycles; None if refused, or for programs of the start.
        seconds_to_compile: The time of tracing and compiling.
        arguments: Bytes of the program's arguments.
        refused: Why the program did not compile; None if it did.
        phase: As in `Piece`.
        of: As in `Piece`.
    """

    name: str
    memory: dict[str, int]
    flops: int
    account: Account | None
    seconds_to_compile: float
    arguments: int
    refused: Refusal | None = None
    phase: Phase = "step"
    of: str = ""

    @property
    def peak(self) -> int | None:
        """The peak in bytes; for a refused program the bytes that the compiler says it needs, or
        None if the compiler named no size.
        """
        if self.refused is None:
            return sum(self.memory.values())
        if self.refused.asked is None:
            return None
        # `asked` and `memory` both include the arguments; they are counted once.
        return self.refused.asked + sum(self.memory.values()) - self.arguments


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turns the persistent compilation cache off inside the `with` block."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def measure(planned: Planned, piece: Piece, effort: str) -> Measured:
    """Compiles one program of a job and returns its memory, operations and traffic.

    A program that does not fit into the memory is returned with `refused` set; no error is raised.

    Args:
        planned: The job, for what stays on the devices while the program runs.
        piece: The program.
        effort: A key of `EFFORT`: quick or full optimisation by the compiler.
    """
    memory = planned.resident_bytes(piece.resident) | {"batch": device_bytes(piece.own)}
    begin = time.perf_counter()
    traced = piece.program.trace(*piece.args)
    starts = piece.phase == "start"
    operations = 0 if starts else flops(traced.jaxpr, unknown_trips=piece.loop)
    with _without_cache():
        compiled = refusal.attempt(
            lambda: traced.lower().compile(compiler_options=EFFORT[effort] or None)
        )
    seconds = time.perf_counter() - begin
    if isinstance(compiled, Refusal):
        return Measured(
            piece.name,
            memory,
            operations,
            None,
            seconds,
            device_bytes(piece.args),
            compiled,
            piece.phase,
            piece.of,
        )
    found = compiled.memory_analysis()
    # The peak of live buffers, arguments and outputs included; the sum of all sizes can exceed it.
    inside = max(found.peak_memory_in_bytes - found.argument_size_in_bytes, 0)
    cache = min(device_bytes(piece.cache), inside)
    memory |= {
        "padding": max(found.argument_size_in_bytes - device_bytes(piece.args), 0),
        "cache": cache,
        "temporaries": inside - cache,
        "code": found.generated_code_size_in_bytes,
    }
    account = None if starts else hlo.account(compiled.as_text(), unknown_trips=piece.loop)
    return Measured(
        piece.name,
        memory,
        operations,
        account,
        seconds,
        device_bytes(piece.args),
        None,
        piece.phase,
        piece.of,
    )
