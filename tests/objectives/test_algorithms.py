"""Every policy gradient of the table: the expectation of its gradient over all batches there are.

A batch is drawn from the 27 sequences of `tests.objectives.enumeration`, all of one prompt: with
two rows there are 729 batches, with three 19683, and each goes through
`algorithms.compute_advantages` and `algorithms.policy_loss` as in a run. What is unbiased is
compared with the slopes of its objective; what is not with its paper's formula, worked out in NumPy
here. A counts sequences, N batches.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.models import logprobs
from perl_jax.objectives import advantages, algorithms, kl, losses
from perl_jax.objectives.algorithms import ALGORITHMS, AlgorithmConfig, Outcomes
from tests.objectives import enumeration
from tests.objectives.enumeration import BETA, PREFIXES, SEQUENCES, STEPS, TEMPERATURE, VOCABULARY

# A response has 3 tokens at most; the stated length is another number, so that it shows.
ROOM = 5
TOKENS_AT, MASK_AT, SCORE_A, ROWS_AT = enumeration.everything(stops=True)
THETA, REFERENCE = enumeration.tables()
# The policy that sampled, where it is not the current one.
OLD = THETA + 0.4 * np.random.default_rng(2).normal(size=THETA.shape)
VALUE_OF_ROW = np.random.default_rng(1).normal(size=len(PREFIXES))
# Responses begin in this column.
START = 3
LENGTH_A = MASK_AT.sum(1)


def in_reward(name: str) -> float:
    """The KL's coefficient in the reward, for an algorithm that has it there."""
    return BETA if ALGORITHMS[name].kl == "reward" else 0.0


def batches(size: int) -> np.ndarray:
    """[N, size]: every batch of that many sequences."""
    return np.array(list(itertools.product(range(len(SEQUENCES)), repeat=size)))


def greedy_return(policy: np.ndarray, beta: float) -> float:
    """(1 - beta) score of the response of the likeliest tokens."""
    sequence = ()
    while len(sequence) < STEPS:
        sequence += (int(np.argmax(policy[enumeration.ROW[sequence]])),)
    return (1 - beta) * enumeration.score_of(enumeration.response_of(sequence, stops=True))


@jax.jit
def library_logprobs(table: jax.Array) -> jax.Array:
    return logprobs.next_token_logprobs(table[ROWS_AT], TOKENS_AT, TEMPERATURE)


@functools.cache
def sampled(stale: bool) -> tuple[jax.Array, jax.Array]:
    """log p of what a rollout is made of: under the policy that sampled, and under the
    reference.
    """
    with jax.enable_x64(True):
        return tuple(
            library_logprobs(jnp.asarray(table)) for table in (OLD if stale else THETA, REFERENCE)
        )


@functools.cache
def library_gradient(
    config: AlgorithmConfig,
    size: int,
    *,
    stale: bool = False,
    beta: float = 0.0,
    read: str = "mean",
    estimator: str | None = None,
) -> np.ndarray:
    """-d/d theta at THETA of the expected loss over batches: an ascent direction.

    stale: they were drawn from OLD. beta: the KL's coefficient, in the reward; in the loss where an
    estimator is named. read: "mean" of a batch's LossSum, or "total" divided by the batch's rows.
    """
    old, index_NB = OLD if stale else THETA, batches(size)
    in_loss = 0.0 if estimator is None else beta
    in_return = beta - in_loss
    greedy_P = np.full(size // config.group, greedy_return(old, in_return))

    def rollouts() -> tuple[Outcomes, jax.Array, jax.Array]:
        """All sequences, as if they were one batch."""
        old_AT, reference_AT = sampled(stale)
        kl_AT = kl.kl_in_reward(old_AT, reference_AT)
        return_A = advantages.terminal_return(
            jnp.asarray(SCORE_A), kl.sequence_kl(kl_AT, MASK_AT), in_return
        )
        rewards_AT = advantages.token_rewards((1 - in_return) * SCORE_A, kl_AT, MASK_AT, in_return)
        values_AT = logprobs.shift_right(jnp.asarray(VALUE_OF_ROW[ROWS_AT]))
        return Outcomes(return_A, rewards_AT, jnp.asarray(MASK_AT), values_AT), old_AT, reference_AT

    def batch_loss(batch, logp_BT):
        outcomes, old_BT, reference_BT = batch
        mask_BT = outcomes.mask_BT
        advantage_BT, target_BT = algorithms.compute_advantages(
            config, outcomes.replace(greedy_P=greedy_P)
        )
        assert (advantage_BT is None) == (config.name == "reinforce")
        if advantage_BT is None:
            advantage_BT = algorithms.critic_advantages(target_BT, outcomes.values_BT, mask_BT)
        loss = algorithms.policy_loss(config, logp_BT, old_BT, advantage_BT, mask_BT, ROOM)
        value = loss.mean if read == "mean" else loss.total / size
        if estimator is not None:
            length, weight_B = config.constant_length(ROOM), jnp.full(size, in_loss)
            value += losses.kl_loss(
                logp_BT,
                reference_BT,
                mask_BT,
                estimator,
                config.kl_reduction,
                length=length,
                weight_B=weight_B,
            ).mean
        return value

    def expected_loss(logp_NBT, batches, weight_N):
        return jnp.sum(weight_N * jax.vmap(batch_loss)(batches, logp_NBT))

    with jax.enable_x64(True):
        # The chain rule in two parts: only the first is another program for every case.
        drawn = jax.tree.map(lambda x_A: np.asarray(x_A)[index_NB], rollouts())
        weight_N = enumeration.sequence_probability(old)[index_NB].prod(1)
        logp_AT, backward = jax.vjp(library_logprobs, jnp.asarray(THETA))
        slope_NBT = jax.jit(jax.grad(expected_loss))(np.asarray(logp_AT)[index_NB], drawn, weight_N)
        slope_AT = np.zeros(MASK_AT.shape)
        np.add.at(slope_AT, index_NB, np.asarray(slope_NBT))
        return -np.asarray(*backward(jnp.asarray(slope_AT)))


def logprobs_AT(table: np.ndarray) -> np.ndarray:
    """log p of each token drawn, what follows the end included; 0 in the columns around them."""
    out = np.zeros(MASK_AT.shape)
    for a, sequence in enumerate(SEQUENCES):
        for t in range(STEPS):
            out[a, START + t] = np.log(
                enumeration.softmax(table[enumeration.ROW[sequence[:t]]])[sequence[t]]
            )
    return out


@functools.cache
def token_slopes() -> np.ndarray:
    """[A, T, rows, V]: d log p(token) / d theta at THETA = (one-hot - p) / temperature in its
    prefix's row.
    """
    out = np.zeros((*MASK_AT.shape, len(PREFIXES), VOCABULARY))
    for a, sequence in enumerate(SEQUENCES):
        for t in range(STEPS):
            row = enumeration.ROW[sequence[:t]]
            out[a, START + t, row] = (
                np.eye(VOCABULARY)[sequence[t]] - enumeration.softmax(THETA[row])
            ) / TEMPERATURE
    return out


def values_AT() -> np.ndarray:
    """V of the state before each token."""
    return np.array(
        [
            [
                VALUE_OF_ROW[ROWS_AT[a, t - 1]] if MASK_AT[a, t] else 0.0
                for t in range(MASK_AT.shape[1])
            ]
            for a in range(len(SEQUENCES))
        ]
    )


def token_rewards_AT(policy: np.ndarray, beta: float) -> np.ndarray:
    """-beta log(policy / reference) of each response token, plus (1 - beta) score on the last."""
    rewards_AT = -beta * (logprobs_AT(policy) - logprobs_AT(REFERENCE)) * MASK_AT
    rewards_AT[np.arange(len(SEQUENCES)), START + LENGTH_A - 1] += (1 - beta) * SCORE_A
    return rewards_AT


def gae_AT(rewards_AT: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """sum_k (gamma lambda)^(k - t) (r_k + gamma V_(k + 1) - V_k), V = 0 behind the end: plain
    loops.
    """
    out, value_AT = np.zeros(rewards_AT.shape), values_AT()
    for a, length in enumerate(LENGTH_A):
        for t in range(START, START + length):
            for k in range(t, START + length):
                out[a, t] += (gamma * lam) ** (k - t) * (
                    rewards_AT[a, k] + gamma * value_AT[a, k + 1] - value_AT[a, k]
                )
    return out


def paper_advantages(
    config: AlgorithmConfig, index_NB: np.ndarray, old: np.ndarray, beta: float
) -> np.ndarray:
    """[N, B, T]: A of each token of each batch by the papers' formulas; all rows are of one
    group.
    """
    rewards_AT, mask_NBT = token_rewards_AT(old, beta), MASK_AT[index_NB]
    return_NB, size = rewards_AT.sum(1)[index_NB], index_NB.shape[1]
    if config.name == "ppo":
        advantage_NBT = gae_AT(rewards_AT, config.gamma, config.gae_lambda)[index_NB]
    elif config.name == "reinforce":
        advantage_NBT = return_NB[..., None] - values_AT()[index_NB]
    else:
        mean_N1 = return_NB.sum(1, keepdims=True) / size
        if config.name == "rloo":
            advantage_NB = return_NB - (return_NB.sum(1, keepdims=True) - return_NB) / (size - 1)
        elif config.name == "remax":
            advantage_NB = return_NB - greedy_return(old, beta)
        else:
            advantage_NB = return_NB - mean_N1
        if config.name in ("grpo", "gspo"):
            deviation_N1 = np.sqrt(((return_NB - mean_N1) ** 2).sum(1, keepdims=True) / (size - 1))
            equal_N1 = np.ptp(return_NB, axis=1, keepdims=True) == 0
            advantage_NB = np.where(equal_N1, 0, advantage_NB / (deviation_N1 + 0.1))
        advantage_NBT = np.repeat(advantage_NB[..., None], mask_NBT.shape[2], axis=2)
    if config.whitened:
        count_N = mask_NBT.sum((1, 2))
        mean_N = (advantage_NBT * mask_NBT).sum((1, 2)) / count_N
        advantage_NBT = (advantage_NBT - mean_N[:, None, None]) * mask_NBT
        variance_N = (advantage_NBT**2).sum((1, 2)) / np.maximum(count_N - 1, 1)
        advantage_NBT = advantage_NBT / np.sqrt(variance_N + 1e-8)[:, None, None]
    return advantage_NBT * mask_NBT


def paper_ratios(config: AlgorithmConfig, index_NB: np.ndarray, old: np.ndarray) -> np.ndarray:
    """[N, B, T]: pi / pi_old of a token (also of REINFORCE), a sequence, or a sequence's geometric
    mean.
    """
    l_AT = (logprobs_AT(THETA) - logprobs_AT(old)) * MASK_AT
    if config.name == "rloo":
        l_AT = np.repeat(l_AT.sum(1, keepdims=True), l_AT.shape[1], axis=1)
    elif config.name == "gspo":
        l_AT = np.repeat(l_AT.sum(1, keepdims=True) / LENGTH_A[:, None], l_AT.shape[1], axis=1)
    return np.exp(l_AT)[index_NB]


def clipped_away(
    config: AlgorithmConfig, ratio_NBT: np.ndarray, advantage_NBT: np.ndarray
) -> np.ndarray:
    """Where min(r A, clip(r) A) is the constant one."""
    high = config.clip if config.clip_high is None else config.clip_high
    above_NBT = (advantage_NBT > 0) & (ratio_NBT > 1 + high)
    return above_NBT | (advantage_NBT < 0) & (ratio_NBT < 1 - config.clip)


@functools.cache
def paper_gradient(
    config: AlgorithmConfig, size: int, *, stale: bool = False, beta: float = 0.0
) -> np.ndarray:
    """E of sum_i sum_t w_it A_it d log p_it / divisor / B over all batches, by the papers'
    formulas.
    """
    old, index_NB = OLD if stale else THETA, batches(size)
    advantage_NBT = paper_advantages(config, index_NB, old, beta)
    ratio_NBT = paper_ratios(config, index_NB, old)
    if config.name in ("reinforce", "reinforce-mean", "remax"):
        factor_NBT = np.minimum(ratio_NBT, config.max_ratio)
    else:
        factor_NBT = ratio_NBT * ~clipped_away(config, ratio_NBT, advantage_NBT)
    length_NB = LENGTH_A[index_NB]
    divisor_NB = {
        "sequence": np.ones(index_NB.shape),
        "sequence-mean": length_NB,
        "constant": np.full(index_NB.shape, ROOM),
        "token": np.repeat(length_NB.sum(1, keepdims=True) / size, size, axis=1),
    }[
        "sequence"
        if config.name == "rloo"
        else config.normalise or ALGORITHMS[config.name].normalise
    ]
    weight_NB = enumeration.sequence_probability(old)[index_NB].prod(1)[:, None] / divisor_NB / size
    coefficient_AT = np.zeros(MASK_AT.shape)
    np.add.at(coefficient_AT, index_NB, weight_NB[..., None] * factor_NBT * advantage_NBT)
    return np.einsum("at,atrv->rv", coefficient_AT, token_slopes())


@functools.cache
def exact_gradient(beta: float) -> np.ndarray:
    """Of E[(1 - beta) score - beta log(pi / reference)], by finite differences."""
    return enumeration.slopes(lambda x: enumeration.objective(x, REFERENCE, True, beta), THETA)


def assert_same(gradient: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 5e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


# Settings, rows of a batch (one group, where there are groups), and the exact gradient's factor.
UNBIASED = {
    "reinforce": ({}, 1, 1.0),
    "reinforce, two rows": ({}, 2, 1.0),
    "reinforce-mean, two rows": ({}, 2, 1 / 2),
    "reinforce-mean, three rows": ({}, 3, 2 / 3),
    "rloo, two samples": ({"samples": 2}, 2, 1.0),
    "rloo, three samples": ({"samples": 3}, 3, 1.0),
    "remax": ({}, 1, 1.0),
    "remax, two samples": ({"samples": 2}, 2, 1.0),
    "dr-grpo, two samples": ({"samples": 2}, 2, 1 / 2 / ROOM),
    "dr-grpo, three samples": ({"samples": 3}, 3, 2 / 3 / ROOM),
    "ppo": ({"gae_lambda": 1.0, "whiten": False, "normalise": "sequence"}, 1, 1.0),
}


@pytest.mark.parametrize("case", UNBIASED)
def test_the_expected_gradient_is_that_of_the_objective(case):
    fields, size, factor = UNBIASED[case]
    name = case.split(",")[0]
    gradient = library_gradient(AlgorithmConfig(name, **fields), size, beta=in_reward(name))
    assert_same(gradient, factor * exact_gradient(in_reward(name)))


def test_ppo_by_the_token_has_the_exact_gradient_before_the_division():
    """A ratio of sums is biased; its numerator is not."""
    config = AlgorithmConfig("ppo", gae_lambda=1.0, whiten=False)
    assert_same(library_gradient(config, 1, beta=BETA, read="total"), exact_gradient(BETA))
    assert_same(library_gradient(config, 2, beta=BETA, read="total"), exact_gradient(BETA))
    assert np.abs(library_gradient(config, 1, beta=BETA) - exact_gradient(BETA)).max() > 0.01


def test_the_kl_in_the_reward_shows_in_the_exact_gradient():
    assert np.abs(exact_gradient(BETA) - (1 - BETA) * exact_gradient(0.0)).max() > 0.01


# Settings and rows of a batch. The defaults of ppo: whitened, by the token, lambda 0.95.
BIASED = {
    "grpo, two samples": ({"samples": 2}, 2),
    "grpo, three samples": ({"samples": 3}, 3),
    "grpo, by the token": ({"samples": 2, "normalise": "token"}, 2),
    "grpo, by the sequence": ({"samples": 2, "normalise": "sequence"}, 2),
    "gspo, two samples": ({"samples": 2}, 2),
    "gspo, three samples": ({"samples": 3}, 3),
    "ppo": ({}, 2),
    "ppo, lambda": ({"gae_lambda": 0.6, "whiten": False, "normalise": "sequence"}, 1),
    "ppo, lambda 0": ({"gae_lambda": 0.0, "whiten": False, "normalise": "sequence-mean"}, 1),
    "ppo, discounted": ({"gae_lambda": 0.9, "gamma": 0.8, "whiten": False}, 1),
    "reinforce-mean, whitened": ({"whiten": True}, 2),
}


@pytest.mark.parametrize("case", BIASED)
def test_what_is_biased_follows_its_formula(case):
    fields, size = BIASED[case]
    name = case.split(",")[0]
    config, beta = AlgorithmConfig(name, **fields), in_reward(name)
    gradient = library_gradient(config, size, beta=beta)
    assert_same(gradient, paper_gradient(config, size, beta=beta))
    # Not the exact gradient, nor a multiple of it.
    exact = exact_gradient(beta)
    multiple = np.vdot(gradient, exact) / np.vdot(exact, exact) * exact
    assert np.abs(gradient - multiple).max() > 1e-3 * np.abs(gradient).max()


def test_the_biases_differ():
    """The comparisons above can fail: the formulas do not give each other's gradients."""
    found = {}
    for case, (fields, size) in BIASED.items():
        name = case.split(",")[0]
        found[case] = paper_gradient(AlgorithmConfig(name, **fields), size, beta=in_reward(name))
    for (one, left), (two, right) in itertools.combinations(found.items(), 2):
        # On-policy the ratio of a sequence has the gradient of the tokens' mean.
        alike = {one.replace("gspo", "grpo"), two.replace("gspo", "grpo")}
        assert (np.abs(left - right).max() < 1e-12) == (len(alike) == 1), (one, two)


def test_groups_of_equal_returns_are_among_the_batches_and_give_nothing():
    index_NB = batches(2)
    equal_NB = index_NB[SCORE_A[index_NB[:, 0]] == SCORE_A[index_NB[:, 1]]]
    # 12 responses of three tokens, 2 of two with 3 tokens of padding each, 1 of one with 9.
    assert len(equal_NB) == 12 + 2 * 3**2 + 9**2
    mask_BT = MASK_AT[equal_NB.ravel()]
    outcomes = Outcomes(SCORE_A[equal_NB.ravel()], np.zeros(mask_BT.shape), mask_BT)
    advantage_BT, _ = algorithms.compute_advantages(AlgorithmConfig("grpo", samples=2), outcomes)
    np.testing.assert_array_equal(advantage_BT, np.zeros(mask_BT.shape))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("name", ["reinforce-mean", "rloo", "grpo", "dr-grpo", "gspo"])
def test_the_kl_in_the_loss_adds_the_gradient_of_the_reverse_kl(name, estimator):
    """Of each state, the visits held fixed; divided by the stated length, or weighed like the
    tokens.
    """
    config = AlgorithmConfig(name, samples=2)
    without = library_gradient(config, 2)
    added = library_gradient(config, 2, beta=BETA, estimator=estimator) - without
    along = lambda x: enumeration.divergence_along(x, REFERENCE, True, THETA, "reverse")
    exact = -BETA * enumeration.slopes(along, THETA)
    if name in ("reinforce-mean", "rloo"):
        # A sum over tokens, as the objective is.
        assert_same(added, exact)
        return
    if name == "dr-grpo":
        assert_same(added, exact / ROOM)
        return
    # A mean over a response's tokens weighs a state by the lengths that follow: k2's gradient d log
    # p'.
    d_AT = (logprobs_AT(THETA) - logprobs_AT(REFERENCE)) * MASK_AT
    coefficient_AT = (
        -BETA * enumeration.sequence_probability(THETA)[:, None] * d_AT / LENGTH_A[:, None]
    )
    assert_same(added, np.einsum("at,atrv->rv", coefficient_AT, token_slopes()))
    assert np.abs(added - exact).max() > 0.01
    if name == "grpo":
        summed = AlgorithmConfig("grpo", samples=2, normalise="sequence")
        added = library_gradient(summed, 2, beta=BETA, estimator=estimator) - library_gradient(
            summed, 2
        )
        assert_same(added, exact)


# Stale samples: the rows were drawn from OLD, the gradient is that of THETA.


def fixed_return_gradient(beta: float) -> np.ndarray:
    """Slopes at THETA of E_theta[R], R what the responses were worth when OLD sampled them."""
    return_A = token_rewards_AT(OLD, beta).sum(1)
    return enumeration.slopes(
        lambda x: np.sum(enumeration.sequence_probability(x) * return_A), THETA
    )


def surrogate_gradient(beta: float) -> np.ndarray:
    """Slopes at THETA of E_old[sum_t pi(a_t) / pi_old(a_t) R]: each state visited as OLD does."""
    return_A, old_AT, p_A = (
        token_rewards_AT(OLD, beta).sum(1),
        logprobs_AT(OLD),
        enumeration.sequence_probability(OLD),
    )

    def surrogate(x):
        return np.sum(p_A * return_A * np.sum(np.exp(logprobs_AT(x) - old_AT) * MASK_AT, axis=1))

    return enumeration.slopes(surrogate, THETA)


def unbounded(name: str, **fields) -> AlgorithmConfig:
    """The algorithm with bounds that no ratio reaches."""
    wide = {"clip": 0.9999, "clip_high": 1e6} if ALGORITHMS[name].ratio else {"max_ratio": 1e6}
    return AlgorithmConfig(name, **{**fields, **wide})


@pytest.mark.parametrize("case", [case for case in UNBIASED if "three" not in case])
def test_unbounded_importance_weights_correct_for_the_policy_that_sampled(case):
    """Of whole sequences: exactly. Of tokens: all but the states' visits (the surrogate of PPO)."""
    fields, size, factor = UNBIASED[case]
    name = case.split(",")[0]
    beta = in_reward(name)
    gradient = library_gradient(unbounded(name, **fields), size, stale=True, beta=beta)
    exact, surrogate = fixed_return_gradient(beta), surrogate_gradient(beta)
    assert np.abs(exact - surrogate).max() > 0.01
    assert_same(gradient, factor * (exact if name == "rloo" else surrogate))


# One case of each policy gradient of the table: bounds that reach many ratios, from both sides.
NARROW = {
    "reinforce": ({"max_ratio": 1.2}, 1),
    "reinforce-mean": ({"max_ratio": 1.2}, 2),
    "rloo": ({"samples": 2, "clip_high": 0.4}, 2),
    "remax": ({"max_ratio": 1.2}, 1),
    "grpo": ({"samples": 2, "clip_high": 0.4}, 2),
    "dr-grpo": ({"samples": 2}, 2),
    "gspo": ({"samples": 2, "clip": 0.1, "clip_high": 0.2}, 2),
    "ppo": ({"clip": 0.1}, 2),
}


@pytest.mark.parametrize("name", NARROW)
def test_bounds_on_the_ratios_of_stale_samples_follow_the_formula(name):
    fields, size = NARROW[name]
    config, beta = AlgorithmConfig(name, **fields), in_reward(name)
    gradient = library_gradient(config, size, stale=True, beta=beta)
    assert_same(gradient, paper_gradient(config, size, stale=True, beta=beta))
    # Not what it is without bounds.
    assert (
        np.abs(
            gradient - paper_gradient(unbounded(name, **fields), size, stale=True, beta=beta)
        ).max()
        > 1e-3
    )


@pytest.mark.parametrize("name", [name for name, rule in ALGORITHMS.items() if rule.ratio])
def test_the_bounds_are_reached_on_both_sides_by_both_signs(name):
    """Of the four corners two are clipped and two are not; all are among the batches above."""
    fields, size = NARROW[name]
    config, index_NB = AlgorithmConfig(name, **fields), batches(size)
    mask_NBT = MASK_AT[index_NB]
    ratio_NBT = paper_ratios(config, index_NB, OLD)[mask_NBT]
    advantage_NBT = paper_advantages(config, index_NB, OLD, in_reward(name))[mask_NBT]
    high = config.clip if config.clip_high is None else config.clip_high
    for outside in (ratio_NBT > 1 + high, ratio_NBT < 1 - config.clip):
        for sign in (1, -1):
            assert np.mean(outside & (sign * advantage_NBT > 0)) > 0.01
    assert np.mean(clipped_away(config, ratio_NBT, advantage_NBT)) > 0.02
