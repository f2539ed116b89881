"""Finds a data set's upstream files in a local copy, or downloads them once into the cache."""

from __future__ import annotations

import http.client
import io
import json
import pathlib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence

from perl_jax.errors import UserError, require
from perl_jax.runtime import files
from perl_jax.runtime.files import read_json

TIMEOUT_SECONDS = 60


def fetch(base_url: str, name: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns folder/name; downloads it from base_url/name if it does not exist.

    An interrupted download leaves no file of that name.

    Args:
        base_url: The address, without a slash at its end.
        name: The file's path below the address and the folder.
        folder: The local folder.

    Raises:
        UserError: The download fails, or its content is no ZIP archive (for a name that ends in
            .zip) or no JSON (for any other name).
    """
    target = folder / name
    if files.exists(target):
        return target
    url = f"{base_url}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            body = response.read()
        check(name, body)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Could not download {url} ({reason}); give a local copy (data_dir)."
        ) from error
    except ValueError as error:
        kind = "ZIP" if name.endswith(".zip") else "JSON"
        raise UserError(
            f"{url} did not give valid {kind} ({error}); try again, or give a local copy "
            "(data_dir)."
        ) from error
    files.write_bytes(target, body)
    return target


def check(name: str, body: bytes) -> None:
    """Raises ValueError unless a file's content fits its name: a whole ZIP archive for .zip, else
    JSON.

    Args:
        name: The file's name.
        body: Its content.
    """
    if not name.endswith(".zip"):
        json.loads(body)
        return
    try:
        broken = zipfile.ZipFile(io.BytesIO(body)).testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if broken is not None:
        raise ValueError(f"{broken} in it is damaged")


def local_files(data_dir: str, folder: str) -> list[files.Path]:
    """Returns the .json files in a folder of a local copy, sorted.

    Args:
        data_dir: The local copy.
        folder: The folder in it.

    Raises:
        UserError: There is no such file.
    """
    path = files.path_of(data_dir) / folder
    found = files.listing(path, "*.json")
    require(
        bool(found),
        f"There are no .json files in {path}; data_dir must name a copy of the upstream folder.",
    )
    return found


def read_lists(paths: Sequence[files.PathLike]) -> list[dict]:
    """Returns the objects of JSON files that each contain a list of objects, in order.

    Raises UserError if a file contains anything else.
    """
    objects: list[dict] = []
    for path in paths:
        value = read_json(path)
        good = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        require(good, f"{path} must hold a JSON list of objects.")
        objects += value
    return objects
