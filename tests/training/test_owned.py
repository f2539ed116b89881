"""Commands and functions of the library hold their run's folder."""

from __future__ import annotations

import os

import pytest

from perl_jax.errors import Stopped
from perl_jax.evaluation.compare import run_evaluate
from perl_jax.runs.owner import FILE_NAME, InUse, owned
from perl_jax.training import commands, loop
from perl_jax.training.sft import train_sft
from tests.training import tiny


def test_commands_and_the_library_hold_their_folder(base, tmp_path):
    config = tiny.sft_config(tmp_path / "run", base)
    model = tiny.open_model(base)
    with owned(tmp_path / "run"):
        for command in (
            lambda: commands.run_sft(config),
            lambda: train_sft(model, [{"prompt": "a", "response": "b"}], run=tmp_path / "run"),
            lambda: run_evaluate(
                tiny.evaluate_config(tmp_path / "run", base, policy="none", reward=("none",))
            ),
        ):
            with pytest.raises(InUse, match=f"is in use by .* .process {os.getpid()} on"):
                command()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_a_run_holds_its_folder_to_its_end_and_not_longer(base, tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    check = loop.check_finite

    def look(*arguments):
        with pytest.raises(InUse), owned(folder):
            pass
        seen.append((folder / FILE_NAME).exists())
        check(*arguments)
        if len(seen) == 3:
            raise Stopped("as SIGTERM does")

    monkeypatch.setattr(loop, "check_finite", look)
    config = tiny.sft_config(folder, base)
    with pytest.raises(Stopped):
        commands.run_sft(config)
    assert seen == [True] * 3 and not (folder / FILE_NAME).exists()
    commands.run_sft(config)
    assert not (folder / FILE_NAME).exists()
