"""The text of an optimised HLO module as data: computations of instructions, with shapes as laid
out.
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
# A computation may end with the thread it runs on; braces of a kernel's metadata begin lines too.
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
    """One array: its dimensions and, of its layout, the order, the first tile and the memory space.

    order: dimensions from the fastest to the slowest. space: 0 is HBM (main memory on a CPU); any
    other is on the chip (1: vector memory, 2: semaphores, 6: scalar memory) or the host's (5).
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes as laid out: the fastest dimensions are padded to whole tiles; a scalar is not."""
        sizes = [self.dims[d] for d in self.order]
        for i, tile in enumerate(reversed(self.tile)):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // tile) * tile
        return -(-math.prod(sizes) * bits(self.dtype) // 8)

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.space == 0 else 0


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`.

    literal: what stands between the parentheses; of a parameter its number.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    attributes: str
    literal: str

    @functools.cached_property
    def called(self) -> Mapping[str, str]:
        """Computations named by attribute: calls, to_apply, condition, body, ..."""
        return dict(_CALLED.findall(self.attributes))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(_NAME.findall(found[1]))
        return tuple(
            self.called[k] for k in ("true_computation", "false_computation") if k in self.called
        )

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes, None without a match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name in the text's order, and the root's name."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @property
    def result(self) -> Instruction:
        return self.instructions[self.root]

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal)))


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, the entry's name, and how many devices run the program."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int


def bits(dtype: str) -> int:
    """Bits of an element; 8-bit floats come in many names. KeyError for an unknown type."""
    return 8 if dtype.startswith("f8") else BITS[dtype]


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, depth first."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def parse_array(text: str) -> Array:
    """`bf16[8,128]{1,0:T(8,128)(2,1)S(1)}` -> Array; a dimension's bound `<=8` counts as 8."""
    dtype, dims, layout = _ARRAY.match(text).groups()
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
    """A shape that begins at a position, and where it ends."""
    if text[at] != "(":
        found = _ARRAY.match(text, at)
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
    """One line of a computation; None for a line that is none."""
    head = _LINE.match(line)
    if head is None:
        return None
    shape, at = _parse_shape(line, head.end())
    opcode = _OPCODE.match(line, at)
    depth, end = 1, opcode.end()
    while depth:
        paren = _PARENS.search(line, end)
        depth, end = depth + (1 if paren[0] == "(" else -1), paren.end()
    inside = line[opcode.end() : end - 1]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(head[2], opcode[1], shape, operands, line[end:], inside)


def _statements(text: str) -> Iterator[str]:
    """Headers, instructions and closing braces; an attribute that spans lines (a kernel's metadata)
    is put back into its own.
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
    """The text of `compiled.as_text()`. Raises ValueError when it has no entry computation."""
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
