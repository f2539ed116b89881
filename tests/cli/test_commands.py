"""The command line: exit statuses, one-sentence errors, and a help text for every flag."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import typing

import pytest

import perl_jax
from perl_jax.cli import main as command
from perl_jax.cli.help import FIRST, GROUPS, description
from perl_jax.errors import TrainingError
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.tokenizer import word_tokenizer
from perl_jax.runs.metrics import read_metrics
from tests import small
from tests.paths import ORDERS

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ["good", "bad", "fine", "tea", "coffee", "please", "yes", "no", "thanks"]
JOBS = list(command.COMMANDS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> pathlib.Path:
    """A random decoder with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("model")
    lm = small.changed(layers=1, width=16, ffn_width=24)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save(folder)
    hf_checkpoint.save_base(folder, lm.config, small.make_base(lm), tokenizer.token_ids())
    return folder


def failure(capsys, *arguments: str) -> tuple[int, str]:
    """Status and what was printed on standard error; standard output stays empty."""
    status = command.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    return status, printed.err


def assert_one_sentence(text: str, job: str) -> None:
    assert text.startswith(f"perl-jax {job}: ") and text.endswith(".\n") and text.count("\n") == 1
    assert "Traceback" not in text


# Statuses.


def test_no_command_prints_the_commands(capsys):
    assert command.main([]) == 2
    assert command.main(["--help"]) == 0 and command.main(["-h"]) == 0
    usage = capsys.readouterr().out
    for name, text in command.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", usage, re.MULTILINE)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_printed(flag, capsys):
    assert command.main([flag]) == command.main(["sft", flag]) == 0
    assert capsys.readouterr().out == 2 * f"perl-jax {perl_jax.__version__}\n"


def test_unknown_command(capsys):
    status, error = failure(capsys, "train", "--run", "x")
    assert status == 2 and error.count("\n") == 1
    assert error.startswith(
        "perl-jax: there is no command 'train'; commands: sft, reward, rl, dpo, best-of, evaluate,"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--run", "r", "--model", "m", "--lerning-rate", "1"], "--lerning-rate"),
        (["sft", "--run", "r"], "--model"),
        (["sft", "--run", "r", "--model", "m", "--steps", "many"], "many"),
        (["sft", "--run", "r", "--model", "m", "--tuning", "half"], "half"),
        (["report"], "run"),
    ],
)
def test_wrong_flags_have_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.out + printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sft", "--run", "r", "--model", "m", "--steps", "0"],
            "steps is 0; it must be a whole number greater than 0.",
        ),
        (
            ["sft", "--run", "r", "--model", "m", "--batch-size", "6", "--microbatches", "4"],
            "microbatches is 4; it must divide batch_size, 6.",
        ),
        (
            ["sft", "--run", "r", "--model", "m", "--lora.targets", "q,x"],
            "lora.targets is 'q,x'; it must be attention, all-linear, or names",
        ),
        (
            ["rl", "--run", "r", "--model", "m", "--reward", "w", "--kl.beta", "2"],
            "kl.beta is 2.0; it must lie in [0, 1).",
        ),
        (
            ["base", "--run", "r", "--model", "m", "--width", "30"],
            "width is 30; it must be a multiple of heads, 4.",
        ),
        (
            ["score", "--model", "m", "--input", "i", "--temperature", "0"],
            "temperature is 0.0; it must be a finite number greater than 0.",
        ),
    ],
)
def test_wrong_values_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    # One plain line, not a box of the flags' library.
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_has_status_1(capsys, monkeypatch):
    def fail(config):
        raise TrainingError("Step 3 gave NaN or infinity.")

    monkeypatch.setattr(command, "_report", fail)
    assert failure(capsys, "report", "x") == (1, "perl-jax report: Step 3 gave NaN or infinity.\n")


def test_ctrl_c_has_status_130(capsys, monkeypatch):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_report", stop)
    assert failure(capsys, "report", "x") == (130, "perl-jax report: stopped by Ctrl-C.\n")
    monkeypatch.setitem(command.GROUPS, "Train", ("report",))
    assert failure(capsys, "report", "x") == (
        130,
        "perl-jax report: stopped by Ctrl-C; the same command resumes from the last checkpoint, "
        "if there is one.\n",
    )


# Blocks the main thread in C for minutes, where no handler of Python's runs.
BLOCKED = """
import hashlib, os, signal, sys, threading
from perl_jax.cli import interrupts, start
from perl_jax.cli import main as command
from perl_jax.runtime import hosts

interrupts.GRACE = 0.2

def block(config):
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with hosts.Termination():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

command._report = block
sys.argv[1:] = ["report", "x"]
sys.exit(start.start())
"""


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_loop_that_does_not_return_to_python():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        "perl-jax report: finishing and saving this step; Ctrl-C again ends at once.\n"
        "perl-jax report: stopped by Ctrl-C.\n"
    )


# Folders and files.


def test_folders_that_hold_no_model(capsys, tmp_path):
    empty, odd, torn = (tmp_path / name for name in ("empty", "odd", "torn"))
    for folder in (empty, odd, torn):
        folder.mkdir()
    (odd / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    (torn / "config.json").write_text("{")
    for folder in (empty, odd, torn, tmp_path / "nowhere"):
        for job, more in (
            ("sft", ("--run", tmp_path / "run", "--data.task", ORDERS)),
            ("generate", ("--prompt", "hello")),
        ):
            status, error = failure(capsys, job, "--model", folder, *more)
            assert status == 2 and str(folder) in error, error
            assert_one_sentence(error, job)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "tea"}', "line 2: the field response is missing;"),
        (
            '{"prompt": 3, "response": "yes"}',
            "line 2: the field prompt is a number; it must be a string.",
        ),
        ('{"prompt": "", "response": "yes"}', "line 2: the field prompt is empty."),
        ('{"prompt": "tea", "response": "yes"', "line 2: not valid JSON"),
        ("[1, 2]", "line 2: must be a JSON object with prompt, response."),
    ],
)
def test_bad_rows_are_named_by_file_line_and_field(line, message, model_folder, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "tea", "response": "yes"}\n' + line + "\n")
    status, error = failure(capsys, "score", "--model", model_folder, "--input", path)
    assert status == 2 and f"{path}, {message}" in error
    assert_one_sentence(error, "score")
    # The same rows as a task to train on.
    data = (
        "--data.task",
        "jsonl",
        "--data.data-dir",
        path,
        "--data.max-prompt-length",
        8,
        "--data.max-response-length",
        8,
    )
    status, error = failure(
        capsys, "sft", "--run", tmp_path / "run", "--model", model_folder, *data
    )
    assert status == 2 and f"{path}, {message}" in error
    assert_one_sentence(error, "sft")
    assert not (tmp_path / "run").exists()


def test_files_and_folders_that_are_missing(model_folder, capsys, tmp_path):
    gone = tmp_path / "gone"
    common = (
        "--run",
        tmp_path / "run",
        "--model",
        model_folder,
        "--data.max-prompt-length",
        8,
        "--data.max-response-length",
        8,
    )
    for arguments in (
        ("score", "--model", model_folder, "--input", gone),
        ("report", gone),
        ("rl", *common, "--data.task", ORDERS, "--reward", gone),
        ("generate", "--model", model_folder, "--adapter", gone, "--prompt", "tea"),
        ("sft", *common, "--data.task", "jsonl", "--data.data-dir", gone),
    ):
        status, error = failure(capsys, *arguments)
        assert status == 2 and str(gone) in error, error
        assert_one_sentence(error, arguments[0])
        assert not (tmp_path / "run").exists()


def test_a_job_on_rows_of_ones_own(model_folder, capsys, tmp_path, monkeypatch):
    # From the command line to an artefact, and a page.
    # Splits share no prompt, of which the job would speak.
    for place, split in enumerate(("train", "validation", "test")):
        lines = [
            json.dumps({"prompt": f"{WORDS[3 * place + i % 3]} tea", "response": "yes please"})
            for i in range(8)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    sizes = (
        "--data.max-prompt-length",
        8,
        "--data.max-response-length",
        8,
        "--batch-size",
        8,
        "--steps",
        2,
    )
    arguments = (
        "sft",
        "--run",
        run,
        "--model",
        model_folder,
        "--data.task",
        "jsonl",
        "--data.data-dir",
        tmp_path,
        *sizes,
    )
    assert command.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith(f"policy: {run / 'adapters' / 'policy'}\n")
    assert (run / "adapters" / "policy" / "artefact.json").exists() and len(
        read_metrics(run / "metrics.jsonl")
    ) == 2
    assert command.main(["report", str(run)]) == 0 and (run / "report.html").exists()


@pytest.mark.parametrize("name", JOBS)
def test_rows_without_a_task_are_those_of_a_file(name):
    hints = typing.get_type_hints(command._command(name)[0])
    assert "data" not in hints or hints["data"]().task == "jsonl"


# Help.

POSITIONAL = {
    "report": "run",
    "export": "adapter",
    "import": "peft",
    "average": "adapters",
    "show": "adapter",
}


def flags_of(config: type, prefix: str = "") -> list[str]:
    """Every flag that a config's fields become, nested ones with their group's name."""
    hints, names = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        name = prefix + field.name.replace("_", "-")
        hint = hints[field.name]
        names += flags_of(hint, name + ".") if dataclasses.is_dataclass(hint) else [name]
    return names


def help_of(name: str, capsys, monkeypatch) -> dict[str, str]:
    """The text beside each flag (or positional argument), without its default."""
    # Narrow enough for one column of flags.
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    texts, flag = {}, None
    for line in capsys.readouterr().out.splitlines():
        line = re.sub("[\u2500-\u257f]", " ", line).strip()
        start = re.match(
            r"(?:--)?(\S+?)(?:, --\S*no-\S+)?"
            r"(?: (?:STR|INT|FLOAT|\[STR \[STR \.\.\.\]\]|\{\S+|\{.*\}))?(?:  +(.*)|$)",
            line,
        )
        if not line or line.startswith("-----"):
            flag = None
        elif line.startswith(("STR ", "[[STR ")):
            flag = "positional"
            texts[flag] = line.partition("  ")[2]
        elif line.startswith("--") and start:
            flag = start[1]
            texts[flag] = start[2] or ""
        elif flag is not None:
            texts[flag] += " " + line
    return {
        flag: re.sub(r"\((default: .*|required)\)$", "", " ".join(text.split())).strip()
        for flag, text in texts.items()
    }


@pytest.mark.parametrize("name", JOBS)
def test_every_flag_is_explained(name, capsys, monkeypatch):
    texts = help_of(name, capsys, monkeypatch)
    flags = [
        "positional" if flag == POSITIONAL.get(name) else flag
        for flag in flags_of(command._command(name)[0])
    ]
    assert len(flags) == len(set(flags))
    for flag in flags:
        # A sentence, not a repetition of the name.
        assert len(texts[flag].split()) >= 2 and texts[flag].endswith("."), (
            f"{flag}: {texts[flag]!r}"
        )


@pytest.mark.parametrize("name", FIRST)
def test_the_flags_that_most_runs_need_come_first_and_exist(name):
    assert 1 <= len(FIRST[name]) <= 12
    assert {flag.removeprefix("--") for flag in FIRST[name]} <= set(
        flags_of(command._command(name)[0])
    )
    text = description(name, "What it does.")
    assert text.startswith("What it does.\n\nMost runs need no more than\n  --")
    assert "--config" not in text and "  --config  a YAML" in description(name, "", ["--config"])


def test_every_command_is_in_one_group_of_the_help(capsys):
    assert sorted(sum(GROUPS.values(), ())) == sorted(command.COMMANDS)
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in command.COMMANDS)
