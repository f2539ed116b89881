"""Runs: resumed, refused, stopped, left alone; the best step; compilations that do not grow."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.cli import overwrite
from perl_jax.errors import TrainingError, UserError
from perl_jax.evaluation import compare
from perl_jax.generation.config import RolloutConfig
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.runs import metrics as metrics_lib
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import programs, sharding, trees
from perl_jax.training import base as base_lib
from perl_jax.training import commands, loop, reward
from perl_jax.training.commands import DPOCommand, RLCommand, SFTCommand
from perl_jax.training.optimizers import OptimizerConfig
from perl_jax.training.rl_config import KLConfig
from tests import small
from tests.training import tiny


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ends the loop in the middle of a step: trained, but with neither its metrics nor a
    checkpoint.
    """
    check = loop.check_finite

    def interrupted(folder, at, metrics):
        if at == step:
            raise Interrupted
        check(folder, at, metrics)

    patch.setattr(loop, "check_finite", interrupted)


def saved_state(run: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every leaf of a run's newest checkpoint (roles, moments, key, step) as it was written."""
    newest = (
        max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        if step is None
        else run / "checkpoints" / str(step)
    )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((newest / "state").absolute()).item_metadata.tree
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )
        return {
            name: np.asarray(leaf)
            for name, leaf in trees.named_leaves(
                checkpointer.restore((newest / "state").absolute(), abstract)
            ).items()
        }


def assert_same_runs(
    left: pathlib.Path, right: pathlib.Path, roles: tuple[str, ...], model
) -> None:
    """Artefacts, optimizer state, keys and metrics, bit for bit."""
    for role in roles:
        small.assert_same(*(tiny.load(run / "adapters" / role, model)[0] for run in (left, right)))
    small.assert_same(saved_state(left), saved_state(right))
    assert tiny.timeless(left) == tiny.timeless(right)


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


# Resuming. Dropout, a schedule and two microbatches, so that a lost key or count would show.

HARD = {
    "lora": LoRAConfig(rank=5, dropout=0.2),
    "optimizer": OptimizerConfig(
        name="adamw", learning_rate=3e-3, schedule="linear", warmup_steps=2
    ),
    "microbatches": 2,
    "steps": 6,
}


@pytest.mark.parametrize(
    "job",
    [
        pytest.param("sft", marks=pytest.mark.slow),
        pytest.param("reward", marks=pytest.mark.slow),
        "rl",
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(job, jobs, model, tmp_path, monkeypatch):
    def start(folder: pathlib.Path) -> pathlib.Path:
        if job == "sft":
            return commands.run_sft(tiny.sft_config(folder, jobs.base, **HARD))
        if job == "reward":
            return commands.run_reward(tiny.reward_config(folder, jobs.base, **HARD))
        # From a fresh adapter: one that goes on from an artefact has the artefact's dropout.
        return commands.run_rl(
            tiny.rl_config(folder, jobs.base, None, jobs.reward, max_mismatch=10.0, **HARD)
        )

    artefact = start(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            start(tmp_path / "parts")
    # Step 3 was written after the checkpoint of step 2; it is made again.
    assert [row["step"] for row in tiny.rows(tmp_path / "parts")] == [1, 2, 3]
    assert start(tmp_path / "parts") == tmp_path / "parts" / "adapters" / artefact.name
    assert_same_runs(
        tmp_path / "whole",
        tmp_path / "parts",
        ("policy", "value") if job == "rl" else (artefact.name,),
        model,
    )


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_starts_again(base, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            commands.run_sft(tiny.sft_config(tmp_path / "a", base))
    commands.run_sft(tiny.sft_config(tmp_path / "a", base))
    assert [row["step"] for row in tiny.rows(tmp_path / "a")] == [1, 2, 3, 4]
    assert (tmp_path / "a" / "metrics.previous.jsonl").exists()


def test_a_run_resumes_with_the_same_settings_only(base, tmp_path):
    config = tiny.sft_config(tmp_path, base, steps=2)
    commands.run_sft(config)
    other = dataclasses.replace(
        config, seed=3, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5)
    )
    with pytest.raises(UserError) as error:
        commands.run_sft(other)
    message = str(error.value)
    assert (
        str(tmp_path) in message
        and "optimizer.learning_rate was 0.003, is now 0.5" in message
        and "seed was 0, is now 3" in message
    )
    with pytest.raises(UserError, match="job was 'sft', is now 'reward'"):
        commands.run_reward(tiny.reward_config(tmp_path, base, steps=2))
    # How often to save is no part of what is computed.
    commands.run_sft(dataclasses.replace(config, checkpoint_every=7, keep=9))


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(jobs, base, model, tmp_path, capsys):
    """The longer run is that of as many steps from the start, its artefact and evaluation too."""
    config = tiny.reward_config(tmp_path / "whole", base, steps=6)
    commands.run_reward(config)
    parts = dataclasses.replace(config, run=str(tmp_path / "parts"), steps=4)
    commands.run_reward(parts)
    capsys.readouterr()
    longer = dataclasses.replace(parts, steps=6)
    assert commands.run_reward(longer) == tmp_path / "parts" / "adapters" / "reward"
    assert "steps was 4, is now 6; the run goes on from step 4.\n" in capsys.readouterr().err
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", ("reward",), model)
    for name in ("evaluation.json", "scores.json"):
        assert tiny.read(tmp_path / "whole" / name) == tiny.read(tmp_path / "parts" / name)
    before = tiny.snapshot(tmp_path / "parts")
    commands.run_reward(longer)
    assert tiny.snapshot(tmp_path / "parts") == before
    with pytest.raises(UserError, match="has done 6 steps; steps is 4: give --steps 6 or more"):
        commands.run_reward(parts)


@pytest.mark.slow
def test_a_run_with_other_settings_is_replaced(base, model, tmp_path, capsys):
    config = tiny.sft_config(tmp_path / "run", base)
    commands.run_sft(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    other = dataclasses.replace(config, seed=1, steps=2)
    commands.run_sft(dataclasses.replace(other, run=str(tmp_path / "whole")))
    capsys.readouterr()
    with overwrite.overwriting("sft", "yes"):
        # Refused for another reason: what is there stays.
        with pytest.raises(UserError, match="fewer than batch_size"):
            commands.run_sft(dataclasses.replace(other, batch_size=64))
        assert len(tiny.rows(tmp_path / "run")) == 4
        commands.run_sft(other)
        assert "4 of 4 steps" in capsys.readouterr().err
        before = tiny.snapshot(tmp_path / "run")
        commands.run_sft(other)
    assert_same_runs(tmp_path / "whole", tmp_path / "run", ("policy",), model)
    assert tiny.snapshot(tmp_path / "run") == before
    assert not (tmp_path / "run" / "metrics.previous.jsonl").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_base_goes_on_and_is_replaced_with_its_model(tmp_path):
    train = base_lib.train_base
    weights = lambda name: (tmp_path / name / "model.safetensors").read_bytes()
    train(tiny.base_config(tmp_path / "whole", tmp_path / "one", steps=4))
    parts = tiny.base_config(tmp_path / "parts", tmp_path / "two", steps=2)
    train(parts)
    longer = dataclasses.replace(parts, steps=4)
    train(longer)
    small.assert_same(saved_state(tmp_path / "whole"), saved_state(tmp_path / "parts"))
    assert weights("one") == weights("two")
    before = tiny.snapshot(tmp_path)
    train(longer)
    assert tiny.snapshot(tmp_path) == before
    other = dataclasses.replace(longer, seed=3)
    with overwrite.overwriting("base", "yes"):
        with pytest.raises(UserError, match="already holds a model that this run did not train"):
            train(dataclasses.replace(other, model=str(tmp_path / "one")))
        train(other)
    assert weights("one") != weights("two")


def test_finished_runs_are_left_as_they_are(jobs, monkeypatch):
    before = tiny.snapshot(jobs.root)
    # Nothing is even loaded.
    for module in (commands, compare):
        monkeypatch.setattr(module, "load_model", None)
    again = tiny.run_jobs(jobs.root, jobs.base, "lora")
    assert again == jobs and tiny.snapshot(jobs.root) == before


def test_a_finished_base_is_left_as_it_is(base):
    folder = pathlib.Path(base).parent
    before = tiny.snapshot(folder)
    assert str(base_lib.train_base(tiny.base_config(folder / "run", folder / "model"))) == base
    assert tiny.snapshot(folder) == before


# The best step.


def test_the_best_validation_step_is_kept(base, model, tmp_path, monkeypatch):
    accuracies, seen = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.1}, {}

    def validate(model, measure, state, batches, labels):
        step = int(state.step)
        seen[step] = jax.tree.map(np.array, state.roles["reward"])
        return {"validation/accuracy": accuracies[step]}

    monkeypatch.setitem(
        reward.REWARD, "pairwise", dataclasses.replace(reward.REWARD["pairwise"], validate=validate)
    )
    config = tiny.reward_config(
        tmp_path, base, steps=6, evaluate_every=1, checkpoint_every=3, keep=1
    )
    with monkeypatch.context() as patch:
        # Interrupted after the peak: what came before the checkpoint counts.
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            commands.run_reward(config)
    artefact = commands.run_reward(config)
    adapter, record = tiny.load(artefact, model)
    assert record.step == 2 and sorted(seen) == [1, 2, 3, 4, 5, 6]
    small.assert_same(jax.tree.map(np.asarray, adapter), seen[2])
    assert np.any(seen[6].head["kernel"] != seen[2].head["kernel"])
    # The best one and the last one are on disk, and the best one is that step's.
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "6"]
    np.testing.assert_array_equal(
        saved_state(tmp_path, 2)["roles/reward/head/kernel"], seen[2].head["kernel"]
    )


# Compilations.


@pytest.fixture
def compiled(monkeypatch) -> list[programs.Program]:
    """Every program made from here on."""
    made = []
    create = programs.Program.__init__

    def remember(self, *arguments, **named):
        create(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(programs.Program, "__init__", remember)
    return made


def lengths_and_compilations(
    patch: pytest.MonkeyPatch, compiled: list[programs.Program]
) -> list[tuple[int, int]]:
    """Filled as a job runs: the padded length of each batch and what the steps had compiled after
    it.
    """
    history, lengths = [], []
    put, write = sharding.put_batch, metrics_lib.MetricsWriter.write

    def putting(batch, mesh):
        lengths.append(jax.tree.leaves(batch)[0].shape[1])
        return put(batch, mesh)

    def writing(self, step, row):
        # The first state is made once, before any step.
        history.append(
            (
                lengths[-1],
                sum(program.compilations for program in compiled if program.name != "begin"),
            )
        )
        write(self, step, row)

    patch.setattr(sharding, "put_batch", putting)
    patch.setattr(metrics_lib.MetricsWriter, "write", writing)
    return history


def check_growth(history: list[tuple[int, int]], programs_a_length: int) -> None:
    """Checks that each new padded length compiles `programs_a_length` programs, and that a length
    that was seen before compiles none.
    """
    seen = set()
    for length, count in history:
        seen.add(length)
        assert count == programs_a_length * len(seen)
    assert 1 < len(seen) <= 4 and len(history) >= 3 * len(seen)


def test_sft_compiles_once_a_bucket(base, tmp_path, compiled, monkeypatch):
    data = dataclasses.replace(
        tiny.DATA, train_size=40, max_prompt_length=32, max_response_length=8, packing="off"
    )
    history = lengths_and_compilations(monkeypatch, compiled)
    commands.run_sft(
        tiny.sft_config(tmp_path, base, data=data, steps=15, evaluate_every=100, batch_size=4)
    )
    # The last row comes after the validation, which compiles for itself.
    check_growth(history[:-1], 1)
    assert all(program.compilations <= 4 for program in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_200_steps_of_ragged_packed_rows_compile_no_more_than_the_first_few(
    kind, base, tmp_path, compiled, monkeypatch
):
    data = dataclasses.replace(
        tiny.DATA, train_size=80, max_prompt_length=40, max_response_length=16, packing="on"
    )
    history = lengths_and_compilations(monkeypatch, compiled)
    config = {"sft": tiny.sft_config, "reward": tiny.reward_config}[kind](
        tmp_path, base, data=data, steps=200, evaluate_every=200, checkpoint_every=200
    )
    {"sft": commands.run_sft, "reward": commands.run_reward}[kind](config)
    # Each padded length as it is and in one size, most of which three epochs have met.
    lengths, counts = zip(*history[:-1], strict=True)
    assert (
        len(set(lengths)) > 1 and counts[-1] <= 2 * len(set(lengths)) and counts[-1] == counts[100]
    )


@pytest.mark.slow
def test_rl_compiles_each_program_once_a_bucket(jobs, tmp_path, compiled, monkeypatch):
    data = dataclasses.replace(tiny.DATA, max_prompt_length=32, max_response_length=4)
    history = lengths_and_compilations(monkeypatch, compiled)
    commands.run_rl(
        tiny.rl_config(
            tmp_path, jobs.base, jobs.policy, jobs.reward, data=data, steps=12, batch_size=4
        )
    )
    check_growth(history, 5)
    assert tiny.read(tmp_path / "cost.json")["compilations"] == history[-1][1]


# Stopping.


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(base, tmp_path):
    config = tiny.sft_config(
        tmp_path, base, checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=1e30)
    )
    for _ in range(2):
        # Step 1 moves the weights out of sight, step 2 shows it; and so it does again.
        with pytest.raises(TrainingError) as error:
            commands.run_sft(config)
        message = str(error.value)
        assert (
            message.startswith("Step 2 gave NaN or infinity (")
            and str(tmp_path / "checkpoints") in message
        )
        assert "train/loss" in message and "lower learning rate" in message
        assert not (tmp_path / "adapters").exists() and not (tmp_path / "cost.json").exists()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [1]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == 1
    checkpoints.close()
    leaves = saved_state(tmp_path)
    assert leaves["step"] == 1 and all(np.isfinite(leaf).all() for leaf in leaves.values())


# Refusals.


@pytest.fixture(scope="module")
def other_base(model, tmp_path_factory) -> str:
    """A base of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other") / "sibling"
    folder.mkdir()
    model.tokenizer.save(folder)
    weights = jax.tree.map(lambda leaf: 1.1 * leaf, model.base)
    hf_checkpoint.save_base(
        folder, dataclasses.replace(model.lm.config, unroll=1), weights, model.tokenizer.token_ids()
    )
    return str(folder)


def test_another_base_is_refused_by_name(jobs, other_base, tmp_path):
    with pytest.raises(UserError) as error:
        commands.run_rl(tiny.rl_config(tmp_path / "a", other_base, jobs.policy, jobs.reward))
    message = str(error.value)
    assert (
        f"{jobs.policy} was trained on the base {jobs.base}" in message
        and f"not on {other_base}" in message
    )
    with pytest.raises(UserError, match="was trained on the base"):
        compare.run_evaluate(
            tiny.evaluate_config(
                tmp_path / "b", other_base, policy=str(jobs.policy), reward=(str(jobs.reward),)
            )
        )


def test_roles_are_not_mistaken_for_each_other(jobs, tmp_path, monkeypatch):
    # The records say it, before the base is loaded.
    monkeypatch.setattr(commands, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="holds a policy adapter; a reward adapter is needed here"):
        commands.run_rl(tiny.rl_config(tmp_path / "a", jobs.base, jobs.policy, jobs.policy))
    with pytest.raises(UserError, match="holds a value adapter; a policy adapter is needed here"):
        commands.run_rl(
            tiny.rl_config(tmp_path / "b", jobs.base, jobs.tuned.with_name("value"), jobs.reward)
        )
    with pytest.raises(UserError, match=r"is not an artefact: there is no artefact\.json in it"):
        commands.run_rl(tiny.rl_config(tmp_path / "c", jobs.base, tmp_path, jobs.reward))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data": dataclasses.replace(tiny.DATA, max_prompt_length=4000)},
            "max_prompt_length + max_response_length is 4008;",
        ),
        (
            {"data": dataclasses.replace(tiny.DATA, task="chess")},
            "task is 'chess'; it must be jsonl, or PATH",
        ),
        (
            {"data": dataclasses.replace(tiny.DATA, train_size=5)},
            "There are 5 demonstrations rows, fewer than batch_size, which is 8.",
        ),
        ({"stack_on": "nowhere"}, "nowhere is not an artefact: there is no artefact.json in it"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    base, tmp_path, fields, message, monkeypatch
):
    monkeypatch.setattr(hf_checkpoint, "load_base", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(UserError) as error:
        commands.run_sft(tiny.sft_config(tmp_path / "run", base, **fields))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number greater than 0."),
        ({"tuning": "half"}, "tuning is 'half'; it must be one of lora, full."),
        ({"microbatches": 3}, "microbatches is 3; it must divide batch_size, 8."),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of float32, bfloat16."),
        ({"seed": -1}, "seed is -1; a seed is 0 to 9223372036854775807."),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        SFTCommand(**{"run": "r", "model": "m", "batch_size": 8, **fields})
    assert message in str(error.value)


CRITICLESS = ("reinforce-mean", "rloo", "remax", "grpo", "dr-grpo", "gspo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: {"kl": KLConfig(beta=1.0)}, "kl.beta is 1.0; it must lie in [0, 1)."),
        (
            lambda: {"kl": KLConfig(reference="none")},
            "kl.reference is none; kl.beta must be 0 then, it is 0.05",
        ),
        (
            lambda: {"kl": KLConfig(reference="base", refresh=2)},
            "kl.refresh needs kl.reference start, it is 'base'",
        ),
        (
            lambda: {"kl": KLConfig(place="loss", estimator="k1")},
            "kl.estimator is 'k1'; in the loss it must be k2 or k3.",
        ),
        (
            lambda: {"kl": KLConfig(estimator="k3")},
            "kl.estimator is 'k3'; in the reward it must be k1.",
        ),
        (
            lambda: {
                "kl": KLConfig(estimator="k2", place="reward"),
                "algorithm": AlgorithmConfig("grpo"),
            },
            "kl.estimator is 'k2'; in the reward it must be k1.",
        ),
        (
            lambda: {"kl": KLConfig(target=6.0, horizon=1)},
            "kl.horizon is 1 episodes; it must be more than a fifth of batch_size, 8.",
        ),
        (
            lambda: {"data": dataclasses.replace(tiny.DATA, bucket_count=17)},
            "bucket_count is 17; it must be at most 16: each length is a program to compile.",
        ),
        (lambda: {"kl": KLConfig(target=-1.0)}, "kl.target is -1.0"),
        (
            lambda: {"temperature": 0.0},
            "temperature is 0.0; it must be a finite number greater than 0.",
        ),
        (
            lambda: {"rollout": RolloutConfig(top_k=5)},
            "rollout.top_k is 5; RL learns from the whole distribution: leave it out",
        ),
        (
            lambda: {"rollout": RolloutConfig(top_p=0.9)},
            "rollout.top_p is 0.9; RL learns from the whole distribution: leave it out",
        ),
        (
            lambda: {"rollout": RolloutConfig(top_p=1.5)},
            "rollout.top_p is 1.5; it must lie in (0, 1].",
        ),
        (lambda: {"validation_prompts": -1}, "validation_prompts is -1"),
        (lambda: {"select": "first"}, "select is 'first'; it must be one of best, last."),
        (lambda: {"max_mismatch": 1.0}, "max_mismatch is 1.0; it must be greater than 1."),
        (
            lambda: {"value_head": "policy"},
            "value_head is 'policy'; it must be one of zero, reward.",
        ),
        (
            lambda: {"value_head": "reward", "reward": (), "terms": '{"kind": "format"}'},
            "value_head reward begins with a reward artefact's head",
        ),
        (lambda: {"reward": ()}, "There is no reward: give --reward FOLDER or --terms JSON."),
        (lambda: {"combine": "max"}, "combine is 'max'; it must be one of mean, min."),
        (
            lambda: {"reward_weight": float("inf")},
            "reward_weight is inf; it must be a finite number.",
        ),
        (
            lambda: {"shaping": ShapingConfig(missing_eos_penalty=-1.0)},
            "shaping.missing_eos_penalty is -1.0",
        ),
        (
            lambda: {"shaping": ShapingConfig(overlong_buffer=9)},
            "shaping.overlong_buffer is 9; a response has at most 8 tokens",
        ),
        (
            lambda: {"shaping": ShapingConfig(whiten=True), "algorithm": AlgorithmConfig("remax")},
            "shaping.whiten is over the batch's samples",
        ),
        (lambda: {"value_learning_rate": 0.0}, "value_learning_rate is 0.0"),
        (
            lambda: {"algorithm": AlgorithmConfig("sarsa")},
            "algorithm.name is 'sarsa'; it must be one of reinforce,",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig("grpo", samples=1)},
            "algorithm.samples is 1; grpo compares a prompt's samples and needs 2 or more.",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig("grpo", samples=3)},
            "batch_size is 8 episodes; it must be a multiple of algorithm.samples, 3.",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig("ppo", minibatches=3)},
            "it must be a multiple of algorithm.minibatches times microbatches, 3.",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig("gspo", normalise="token")},
            "gspo has one ratio per sequence, which needs sequence-mean.",
        ),
        (lambda: {"algorithm": AlgorithmConfig(normalise="row")}, "algorithm.normalise is 'row'"),
        (
            lambda: {"algorithm": AlgorithmConfig("reinforce-mean"), "batch_size": 1},
            "reinforce-mean compares the batch's episodes",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig(whiten=True)},
            "algorithm.whiten needs advantages that are known before the update",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig(clip=1.0)},
            "algorithm.clip is 1.0; it must lie in (0, 1).",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig(max_ratio=0.5)},
            "algorithm.max_ratio is 0.5; it must be 1 or more.",
        ),
        (
            lambda: {"algorithm": AlgorithmConfig(gae_lambda=1.5)},
            "algorithm.gae_lambda is 1.5; it must lie in [0, 1].",
        ),
        # What would do nothing.
        *(
            (
                lambda name=name: {"value_head": "reward", "algorithm": AlgorithmConfig(name)},
                f"value_head is 'reward', which {name} does not read; leave it out (reinforce, "
                "ppo read it).",
            )
            for name in CRITICLESS
        ),
        *(
            (
                lambda name=name: {"value_learning_rate": 0.1, "algorithm": AlgorithmConfig(name)},
                f"value_learning_rate is 0.1, which {name} does not read; leave it out "
                "(reinforce, ppo read it).",
            )
            for name in CRITICLESS
        ),
        (
            lambda: {
                "optimizer": OptimizerConfig(head_learning_rate=0.1),
                "algorithm": AlgorithmConfig("rloo"),
            },
            "optimizer.head_learning_rate is 0.1, which rloo does not read; leave it out "
            "(reinforce, ppo read it).",
        ),
        (
            lambda: {"optimizer": OptimizerConfig(lora_b_ratio=16.0), "tuning": "full"},
            "optimizer.lora_b_ratio is 16.0, which tuning full does not read; leave it out "
            "(tuning lora reads it).",
        ),
        (
            lambda: {"kl": KLConfig(horizon=640)},
            "kl.horizon is 640, which nothing reads where kl.beta stays; leave it out, or give "
            "kl.target.",
        ),
        (
            lambda: {"kl": KLConfig(beta=0.0, reference="none", place="loss")},
            "kl.place is 'loss', which nothing reads without a KL; leave it out, or give "
            "kl.reference.",
        ),
        (
            lambda: {"kl": KLConfig(beta=0.0, reference="none", estimator="k1")},
            "kl.estimator is 'k1', which nothing reads without a KL",
        ),
        (
            lambda: {"kl": KLConfig(beta=0.0, reference="none", whole_score=True)},
            "kl.whole_score is True, which nothing reads without a KL",
        ),
        (
            lambda: {"kl": KLConfig(whole_score=True), "algorithm": AlgorithmConfig("grpo")},
            "kl.whole_score is for a KL in the reward; this one is in the loss",
        ),
        (
            lambda: {"shaping": ShapingConfig(overlong_penalty=2.0)},
            "shaping.overlong_penalty is 2.0, which nothing reads while shaping.overlong_buffer "
            "is 0; leave it out, or give shaping.overlong_buffer.",
        ),
        (
            lambda: {"combine": "min"},
            "combine is 'min' over 1 reward artefacts; leave it out, or give two or more.",
        ),
        (
            lambda: {"reward": (), "terms": '{"kind": "format"}', "combine": "min"},
            "combine is 'min' over 0 reward artefacts",
        ),
        (
            lambda: {"reward": (), "terms": '{"kind": "format"}', "reward_weight": 2.0},
            "reward_weight is 2.0 without a reward artefact; leave it out, or give reward",
        ),
    ],
)
def test_settings_of_rl_are_checked(settings, message):
    with pytest.raises(UserError) as error:
        RLCommand(**{**tiny.COMMON, "run": "r", "model": "m", "reward": ("x",), **settings()})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {
            "value_head": "reward",
            "value_learning_rate": 0.1,
            "optimizer": OptimizerConfig(head_learning_rate=0.1),
            "algorithm": AlgorithmConfig("ppo"),
        },
        lambda: {
            "value_head": "reward",
            "value_learning_rate": 0.1,
            "optimizer": OptimizerConfig(head_learning_rate=0.1, lora_b_ratio=16.0),
        },
        lambda: {"kl": KLConfig(target=6.0, horizon=640, whole_score=True)},
        lambda: {
            "kl": KLConfig(place="reward", whole_score=True),
            "algorithm": AlgorithmConfig("grpo"),
        },
        lambda: {"shaping": ShapingConfig(overlong_penalty=2.0, overlong_buffer=2)},
        lambda: {"reward": ("x", "y"), "combine": "min", "reward_weight": 2.0},
    ],
)
def test_settings_of_rl_that_are_read_are_taken(settings):
    fields = settings()
    config = RLCommand(**{**tiny.COMMON, "run": "r", "model": "m", "reward": ("x",), **fields})
    assert all(getattr(config, name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    ("make", "job"), [(SFTCommand, "sft"), (DPOCommand, "dpo"), (base_lib.BaseConfig, "base")]
)
def test_a_rate_of_the_head_needs_a_head(make, job):
    with pytest.raises(UserError) as error:
        make(run="r", model="m", optimizer=OptimizerConfig(head_learning_rate=0.1))
    assert str(error.value) == (
        f"optimizer.head_learning_rate is 0.1, which {job} does not read; leave it out "
        "(reward, rl with a value model read it)."
    )


def test_a_broken_config_of_a_run_is_named(base, tmp_path):
    for text, message in (
        ("{", "config.json is not valid JSON"),
        ("{}", "config.json does not hold the settings that the run began with"),
        ("[]", "config.json does not hold the settings that"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            commands.run_sft(tiny.sft_config(tmp_path, base))
