"""Parses the text of an optimised HLO module: computations of instructions, with array layouts.

The functions raise ValueError for text that is not that of an HLO module.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS: Mapping[str, int] = {
    **dict.fromkeys(("token", "opaque"), 0),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The end of a computation may name its thread. Lines of a kernel's metadata can begin with } too.
_END = re.compile(r'^\}(?:, \w+="[^"]*")*\s*$')
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_PARENS = re.compile(r"[()]")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape and layout.

    Attributes:
        dtype: The element type as HLO spells it.
        dims: The sizes of the dimensions.
        order: The indices of the dimensions, from the fastest varying one to the slowest.
        tile: The sizes of the layout's first tile; () if the layout has none.
        space: The memory space: 0 is HBM (main memory on a CPU); others are on the chip (1 vector
            memory, 2 semaphores, 6 scalar memory) or on the host (5).
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Size in bytes in the array's memory layout, where the fastest dimensions are padded to
        whole tiles (scalars are not padded).
        """
        sizes = [self.dims[d] for d in self.order]
        for i, tile in enumerate(reversed(self.tile)):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // tile) * tile
        return -(-math.prod(sizes) * bits(self.dtype) // 8)

    @property
    def hbm_bytes(self) -> int:
        """Size in bytes if the array is in HBM, else 0."""
        return self.bytes if self.space == 0 else 0


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`.

    Attributes:
        name: The instruction's name.
        opcode: The operation.
        shape: The result's array, or a tuple of shapes.
        operands: The operands' names; () for constants and parameters.
        attributes: The text after the operands.
        literal: The text between the parentheses: the operands, a constant's value or a parameter's
            number.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    attributes: str
    literal: str

    @functools.cached_property
    def called(self) -> Mapping[str, str]:
        """The names of the computations that the instruction calls, by attribute: calls, to_apply,
        condition, body, true_computation, false_computation.
        """
        return dict(_CALLED.findall(self.attributes))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """The names of the computations of a conditional's branches; () if the instruction is no
        conditional.
        """
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(_NAME.findall(found[1]))
        return tuple(
            self.called[k] for k in ("true_computation", "false_computation") if k in self.called
        )

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression where it is found in the attributes, or
        None.
        """
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def tuple_index(self) -> int:
        """The index of the element that a `get-tuple-element` takes; raises ValueError for another
        instruction.
        """
        return int(matched(re.search(r"index=(\d+)", self.attributes))[1])


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation.

    Attributes:
        name: The computation's name.
        instructions: The instructions by name, in the order of the text.
        root: The name of the instruction that is the result.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @property
    def result(self) -> Instruction:
        """The instruction whose value is the computation's result."""
        return self.instructions[self.root]

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The computation's parameters, in the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal)))


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed HLO module.

    Attributes:
        computations: The computations by name.
        entry: The entry computation's name.
        devices: How many devices run the program: partitions times replicas.
    """

    computations: Mapping[str, Computation]
    entry: str
    devices: int


def bits(dtype: str) -> int:
    """Returns the number of bits of an element; raises KeyError for an unknown type.

    Args:
        dtype: The element type as HLO spells it; all names with f8 are 8-bit floats.
    """
    return 8 if dtype.startswith("f8") else BITS[dtype]


def matched(found: re.Match[str] | None) -> re.Match[str]:
    """Returns the match; raises ValueError for None, because every HLO module's text has such a
    match.
    """
    if found is None:
        raise ValueError("The text is not that of an HLO module.")
    return found


def leaves(shape: Shape) -> Iterator[Array]:
    """Yields the arrays of a shape, which is an array or a nested tuple, depth first."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def parse_array(text: str) -> Array:
    """Returns the array that a text such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}` describes.

    A bounded dimension `<=8` counts as 8. Without a layout the last dimension is the fastest.
    """
    dtype, dims, layout = matched(_ARRAY.match(text)).groups()
    sizes = tuple(int(d.strip("<=? ") or 0) for d in dims.split(",")) if dims else ()
    order, _, rest = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    fastest = (
        tuple(int(d) for d in order.split(",")) if order else tuple(reversed(range(len(sizes))))
    )
    return Array(
        dtype,
        sizes,
        fastest,
        tuple(map(int, tile[1].split(","))) if tile else (),
        int(space[1]) if space else 0,
    )


def _parse_shape(text: str, at: int) -> tuple[Shape, int]:
    """Returns (the shape at a position of the text, the position after it).

    Args:
        text: The text.
        at: The position at which the shape begins.
    """
    if text[at] != "(":
        found = matched(_ARRAY.match(text, at))
        return parse_array(found[0]), found.end()
    parts, at = [], at + 1
    while text[at] != ")":
        if text[at] in ", ":
            at += 1
        elif text.startswith("/*", at):
            at = text.index("*/", at) + 2
        else:
            part, at = _parse_shape(text, at)
            parts.append(part)
    return tuple(parts), at + 1


def parse_instruction(line: str) -> Instruction | None:
    """Returns the instruction in one line of a computation; None if the line holds none."""
    head = _LINE.match(line)
    if head is None:
        return None
    shape, at = _parse_shape(line, head.end())
    opcode = matched(_OPCODE.match(line, at))
    depth, end = 1, opcode.end()
    while depth:
        paren = matched(_PARENS.search(line, end))
        depth, end = depth + (1 if paren[0] == "(" else -1), paren.end()
    inside = line[opcode.end() : end - 1]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(head[2], opcode[1], shape, operands, line[end:], inside)


def _statements(text: str) -> Iterator[str]:
    """Yields the lines of a module's text: headers, instructions and closing braces.

    Lines of an attribute that spans several lines are joined to their instruction.
    """
    kept = ""
    for line in text.splitlines():
        if kept and not (_LINE.match(line) or _HEADER.match(line) or _END.match(line) or not line):
            kept += line
            continue
        if kept:
            yield kept
        kept = line
    yield kept


def parse_module(text: str) -> Module:
    """Returns the module in a text of `compiled.as_text()`; raises ValueError if there is no entry
    computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root, found = "", "", "", {}
    for line in _statements(text):
        header = _HEADER.match(line)
        if header:
            name, root, found = header[2], "", {}
            entry = name if header[1] else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, found, root or next(reversed(found)))
            name = ""
        elif name:
            instruction = parse_instruction(line)
            if instruction:
                found[instruction.name] = instruction
                root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if entry not in computations:
        raise ValueError("The text has no ENTRY computation: it is not an HLO module.")
    first = text[: text.index("\n")]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", first)]
    return Module(computations, entry, math.prod(counts))
