"""Numbers that jobs report, from outputs of models that are made up: means, orders of rows, ties,
keys.
"""

from __future__ import annotations

import functools
import json
import math
import types

import jax
import numpy as np
import pytest

from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset, of_rows
from perl_jax.evaluation import best_of, compare, intervals
from perl_jax.evaluation.compare import Evaluation, Responses
from perl_jax.generation.sampling import Rollout
from perl_jax.models import passes
from perl_jax.objectives.losses import LossSum
from perl_jax.rewards import compose, scoring
from perl_jax.runs import folder as folder_lib
from perl_jax.runs import provenance
from perl_jax.runs.run import Run
from perl_jax.runtime import sharding
from perl_jax.runtime.hosts import Share
from perl_jax.training import commands, dpo, fit, reward, rl_programs, rl_step
from perl_jax.training import loop as loop_lib
from perl_jax.training.commands import DPOCommand
from perl_jax.training.rl_config import KLConfig
from perl_jax.training.state import TrainState
from perl_jax.types import Labelled, Prompts, Tokens

# Rows of two batches as a plan has them: not in order, the last one filler.
ROWS = (np.array([3, 0, 2]), np.array([1, 4, -1]))
MODEL = types.SimpleNamespace(
    name="made up",
    lm=types.SimpleNamespace(config=types.SimpleNamespace(dtype="float32")),
    base=None,
    mesh=None,
    tokenizer=types.SimpleNamespace(
        without_end=lambda ids: [i for i in ids if i != 9],
        text=lambda ids, special=False: " ".join(map(str, ids)),
    ),
)


class Planned:
    """Batches of the rows above."""

    microbatches = 1
    rows = types.SimpleNamespace(
        prompts=range(5), equal=np.zeros(5, bool), different=np.ones(5, bool), facts={}
    )

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return map(self.make, ROWS)

    def rows_of(self, index: int) -> np.ndarray:
        return ROWS[index]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Batches stay on the host."""
    monkeypatch.setattr(sharding, "put_batch", lambda batch, mesh: batch)


def responses(gold: list[float], proxy: list[float]) -> Responses:
    number = len(gold)
    return Responses(
        [""] * number,
        [[]] * number,
        np.ones(number, bool),
        np.zeros(number),
        {"proxy": np.array(proxy)},
        np.array(gold),
    )


def test_equal_rewards_are_ties_and_the_judge_is_the_one_that_is_named():
    # By gold one win, one loss, two ties; by the proxy three wins and a tie.
    policy, baseline = (
        responses([1.0, 0.25, 0.5, 0.5], [2.0, 2.0, 2.0, 1.0]),
        responses([0.5, 0.75, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]),
    )
    found = compare.compare(policy, baseline, "gold")
    rate = found["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"], rate["judge"]) == (
        1,
        2,
        1,
        0.5,
        "gold",
    )
    assert found["gold_gain"]["value"] == 0.0
    rate = compare.compare(policy, baseline, "proxy")["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (3, 1, 0, 0.875)


def test_an_evaluation_keeps_each_prompts_numbers_together():
    """What is measured comes in the prompts' order, filler left out; no two batches have one
    key.
    """
    keys = []

    def sample(base, policy, prompts: Prompts, key) -> Rollout:
        keys.append(np.asarray(key).tolist())
        # Row r says r + 1 tokens, the last of them the stop token where r is even.
        row_B = np.maximum(prompts.row_B, 0)
        response_BT = (np.arange(8) >= 2) & (np.arange(8) < 3 + row_B[:, None])
        tokens_BT = np.where(
            np.arange(8) == 2 + row_B[:, None],
            np.where(row_B % 2 == 0, 9, 1)[:, None],
            10 + row_B[:, None],
        ).astype(np.int32)
        return Rollout(
            Tokens(tokens_BT, response_BT | (np.arange(8) < 2), response_BT),
            np.zeros((3, 8), np.float32),
            row_B % 2 == 0,
            np.int32(1),
        )

    logprobs = lambda base, policy, sequences: np.full(
        sequences.tokens_BT.shape, {"tuned": -1.0, "start": -1.5}[policy], np.float32
    )
    scorer = lambda models, rollout, row_B: (100.0 + np.asarray(row_B, np.float32), {})
    prompts = lambda row_B: Prompts(
        np.zeros((3, 2), np.int32), np.ones((3, 2), bool), row_B.astype(np.int32)
    )
    rows = [{"prompt": f"prompt {i}"} for i in range(5)]
    gold = lambda prompts, texts: [float(prompt.split()[1]) / 4 for prompt in prompts]
    job = Evaluation(
        MODEL,
        sample,
        logprobs,
        {"proxy": (scorer, {})},
        Planned(prompts),
        rows,
        gold,
        5,
    )
    found, asked = compare.respond(job, "tuned", "start")
    assert asked == [f"prompt {i}" for i in range(5)]
    assert found.texts == ["", "11 1", "12 12", "13 13 13 1", "14 14 14 14"]
    assert found.tokens[:3] == [[9], [11, 1], [12, 12, 9]]
    assert found.finished.tolist() == [True, False, True, False, True]
    assert found.kl.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert found.rewards["proxy"].tolist() == [100.0, 101.0, 102.0, 103.0, 104.0]
    assert found.gold.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(keys) == 2 and keys[0] != keys[1]


def test_scores_come_back_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(
        reward,
        "score_program",
        lambda lm, microbatches: lambda base, adapter, batch: (10.0 * batch, 20.0 * batch),
    )
    chosen, rejected = reward.score_batches(
        MODEL, types.SimpleNamespace(weights=None), Planned(lambda rows: rows.astype(float))
    )
    assert chosen.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0] and rejected.tolist() == [
        0.0,
        20.0,
        40.0,
        60.0,
        80.0,
    ]


def test_a_held_out_loss_is_over_all_rows():
    """Batches of 3 and of 2 rows, of means 2 and 7: 4, and not 4.5."""
    parts = {
        3: (
            LossSum(np.float32(6.0), np.float32(3.0)),
            {"log": LossSum(np.float32(1.0), np.float32(4.0))},
        ),
        1: (
            LossSum(np.float32(14.0), np.float32(2.0)),
            {"log": LossSum(np.float32(3.0), np.float32(1.0))},
        ),
    }
    job = types.SimpleNamespace(ready=lambda model, state, batch: batch)
    state = types.SimpleNamespace(roles={"policy": types.SimpleNamespace(weights=None)})
    measure = lambda roles, frozen, batch: parts[int(batch[0])]
    assert fit.held_out_loss(MODEL, job, measure, state, Planned(lambda rows: rows)) == {
        "loss": 4.0,
        "log": pytest.approx(4 / 5),
    }


def test_held_out_rows_are_measured_without_dropout():
    keys = []

    def objective(roles, frozen, part, key):
        keys.append(key)
        return LossSum(np.float32(1.0), np.float32(1.0)), {}

    fit._held_out(objective, 1, {}, None, Labelled(None, np.zeros(2), np.ones(2)))
    jax.eval_shape(lambda batch: fit._held_out(objective, 2, {}, None, batch), np.zeros((4, 3)))
    assert keys == [None, None]


def test_a_rewards_scores_are_normalised_by_their_mean_and_deviation(monkeypatch):
    asked = []
    monkeypatch.setattr(
        reward,
        "load_batches",
        lambda model, dataset, split, *_, most: asked.append((split, most)),
    )
    monkeypatch.setattr(
        reward, "score_batches", lambda *_: (np.float32([1.0, 3.0]), np.float32([5.0, 7.0]))
    )
    config = commands.RewardCommand(run="-", model="-")
    assert reward.reference_moments(None, None, config, None) == (
        4.0,
        pytest.approx(5**0.5),
    )
    assert asked == [("train", 512)]


def rollout_of(*texts: list[int]) -> Rollout:
    tokens_BT, mask_BT = np.zeros((len(texts), 4), np.int32), np.zeros((len(texts), 4), bool)
    for row, ids in enumerate(texts):
        tokens_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, True
    return Rollout(
        Tokens(tokens_BT, mask_BT, mask_BT),
        np.zeros(tokens_BT.shape),
        np.ones(len(texts), bool),
        np.int32(0),
    )


def test_a_reward_is_the_models_by_its_weight_and_the_terms_by_theirs(monkeypatch):
    """2 x score - 0.5 x the share of excess words + 3 where an 8 is said."""
    monkeypatch.setattr(sharding, "row_share", lambda mesh: Share(0, 1, (0,)))
    terms = compose.read_terms(
        '[{"kind": "length", "weight": 0.5, "maximum": 1, "scale": 4}, {"kind": "words", "words": '
        '["8"], "weight": 3}]'
    )
    program = lambda base, roles, sequences: (np.float32([1.0, -1.0, 0.25]), None)
    frozen = {"reward": types.SimpleNamespace(weights=None)}
    rollout, rows = rollout_of([7], [7, 7, 9], [7, 8, 7]), [{"prompt": "a"}]
    score_B, logs = scoring.Scorer(MODEL, program, terms, 2.0, rows)(
        frozen, rollout, np.zeros(3, int)
    )
    np.testing.assert_allclose(score_B, [2.0, -2.0 - 0.5 / 4, 0.5 - 0.5 * 2 / 4 + 3])
    assert logs == {
        "reward/term/length": pytest.approx(-0.25),
        "reward/term/words": pytest.approx(1 / 3),
    }
    # Without terms, and without a model.
    assert scoring.Scorer(MODEL, program, (), 2.0, rows)(frozen, rollout, np.zeros(3, int))[
        0
    ].tolist() == [2.0, -2.0, 0.5]
    np.testing.assert_allclose(
        scoring.Scorer(MODEL, None, terms, 1.0, rows)({}, rollout, np.zeros(3, int))[0],
        [0.0, -0.125, 2.75],
    )


@pytest.mark.parametrize(("combine", "expected"), [("mean", [2.0, 0.5]), ("min", [1.0, -1.0])])
def test_an_ensemble_pays_the_mean_or_the_least_of_normalised_scores(
    combine, expected, monkeypatch
):
    monkeypatch.setattr(passes, "scores", lambda lm, base, adapter, tokens: adapter.scores_B)
    member = lambda *scores: types.SimpleNamespace(weights=None, scores_B=np.float32(scores))
    record = lambda mean, std: types.SimpleNamespace(normalise=lambda scores: (scores - mean) / std)
    tokens = rollout_of([7], [7]).sequences
    score_B, scores_MB = scoring._scores(
        None,
        (record(1.0, 2.0), record(0.0, 1.0)),
        combine,
        None,
        1,
        None,
        (member(7.0, -1.0), member(1.0, 2.0)),
        tokens,
    )
    assert scores_MB.tolist() == [[3.0, -1.0], [1.0, 2.0]] and score_B.tolist() == expected


def test_dpos_accuracy_is_of_chosen_above_rejected_by_the_rows_own_weights(monkeypatch):
    """Row r's log-ratios are r - 2 and 0.5 - r / 4; rows 3 and 4 are in order, and weigh 4 + 5 of
    15.
    """
    monkeypatch.setattr(dpo, "load_batches", lambda *_, **__: Planned(lambda rows: rows))
    rows = [
        {
            "prompt": "p",
            "group": row // 2 or "0",
            "weight": 1.0 + row,
            "chosen": "a",
            "rejected": "b",
        }
        for row in range(5)
    ]
    dataset = of_rows("comparisons", rows, test=rows)
    monkeypatch.setattr(
        dpo, "Program", lambda *_, **__: lambda base, policy, batch: (batch - 2.0, 0.5 - batch / 4)
    )
    config = DPOCommand(run="-", model="-")
    job = types.SimpleNamespace(
        ready=lambda model, state, batch: batch, kind="comparisons", others=False
    )
    state = types.SimpleNamespace(roles={"policy": types.SimpleNamespace(weights=None)})
    found = dpo.evaluate_dpo(MODEL, dataset, config, job, state)["pairwise_accuracy"]
    # Row 2 is a tie.
    assert found["value"] == pytest.approx((4 + 5 + 3 / 2) / 15) and found["n"] == 5
    # The groups are of the same rows: (0, 1), (2, 3), (4).
    expected = intervals.proportion([0, 0, 0.5, 1, 1], [0, 0, 1, 1, 2], [1, 2, 3, 4, 5])
    assert [found[name] for name in ("low", "high", "groups")] == [
        pytest.approx(expected.low),
        pytest.approx(expected.high),
        3,
    ]
    # Row 2's responses are equal as they were cut: in no order, it does not count.
    equal = np.arange(5) == 2
    rows = types.SimpleNamespace(prompts=range(5), equal=equal, different=~equal, facts={})
    monkeypatch.setattr(Planned, "rows", rows)
    found = dpo.evaluate_dpo(MODEL, dataset, config, job, state)["pairwise_accuracy"]
    assert found["value"] == pytest.approx((4 + 5) / 12) and found["n"] == 4


def test_the_bound_of_best_of_n_by_hand():
    assert best_of.kl_bound(1) == 0.0 and best_of.kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_a_run_goes_on_with_what_decides_its_numbers():
    before = {
        "seed": 0,
        "keep": 2,
        "checkpoint_every": 5,
        "run": "a",
        "data": {"task": "orders", "bucket_count": 4},
    }
    assert (
        folder_lib._differences(before, before | {"keep": 3, "checkpoint_every": 1, "run": "b"})
        == []
    )
    after = before | {"seed": 1, "data": {"task": "orders", "bucket_count": 1}}
    assert folder_lib._differences(before, after) == [
        ("data.bucket_count was 4, is now 1", "--data.bucket-count 4"),
        ("seed was 0, is now 1", "--seed 0"),
    ]


def test_other_weights_under_the_path_of_an_artefact_are_noticed(tmp_path):
    """An artefact of format 1, which has no digests: its files are compared."""
    folder = tmp_path / "below"
    (folder / "tree").mkdir(parents=True)
    values = {
        "role": "policy",
        "tuning": "lora",
        "lora": None,
        "has_head": False,
        "base_name": "-",
        "base_fingerprint": "-",
        "tokenizer_fingerprint": "-",
        "step": 1,
        "metrics": {},
    }
    (folder / "artefact.json").write_text(json.dumps(values | {"format": 1}))
    (folder / "tree" / "leaf").write_text("0.25")
    config = commands.SFTCommand(run="-", model=str(tmp_path / "none"), stack_on=str(folder))
    before = provenance.fingerprints("sft", config)
    assert provenance.changed(before, provenance.fingerprints("sft", config)) == []
    (folder / "tree" / "leaf").write_text("0.75")
    assert provenance.changed(before, provenance.fingerprints("sft", config)) == [
        f"the frozen artefact {folder}"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
    ],
)
def test_every_file_of_a_tokenizer_is_compared(name, tmp_path):
    before = provenance.tokenizer_content(tmp_path)
    (tmp_path / "model.safetensors").write_text("not of the tokenizer")
    assert provenance.tokenizer_content(tmp_path) == before
    (tmp_path / name).write_text("{}")
    assert provenance.tokenizer_content(tmp_path) != before


@pytest.mark.parametrize(
    ("kl", "beta"), [(3.0, 0.1 * 1.1), (2.2, 0.1 * 1.05), (1.0, 0.1 * 0.9), (2.0, 0.1)]
)
def test_the_coefficient_rises_where_the_kl_is_above_its_target(kl, beta):
    """50 episodes of a horizon of 100: half of the error, which is 0.2 at most."""
    config = types.SimpleNamespace(kl=KLConfig(beta=0.1, target=2.0, horizon=100), batch_size=50)
    state = TrainState(
        np.int32(1), {}, {}, {}, np.zeros(2, np.uint32), {"beta": jax.device_put(np.float32(0.1))}
    )
    assert float(
        rl_step._controlled(config, None, state, np.float32(kl)).controls["beta"]
    ) == pytest.approx(beta)


def test_the_reference_becomes_the_policy_every_so_many_steps():
    config = types.SimpleNamespace(kl=KLConfig(refresh=3), batch_size=50)
    policy, start = (
        Adapter(lora={"q": jax.device_put(np.float32([number]))}) for number in (2.0, 1.0)
    )
    found = []
    for step in range(1, 7):
        state = TrainState(
            np.int32(step), {"policy": policy}, {}, {"reference": start}, np.zeros(2, np.uint32), {}
        )
        found.append(
            rl_step._controlled(
                config, functools.partial(rl_programs._refreshed, "float32"), state, np.float32(0.0)
            )
            .frozen["reference"]
            .lora["q"]
            .tolist()
        )
    assert found == [[1.0], [1.0], [2.0], [1.0], [1.0], [2.0]]


class Kept:
    """Checkpoints in memory."""

    def __init__(self, best: int, state: TrainState | None = None):
        self.best, self.states, self.cursors = best, {}, {}
        if state is not None:
            self.save(state, {"cursor": int(state.step)})

    def save(self, state, host, metrics=None):
        self.states[int(state.step)], self.cursors[int(state.step)] = (
            jax.tree.map(np.array, state),
            dict(host),
        )

    def latest_step(self):
        return max(self.states, default=None)

    def restore_best(self, abstract):
        return self.restore(abstract, self.best)

    def restore(self, abstract, step=None):
        step = self.latest_step() if step is None else step
        return jax.device_put(self.states[step]), self.cursors[step]

    restore_newest = restore

    def close(self):
        pass


class Counted:
    """Batches that are their own numbers."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        self.next += 1
        return self.next

    def get_state(self):
        return self.next

    def set_state(self, state):
        self.next = state


@pytest.mark.parametrize("done", [None, 2])
@pytest.mark.parametrize(("best", "step"), [("validation/reward", 3), (None, 4)])
def test_a_run_does_each_step_once_and_gives_back_the_best(done, best, step, tmp_path, monkeypatch):
    seen = []
    state = TrainState(
        jax.device_put(np.int32(done or 0)), {}, {}, {}, jax.device_put(np.zeros(2, np.uint32))
    )

    def advance(state, batch):
        seen.append(batch)
        return state.replace(step=state.step + 1), {"finite": True}, {}

    loop = loop_lib.Loop(
        "rl", advance, Counted(), lambda state: ({"validation/reward": 0.0}, []), best, ()
    )
    config = types.SimpleNamespace(
        steps=4,
        evaluate_every=1,
        checkpoint_every=1,
        keep=2,
        tensorboard=False,
        wandb=False,
        wandb_project=None,
        wandb_name=None,
        profile=None,
        profiled=(),
    )
    kept = Kept(3, None if done is None else state)
    monkeypatch.setattr(loop_lib, "open_keeper", lambda *_: kept)
    found, _, rows = loop_lib.train(config, state, loop, Run(tmp_path))
    assert [row["step"] for row in rows][-2:] == [3, 4]
    assert int(found.step) == step and seen == ([1, 2, 3, 4] if done is None else [3, 4])


def test_the_step_to_keep_is_chosen_by_validation_rows(monkeypatch):
    monkeypatch.setattr(
        fit,
        "load_batches",
        lambda model, dataset, split, data, size, seed, parts, others: (split, seed),
    )
    for name in ("learn_program", "held_out_program", "say_start"):
        monkeypatch.setattr(fit, name, lambda *_: None)
    monkeypatch.setattr(fit, "noted", lambda *_: {})
    validate = lambda model, loss, state, batches, truth: {"batches": batches, "truth": truth}
    job = fit.Supervised(
        "reward",
        "reward",
        "labels",
        lambda *_: None,
        validate,
        "x",
        (),
        truth=lambda rows, task, split: (*rows, split),
    )
    config = commands.RewardCommand(run="-", model="-")
    splits = {"judge": ["judge"], "validation": ["held out"]}
    dataset = Dataset("rows", "labels", splits, None, None)
    loop, _ = fit.supervised_loop(MODEL, dataset, "judge", config, job, None, {})
    assert tuple(loop.batches) == ("judge", 0) and loop.best == "x"
    assert loop.validate(None) == (
        {"batches": ("validation", None), "truth": ("held out", "validation")},
        [],
    )
    # Without such rows nothing is validated, and the last step is kept.
    apart = Dataset("rows", "labels", {"judge": ["judge"]}, None, None)
    loop, _ = fit.supervised_loop(MODEL, apart, "judge", config, job, None, {})
    assert loop.validate is None and loop.best is None
