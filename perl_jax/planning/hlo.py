"""Counts what one run of a compiled program moves: collectives, HBM traffic and estimated cycles.

The counts are read from the optimised HLO of one device, from the entry computation through calls
and loops. What a loop does is multiplied by its number of iterations. Sizes are those of buffers in
their memory layout, with padding.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from perl_jax.planning.hlo_loops import Frame, trips
from perl_jax.planning.hlo_text import Computation, Instruction, Module, leaves, parse_module
from perl_jax.planning.hlo_traffic import (
    COLLECTIVES,
    base_opcode,
    is_later_piece,
    origin,
    result_shape,
    traffic,
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size, summed over a run of the program.

    Attributes:
        kind: The HLO opcode, such as all-gather.
        group: The number of devices in a group, n.
        runs: How many times such a collective is executed.
        result_bytes: Bytes of the results on one device.
        link_bytes: Bytes that a device sends (and receives) if the n devices form a ring. With
            `full` the bytes of the whole buffer: (n-1)/n full for all-gather, reduce-scatter and
            all-to-all; twice that for all-reduce; full for a permute.
    """

    kind: str
    group: int
    runs: int
    result_bytes: int
    link_bytes: int


@dataclasses.dataclass(frozen=True)
class Account:
    """What one run of a program on one device moves.

    Attributes:
        collectives: The collectives, by kind and group size.
        hbm_read: Bytes read from HBM.
        hbm_written: Bytes written to HBM.
        cycles: The sum of the compiler's estimates; 0 if there are none (CPU). They exclude
            collectives, Pallas kernels and copies that run beside the arithmetic.
        unknown_loops: The operation names of loops whose iterations the caller had to give.
    """

    collectives: tuple[Collective, ...]
    hbm_read: int
    hbm_written: int
    cycles: int
    unknown_loops: tuple[str, ...]

    @property
    def hbm_bytes(self) -> int:
        """Bytes read from and written to HBM."""
        return self.hbm_read + self.hbm_written

    @property
    def link_bytes(self) -> int:
        """Bytes that the device sends to other chips."""
        return sum(c.link_bytes for c in self.collectives)


@dataclasses.dataclass
class _Totals:
    """Running sums of an `Account`.

    `read`, `written` and `cycles` are as there. `runs`, `results` (bytes) and `links` (bytes) are
    by (kind, group size) of collectives. `unknown` has the names of loops with an unknown number of
    iterations as keys, in order.
    """

    read: int = 0
    written: int = 0
    cycles: int = 0
    runs: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    results: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    links: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, other: _Totals, times: int = 1) -> None:
        """Adds another computation's sums to these, multiplied by `times`."""
        self.read += other.read * times
        self.written += other.written * times
        self.cycles += other.cycles * times
        for mine, theirs in (
            (self.runs, other.runs),
            (self.results, other.results),
            (self.links, other.links),
        ):
            for key, count in theirs.items():
                mine[key] += count * times
        self.unknown |= other.unknown

    @property
    def weight(self) -> tuple[int, int]:
        """The cost by which the most expensive branch is selected: bytes moved, then cycles."""
        return self.read + self.written + sum(self.links.values()), self.cycles


def account(text: str, *, unknown_trips: int | None = None) -> Account:
    """Returns the bytes that one run of a compiled program moves on one device, and its estimated
    cycles.

    Of the branches of a conditional only the most expensive one counts: the one that moves the most
    bytes.

    Args:
        text: The optimised HLO, `compiled.as_text()`.
        unknown_trips: The iterations of each loop whose number is not in the text, such as a
            sampler's loop that ends when all rows have ended.

    Raises:
        ValueError: There is such a loop and no `unknown_trips`, or the text is not an HLO module.
    """
    module = parse_module(text)
    totals = _visit(Frame(module, module.computations[module.entry]), unknown_trips)
    kinds = tuple(
        Collective(kind, group, runs, totals.results[kind, group], totals.links[kind, group])
        for (kind, group), runs in sorted(totals.runs.items())
        if runs
    )
    return Account(kinds, totals.read, totals.written, totals.cycles, tuple(totals.unknown))


def _visit(frame: Frame, unknown_trips: int | None) -> _Totals:
    """Returns the sums of one run of a computation, through calls, loops and conditionals.

    Args:
        frame: The computation, as called at one place.
        unknown_trips: The iterations of a loop whose number is not in the text.

    Raises:
        ValueError: There is such a loop and no `unknown_trips`.
    """
    totals = _Totals()
    for instruction in frame.computation.instructions.values():
        if instruction.opcode == "while":
            totals.add(_loop(frame, instruction, unknown_trips))
        elif instruction.opcode == "conditional":
            branches = [
                _visit(frame.enter(name, instruction), unknown_trips)
                for name in instruction.branches
            ]
            totals.add(max(branches, key=lambda branch: branch.weight))
        elif instruction.opcode in ("call", "call-start", "async-start"):
            called = _visit(
                frame.enter(
                    instruction.called.get("to_apply") or instruction.called["calls"], instruction
                ),
                unknown_trips,
            )
            # Cycles of sparse cores are not cycles of the TensorCore.
            called.cycles *= instruction.attribute(r'async_execution_thread="(sparsecore)"') is None
            totals.add(called)
        else:
            _count(totals, instruction, frame)
    return totals


def _loop(frame: Frame, loop: Instruction, unknown_trips: int | None) -> _Totals:
    """Returns the sums of a while loop, over all its iterations.

    Args:
        frame: The computation that holds the loop.
        loop: The `while` instruction.
        unknown_trips: The iterations if their number is not in the text.

    Raises:
        ValueError: The number is not in the text and `unknown_trips` is None.
    """
    totals, count = _Totals(), trips(frame, loop)
    if count is None:
        name = loop.attribute(r'op_name="([^"]*)"') or loop.name
        if unknown_trips is None:
            raise ValueError(
                f"How often loop {name!r} runs is not in the program's text; give unknown_trips."
            )
        totals.unknown[name], count = None, unknown_trips
    totals.add(_visit(frame.enter(loop.called["body"], loop), unknown_trips), count)
    totals.add(_visit(frame.enter(loop.called["condition"], loop), unknown_trips), count + 1)
    return totals


def _count(totals: _Totals, instruction: Instruction, frame: Frame) -> None:
    """Adds one instruction's traffic, cycles and collectives to `totals`."""
    read, written = traffic(instruction, frame.computation, frame.module)
    totals.read += read
    totals.written += written
    totals.cycles += int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
    for kind, group, result, link in _collectives(instruction, frame.computation, frame.module):
        totals.runs[kind, group] += 1
        totals.results[kind, group] += result
        totals.links[kind, group] += link


def _collectives(
    instruction: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[str, int, int, int]]:
    """Yields (kind, group size, result bytes, link bytes) of each collective that an instruction,
    or a fusion of instructions, starts.

    Bytes are those of one device. An all-reduce of which only a slice is kept counts as a
    reduce-scatter.

    Args:
        instruction: The instruction.
        computation: The computation that holds the instruction.
        module: The module.
    """
    kind = base_opcode(instruction)
    if kind == "fusion":
        inner = module.computations[instruction.called["calls"]]
        for part in inner.instructions.values():
            yield from _collectives(part, inner, module)
    if kind not in COLLECTIVES or is_later_piece(instruction):
        return
    result = sum(array.bytes for array in leaves(result_shape(instruction)))
    n, full = group_size(instruction, module), result
    if kind == "reduce-scatter":
        full = result * n
    elif kind == "all-reduce" and _is_scattered(instruction, computation, module):
        kind, result = "reduce-scatter", result // n
    rounds = {"all-reduce": 2 * (n - 1), "collective-permute": n, "collective-broadcast": n}.get(
        kind, n - 1
    )
    yield kind, n, result, full * rounds // n


def _is_scattered(reduced: Instruction, computation: Computation, module: Module) -> bool:
    """Returns whether a fusion keeps only a slice of an all-reduce, which is how TPU programs
    reduce-scatter.

    Args:
        reduced: The all-reduce.
        computation: The fused computation that holds it.
        module: The module.
    """
    root = origin(computation, computation.root, module)
    return (
        root.opcode == "dynamic-slice" and origin(computation, root.operands[0], module) is reduced
    )


def group_size(instruction: Instruction, module: Module) -> int:
    """Returns how many devices take part in one instance of a collective; all devices of the module
    if the text names no group.

    For a permute it is the number of devices in the largest set that its pairs of sender and
    receiver connect.
    """
    pairs = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
    if pairs:
        found = re.findall(r"(\d+),(\d+)", pairs)
        return _longest_chain([(int(sends), int(receives)) for sends, receives in found])
    listed = instruction.attribute(r"replica_groups=\{\{([\d,]*)\}")
    if listed:
        return listed.count(",") + 1
    iota = instruction.attribute(r"replica_groups=\[\d+,(\d+)\]<=")
    if iota:
        return int(iota)
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}",
        instruction.attributes,
    )
    if mesh:
        sizes, n = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}, 1
        for axis, size in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2]):
            n *= int(size or sizes[axis])
        return n
    return module.devices


def _longest_chain(pairs: list[tuple[int, int]]) -> int:
    """Returns the number of devices in the largest set that the pairs (sender, receiver)
    connect.
    """
    sets: dict[int, set[int]] = {}
    for a, b in pairs:
        joined = sets.get(a, {a}) | sets.get(b, {b})
        sets.update((member, joined) for member in joined)
    return max(map(len, sets.values()), default=1)
