"""The bucket that tests use checks preconditions and fails as it is told to."""

from __future__ import annotations

import pytest
from etils import epath


def put(fs, content: bytes, generation: int) -> int:
    """Writes gs://bucket/a/lock if it has this generation (0: if there is none)."""
    reply = fs.call(
        "POST",
        fs.base.replace("/storage/", "/upload/storage/") + "b/{}/o",
        "bucket",
        uploadType="media",
        name="a/lock",
        ifGenerationMatch=str(generation),
        data=content,
        headers={"Content-Type": "application/octet-stream"},
        json_out=True,
    )
    return int(reply["generation"])


def test_a_write_needs_the_generation_that_it_names(bucket):
    import fsspec

    fs = fsspec.filesystem("gcs", finalize_on_close=True)
    first = put(fs, b"1", 0)
    for generation in (0, first + 1):
        with pytest.raises(FileExistsError):
            put(fs, b"2", generation)
    with pytest.raises(FileExistsError):
        fs.pipe_file("bucket/a/lock", b"2", mode="create")
    assert put(fs, b"3", first) > first and bucket.read("a/lock") == b"3"
    with pytest.raises(FileExistsError):
        fs.call("DELETE", "b/{}/o/{}", "bucket", "a/lock", ifGenerationMatch=str(first))
    assert bucket.names() == ["a/lock"]


def test_requests_fail_as_they_are_told_to(bucket):
    path, uploads = epath.Path("gs://bucket/a/b"), []

    def first_upload(method: str, url: str) -> bool:
        uploads.extend([url] if method == "POST" and "/upload/" in url else [])
        return len(uploads) == 1

    bucket.chosen, bucket.failing = first_upload, 1.0
    # Tried again by the client.
    path.write_text("text")
    assert len(uploads) > 1 and bucket.read("a/b") == b"text"
