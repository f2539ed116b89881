"""Which split each number comes from, and that no number is upside down: the errors that flatter a
result.

Each test has numbers that the error would change: a threshold chosen on the test split, a model
selected on what it was trained on, RL on test prompts, a KL or an accuracy of the wrong sign.
"""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from perl_jax.data import loading
from perl_jax.data.dataset import Dataset, of_rows, of_split
from perl_jax.data.tasks import get_task
from perl_jax.data.tokenise import Ragged, TokenRows, clip_prompt, clip_response
from perl_jax.evaluation import calibration, compare, intervals, resampling, statistics
from perl_jax.generation import programs
from perl_jax.generation.config import RolloutConfig
from perl_jax.runtime import trees
from perl_jax.training import commands, dpo, reward, rl, sft
from perl_jax.training.commands import DPOCommand
from tests import small
from tests.paths import ORDERS
from tests.training import tiny


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


def test_the_threshold_is_chosen_on_validation_rows(monkeypatch):
    """A threshold chosen on the test rows would classify them perfectly; the one chosen on
    validation rows calls every test row positive.
    """
    scores = {"validation": [0.0, 1.0, 2.0, 3.0], "test": [1.6, 1.7, 5.0, 6.0]}
    rows = [
        {"prompt": f"p{i}", "response": "r", "label": label}
        for i, label in enumerate((0.0, 0.0, 1.0, 1.0))
    ]
    values = lambda results: tuple(
        results[name]["value"] for name in ("auc", "balanced_accuracy", "accuracy")
    )
    encoded = TokenRows("labels", Ragged.of([]), (), {}, {})
    monkeypatch.setattr(
        reward,
        "load_batches",
        lambda model, dataset, split, *_: types.SimpleNamespace(split=split, rows=encoded),
    )
    monkeypatch.setattr(
        reward, "score_batches", lambda model, adapter, batches: (np.array(scores[batches.split]),)
    )
    config = types.SimpleNamespace(data=tiny.DATA, batch_size=4, microbatches=1)
    dataset = of_rows("labels", rows, rows, rows)
    results, _ = reward.evaluate_reward(None, dataset, config, None)
    assert values(results) == (1.0, 0.5, 0.5)
    # By a threshold of its own the test split would get 0.75 here, and 1.0 above.
    scores["test"] = [1.4, 1.7, 1.4, 6.0]
    results, _ = reward.evaluate_reward(None, dataset, config, None)
    assert values(results)[:2] == (2.5 / 4, 0.5)


def test_intervals_are_over_the_groups_of_rows(monkeypatch):
    """Twelve turns of three dialogues, and twelve comparisons in three rankings: what each row
    alone would give is narrower.
    """
    noise = np.random.default_rng(0)
    groups, labels, scores = (
        np.repeat(["a", "b", "c"], 4),
        np.tile([0.0, 1.0, 1.0, 0.0], 3),
        noise.normal(size=(2, 12)),
    )
    turns = [
        {"prompt": f"p{i}", "group": str(group), "label": label}
        for i, (group, label) in enumerate(zip(groups, labels, strict=True))
    ]
    ranked = [
        {
            "prompt": f"{group} ",
            "group": "",
            "chosen": "a",
            "rejected": "b",
            "probability": np.nan,
            "weight": 0.25,
        }
        for group in groups
    ]
    config = types.SimpleNamespace(data=tiny.DATA, batch_size=4, microbatches=1)

    def evaluated(kind, rows, scores):
        encoded = TokenRows(
            kind,
            Ragged.of([]),
            (),
            {},
            {},
            equal=np.zeros(12, bool) if kind == "comparisons" else None,
        )
        monkeypatch.setattr(reward, "load_batches", lambda *_: types.SimpleNamespace(rows=encoded))
        monkeypatch.setattr(reward, "score_batches", lambda *_: scores)
        dataset = Dataset("rows", kind, {"test": rows, "validation": rows}, None, None)
        return reward.evaluate_reward(None, dataset, config, None)[0]

    found = evaluated("labels", turns, (scores[0],))
    assert (found["n"], found["groups"]) == (12, 3)
    assert (
        found["auc"]
        == dataclasses.asdict(statistics.auc_estimate(scores[0], labels, groups))
        != dataclasses.asdict(statistics.auc_estimate(scores[0], labels))
    )
    assert [found[name]["groups"] for name in ("balanced_accuracy", "accuracy")] == [3, 3]
    expected = calibration.reliability(calibration.sigmoid(scores[0]), labels, groups=groups)
    assert found["reliability"] == [dataclasses.asdict(row) for row in expected]
    found = evaluated("comparisons", ranked, tuple(scores))
    assert (
        found["n"],
        found["groups"],
        found["pairwise_accuracy"]["n"],
        found["pairwise_accuracy"]["groups"],
    ) == (12, 3, 12, 3)
    assert found["pairwise_accuracy"] == dataclasses.asdict(
        statistics.pairwise_accuracy(*scores, np.ones(12), groups)
    )
    assert max(row["groups"] for row in found["reliability"]) <= 3

    side = lambda scores: compare.Responses(
        [""] * 12, [[1]] * 12, np.ones(12, bool), scores, {"proxy": scores}, scores, list(groups)
    )
    ours, theirs = map(side, scores)
    assert compare.describe(ours)["proxy_reward"] == dataclasses.asdict(
        intervals.mean_ci(scores[0], groups)
    )
    against = compare.compare(ours, theirs, "gold")
    assert against["gold_gain"] == dataclasses.asdict(resampling.paired_bootstrap(*scores, groups))
    assert against["win_rate"] == dataclasses.asdict(
        statistics.win_rate(*scores, groups=groups)
    ) | {"judge": "gold"}


def write_conflict(folder, swapped: dict[str, float]) -> None:
    """Comparisons of one kind; a share of each split's is the other way round."""
    for split, share in swapped.items():
        rows = []
        for i in range(16):
            good, bad = ("coffee tea", "milk") if i >= share * 16 else ("milk", "coffee tea")
            rows.append({"prompt": f"{split} number {i}", "chosen": good, "rejected": bad})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_best_step_is_best_on_validation_rows(jobs, model, tmp_path):
    """Validation rows prefer what train rows reject: one is all right when the other is all
    wrong.
    """
    write_conflict(tmp_path, {"train": 0.0, "validation": 1.0, "test": 0.25})
    data = dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    artefact = commands.run_reward(
        tiny.reward_config(tmp_path / "run", jobs.base, data=data, steps=6)
    )
    adapter, record = model.load_role(artefact, "reward")

    def accuracy(split: str) -> float:
        rows = of_split(data, "comparisons", split)
        batches = loading.load_batches(model, rows, split, data, 8, None)
        return statistics.pairwise_accuracy(*reward.score_batches(model, adapter, batches)).value

    validated = {
        row["step"]: row for row in tiny.rows(tmp_path / "run") if "validation/accuracy" in row
    }
    assert validated[record.step]["validation/accuracy"] == max(
        row["validation/accuracy"] for row in validated.values()
    )
    assert validated[record.step]["validation/accuracy"] == pytest.approx(accuracy("validation"))
    assert validated[6]["validation/accuracy"] == 0.0 and validated[6]["train/accuracy"] == 1.0
    # log 2 before training; worse after it.
    assert validated[6]["validation/loss"] > np.log(2) > validated[6]["train/loss"]
    assert tiny.read(tmp_path / "run" / "evaluation.json")["pairwise_accuracy"][
        "value"
    ] == pytest.approx(accuracy("test"))


class Reached(Exception):
    """Training would begin now."""


@pytest.mark.parametrize("job", ["sft", "reward", "dpo", "rl"])
def test_every_job_trains_on_the_rows_of_the_train_split(job, jobs, model, tmp_path, monkeypatch):
    """The tokens of the first batch, row by row."""
    seen = {}

    def stop(config, state, loop, *_):
        seen["iterator"] = loop.batches
        raise Reached

    for module in (sft, reward, dpo, rl):
        monkeypatch.setattr(module, "train", stop)
    run = tmp_path / "run"
    start = {
        "sft": ("demonstrations", lambda: commands.run_sft(tiny.sft_config(run, jobs.base))),
        "reward": ("comparisons", lambda: commands.run_reward(tiny.reward_config(run, jobs.base))),
        "dpo": (
            "comparisons",
            lambda: commands.run_dpo(
                DPOCommand(
                    **{
                        **tiny.COMMON,
                        "run": str(run),
                        "model": jobs.base,
                        "policy": str(jobs.policy),
                    }
                )
            ),
        ),
        "rl": (
            "prompts",
            lambda: commands.run_rl(tiny.rl_config(run, jobs.base, jobs.policy, jobs.reward)),
        ),
    }
    kind, begin = start[job]
    with pytest.raises(Reached):
        begin()
    iterator = seen["iterator"]
    rows = get_task(ORDERS).open(kind, "train", tiny.DATA)
    batch, tokenizer = next(iterator), model.tokenizer
    for place, index in enumerate(iterator.batches.rows_of(0).tolist()):
        row = rows[index]
        ids = clip_prompt(tokenizer.prompt_ids(row["prompt"]), 8, tokenizer.bos_id)
        if kind == "prompts":
            found, valid = batch.tokens_BP, batch.valid_BP
        else:
            field, tokens = (
                ("response", batch) if kind == "demonstrations" else ("chosen", batch.chosen)
            )
            ids += clip_response(tokenizer.response_ids(row[field]), 8)
            found, valid = tokens.tokens_BT, tokens.valid_BT
        assert found[place][valid[place]].tolist() == ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def response_logprob(model, adapter, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) of one unpadded row, from logits."""
    ids = prompt + response
    tokens_BT = np.asarray([ids + [0] * (16 - len(ids))], np.int32)
    tokens = small.Tokens(tokens_BT, np.arange(16)[None] < len(ids), tokens_BT > 0)
    logp_TV = log_softmax(np.asarray(small.logits(model.lm, model.base, adapter, tokens)[0]))
    return sum(logp_TV[place - 1, ids[place]] for place in range(len(prompt), len(ids)))


def test_kl_of_an_evaluation_is_policy_over_baseline(jobs, model):
    """log pi(y | x) - log pi_baseline(y | x) of what the policy sampled, which is positive on
    average.
    """
    baseline = model.load_role(jobs.policy, "policy")[0]
    noise = np.random.default_rng(0)
    policy = baseline.replace(
        lora=trees.map_named(
            lambda name, leaf: leaf + 0.3 * noise.standard_normal(leaf.shape).astype(np.float32),
            baseline.lora,
        )
    )
    dataset = of_split(tiny.DATA, "prompts", "test")
    batches = loading.load_batches(model, dataset, "test", tiny.DATA, 8, None)
    rows = dataset.rows("test")
    scorer = lambda models, rollout, row_B: (np.zeros(len(row_B), np.float32), {})
    job = compare.Evaluation(
        model,
        programs.sample_program(model, 8, 1.0, RolloutConfig()),
        compare.logprob_program(model, 1.0, 8),
        {"proxy": (scorer, {})},
        batches,
        rows,
        dataset.gold,
        3,
    )
    responses, prompts = compare.respond(job, policy, baseline)
    expected = []
    for prompt, response in zip(prompts, responses.tokens, strict=True):
        ids = clip_prompt(model.tokenizer.prompt_ids(prompt), 8, model.tokenizer.bos_id)
        expected.append(
            response_logprob(model, policy, ids, response)
            - response_logprob(model, baseline, ids, response)
        )
    np.testing.assert_allclose(responses.kl, expected, atol=1e-3)
    assert np.mean(expected) > 0.1
    assert compare.describe(responses)["kl"]["value"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_accuracy_of_dpo_counts_what_is_chosen(jobs, model):
    """The implicit reward's order of every test pair, from logits."""
    reference = model.load_role(jobs.policy, "policy")[0]
    noise = np.random.default_rng(1)
    policy = reference.replace(
        lora=trees.map_named(
            lambda name, leaf: leaf + 0.3 * noise.standard_normal(leaf.shape).astype(np.float32),
            reference.lora,
        )
    )
    config = DPOCommand(
        **{**tiny.COMMON, "run": "-", "model": jobs.base, "policy": str(jobs.policy)}
    )
    state = types.SimpleNamespace(roles={"policy": policy}, frozen={"reference": reference})
    results = dpo.evaluate_dpo(
        model, of_split(tiny.DATA, "comparisons", "test"), config, dpo.job_of(config), state
    )
    right = []
    for row in get_task(ORDERS).open("comparisons", "test", tiny.DATA):
        prompt = clip_prompt(model.tokenizer.prompt_ids(row["prompt"]), 8, model.tokenizer.bos_id)
        sides = [
            clip_response(model.tokenizer.response_ids(row[side]), 8)
            for side in ("chosen", "rejected")
        ]
        good, bad = (
            response_logprob(model, policy, prompt, side)
            - response_logprob(model, reference, prompt, side)
            for side in sides
        )
        # Responses that are equal once they are cut are in no order: they do not count.
        if sides[0] != sides[1]:
            right.append(float(good > bad))
    found = results["pairwise_accuracy"]
    assert (len(right), sum(right)) == (14, 5) and found["n"] == 14
    assert (
        found["value"] == pytest.approx(5 / 14)
        and results["data"]["data/test/equal_after_cutting"] == 2
    )
