"""The chain of jobs on the orders task: what each leaves behind, and that it says the truth."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest

from perl_jax.data import loading
from perl_jax.data.tasks import get_task
from perl_jax.errors import UserError
from perl_jax.evaluation import compare
from perl_jax.evaluation.report import write_report
from perl_jax.runtime import trees
from perl_jax.training import commands
from tests import small
from tests.paths import ORDERS
from tests.training import tiny


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


@pytest.fixture(scope="module")
def pointwise(jobs, tmp_path_factory):
    """A pointwise reward: its artefact."""
    run = tmp_path_factory.mktemp("pointwise")
    return commands.run_reward(tiny.reward_config(run, jobs.base, objective="pointwise"))


def reference_scores(model, artefact: pathlib.Path, kind: str) -> np.ndarray:
    """Raw scores of every response of the training split, by a forward pass a row, unpadded."""
    adapter, _ = tiny.load(artefact, model)
    source = get_task(ORDERS).open(kind, "train", tiny.DATA)
    scores = []
    for row in source:
        for field in ("chosen", "rejected") if kind == "comparisons" else ("response",):
            ids = model.tokenizer.prompt_ids(row["prompt"])
            ids = [ids[0], *ids[-7:]] if len(ids) > 8 else ids
            ids += model.tokenizer.response_ids(row[field])[:8]
            tokens_BT = np.asarray([ids + [0] * (16 - len(ids))], np.int32)
            scores.append(
                small.score(
                    model.lm,
                    model.base,
                    adapter,
                    small.Tokens(tokens_BT, np.arange(16)[None] < len(ids), tokens_BT > 0),
                ).item()
            )
    return np.asarray(scores)


def check_artefact(folder: pathlib.Path, model, role: str, tuning: str, head: bool) -> None:
    adapter, record = tiny.load(folder, model)
    assert (record.role, record.tuning, record.has_head) == (role, tuning, head)
    assert (record.base_fingerprint, record.tokenizer_fingerprint) == (
        model.fingerprint,
        model.tokenizer.fingerprint,
    )
    assert record.base_name == model.name and (adapter.head is not None) == head
    assert (adapter.weights is not None, adapter.lora is not None) == (
        (True, False) if tuning == "full" else (False, True)
    )
    assert record.lora == (None if tuning == "full" else tiny.COMMON["lora"]) == adapter.config
    assert (record.score_mean is not None) == (record.score_std is not None) == (role == "reward")
    assert trees.all_finite(adapter)


# Artefacts.


def test_artefacts_say_what_they_are(jobs, model):
    check_artefact(jobs.policy, model, "policy", "lora", False)
    check_artefact(jobs.reward, model, "reward", "lora", True)
    check_artefact(jobs.tuned, model, "policy", "lora", False)
    check_artefact(jobs.tuned.with_name("value"), model, "value", "lora", True)
    # The best of the validated steps, with what was measured there.
    validated = {
        row["step"]: row for row in tiny.rows(jobs.root / "rl") if "validation/reward" in row
    }
    best = max(validated, key=lambda step: validated[step]["validation/reward"])
    record = tiny.load(jobs.tuned, model)[1]
    assert (
        sorted(validated) == [2, 4]
        and record.step == best == tiny.load(jobs.tuned.with_name("value"), model)[1].step
    )
    assert record.metrics == {
        name: value for name, value in validated[best].items() if name.startswith("validation/")
    }
    assert set(record.metrics) == {
        f"validation/{name}" for name in ("reward", "gold", "kl", "length", "eos_rate")
    }


def test_training_has_moved_every_adapter(jobs, model):
    before, after = tiny.load(jobs.policy, model)[0], tiny.load(jobs.tuned, model)[0]
    for name, leaf in trees.named_leaves(before.lora).items():
        assert np.any(np.asarray(leaf)), name
        assert np.any(np.asarray(leaf) != np.asarray(trees.named_leaves(after.lora)[name])), name


@pytest.mark.parametrize("kind", ["comparisons", "labels"])
def test_normalised_reward_has_mean_0_and_variance_1_on_the_training_split(
    kind, jobs, pointwise, model
):
    artefact = jobs.reward if kind == "comparisons" else pointwise
    normalised = tiny.load(artefact, model)[1].normalise(reference_scores(model, artefact, kind))
    assert len(normalised) == (64 if kind == "comparisons" else 32)
    assert np.mean(normalised) == pytest.approx(0, abs=1e-5)
    assert np.var(normalised) == pytest.approx(1, rel=1e-5)


# evaluation.json, metrics.jsonl, cost.json, the report.


# Of the test split's 16 pairs, at 8 tokens a prompt and 8 a response.
COUNTS = {
    "rows": 16,
    "cut": 16,
    "cut_prompts": 16,
    "cut_chosen": 10,
    "cut_rejected": 7,
    "cut_prompts_template_whole": 0,
    "rendered": 0,
    "equal_pairs": 0,
    "equal_after_cutting": 2,
}


def test_evaluation_of_a_pairwise_reward(jobs, model):
    found = tiny.read(jobs.root / "reward" / "evaluation.json")
    assert set(found) == {
        "n",
        "groups",
        "pairwise_accuracy",
        "noise_ceiling",
        "ece",
        "brier",
        "reliability",
        "data",
    }
    accuracy = found["pairwise_accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    # Two of the 16 pairs are equal once they are cut to 8 tokens: neither right nor wrong, they
    # count nowhere.
    rows = list(get_task(ORDERS).open("comparisons", "test", tiny.DATA))
    cut = lambda text: model.tokenizer.response_ids(text)[:8]
    counted = [row["probability"] for row in rows if cut(row["chosen"]) != cut(row["rejected"])]
    assert (len(rows), accuracy["n"]) == (16, 14) and len(counted) == 14
    assert (
        found["n"] == 16
        and found["groups"] == len({row["prompt"] for row in rows}) >= accuracy["groups"]
    )
    assert found["data"] == {f"data/test/{name}": number for name, number in COUNTS.items()}
    assert found["noise_ceiling"] == pytest.approx(np.mean([max(p, 1 - p) for p in counted]))
    assert (
        sum(row["n"] for row in found["reliability"]) > 0
        and 0 <= found["ece"] <= 1
        and 0 <= found["brier"] <= 1
    )


def test_a_reward_leaves_rows_with_their_scores(jobs, model):
    found, record = samples(jobs.root / "reward"), tiny.load(jobs.reward, model)[1]
    scores = tiny.read(jobs.root / "reward" / "scores.json")
    rows = list(get_task(ORDERS).open("comparisons", "test", tiny.DATA))
    assert [row["row"] for row in found if row["why"] == "first"] == list(range(8))
    for row in found:
        assert row["prompt"] == rows[row["row"]]["prompt"]
        for side in ("chosen", "rejected"):
            assert row[side]["text"] == rows[row["row"]][side]
            assert row[side]["score"] == pytest.approx(
                record.normalise(scores[side][row["row"]]), abs=1e-6
            )
    wrong = sum(a < b for a, b in zip(scores["chosen"], scores["rejected"], strict=True))
    assert sum(row["why"] == "mistake" for row in found) == min(8, wrong) > 0


def test_evaluation_of_a_pointwise_reward(pointwise):
    found = tiny.read(pointwise.parents[1] / "evaluation.json")
    assert set(found) == {
        "auc",
        "balanced_accuracy",
        "accuracy",
        "n",
        "groups",
        "ece",
        "brier",
        "reliability",
        "data",
    }
    assert found["n"] == found["auc"]["n"] == 16 and 0 <= found["ece"] <= 1
    assert all(0 <= found[name]["value"] <= 1 for name in ("auc", "balanced_accuracy", "accuracy"))


def test_evaluation_of_a_policy(jobs):
    found = tiny.read(jobs.root / "rl" / "evaluation.json")
    assert set(found) == {"policies", "win_rate", "gold_gain", "config", "stands", "prompts"}
    measures = {
        "proxy_reward",
        "kl",
        "length",
        "eos_rate",
        "distinct_1",
        "distinct_2",
        "gold_reward",
    }
    assert set(found["policies"]) == {"sft", "rl"} and all(
        set(column) == measures for column in found["policies"].values()
    )
    # The baseline is measured against itself.
    assert found["policies"]["sft"]["kl"]["value"] == 0.0 != found["policies"]["rl"]["kl"]["value"]
    rate = found["win_rate"]
    assert rate["judge"] == "gold" and rate["wins"] + rate["ties"] + rate["losses"] == 16
    gold = {
        side: [row[side]["gold"] for row in samples(jobs.root / "rl")] for side in ("sft", "rl")
    }
    assert found["policies"]["rl"]["gold_reward"]["value"] == pytest.approx(np.mean(gold["rl"]))
    assert found["gold_gain"]["value"] == pytest.approx(np.mean(gold["rl"]) - np.mean(gold["sft"]))
    assert rate["wins"] == sum(a > b for a, b in zip(gold["rl"], gold["sft"], strict=True))


def samples(run: pathlib.Path) -> list[dict]:
    lines = (run / "evaluation_samples.jsonl").read_text().splitlines()
    return [tiny.json.loads(line) for line in lines]


def test_samples_are_the_prompts_in_order_with_their_own_rewards(jobs):
    prompts = [row["prompt"] for row in get_task(ORDERS).open("prompts", "test", tiny.DATA)]
    found = samples(jobs.root / "rl")
    assert [row["prompt"] for row in found] == prompts
    for row in found:
        for side in ("sft", "rl"):
            gold = get_task(ORDERS).gold([row["prompt"]], [row[side]["text"]])[0]
            assert row[side]["gold"] == pytest.approx(gold)


@pytest.mark.slow
def test_few_prompts_make_a_small_batch_with_the_same_responses(
    jobs, tmp_path, monkeypatch, capsys
):
    """Five prompts in a batch of 64 are sampled as 5 rows, and not as 64."""
    sampled = []

    def recorded(*arguments):
        program = sample_program(*arguments)

        def sample(base, policy, prompts, key):
            sampled.append(prompts.tokens_BP.shape[0])
            return program(base, policy, prompts, key)

        return sample

    sample_program = compare.sample_program
    monkeypatch.setattr(compare, "sample_program", recorded)
    data = dataclasses.replace(tiny.DATA, evaluation_size=5)

    def evaluated(name: str) -> list[dict]:
        given = {"policy": str(jobs.policy), "reward": (str(jobs.reward),)}
        config = tiny.evaluate_config(tmp_path / name, jobs.base, data=data, batch_size=64, **given)
        compare.run_evaluate(config)
        return samples(tmp_path / name)

    small = evaluated("small")
    assert sampled == [5, 5]
    said = capsys.readouterr().err
    assert "evaluate: 5 test prompts: win rate " in said and "decided by the gold reward" in said
    monkeypatch.setattr(loading, "fitting_batch", lambda size, rows, multiple: size)
    large = evaluated("large")
    assert sampled[2:] == [64, 64]
    texts = lambda rows: [(row["sft"]["text"], row["rl"]["text"]) for row in rows]
    assert texts(small) == texts(large) and len(small) == 5


@pytest.mark.slow
def test_greedy_evaluation_against_the_base_itself(jobs, tmp_path):
    # No baseline: the base. Greedy, so that both columns would be equal for equal policies.
    data = dataclasses.replace(tiny.DATA, evaluation_size=8)
    config = tiny.evaluate_config(
        tmp_path,
        jobs.base,
        policy=str(jobs.policy),
        reward=(str(jobs.reward),),
        judge=(str(jobs.reward),),
        temperature=0.0,
        data=data,
    )
    found = tiny.read(compare.run_evaluate(config) / "evaluation.json")
    assert found["policies"]["rl"]["kl"]["value"] != 0.0 == found["policies"]["sft"]["kl"]["value"]
    # The judge is the proxy here.
    assert found["policies"]["rl"]["judge_reward"] == found["policies"]["rl"]["proxy_reward"]


def test_metrics_have_a_row_a_step(jobs):
    for job in ("sft", "reward", "rl"):
        assert [row["step"] for row in tiny.rows(jobs.root / job)] == [1, 2, 3, 4]
        for row in tiny.rows(jobs.root / job):
            assert all(math.isfinite(value) for value in row.values()), row
            assert "train/loss" in row and "time/step" in row and "finite" not in row
        # What rows lost to fit is written once.
        first, *others = (
            {name: value for name, value in row.items() if name.startswith("data/")}
            for row in tiny.rows(jobs.root / job)
        )
        assert (first["data/train/rows"], first["data/validation/rows"]) == (32, 16) and not any(
            others
        )
        assert 0 < first["data/train/cut_prompts"] <= first["data/train/cut"] <= 32
    validated = [
        row["step"] for row in tiny.rows(jobs.root / "reward") if "validation/accuracy" in row
    ]
    assert validated == [2, 4]


def test_first_step_of_rl_is_on_policy(jobs):
    rows = tiny.rows(jobs.root / "rl")
    assert rows[0]["kl/sequence"] == 0.0 and rows[0]["kl/token"] == 0.0
    assert abs(rows[-1]["kl/sequence"]) > 0
    for row in rows:
        assert row["policy/gradient_norm"] > 0 and row["value/gradient_norm"] > 0
        # One update a rollout: each is made by the policy that sampled it.
        assert row["policy/ratio_deviation"] < 1e-5 and row["sampler/mismatch"] == pytest.approx(
            1, abs=1e-5
        )
        assert 1 <= row["response/length"] <= 8 and 0 <= row["response/eos_rate"] <= 1
        assert row["time/sample"] + row["time/score"] + row["time/learn"] <= row["time/step"]


def test_cost_counts_what_is_trained(jobs, model):
    for job, roles in (("sft", ["policy"]), ("reward", ["reward"]), ("rl", ["policy", "value"])):
        cost = tiny.read(jobs.root / job / "cost.json")
        trained = sum(
            trees.count(tiny.load(jobs.root / job / "adapters" / role, model)[0]) for role in roles
        )
        assert cost["parameters_trainable"] == trained
        assert cost["parameters_total"] == trained + trees.count(model.base)
        assert cost["base_bytes"] == trees.size_bytes(model.base)
        assert cost["checkpoint_bytes"] > 0 and cost["peak_bytes_measured"] > 0
        assert (
            cost["peak_bytes_compiled"]
            == max(cost["peak_bytes_by_program"].values())
            > cost["base_bytes"] + cost["state_bytes"]
        )
        assert cost["seconds_per_step"] > 0
        assert (
            cost["attention"]["training"] == "blocked (on one CPU device pieces stay in its caches)"
        )
        assert cost["attention"]["sampling"].startswith(
            "prompts blocked, then plain over the cache"
        )
    assert set(cost["phases"]) == {"sample", "score", "learn"}
    assert set(cost["peak_bytes_by_program"]) == {
        "sample",
        "reward",
        "logprobs",
        "assemble",
        "learn",
    }
    # One padded length: one compilation of each.
    assert cost["compilations"] == 5


def test_report_of_every_run(jobs):
    for job in ("sft", "reward", "rl"):
        page = write_report(jobs.root / job).read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>") and "data:image" in page
        number = int(tiny.rows(jobs.root / job)[0]["data/validation/cut"])
        assert f"validation: {number} of 16 rows were cut to fit: " in page
        if job == "reward":
            assert "Worst mistakes" in page
    assert samples(jobs.root / "rl")[0]["prompt"].split(" ; ")[0][:20] in page
    assert "Before training" in page


# Checkpoints.


def checkpoint_leaves(run: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Path and shape of every array of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((newest / "state").absolute()).item_metadata.tree
    return {name: tuple(leaf.shape) for name, leaf in trees.named_leaves(tree).items()}


def test_no_checkpoint_holds_the_base(jobs, model):
    base = trees.named_leaves(model.base)
    matrices = {leaf.shape for leaf in base.values() if leaf.ndim > 1}
    for job in ("sft", "reward", "rl"):
        leaves = checkpoint_leaves(jobs.root / job)
        assert any(name.endswith("lora_b") for name in leaves)
        for name, shape in leaves.items():
            assert not any(name.endswith(own) for own in base), name
            assert shape not in matrices, name
    # The same look at a base in training does find one.
    found = checkpoint_leaves(pathlib.Path(jobs.base).parent / "run")
    assert any(name.endswith("outer/embedding") for name in found) and matrices & set(
        found.values()
    )


# Full tuning.


@pytest.mark.slow
def test_the_chain_with_full_tuning(jobs, model, tmp_path):
    done = tiny.run_jobs(tmp_path, jobs.base, "full")
    check_artefact(done.policy, model, "policy", "full", False)
    check_artefact(done.reward, model, "reward", "full", True)
    check_artefact(done.tuned, model, "policy", "full", False)
    check_artefact(done.tuned.with_name("value"), model, "value", "full", True)
    assert tiny.rows(tmp_path / "rl")[0]["kl/sequence"] == 0.0
    cost = tiny.read(tmp_path / "rl" / "cost.json")
    assert (
        cost["parameters_total"] == cost["parameters_trainable"] == 2 * trees.count(model.base) + 17
    )
    write_report(tmp_path / "rl")
    # The tuned weights are others than the base's, every one of them.
    weights = tiny.load(done.tuned, model)[0].weights
    for name, leaf in trees.named_leaves(weights).items():
        assert np.any(np.asarray(leaf) != np.asarray(trees.named_leaves(model.base)[name])), name


@pytest.mark.slow
def test_full_tuning_goes_on_from_an_adapter_against_an_adapter_reward(jobs, model, tmp_path):
    # Mixed as in the paper's comparison: one reward model for both tunings.
    artefact = commands.run_rl(
        tiny.rl_config(tmp_path, jobs.base, jobs.policy, jobs.reward, tuning="full", steps=2)
    )
    check_artefact(artefact, model, "policy", "full", False)
    assert tiny.rows(tmp_path)[0]["kl/sequence"] == 0.0
    # Full weights that begin as base plus adapter give the adapter's own log-probabilities.
    first, other = tiny.rows(tmp_path)[0], tiny.rows(jobs.root / "rl")[0]
    assert first["response/entropy"] == pytest.approx(other["response/entropy"], rel=1e-5)


def test_an_adapter_cannot_go_on_from_full_weights(jobs, tmp_path):
    full = commands.run_sft(tiny.sft_config(tmp_path / "sft", jobs.base, tuning="full", steps=1))
    with pytest.raises(UserError, match="is fully tuned; an adapter needs a frozen base"):
        commands.run_rl(tiny.rl_config(tmp_path / "rl", jobs.base, full, jobs.reward))
