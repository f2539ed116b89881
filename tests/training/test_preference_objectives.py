"""KTO, ORPO and online DPO as jobs: their first step, what they learn and write, resume, packing,
devices.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.errors import UserError
from perl_jax.models import passes
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.rewards.models import reward
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training import dpo
from perl_jax.training.commands import DPOCommand, run_dpo
from perl_jax.training.configs import DPOConfig
from perl_jax.training.fit import begin, learn_program
from perl_jax.training.optimizers import OptimizerConfig
from perl_jax.training.rl import train_rl
from perl_jax.training.rl_config import KLConfig, RLConfig
from perl_jax.types import Labelled
from tests import small
from tests.rollouts import OPTIMIZER, Rehearsal, even_base, placed_model, prompts, rl_config
from tests.training import tiny
from tests.training.test_run import HARD, Interrupted, assert_same_runs, interrupt_at, saved_state


def config(run, base: str, loss: str, **fields) -> DPOCommand:
    return DPOCommand(**tiny.common(run=str(run), model=base, loss=loss, **fields))


def test_settings_are_read_by_their_losses():
    for fields, message in (
        ({"loss": "kto", "beta": 0.0}, "beta is 0.0; it must be a finite number greater than 0."),
        (
            {"loss": "orpo", "beta": 0.1},
            "beta is 0.1, which orpo does not read; leave it out (dpo, ipo, kto read it).",
        ),
        (
            {"loss": "dpo", "desirable_weight": 2.0},
            "desirable_weight is 2.0, which dpo does not read; leave it out (kto reads it).",
        ),
        ({"loss": "kto", "undesirable_weight": 0.0}, "undesirable_weight is 0.0"),
        ({"loss": "kto", "token_mean": True}, "(dpo, ipo read it)"),
        ({"loss": "ipo", "odds_weight": 0.2}, "(orpo reads it)"),
        ({"loss": "orpo", "odds_weight": -1.0}, "odds_weight is -1.0"),
    ):
        with pytest.raises(UserError) as error:
            DPOConfig(**fields)
        assert message in str(error.value)
    assert DPOConfig(loss="kto").strength == 0.1
    with pytest.raises(ValueError, match="orpo has no reference and so no beta"):
        _ = DPOConfig(loss="orpo").strength


def test_weights_are_advised_where_classes_are_uneven():
    labels = np.array([1.0] * 30 + [0.0] * 10)
    kto = lambda **fields: DPOConfig(loss="kto", **fields)
    assert dpo.said_balance(kto(), labels) == (
        "30 desirable and 10 undesirable responses count as 3.00 to 1; KTO's paper advises 1 to "
        "1.33: set undesirable_weight to 3, or desirable_weight to 0.333."
    )
    assert dpo.said_balance(kto(undesirable_weight=3.0), labels) is None
    assert dpo.said_balance(kto(), labels[20:]) is None


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.exhaustive)])
def test_kto_moves_labelled_responses_apart(tuning, jobs, tmp_path):
    fields = {"steps": 12, "beta": 0.5, "undesirable_weight": 0.5, "tuning": tuning}
    artefact = run_dpo(config(tmp_path, jobs.base, "kto", **fields))
    first, *_, last = rows = tiny.rows(tmp_path)
    # The policy is the reference: every sigmoid is a half, and no number has moved.
    assert 0.25 <= first["train/loss"] <= 0.5
    for name in ("kto/kl", "kto/desirable_reward", "kto/undesirable_reward"):
        assert first[name] == pytest.approx(0, abs=1e-5)
    assert all(row["kto/kl"] >= 0 for row in rows)
    assert last["kto/desirable_reward"] > last["kto/undesirable_reward"] + 0.1
    validated = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert validated[-1] < validated[0] and last["validation/accuracy"] > 0.5
    results = tiny.read(tmp_path / "evaluation.json")
    assert results["auc"]["n"] == 16 and 0 <= results["auc"]["value"] <= 1
    record = tiny.load(artefact, tiny.open_model(jobs.base))[1]
    assert record.metrics == {"auc": results["auc"]["value"]} and record.step == 12


@pytest.mark.slow
def test_orpo_raises_the_odds_without_a_reference(jobs, tmp_path):
    artefact = run_dpo(config(tmp_path, jobs.base, "orpo", steps=12, odds_weight=1.0))
    first, *_, last = tiny.rows(tmp_path)
    for name in ("train/loss", "orpo/sft_loss", "orpo/odds_loss"):
        assert last[name] < first[name]
    assert first["train/loss"] == pytest.approx(first["orpo/sft_loss"] + first["orpo/odds_loss"])
    results = tiny.read(tmp_path / "evaluation.json")
    assert set(results) == {"pairwise_accuracy", "data"}
    assert tiny.load(artefact, tiny.open_model(jobs.base))[1].step == 12
    # Nothing is computed with a reference, and no checkpoint holds one.
    assert dpo.job_of(DPOConfig(loss="orpo")).prepare is None
    assert not [name for name in saved_state(tmp_path) if "reference" in name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["kto", "orpo"])
def test_an_interrupted_run_goes_on_bit_for_bit(loss, jobs, tmp_path, monkeypatch):
    start = lambda folder: run_dpo(config(folder, jobs.base, loss, **HARD))
    start(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            start(tmp_path / "parts")
    start(tmp_path / "parts")
    model = tiny.open_model(jobs.base)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", ("policy",), model)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", pytest.param("orpo", marks=pytest.mark.exhaustive)])
def test_packed_microbatches_give_what_a_padded_batch_does(loss, jobs, tmp_path):
    def run(packing: str, microbatches: int) -> list[dict]:
        folder = tmp_path / f"{packing}{microbatches}"
        data = dataclasses.replace(tiny.DATA, packing=packing, max_prompt_length=40)
        run_dpo(config(folder, jobs.base, loss, data=data, microbatches=microbatches, steps=2))
        # At first rounding alone says which of two equal rewards is greater.
        return [
            {name: value for name, value in row.items() if "accuracy" not in name}
            for row in tiny.timeless(folder)
        ]

    whole = run("off", 1)
    for rows in (run("on", 2), run("off", 4)):
        for row, expected in zip(rows, whole, strict=True):
            assert row == {
                name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in expected.items()
            }


LM = small.changed(layers=2, vocab_size=64)
BASE = even_base(LM)


def kto_update(mesh: MeshConfig | None, microbatches: int):
    """The new policy and the metrics of one KTO update whose policy is not the reference."""
    devices = {} if mesh is None else {"mesh": mesh, "devices": jax.devices()}
    model = placed_model(LM, BASE, **devices)
    settings = DPOConfig(
        loss="kto",
        beta=0.7,
        undesirable_weight=2.0,
        batch_size=8,
        optimizer=OPTIMIZER,
        microbatches=microbatches,
    )
    job = dpo.job_of(settings)
    reference = small.make_adapter(LM, head=False, seed=9)
    state, optimizers = begin(
        model, settings, job, small.make_adapter(LM, head=False), {"reference": reference}
    )
    rows = Labelled(
        small.make_tokens(),
        (np.arange(8) % 3 == 0).astype(np.float32),
        np.where(np.arange(8) == 5, 0, 1).astype(np.float32),
        small.make_tokens(small.ROWS[::-1], seed=5),
    )
    batch = job.ready(model, state, rows)
    objective = lambda *inputs: job.objective(model.lm, *inputs)
    state, metrics = learn_program(model, settings, objective, state, optimizers)(
        state, model.base, batch
    )
    return jax.device_get((state.roles["policy"], metrics, batch.kl_B))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        (MeshConfig(data=8), 1),
        (None, 4),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 2, marks=pytest.mark.exhaustive),
    ],
)
def test_the_kl_is_the_whole_batchs_on_any_mesh_and_in_any_microbatches(mesh, microbatches):
    policy, metrics, kl_B = kto_update(None, 1)
    role, reference = small.make_adapter(LM, head=False), small.make_adapter(LM, head=False, seed=9)
    other = small.make_tokens(small.ROWS[::-1], seed=5)
    logp = lambda adapter: np.asarray(
        passes.sequence_logprobs(LM, BASE, adapter, other), np.float64
    )
    ratio_B = np.sum((logp(role) - logp(reference)) * other.response_BT, axis=1)
    expected = max(0.0, ratio_B[np.arange(8) != 5].mean())
    assert expected > 0.01
    np.testing.assert_allclose(kl_B, np.full(8, expected), rtol=1e-3)
    found, found_metrics, found_B = kto_update(mesh, microbatches)
    np.testing.assert_allclose(found_B, kl_B, rtol=1e-4)
    for name, value in metrics.items():
        assert found_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(policy), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3), rtol=0)


def test_rows_of_one_class_are_refused(jobs, tmp_path):
    rows = [{"prompt": f"number {i}", "response": "tea", "label": 1} for i in range(12)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="labels of one class only; it needs rows with label 0"):
        run_dpo(config(tmp_path / "run", jobs.base, "kto", data=data))


# Online DPO.


def test_settings_of_online_dpo_are_checked():
    online = lambda **fields: RLConfig(algorithm=AlgorithmConfig("online-dpo"), **fields)
    for fields, message in (
        (
            {"kl": KLConfig(beta=0.0)},
            "kl.beta 0.0; online-dpo compares the policy with a reference",
        ),
        ({"kl": KLConfig(beta=0.0, reference="none")}, "kl.reference is none and kl.beta 0.0"),
        ({"kl": KLConfig(place="reward")}, "kl.place is 'reward', which online-dpo does not read"),
        ({"kl": KLConfig(estimator="k2")}, "kl.estimator is 'k2', which online-dpo does not read"),
        (
            {"batch_size": 12, "microbatches": 4},
            "batch_size is 12; online-dpo keeps a prompt's samples together, so it must be a "
            "multiple of algorithm.samples times algorithm.minibatches times microbatches, 8.",
        ),
    ):
        with pytest.raises(UserError) as error:
            online(**fields)
        assert message in str(error.value)


def online_steps(mesh: MeshConfig | None, **fields):
    """Policy and metrics after two steps of online DPO, each with its own prompts."""
    devices = {} if mesh is None else {"mesh": mesh, "devices": jax.devices()}
    settings = rl_config(
        algorithm=AlgorithmConfig("online-dpo", samples=fields.pop("samples", 2)),
        kl=KLConfig(beta=0.3),
        temperature=1.0,
        data=DataConfig(max_prompt_length=8, max_response_length=6, packing="off"),
        **fields,
    )
    policy = small.make_adapter(LM, head=False)
    run = Rehearsal(
        placed_model(LM, BASE, **devices), policy, small.make_adapter(LM, seed=7), settings
    )
    rows = settings.batch_size // settings.algorithm.group
    some = lambda seed: jax.tree.map(lambda leaf: leaf[:rows], prompts(LM, seed))
    first, second = run.step(some(0)), run.step(some(1))
    return jax.device_get(run.state.roles["policy"]), first, second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        (None, {"microbatches": 2}),
        pytest.param(MeshConfig(data=8), {}, marks=pytest.mark.exhaustive),
        pytest.param(MeshConfig(data=4, fsdp=2), {"microbatches": 2}, marks=pytest.mark.exhaustive),
        pytest.param(None, {"microbatches": 2, "samples": 4}, marks=pytest.mark.exhaustive),
    ],
)
def test_pairs_are_compared_whole_on_any_mesh_and_in_any_microbatches(mesh, fields):
    samples = {"samples": fields["samples"]} if "samples" in fields else {}
    policy, first, second = online_steps(None, **samples)
    # The policy is its reference at first.
    assert first["policy/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["preference/untied"] == 1.0 and first["preference/accuracy"] == 0.5
    assert second["preference/chosen_reward"] != 0.0
    found, *metrics = online_steps(mesh, **fields)
    for ours, theirs in zip(metrics, (first, second), strict=True):
        for name in ("policy/loss", "policy/gradient_norm", "preference/chosen_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(policy), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5 * max(np.abs(b).max(), 1e-3), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gain"),
    [("online-dpo", 0.1), pytest.param("online-ipo", 0.04, marks=pytest.mark.exhaustive)],
)
def test_online_dpo_raises_its_reward(name, gain, base):
    """The reward is the share of "a" in a response; packed, in two updates a step. IPO stops at a
    difference of 1 / (2 beta).
    """
    model = tiny.open_model(base)
    rows = [{"prompt": f"number {i}"} for i in range(32)]
    trained = train_rl(
        model,
        rows,
        RLConfig(
            algorithm=AlgorithmConfig(name, samples=4, minibatches=2),
            kl=KLConfig(beta=0.1),
            temperature=1.0,
            steps=25,
            batch_size=32,
            microbatches=2,
            optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
            data=DataConfig(max_prompt_length=8, max_response_length=8),
        ),
        rewards=[reward(share_of_a)],
    )
    scores = [row["reward/score"] for row in trained.metrics]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + gain


def share_of_a(prompts, responses, rows):
    return [response.count("a") / max(len(response), 1) for response in responses]
