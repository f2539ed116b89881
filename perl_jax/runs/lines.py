"""Files of JSON Lines that grow while a run lasts: one JSON object a line, each with its step.

On a disk lines are appended to the file. An object in a bucket cannot grow: there each `sync`
writes the new lines as an object of its own, `NAME.parts/STEP.NUMBER.jsonl` with the last step in
it, and the end of the run merges all parts into the file. Whoever reads takes the file and then of
each part the lines with later steps, so a merge that was stopped half-way does no harm. One part
has all lines of a step. A run that was copied from a bucket to a disk may have parts there too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any

from perl_jax.errors import UserError, require
from perl_jax.runtime import buckets, files
from perl_jax.runtime.faults import explained

_PART = re.compile(r"(\d+)\.(\d+)\.jsonl")


def exist(path: files.Path) -> bool:
    """Returns whether there is a file of lines that is not empty, or a part of it."""
    return (files.exists(path) and files.size(path) > 0) or bool(_parts(path))


def read_lines(path: files.Path) -> list[bytes]:
    """Returns the lines of a file, parts included, without their ends; [] if there is no file.

    The last line may be incomplete.
    """
    lines = files.read_bytes(path).split(b"\n") if files.exists(path) else []
    if lines and not lines[-1]:
        lines.pop()
    parts = _parts(path)
    if not parts:
        return lines
    last = _step_of(lines[-1]) if lines else -1
    # The file may have what parts have; those need not be read.
    parts = [part for step, _, part in parts if step > last]
    with explained(path, "read"):
        contents = (
            buckets.contents(parts) if files.is_remote(path) else map(files.read_bytes, parts)
        )
    for content in contents:
        found = content.rstrip(b"\n").split(b"\n")
        # One without a step is damaged, which `read_rows` says.
        lines += [line for line in found if not 0 <= _step_of(line) <= last]
        last = max(last, _step_of(found[-1]))
    return lines


def read_rows(path: files.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file, parts included, without an incomplete last line (which a killed
    run may leave); [] if there is no file.

    Raises UserError if another line is not an object with an integer `step`.
    """
    lines, rows = read_lines(path), []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # bad JSON and bad UTF-8 alike
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif index < len(lines) - 1:
            raise UserError(
                f"Line {index + 1} of {path} is not a JSON object with an integer 'step'; "
                "restore the file or move it away."
            )
    return rows


class Lines:
    """A file of lines that is written to.

    Args:
        path: The file.
        resume_step: Rows up to this step are kept, later ones deleted. None starts a new file: the
            rows of an existing one are moved to `NAME.previous.jsonl`.

    Raises:
        UserError: The file is damaged, or cannot be written.
    """

    def __init__(self, path: files.Path, resume_step: int | None) -> None:
        self.path = path
        self._remote = files.is_remote(path)
        # Of a bucket: lines that are not yet in a part.
        self._waiting: list[str] = []
        self._waiting_step = 0
        self._file: IO[str] | None = None
        self.last_step = self._prepare(resume_step)
        self._number = len(_parts(path)) if self._remote else 0

    def _prepare(self, resume_step: int | None) -> int | None:
        """Keeps or moves the rows of an existing file; returns the last step that is kept."""
        if resume_step is None:
            if exist(self.path):
                previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
                if self._remote or _parts(self.path):
                    content = b"".join(line + b"\n" for line in read_lines(self.path))
                    files.write_bytes(previous, content)
                    files.remove(self.path)
                    files.remove(_folder(self.path))
                else:
                    files.move(self.path, previous)
            return None
        if not exist(self.path):
            return None
        rows = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        self._replace(rows)
        return rows[-1]["step"] if rows else None

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Makes these rows the file's content, and then deletes its parts."""
        files.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        files.remove(_folder(self.path))

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows: on a disk at once, in a bucket with the next `sync`.

        Args:
            step: The step that all these rows have, not below that of any before.
            rows: JSON objects with the key `step`.
        """
        if not rows:
            return
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if self._remote:
            self._waiting.append(text)
            self._waiting_step = step
        else:
            with explained(self.path, "written"):
                if self._file is None:
                    self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
                self._file.write(text)
                self._file.flush()
        self.last_step = step

    def sync(self) -> None:
        """Returns when all rows are stored."""
        if self._file is not None:
            with explained(self.path, "written"):
                self._file.flush()
                os.fsync(self._file.fileno())
        if self._waiting:
            name = _name(self._waiting_step, self._number)
            files.write_bytes(_folder(self.path) / name, "".join(self._waiting).encode())
            self._number += 1
            self._waiting = []

    def close(self, keep: bool = True, merge: bool = False) -> None:
        """Stores all rows and closes the file; a second call does nothing.

        Args:
            keep: False: rows that wait for a `sync` are dropped.
            merge: Whether parts are merged into the file, because no more rows will come.
        """
        if not keep:
            self._waiting = []
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._remote and merge and _parts(self.path):
            self._replace(read_rows(self.path))


def _folder(path: files.Path) -> files.Path:
    """Returns the folder of a file's parts."""
    return path.with_name(f"{path.name}.parts")


def _name(step: int, number: int) -> str:
    """Returns the name of a part.

    Args:
        step: The last step in it.
        number: Tells parts of one step apart, and orders them.
    """
    return f"{step:012d}.{number:06d}.jsonl"


def _parts(path: files.Path) -> list[tuple[int, int, files.Path]]:
    """Returns (last step, number, path) of each part of a file, in order."""
    found = [(_PART.fullmatch(part.name), part) for part in files.listing(_folder(path))]
    return sorted((int(match[1]), int(match[2]), part) for match, part in found if match)


def _step_of(line: bytes) -> int:
    """Returns the step of a line; -1 if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return -1
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else -1


def require_lines(path: files.Path, what: str) -> None:
    """Raises UserError if there is neither a file of lines nor a part of it.

    Args:
        path: The file.
        what: What it is, for the message.
    """
    require(files.exists(path) or bool(_parts(path)), f"There is no {what} at {path}.")
