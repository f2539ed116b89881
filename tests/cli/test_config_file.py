"""Settings from a file: a run's config.json gives the run's config again, flags go before it, and
what is wrong is one sentence with the setting's path.
"""

from __future__ import annotations

import json
import pathlib

import pytest
import yaml

from perl_jax.cli import config_file
from perl_jax.cli import main as command
from perl_jax.errors import UserError
from perl_jax.runtime import json_values

# What each command needs, with some settings of every type.
GIVEN = {
    "sft": ("--run", "r", "--model", "m", "--optimizer.learning-rate", "1e-5", "--wandb"),
    "reward": ("--run", "r", "--model", "m", "--stack-on", "a b", "--lora.targets", "q,v"),
    "dpo": ("--run", "r", "--model", "m", "--data.packing", "on", "--beta", "0.3"),
    "rl": (
        *("--run", "r", "--model", "m", "--reward", "a", "b", "--algorithm.name", "rloo"),
        *("--kl.beta", "0.1", "--mesh.fsdp", "2", "--terms", '[{"kind": "length", "maximum": 9}]'),
    ),
    "base": ("--run", "r", "--model", "m", "--width", "64"),
    "generate": ("--model", "m", "--prompt", "- a: b", "--template-date", "2024-07-27"),
    "score": ("--model", "m", "--input", "i", "--temperature", "0.5"),
    "evaluate": ("--run", "r", "--model", "m", "--policy", "p", "--reward", "a"),
    "best-of": ("--model", "m", "--output", "o", "--reward", "a", "--n", "4"),
    "plan": ("--job", "sft", "--model", "gemma2-9b", "--topology", "v5e:2x2"),
}


def config_of(name: str, *arguments: str):
    return command._config(name, command._command(name)[0], list(arguments))


@pytest.mark.parametrize("name", command.FROM_FILES)
def test_a_file_gives_the_config_that_it_was_written_from(name, tmp_path):
    config = config_of(name, *GIVEN[name])
    values = json_values.to_dict(config)
    job = {} if "job" in values else {"job": name}
    # As a run has it, and as a person may write it.
    run, own = tmp_path / "config.json", tmp_path / "own.yaml"
    run.write_text(json.dumps({"config": job | values, "environment": {}, "command": []}))
    own.write_text(yaml.safe_dump(values))
    assert config_of(name, "--config", str(run)) == config
    assert config_of(name, f"--config={own}") == config


def test_every_command_without_arguments_of_no_name_takes_a_file():
    assert sorted(GIVEN) == sorted(command.FROM_FILES)
    assert set(command.COMMANDS) - set(command.FROM_FILES) == {
        *("report", "export", "import", "average", "show"),
    }


def test_flags_go_before_the_file_and_both_before_defaults(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("run: r\nsteps: 7\nreward: [a, b]\nkl:\n  beta: 0.2\n")
    found = config_of("rl", "--config", str(file), "--model", "m", "--reward", "c", "--seed", "3")
    assert (found.run, found.model, found.reward) == ("r", "m", ("c",))
    assert (found.steps, found.seed, found.kl.beta, found.keep) == (7, 3, 0.2, 2)
    # Settings are checked together with the flags, not before them.
    file.write_text("run: r\nmodel: m\nsteps: 0\n")
    assert config_of("sft", "--steps", "5", "--config", str(file)).steps == 5
    with pytest.raises(UserError, match="steps is 0; it must be a whole number greater than 0"):
        config_of("sft", "--config", str(file))


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "run: r\nmodel: m\nseed: 010\noptimizer: {learning_rate: 1e-5, clip_norm: ~}\n"
        "data: {packing: on, template_date: 2024-07-27}\n"
    )
    found = config_of("sft", "--config", str(file))
    assert (found.seed, found.optimizer.learning_rate, found.optimizer.clip_norm) == (
        10,
        1e-5,
        None,
    )
    assert (found.data.packing, found.data.template_date) == ("on", "2024-07-27")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "{0} is not valid YAML: line 1, expected the node content, but found"),
        ("", "{0} is None; it must hold settings, by name."),
        ("- 1", "{0} is [1]; it must hold settings, by name."),
        ("steps: many", "{0}: steps is 'many'; it must be a whole number."),
        ("tensorboard: yes", "{0}: tensorboard is 'yes'; it must be true or false."),
        ("tuning: half", "{0}: tuning is 'half'; it must be one of lora, full."),
        (
            "optimizer: {learning_rate: [1]}",
            "{0}: optimizer.learning_rate is [1]; it must be a number or null.",
        ),
        (
            "optimizer: {lerning_rate: 1}",
            "{0}: optimizer.lerning_rate is no setting; did you mean optimizer.learning_rate?",
        ),
        ("batch-size: 3", "{0}: batch-size is no setting; did you mean batch_size?"),
        ("optimizer: 3", "{0}: optimizer is 3; it must hold settings, by name."),
        ("job: rl", "{0}: job is 'rl'; these are no settings of sft, which needs its own."),
        (
            "steps: 1\nsteps: 2",
            "{0}: the object that begins in line 1 has the key steps twice.",
        ),
        ("x: !!python/object:os.system 1", "{0} is not valid YAML: line 1, could not determine"),
        ("[" * 3000, "{0}: it has 3000 brackets; at most 500 are read."),
        ("- " * 3000, "{0} is not valid YAML: "),
        ("\x00", "{0} is not valid YAML: unacceptable character"),
        (b"\xff\xfe\x00", "{0} is not UTF-8 text (byte 0)."),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(text, said, tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert command.main(["sft", "--run", "r", "--model", "m", "--config", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"perl-jax sft: {said.format(file)}")
    assert printed.count("\n") == 1 and printed.endswith((".\n", "?\n"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config",), "--config needs a file: --config FILE.yaml."),
        (("--config", "--run", "r"), "--config needs a file: --config FILE.yaml."),
        (("--config", "a", "--config=b"), "--config is given 2 times; give one file."),
        (("--config", "{0}/none.yaml"), "There is no file {0}/none.yaml."),
        (("--config", "{0}"), "{0} is a folder; it must be a file."),
    ],
)
def test_a_file_that_is_not_there_is_one_sentence(arguments, said, tmp_path, capsys):
    words = [word.format(tmp_path) for word in arguments]
    assert command.main(["sft", *words]) == 2
    assert capsys.readouterr().err == f"perl-jax sft: {said.format(tmp_path)}\n"


def test_the_flag_is_taken_out_of_the_others():
    assert config_file.take(["--a", "1"]) == (None, ["--a", "1"])
    assert config_file.take(["--a", "--config", "f", "1"]) == ("f", ["--a", "1"])


def test_the_example_of_the_documentation_is_read():
    text = pathlib.Path(__file__).parents[2].joinpath("docs/quickstart.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0]
    values = yaml.load(example, config_file._Loader)
    found = config_file._unchecked("", "", command._command("sft")[0], values)
    assert found.run == "runs/my/sft" and found.optimizer.learning_rate == 2e-4
