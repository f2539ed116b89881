"""Every file of a checkpoint truncated, emptied, flipped, deleted or exchanged: the one before it
is used, and one sentence says so.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.runs.checkpoints import Checkpoints
from tests import small
from tests.runs.test_checkpoints import abstract, few_leaves, files_below, flip

STEPS = (3, 4, 5)
# Better to worse; the newest is never the best.
ACCURACY = {3: 0.5, 4: 0.75, 5: 0.25}


def state_of(step: int):
    state = few_leaves()
    return state.replace(
        step=jnp.int32(step), roles=jax.tree.map(lambda leaf: leaf + step, state.roles)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Checkpoints of three steps with metrics."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3, best="accuracy")
    for step in STEPS:
        checkpoints.save(state_of(step), {"cursor": step}, {"accuracy": ACCURACY[step]})
    checkpoints.close()
    return folder


def truncate(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def exchange(path: pathlib.Path, draw: random.Random) -> None:
    """A pipe in place of a file, which would never end to be read."""
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "truncated": truncate,
    "emptied": lambda path, draw: path.write_bytes(b""),
    "flipped": flip,
    "deleted": lambda path, draw: path.unlink(),
    "exchanged": exchange,
}
# Kinds of files. Only the first four are needed to read a checkpoint; a damaged one of the others
# may go unnoticed as long as what is read is what was saved.
NEEDED = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "host/metadata")
SOME = (*NEEDED, "digests/metadata", "metrics/metrics")


def read(folder: pathlib.Path, best: bool) -> tuple[int, int | None]:
    """The steps that a run would go on from and give back; what is read is what was saved."""
    checkpoints = Checkpoints(folder, keep=3, best="accuracy" if best else None)
    found = [checkpoints.restore_newest(abstract(few_leaves()))]
    if best:
        found.append(checkpoints.restore_best(abstract(few_leaves())))
    checkpoints.close()
    for state, host in found:
        step = int(state.step)
        small.assert_same(
            jax.tree.map(np.array, state.roles), jax.tree.map(np.array, state_of(step).roles)
        )
        assert host == {"cursor": step}
    steps = [int(state.step) for state, _ in found]
    return steps[0], steps[1] if best else None


def assert_sentences(said: str, steps: set[int]) -> None:
    """One line a damaged step, each one sentence with what becomes of it."""
    lines = said.splitlines()
    pattern = r"The checkpoint of step (\d) in .* is damaged \(.*\): what is read is not what was "
    pattern += (
        r"saved\. It is (set aside as \d\.damaged(, and the run goes on from step \d)?|deleted)\."
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), said
    assert {int(match[1]) for match in found if match} == steps and len(lines) == len(steps)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_gives_way(saved, tmp_path, capsys, kind, best):
    """A few files of each kind; every file in the slow test below."""
    draw = random.Random(f"{kind}{best}")
    array = max((saved / "5" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    for name in (draw.choice(SOME), f"state/d/{array.name}"):
        folder = shutil.copytree(saved, tmp_path / "copy")
        DAMAGE[kind](folder / "5" / name, draw)
        assert read(folder, best) == (4, 4 if best else None), name
        assert_sentences(capsys.readouterr().out, {5})
        # Said once: the next start finds it set aside.
        assert (folder / "5.damaged").exists() and read(folder, best)[0] == 4
        assert capsys.readouterr().out == ""
        shutil.rmtree(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_file_of_the_newest_checkpoint(saved, tmp_path, capsys, kind, best):
    draw, counts = random.Random(f"{kind}{best}"), {4: 0, 5: 0}
    for name in files_below(saved / "5"):
        folder = shutil.copytree(saved, tmp_path / "copy")
        DAMAGE[kind](folder / "5" / name, draw)
        step, chosen = read(folder, best)
        said = capsys.readouterr().out
        assert step in counts and chosen in (4, None), name
        assert_sentences(said, {5} if step == 4 else set())
        assert step == 4 or name not in NEEDED or kind == "flipped", name
        counts[step] += 1
        shutil.rmtree(folder)
    print(kind, counts)
    assert counts[4] >= (4 if kind in ("truncated", "flipped") else 6)


@pytest.mark.parametrize("which", ["empty folder", "no metadata, no checksums"])
def test_a_folder_that_is_hardly_a_checkpoint_is_none(saved, tmp_path, capsys, which):
    folder = shutil.copytree(saved, tmp_path / "copy")
    if which == "empty folder":
        (folder / "6").mkdir()
    else:
        shutil.copytree(saved / "5", folder / "6")
        shutil.rmtree(folder / "6" / "digests")
        (folder / "6" / "state" / "_METADATA").unlink()
    assert read(folder, True) == (5, 4)
    assert_sentences(capsys.readouterr().out, {6})


def test_a_damaged_best_step_leaves_the_next_best(saved, tmp_path, capsys):
    for name in ("digests/metadata", "state/manifest.ocdbt"):
        folder = shutil.copytree(saved, tmp_path / "copy")
        truncate(folder / "4" / name, random.Random(0))
        assert read(folder, True) == (5, 3)
        assert_sentences(capsys.readouterr().out, {4})
        shutil.rmtree(folder)


def test_what_stopped_deletions_left_is_deleted(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "copy")
    # A deletion by this version, one by an earlier version, and one of a save.
    shutil.copytree(saved / "3", folder / ".deleted" / "2")
    (folder / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.copytree(saved / "5", folder / "6.orbax-checkpoint-tmp")
    assert read(folder, True) == (5, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "5"]
    assert_sentences(capsys.readouterr().out, {3})


def test_without_a_whole_checkpoint_the_newest_is_named(saved, tmp_path, capsys):
    for name in ("digests/metadata", "state/d"):
        folder = shutil.copytree(saved, tmp_path / "copy")
        before = sorted(files_below(folder))
        for step in STEPS:
            path = folder / str(step) / name
            for file in path.iterdir() if path.is_dir() else [path]:
                truncate(file, random.Random(0))
        with pytest.raises(UserError, match=r"The checkpoint of step 5 in .* is damaged"):
            read(folder, True)
        # Nothing is moved: a copy from elsewhere may repair it.
        assert sorted(files_below(folder)) == before and capsys.readouterr().out == ""
        shutil.rmtree(folder)
