"""Parses the TPU compiler's message that a program does not fit into the memory.

The compiler refuses early, from an estimate, in one sentence, whose "HLO temporaries" are really
the whole peak with arguments and outputs. Or it refuses late, after buffer assignment, with a list
of the largest buffers. The compiler rounds sizes (15.75G: to 10 MiB); G is 2^30.
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
# Programs that also use sparse cores: both usages, and the bytes available to both.
TWO_CORES = re.compile(
    rf"TensorCore (\w+) usage:? {SIZE}, SparseCore \w+ usage:? {SIZE}, "
    rf"exceeding available bytes:? {SIZE}"
)
ABORTED = re.compile(rf"Requires {SIZE}, has {SIZE} available")
# A single buffer larger than the memory.
SINGLE = re.compile(rf"Allocation \(size={SIZE}\) would exceed memory \(size={SIZE}\)")
EXCEEDED = re.compile(rf"Exceeded \w+ capacity by {SIZE}")
ASKED = re.compile(rf"(?:Used|allocat\w*|required[^(\d]*\(?) ?{SIZE}")
ENTRY = re.compile(r"^ +\d+\. Size: (.*?)^ +=====", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One buffer that the message lists. A field is None if the message does not say.

    Attributes:
        bytes: The size.
        kind: argument, output or temp, or the compiler's own word (scoped: a kernel's scratch;
            overlays: code).
        shape: The HLO shape.
        operation: JAX's name of the operation that makes the buffer.
        source: "FILE:LINE" of that operation.
        argument: The position among the program's arguments; None if it is no argument.
    """

    bytes: int
    kind: str
    shape: str | None = None
    operation: str | None = None
    source: str | None = None
    argument: int | None = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a program did not compile. Bytes are of one device; None if the message does not say.

    Attributes:
        text: The compiler's message.
        space: The memory space that is too small.
        asked: Bytes that the program needs, without what the runtime reserves.
        available: Bytes that are available, without what the runtime reserves.
        exceeded: Bytes beyond those available.
        arguments: The part of `asked` for arguments.
        program: The part of `asked` for temporaries, outputs without a donated buffer, constants
            and code.
        reserved: Bytes that the runtime reserves.
        buffers: The listed buffers, largest first.
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
    """Returns the result of `compile()`, or the Refusal if the device's memory was too small.

    Args:
        compile: Compiles a program. Errors other than RESOURCE_EXHAUSTED are raised.
    """
    try:
        return compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return parse(str(error))


def parse(text: str) -> Refusal:
    """Returns the Refusal that a RESOURCE_EXHAUSTED message describes.

    A message of unknown form is kept as text, with a size if it names one; the other fields are
    None.
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
    """Returns (memory space, bytes needed, bytes available) of a message; None for what it does not
    say.
    """
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
    """Returns the buffer of one entry of the message's list.

    Args:
        entry: The entry's text, which begins with the size.
    """
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
    """Returns the buffer of a message about a single allocation that is larger than the memory."""
    word = _field(r"kind: (\w+)", text) or "temp"
    operand = _field(r"/\* operand (\d+)", text)
    return Buffer(
        bytes=_size(SINGLE, text) or 0,
        kind={"input": "argument"}.get(word, word),
        shape=_field(r"shape(?: =|:) '?(\w+\[[^\]]*\](?:\{[^}]*\})?)", text),
        argument=int(operand) if word == "input" and operand else None,
    )


def _field(pattern: str, text: str) -> str | None:
    """Returns the first group of a pattern where it is found in the text, stripped; None if it is
    not found.
    """
    found = re.search(pattern, text)
    return found[1].strip() if found else None


def _size(pattern: re.Pattern[str], text: str) -> int | None:
    """Returns the bytes of the number and unit that a pattern finds in the text; None if it finds
    none.
    """
    found = pattern.search(text)
    return _bytes(found[1], found[2]) if found else None


def _bytes(number: str, unit: str) -> int:
    """Returns a number with a unit (K, M, G, T) as bytes."""
    return round(float(number) * UNITS[unit])
