"""DPO and IPO as a job, and best-of-N: what they start from, learn and write."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from perl_jax.data import loading
from perl_jax.data.dataset import of_split
from perl_jax.data.tasks import get_task
from perl_jax.errors import UserError
from perl_jax.evaluation import best_of
from perl_jax.evaluation.best_of import BestOfConfig, best_response, run_best_of
from perl_jax.generation.config import RolloutConfig
from perl_jax.models import passes
from perl_jax.objectives import preference, supervised
from perl_jax.objectives.preference import Preferences
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.training import commands
from perl_jax.training.commands import DPOCommand, run_dpo
from perl_jax.types import Pairs
from tests import small
from tests.paths import ORDERS
from tests.training import tiny


def dpo_config(run, base: str, policy, **fields) -> DPOCommand:
    return DPOCommand(
        **{**tiny.COMMON, "run": str(run), "model": base, "policy": str(policy), **fields}
    )


@pytest.mark.parametrize("loss", ["dpo", pytest.param("ipo", marks=pytest.mark.slow)])
def test_a_policy_is_fitted_to_comparisons(loss, jobs, tmp_path):
    artefact = run_dpo(dpo_config(tmp_path / "dpo", jobs.base, jobs.policy, loss=loss, steps=12))
    rows = tiny.rows(tmp_path / "dpo")
    # Policy and reference are one at the start: log 2, or (1 / (2 beta))^2, and no reward on either
    # side.
    assert rows[0]["train/loss"] == pytest.approx(math.log(2) if loss == "dpo" else 25.0, rel=1e-4)
    assert rows[0]["dpo/chosen_reward"] == pytest.approx(0, abs=1e-4) and rows[0][
        "dpo/rejected_reward"
    ] == pytest.approx(0, abs=1e-4)
    assert np.mean([row["train/loss"] for row in rows[-3:]]) < rows[0]["train/loss"]
    assert rows[-1]["dpo/chosen_reward"] > rows[-1]["dpo/rejected_reward"]
    model = tiny.open_model(jobs.base)
    adapter, record = model.load_role(artefact, "policy")
    results = tiny.read(tmp_path / "dpo" / "evaluation.json")
    assert record.step == 12 and record.metrics == {
        "pairwise_accuracy": results["pairwise_accuracy"]["value"]
    }
    assert adapter.head is None and results["pairwise_accuracy"]["n"] == 14
    # A finished run is left as it is.
    before = tiny.snapshot(tmp_path / "dpo")
    run_dpo(dpo_config(tmp_path / "dpo", jobs.base, jobs.policy, loss=loss, steps=12))
    assert tiny.snapshot(tmp_path / "dpo") == before


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_packed_microbatches_give_what_padded_ones_do(microbatches, jobs, tmp_path):
    """The reference reads a whole batch, the update a microbatch at a time: each has room for its
    tokens.
    """

    def run(packing, **fields):
        data = tiny.dataclasses.replace(tiny.DATA, packing=packing, max_prompt_length=40)
        run_dpo(
            dpo_config(
                tmp_path / f"{packing}{len(fields)}", jobs.base, jobs.policy, data=data, **fields
            )
        )
        # Policy and reference are one at first: rounding alone says which of two equal rewards is
        # greater.
        return [
            {name: value for name, value in row.items() if "accuracy" not in name}
            for row in tiny.timeless(tmp_path / f"{packing}{len(fields)}")
        ]

    packed, padded, whole = (
        run("on", microbatches=microbatches),
        run("off", microbatches=microbatches),
        run("off"),
    )
    for rows in (packed, whole):
        for row, expected in zip(rows, padded, strict=True):
            assert row == {
                name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in expected.items()
            }


def test_soft_labels_margins_and_weights_reach_the_losses():
    noise = np.random.default_rng(1)
    base, role = small.make_base(), small.make_adapter()
    chosen, rejected = small.make_tokens(), small.make_tokens(small.ROWS[::-1], seed=5)
    probability_B = np.array([0.2, 0.9, np.nan, 0.6, np.nan, 1.0, 0.0, 0.5], np.float32)
    pairs = Pairs(
        chosen,
        rejected,
        noise.uniform(0.01, 0.1, 8).astype(np.float32),
        probability_B,
        noise.uniform(0, 1, 8).astype(np.float32),
    )
    scores = [
        np.asarray(small.score(small.LM, base, role, side), np.float64)
        for side in (chosen, rejected)
    ]
    for soft in (False, True):
        p_B = np.where(np.isnan(probability_B), 1.0, probability_B) if soft else np.ones(8)
        h_B = scores[0] - scores[1] - pairs.margin_B
        loss_B = p_B * np.logaddexp(0, -h_B) + (1 - p_B) * np.logaddexp(0, h_B)
        loss, logs = supervised.pairwise_objective(
            small.LM, {"reward": role}, base, pairs, None, soft_labels=soft
        )
        assert float(loss.mean) == pytest.approx(
            np.average(loss_B, weights=pairs.weight_B), rel=1e-4
        )
        assert float(logs["train/accuracy"].mean) == pytest.approx(
            np.average(scores[0] > scores[1], weights=pairs.weight_B), rel=1e-5
        )
    logps = [
        noise.normal(-2, 1, side.tokens_BT.shape).astype(np.float32) for side in (chosen, rejected)
    ]
    settings = {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.1, "mean": False}
    both = np.asarray(
        passes.sequence_logprobs(small.LM, base, role, passes.interleaved_pairs(pairs)), np.float64
    )
    ratios = [
        np.sum((own - reference) * side.response_BT, axis=1)
        for own, reference, side in zip(
            (both[0::2], both[1::2]), logps, (chosen, rejected), strict=True
        )
    ]
    h_B = 0.3 * (ratios[0] - ratios[1])
    for soft in (False, True):
        e_B = np.where(np.isnan(probability_B), 0.1, 1 - probability_B) if soft else np.full(8, 0.1)
        loss_B = (1 - e_B) * np.logaddexp(0, -h_B) + e_B * np.logaddexp(0, h_B)
        loss, _ = preference.preference_objective(
            small.LM,
            {"policy": role},
            base,
            Preferences(pairs, *logps),
            None,
            **settings,
            soft_labels=soft,
        )
        assert float(loss.mean) == pytest.approx(
            np.average(loss_B, weights=pairs.weight_B), rel=1e-4
        )


def test_settings_of_dpo_are_checked():
    for fields, message in (
        ({"loss": "hinge"}, "loss is 'hinge'; it must be one of dpo, ipo, kto, orpo."),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must lie in"),
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            "which ipo does not read; leave it out .dpo reads",
        ),
        ({"loss": "ipo", "soft_labels": True}, "soft_labels is True, which ipo does not read"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"stack_on": "y"}, "not both"),
    ):
        with pytest.raises(UserError, match=message):
            dpo_config("r", "m", "x", **fields)


def test_labels_that_are_probabilities(jobs, tmp_path):
    """Those above a half are a yes where ranks are measured, and all count as they are in the loss
    and in calibration.
    """
    label = lambda i: (0.1, 0.4, 0.7, 1.0)[i % 4]
    rows = [
        {"prompt": f"number {i}", "response": "tea " * (1 + i % 4), "label": label(i)}
        for i in range(60)
    ]
    for split, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = tiny.dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    commands.run_reward(
        tiny.reward_config(tmp_path / "reward", jobs.base, data=data, objective="pointwise")
    )
    results, scores = (
        tiny.read(tmp_path / "reward" / f"{name}.json") for name in ("evaluation", "scores")
    )
    labels, score = np.array([label(i) for i in range(50, 60)]), np.array(scores["score"])
    yes, no = score[labels > 0.5], score[labels < 0.5]
    assert results["auc"]["value"] == pytest.approx(
        np.mean((yes[:, None] > no) + 0.5 * (yes[:, None] == no))
    )
    assert results["brier"] == pytest.approx(np.mean((1 / (1 + np.exp(-score)) - labels) ** 2))


def test_comparisons_count_by_their_weights(jobs, tmp_path):
    """A ranking of four is six pairs and one line; what is cut off is said."""
    rank = ["tea", "tea with milk", "coffee", "a large cup of coffee with oat milk please"]
    rows = [
        {"prompt": f"number {i}", "ranked": rank}
        if i % 3 == 0
        else {"prompt": f"number {i}", "chosen": rank[i % 2], "rejected": rank[2]}
        for i in range(48)
    ]
    for split, part in (("train", rows[:24]), ("validation", rows[24:36]), ("test", rows[36:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = tiny.dataclasses.replace(
        tiny.DATA, task="jsonl", data_dir=str(tmp_path), evaluation_size=None, train_size=None
    )
    commands.run_reward(tiny.reward_config(tmp_path / "reward", jobs.base, data=data))
    results, scores = (
        tiny.read(tmp_path / "reward" / f"{name}.json") for name in ("evaluation", "scores")
    )
    found = get_task("jsonl").open("comparisons", "test", data)
    weights = [row["weight"] for row in found]
    assert len(weights) == 4 * 6 + 8 and sum(weights) == pytest.approx(12)
    right = np.array(scores["chosen"]) > np.array(scores["rejected"])
    assert results["pairwise_accuracy"]["value"] == pytest.approx(
        np.average(right, weights=weights)
    )
    assert (
        results["pairwise_accuracy"]["n"] == 32
        and results["pairwise_accuracy"]["groups"] == results["groups"] == 12
    )


def test_what_is_cut_off_is_said_once(jobs, tmp_path, capsys):
    commands.run_sft(tiny.sft_config(tmp_path / "sft", jobs.base, steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if " were cut " in line]
    first = tiny.rows(tmp_path / "sft")[0]
    for line, split, rows in zip(lines, ("train", "validation"), (32, 16), strict=True):
        cut, prompts, responses = (
            int(first[f"data/{split}/{name}"]) for name in ("cut", "cut_prompts", "cut_response")
        )
        lost = (
            f"{prompts} prompts lost their beginning (max_prompt_length 8), {responses} "
            "responses lost their end (max_response_length 8)"
        )
        assert line == f"orders, {split}: {cut} of {rows} rows were cut to fit: {lost}."


def test_pairs_of_equal_responses_are_said_and_count_in_no_accuracy(jobs, tmp_path, capsys):
    """Two of twelve pairs are equal, two more are equal in their first 8 tokens."""
    long = "add 1 large latte oat ; add 1"
    pair = lambda i: {
        0: ("tea", "tea"),
        1: (f"{long} small tea none", f"{long} large tea none"),
    }.get(i % 6, ("coffee tea", "milk"))
    for split in ("train", "validation", "test"):
        rows = [
            {"prompt": f"{split} number {i}", "chosen": pair(i)[0], "rejected": pair(i)[1]}
            for i in range(12)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tiny.dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    run_dpo(dpo_config(tmp_path / "dpo", jobs.base, jobs.policy, data=data, steps=6))
    said = capsys.readouterr().out
    for split in ("train", "validation", "test"):
        assert (
            said.count(
                f"jsonl, {split}: 2 of 12 pairs have equal responses, 2 more are equal after "
                "cutting: they count in no accuracy."
            )
            == 1
        )
    first, *_, last = tiny.rows(tmp_path / "dpo")
    assert (first["data/train/equal_pairs"], first["data/validation/equal_after_cutting"]) == (2, 2)
    # The pairs that differ are all in order; as wrong answers or halves the others would make it
    # 8/12 or 10/12.
    results = tiny.read(tmp_path / "dpo" / "evaluation.json")
    assert last["validation/accuracy"] == 1.0 and (
        results["pairwise_accuracy"]["value"],
        results["pairwise_accuracy"]["n"],
    ) == (1.0, 8)


def test_comparisons_none_of_which_differ_are_refused(jobs, tmp_path):
    long = "add 1 large latte oat ; add 1"
    rows = lambda a, b: [{"prompt": f"number {i}", "chosen": a, "rejected": b} for i in range(12)]
    apart, equal, after = (
        rows("coffee", "milk"),
        rows("tea", "tea"),
        rows(f"{long} small tea", f"{long} large tea"),
    )
    for name, test, message in (
        (
            "equal",
            equal,
            "Every comparison of the test split of jsonl has weight 0 or two equal responses; "
            "some must count.",
        ),
        (
            "after",
            after,
            "Every comparison of the train split of jsonl has two equal responses, cut to "
            "max_response_length 8 as they are; some must differ.",
        ),
    ):
        (tmp_path / name).mkdir()
        for split, found in (
            ("train", after if name == "after" else apart),
            ("validation", apart),
            ("test", test),
        ):
            (tmp_path / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in found)
            )
        data = tiny.dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path / name))
        with pytest.raises(UserError, match=f"^{message}$"):
            commands.run_reward(tiny.reward_config(tmp_path / f"run {name}", jobs.base, data=data))


def test_a_row_that_cannot_be_encoded_is_named_by_file_and_line(jobs, tmp_path):
    model = tiny.open_model(jobs.base)
    # Beyond the embedding, which has rows to spare.
    model.tokenizer.inner.add_special_tokens(
        {"additional_special_tokens": [*(f"<spare {i}>" for i in range(8)), "<image>"]}
    )
    rows = [
        {"prompt": f"number {i}", "response": "a <image>" if i == 3 else "tea"} for i in range(6)
    ]
    (tmp_path / "train.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    data = tiny.dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    given = of_split(data, "demonstrations", "train")
    # The first line is blank.
    with pytest.raises(
        UserError,
        match=r"train\.jsonl, line 5: A text holds <image>, for which the model has no embedding",
    ):
        loading.load_batches(model, given, "train", data, 4, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"soft_labels": True, "centring": 0.1},
        pytest.param({"objective": "regression"}, marks=pytest.mark.slow),
    ],
)
def test_rewards_of_other_objectives(fields, jobs, tmp_path):
    data = tiny.DATA
    if "objective" in fields:
        rows = [
            {"prompt": f"number {i}", "response": "tea " * (1 + i % 5), "rating": float(i % 5)}
            for i in range(60)
        ]
        for split, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in part)
            )
        data = tiny.dataclasses.replace(data, task="jsonl", data_dir=str(tmp_path))
    artefact = commands.run_reward(
        tiny.reward_config(tmp_path / "reward", jobs.base, data=data, **fields)
    )
    results = tiny.read(tmp_path / "reward" / "evaluation.json")
    record = tiny.open_model(jobs.base).load_role(artefact, "reward")[1]
    if "objective" in fields:
        assert (
            set(results) == {"correlation", "mean_squared_error", "n", "groups", "data"}
            and results["n"] == results["groups"] == 10
        )
        assert record.metrics == {"correlation": results["correlation"]["value"]}
    else:
        # The objective has the square in it: more than cross-entropy alone.
        assert 0 <= results["pairwise_accuracy"]["value"] <= 1
        plain = commands.run_reward(tiny.reward_config(tmp_path / "plain", jobs.base))
        assert (
            tiny.rows(tmp_path / "reward")[0]["train/loss"]
            != tiny.rows(tmp_path / "plain")[0]["train/loss"]
        )
        assert plain.exists()


def test_the_best_of_several_is_written(jobs, tmp_path):
    output = tmp_path / "best.jsonl"
    config = BestOfConfig(
        model=jobs.base,
        policy=str(jobs.policy),
        reward=(str(jobs.reward),),
        n=4,
        data=tiny.DATA,
        split="test",
        output=str(output),
        batch_size=32,
    )
    means = run_best_of(config)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(16)) and means["empty"] == 0
    assert {row["split"] for row in rows} == {"test"}
    assert (
        all(row["reward"] >= row["mean_reward"] for row in rows)
        and means["reward"] > means["mean_reward"]
    )
    # RL's reward, the KL aside: a response without an end pays its penalty.
    for row in rows:
        assert row["reward"] == pytest.approx(row["score"] - (not row["finished"]), abs=1e-6)
        assert row["mean_reward"] == pytest.approx(
            row["mean_score"] - (1 - row["mean_finished"]), abs=1e-6
        )
    for name, column in (
        ("score", "score"),
        ("reward", "reward"),
        ("eos_rate", "finished"),
        ("mean_eos_rate", "mean_finished"),
    ):
        assert means[name] == pytest.approx(np.mean([row[column] for row in rows]))
    assert 0 < means["mean_eos_rate"] < 1
    assert means["kl_bound"] == pytest.approx(math.log(4) - 3 / 4) and {"gold", "mean_gold"} <= set(
        means
    )
    with pytest.raises(UserError, match="exists already; give --output a file that does not"):
        run_best_of(config)


@pytest.mark.parametrize(
    "rollout",
    [
        RolloutConfig(top_k=1),
        pytest.param(RolloutConfig(top_p=1e-6, slots=8), marks=pytest.mark.slow),
    ],
)
def test_filters_reach_best_of_n(rollout, jobs, tmp_path):
    # With one token left to draw from, all samples of a prompt are one; at a temperature of 5 none
    # would be.
    data = dataclasses.replace(tiny.DATA, evaluation_size=4)
    settings = {
        "model": jobs.base,
        "reward": (str(jobs.reward),),
        "n": 4,
        "data": data,
        "split": "test",
        "batch_size": 16,
        "temperature": 5.0,
    }
    run_best_of(BestOfConfig(**settings, rollout=rollout, output=str(tmp_path / "a.jsonl")))
    run_best_of(BestOfConfig(**settings, output=str(tmp_path / "b.jsonl")))
    one, free = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    assert len(one) == 4 and all(
        row["score"] == pytest.approx(row["mean_score"], abs=1e-5) for row in one
    )
    assert all(row["score"] > row["mean_score"] + 1e-3 for row in free)


def test_the_best_is_the_one_that_rl_pays_most():
    texts_G = np.asarray(["cut off", "ended", "worse"], object)
    columns = {
        "score": np.asarray([0.9, 0.5, 0.4]),
        "reward": np.asarray([-0.1, 0.5, 0.4]),
        "finished": np.asarray([False, True, True]),
    }
    assert best_response(texts_G, columns) == {
        "response": "ended",
        "score": 0.5,
        "mean_score": pytest.approx(0.6),
        "reward": 0.5,
        "mean_reward": pytest.approx(0.8 / 3),
        "finished": True,
        "mean_finished": pytest.approx(2 / 3),
    }


# So hot that tokens are nearly equally likely, eos the first of them now and then; the rule likes
# that best.
EMPTY = {
    "terms": '[{"kind": "length", "maximum": 0}]',
    "temperature": 50.0,
    "n": 32,
    "batch_size": 64,
    "split": "test",
    "data": tiny.DATA,
}


def test_sft_reads_what_best_of_writes_and_empty_responses_are_left_out(jobs, tmp_path):
    output, prompts = tmp_path / "best" / "test.jsonl", tmp_path / "prompts"
    prompts.mkdir()
    # Every second prompt names its dialogue, which its demonstration is of too.
    asked = [
        {"prompt": row["prompt"]} | ({"group": f"talk {i}"} if i % 2 else {})
        for i, row in enumerate(get_task(ORDERS).open("prompts", "test", tiny.DATA))
    ]
    (prompts / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = EMPTY | {"data": dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(prompts))}
    means = run_best_of(BestOfConfig(model=jobs.base, output=str(output), **given))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert (
        means["empty"] > 0
        and len(rows) == 16 - means["empty"]
        and len({row["row"] for row in rows}) == len(rows)
    )
    # Means are over every prompt: an empty response is a response.
    assert means["score"] == pytest.approx(sum(row["score"] for row in rows) / 16) and means[
        "score"
    ] > np.mean([row["score"] for row in rows])
    data = tiny.dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(output.parent))
    read = of_split(data, "demonstrations", "test").rows("test")
    assert list(read) == [
        {
            "prompt": row["prompt"],
            "response": row["response"],
            **({} if row["finished"] else {"finished": False}),
            "group": asked[row["row"]].get("group", ""),
        }
        for row in rows
    ]
    # Rows of test prompts are not trained on: not from a single file, and not from another's name.
    single = dataclasses.replace(data, data_dir=str(output))
    with pytest.raises(UserError, match="jsonl has no demonstrations rows in its train split"):
        of_split(single, "demonstrations", "train")
    output.rename(output.with_name("train.jsonl"))
    with pytest.raises(
        UserError,
        match=r"train\.jsonl, line 1: the row's split is test, and the file holds the train split",
    ):
        of_split(data, "demonstrations", "train")


def test_no_file_is_written_where_every_best_response_is_empty(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        best_of, "response_texts", lambda tokenizer, rollout: [" "] * rollout.finished_B.shape[0]
    )
    with pytest.raises(
        UserError,
        match=r"^The best response is empty for all of the 16 prompts; there is nothing to write "
        r"to .*best\.jsonl\.$",
    ):
        run_best_of(BestOfConfig(model=jobs.base, output=str(tmp_path / "best.jsonl"), **EMPTY))
    assert not (tmp_path / "best.jsonl").exists()


def test_settings_of_best_of_are_checked():
    for fields, message in (
        ({"reward": ()}, "There is no reward: give --reward FOLDER or --terms JSON."),
        ({"n": 3, "batch_size": 8}, "it must be a multiple of n, 3"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        (
            {"shaping": ShapingConfig(whiten=True)},
            "shaping.whiten divides by the deviation over a training batch, which does not change "
            "which response is the best; leave it out.",
        ),
        (
            {"shaping": ShapingConfig(overlong_buffer=200)},
            "shaping.overlong_buffer is 200; a response has at most 128 tokens.",
        ),
    ):
        with pytest.raises(UserError, match=message):
            BestOfConfig(**{"model": "m", "output": "o", "reward": ("r",), **fields})
