"""Validation in RL: means over held-out prompts against a measurement of each response by itself,
and the step that is kept.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from perl_jax.data.tasks import get_task
from perl_jax.errors import TrainingError
from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.curves import kept_sentence
from perl_jax.evaluation.report.load import read_experiment
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.runtime import trees
from perl_jax.training import commands, loop, rl, rl_validation
from tests import small
from tests.paths import ORDERS
from tests.training import tiny

RLOO = AlgorithmConfig(name="rloo", samples=2)


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


def samples(run) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(jobs, tmp_path_factory):
    """Six prompts, whose second batch is half filled up; every step is validated."""
    folder = tmp_path_factory.mktemp("validated")
    config = tiny.rl_config(
        folder,
        jobs.base,
        jobs.policy,
        jobs.reward,
        algorithm=RLOO,
        evaluate_every=1,
        steps=3,
        validation_prompts=6,
    )
    commands.run_rl(config)
    return folder, config


def test_samples_are_of_held_out_prompts_with_their_own_rewards(ran):
    folder, config = ran
    task = get_task(ORDERS)
    held_out = [row["prompt"] for row in task.open("prompts", "validation", config.data)][:6]
    found = samples(folder)
    # Step 0 is what the start policy writes.
    assert [row["step"] for row in found] == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert {row["split"] for row in found} == {"validation"}
    assert [row["prompt"] for row in found[:6]] == [row["prompt"] for row in found[6:12]]
    assert {row["prompt"] for row in found} == set(held_out) and len(held_out) == 6
    gold = task.gold([row["prompt"] for row in found], [row["response"] for row in found])
    np.testing.assert_allclose([row["gold"] for row in found], gold)
    assert all(isinstance(row["finished"], bool) for row in found)
    # A reward of a single part has no parts. The KL is measured by validations alone.
    assert not any("parts" in row for row in found)
    assert ["kl" in row for row in found] == [False] * 6 + [True] * 18


def test_the_page_says_which_step_was_kept(ran):
    folder, _ = ran
    (run,) = read_experiment(folder).runs
    rewards = {row["step"]: row["validation/reward"] for row in tiny.rows(folder)}
    best = max(rewards, key=rewards.get)
    assert kept_sentence(run).startswith(
        "RL, LoRA: the policy is that of "
        f"{'the last step, 3' if best == 3 else f'step {best} of 3'}, where"
    )
    assert kept_sentence(run).endswith(
        f"the validation reward was {formats.significant(rewards[best])}."
    )


def test_means_are_those_of_responses_measured_one_by_one(jobs, model, monkeypatch):
    """Every response's score by a forward pass of its own, and its KL by log-probabilities of its
    own; filler counts nothing.
    """
    kept = {}

    def remember(job, batches, state):
        rollouts, sample = [], job.programs.sample

        def sampling(*args):
            rollouts.append(sample(*args))
            return rollouts[-1]

        job.programs.sample = sampling
        kept["means"], _ = validate(job, batches, state)
        job.programs.sample = sample
        kept["roles"] = jax.tree.map(
            np.array, (state.roles["policy"], state.frozen["reference"], state.frozen["reward"])
        )
        kept["rollouts"] = jax.device_get(rollouts)
        return kept["means"], []

    validate = rl.validate
    monkeypatch.setattr(rl, "validate", remember)
    record = tiny.load(jobs.reward, model)[1]
    folder = jobs.root / "measured"
    commands.run_rl(
        tiny.rl_config(
            folder,
            jobs.base,
            jobs.policy,
            jobs.reward,
            algorithm=RLOO,
            steps=1,
            validation_prompts=6,
        )
    )
    policy, reference, reward = kept["roles"]
    scores, kls, lengths, ended = [], [], [], []
    for rollout in kept["rollouts"]:
        tokens = rollout.sequences
        rows = np.flatnonzero(tokens.valid_BT.any(axis=1))
        scores.append(
            record.normalise(np.asarray(small.score(model.lm, model.base, reward, tokens)))[rows]
        )
        logps = [
            np.asarray(
                jax.nn.log_softmax(
                    np.asarray(small.logits(model.lm, model.base, role, tokens)) / 0.7
                )
            )
            for role in (policy, reference)
        ]
        for b in rows:
            at = np.flatnonzero(tokens.response_BT[b])
            ids = tokens.tokens_BT[b][at]
            kls.append(
                sum(
                    float(logps[0][b, t - 1, i] - logps[1][b, t - 1, i])
                    for t, i in zip(at, ids, strict=True)
                )
            )
            lengths.append(len(at))
            ended.append(ids[-1] in model.tokenizer.stop_ids)
    assert len(lengths) == 12
    means = kept["means"]
    assert means["validation/reward"] == pytest.approx(
        np.mean(np.concatenate(scores)), rel=1e-4, abs=1e-5
    )
    assert (
        means["validation/kl"] == pytest.approx(np.mean(kls), rel=1e-3, abs=1e-5)
        and abs(np.mean(kls)) > 1e-4
    )
    assert means["validation/length"] == np.mean(lengths) and means[
        "validation/eos_rate"
    ] == np.mean(ended)


REWARDS = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.1}


def run_with(monkeypatch, seen: dict, config, stop: int | None = None):
    """A run whose validations say what REWARDS do; ended in the middle of a step if asked."""

    def validate(job, batches, state):
        step = int(state.step)
        seen[step] = jax.tree.map(np.array, state.roles["policy"])
        return {"validation/reward": REWARDS[step]}, [{"prompt": "p", "response": str(step)}]

    check = loop.check_finite

    def interrupted(folder, at, metrics):
        if at == stop:
            raise KeyboardInterrupt
        check(folder, at, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "validate", validate)
        patch.setattr(loop, "check_finite", interrupted)
        return commands.run_rl(config)


@pytest.mark.parametrize(("select", "step"), [("best", 2), ("last", 4)])
def test_the_selected_step_is_kept_and_said_after_a_resume(
    select, step, jobs, model, tmp_path, monkeypatch, capsys
):
    seen = {}
    config = tiny.rl_config(
        tmp_path,
        jobs.base,
        jobs.policy,
        jobs.reward,
        evaluate_every=1,
        checkpoint_every=2,
        keep=1,
        select=select,
    )
    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, seen, config, stop=4)
    artefact = run_with(monkeypatch, seen, config)
    adapter, record = tiny.load(artefact, model)
    assert record.step == step and record.metrics == {"validation/reward": REWARDS[step]}
    small.assert_same(jax.tree.map(np.asarray, adapter), seen[step])
    assert any(
        np.any(a != b)
        for a, b in zip(
            trees.named_leaves(seen[2]).values(), trees.named_leaves(seen[4]).values(), strict=True
        )
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == sorted(
        {str(step), "4"}
    )
    # Samples after the checkpoint that the run went on from were cut off and made again; those of
    # the start policy were kept.
    found = samples(tmp_path)
    assert [row["response"] for row in found if row["step"]] == ["1", "2", "3", "4"]
    assert [row["step"] for row in found] == [0] * 8 + [1, 2, 3, 4]
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("rl: the artefacts are of step")
    ]
    assert len(said) == 1 and said[0].startswith(f"rl: the artefacts are of step {step}")


def test_without_a_validation_split_the_last_step_is_kept_and_that_is_said_once(
    jobs, tmp_path, capsys
):
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"add {n} large latte oat ; here"}) + "\n" for n in "12345678"
        )
    )
    data = dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path))
    commands.run_rl(
        tiny.rl_config(tmp_path / "run", jobs.base, jobs.policy, jobs.reward, data=data, steps=2)
    )
    said = capsys.readouterr().out
    assert (
        said.count(
            "There are no validation prompts in jsonl: nothing is validated, and the last step "
            "is kept."
        )
        == 1
    )
    assert tiny.read(tmp_path / "run" / "adapters" / "policy" / "artefact.json")["step"] == 2
    # What is shown then comes from the training prompts, at the start and at the end.
    found = samples(tmp_path / "run")
    assert [(row["step"], row["split"]) for row in found] == [(0, "train")] * 8 + [(2, "train")] * 8
    assert [row["prompt"] for row in found[:8]] == [row["prompt"] for row in found[8:]]


def test_a_reward_that_is_not_finite_stops_the_run(jobs, tmp_path, monkeypatch):
    original = rl_validation.gold_rewards

    def gold(job, row_B, rollout):
        values = original(job, row_B, rollout)
        return np.full_like(values, np.nan) if len(job.rows) == 6 else values

    monkeypatch.setattr(rl_validation, "gold_rewards", gold)
    with pytest.raises(
        TrainingError, match=r"The validation of step 1 gave NaN or infinity .validation/gold."
    ):
        commands.run_rl(
            tiny.rl_config(
                tmp_path, jobs.base, jobs.policy, jobs.reward, steps=1, validation_prompts=6
            )
        )
