"""Counts the bytes that an HLO instruction reads and writes in HBM.

By XLA's convention each instruction that runs by itself reads its operands and writes its result;
intermediate values of a fusion stay on the chip. Of an operand that is only sliced, the slice
counts. Of a buffer that is updated in place, the update counts. Buffers outside HBM do not count.

In this module `computation` is the computation that holds the instruction, and `inner` is the
computation that a fusion calls.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator

from perl_jax.planning.hlo_text import Array, Computation, Instruction, Module, Shape, leaves

COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)
# Instructions without traffic: they name or group existing buffers, or call computations whose own
# instructions are counted.
FREE = frozenset(
    {
        *(
            "parameter",
            "constant",
            "tuple",
            "get-tuple-element",
            "bitcast",
            "after-all",
            "add-dependency",
        ),
        *("opt-barrier", "domain", "partition-id", "replica-id", "get-dimension-size"),
        *("while", "conditional", "call", "call-start", "async-start", "async-update"),
    }
)
FREE_TARGETS = frozenset(
    {
        *("AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone"),
        *("AsyncCollectiveStart", "AsyncCollectiveDone"),
    }
)
SLICES = frozenset({"slice", "dynamic-slice", "gather"})
WHOLE = frozenset(
    {
        *(
            "dot",
            "convolution",
            "reduce",
            "reduce-window",
            "select-and-scatter",
            "sort",
            "custom-call",
        ),
        *("fft", "cholesky", "triangular-solve", "ragged-dot", "map"),
        *COLLECTIVES,
    }
)


def result_shape(instruction: Instruction) -> Shape:
    """Returns the shape of an instruction's result.

    The shape that the text gives a `-start` instruction also lists operands and semaphores; these
    are left out.
    """
    if not instruction.opcode.endswith("-start") or isinstance(instruction.shape, Array):
        return instruction.shape
    if instruction.opcode == "all-reduce-start":
        return instruction.shape
    return instruction.shape[0 if instruction.opcode == "copy-start" else 1]


def base_opcode(instruction: Instruction) -> str:
    """Returns the opcode without a trailing `-start`, which marks the first half of an asynchronous
    operation.
    """
    return instruction.opcode.removesuffix("-start")


def is_later_piece(instruction: Instruction) -> bool:
    """Returns whether an instruction only repeats a collective that an earlier fusion started.

    The TPU compiler overlaps a collective with several fusions, and each of them contains the
    collective. Its `flag_start` is -1 only in the fusion that starts it.
    """
    first = instruction.attribute(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
    return first is not None and first != "-1"


def traffic(instruction: Instruction, computation: Computation, module: Module) -> tuple[int, int]:
    """Returns (bytes read, bytes written) in HBM by one instruction.

    Args:
        instruction: The instruction.
        computation: The computation that holds the instruction.
        module: The module.
    """
    opcode = base_opcode(instruction)
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0, 0
    if opcode == "custom-call" and target(instruction) in FREE_TARGETS:
        return 0, 0
    if opcode == "fusion":
        return _fusion(instruction, computation, module)
    operands = [computation.instructions[name].shape for name in instruction.operands]
    read, written = hbm(*operands), hbm(result_shape(instruction))
    if opcode in SLICES:
        taken = part_bytes(operands[0], elements(result_shape(instruction)))
        return taken + hbm(*operands[1:]), written
    if opcode == "dynamic-update-slice":
        return hbm(*operands[1:]), part_bytes(operands[0], elements(operands[1]))
    if opcode == "scatter":
        touched = sum(part_bytes(buffer, elements(new)) for buffer, new in _scattered(operands))
        return hbm(*operands[len(operands) // 2 :]) + touched, touched
    return read, written


def target(instruction: Instruction) -> str | None:
    """Returns the target's name of a custom call; None for another instruction."""
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def hbm(*shapes: Shape) -> int:
    """Returns the bytes of those arrays of the shapes that are in HBM."""
    return sum(array.hbm_bytes for shape in shapes for array in leaves(shape))


def elements(shape: Shape) -> int:
    """Returns the number of elements of a shape; of a tuple, those of all its arrays."""
    return sum(array.elements for array in leaves(shape))


def part_bytes(shape: Shape, count: int) -> int:
    """Returns the bytes in HBM of `count` elements of a shape: this fraction of its padded size,
    but never more than the whole; 0 for an empty shape.
    """
    whole = elements(shape)
    return hbm(shape) * min(count, whole) // whole if whole else 0


def _scattered(operands: list[Shape]) -> Iterator[tuple[Shape, Shape]]:
    """Returns (buffer, update) pairs of a scatter.

    Args:
        operands: The shapes of its operands: n buffers, the indices, n updates.
    """
    n = len(operands) // 2
    return zip(operands[:n], operands[n + 1 :], strict=True)


def _fusion(fusion: Instruction, computation: Computation, module: Module) -> tuple[int, int]:
    """Returns (bytes read, bytes written) in HBM by a fusion.

    Args:
        fusion: The fusion.
        computation: The computation that holds the fusion.
        module: The module.
    """
    inner = module.computations[fusion.called["calls"]]
    wanted = demand(inner, module)
    operands = [computation.instructions[name].shape for name in fusion.operands]
    read = sum(part_bytes(shape, count) for shape, count in zip(operands, wanted, strict=True))
    return read, _written(fusion, inner, module)


def _written(fusion: Instruction, inner: Computation, module: Module) -> int:
    """Returns the bytes that a fusion writes to HBM.

    An output that is an operand passed through counts 0; of an output that is updated in place the
    update counts.

    Args:
        fusion: The fusion.
        inner: The computation that it calls.
        module: The module.
    """
    root = inner.result
    outputs = (fusion.shape,) if isinstance(fusion.shape, Array) else fusion.shape
    if root.opcode == "custom-call" and target(root) == "AsyncCollectiveDone":
        return 0
    if root.opcode == "custom-call" and target(root) == "AsyncCollectiveStart":
        handed_on = {int(i) for i in re.findall(r"\{(\d+)\}: \(", fusion.attributes)}
        return sum(hbm(shape) for i, shape in enumerate(outputs) if i not in handed_on)
    if root.opcode != "tuple":
        return _output_bytes(fusion.shape, root, inner, module)
    made = [
        (inner.instructions[name], shape)
        for name, shape in zip(root.operands, outputs, strict=True)
    ]
    return sum(
        _output_bytes(shape, value, inner, module)
        for value, shape in made
        if value.opcode != "parameter"
    )


def _output_bytes(shape: Shape, value: Instruction, inner: Computation, module: Module) -> int:
    """Returns the bytes that a fusion writes to HBM for one of its outputs.

    Args:
        shape: The output's shape.
        value: The instruction of `inner` that gives the output.
        inner: The computation that the fusion calls.
        module: The module.
    """
    made = origin(inner, value.name, module)
    if made.opcode in COLLECTIVES and is_later_piece(made):
        return 0
    if in_place(made, inner, module):
        operands = [inner.instructions[name].shape for name in made.operands]
        updates = (
            [operands[1]]
            if made.opcode == "dynamic-update-slice"
            else [new for _, new in _scattered(operands)]
        )
        return part_bytes(shape, sum(map(elements, updates)))
    return hbm(shape)


def origin(computation: Computation, name: str, module: Module) -> Instruction:
    """Returns the instruction that made a buffer, traced back through bitcasts, copies that keep
    the layout, and fusions that only pass their operand on.

    Args:
        computation: The computation that holds the buffer.
        name: The name of the instruction whose result is the buffer.
        module: The module.
    """
    instruction = computation.instructions[name]
    if instruction.opcode in ("bitcast", "copy"):
        before = computation.instructions[instruction.operands[0]]
        moves = instruction.opcode == "copy" and _orders(instruction) != _orders(before)
        return instruction if moves else origin(computation, before.name, module)
    if instruction.opcode == "fusion" and len(instruction.operands) == 1:
        inner = module.computations[instruction.called["calls"]]
        if origin(inner, inner.root, module).opcode == "parameter":
            return origin(computation, instruction.operands[0], module)
    return instruction


def _orders(instruction: Instruction) -> list[tuple[int, ...]]:
    """Returns the order of the dimensions of each array of an instruction's result."""
    return [array.order for array in leaves(instruction.shape)]


def in_place(update: Instruction, computation: Computation, module: Module) -> bool:
    """Returns whether a dynamic-update-slice or scatter updates an operand of its fusion in place.

    That is so if the instruction's buffer is a parameter of the fused computation and its result is
    an output of the fusion.

    Args:
        update: The instruction; another operation gives False.
        computation: The fused computation that holds it.
        module: The module.
    """
    if update.opcode not in ("dynamic-update-slice", "scatter"):
        return False
    root = computation.result
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    is_output = update.name in {origin(computation, name, module).name for name in outputs}
    return is_output and origin(computation, update.operands[0], module).opcode == "parameter"


def demand(computation: Computation, module: Module, wanted: int | None = None) -> list[int]:
    """Returns how many elements of each parameter a fused computation reads, in the order of the
    parameters.

    The number is followed from the result backwards: an elementwise operation needs of each operand
    as many elements as are wanted of its result, a slice needs the slice, a reduction needs
    everything.

    Args:
        computation: The fused computation.
        module: The module.
        wanted: How many elements of the result are needed; None for all. Not used if the result is
            a tuple.
    """
    root, of = computation.result, computation.instructions
    need: collections.Counter[str] = collections.Counter()
    if root.opcode == "tuple":
        for name in root.operands:
            need[name] += 0 if of[name].opcode == "parameter" else elements(of[name].shape)
    else:
        need[root.name] = elements(root.shape) if wanted is None else wanted
    for instruction in reversed(list(of.values())):
        count = min(need[instruction.name], elements(instruction.shape))
        if (instruction is root and root.opcode == "tuple") or not count:
            continue
        for index, name in enumerate(instruction.operands):
            need[name] += _wants(instruction, index, count, computation, module)
    return [min(need[p.name], elements(p.shape)) for p in computation.parameters]


def _wants(
    user: Instruction, index: int, count: int, computation: Computation, module: Module
) -> int:
    """Returns how many elements of an operand are needed for `count` elements of an instruction's
    result.

    Args:
        user: The instruction.
        index: The operand's index.
        count: How many elements of the result are needed.
        computation: The computation that holds the instruction.
        module: The module.
    """
    operands = [computation.instructions[name] for name in user.operands]
    whole = elements(operands[index].shape)
    if user.opcode == "fusion":
        return demand(module.computations[user.called["calls"]], module, count)[index]
    if user.opcode in COLLECTIVES and is_later_piece(user):
        return 0
    if user.opcode == "custom-call" and target(user) == "AsyncCollectiveDone":
        return 0
    if user.opcode in SLICES:
        return count if index == 0 else whole
    if user.opcode in ("dynamic-update-slice", "scatter") and index == 0:
        if not in_place(user, computation, module):
            return count
        return 0 if user.opcode == "dynamic-update-slice" else elements(operands[-1].shape)
    if user.opcode in WHOLE or user.opcode in ("dynamic-update-slice", "scatter"):
        return whole
    made = elements(user.shape)
    if user.opcode == "bitcast" and made:
        return math.ceil(count * whole / made)
    return min(count, whole)
