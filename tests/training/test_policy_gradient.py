"""One RL update: the return worked out by hand, what holds exactly at step 0, keys, the base."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.full import full_weights
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.data.config import DataConfig
from perl_jax.data.packing import ROLLOUT_LEVELS
from perl_jax.errors import TrainingError
from perl_jax.generation import sampling
from perl_jax.generation.config import RolloutConfig
from perl_jax.generation.sampling import Rollout
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import supervised
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.runtime import trees
from perl_jax.training import rl_programs
from perl_jax.training import step as step_lib
from perl_jax.training.experience import Judged, assemble, one_pass
from perl_jax.training.rl_config import KLConfig
from perl_jax.types import Pairs, Prompts, Tokens, Tree
from tests import small
from tests.rollouts import Rehearsal, placed_model, prompts, rl_config

LM = small.changed(layers=2)
BASE = small.make_base(LM)
FRESH = small.make_fresh(LM)
TRAINED = small.make_adapter(LM, head=False)
REWARD = small.make_adapter(LM, seed=7)


# Returns.


def rollout() -> Rollout:
    """Three rows of 2, 3 and 0 response tokens; the second did not end; the third is filler."""
    response_BT = np.array([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    valid_BT = response_BT | np.array([[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    tokens = Tokens(np.arange(15, dtype=np.int32).reshape(3, 5), valid_BT, response_BT)
    return Rollout(
        tokens,
        np.where(response_BT, -1.0, 0.0).astype(np.float32),
        np.array([True, False, False]),
        np.int32(3),
    )


def assembled(score_B, policy_BT, reference_BT, beta: float, penalty: float = 0.0, **fields):
    """What `assemble` makes of the rollout above, by REINFORCE unless an algorithm is given."""
    config = rl_config(
        shaping=ShapingConfig(missing_eos_penalty=penalty), max_response=3, batch_size=4, **fields
    )
    return assemble(
        config, 1, False, Judged(rollout(), score_B, policy_BT, np.float32(beta), reference_BT)
    )


def test_return_by_hand():
    # d = log pi - log pi_ref: 0.5 and -0.25 in the first row, 1, 2 and 3 in the second.
    reference_BT = np.full((3, 5), -1.5, np.float32)
    d_BT = np.array([[9, 9, 0.5, -0.25, 9], [9, 9, 1, 2, 3], [9, 9, 9, 9, 9]], np.float32)
    score_B = np.array([2.0, 4.0, 100.0], np.float32)
    experience, statistics = assembled(score_B, reference_BT + d_BT, reference_BT, 0.25, 1.5)
    # KL: 0.25 and 6. R = 0.75 * 2 - 0.25 * 0.25, and 0.75 * (4 - 1.5) - 0.25 * 6.
    target_BT = [[0, 0, 1.4375, 1.4375, 0], [0, 0, 0.375, 0.375, 0.375], [0] * 5]
    np.testing.assert_allclose(experience.target_BT, target_BT, rtol=1e-6)
    assert experience.advantage_BT is None and experience.reference_BT is None
    expected = {
        "reward/score": 3.0,
        "reward/score_std": 1.0,
        "reward/return": (1.4375 + 0.375) / 2,
        "kl/sequence": 3.125,
        "kl/token": 6.25 / 5,
        "kl/beta": 0.25,
        "response/length": 2.5,
        "response/eos_rate": 0.5,
    }
    values = dict(statistics.values)
    # The sampler said -1; the trainer -1, -1.75, and then -0.5, 0.5, 1.5.
    mismatch = np.mean(np.exp([0, 0.75, 0.5, 1.5, 2.5]))
    assert float(values.pop("sampler/mismatch")) == pytest.approx(mismatch, rel=1e-6)
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        expected, rel=1e-6
    )
    assert bool(statistics.finite)
    np.testing.assert_array_equal(experience.old_logp_BT, reference_BT + d_BT)


def test_a_kl_in_the_loss_leaves_the_return_alone():
    reference_BT = np.full((3, 5), -1.5, np.float32)
    policy_BT = reference_BT + np.float32(0.5)
    score_B = np.array([2.0, 4.0, 0.0], np.float32)
    experience, statistics = assembled(
        score_B, policy_BT, reference_BT, 0.25, 1.5, kl=KLConfig(beta=0.25, place="loss")
    )
    np.testing.assert_allclose(experience.target_BT[:2, 2], [2.0, 2.5])
    np.testing.assert_array_equal(experience.reference_BT, reference_BT)
    np.testing.assert_array_equal(experience.kl_weight_B, np.float32(0.25))
    assert float(statistics.values["kl/sequence"]) == pytest.approx((1.0 + 1.5) / 2)


def test_a_whole_score_is_not_weighed():
    logp_BT = np.full((3, 5), -1.0, np.float32)
    score_B = np.array([2.0, 4.0, 0.0], np.float32)
    target_BT = assembled(
        score_B, logp_BT + np.float32(0.5), logp_BT, 0.25, kl=KLConfig(whole_score=True)
    )[0].target_BT
    # Two and three tokens of 0.5 each.
    np.testing.assert_allclose(target_BT[:2, 2], [2.0 - 0.25 * 1.0, 4.0 - 0.25 * 1.5], rtol=1e-6)


def test_missing_eos_costs_its_penalty():
    logp_BT = np.full((3, 5), -1.0, np.float32)
    score_B = np.array([2.0, 4.0, 0.0], np.float32)
    for penalty in (0.0, 1.0, 10.0):
        target_BT = assembled(score_B, logp_BT, logp_BT, 0.0, penalty)[0].target_BT
        np.testing.assert_allclose(target_BT[:2, 2], [2.0, 4.0 - penalty])


def test_scores_are_clipped_whitened_and_then_penalised():
    logp_BT = np.full((3, 5), -1.0, np.float32)
    score_B = np.array([2.0, 9.0, 77.0], np.float32)
    # Clipped: 2, 5. Whitened over the two rows that are real: mean 3.5, deviation 1.5 * sqrt 2. The
    # second row has 3 of 3 tokens, both of the buffer's.
    shaping = ShapingConfig(
        clip=5.0, whiten=True, missing_eos_penalty=0.5, overlong_penalty=2.0, overlong_buffer=2
    )
    config = rl_config(shaping=shaping, max_response=3, batch_size=4)
    target_BT = assemble(
        config, 1, False, Judged(rollout(), score_B, logp_BT, np.float32(0), logp_BT)
    )[0].target_BT
    spread = 1.5 / (1.5 * np.sqrt(2))
    # The first has 2 tokens: one of the buffer's.
    np.testing.assert_allclose(
        target_BT[:2, 2], [3.5 - spread - 1.0, 3.5 + spread - 0.5 - 2.0], rtol=1e-5
    )


def test_equal_log_probabilities_leave_the_score_alone():
    logp_BT = -np.random.default_rng(0).random((3, 5), np.float32)
    experience, statistics = assembled(np.ones(3, np.float32), logp_BT, logp_BT, 0.2)
    np.testing.assert_allclose(experience.target_BT[:2, 2], 0.8, rtol=1e-6)
    assert float(statistics.values["kl/sequence"]) == 0.0


@pytest.mark.parametrize("where", ["score", "policy"])
def test_assemble_sees_nan(where):
    score_B, logp_BT = np.ones(3, np.float32), np.full((3, 5), -1.0, np.float32)
    if where == "score":
        score_B[1] = np.nan
    else:
        logp_BT[0, 2] = np.nan
    assert not assembled(score_B, logp_BT, np.full((3, 5), -1.0, np.float32), 0.1, 1.0)[1].finite


def test_columns_outside_the_response_do_not_matter():
    logp_BT = np.where(rollout().sequences.response_BT, -1.0, np.nan).astype(np.float32)
    experience, statistics = assembled(np.ones(3, np.float32), logp_BT, logp_BT, 0.1, 1.0)
    assert np.isfinite(experience.target_BT).all() and bool(statistics.finite)
    assert all(np.isfinite(value) for value in statistics.values.values())


# Step 0, by the job's own programs.


@pytest.mark.parametrize("name", ["fresh", "trained", pytest.param("full", marks=pytest.mark.slow)])
def test_step_zero(name):
    policy = {"fresh": FRESH, "trained": TRAINED, "full": full_weights(BASE)}[name]
    config = rl_config(tuning="full" if name == "full" else "lora")
    run = Rehearsal(placed_model(LM, BASE), policy, REWARD, config)
    # Copies: a view of a buffer would keep it from being given away.
    before = jax.tree.map(np.array, run.state)
    base = trees.named_leaves(run.model.base)
    copy = jax.tree.map(np.array, base)
    state = run.state
    metrics = run.step(prompts(LM))
    # Policy and reference are one, through one program: not nearly 0, but 0.
    assert metrics["kl/sequence"] == 0.0 and metrics["kl/token"] == 0.0
    assert metrics["policy/ratio_deviation"] < 1e-5 and abs(metrics["sampler/mismatch"] - 1) < 1e-5
    # Fresh adapters (B = 0) do learn: the gradient of B is there from the beginning.
    assert metrics["policy/gradient_norm"] > 0.1 and metrics["value/gradient_norm"] > 0.1
    assert metrics["finite"] is True
    after = jax.device_get(run.state)
    assert np.any(after.roles["value"].head["kernel"] != before.roles["value"].head["kernel"])
    if name == "fresh":
        for path, leaf in trees.named_leaves(after.roles["policy"]).items():
            assert np.any(
                leaf != trees.named_leaves(before.roles["policy"])[path]
            ) == path.endswith("lora_b"), path
    # What is not trained is as it was, the very same buffers; what is was given away.
    small.assert_same(after.frozen, before.frozen)
    small.assert_same(jax.device_get(base), copy)
    assert not any(leaf.is_deleted() for leaf in base.values())
    assert [n for n, leaf in trees.named_leaves(state.roles).items() if not leaf.is_deleted()] == []
    pointers = {leaf.unsafe_buffer_pointer() for leaf in base.values()}
    assert not any(leaf.unsafe_buffer_pointer() in pointers for leaf in jax.tree.leaves(run.state))
    if name != "full":
        assert not any(path.endswith(own) for path in trees.named_leaves(run.state) for own in base)
    # One step on the policy has left its anchor.
    second = run.step(prompts(LM, seed=1))
    assert second["kl/sequence"] != 0.0 and int(run.state.step) == 2


# The policy's log-probabilities by a pass before the update, or by the update itself.

ONE_PASS = {
    "reinforce": {"microbatches": 2},
    "rloo": {"microbatches": 2},
    "rloo, padded": {"microbatches": 2, "packing": "off"},
    "rloo, whole score": {"kl": KLConfig(whole_score=True)},
    "remax": {"microbatches": 4},
    "remax, samples": {"samples": 2, "microbatches": 2},
    "grpo": {"microbatches": 2},
    "grpo, base": {"kl": KLConfig(reference="base")},
    "dr-grpo, no reference": {"kl": KLConfig(reference="none", beta=0.0)},
    "gspo": {},
    "reinforce-mean": {},
    "ppo": {},
    "reinforce, KL in the loss": {"microbatches": 2, "kl": KLConfig(place="loss")},
}


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("rloo", "grpo") else pytest.param(case, marks=pytest.mark.slow)
        for case in ONE_PASS
    ],
)
def test_one_pass_is_the_update_of_two(case, monkeypatch):
    settings = dict(ONE_PASS[case])
    data = DataConfig(
        max_prompt_length=8, max_response_length=6, packing=settings.pop("packing", "auto")
    )
    algorithm = AlgorithmConfig(name=case.partition(",")[0], samples=settings.pop("samples", None))
    config = rl_config(algorithm=algorithm, **settings)
    config = dataclasses.replace(config, data=data)
    found = {}
    for one in (True, False):
        if not one:
            monkeypatch.setattr(rl_programs, "one_pass", lambda *_: False)
        run = Rehearsal(placed_model(LM, BASE), TRAINED, REWARD, config)
        assert run.programs.one_pass == one
        # The second step's policy is not the reference.
        batch = lambda seed: jax.tree.map(
            lambda leaf: leaf[: 8 // config.algorithm.group], prompts(LM, seed)
        )
        found[one] = [run.step(batch(seed)) for seed in range(2)], jax.device_get(run.state.roles)
    (steps_of_one, roles_of_one), (steps_of_two, roles_of_two) = found[True], found[False]
    assert steps_of_one[0]["kl/sequence"] == 0.0 if config.kl.reference == "start" else True
    assert steps_of_one[1]["kl/sequence"] != 0.0 or config.kl.reference == "none"
    for one, two in zip(steps_of_one, steps_of_two, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=2e-4, abs=2e-5), name
    for name, leaf in trees.named_leaves(roles_of_one).items():
        np.testing.assert_allclose(
            leaf, trees.named_leaves(roles_of_two)[name], atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        # Nor are a prompt's samples to be torn apart where a greedy response is compared with each.
        ({"algorithm": AlgorithmConfig(name="remax", samples=2), "microbatches": 8}, False),
        ({"algorithm": AlgorithmConfig(name="reinforce", samples=2), "microbatches": 8}, False),
        ({"algorithm": AlgorithmConfig(epochs=2)}, False),
        ({"algorithm": AlgorithmConfig(minibatches=2)}, False),
        # The batch's mean and deviation are not a microbatch's.
        ({"algorithm": AlgorithmConfig(name="reinforce-mean"), "microbatches": 2}, False),
        ({"algorithm": AlgorithmConfig(name="ppo"), "microbatches": 2}, False),
        ({"algorithm": AlgorithmConfig(name="ppo", whiten=False), "microbatches": 2}, True),
        # Eight microbatches of one row would tear a prompt's samples apart.
        ({"algorithm": AlgorithmConfig(name="rloo"), "microbatches": 8}, False),
        ({"algorithm": AlgorithmConfig(name="rloo"), "microbatches": 2}, True),
    ],
)
def test_when_one_pass_will_do(fields, expected):
    assert one_pass(rl_config(**fields), 1, dropout=0.0) == expected
    assert not one_pass(rl_config(**fields), 1, dropout=0.1)


def test_samples_that_do_not_divide_over_the_mesh_take_two_passes():
    config = rl_config(algorithm=AlgorithmConfig(name="rloo", samples=2), microbatches=2)
    assert [one_pass(config, parts, dropout=0.0) for parts in (1, 2, 4)] == [True, True, False]
    assert one_pass(dataclasses.replace(config, microbatches=1), 4, dropout=0.0)


def test_step_zero_of_a_reward_reaches_its_head():
    chosen, rejected = small.make_tokens(), small.make_tokens(small.ROWS[::-1], seed=5)
    batch = Pairs(chosen, rejected, np.ones(8, np.float32))
    role = FRESH.replace(head=small.make_head(LM))
    grads = jax.jit(
        lambda role: small.update_gradients(
            lambda *a: supervised.pairwise_objective(LM, *a), {"reward": role}, BASE, batch, None, 1
        )[2]
    )(role)
    norms = {
        name: float(np.linalg.norm(leaf))
        for name, leaf in trees.named_leaves(grads["reward"]).items()
    }
    assert norms["head/kernel"] > 0.01
    # B is 0, so nothing reaches A yet.
    assert all(
        (norm > 0) == name.endswith("lora_b") for name, norm in norms.items() if "lora" in name
    )


def test_a_value_head_that_begins_at_zero_predicts_zero():
    run = Rehearsal(placed_model(LM, BASE), TRAINED, REWARD, rl_config())
    metrics = run.step(prompts(LM))
    # V = 0: the advantage is the return, and the value loss the sum of squared returns.
    assert metrics["advantage/mean"] == pytest.approx(metrics["return/mean"], rel=1e-6)
    assert metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-5)
    square = metrics["advantage/std"] ** 2 + metrics["advantage/mean"] ** 2
    assert metrics["value/loss"] == pytest.approx(square * metrics["response/length"], rel=1e-4)


# Keys.


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_key_is_used_twice(microbatches, monkeypatch):
    """Two updates with dropout: every key that anything is handed is new."""
    seen: list[tuple] = []

    def note(what: str, key: jax.Array) -> None:
        # Of a batch of keys every one counts.
        data = jax.random.key_data(key)
        jax.debug.callback(
            lambda data: seen.extend(
                (what, *one) for one in np.asarray(data).reshape(-1, data.shape[-1]).tolist()
            ),
            data,
        )

    def noting(owner, name: str, position: int) -> None:
        original = getattr(owner, name)

        def noted(*arguments, **more):
            note(name, arguments[position])
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, noted)

    # (self, base, adapter, tokens, valid, temperature, key); (self, base, adapter, tokens, valid,
    # key); ...
    noting(LanguageModel, "logprobs", 6)
    noting(LanguageModel, "values", 5)
    noting(sampling, "sample_tokens", 0)
    noting(step_lib, "mean_gradients", 3)
    noting(jax.random, "bernoulli", 0)
    original = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a: note("sample", a[5]) or original(*a))
    monkeypatch.setattr(
        passes,
        "sequence_logprobs",
        lambda lm, base, adapter, tokens, **_: jnp.zeros(tokens.tokens_BT.shape),
    )
    # A shape and dropout of its own: what other tests have traced knows nothing of the notes.
    lora = LoRAConfig(rank=2, dropout=0.25, targets="q,v")
    policy = LM.init_adapter(jax.random.key(0), lora)
    run = Rehearsal(
        placed_model(LM, BASE),
        policy,
        REWARD,
        rl_config(max_response=4 + microbatches, microbatches=microbatches, max_mismatch=1e9),
    )
    for seed in range(2):
        run.step(prompts(LM, seed))
    jax.effects_barrier()
    counts = {what: sum(name == what for name, *_ in seen) for what in {name for name, *_ in seen}}
    # Two roles, two layers, two projections; the sampler draws once for each row and token of the
    # longest response.
    rows = run.config.batch_size
    whole = {
        "mean_gradients": 2,
        "sample": 2,
        "logprobs": 2 * microbatches,
        "values": 2 * microbatches,
        "bernoulli": 2 * microbatches * 8,
    }
    assert counts == whole | {"sample_tokens": counts["sample_tokens"]} and 2 * rows <= counts[
        "sample_tokens"
    ] <= 2 * rows * (4 + microbatches)
    keys = [tuple(key) for _, *key in seen]
    assert len(set(keys)) == len(keys)


# Stopping.


def test_a_sampler_that_disagrees_stops_the_run(monkeypatch):
    honest = sampling.sample_prompts

    def biased(*arguments):
        made = honest(*arguments)
        return made.replace(logp_BT=made.logp_BT - 0.5)

    monkeypatch.setattr(sampling, "sample_prompts", biased)
    # exp 0.5 = 1.6487.
    run = Rehearsal(placed_model(LM, BASE), TRAINED, REWARD, rl_config(max_mismatch=1.6))
    with pytest.raises(
        TrainingError, match=r"Step 1: .* = 1\.6487, above max_mismatch = 1\.6; the run stopped"
    ):
        run.step(prompts(LM))


# Shapes.


def talkative() -> tuple[Tree, Adapter]:
    """A base and a policy whose responses have all lengths within a few dozen steps, short ones and
    ones of the most tokens.
    """
    noise = np.random.default_rng(0)
    move = lambda share, leaf: leaf + share * noise.standard_normal(leaf.shape).astype(leaf.dtype)
    base = trees.map_named(
        lambda name, leaf: move(0.2, leaf) if name.endswith("scale") else leaf,
        jax.jit(LM.init_base)(jax.random.key(0)),
    )
    noise = np.random.default_rng(1)
    fresh = LM.init_adapter(jax.random.key(1), small.LORA)
    return base, fresh.replace(lora=jax.tree.map(lambda leaf: move(0.1, leaf), fresh.lora))


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "minibatches"), [(None, 1), (4, 1), (None, 2)])
def test_two_hundred_ragged_steps_compile_no_more_than_the_first(slots, minibatches):
    # Prompts of two padded lengths and responses of any length; packed to one of a few sizes.
    config = rl_config(
        algorithm=AlgorithmConfig(name="rloo", samples=4, minibatches=minibatches),
        rollout=RolloutConfig(slots=slots),
        max_response=16,
        temperature=1.3,
    )
    base, policy = talkative()
    run = Rehearsal(placed_model(LM, base), policy, REWARD, config)
    rng, counts, responses = np.random.default_rng(0), [], set()
    for step in range(200):
        columns = (8, 16)[step % 2]
        valid_PS = np.arange(columns)[None, :] >= columns - rng.integers(1, columns + 1, 2)[:, None]
        metrics = run.step(
            Prompts(
                rng.integers(3, LM.config.vocab_size, (2, columns), dtype=np.int32),
                valid_PS,
                np.arange(2, dtype=np.int32),
            )
        )
        # A rare number of rows that go on may turn up late: slots have a bound of their own, below.
        counts.append(
            sum(
                program.compilations
                for name, program in run.programs.by_name().items()
                if slots is None or name != "sample"
            )
        )
        responses.add(metrics["response/length"])
    assert len(responses) > 20
    # Sizes turn up as responses of their length do: no more of them than there are, and none in the
    # second half.
    most = 2 * (ROLLOUT_LEVELS + 1)
    reading = [
        run.programs.reward,
        run.programs.logprobs,
        run.programs.assemble,
        run.programs.learn,
    ]
    assert all(program.compilations <= most for program in reading)
    assert (
        run.programs.sample.compilations == 2
        if slots is None
        else run.programs.sample.compilations <= 20
    )
    assert counts[-1] == counts[99]
