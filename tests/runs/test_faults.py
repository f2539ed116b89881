"""A checkpoint or an artefact that cannot be written: one sentence, and what was saved stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from perl_jax.errors import TrainingError, UserError
from perl_jax.hub import artefacts
from perl_jax.runs.checkpoints import Checkpoints
from tests import small
from tests.runs.test_checkpoints import make_state, record

# Files may have 3,000 bytes: some of a checkpoint's can be written, and others not.
LIMITED = """
import pathlib, resource, sys
import perl_jax.cli.main
from perl_jax.errors import TrainingError, UserError
from perl_jax.hub import artefacts
from perl_jax.runs.checkpoints import Checkpoints
from tests import small
from tests.runs.test_checkpoints import make_state, record

folder = pathlib.Path(sys.argv[1])
state, adapter = make_state(), small.make_adapter()
checkpoints = Checkpoints(folder / "checkpoints")
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    checkpoints.save(state, {"cursor": 1})
except TrainingError as error:
    print(error)
try:
    artefacts.save_artefact(folder / "policy", adapter, record(step=1))
except UserError as error:
    print(error)
checkpoints.close()
"""


@pytest.mark.slow
def test_a_real_fault_in_orbax_is_a_sentence_and_nothing_else_is_printed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        timeout=120,
    )
    too_large = "cannot be written: the file would be larger than the system allows"
    checkpoint, artefact = done.stdout.splitlines()
    assert checkpoint.startswith("The checkpoint of step 2 in ") and too_large in checkpoint
    assert checkpoint.endswith("The run stopped; there is no checkpoint before it.")
    assert artefact.startswith(f"{tmp_path / 'policy'} {too_large}")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "policy" / artefacts.RECORD).exists()


@pytest.mark.slow
def test_the_last_good_checkpoint_is_named_and_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    state = make_state()
    checkpoints.save(state, {"cursor": 1})
    step = int(state.step)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "save", fails)
        later = state.replace(step=state.step + 1)
        with pytest.raises(TrainingError, match=f"full; .* goes on from the .* of step {step}"):
            checkpoints.save(later, {"cursor": 2})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    small.assert_same(again.restore_newest(state)[0], state)
    again.close()


def test_an_artefact_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "reward"
    artefacts.save_artefact(folder, small.make_adapter(), record(step=1))

    def fails(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: writing failed: Disk quota exceeded")

    monkeypatch.setattr(artefacts.ocp.StandardCheckpointer, "save", fails)
    with pytest.raises(UserError, match="reward cannot be written: the disk quota is used up"):
        artefacts.save_artefact(folder, small.make_adapter(seed=1), record(step=2))
    assert artefacts.read_record(folder).step == 1
