"""What the TPU compiler says when a program does not fit the memory.

It refuses early, from an estimate, in one sentence whose "HLO temporaries" are really the whole
peak, arguments and outputs included; or late, when all buffers have their places, with a list of
the largest. Sizes are rounded by the compiler (15.75G: to 10 MiB); G is 2^30.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TypeVar

import jax

T = TypeVar("T")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?"
LATE = re.compile(rf"memory space (\w+)\. Used {SIZE} of {SIZE}")
EARLY = re.compile(
    rf"Ran out of memory on (\w+), the total memory required for [^(]*\({SIZE}\) "
    rf"exceeds available \w+ \({SIZE}\)"
)
# Programs with a part on the sparse cores: the two usages, and what there is for both.
TWO_CORES = re.compile(
    rf"TensorCore (\w+) usage:? {SIZE}, SparseCore \w+ usage:? {SIZE}, "
    rf"exceeding available bytes:? {SIZE}"
)
ABORTED = re.compile(rf"Requires {SIZE}, has {SIZE} available")
# One buffer larger than all there is.
SINGLE = re.compile(rf"Allocation \(size={SIZE}\) would exceed memory \(size={SIZE}\)")
EXCEEDED = re.compile(rf"Exceeded \w+ capacity by {SIZE}")
ASKED = re.compile(rf"(?:Used|allocat\w*|required[^(\d]*\(?) ?{SIZE}")
ENTRY = re.compile(r"^ +\d+\. Size: (.*?)^ +=====", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One buffer that the message lists.

    kind: argument, output or temp, else the compiler's own word (scoped: a kernel's scratch;
    overlays: code). argument: its position among the program's arguments. operation: the name
    JAX gave the operation that makes it; source: "file:line" where the message says it.
    """

    bytes: int
    kind: str
    shape: str | None = None
    operation: str | None = None
    source: str | None = None
    argument: int | None = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Bytes of one device; what the message does not say is None. buffers: the largest first.

    asked, available: without what the runtime reserves. arguments, program: of the asked; program
    is temporaries, outputs that take no argument's place, constants and code.
    """

    text: str
    space: str | None = None
    asked: int | None = None
    available: int | None = None
    exceeded: int | None = None
    arguments: int | None = None
    program: int | None = None
    reserved: int | None = None
    buffers: tuple[Buffer, ...] = ()


def attempt(compile: Callable[[], T]) -> T | Refusal:
    """What `compile()` returns, or why there was no memory for it; any other error passes."""
    try:
        return compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return parse(str(error))


def parse(text: str) -> Refusal:
    """A RESOURCE_EXHAUSTED message as data; one in unknown words keeps its text, and a size if
    any.
    """
    space, asked, available = _figures(text)
    exceeded = _size(EXCEEDED, text)
    if exceeded is None and asked is not None and available is not None:
        exceeded = max(asked - available, 0)
    listed = [_single(text)] if SINGLE.search(text) else map(_buffer, ENTRY.findall(text))
    buffers = sorted(listed, key=lambda buffer: -buffer.bytes)
    parts = {
        part: _size(re.compile(rf"^ +{part} +{SIZE}\s*$", re.MULTILINE), text)
        for part in ("arguments", "program", "reserved")
    }
    return Refusal(text, space, asked, available, exceeded, **parts, buffers=tuple(buffers))


def _figures(text: str) -> tuple[str | None, int | None, int | None]:
    """(memory space, bytes asked, bytes available)."""
    found = LATE.search(text) or EARLY.search(text)
    if found:
        return found[1].lower(), _bytes(found[2], found[3]), _bytes(found[4], found[5])
    found = TWO_CORES.search(text)
    if found:
        return (
            found[1].lower(),
            _bytes(found[2], found[3]) + _bytes(found[4], found[5]),
            _bytes(found[6], found[7]),
        )
    found = SINGLE.search(text) or ABORTED.search(text)
    if found:
        return None, _bytes(found[1], found[2]), _bytes(found[3], found[4])
    return None, _size(ASKED, text), None


def _buffer(entry: str) -> Buffer:
    """One entry of a list, from its size on."""
    label = _field(r"XLA label: (.*)", entry) or ""
    argument = re.match(r"Argument (\d+)", label)
    allocation = _field(r"Allocation type: (.*)", entry)
    kind = (
        "argument"
        if argument
        else "output"
        if label.startswith("Output")
        else (allocation or "unknown").removeprefix("HLO ")
    )
    file, line = _field(r'source_file="([^"]*)"', entry), _field(r"source_line=(\d+)", entry)
    return Buffer(
        bytes=_size(re.compile(SIZE), entry) or 0,
        kind=kind,
        shape=_field(r"Shape: (.*)", entry),
        operation=_field(r'op_name="([^"]*)"', entry),
        source=f"{file}:{line}" if file else None,
        argument=int(argument[1]) if argument else None,
    )


def _single(text: str) -> Buffer:
    """The buffer of a message about one allocation."""
    word = _field(r"kind: (\w+)", text) or "temp"
    operand = _field(r"/\* operand (\d+)", text)
    return Buffer(
        bytes=_size(SINGLE, text) or 0,
        kind={"input": "argument"}.get(word, word),
        shape=_field(r"shape(?: =|:) '?(\w+\[[^\]]*\](?:\{[^}]*\})?)", text),
        argument=int(operand) if word == "input" and operand else None,
    )


def _field(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1].strip() if found else None


def _size(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return _bytes(found[1], found[2]) if found else None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * UNITS[unit])
