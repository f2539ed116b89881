"""The table of policy gradients: settings, and advantages of two prompts on hand-computed
numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.objectives import algorithms, losses, pairs, policy_gradient, ratios
from perl_jax.objectives.algorithms import ALGORITHMS, AlgorithmConfig, Outcomes

NAN = float("nan")
# The policy gradients, and the algorithms with a loss of pairs.
GRADIENTS = [name for name, rule in ALGORITHMS.items() if rule.pairs is None]
PAIRS = [name for name in ALGORITHMS if name not in GRADIENTS]
SQRT2 = np.sqrt(2.0)

# Two prompts with two responses each, of 2, 1, 1 and 2 tokens, one of them with a gap.
MASK_BT = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], bool)
RETURN_B = np.array([1.0, 3.0, 2.0, 2.0], np.float32)


def outside(fill: float, *rows: list[float]) -> np.ndarray:
    """The rows' numbers where the mask is True, `fill` elsewhere."""
    out = np.full(MASK_BT.shape, fill, np.float32)
    out[MASK_BT] = np.concatenate(rows)
    return out


def outcomes(**fields) -> Outcomes:
    return Outcomes(RETURN_B, outside(NAN, [0.0, 1.0], [3.0], [2.0], [0.0, 2.0]), MASK_BT, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "each_B"),
    [
        # Means 2 and 2 of each prompt; of the other sample 3, 1, 2, 2.
        ("dr-grpo", {"samples": 2}, [-1, 1, 0, 0]),
        ("rloo", {"samples": 2}, [-2, 2, 0, 0]),
        # sqrt(((-1)^2 + 1^2) / (2 - 1)) = sqrt 2; the second prompt's responses do not differ.
        ("grpo", {"samples": 2}, [-1 / (SQRT2 + 0.1), 1 / (SQRT2 + 0.1), 0, 0]),
        ("gspo", {"samples": 2}, [-1 / (SQRT2 + 0.1), 1 / (SQRT2 + 0.1), 0, 0]),
        # All four of one prompt, by default: squares 1, 1, 0, 0 over 3.
        ("grpo", {}, [-1 / (np.sqrt(2 / 3) + 0.1), 1 / (np.sqrt(2 / 3) + 0.1), 0, 0]),
        ("rloo", {}, [1 - 7 / 3, 3 - 5 / 3, 0, 0]),
        ("reinforce-mean", {}, [-1, 1, 0, 0]),
        # The best against the worst; the second prompt's responses do not differ.
        ("online-dpo", {}, [-1, 1, 0, 0]),
        ("online-ipo", {"samples": 4}, [-1, 1, 0, 0]),
        # Each prompt's own greedy response: worth 0.5 and 4.
        ("remax", {"samples": 2}, [0.5, 2.5, -2, -2]),
    ],
)
def test_one_advantage_a_response(name, fields, each_B):
    config = AlgorithmConfig(name, **fields)
    found = outcomes(greedy_P=np.array([0.5, 4.0], np.float32) if name == "remax" else None)
    advantage_BT, target_BT = jax.jit(lambda x: algorithms.compute_advantages(config, x))(found)
    np.testing.assert_allclose(
        advantage_BT, np.where(MASK_BT, np.array(each_B)[:, None], 0), rtol=1e-6, atol=1e-7
    )
    assert target_BT is None


def test_reinforce_reads_its_baseline_when_it_updates():
    config = AlgorithmConfig("reinforce")
    advantage_BT, target_BT = jax.jit(lambda x: algorithms.compute_advantages(config, x))(
        outcomes()
    )
    assert advantage_BT is None
    np.testing.assert_array_equal(target_BT, outside(0, [1, 1], [3], [2], [2, 2]))
    values_BT = outside(NAN, [0.5, 2], [3], [-1], [0, 4])
    difference = jax.jit(lambda z, v: algorithms.critic_advantages(z, v, MASK_BT))(
        target_BT, values_BT
    )
    np.testing.assert_array_equal(difference, outside(0, [0.5, -1], [0], [3], [2, -2]))


def test_ppo_by_hand():
    # gamma 0.5, lambda 0.25; the first row, rewards 0, 1 and values 2, 4: delta_2 = 1 - 4 = -3,
    # delta_1 = 0 + 0.5 * 4 - 2 = 0, A_1 = 0.125 * -3. The last, values 1, 0: delta_2 = 2, delta_1 =
    # -1.
    config = AlgorithmConfig("ppo", gamma=0.5, gae_lambda=0.25, whiten=False)
    found = outcomes(values_BT=outside(NAN, [2, 4], [1], [5], [1, 0]))
    advantage_BT, target_BT = jax.jit(lambda x: algorithms.compute_advantages(config, x))(found)
    np.testing.assert_array_equal(advantage_BT, outside(0, [-0.375, -3], [2], [-3], [-0.75, 2]))
    np.testing.assert_array_equal(target_BT, outside(0, [1.625, 1], [3], [2], [0.25, 2]))
    # Whitened, the advantages' mean and deviation over the six tokens: not the values' targets.
    whitened_BT, same_BT = jax.jit(
        lambda x: algorithms.compute_advantages(
            AlgorithmConfig("ppo", gamma=0.5, gae_lambda=0.25), x
        )
    )(found)
    raw = np.array([-0.375, -3, 2, -3, -0.75, 2])
    np.testing.assert_allclose(
        whitened_BT, outside(0, (raw - raw.mean()) / raw.std(ddof=1)), rtol=1e-5
    )
    np.testing.assert_array_equal(same_BT, target_BT)


def test_whitening_is_over_the_tokens():
    # -1 twice and 1 once: mean -1/3, deviations -2/3, -2/3, 4/3, their squares 8/3 over 3 - 1.
    mask_BT = MASK_BT[:2]
    config = AlgorithmConfig("reinforce-mean", whiten=True)
    found = Outcomes(RETURN_B[:2], np.zeros(mask_BT.shape), mask_BT)
    advantage_BT, _ = jax.jit(lambda x: algorithms.compute_advantages(config, x))(found)
    expected_BT = np.array([[0, -2, -2, 0], [0, 4, 0, 0]]) / 3 / np.sqrt(4 / 3)
    np.testing.assert_allclose(advantage_BT, expected_BT, rtol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_filler_rows_change_nothing(name):
    """A filler prompt: rows without a token, and whatever was measured on them."""
    config = AlgorithmConfig(name, samples=2)
    values_BT = outside(0.25, [2, 4], [1], [5], [1, 0])
    plain = outcomes(values_BT=values_BT, greedy_P=np.array([0.5, 4.0], np.float32))
    padded = jax.tree.map(
        lambda x: np.concatenate(
            [x, np.full_like(x[: len(x) // 2], NAN if x.dtype != bool else False)]
        ),
        plain,
    )
    for filled, alone in zip(
        algorithms.compute_advantages(config, padded),
        algorithms.compute_advantages(config, plain),
        strict=True,
    ):
        assert (filled is None) == (alone is None)
        if filled is not None:
            np.testing.assert_allclose(filled[:4], alone, rtol=1e-6)
            np.testing.assert_array_equal(filled[4:], np.zeros((2, 4)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_gradient_flows_into_what_rollouts_were_worth(name):
    plain = {"whiten": False} if name in GRADIENTS else {}
    config = AlgorithmConfig(name, samples=2, **plain)

    def total(numbers):
        found = Outcomes(*numbers[:2], MASK_BT, *numbers[2:])
        advantage_BT, target_BT = algorithms.compute_advantages(config, found)
        if advantage_BT is None:
            advantage_BT = algorithms.critic_advantages(target_BT, found.values_BT, MASK_BT)
        return jnp.sum(jnp.square(advantage_BT)) + (
            0 if target_BT is None else jnp.sum(jnp.square(target_BT))
        )

    numbers = (
        RETURN_B,
        outside(0, [0, 1], [3], [2], [0, 2]),
        outside(0, [2, 4], [1], [5], [1, 0]),
        np.array([0.5, 4.0], np.float32),
    )
    assert total(numbers) > 1
    for gradient in jax.grad(total)(numbers):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_loss_has_the_algorithms_ratio_bounds_and_mean(name):
    """Ratios 2 and 1/4 in a row of two tokens: their product 1/2, their geometric mean
    sqrt(1/2).
    """
    mask_BT = np.array([[0, 1, 1], [0, 0, 1]], bool)
    old_BT = np.array([[NAN, -1, -1], [NAN, NAN, -1]], np.float32)
    logp_BT = old_BT + np.log([[1, 2, 1 / 4], [1, 1, 1]])
    advantage_BT = np.array([[NAN, 2, -1], [NAN, NAN, 3]], np.float32)
    config = AlgorithmConfig(
        name, **({"clip": 0.6, "clip_high": 0.7} if ALGORITHMS[name].ratio else {"max_ratio": 1.5})
    )
    loss = jax.jit(lambda *a: algorithms.policy_loss(config, *a, mask_BT, 8))(
        logp_BT, old_BT, advantage_BT
    )
    first, second = np.log(2) - 1, np.log(1 / 4) - 1
    weighed = -(1.5 * 2 * first - 1 / 4 * second + 3 * -1)
    row, other = 2 * 1.7 - 0.4, 3  # 2 min(2, 1.7) - max(1/4, 0.4), and 3 times a ratio of 1
    expected = {
        "reinforce": (weighed, 2),
        "reinforce-mean": (weighed, 2),
        "remax": (weighed, 2),
        # r A of both tokens with one r within the bounds, averaged: r (2 - 1) / 2.
        "rloo": (-(1 / 2 / 2 + other), 2),
        "gspo": (-(np.sqrt(1 / 2) / 2 + other), 2),
        "grpo": (-(row / 2 + other), 2),
        "dr-grpo": (-(row + other) / 8, 2),
        "ppo": (-(row + other), 3),
    }[name]
    np.testing.assert_allclose(loss.total, expected[0], rtol=1e-6)
    assert loss.weight == expected[1]


def test_a_single_bound_holds_on_both_sides():
    ratio_B = np.array([0.7, 1.3], np.float32)
    for clip_high, gain in ((None, -0.8 + 1.2), (0.1, -0.8 + 1.1)):
        config = AlgorithmConfig("ppo", clip=0.2, clip_high=clip_high)
        mask_BT = np.ones((1, 2), bool)
        advantage_BT = np.array([[-1.0, 1.0]], np.float32)
        loss = algorithms.policy_loss(
            config, np.log(ratio_B)[None], np.zeros((1, 2)), advantage_BT, mask_BT, 8
        )
        np.testing.assert_allclose(loss.total, -gain, rtol=1e-6)


def test_the_table_names_what_exists():
    for name, rule in ALGORITHMS.items():
        assert rule.advantage in algorithms.ADVANTAGES
        assert rule.ratio is None or rule.ratio in ratios.RATIOS
        assert rule.normalise in losses.NORMALISERS
        assert rule.critic == (name in ("reinforce", "ppo"))
        assert rule.grouped == (name in ("rloo", "grpo", "dr-grpo", "gspo", *PAIRS))
        assert rule.greedy == (name == "remax")
        assert (rule.kl == "loss") == (name in ("grpo", "dr-grpo", "gspo", *PAIRS))
        assert rule.pairs == {"online-dpo": "dpo", "online-ipo": "ipo"}.get(name)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_defaults_of_each_algorithm(name):
    config = AlgorithmConfig(name)
    four = name in ("rloo", "grpo", "dr-grpo", "gspo")
    assert config.group == (4 if four else 2 if name in PAIRS else 1)
    assert config.updates == 1
    assert config.whitened == (name == "ppo")
    by_name = {
        "rloo": "sequence-mean",
        "grpo": "sequence-mean",
        "gspo": "sequence-mean",
        "dr-grpo": "constant",
        "ppo": "token",
    }
    assert config.reduction == by_name.get(name, "sequence")
    assert config.constant_length(77) == (77 if name == "dr-grpo" else None)


def test_settings_replace_the_algorithms_own():
    config = AlgorithmConfig(
        "ppo", samples=3, epochs=2, minibatches=5, normalise="constant", whiten=False
    )
    assert (
        config.group,
        config.updates,
        config.reduction,
        config.whitened,
        config.constant_length(9),
    ) == (
        3,
        10,
        "constant",
        False,
        9,
    )
    config = AlgorithmConfig("dr-grpo", samples=2, normalise="token", whiten=True)
    assert (config.group, config.reduction, config.whitened, config.constant_length(9)) == (
        2,
        "token",
        True,
        None,
    )
    assert config.rule is ALGORITHMS["dr-grpo"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "sarsa"},
            "algorithm.name is 'sarsa'; it must be one of reinforce, reinforce-mean, rloo, remax, "
            "grpo, dr-grpo, gspo, ppo, online-dpo, online-ipo.",
        ),
        ({"epochs": 0}, "algorithm.epochs is 0"),
        ({"minibatches": 1.5}, "algorithm.minibatches is 1.5"),
        ({"samples": 0}, "algorithm.samples is 0"),
        ({"name": "rloo", "samples": 1}, "rloo compares a prompt's samples and needs 2 or more."),
        ({"clip": 0.0}, "algorithm.clip is 0.0; it must lie in (0, 1)."),
        ({"clip_high": 0.0}, "algorithm.clip_high is 0.0"),
        # A value that is wrong for every algorithm is said to be so first.
        (
            {"value_clip": -0.2},
            "algorithm.value_clip is -0.2; it must be a finite number greater than 0.",
        ),
        ({"max_ratio": NAN}, "algorithm.max_ratio is nan"),
        (
            {"normalise": "mean"},
            "algorithm.normalise is 'mean'; it must be one of token, sequence, sequence-mean, "
            "constant.",
        ),
        (
            {"name": "rloo", "normalise": "sequence"},
            "rloo has one ratio per sequence, which needs sequence-mean.",
        ),
        (
            {"whiten": True},
            "algorithm.whiten needs advantages that are known before the update; those of "
            "reinforce are not.",
        ),
        ({"gamma": -0.1}, "algorithm.gamma is -0.1"),
        ({"gae_lambda": NAN}, "algorithm.gae_lambda is nan"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        AlgorithmConfig(**fields)
    assert message in str(error.value)


# Which options an algorithm reads: written down here, tried on numbers, and what the config
# refuses.

CLIPPED = ("rloo", "grpo", "dr-grpo", "gspo", "ppo")
READERS = {
    "clip": CLIPPED,
    "clip_high": CLIPPED,
    "max_ratio": ("reinforce", "reinforce-mean", "remax"),
    "std_epsilon": ("grpo", "gspo"),
    "gamma": ("ppo",),
    "gae_lambda": ("ppo",),
    "value_clip": ("ppo",),
    "normalise": tuple(GRADIENTS),
    "whiten": tuple(GRADIENTS),
}
OTHER = {
    "clip": 0.6,
    "clip_high": 0.9,
    "max_ratio": 1.25,
    "std_epsilon": 0.5,
    "gamma": 0.5,
    "gae_lambda": 0.25,
    "value_clip": 0.7,
    "normalise": "token",
    "whiten": True,
}
# Which policy gradients accept these is in `test_wrong_settings_are_refused_by_name` and
# `test_settings_replace_the_algorithms_own`.
NOT_TRIED = ("normalise", "whiten")
# Read by every algorithm: which one, how many responses and updates.
EVERY = {"name", "samples", "epochs", "minibatches"}


def changed(config: AlgorithmConfig, **fields) -> AlgorithmConfig:
    """A copy with other fields, whether or not the config would refuse them."""
    copy = dataclasses.replace(config)
    for name, value in fields.items():
        object.__setattr__(copy, name, value)
    return copy


def numbers_of(config: AlgorithmConfig, monkeypatch) -> np.ndarray:
    """Advantages, targets, and the objective's losses after the policy and the value model have
    moved.
    """
    old_values_BT = outside(0, [2, 4], [1], [5], [1, 0])
    found = outcomes(values_BT=old_values_BT, greedy_P=np.array([0.5, 4.0], np.float32))
    advantage_BT, target_BT = algorithms.compute_advantages(config, found)
    more = (
        {"reference_BT": outside(NAN, [-1, -2], [-3], [-2], [-2, -1])} if config.rule.pairs else {}
    )
    # Ratios from 1/4 to 4 in one response, and in others sequences' ratios of 3/2 and 2/3: out of
    # bounds by both signs.
    old_BT = outside(NAN, [-2, -2], [-2], [-2], [-2, -2])
    logp_BT = old_BT + np.log(outside(1, [1 / 4, 3], [3 / 2], [2 / 3], [4, 1 / 2]))
    values_BT = old_values_BT + outside(0, [0.3, -0.5], [1], [-1], [0.4, -0.6])
    monkeypatch.setattr(
        policy_gradient, "logprobs_and_entropy", lambda *_, **__: (logp_BT, np.zeros_like(logp_BT))
    )
    monkeypatch.setattr(policy_gradient, "values", lambda *_: values_BT)
    batch = policy_gradient.Experience(
        types.SimpleNamespace(response_BT=MASK_BT),
        old_BT,
        advantage_BT,
        target_BT,
        # As `experience_of` has it.
        old_value_BT=old_values_BT
        if config.rule.advantage == "gae" and config.value_clip is not None
        else None,
        **more,
        kl_weight_B=np.full(4, 0.1, np.float32) if more else None,
    )
    roles = {"policy": None, "value": None}
    loss, logs = policy_gradient.policy_gradient_objective(
        None, config, 1.0, "k3", 8, roles, None, batch, None
    )
    parts = [
        advantage_BT,
        target_BT,
        loss.total,
        *(
            logs[name].total
            for name in ("policy/loss", "value/loss", "policy/clip_fraction")
            if name in logs
        ),
    ]
    return np.concatenate([np.ravel(part) for part in parts if part is not None])


def test_every_option_is_read_by_all_or_said_to_be_read_by_some():
    assert {field.name for field in dataclasses.fields(AlgorithmConfig)} == EVERY | set(READERS)
    mine = {
        option: {name for name, rule in ALGORITHMS.items() if reads(rule)}
        for option, reads in algorithms.READ.items()
    }
    critic = {"reinforce", "ppo"}
    outer = {
        "kl.place": set(GRADIENTS),
        "kl.estimator": set(GRADIENTS),
        "value_head": critic,
        "value_learning_rate": critic,
        "optimizer.head_learning_rate": critic,
    }
    assert mine == {f"algorithm.{field}": set(names) for field, names in READERS.items()} | outer


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_option_changes_the_numbers_or_is_refused(name, monkeypatch):
    """`READERS` by trial: an option moves advantages or losses exactly where it is accepted."""
    numbers = functools.partial(numbers_of, monkeypatch=monkeypatch)
    default = AlgorithmConfig(name, samples=2)
    before = numbers(default)
    assert np.all(np.isfinite(before))
    for field, names in READERS.items():
        if field in NOT_TRIED and name in names:
            continue
        moved = np.abs(numbers(changed(default, **{field: OTHER[field]})) - before).max()
        if name in names:
            assert moved > 1e-2, field
            assert getattr(AlgorithmConfig(name, **{field: OTHER[field]}), field) == OTHER[field]
            continue
        # Whitened, the signs of preferences would be other numbers: nothing may set it.
        assert moved == 0 or field == "whiten", field
        with pytest.raises(UserError) as error:
            AlgorithmConfig(name, **{field: OTHER[field]})
        do = "reads" if len(names) == 1 else "read"
        # In the table's order.
        assert str(error.value) == (
            f"algorithm.{field} is {OTHER[field]!r}, which {name} does not read; leave it out "
            f"({', '.join(n for n in ALGORITHMS if n in names)} {do} it)."
        )
        # Its default is no setting.
        assert AlgorithmConfig(name, **{field: getattr(AlgorithmConfig, field)}) == AlgorithmConfig(
            name
        )


# The loss of pairs.

# Two prompts of two responses, whose masks are MASK_BT: sums of log-ratios 3, 1, 2, 5.
LOGP_BT = outside(NAN, [1.0, 3.0], [2.0], [5.0], [3.0, 4.0])
REFERENCE_BT = outside(NAN, [0.5, 0.5], [1.0], [3.0], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_the_loss_of_pairs_by_hand(kind):
    """The second response to the first prompt is preferred, the first one to the second prompt."""
    config = AlgorithmConfig(f"online-{kind}")
    found = dataclasses.replace(outcomes(), return_B=np.array([1.0, 3.0, 2.5, 2.0], np.float32))
    advantage_BT, _ = algorithms.compute_advantages(config, found)

    def total(logp_BT, reference_BT):
        beta_B = np.full(4, 0.5, np.float32)
        return pairs.pair_loss(config, logp_BT, reference_BT, advantage_BT, MASK_BT, beta_B)

    loss, logs = jax.jit(total)(LOGP_BT, REFERENCE_BT)
    # h = 1 - 3 and 2 - 5; beta h = -1 and -3/2.
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    if kind == "dpo":
        expected = -np.log(sigmoid(-1)) - np.log(sigmoid(-1.5))
        slope_P = [-0.5 * (1 - sigmoid(-1)), -0.5 * (1 - sigmoid(-1.5))]
    else:
        # 1 / (2 beta) = 1.
        expected, slope_P = (-2 - 1) ** 2 + (-3 - 1) ** 2, [2 * (-2 - 1), 2 * (-3 - 1)]
    np.testing.assert_allclose(loss.total, expected, rtol=1e-6)
    assert float(loss.weight) == 2
    slope_B = [-slope_P[0], slope_P[0], slope_P[1], -slope_P[1]]
    gradient_BT = jax.grad(lambda x: total(x, REFERENCE_BT)[0].total)(jnp.asarray(LOGP_BT))
    np.testing.assert_allclose(
        gradient_BT, np.where(MASK_BT, np.array(slope_B)[:, None], 0), rtol=1e-5
    )
    means = {name: float(value.mean) for name, value in logs.items()}
    assert means == pytest.approx(
        {
            "preference/chosen_reward": 0.5 * (1 + 2) / 2,
            "preference/rejected_reward": 0.5 * (3 + 5) / 2,
            "preference/accuracy": 0.0,
            "preference/untied": 1.0,
        }
    )


def test_prompts_with_equal_rewards_and_filler_have_no_pair():
    config = AlgorithmConfig("online-dpo")
    # The second prompt's rewards are equal; a third prompt is filler.
    more = lambda x, fill: np.concatenate([x, np.full((2, *x.shape[1:]), fill, x.dtype)])
    mask_BT = more(MASK_BT, False)
    found = Outcomes(more(RETURN_B, NAN), more(LOGP_BT, NAN), mask_BT)
    advantage_BT, _ = algorithms.compute_advantages(config, found)
    loss, logs = pairs.pair_loss(
        config,
        more(LOGP_BT, NAN),
        more(REFERENCE_BT, NAN),
        advantage_BT,
        mask_BT,
        np.full(6, 0.5, np.float32),
    )
    np.testing.assert_allclose(loss.total, np.log1p(np.exp(1.0)), rtol=1e-6)
    assert float(loss.weight) == 1 and float(logs["preference/untied"].mean) == 0.5


def test_of_many_samples_the_best_meets_the_worst():
    config = AlgorithmConfig("online-dpo", samples=4)
    found = dataclasses.replace(outcomes(), return_B=np.array([2.0, 3.0, 1.0, 3.0], np.float32))
    advantage_BT, _ = algorithms.compute_advantages(config, found)
    # Of the two best the first.
    np.testing.assert_array_equal(
        advantage_BT, np.where(MASK_BT, np.array([0, 1, -1, 0])[:, None], 0)
    )
    beta_B = np.full(4, 0.5, np.float32)
    loss, _ = pairs.pair_loss(config, LOGP_BT, REFERENCE_BT, advantage_BT, MASK_BT, beta_B)
    np.testing.assert_allclose(loss.total, np.log1p(np.exp(-0.5 * (1 - 2))), rtol=1e-6)


def test_a_policy_gradient_has_no_loss_of_pairs():
    with pytest.raises(ValueError, match="rloo is a policy gradient"):
        pairs.pair_loss(
            AlgorithmConfig("rloo"), LOGP_BT, REFERENCE_BT, LOGP_BT, MASK_BT, np.ones(4)
        )
