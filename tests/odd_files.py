"""Files as they should not be: of another kind, encoding, size, nesting or type in one field.

Every generator yields (what was done, the content or a function that puts it in place). They are
exhaustive in the fields of a JSON file and in the kinds of a path, so that a test needs no luck.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

# Values that stand in the place of another: each type, and numbers that cannot be.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    10**7,
    10**12,
    2**63,
    10**30,
    1.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "(((a+)+)+)+$",
    "y" * 100_000,
    [],
    [None],
    ["x", 1],
    [[[[]]]],
    {},
    {"x": None},
    {"x": {"x": [1]}},
)


def odd_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields (where and what, the JSON value) with one entry of it replaced or removed.

    Lists have only their first entry changed.
    """
    inner = value
    for part in path:
        inner = inner[part]
    if path:
        for odd in ODD_VALUES:
            changed = copy.deepcopy(value)
            holder = changed
            for part in path[:-1]:
                holder = holder[part]
            holder[path[-1]] = odd
            yield f"{'.'.join(map(str, path))} = {str(odd)[:40]}", changed
        changed = copy.deepcopy(value)
        holder = changed
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]
        yield f"{'.'.join(map(str, path))} removed", changed
    below = (
        list(inner) if isinstance(inner, dict) else [0] if inner and isinstance(inner, list) else []
    )
    for part in below:
        yield from odd_fields(value, (*path, part))


def odd_bytes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (what was done, the bytes) of a whole file that is damaged or something else."""
    yield "empty", b""
    yield "a list", b"[]"
    yield "null", b"null"
    yield "a text", b'"text"'
    yield "a number", b"1e999"
    yield "NaN", b"NaN"
    yield "Latin-1", '{"é": 1}'.encode("latin-1")
    yield "UTF-16", content[:10_000].decode("latin-1").encode("utf-16")
    yield "a byte order mark", b"\xef\xbb\xbf" + content
    yield "brackets without end", b"[" * 200_000
    yield "objects without end", b'{"a":' * 100_000
    yield "a number of many digits", b'{"a": ' + b"9" * 10_000 + b"}"
    yield "zeros", bytes(len(content) or 8)
    yield "the first half", content[: len(content) // 2]
    yield "without the last byte", content[:-1]
    yield "twice", content + content
    yield "a web page", b"<!DOCTYPE html><html>404</html>"
    yield "a pointer of large file storage", b"version https://git-lfs.github.com/spec/v1\nsize 3\n"
    for part in range(8):
        place = len(content) * part // 8
        if place < len(content):
            flipped = bytearray(content)
            flipped[place] ^= 0x90
            yield f"byte {place} flipped", bytes(flipped)


def odd_kinds() -> Iterator[tuple[str, Callable[[pathlib.Path], None]]]:
    """Yields (what the path becomes, the function that makes it so); the path must be free."""

    def listening(path: pathlib.Path) -> None:
        # The address of a socket holds at most 107 characters.
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    def sparse(path: pathlib.Path) -> None:
        with path.open("wb") as file:
            file.truncate(2**36)

    yield "missing", lambda path: None
    yield "a folder", lambda path: path.mkdir()
    yield "a named pipe", os.mkfifo
    yield "a socket", listening
    yield "a device", lambda path: path.symlink_to("/dev/zero")
    yield "an empty device", lambda path: path.symlink_to("/dev/null")
    yield "a link to itself", lambda path: path.symlink_to(path.name)
    yield "a link to nothing", lambda path: path.symlink_to("nothing")
    yield "64 GiB of zeros", sparse


def odd_headers(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (what was done, the bytes) of a safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for size in (0, 1, length - 1, length + 1, len(content), 10**8, 2**40, 2**63, 2**64 - 1):
        yield f"header of {size} bytes", struct.pack("<Q", size) + content[8:]
    first = next(name for name in header if name != "__metadata__")
    for what, changed in odd_fields({first: header[first]}):
        text = json.dumps({**header, first: None, **changed} if changed else {}).encode()
        yield f"header with {what}", struct.pack("<Q", len(text)) + text + data
    yield "data cut", content[: 8 + length + len(data) // 2]
    yield "data too long", content + b"\0" * 64
    for what, text in odd_bytes(content[8 : 8 + length]):
        yield f"header {what}", struct.pack("<Q", len(text)) + text + data


def odd_files(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields (what, a function that puts it in the file's place), for a JSON or safetensors file.

    Call `restore` between two of them.
    """
    content = path.read_bytes()
    for what, make in odd_kinds():
        yield what, lambda make=make: (clear(path), make(path))[0]
    for what, text in odd_bytes(content):
        yield what, lambda text=text: put(path, text)
    if path.suffix == ".safetensors":
        for what, text in odd_headers(content):
            yield what, lambda text=text: put(path, text)
    elif path.suffix == ".json":
        for what, value in odd_fields(json.loads(content)):
            yield what, lambda value=value: put(path, json.dumps(value).encode())


def put(path: pathlib.Path, content: bytes) -> None:
    """Puts a regular file with this content in a path's place."""
    clear(path)
    path.write_bytes(content)


def clear(path: pathlib.Path) -> None:
    """Removes whatever a path is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
