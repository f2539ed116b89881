"""Buckets: addresses `gs://BUCKET/PATH`, their client, and copies between a bucket and this disk.

Paths in buckets are those of `etils.epath`, which Orbax uses too. Its client is `gcsfs`, an
optional package.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from perl_jax.errors import UserError, require

SCHEME = "gs://"
# Requests that are under way at the same time.
_REQUESTS = 16
# epath would import TensorFlow if it is installed, for buckets only.
os.environ.setdefault("EPATH_USE_TF", "false")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def address(text: str) -> epath.Path:
    """Returns the path of an address in a bucket.

    Args:
        text: The address, `gs://BUCKET/PATH`.

    Raises:
        UserError: The address has no path in the bucket, or the client is not installed.
    """
    bucket, _, inside = text.removeprefix(SCHEME).partition("/")
    require(
        bool(bucket) and bool(inside.strip("/")),
        f"{text} does not name a folder or file in a bucket; give gs://BUCKET/PATH.",
    )
    _set_up()
    return epath.Path(text)


@functools.cache
def _set_up() -> None:
    """Prepares the client for this process; raises UserError if it is not installed.

    The client would keep listings in memory, and so not see what other processes write. It would
    also log a traceback for each failed request.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            "Paths in buckets (gs://) need the package gcsfs; install it with: "
            "pip install -c constraints.txt -e '.[gcs]'"
        )
    import fsspec.config

    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    if "GCSFS_DEBUG" not in os.environ:
        for name in ("gcsfs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def client() -> Any:
    """Returns the file system of all buckets (fsspec's interface)."""
    _set_up()
    import fsspec

    # The same object as that of epath, with the same settings.
    return fsspec.filesystem("gcs", finalize_on_close=True)


def facts(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns what a bucket says of an object or folder: `type` (file or directory), `size`,
    `generation`; None if there is neither.
    """
    try:
        return client().info(os.fspath(path))
    except FileNotFoundError:
        return None


def remove(path: str | os.PathLike[str]) -> None:
    """Deletes an object, or all objects below a folder; does nothing if there is neither."""
    # Not by the client's recursive `rm`, which reads `[` and `*` in the path as a pattern.
    address = os.fspath(path).rstrip("/")
    paths = [f"{address}/{name}" for name in tree(address)] or [address]

    def delete(one: str) -> None:
        """Deletes an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            client().rm_file(one)

    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(delete, paths))


def tree(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns the facts of all objects below a folder, by their path relative to it."""
    root = os.fspath(folder).removeprefix(SCHEME).rstrip("/")
    found = client().find(os.fspath(folder), detail=True)
    return {name[len(root) + 1 :]: about for name, about in found.items() if name != root}


def copy_object(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """Copies an object to another name in its bucket, without reading it here."""
    client().cp_file(os.fspath(path), os.fspath(to))


def contents(paths: Sequence[str | os.PathLike[str]]) -> list[bytes]:
    """Returns the contents of objects, read at the same time.

    Raises FileNotFoundError if there is no such object.
    """
    names = [os.fspath(path).removeprefix(SCHEME) for path in paths]
    if len(names) < 2:
        return [client().cat_file(name) for name in names]
    found = client().cat(names)
    return [found[name] for name in names]
