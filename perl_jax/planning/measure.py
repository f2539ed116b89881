"""Memory, operations and traffic of a job's programs, compiled for the devices of a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax

from perl_jax.planning import flops as flops_lib
from perl_jax.planning import hlo, refusal
from perl_jax.planning.hlo import Account
from perl_jax.planning.pieces import Phase, Piece, Planned, device_bytes
from perl_jax.planning.refusal import Refusal

# The compiler's search for a faster program is most of its time and hardly moves the peak.
EFFORT = {"quick": {"exec_time_optimization_effort": -1.0}, "full": {}}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program. Bytes are of one device, flops of all together (0: not counted, of programs of
    the start).

    phase, of: as in `Piece`.
    memory: bytes by component; their sum is the peak while the program runs. padding: what the
    compiler's tiles add to the arguments' own bytes. temporaries: activations, gathered weights,
    gradients, outputs that take over no argument. refused: why it did not compile; memory then
    holds what is known without compiling.
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
        """Bytes; of a refused program what it asked for, None where the compiler did not say."""
        if self.refused is None:
            return sum(self.memory.values())
        if self.refused.asked is None:
            return None
        # Its arguments are among what is on the device anyway.
        return self.refused.asked + sum(self.memory.values()) - self.arguments


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """No persistent cache: what is compiled for absent devices can be written to it, but not read
    again.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def measure(planned: Planned, piece: Piece, effort: str) -> Measured:
    """Compiles one program and adds up what is on a device while it runs."""
    memory = planned.resident_bytes(piece.resident) | {"batch": device_bytes(piece.own)}
    begin = time.perf_counter()
    traced = piece.program.trace(*piece.args)
    starts = piece.phase == "start"
    operations = 0 if starts else flops_lib.flops(traced.jaxpr, unknown_trips=piece.loop)
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
    # What is alive at the worst moment, arguments and outputs included; the sum of all sizes can
    # exceed it.
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
