"""Whether the checkpoints in a folder are whole, as far as that shows without reading arrays."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import orbax.checkpoint as ocp

from perl_jax.errors import UserError
from perl_jax.runtime import files, json_values
from perl_jax.runtime.faults import FileError, explained

# The item of a checkpoint that holds checksums of the other items; earlier versions wrote none.
SEAL = "digests"
_RECORD = "_CHECKPOINT_METADATA"
# Without one of these files a checkpoint cannot be read.
_NEEDED = (_RECORD, "state/_METADATA", "state/manifest.ocdbt", "host/metadata")


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of a checkpoint.

    Attributes:
        seal: The recorded checksums: `state` (a text with dtype, shape and checksum per leaf),
            `host` and `metrics`. None: an earlier version saved it without any.
        wrong: What is wrong, for messages; None: nothing.
        absent: Whether that is a missing file.
    """

    seal: dict[str, Any] | None = None
    wrong: str | None = None
    absent: bool = False


def saved_steps(folder: files.PathLike) -> list[int]:
    """Returns the steps of complete checkpoints in a `checkpoints/` folder, in ascending order.

    In a bucket a checkpoint is complete if it has the marker that Orbax writes last.
    """
    found = [path for path in files.listing(folder) if path.name.isdecimal()]
    if files.is_remote(folder):
        with explained(folder, "read"):
            found = [path for path in found if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in found)


def examine(folder: files.Path) -> Found:
    """Returns what is found of one checkpoint: its checksums, or what is wrong with it.

    Metadata, checksums, metrics and the data cursor's file are read, arrays are not.

    Args:
        folder: The folder of the checkpoint.

    Raises:
        FileError: A file cannot be read although it is there, such as in a bucket out of reach.
    """
    there = files.tree(folder)
    odd = _no_files(folder)
    if odd is not None:
        return Found(wrong=f"{odd} is not a file")
    for name in _NEEDED:
        if name not in there:
            return Found(wrong=f"{name} is missing", absent=True)
    for name, size in there.items():
        # A name that ends in a slash stands for a folder of a bucket.
        if size == 0 and not name.endswith("/"):
            return Found(wrong=f"{name} is empty")
    try:
        items = files.read_json(folder / _RECORD)
        listed = items.get("item_handlers") if isinstance(items, dict) else None
        if not isinstance(listed, dict):
            return Found(wrong=f"{_RECORD} does not list its items")
        for name, file in ((SEAL, f"{SEAL}/metadata"), ("metrics", "metrics/metrics")):
            if name in listed and file not in there:
                return Found(wrong=f"{file} is missing", absent=True)
        files.read_json(folder / "state" / "_METADATA")
        if f"{SEAL}/metadata" not in there:
            return Found()
        seal = files.read_json(folder / SEAL / "metadata")
        metrics = "metrics/metrics"
        measured = files.read_json(folder / metrics) if metrics in there else None
        host = files.read_json(folder / "host" / "metadata")
    except FileError:
        raise
    # The sentence names a file that is not what it should be.
    except UserError as error:
        return Found(wrong=str(error).removesuffix("."))
    if not json_values.has_valid_checksum(seal) or json_values.digest(measured) != seal["metrics"]:
        return Found(wrong="its checksums or its metrics")
    if json_values.digest(host) != seal["host"]:
        return Found(wrong="its data cursor")
    return Found(seal=seal)


def _no_files(folder: files.Path) -> str | None:
    """Returns the relative path of something below a folder that is neither a file nor a folder,
    such as a pipe, which would never end to be read; None: there is no such thing.
    """
    if files.is_remote(folder):
        return None
    for path in files.listing(folder):
        kind = files.kind_of(path)
        below = _no_files(path) if kind == "folder" else None
        if below is not None or kind not in ("folder", "file"):
            return path.name if below is None else os.path.join(path.name, below)
    return None
