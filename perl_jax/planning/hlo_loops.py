"""Finds the number of iterations of a loop in the text of an HLO module."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping

from perl_jax.planning.hlo_text import Computation, Instruction, Module

SAME_VALUE = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"})
ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation as called at one place, so that its parameters can be traced to the caller.

    Attributes:
        module: The module.
        computation: The computation.
        caller: The instruction that calls it; None for the entry computation.
        outer: The frame that holds the caller; None for the entry computation.
    """

    module: Module
    computation: Computation
    caller: Instruction | None = None
    outer: Frame | None = None

    def enter(self, name: str, caller: Instruction) -> Frame:
        """Returns the frame of the computation `name`, which the instruction `caller` of this
        computation calls.
        """
        return Frame(self.module, self.module.computations[name], caller, self)

    def __getitem__(self, name: str) -> Instruction:
        """Returns an instruction of the computation by name."""
        return self.computation.instructions[name]


@dataclasses.dataclass(frozen=True)
class Value:
    """A value: an instruction and the frame in which it is computed."""

    frame: Frame
    instruction: Instruction

    def operand(self, index: int) -> Value:
        """Returns the `source` of the instruction's index-th operand."""
        return source(self.frame, self.instruction.operands[index])


def source(frame: Frame, name: str) -> Value:
    """Returns where a value comes from, traced back through copies, conversions, reshapes, fusions,
    parameters and tuples.

    Args:
        frame: The computation that holds the instruction.
        name: The name of the instruction whose result is traced.
    """
    instruction = frame[name]
    if instruction.opcode in SAME_VALUE:
        return source(frame, instruction.operands[0])
    if instruction.opcode == "fusion":
        inner = frame.enter(instruction.called["calls"], instruction)
        return source(inner, inner.computation.root)
    if (
        instruction.opcode == "parameter"
        and frame.outer
        and frame.caller
        and frame.caller.opcode in ("fusion", "call")
    ):
        return source(frame.outer, frame.caller.operands[int(instruction.literal)])
    if instruction.opcode == "get-tuple-element":
        tuple_value = source(frame, instruction.operands[0])
        return element(tuple_value, instruction.tuple_index) or Value(frame, instruction)
    return Value(frame, instruction)


def element(value: Value, index: int) -> Value | None:
    """Returns the source of an element of a tuple; None if it is not known.

    A loop that passes the element on unchanged is traced through; a loop that changes it gives
    None.

    Args:
        value: The tuple.
        index: The element's index.
    """
    instruction, frame = value.instruction, value.frame
    if instruction.opcode == "tuple":
        return value.operand(index)
    caller, outer = frame.caller, frame.outer
    if instruction.opcode == "parameter" and caller and outer and caller.opcode == "while":
        instruction, frame = caller, outer
    if instruction.opcode == "while" and unchanged(frame.module, instruction, index):
        return element(source(frame, instruction.operands[0]), index)
    return None


def unchanged(module: Module, loop: Instruction, index: int) -> bool:
    """Returns whether a loop's body passes the element `index` of its state on unchanged, also
    through loops inside it.
    """
    body = module.computations[loop.called["body"]]
    if body.result.opcode != "tuple":
        return False
    last = body.instructions[body.result.operands[index]]
    while True:
        if last.opcode in SAME_VALUE:
            last = body.instructions[last.operands[0]]
            continue
        if last.opcode != "get-tuple-element":
            return False
        at, state = last.tuple_index, body.instructions[last.operands[0]]
        if state.opcode != "while" or not unchanged(module, state, at):
            return state.opcode == "parameter" and at == index
        before = body.instructions[state.operands[0]]
        if before.opcode != "tuple":
            return False
        last = body.instructions[before.operands[at]]


def carried(value: Value) -> int | None:
    """Returns the index, in the state of a loop, of a value in that loop's body or condition; None
    if the value is no element of the state.
    """
    if value.instruction.opcode != "get-tuple-element":
        return None
    state = source(value.frame, value.instruction.operands[0])
    of_loop = (
        state.instruction.opcode == "parameter"
        and state.frame.caller
        and state.frame.caller.opcode == "while"
    )
    return value.instruction.tuple_index if of_loop else None


def constant(value: Value) -> int | None:
    """Returns the whole number that a value has in every run; None if the text does not determine
    it.

    Evaluates constants and the operations of `ARITHMETIC` on them.
    """
    instruction = value.instruction
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.opcode in ARITHMETIC:
        left, right = constant(value.operand(0)), constant(value.operand(1))
        if left is None or right is None:
            return None
        return ARITHMETIC[instruction.opcode](left, right)
    return None


def trips(frame: Frame, loop: Instruction) -> int | None:
    """Returns the number of iterations of a loop each time the program reaches it; None if unknown.

    Uses `known_trip_count` if the compiler wrote it (CPU, GPU). Otherwise the condition must
    compare a counter in the loop's state with a constant, and the counter's initial value and step
    must be constants.

    Args:
        frame: The computation that holds the loop.
        loop: The `while` instruction.
    """
    written = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if written:
        return int(written)
    condition = frame.enter(loop.called["condition"], loop)
    test = source(condition, condition.computation.root)
    if test.instruction.opcode != "compare":
        return None
    sides = [test.operand(0), test.operand(1)]
    direction = test.instruction.attribute(r"direction=(\w+)") or ""
    if carried(sides[0]) is None:
        sides, direction = sides[::-1], MIRRORED.get(direction)
    index, bound = carried(sides[0]), constant(sides[1])
    if index is None or bound is None or direction not in MIRRORED:
        return None
    first = element(source(frame, loop.operands[0]), index)
    first = first and constant(first)
    step = _step(frame.enter(loop.called["body"], loop), index)
    return None if first is None or not step else _count(first, step, bound, direction)


def _step(body: Frame, index: int) -> int | None:
    """Returns what a loop's body adds to an element of its state in one iteration; None if unknown.

    Args:
        body: The frame of the body.
        index: The index of the element.
    """
    result = body.computation.result
    if result.opcode != "tuple":
        return None
    new = source(body, result.operands[index])
    if new.instruction.opcode not in ("add", "subtract"):
        return None
    sides = [new.operand(0), new.operand(1)]
    if new.instruction.opcode == "subtract":
        added = constant(sides[1])
        return -added if carried(sides[0]) == index and added is not None else None
    if carried(sides[0]) != index:
        sides = sides[::-1]
    return constant(sides[1]) if carried(sides[0]) == index else None


def _count(first: int, step: int, bound: int, direction: str) -> int | None:
    """Returns how many times a counter is increased by `step` while `counter direction bound`
    holds; None if that never ends.

    Args:
        first: The counter's initial value.
        step: What is added to the counter in an iteration.
        bound: The constant that the counter is compared with.
        direction: LT, LE, GT, GE or NE.
    """
    distance = bound - first
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    if direction in ("LE", "GE"):
        distance += 1
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None
