"""The RL job by every policy gradient, and its rewards: what each run leaves and logs."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.data import packing as data_packing
from perl_jax.data.config import DataConfig
from perl_jax.errors import UserError
from perl_jax.evaluation import compare
from perl_jax.objectives.algorithms import ALGORITHMS, AlgorithmConfig
from perl_jax.rewards import scoring
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import trees
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training import commands, rl, rl_step
from perl_jax.training.rl_config import KLConfig
from perl_jax.types import Layout
from tests import small
from tests.rollouts import EOS, RECORD, Rehearsal, placed_model, prompts, rl_config
from tests.training import tiny

LM = small.changed(layers=2)
BASE = small.make_base(LM)
POLICY, REWARD = small.make_adapter(LM, head=False), small.make_adapter(LM, seed=7)


def rehearsal(
    name: str = "reinforce",
    kl: KLConfig = KLConfig(),
    stop_ids: tuple[int, ...] = (EOS,),
    mesh: MeshConfig = MeshConfig(data=1),
    **fields,
) -> Rehearsal:
    model = placed_model(LM, BASE, mesh, jax.devices()[: mesh.data])
    model.tokenizer.stop_ids = stop_ids
    algorithm = {
        field: fields.pop(field)
        for field in list(fields)
        if field in {f.name for f in dataclasses.fields(AlgorithmConfig)}
    }
    return Rehearsal(
        model,
        POLICY,
        REWARD,
        rl_config(algorithm=AlgorithmConfig(name, **algorithm), kl=kl, **fields),
    )


def some_prompts(run: Rehearsal, seed: int = 0):
    """As many prompts as a step of the run takes."""
    rows = run.config.batch_size // run.config.algorithm.group
    return jax.tree.map(lambda leaf: leaf[:rows], prompts(LM, seed))


# One step of each.


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("grpo", "ppo", "remax") else pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
def test_step_zero_of_every_algorithm(name):
    run = rehearsal(name, kl=KLConfig(beta=0.1))
    before = jax.device_get(run.state.roles)
    metrics = run.step(some_prompts(run))
    rule = ALGORITHMS[name]
    # On its own samples: no KL, every ratio 1, nothing clipped; and yet something to learn.
    assert metrics["kl/sequence"] == 0.0
    assert metrics.get("policy/clip_fraction") == (None if rule.pairs else 0.0)
    assert (
        metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
        and metrics["policy/ratio_deviation"] < 1e-5
    )
    assert metrics["policy/gradient_norm"] > 1e-3 and metrics["finite"] is True
    assert set(run.state.roles) == ({"policy", "value"} if rule.critic else {"policy"})
    assert ("value/explained_variance" in metrics) == rule.critic
    assert ("kl/loss" in metrics) == (rule.kl == "loss" and rule.pairs is None)
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(before), jax.tree.leaves(jax.device_get(run.state.roles)), strict=True
        )
    )
    second = run.step(some_prompts(run, seed=1))
    assert second["kl/sequence"] != 0.0 and int(run.state.step) == 2


def test_a_prompts_samples_differ_and_stay_together():
    run = rehearsal("grpo", samples=4)
    kept, sample = [], run.programs.sample
    run.programs.sample = lambda *arguments: kept.append(sample(*arguments)) or kept[0]
    run.step(some_prompts(run))
    tokens_BT, columns = np.asarray(kept[0].sequences.tokens_BT), 8
    assert (tokens_BT[:4, :columns] == tokens_BT[0, :columns]).all() and (
        tokens_BT[4:, :columns] == tokens_BT[4, :columns]
    ).all()
    assert (tokens_BT[0, :columns] != tokens_BT[4, :columns]).any()
    assert len(np.unique(tokens_BT[:4, columns:], axis=0)) > 1


def test_several_updates_a_rollout_move_the_ratio():
    run = rehearsal("ppo", epochs=3, minibatches=2)
    metrics = run.step(some_prompts(run))
    # The first of six updates is on the policy that sampled; the later ones are not.
    assert metrics["policy/ratio_deviation"] > 1e-4
    assert int(run.state.step) == 1
    counts = {int(leaf) for leaf in jax.tree.leaves(run.state.optimizers) if leaf.ndim == 0}
    assert max(counts) == 6


@pytest.mark.parametrize(
    ("algorithm", "microbatches", "mesh", "expected"),
    [
        ({"name": "ppo"}, 2, MeshConfig(data=1), Layout(0, 1, 1, 2)),
        pytest.param(
            {"name": "grpo"}, 1, MeshConfig(data=1), Layout(0, 1, 4, 1), marks=pytest.mark.slow
        ),
        pytest.param(
            {"name": "rloo", "samples": 2},
            1,
            MeshConfig(data=2),
            Layout(0, 2, 2, 1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_several_updates_learn_from_packed_rows_what_they_learn_from_padded_ones(
    algorithm, microbatches, mesh, expected, monkeypatch
):
    # Packed rows have no room to spare; and one token in six ends a response, far shorter than
    # the longest one.
    monkeypatch.setattr(data_packing, "ROLLOUT_MULTIPLE", 1)
    monkeypatch.setattr(data_packing, "ROLLOUT_LEVELS", 400)

    def run(packing: str, mesh: MeshConfig = MeshConfig(data=1)):
        data = DataConfig(max_prompt_length=8, max_response_length=40, packing=packing)
        fields = {
            "epochs": 2,
            "minibatches": 2,
            "microbatches": microbatches,
            "temperature": 1.3,
            "data": data,
        }
        run = rehearsal(**algorithm, stop_ids=tuple(range(2, 12)), mesh=mesh, **fields)
        seen, learn = [], run.programs.learn
        run.programs.learn = lambda state, base, batch, orders: (
            seen.append(batch.sequences.layout) or learn(state, base, batch, orders)
        )
        return (
            run.step(some_prompts(run)),
            trees.named_leaves(jax.device_get(run.state.roles)),
            seen[0],
        )

    (packed, roles, layout), (padded, others, none) = run("on", mesh), run("off")
    assert (
        none is None
        and dataclasses.replace(layout, capacity=0) == expected
        and packed.keys() == padded.keys()
    )
    for key in packed:
        assert packed[key] == pytest.approx(padded[key], rel=2e-4, abs=2e-5), key
    for key, leaf in roles.items():
        np.testing.assert_allclose(leaf, others[key], atol=1e-5, err_msg=key)


def test_the_coefficient_follows_the_kl():
    # At step 0 the KL is 0, below any target: 20 % less an episode horizon, here one batch.
    run = rehearsal("reinforce", kl=KLConfig(beta=0.5, target=6.0, horizon=8))
    assert run.step(some_prompts(run))["kl/beta"] == 0.5
    assert run.step(some_prompts(run))["kl/beta"] == pytest.approx(0.4)


def test_references_none_base_and_refreshed():
    # Without a reference the policy is compared with itself.
    run = rehearsal("rloo", kl=KLConfig(beta=0.0, reference="none"))
    metrics = [run.step(some_prompts(run, seed)) for seed in range(2)]
    assert all(row["kl/sequence"] == 0.0 for row in metrics) and "reference" not in run.state.frozen
    # The base is another model than the policy that starts from an adapter.
    run = rehearsal("rloo", kl=KLConfig(reference="base"))
    assert abs(run.step(some_prompts(run))["kl/sequence"]) > 0.01
    # Refreshed after each second step: the third begins at its reference again.
    run = rehearsal("rloo", kl=KLConfig(refresh=2))
    found = [run.step(some_prompts(run, seed))["kl/sequence"] for seed in range(3)]
    assert found[0] == 0.0 and found[1] != 0.0 and found[2] == 0.0


# Whole runs.


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_run_by_every_algorithm(name, jobs, tmp_path):
    algorithm = AlgorithmConfig(name, samples=2, epochs=2, minibatches=2)
    artefact = commands.run_rl(
        tiny.rl_config(
            tmp_path / "rl", jobs.base, jobs.policy, jobs.reward, algorithm=algorithm, steps=2
        )
    )
    rows = tiny.rows(tmp_path / "rl")
    assert len(rows) == 2 and all(
        math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)
    )
    assert (
        artefact.exists()
        and (tmp_path / "rl" / "adapters" / "value").exists() == ALGORITHMS[name].critic
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(jobs, tmp_path, monkeypatch):
    # Several updates a step, an adapting coefficient and a reference that is refreshed are all in
    # the checkpoint.
    fields = {
        "algorithm": AlgorithmConfig("grpo", samples=2, epochs=2, minibatches=2),
        "kl": KLConfig(target=1.0, horizon=16, refresh=1),
        "checkpoint_every": 1,
    }
    whole = commands.run_rl(
        tiny.rl_config(tmp_path / "whole", jobs.base, jobs.policy, jobs.reward, **fields)
    )
    save = Checkpoints.save

    def dies(self, state, *arguments):
        save(self, state, *arguments)
        if int(state.step) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    config = tiny.rl_config(tmp_path / "cut", jobs.base, jobs.policy, jobs.reward, **fields)
    with pytest.raises(KeyboardInterrupt):
        commands.run_rl(config)
    monkeypatch.undo()
    model = tiny.open_model(jobs.base)
    again = commands.run_rl(config)
    small.assert_same(
        jax.device_get(tiny.load(again, model)[0]), jax.device_get(tiny.load(whole, model)[0])
    )
    assert tiny.timeless(tmp_path / "cut") == tiny.timeless(tmp_path / "whole")


# Rewards.


@pytest.fixture(scope="module")
def second(jobs, tmp_path_factory):
    """Another reward model."""
    return commands.run_reward(
        tiny.reward_config(
            tmp_path_factory.mktemp("second"), jobs.base, seed=3, lora=LoRAConfig(rank=2)
        )
    )


def test_members_of_a_large_ensemble_keep_their_own_normalisations():
    """A state's roles come in the order of their names, in which reward_10 is before reward_2."""
    seen = []
    program = lambda base, roles, sequences: (
        seen.append([role.weights for role in roles]),
        (np.zeros(1), np.zeros((12, 1))),
    )[1]
    frozen = {scoring.role_name(i): types.SimpleNamespace(weights=i) for i in range(12)} | {
        "reference": types.SimpleNamespace(weights=-1)
    }
    scorer = scoring.Scorer(None, program, (), 1.0, None)
    scorer(
        jax.tree.map(lambda role: role, frozen),
        types.SimpleNamespace(sequences=None),
        np.zeros(1, int),
    )
    assert list(jax.tree.map(lambda role: role, frozen)) != list(frozen) and seen == [
        list(range(12))
    ]


@pytest.mark.parametrize(
    ("kl", "weight"),
    [
        (KLConfig(beta=0.25), 1.5),
        (KLConfig(beta=0.25, whole_score=True), 2.0),
        (KLConfig(beta=0.25, place="loss"), 2.0),
    ],
)
def test_a_value_head_that_begins_as_the_reward_models_speaks_of_returns(kl, weight):
    """V = w (s - mean) / std: in the units of R, without its KL."""
    config = rl_config(kl=kl, reward_weight=2.0)
    tokens = small.make_tokens()
    raw_B = np.asarray(small.score(LM, BASE, REWARD, tokens))
    role = REWARD.replace(head=rl.paid_head(config, config.reward_weight, REWARD, RECORD))
    np.testing.assert_allclose(
        small.score(LM, BASE, role, tokens), weight * (raw_B - 0.25) / 2.0, rtol=1e-4, atol=1e-5
    )


def test_explained_variance_and_spreads_by_hand():
    # Returns with mean 2 and mean square 12, errors with 1 and 3, advantages with 1 and 5:
    # variances 8, 2 and 4.
    sums = {"advantage": (1, 5), "return": (2, 12), "value/error": (1, 3)}
    values = {
        f"{name}/{kind}": float(x)
        for name, pair in sums.items()
        for kind, x in zip(("mean", "square"), pair, strict=True)
    }
    assert rl_step._derived(values) == {"advantage/std": 2.0, "value/explained_variance": 0.75}
    # Returns that do not vary have nothing to explain.
    values = {
        "advantage/mean": 0.0,
        "advantage/square": 0.0,
        "return/mean": 2.0,
        "return/square": 4.0,
        "value/error/mean": 0.0,
        "value/error/square": 1.0,
    }
    assert rl_step._derived(values)["value/explained_variance"] == 0.0


@pytest.mark.slow
def test_an_ensemble_and_terms_add_up(jobs, second, tmp_path):
    terms = json.dumps(
        [
            {"kind": "length", "weight": 0.5, "maximum": 2, "scale": 4},
            {"kind": "words", "words": ["milk"], "name": "milk"},
        ]
    )
    fields = {
        "reward": (str(jobs.reward), str(second)),
        "combine": "mean",
        "reward_weight": 2.0,
        "terms": terms,
        "steps": 2,
    }
    config = dataclasses.replace(
        tiny.rl_config(tmp_path / "rl", jobs.base, jobs.policy, "x"), **fields
    )
    commands.run_rl(config)
    for row in tiny.rows(tmp_path / "rl"):
        parts = 0.5 * row["reward/term/length"] + row["reward/term/milk"]
        assert row["reward/score"] == pytest.approx(
            row["reward/model_0"] + row["reward/model_1"] + parts, abs=1e-4
        )
        assert row["reward/disagreement"] > 0


@pytest.mark.slow
def test_an_evaluation_reports_the_reward_that_rl_was_paid(jobs, second, tmp_path):
    data = dataclasses.replace(tiny.DATA, evaluation_size=8)
    first, second = str(jobs.reward), str(second)

    def proxies(name, **fields):
        config = tiny.evaluate_config(
            tmp_path / name,
            jobs.base,
            policy=str(jobs.policy),
            temperature=0.0,
            data=data,
            **fields,
        )
        found = tiny.read(compare.run_evaluate(config) / "evaluation.json")
        samples = [
            json.loads(line)["rl"]
            for line in (tmp_path / name / "evaluation_samples.jsonl").read_text().splitlines()
        ]
        return np.array([row["proxy"] for row in samples]), [row["text"] for row in samples], found

    a, texts, _ = proxies("a", reward=(first,))
    b, _, _ = proxies("b", reward=(second,))
    assert np.abs(a - b).max() > 1e-3
    mean, same, found = proxies("mean", reward=(first, second), judge=(second, first))
    assert same == texts and np.allclose(mean, (a + b) / 2, atol=1e-5)
    assert found["policies"]["rl"]["judge_reward"]["value"] == pytest.approx(mean.mean(), abs=1e-5)
    terms = json.dumps([{"kind": "words", "words": ["add"]}])
    both, _, _ = proxies(
        "terms", reward=(first, second), combine="min", reward_weight=2.0, terms=terms
    )
    alone, _, found = proxies("alone", terms=terms)
    assert np.allclose(both, 2 * np.minimum(a, b) + alone, atol=1e-5)
    assert "judge_reward" not in found["policies"]["rl"]
    with pytest.raises(
        UserError, match=r"There is no reward: give --reward FOLDER or --terms JSON\."
    ):
        tiny.evaluate_config(tmp_path / "none", jobs.base, policy=str(jobs.policy))


@pytest.mark.slow
def test_rewards_without_a_model(jobs, tmp_path):
    path = tmp_path / "score.py"
    path.write_text(
        "def shout(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    terms = json.dumps([{"kind": "function", "function": f"{path}:shout"}])
    fields = {
        "reward": (),
        "terms": terms,
        "algorithm": AlgorithmConfig("rloo", samples=2),
        "steps": 2,
    }
    commands.run_rl(
        dataclasses.replace(tiny.rl_config(tmp_path / "rl", jobs.base, jobs.policy, "x"), **fields)
    )
    rows = tiny.rows(tmp_path / "rl")
    assert all(
        row["reward/score"] == pytest.approx(row["reward/term/function"], rel=1e-5)
        and row["reward/score"] > 1
        for row in rows
    )


@pytest.mark.slow
def test_a_term_that_misbehaves_stops_the_run_with_a_sentence(jobs, tmp_path):
    path = tmp_path / "score.py"
    path.write_text("def bad(prompts, responses):\n    return [float('nan')] * len(responses)\n")
    terms = json.dumps([{"kind": "function", "function": f"{path}:bad"}])
    with pytest.raises(UserError, match="bad"):
        commands.run_rl(
            dataclasses.replace(
                tiny.rl_config(tmp_path / "rl", jobs.base, jobs.policy, jobs.reward), terms=terms
            )
        )


@pytest.mark.slow
def test_penalties_reach_the_return(jobs, tmp_path):
    shaping = ShapingConfig(missing_eos_penalty=50.0)
    commands.run_rl(
        tiny.rl_config(
            tmp_path / "rl",
            jobs.base,
            jobs.policy,
            jobs.reward,
            shaping=shaping,
            kl=KLConfig(beta=0.0),
            steps=2,
        )
    )
    for row in tiny.rows(tmp_path / "rl"):
        assert row["reward/return"] == pytest.approx(
            row["reward/score"] - 50 * (1 - row["response/eos_rate"]), abs=1e-3
        )
