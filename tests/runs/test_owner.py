"""One owner a run: a second command on a folder is told who holds it, and nothing else is left."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from perl_jax.errors import UserError
from perl_jax.runs import folder as folder_lib
from perl_jax.runs import owner
from perl_jax.runs.owner import FILE_NAME, InUse, owned
from perl_jax.runs.run import Run
from perl_jax.runtime import files
from tests.training.processes import PATIENCE, ROOT

# Holds the folder and says so; ends when its input ends, or as it is told to.
HOLDS = """
import sys
sys.argv[:] = ["/usr/bin/perl-jax", "rl", "--judge-key", "secret"]
from perl_jax.runs.owner import owned
with owned(sys.stdin.readline().strip()):
    print("held", flush=True)
    if sys.stdin.readline().strip() == "fail":
        raise ValueError
"""


def start(folder: pathlib.Path) -> subprocess.Popen:
    """A process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdin.write(f"{folder}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_told_who_holds_the_folder_however_that_one_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    process = start(folder)
    before = (folder / FILE_NAME).read_bytes()
    for _ in range(2):
        with pytest.raises(InUse) as error, owned(folder):
            pass
        said = json.loads(before)
        assert str(error.value) == (
            f"{folder} is in use by perl-jax rl (process {process.pid} on {socket.gethostname()}, "
            f"since {said['since']} UTC); wait until that ends, or use another folder."
        )
    # A refusal neither ends the lock nor changes the file.
    assert (folder / FILE_NAME).read_bytes() == before and b"secret" not in before
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    # What it left is nobody's.
    assert (folder / FILE_NAME).exists()
    with owned(folder):
        assert json.loads((folder / FILE_NAME).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []
    for word in ("fail", "end"):
        process = start(folder)
        process.communicate(word, timeout=PATIENCE)
        with owned(folder):
            pass


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with owned(tmp_path / "run"):
        for name in ("run", "link", "run/../run"):
            with pytest.raises(InUse, match=f"process {os.getpid()} on"), owned(tmp_path / name):
                pass
        # The second try has not cost the first one its lock.
        assert locked(tmp_path / "run")
        with owned(tmp_path / "other"):
            pass
    with owned(tmp_path / "run"):
        pass


LOCKED = """
import sys
from perl_jax.runs.owner import InUse, owned
try:
    with owned(sys.argv[1]):
        pass
except InUse:
    sys.exit(3)
"""


def locked(folder: pathlib.Path) -> bool:
    """Whether another process is refused."""
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(folder)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
    )
    assert done.returncode in (0, 3)
    return done.returncode == 3


def test_a_child_neither_holds_nor_frees_what_its_parent_holds(tmp_path):
    with owned(tmp_path):
        held = next(iter(owner._held.values()))
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert locked(tmp_path) and (tmp_path / FILE_NAME).exists()


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    (tmp_path / "there").mkdir()
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), owned(tmp_path / "there" / "a" / "b"):
            raise error
    assert list((tmp_path / "there").iterdir()) == []
    with owned(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_what_cannot_be_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be used as a run's folder: "), owned(path):
            pass
    # A pipe of the file's name blocks nobody.
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / FILE_NAME)
    with pytest.raises(UserError, match=r"its owner\.json is not a file"), owned(tmp_path / "run"):
        pass


def test_text_that_says_nobody_is_of_another_process():
    for text in ("", "[]", "{", '{"host": "a"}', b"\xff"):
        assert owner.holder_of(text) is None
    assert "is in use by another process; wait" in owner.refusal("run", None)


def test_a_run_that_is_replaced_keeps_its_owner(tmp_path):
    for name in ("config.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    with owned(tmp_path):
        folder_lib.clear(Run(files.path_of(tmp_path), replaces={"job": "sft"}))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", FILE_NAME]
        assert locked(tmp_path)
