"""`import perl_jax as pj`: rows in memory, functions as rewards, tasks and algorithms of users."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

import perl_jax as pj
from perl_jax.data.tasks import get_task
from perl_jax.hub import config_json, families, weights
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import algorithms
from perl_jax.objectives.algorithms import AlgorithmConfig, Outcomes, compute_advantages
from perl_jax.rewards.models import total_of
from perl_jax.runtime import sharding
from perl_jax.training import rl
from tests import small
from tests.golden import runs
from tests.paths import ORDERS, STORIES
from tests.xla import xla_flags

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"
DATA = pj.DataConfig(
    task=ORDERS, train_size=32, evaluation_size=16, max_prompt_length=8, max_response_length=8
)
SETTINGS = {
    "data": DATA,
    "lora": pj.LoRAConfig(rank=4, alpha=8.0),
    "optimizer": pj.OptimizerConfig(name="adamw", learning_rate=3e-3),
    "batch_size": 8,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "steps": 4,
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", one)
        yield


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is no other test's."""
    tables = (algorithms._ENTRIES, families._ENTRIES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def model(one_device, tmp_path_factory) -> pj.Model:
    return pj.load_model(runs.make_base(tmp_path_factory.mktemp("api") / "base"))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """The rows that the golden SFT run reads, by split."""
    task = get_task(ORDERS)
    return {
        split: list(task.open("demonstrations", split, DATA)) for split in ("train", "validation")
    }


def timeless(metrics: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in metrics
    ]


def test_rows_in_memory_give_the_numbers_that_a_command_gives(model, rows):
    seen: list[dict] = []
    trained = pj.train_sft(
        model,
        rows["train"],
        pj.SFTConfig(**SETTINGS),
        validation=rows["validation"],
        on_step=seen.append,
    )
    assert seen == trained.metrics and trained.folder is None
    assert runs.differences({"sft": timeless(seen)}, {"sft": runs.read_file()["sft"]}, 1e-4) == []
    assert trained.record.role == "policy" and trained.record.step == 4


def test_a_folder_makes_a_run_that_goes_on_where_it_stopped(model, rows, tmp_path):
    config = pj.SFTConfig(**SETTINGS)
    plain = pj.train_sft(model, rows["train"], config)

    def stop(row: dict) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    train = functools.partial(pj.train_sft, model, rows["train"], config, run=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(on_step=stop)
    steps: list[int] = []
    again = train(on_step=lambda row: steps.append(row["step"]))
    assert steps == [3, 4]
    assert timeless(again.metrics) == timeless(plain.metrics)
    small.assert_same(again.adapter, plain.adapter)
    # A finished run is read, not repeated.
    finished = train(on_step=lambda row: pytest.fail("trains again"))
    small.assert_same(finished.adapter, plain.adapter)
    assert finished.folder == tmp_path / "run" / "adapters" / "policy"
    other = [rows["train"][0] | {"response": "no"}, *rows["train"][1:]]
    with pytest.raises(pj.UserError, match=r"changed since .* the rows of the given rows"):
        pj.train_sft(model, other, config, run=tmp_path / "run")
    with pytest.raises(pj.UserError, match="seed was 0, is now 5"):
        pj.train_sft(
            model, rows["train"], dataclasses.replace(config, seed=5), run=tmp_path / "run"
        )


@pytest.mark.slow
def test_the_best_validated_step_is_returned_without_a_folder_too(model, tmp_path):
    task = get_task(ORDERS)
    splits = [
        list(task.open("comparisons", split, DATA)) for split in ("train", "validation", "test")
    ]
    train, validation, test = splits
    config = pj.RewardConfig(**SETTINGS | {"evaluate_every": 1})
    free = pj.train_reward(model, train, config, validation=validation, test=test)
    kept = pj.train_reward(
        model, train, config, validation=validation, test=test, run=tmp_path / "run"
    )
    small.assert_same(free.adapter, kept.adapter)
    assert free.record == kept.record and free.evaluation == kept.evaluation
    values = [row["validation/accuracy"] for row in free.metrics]
    assert free.record.step == 1 + int(np.argmax(values))


@pytest.mark.slow
def test_rl_is_paid_by_functions_and_models_by_their_weights(model):
    prompts = list(get_task(ORDERS).open("prompts", "train", DATA))
    pairs = list(get_task(ORDERS).open("comparisons", "train", DATA))
    judge = pj.train_reward(model, pairs, pj.RewardConfig(**SETTINGS))
    asked = []

    def length(prompts, responses):
        return [float(len(response.split())) for response in responses]

    def seen(prompts, responses, rows):
        asked.extend(zip(prompts, (row["mark"] for row in rows), strict=True))
        return np.ones(len(responses))

    marked = [row | {"mark": number} for number, row in enumerate(prompts)]
    tuned = pj.train_rl(
        model,
        marked,
        pj.RLConfig(algorithm="rloo", **SETTINGS),
        rewards=[
            judge.reward(weight=0.25),
            judge.reward(weight=-0.25),
            pj.reward(length, weight=0.5),
            seen,
        ],
    )
    for row in tuned.metrics:
        # The two judges cancel each other.
        assert row["reward/score"] == pytest.approx(0.5 * row["reward/term/length"] + 1, abs=1e-5)
    assert asked and all(marked[mark]["prompt"] == prompt for prompt, mark in asked)
    assert tuned.record.role == "policy" and not tuned.others


def test_a_run_knows_a_reward_again_by_its_source():
    """Two imports of one file are as two processes: their code objects lie at other addresses."""
    load = lambda name: runpy.run_path(str(EXAMPLES / "custom_reward.py"))[name]
    found = [
        rl._depends_on(None, total_of([pj.reward(load("brevity"), weight=weight)]))
        for weight in (1.0, 1.0, 2.0)
    ]
    assert found[0] == found[1] != found[2]
    assert "1 for a response of at most" in found[0]["the reward brevity"][0]

    def brevity(prompts, responses):
        return [0.0 for _ in responses]

    assert rl._depends_on(None, total_of([brevity])) != found[0]


def test_an_algorithm_from_outside_the_package_has_its_own_advantages():
    pj.register_algorithm(
        "twice-the-return",
        pj.Algorithm(lambda return_PG: 2 * return_PG, "token", "sequence-mean", "loss"),
    )
    config = AlgorithmConfig("twice-the-return")
    mask_BT = np.array([[False, True, True], [False, True, False]] * 2)
    return_B = np.float32([1.0, -2.0, 3.0, 0.5])
    found, target = compute_advantages(config, Outcomes(return_B, None, mask_BT))
    np.testing.assert_array_equal(found, np.where(mask_BT, 2 * return_B[:, None], 0))
    assert target is None and config.group == 4
    with pytest.raises(pj.UserError, match="There is another algorithm 'rloo'"):
        pj.register_algorithm("rloo", pj.Algorithm("group", "token", "token", "loss"))
    with pytest.raises(pj.UserError, match="ratio is 'row'; it must be one of None, token"):
        pj.register_algorithm("mine", pj.Algorithm("group", "row", "token", "loss"))


def test_a_task_in_a_file_gives_checked_rows():
    task = get_task(f"{EXAMPLES / 'custom_task.py'}:SUMS")
    options = pj.DataConfig(train_size=3)
    train = task.open("demonstrations", "train", options)
    assert [row["prompt"] for row in train] == ["0 + 0 =", "0 + 1 =", "0 + 2 ="]
    assert train[1] == {"prompt": "0 + 1 =", "response": " 1", "group": ""}
    assert task.open("prompts", "test", options)[-1] == {"prompt": "29 + 9 =", "answer": "38"}
    assert task.gold(["2 + 3 =", "2 + 4 ="], [" 5", " 5"]).tolist() == [1.0, 0.0]
    assert task.content("prompts", options) != task.content("demonstrations", options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("{0}/absent.py:TASK", "", r"there is no file .*absent\.py"),
        ("{0}/task.py:TASK", "SUMS = 3", r"has no perl_jax\.Task that is called TASK"),
        ("{0}/task.py:TASK", "1 / 0", r"importing .*task\.py failed: ZeroDivisionError"),
        ("no_such_module:TASK", "", r"importing no_such_module failed: ModuleNotFoundError"),
        ("sums", "", r"it must be jsonl, or PATH\.py:NAME or MODULE:NAME for a task outside"),
    ],
)
def test_a_task_that_cannot_be_opened_is_a_sentence(name, content, message, tmp_path):
    (tmp_path / "task.py").write_text(content)
    with pytest.raises(pj.UserError, match=message):
        get_task(name.format(tmp_path))


def test_rows_of_a_task_are_checked_like_lines_of_a_file():
    rows = lambda kind, split, options: [{"prompt": "a", "response": "b"}, {"prompt": "c"}]
    task = pj.Task("mine", rows, {"demonstrations": ("train",)})
    with pytest.raises(
        pj.UserError,
        match="mine, row 2 of the demonstrations in the train split: the field response is missing",
    ):
        task.open("demonstrations", "train", DATA)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pj.train_sft(m, []), "There are no demonstrations rows to train on"),
        (
            lambda m: pj.train_sft(m, [{"prompt": "a", "response": ""}]),
            "Row 1 of the train rows: the field response is empty",
        ),
        (
            lambda m: pj.train_rl(m, [{"prompt": "a"}], rewards=[]),
            r"There is no reward: give rewards=\[\.\.\.\], of reward models, their folders, or "
            r"terms\.",
        ),
        (
            lambda m: pj.train_rl(m, [{"prompt": "a"}], rewards=[3]),
            "reward is given 3; it must be a function",
        ),
        (lambda m: pj.generate(m, None, "text"), "prompts is one text; give a list of texts"),
        (lambda m: pj.load_model("-", dtpye="float32"), "load_model has no option dtpye"),
        (
            lambda m: pj.train_sft(
                m,
                [{"prompt": "a", "response": "b"}] * 8,
                pj.SFTConfig(profile="1", batch_size=8, data=DATA),
            ),
            "profile is '1', which is written into a run's folder; give run",
        ),
    ],
)
def test_what_a_caller_gets_wrong_is_a_sentence(model, call, message):
    with pytest.raises(pj.UserError, match=message):
        call(model)


def test_importing_the_package_is_quick_and_every_public_name_is_there():
    code = (
        "import sys, perl_jax; print(sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(pj, name) is not None for name in pj.__all__)
    assert list(pj._HOMES) == sorted(pj._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = pj.train


def test_type_checkers_find_the_public_names_where_the_loader_does():
    package = ast.parse(pathlib.Path(pj.__file__).read_text())
    (block,) = (node for node in package.body if isinstance(node, ast.If))
    shown = {
        name.asname: node.module.removeprefix("perl_jax.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert shown == pj._HOMES


@pytest.mark.slow
@pytest.mark.skipif(STORIES is None, reason="the tiny real model is not there")
def test_the_example_runs_from_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "library.py"), str(STORIES)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        # As a newcomer's machine has it: one device.
        env={**os.environ, "XLA_FLAGS": xla_flags(1)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0].isdigit()] == ["1", "2", "3", "4", "5"]
    assert (tmp_path / "tuned_adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["library", "custom_reward", "custom_task", "custom_algorithm", "custom_family"]
)
def test_the_examples_are_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 30, len(lines)


@pytest.mark.slow
def test_a_family_from_outside_the_package_has_the_logits_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Qwen2 is a Llama with these biases.
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    twin = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, leaf in twin.named_parameters():
            if name.endswith("bias"):
                leaf.normal_()
    twin.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    fields = (*SHAPE, "num_key_value_heads", "max_position_embeddings", "hidden_act")
    small_values = {name: values[name] for name in fields} | {"model_type": "house_llama"}
    (tmp_path / "config.json").write_text(json.dumps(small_values))
    with pytest.raises(pj.UserError, match="model_type 'house_llama'; supported: llama, mistral"):
        config_json.read_config(tmp_path)
    runpy.run_path(str(EXAMPLES / "custom_family.py"))
    read = config_json.read_config(tmp_path)
    assert read.biases == ("q", "k", "v")
    tokens = small.make_tokens()
    found = small.logits(LanguageModel(read), weights.load_base(tmp_path, read), None, tokens)
    expected = small.torch_logits(twin, tokens)
    np.testing.assert_allclose(
        np.asarray(found)[tokens.valid_BT], expected[tokens.valid_BT], rtol=1e-4, atol=1e-4
    )
