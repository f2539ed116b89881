"""Folders whose names have special characters, and what is read back before a save counts."""

from __future__ import annotations

import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from perl_jax.errors import TrainingError, UserError
from perl_jax.hub import artefacts
from perl_jax.runs import checkpoints as checkpoints_lib
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import files
from perl_jax.runtime.storage import plain_path
from tests import small
from tests.runs.test_checkpoints import abstract, few_leaves, load, record

# Each as a whole name, and all but the last two in one name.
ODD = {
    "brackets": b"a[b]c",
    "star": b"*",
    "question mark": b"a?",
    "backslash": b"a\\b",
    "scheme": b"gs:",
    "spaces": b" a b ",
    "newline": b"a\nb",
    "percent": b"%41#~",
    "letters": "ä\u2028".encode(),
    "no UTF-8": b"a\xff\xfeb",
    "long": 240 * b"x",
    "deep": b"/".join([200 * b"x"] * 12),
}
QUICK = ("brackets", "backslash", "no UTF-8", "deep")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in ODD],
)
def test_checkpoints_and_artefacts_come_back_from_any_folder(tmp_path, name):
    folder = tmp_path / os.fsdecode(ODD[name])
    # What a pattern would take for the same folder.
    for other in ("aXb", "ab", "b", "ax"):
        (tmp_path / other / "checkpoints" / "3").mkdir(parents=True)
    state = few_leaves()
    for step in (3, 4):
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(state.replace(step=np.int32(step)), {"cursor": step})
        checkpoints.close()
    again = Checkpoints(folder / "checkpoints")
    restored, host = again.restore_newest(abstract(state))
    again.close()
    small.assert_same(jax.tree.map(np.array, restored.roles), jax.tree.map(np.array, state.roles))
    assert (int(restored.step), host) == (4, {"cursor": 4})
    adapter = small.make_adapter()
    artefacts.save_artefact(files.path_of(folder / "reward"), adapter, record())
    small.assert_same(load(folder / "reward")[0], adapter)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "reward"]


def test_a_link_stands_for_a_folder_only_where_it_is_needed(tmp_path):
    with plain_path(files.absolute(tmp_path / "a b.c-d_e=f,g")) as path:
        assert path == files.absolute(tmp_path / "a b.c-d_e=f,g")
    folder = tmp_path / "[a]"
    folder.mkdir()
    with plain_path(files.absolute(folder)) as path:
        (folder / "file").write_text("text")
        assert (path / "file").read_text() == "text" and "[" not in str(path)
    assert not path.exists() and (folder / "file").exists()


@pytest.mark.parametrize("character", ["[", "]", "*", "?", "\\", "#", "\n"])
def test_an_address_with_a_special_character_is_refused(bucket, character):
    with pytest.raises(UserError, match="which a folder of checkpoints in a bucket may not have"):
        Checkpoints(f"gs://bucket/a{character}b/checkpoints")
    assert bucket.names() == []


@pytest.mark.parametrize("lost", ["state/manifest.ocdbt", "digests/metadata", None])
def test_a_checkpoint_that_cannot_be_read_back_ends_the_run(tmp_path, monkeypatch, lost):
    save = ocp.CheckpointManager.save

    def save_less(self, step, **options):
        save(self, step, **options)
        path = pathlib.Path(self.directory) / str(step)
        (path / lost).unlink() if lost else path.rename(path.with_name("lost"))

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_less)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TrainingError, match=r"step 3 in .* was saved, but cannot be read back \("):
        checkpoints.save(few_leaves(), {"cursor": 3})
    checkpoints.close()


def test_an_artefact_without_its_manifest_is_none(tmp_path, monkeypatch):
    class Saves(ocp.StandardCheckpointer):
        def save(self, directory, *arguments, **named):
            super().save(directory, *arguments, **named)
            self.wait_until_finished()
            (pathlib.Path(directory) / "manifest.ocdbt").unlink()

    monkeypatch.setattr(artefacts.ocp, "StandardCheckpointer", Saves)
    with pytest.raises(UserError, match="was saved, but cannot be read back"):
        artefacts.save_artefact(files.path_of(tmp_path / "a"), small.make_adapter(), record())
    assert not (tmp_path / "a" / artefacts.RECORD).exists()
    assert checkpoints_lib.saved_steps(tmp_path) == []
