"""--overwrite: what it replaces, what it asks, and what it never deletes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from perl_jax.cli import main as command
from perl_jax.cli import overwrite
from perl_jax.data.config import DataConfig
from perl_jax.errors import Occupied, UserError
from perl_jax.hub import export
from perl_jax.runs import folder as run_folder
from perl_jax.runtime import files
from perl_jax.runtime.outputs import new_folder
from perl_jax.runtime.replacing import replacing
from perl_jax.training.commands import SFTCommand


@pytest.fixture
def config(tmp_path) -> SFTCommand:
    """A run that has done 4 of 10 steps, beside a file and a run that are not its own."""
    lines = [json.dumps({"prompt": f"order {i}", "response": "yes"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = SFTCommand(
        run=str(tmp_path / "run"),
        model=str(tmp_path / "none"),
        data=DataConfig(data_dir=str(tmp_path / "rows.jsonl")),
        steps=10,
    )
    run_folder.begin(run_folder.open_run("sft", config))
    for name in ("checkpoints/4/state", "metrics.jsonl", "notes.txt", "other/config.json"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    return config


def said_of(folder: pathlib.Path) -> str:
    return (
        f"a run of sft, 4 of 10 steps, {overwrite.size_of(size_of_run(folder))} (checkpoints, "
        "config.json, metrics.jsonl, stands.json)"
    )


def size_of_run(folder: pathlib.Path) -> int:
    names = ("checkpoints/4/state", "config.json", "metrics.jsonl", "stands.json")
    return sum((folder / name).stat().st_size for name in names)


class Terminal(io.StringIO):
    """Standard input or error that is a terminal."""

    def isatty(self) -> bool:
        return True


# Parsing.


@pytest.mark.parametrize(
    ("words", "mode", "rest"),
    [
        (["--a", "1"], None, ["--a", "1"]),
        (["--overwrite", "--a", "1"], "ask", ["--a", "1"]),
        (["--a", "1", "--overwrite"], "ask", ["--a", "1"]),
        (["--overwrite", "yes", "adapter"], "yes", ["adapter"]),
        (["--overwrite=yes", "yes"], "yes", ["yes"]),
        (["--overwrite", "adapter"], "ask", ["adapter"]),
    ],
)
def test_the_flag_is_taken_out_of_the_others(words, mode, rest):
    assert overwrite.take(words) == (mode, rest)


def test_commands_that_refuse_nothing_have_no_such_flag(capsys):
    for name in set(command.COMMANDS) - set(command.OVERWRITING):
        with pytest.raises(SystemExit):
            command.main([name, "--overwrite"])
    capsys.readouterr()


def test_a_refusal_names_the_flag(config, capsys):
    arguments = ["sft", "--run", config.run, "--model", config.model, "--seed", "3"]
    data = ["--data.data-dir", config.data.data_dir, "--steps", "10"]
    assert command.main([*arguments, *data]) == 2
    said = capsys.readouterr().err
    assert said.endswith("or use another --run, or --overwrite to replace what is there.\n")
    assert "it goes on with --seed 0" in said


# Runs.


def test_a_run_is_replaced_when_the_first_step_is_about_to_be_made(config, tmp_path, capsys):
    other = dataclasses.replace(config, seed=1)
    folder = tmp_path / "run"
    what = said_of(folder)
    with pytest.raises(Occupied):
        run_folder.open_run("sft", other)
    with overwrite.overwriting("sft", "yes"):
        # The same settings are no reason to delete anything.
        assert run_folder.open_run("sft", config).replaces is None
        assert capsys.readouterr().err == ""
        run = run_folder.open_run("sft", other)
    assert capsys.readouterr().err == f"perl-jax sft: {folder} is replaced: {what}.\n"
    # Until then a command that is refused for another reason has deleted nothing.
    assert (folder / "checkpoints" / "4").exists()
    assert not run_folder.is_finished(run, None, "cost.json")
    run_folder.clear(run)
    run_folder.begin(run)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "notes.txt", "other", "stands.json"),
    ]
    assert files.read_json(folder / "config.json")["config"]["seed"] == 1


@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("yes\n", True), ("\n", False)])
def test_a_terminal_is_asked(answer, goes, config, tmp_path, monkeypatch):
    folder, shown = tmp_path / "run", Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", shown)
    with overwrite.overwriting("sft", "ask"):
        other = dataclasses.replace(config, seed=1)
        if goes:
            assert run_folder.open_run("sft", other).replaces["seed"] == 0
        else:
            with pytest.raises(UserError, match="stays; nothing was changed"):
                run_folder.open_run("sft", other)
    assert shown.getvalue() == f"{folder} holds {said_of(folder)}. Delete it? [y/N] "


def test_without_a_terminal_yes_must_be_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with overwrite.overwriting("sft", "ask"), pytest.raises(UserError) as error:
        run_folder.open_run("sft", dataclasses.replace(config, seed=1))
    assert str(error.value) == (
        f"{tmp_path / 'run'} holds {said_of(tmp_path / 'run')}; there is no terminal to ask on "
        "whether to delete it: give --overwrite yes to delete it without a question."
    )


# Outputs.


def write_export(folder: pathlib.Path, metadata: dict[str, str]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": np.zeros(3)}, folder / "adapter_model.safetensors", metadata=metadata)


def test_what_is_an_own_output(tmp_path):
    write_export(tmp_path / "own", export.METADATA)
    write_export(tmp_path / "theirs", {"format": "pt"})
    write_export(tmp_path / "more", export.METADATA)
    (tmp_path / "more" / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    best = {"row": 0, "prompt": "a", "response": "b", "reward": 1.0}
    (tmp_path / "best.jsonl").write_text(json.dumps(best) + "\n" + json.dumps(best) + "\n")
    for name, text in {"rows.jsonl": '{"prompt": "a"}\n', "odd": "[" * 9999, "none": ""}.items():
        (tmp_path / name).write_text(text)
    found = {path.name: overwrite.described(path) for path in sorted(tmp_path.iterdir())}
    own, best = found.pop("own"), found.pop("best.jsonl")
    assert own.startswith("an export, ") and best.startswith("2 rows of best-of, ")
    assert len(found) == 6 and set(found.values()) == {None}


def test_a_folder_that_no_command_has_written_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "llama"}')
    output = new_folder(tmp_path / "mine", "config.json")
    with overwrite.overwriting("export", "yes"), pytest.raises(UserError) as error:
        output.__enter__()
    assert "is no run, no artefact, no export and no rows of best-of" in str(error.value)
    assert (tmp_path / "mine" / "config.json").exists()


def test_an_output_is_replaced_when_the_new_one_is_complete(tmp_path):
    write_export(tmp_path / "own", export.METADATA)
    with replacing(lambda path: None):
        with contextlib.suppress(ZeroDivisionError), new_folder(tmp_path / "own", "new") as built:
            (built / "new").write_text("1")
            raise ZeroDivisionError
        assert (tmp_path / "own" / "adapter_config.json").exists()
        with new_folder(tmp_path / "own", "new") as built:
            (built / "new").write_text("1")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["new"]
    with pytest.raises(Occupied, match="exists already"):
        new_folder(tmp_path / "own", "new").__enter__()
