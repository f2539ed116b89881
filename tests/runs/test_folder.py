"""A run's folder: what binds it, which settings are refused and with which flags they would be
right.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import pytest

from perl_jax.data.config import DataConfig
from perl_jax.errors import Occupied, UserError
from perl_jax.runs import folder as folder_lib
from perl_jax.runtime import files, json_values
from perl_jax.training.commands import RLCommand, SFTCommand
from perl_jax.training.optimizers import OptimizerConfig


@pytest.fixture
def config(tmp_path) -> SFTCommand:
    """SFT on a few rows; its model's folder does not exist, and opening does not need it."""
    lines = [json.dumps({"prompt": f"order {i}", "response": "yes"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return SFTCommand(
        run=str(tmp_path / "runs" / "a"),
        model=str(tmp_path / "none"),
        data=DataConfig(data_dir=str(tmp_path / "rows.jsonl")),
        steps=10,
    )


def work(config: SFTCommand, step: int = 4) -> pathlib.Path:
    """Begins a run and gives it a checkpoint's folder."""
    folder_lib.begin(folder_lib.open_run("sft", config))
    folder = pathlib.Path(config.run)
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def test_opening_leaves_nothing_and_the_first_step_writes(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    run = folder_lib.open_run("sft", config)
    assert sorted(tmp_path.rglob("*")) == before
    folder_lib.begin(run)
    found = files.read_json(run.folder / "config.json")
    assert found["config"] == {"job": "sft", **json_values.to_dict(config)}
    assert (run.folder / folder_lib.INPUTS_FILE).exists()


@pytest.mark.parametrize(
    ("made", "binds"),
    [
        ("checkpoints/3/state", True),
        ("metrics.jsonl", True),
        ("adapters/policy/artefact.json", True),
        ("checkpoints/3.damaged/state", False),
        ("profile/trace", False),
    ],
)
def test_a_folder_binds_when_it_holds_work(config, made, binds):
    folder_lib.begin(folder_lib.open_run("sft", config))
    other = dataclasses.replace(config, seed=1)
    # Settings alone: the corrected command begins anew.
    folder_lib.begin(folder_lib.open_run("sft", other))
    folder = pathlib.Path(config.run)
    assert files.read_json(folder / "config.json")["config"]["seed"] == 1
    (folder / made).parent.mkdir(parents=True, exist_ok=True)
    (folder / made).write_text("{}\n")
    if binds:
        with pytest.raises(Occupied, match="seed was 1, is now 0"):
            folder_lib.open_run("sft", config)
    else:
        assert folder_lib.open_run("sft", config).settings is not None


def test_settings_that_differ_are_refused_with_the_flags_that_are_right(config, tmp_path):
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=0.003),
        stack_on="my adapters/top",
    )
    folder = work(config)
    other = dataclasses.replace(
        config, seed=3, stack_on=None, optimizer=OptimizerConfig(), keep=7, checkpoint_every=3
    )
    with pytest.raises(Occupied) as error:
        folder_lib.open_run("sft", other)
    assert str(error.value) == (
        f"{folder} holds a run with other settings (optimizer.learning_rate was 0.003, is now "
        "None; seed was 0, is now 3; stack_on was 'my adapters/top', is now None); it goes on with "
        "--optimizer.learning-rate 0.003 --seed 0 --stack-on 'my adapters/top', or use another "
        "--run."
    )
    assert error.value.path == folder
    rl = RLCommand(run=config.run, model=config.model, data=config.data, reward=("r",))
    with pytest.raises(Occupied) as error:
        folder_lib.open_run("rl", rl)
    assert str(error.value) == (
        f"{folder} holds a run with other settings (job was 'sft', is now 'rl'); use another --run."
    )


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("soft_labels", True, "--kl.soft-labels"),
        ("soft_labels", False, "--kl.no-soft-labels"),
        ("reward", ["a", "b c"], "--kl.reward a 'b c'"),
        ("target", None, "--kl.target None"),
    ],
)
def test_a_setting_as_a_flag(name, value, flag):
    assert folder_lib.flag_of("kl.", name, value) == flag


def test_more_steps_go_on_and_fewer_than_done_are_refused(config, capsys):
    folder = work(config)
    (folder / "cost.json").write_text("{}")
    longer = dataclasses.replace(config, steps=20)
    run = folder_lib.open_run("sft", longer)
    assert capsys.readouterr().err == (
        f"{folder}: steps was 10, is now 20; the run goes on from step 4.\n"
    )
    assert run.goes_on and not folder_lib.is_finished(run, "policy", "cost.json")
    folder_lib.begin(run)
    # The mark of a finished run is gone; inputs stay as they were recorded.
    assert not (folder / "cost.json").exists() and (folder / folder_lib.INPUTS_FILE).exists()
    found = files.read_json(folder / "config.json")
    assert found["config"]["steps"] == 20
    assert found["earlier"] == [{"steps": 10, "until_step": 4}]
    assert not folder_lib.open_run("sft", longer).goes_on
    # Fewer steps than planned are steps too, fewer than done are not.
    assert folder_lib.open_run("sft", dataclasses.replace(config, steps=4)).goes_on
    with pytest.raises(Occupied) as error:
        folder_lib.open_run("sft", dataclasses.replace(config, steps=3))
    assert str(error.value) == (
        f"{folder} holds a run that has done 4 steps; steps is 3: give --steps 4 or more, or "
        "another --run."
    )


def test_a_schedule_that_gets_another_end_is_said(config, capsys):
    config = dataclasses.replace(config, optimizer=OptimizerConfig(schedule="cosine"))
    folder = work(config)
    folder_lib.open_run("sft", dataclasses.replace(config, steps=20))
    assert capsys.readouterr().err == (
        f"{folder}: steps was 10, is now 20; the run goes on from step 4, with a cosine learning "
        "rate that reaches 0 at step 20: steps 1 to 4 had the rates of a run of 10 steps, so the "
        "numbers are not those of a run of 20 steps from the start.\n"
    )


def test_a_dashboard_that_is_not_installed_is_named_first(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        folder_lib.open_run("sft", dataclasses.replace(config, wandb=True))
    assert not (tmp_path / "runs").exists()
