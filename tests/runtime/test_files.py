"""Files on disks and in buckets: what is written whole, what faults say, what killed processes
leave.
"""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import stat
import subprocess
import sys

import pytest

from perl_jax.errors import Occupied, UserError
from perl_jax.runtime import buckets, copies, faults, files, outputs, scratch

# An address in the bucket of `tests.bucket` and its way of spelling it.
BUCKET = "gs://bucket/a folder/[run]"


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A folder with special characters, on a disk and in a bucket; it is not made."""
    if request.param == "disk":
        return files.path_of(tmp_path / "a folder" / "[run]")
    request.getfixturevalue("bucket")
    return files.path_of(BUCKET)


def test_a_place_is_written_listed_and_read_back_wherever_it_is(place):
    assert (files.kind_of(place), files.listing(place), files.tree(place)) == (None, [], {})
    files.write_json(place / "config.json", {"b": 1, "a": "é"})
    files.write_bytes(place / "deep" / "er" / "data", b"\0\1\2")
    assert files.read_json(place / "config.json") == {"b": 1, "a": "é"}
    assert files.read_bytes(place / "deep" / "er" / "data") == b"\0\1\2"
    assert (files.kind_of(place), files.kind_of(place / "config.json")) == ("folder", "file")
    assert files.is_folder(place / "deep") and not files.is_file(place / "deep")
    assert files.listing(place) == [place / "config.json", place / "deep"]
    assert files.listing(place, "*.json") == [place / "config.json"]
    assert files.tree(place) == {"config.json": 28, "deep/er/data": 3}
    assert files.folder_bytes(place) == 31 and files.size(place / "config.json") == 28
    files.write_bytes(place / "config.json", b"new")
    assert files.read_bytes(place / "config.json") == b"new"
    hashed = files.file_hash(place / "config.json")
    assert (
        hashed == files.file_hash(place / "config.json") != files.file_hash(place / "deep/er/data")
    )
    files.remove(place / "deep")
    files.remove(place / "deep")
    assert files.tree(place) == {"config.json": 3}


def test_a_missing_file_is_named(place):
    with pytest.raises(faults.FileError, match=r"gone cannot be read: there is no such file") as e:
        files.read_bytes(place / "gone")
    assert e.value.missing
    with pytest.raises(UserError, match=r"There is no file .*gone\.json\."):
        files.read_json(place / "gone.json")


def test_paths_of_users_are_read_as_they_mean_them(monkeypatch, tmp_path, bucket):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.path_of("~/runs") == tmp_path / "runs"
    assert str(files.path_of("gs://bucket/a")) == "gs://bucket/a"
    assert str(files.absolute("gs://bucket/a")) == "gs://bucket/a"
    monkeypatch.chdir(tmp_path)
    assert files.absolute("a") == tmp_path / "a"
    assert str(files.resolved("gs://bucket/a/../b")) == "gs://bucket/b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "The path is empty"),
        ("a\0b", "it has a null character"),
        ("s3://bucket/a", "s3://bucket/a has the scheme s3://, which is not supported"),
        ("https://host/a", "has the scheme https://, which is not supported"),
        ("gs://bucket", "gs://bucket does not name a folder or file in a bucket"),
        (pathlib.Path("gs://bucket/a"), "give it as text with two slashes, gs://BUCKET/PATH"),
    ],
)
def test_what_is_no_path_is_refused(path, message):
    with pytest.raises(UserError) as error:
        files.path_of(path)
    assert message in str(error.value)


def test_a_bucket_needs_its_package(monkeypatch):
    buckets._set_up.cache_clear()
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package gcsfs; .*pip install .*\[gcs\]"):
        files.path_of("gs://bucket/a")
    buckets._set_up.cache_clear()


def test_files_have_the_rights_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "made" / "a.json", 1)
        with outputs.new_folder(tmp_path / "export", "a") as folder:
            (folder / "a").write_text("a")
    finally:
        os.umask(before)
    rights = lambda path: stat.S_IMODE(os.stat(path).st_mode)
    assert rights(tmp_path / "made" / "a.json") == 0o640
    assert rights(tmp_path / "made") == rights(tmp_path / "export") == 0o750


def test_a_link_stays_a_link_and_a_device_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_bytes(tmp_path / "link", b"a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"a"
    files.write_bytes("/dev/null", b"a")
    assert outputs.check_writable("/dev/null") and not stat.S_ISREG(os.stat("/dev/null").st_mode)


FAULTS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "has no permission",
    errno.EPERM: "has no permission",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system has lost the file",
    errno.EMFILE: "too many open files",
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_is_a_sentence_and_the_old_content_stays(tmp_path, monkeypatch, code):
    path = tmp_path / "a.json"
    files.write_bytes(path, b"old")

    def fails(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(faults.FileError) as error:
        files.write_bytes(path, b"new")
    message = str(error.value)
    assert message.startswith(f"{path} cannot be written: ") and FAULTS[code] in message
    assert message.count(".") - str(path).count(".") == 1 and message.endswith(".")
    assert os.listdir(tmp_path) == ["a.json"] and path.read_bytes() == b"old"


def test_a_full_device_is_full(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(faults.FileError, match="full cannot be written: the disk is full"):
        files.write_bytes(tmp_path / "full", b"a" * 2**16)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file/below", "a part of the path is a file"),
        ("n" * 300, "a name in the path is longer"),
        ("loop", "symbolic links form a circle"),
        (".", "is a folder; give the path of a file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, path, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError) as error:
        outputs.check_writable(tmp_path / path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_check_leaves_nothing(place):
    outputs.check_writable(place / "deep" / "a.jsonl")
    assert files.kind_of(place) is None
    if not files.is_remote(place):
        assert not os.path.exists(place.parent)


def test_a_limit_of_the_systems_is_a_sentence(tmp_path):
    """A child process: the limit holds for all of a process's files."""
    code = (
        "import resource, signal, sys\n"
        "from perl_jax.runtime import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    files.write_bytes(sys.argv[1], bytes(5000))\n"
        "except files.FileError as error:\n    print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a cannot be written: the file would be larger than the system allows" in done.stdout
    assert os.listdir(tmp_path) == []


def test_what_dead_processes_left_is_deleted_and_nothing_else(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = scratch.scratch_name("a").replace(f".{os.getpid()}.", f".{child.pid}.")
    ours, others = scratch.scratch_name("a"), dead.replace(".a.", ".ab.")
    elsewhere = f".a.another-host.{child.pid}.0.tmp"
    for name in (dead, ours, others, elsewhere, ".a.tmp", ".a.x.1.0.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
    files.write_bytes(tmp_path / "a", b"a")
    left = {ours, others, elsewhere, ".a.tmp", ".a.x.1.0.tmp", "a"}
    assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("fails", [False, True])
def test_a_new_folder_appears_whole_or_not_at_all(place, fails):
    to = place / "made" / "export"
    try:
        with outputs.new_folder(to, "last.json") as folder:
            files.write_bytes(folder / "sub" / "data", b"1")
            files.write_json(folder / "last.json", 1)
            assert not files.exists(to / "last.json")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert files.tree(place) == ({} if fails else {f"made/export/{n}": s for n, s in WHOLE.items()})
    assert not fails or files.kind_of(place) is None
    if not fails:
        with pytest.raises(Occupied, match="exists already"), outputs.new_folder(to, "last.json"):
            raise AssertionError


WHOLE = {"last.json": 2, "sub/data": 1}


def test_an_upload_that_stopped_is_replaced(bucket):
    """Killed before the marker: what is there is no export, and the same command replaces it."""
    to = files.path_of(f"{BUCKET}/export")
    files.write_bytes(to / "stale", b"1")
    with pytest.raises(Occupied, match="export exists"), outputs.new_folder(to, "last.json"):
        raise AssertionError
    files.write_bytes(to / ".incomplete", b"")
    with outputs.new_folder(to, "last.json") as folder:
        files.write_json(folder / "last.json", 1)
        files.write_json(folder / "zz.json", 1)
    assert files.tree(to) == {"last.json": 2, "zz.json": 2}
    facts = {name: int(about["generation"]) for name, about in buckets.tree(to).items()}
    assert facts["last.json"] > facts["zz.json"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the bucket does not accept the credentials; log in with"),
        (403, "the credentials give no access to the bucket"),
    ],
)
def test_what_a_bucket_refuses_is_a_sentence(bucket, status, message):
    path = files.path_of(f"{BUCKET}/a")
    bucket.failing, bucket.status = 1.0, status
    for attempt in (lambda: files.write_bytes(path, b"a"), lambda: files.exists(path)):
        with pytest.raises(faults.FileError) as error:
            attempt()
        assert str(path) in str(error.value) and message in str(error.value)


def test_a_bucket_that_fails_now_and_then_is_tried_again(bucket, monkeypatch):
    path = files.path_of(f"{BUCKET}/a")
    bucket.failing = 0.3
    monkeypatch.setattr("gcsfs.retry.random.random", lambda: -0.99)
    for number in range(6):
        files.write_json(path / str(number), number)
        assert files.read_json(path / str(number)) == number


def test_a_bucket_that_is_not_there_is_named(bucket):
    path = files.path_of("gs://another/a")
    with pytest.raises(faults.FileError, match="another/a cannot be written: there is no"):
        files.write_bytes(path, b"a")
    with pytest.raises(UserError, match="there is no such file, folder or bucket"):
        outputs.check_writable(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b cannot be used: the disk is full"),
        (ValueError("[OS error: Read-only file system]"), "folder cannot be used: the file system"),
        (RuntimeError("RESOURCE_EXHAUSTED: x; No space left on device"), "the disk is full"),
        (OSError("Forbidden: https://x\nAnonymous caller does not"), "there are no credentials"),
        (
            ValueError("DEADLINE_EXCEEDED: reading gs://bucket/a; tensorstore"),
            "the bucket's server cannot be reached",
        ),
    ],
)
def test_faults_that_libraries_report_are_recognised(error, message):
    assert message in (faults.sentence(error) or "")
    outer = RuntimeError("of a library")
    outer.__cause__ = error
    assert message in (faults.sentence(outer) or "")
    assert message in (faults.sentence(ExceptionGroup("several", [error])) or "")


def test_mistakes_of_programs_are_not_explained_as_faults():
    assert faults.sentence(KeyError("name")) is None
    # As raised by a mistake in the handler of a missing file.
    mistake = KeyError("name")
    mistake.__context__ = FileNotFoundError(errno.ENOENT, "gone", "/a")
    assert faults.sentence(mistake) is None
    mistake.__context__ = OSError(errno.ENOSPC, "full", "/a")
    assert faults.sentence(mistake) is not None
    with pytest.raises(KeyError), faults.explained("/a", "read"):
        raise KeyError("name")


def test_a_folder_in_a_bucket_is_copied_once_until_it_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path))
    source = files.path_of(BUCKET)
    for name in ("config.json", "deep/b.json", "other.bin"):
        files.write_bytes(source / name, name.encode())
    first = copies.local_copy(BUCKET, ["*.json"])
    assert files.tree(first) == {"config.json": 11, "deep/b.json": 11}
    assert (first / "deep" / "b.json").read_text() == "deep/b.json"
    bucket.chosen, bucket.failing = lambda method, path: "alt=media" in path, 1.0
    assert copies.local_copy(BUCKET, ["*.json"]) == first
    bucket.failing = 0.0
    # Of the same size, so only the generation tells.
    files.write_bytes(source / "config.json", b"changed.js")
    files.write_bytes(source / "config.json", b"changed.jso")
    second = copies.local_copy(BUCKET, ["*.json"])
    assert second != first and (second / "config.json").read_text() == "changed.jso"
    assert sorted(os.listdir(tmp_path / "copies")) == sorted([first.name, second.name])
    assert copies.local_copy(str(tmp_path)) == tmp_path


def test_a_copy_that_fails_leaves_nothing(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"There is no folder gs://bucket/.* with files"):
        copies.local_copy(BUCKET, ["*.json"])
    files.write_bytes(files.path_of(BUCKET) / "a.json", b"a")
    bucket.chosen = lambda method, path: "alt=media" in path
    bucket.failing, bucket.status = 1.0, 403
    with pytest.raises(UserError, match=r"cannot be copied to this host's disk: .*no access"):
        copies.local_copy(BUCKET)
    assert os.listdir(tmp_path / "copies") == []
    bucket.failing = 0.0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"a part of the path is a file.* PERL_JAX_CACHE names"):
        copies.local_copy(BUCKET)


def test_a_base_is_put_beside_what_is_there(place):
    files.write_json(place / "run" / "a.json", 1)
    files.write_json(place / "config.json", "old")
    with outputs.filled_folder(place, "config.json") as folder:
        files.write_json(folder / "weights.json", 1)
        assert not files.exists(place / "config.json")
        files.write_json(folder / "config.json", "new")
    assert set(files.tree(place)) == {"run/a.json", "weights.json", "config.json"}
    assert files.read_json(place / "config.json") == "new"
