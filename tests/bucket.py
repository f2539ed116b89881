"""A bucket on this machine: `gcp-storage-emulator` on loopback, with what it lacks and with faults.

The emulator ignores preconditions (`ifGenerationMatch`), which owners of runs and checkpoints rely
on; here they are checked as Google's server checks them. Requests can be answered late or with a
status such as 503, by a seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import logging
import os
import pathlib
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

NAME = "bucket"


@dataclasses.dataclass
class Bucket:
    """A running emulator with one empty bucket.

    Attributes:
        storage: What the emulator holds; `objects[NAME]` has the facts of the objects by name.
        url: The address of the server.
        failing: The share of requests that are answered with `status`.
        status: That status.
        delay: Seconds that each answer is late.
        chosen: Says which requests `failing` and `delay` are for: (method, path) -> bool.
        requests: How many requests came, by method.
        draw: Decides which requests fail.
    """

    storage: Storage
    url: str = ""
    failing: float = 0.0
    status: int = 503
    delay: float = 0.0
    chosen: Callable[[str, str], bool] = lambda method, path: True
    requests: dict[str, int] = dataclasses.field(default_factory=dict)
    draw: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which gcsfs and tensorstore use the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a token",
        }

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin with a prefix, sorted."""
        with self.lock:
            return sorted(name for name in self.storage.objects[NAME] if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """The content of an object."""
        with self.lock:
            return self.storage.get_file(NAME, name)

    def download(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
        """Copies all objects below a prefix into a folder of this disk, which is returned."""
        for name in self.names(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return folder

    def upload(self, folder: pathlib.Path, prefix: str) -> None:
        """Copies a folder of this disk into the bucket."""
        import fsspec

        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{NAME}/{prefix}/{path.relative_to(folder)}"
                fsspec.filesystem("gcs", finalize_on_close=True).pipe_file(name, path.read_bytes())

    def generation(self, name: str) -> int:
        """The generation of an object; 0: there is none."""
        with self.lock:
            found = self.storage.objects.get(NAME, {}).get(name)
            return 0 if found is None else int(found["generation"])


class _Handler(emulator.RequestHandler):
    """Answers one request: the emulator, after the faults and the preconditions."""

    def __init__(self, bucket: Bucket, *arguments: Any) -> None:
        self._bucket = bucket
        super().__init__(bucket.storage, *arguments)

    def _answer(self, method: str) -> None:
        bucket = self._bucket
        # The emulator reads the body late or not at all, and the client would see a broken pipe.
        body = emulator._read_raw_data(self) or b""
        self.rfile = io.BytesIO(body)
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        url = urllib.parse.urlsplit(self.path)
        with bucket.lock:
            bucket.requests[method] = bucket.requests.get(method, 0) + 1
            chosen = bucket.chosen(method, self.path)
            fails = chosen and bucket.draw.random() < bucket.failing
        if chosen and bucket.delay:
            time.sleep(bucket.delay)
        with bucket.lock:
            if fails:
                self._refuse(bucket.status)
            elif (refused := self._refused(url.path, urllib.parse.parse_qs(url.query), body)) != 0:
                self._refuse(refused)
            else:
                emulator.Router(self).handle(method)

    def _refused(self, path: str, query: dict[str, list[str]], body: bytes) -> int:
        """The status of a request whose precondition does not hold; 0 for any other."""
        if "/upload/" in path:
            name = query["name"][0] if "name" in query else _name_in(body)
        elif "/o/" in path:
            name = urllib.parse.unquote(path.partition("/o/")[2])
        else:
            name = urllib.parse.unquote(path.removeprefix(f"/{NAME}/"))
        found = self._bucket.generation(name)
        self._generation = found if self.command == "GET" else 0
        if "ifGenerationMatch" in query and found != int(query["ifGenerationMatch"][0]):
            return 412
        not_this = query.get("ifGenerationNotMatch", [""])[0]
        return 304 if found and not_this == str(found) else 0

    def end_headers(self) -> None:
        """Says which generation was read, without which a client cannot replace it."""
        if getattr(self, "_generation", 0):
            self.send_header("x-goog-generation", str(self._generation))
        super().end_headers()

    def _refuse(self, status: int) -> None:
        reply = json.dumps({"error": {"code": status, "message": "as the test wants it"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")


def _name_in(body: bytes) -> str:
    """The name of an object in the first part of a multipart upload."""
    start = body.index(b"{")
    return json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))[0]["name"]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that are gone: tests kill them."""


@contextlib.contextmanager
def running_bucket() -> Iterator[Bucket]:
    """Context manager that yields an empty bucket, gs://bucket, on a server of its own.

    The environment variables of this process name the server meanwhile, and processes that it
    starts inherit them.
    """
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    logging.getLogger("api.object").setLevel(logging.CRITICAL)
    bucket = Bucket(Storage(use_memory_fs=True))
    create_bucket(NAME, bucket.storage)
    bucket.storage.objects.setdefault(NAME, {})
    server = _Server(("127.0.0.1", 0), functools.partial(_Handler, bucket))
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in bucket.environment}
    os.environ.update(bucket.environment)
    _forget_clients()
    try:
        yield bucket
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _forget_clients()
        server.shutdown()
        server.server_close()
        thread.join()


def _forget_clients() -> None:
    """Makes gcsfs and epath look at the environment anew; both keep their clients."""
    import gcsfs
    from etils.epath import backend

    gcsfs.GCSFileSystem.clear_instance_cache()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
