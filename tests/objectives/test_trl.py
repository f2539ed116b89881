"""Losses and advantages against TRL's own, in torch (`tests/trl_reference.py`): values, and
gradients in the logits.

Both sides get the same logits, ragged masks, rewards, and log-probabilities of another policy and
of a reference; the chain goes from rewards and logits to the loss. Ours also gets NaN outside the
mask. TRL's mean over rows counts empty rows and ours does not, so that every row here has a token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.models.logprobs import next_token_logprobs
from perl_jax.objectives import (
    advantages,
    algorithms,
    kl,
    losses,
    pairs,
    policy_gradient,
    preference,
    ratios,
)
from perl_jax.objectives.algorithms import AlgorithmConfig, Outcomes
from perl_jax.types import Tokens
from tests import trl_reference

pytest.importorskip("torch")
pytest.importorskip("trl", minversion="1.16.0")

COLUMNS, VOCABULARY, SAMPLES = 11, 13, 4
# Not the number of columns that responses may have here: a division by that would show.
ROOM = 16
TEMPERATURE = 0.7
LOW, HIGH = 0.2, 0.28
# What TRL adds to a group's standard deviation; our default is larger.
EPSILON = 1e-4
# Two prompts. Above (+) and below (-) the mean of its own: + - + -, - + - +.
REWARD_B = np.array([1.0, -0.5, 2.0, 0.1, -0.3, 1.7, -1.2, 0.4], np.float32)
# Logarithms of the ratios of rows: beyond each bound and between them, for both signs above.
DRIFT_B = np.array([0.5, -0.5, -0.6, 0.6, -0.1, 0.1, 0.8, -0.8])
# Response columns; row 2 has a single token, and row 5 a gap besides.
SPANS = ((3, 11), (2, 6), (1, 2), (5, 10), (4, 9), (1, 11), (6, 8), (2, 9))
GAP = (5, 4)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Random rows; old_BT and ref_BT are NaN outside the mask."""

    logits_BTV: np.ndarray
    tokens_BT: np.ndarray
    mask_BT: np.ndarray
    old_BT: np.ndarray
    ref_BT: np.ndarray


def make_batch(level: str = "token") -> Batch:
    """A batch whose ratios of that level (`ratios.RATIOS`) are those of DRIFT_B, or lie around
    them.
    """
    rng = np.random.default_rng(0)
    logits_BTV = (2 * rng.normal(size=(len(SPANS), COLUMNS, VOCABULARY))).astype(np.float32)
    tokens_BT = rng.integers(VOCABULARY, size=logits_BTV.shape[:2])
    mask_BT = np.zeros(tokens_BT.shape, bool)
    for mask_T, span in zip(mask_BT, SPANS, strict=True):
        mask_T[slice(*span)] = True
    mask_BT[GAP] = False
    logp_BT = trl_reference.logprobs(logits_BTV, tokens_BT, TEMPERATURE)
    noise_BT, apart_BT = (
        rng.normal(size=(2, *tokens_BT.shape)) * np.array([0.3, 0.8])[:, None, None]
    )
    length_B1 = mask_BT.sum(axis=1, keepdims=True)
    noise_BT -= np.sum(noise_BT, axis=1, keepdims=True, where=mask_BT) / length_B1
    drift_BT = DRIFT_B[:, None] / (length_B1 if level == "product" else 1) + noise_BT
    fill = lambda x_BT: np.where(mask_BT, x_BT, np.nan).astype(np.float32)
    return Batch(logits_BTV, tokens_BT, mask_BT, fill(logp_BT - drift_BT), fill(logp_BT + apart_BT))


def our_advantages(config: AlgorithmConfig, return_B: np.ndarray, mask_BT: np.ndarray) -> jax.Array:
    advantage_BT, target_BT = algorithms.compute_advantages(
        config, Outcomes(jnp.asarray(return_B), jnp.zeros(mask_BT.shape), mask_BT)
    )
    assert target_BT is None
    return advantage_BT


def our_policy_loss(
    config: AlgorithmConfig, given: Batch, advantage_BT: jax.Array, logits_BTV: jax.Array
) -> jax.Array:
    logp_BT = next_token_logprobs(logits_BTV, given.tokens_BT, TEMPERATURE)
    return algorithms.policy_loss(
        config, logp_BT, given.old_BT, advantage_BT, given.mask_BT, ROOM
    ).mean


def differentiate(
    loss: Callable[[jax.Array], jax.Array], logits_BTV: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Value and gradient. Not compiled, which would take longer than all else here."""
    return jax.value_and_grad(loss)(jnp.asarray(logits_BTV))


def assert_close(ours: jax.Array, theirs: np.ndarray | float) -> None:
    """To float32's accuracy. Numbers that are all tiny would agree whatever the formulas."""
    size = np.max(np.abs(theirs))
    assert size > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * size)


def assert_clipped(config: AlgorithmConfig, given: Batch, advantage_BT: jax.Array) -> None:
    """Ratios lie beyond both bounds, with advantages of both signs, and between; none is near
    one.
    """
    logp_BT = trl_reference.logprobs(given.logits_BTV, given.tokens_BT, TEMPERATURE)
    ratio_BT = ratios.importance_ratio(logp_BT, given.old_BT, given.mask_BT, config.rule.ratio)
    r, a = np.asarray(ratio_BT)[given.mask_BT], np.asarray(advantage_BT)[given.mask_BT]
    low, high = 1 - config.clip, 1 + (config.clip_high or config.clip)
    for where, sign in itertools.product((r < low, r > high, (low < r) & (r < high)), (1, -1)):
        assert np.any(where & (sign * a > 0.1))
    assert np.min(np.abs(r[:, None] - np.array([low, high]))) > 1e-3


def test_logprobs():
    given = make_batch()
    for temperature in (1.0, TEMPERATURE):
        expected_BT = trl_reference.logprobs(given.logits_BTV, given.tokens_BT, temperature)
        assert_close(
            next_token_logprobs(given.logits_BTV, given.tokens_BT, temperature), expected_BT
        )


# Ours, and TRL's settings of the same loss.
POLICY_LOSSES = {
    "grpo": (
        AlgorithmConfig("grpo", std_epsilon=EPSILON, clip=LOW, clip_high=HIGH),
        {"loss_type": "grpo"},
    ),
    "grpo, one epsilon": (
        AlgorithmConfig("grpo", std_epsilon=EPSILON, clip=HIGH),
        {"loss_type": "grpo"},
    ),
    "bnpo": (
        AlgorithmConfig("grpo", std_epsilon=EPSILON, normalise="token", clip=LOW, clip_high=HIGH),
        {"loss_type": "bnpo"},
    ),
    "dapo": (
        AlgorithmConfig("grpo", std_epsilon=EPSILON, normalise="token", clip=LOW, clip_high=HIGH),
        {"loss_type": "dapo"},
    ),
    "dr-grpo": (
        AlgorithmConfig("dr-grpo", clip=LOW, clip_high=HIGH),
        {"loss_type": "dr_grpo", "max_completion_length": ROOM},
    ),
    "gspo": (
        AlgorithmConfig("gspo", std_epsilon=EPSILON, clip=LOW, clip_high=HIGH),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
}


def case(name: str) -> tuple[AlgorithmConfig, dict, Batch, jax.Array, np.ndarray]:
    """(our config, TRL's settings, the batch, our advantages, TRL's) of an entry of
    POLICY_LOSSES.
    """
    config, theirs = POLICY_LOSSES[name]
    theirs = {
        "epsilon": config.clip,
        "epsilon_high": config.clip_high,
        "temperature": TEMPERATURE,
        **theirs,
    }
    given = make_batch(config.rule.ratio)
    scale = "group" if config.rule.advantage == "group-std" else "none"
    expected_B = trl_reference.grpo_advantages(REWARD_B, SAMPLES, scale)
    return config, theirs, given, our_advantages(config, REWARD_B, given.mask_BT), expected_B


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_clipped_losses_of_groups(name):
    config, theirs, given, advantage_BT, advantage_B = case(name)
    assert_clipped(config, given, advantage_BT)
    arrays = (given.logits_BTV, given.tokens_BT, given.mask_BT, given.old_BT, None, advantage_B)
    expected, expected_BTV = trl_reference.grpo(*arrays, **theirs)
    value, gradient_BTV = differentiate(
        functools.partial(our_policy_loss, config, given, advantage_BT), given.logits_BTV
    )
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


class GivenLogits:
    """A language model whose logits are its policy."""

    def logprobs(
        self,
        base: None,
        policy: jax.Array,
        tokens_BT: jax.Array,
        valid_BT: jax.Array,
        temperature: float,
        *_: object,
        start: int,
    ):
        return next_token_logprobs(policy, tokens_BT, temperature), jnp.zeros(tokens_BT.shape)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr-grpo", "gspo"])
def test_the_kl_in_the_loss(name):
    # Far enough from 1 to show a coefficient that is left out, or put in twice.
    beta = 0.7
    config, theirs, given, advantage_BT, advantage_B = case(name)
    arrays = (
        given.logits_BTV,
        given.tokens_BT,
        given.mask_BT,
        given.old_BT,
        given.ref_BT,
        advantage_B,
    )
    expected, expected_BTV = trl_reference.grpo(
        *arrays, beta=beta, use_bias_correction_kl=False, **theirs
    )
    without, without_BTV = trl_reference.grpo(*arrays, **theirs)
    assert expected - without > 0.05
    kl_size = np.max(np.abs(expected_BTV - without_BTV))

    sequences = Tokens(given.tokens_BT, np.ones_like(given.mask_BT), given.mask_BT)
    weight_B = jnp.full(len(REWARD_B), beta)
    experience = policy_gradient.Experience(
        sequences, given.old_BT, advantage_BT, reference_BT=given.ref_BT, kl_weight_B=weight_B
    )

    def objective(logits_BTV):
        roles = {"policy": logits_BTV}
        loss, _ = policy_gradient.policy_gradient_objective(
            GivenLogits(), config, TEMPERATURE, "k3", ROOM, roles, None, experience, None
        )
        return loss.mean

    value, gradient_BTV = differentiate(objective, given.logits_BTV)
    assert_close(value, expected)

    def plain(logits_BTV):
        logp_BT = next_token_logprobs(logits_BTV, given.tokens_BT, TEMPERATURE)
        kl_BT = beta * kl.k3(logp_BT, np.nan_to_num(given.ref_BT))
        policy = our_policy_loss(config, given, advantage_BT, logits_BTV)
        return (
            policy
            + losses.reduce_tokens(
                kl_BT, given.mask_BT, config.reduction, config.constant_length(ROOM)
            ).mean
        )

    # TRL differentiates k3 itself; the objective has k2's gradient, which is another one.
    assert_close(differentiate(plain, given.logits_BTV)[1], expected_BTV)
    assert np.max(np.abs(gradient_BTV - expected_BTV)) > 0.1 * kl_size


@pytest.mark.parametrize("most", [1.0, 1.5])
def test_reinforce_of_stale_samples_is_cispo(most):
    # CISPO (arXiv 2506.13585) is REINFORCE weighed by a truncated ratio, over all tokens.
    config = AlgorithmConfig("reinforce-mean", normalise="token", max_ratio=most)
    given = make_batch()
    advantage_BT = our_advantages(config, REWARD_B, given.mask_BT)
    ratio = np.exp(
        trl_reference.logprobs(given.logits_BTV, given.tokens_BT, TEMPERATURE) - given.old_BT
    )[given.mask_BT]
    assert np.any(ratio > most + 0.1) and np.any(ratio < most - 0.1)
    assert np.min(np.abs(ratio - most)) > 1e-3
    arrays = (
        given.logits_BTV,
        given.tokens_BT,
        given.mask_BT,
        given.old_BT,
        None,
        REWARD_B - REWARD_B.mean(),
    )
    expected, expected_BTV = trl_reference.grpo(
        *arrays, loss_type="cispo", epsilon_high=most, temperature=TEMPERATURE
    )
    value, gradient_BTV = differentiate(
        functools.partial(our_policy_loss, config, given, advantage_BT), given.logits_BTV
    )
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


@pytest.mark.parametrize(("scale", "size"), [("group", 1.0), ("group", 1e-3), ("none", 1.0)])
def test_group_advantages(scale, size):
    # A third prompt, whose rewards are equal. Rewards of 1e-3 are near the epsilon of the division.
    reward_B = size * np.concatenate([REWARD_B, np.ones(SAMPLES, np.float32)])
    expected_B = trl_reference.grpo_advantages(reward_B, SAMPLES, scale)
    advantage_PG = advantages.group_advantages(
        reward_B.reshape(-1, SAMPLES), normalise_std=scale == "group"
    )
    assert_close(advantage_PG.reshape(-1), expected_B)
    np.testing.assert_array_equal(advantage_PG[2], np.zeros(SAMPLES))


@pytest.mark.parametrize(
    ("beta", "clip", "high"), [(0.0, None, None), (0.1, None, HIGH), (0.1, 1.1, HIGH)]
)
def test_rloo(beta, clip, high):
    config = AlgorithmConfig("rloo", clip=LOW, clip_high=high)
    given = make_batch("product")
    # From scores to the loss: clip, subtract the KL of the whole response, compare, weigh.
    score_B = advantages.shape_scores(REWARD_B, np.ones(len(REWARD_B), bool), clip=clip)
    kl_B = kl.sequence_kl(kl.kl_in_reward(given.old_BT, given.ref_BT), given.mask_BT)
    return_B = advantages.terminal_return(score_B, kl_B, beta, score_weight=1.0)
    advantage_BT = our_advantages(config, return_B, given.mask_BT)
    expected_B = trl_reference.rloo_advantages(
        REWARD_B,
        SAMPLES,
        beta=beta,
        old_logp_BT=given.old_BT,
        ref_logp_BT=given.ref_BT,
        mask_BT=given.mask_BT,
        reward_clip_range=None if clip is None else (-clip, clip),
    )
    assert_close(advantage_BT, np.where(given.mask_BT, expected_B[:, None], 0))
    assert_clipped(config, given, advantage_BT)
    if beta:
        assert np.ptp(beta * kl_B) > 0.1
    if clip is not None:
        assert np.max(REWARD_B) > clip + 0.05 and np.min(REWARD_B) < -clip - 0.05

    arrays = (given.logits_BTV, given.tokens_BT, given.mask_BT, given.old_BT, expected_B)
    expected, expected_BTV = trl_reference.rloo(
        *arrays, epsilon=LOW, epsilon_high=high, temperature=TEMPERATURE
    )
    value, gradient_BTV = differentiate(
        functools.partial(our_policy_loss, config, given, advantage_BT), given.logits_BTV
    )
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


def our_preference(given: Batch, logits_BTV: jax.Array, kind: str, **options: float) -> jax.Array:
    """Of pairs: the first half of the rows is chosen, the second half rejected."""
    logp_BT = next_token_logprobs(logits_BTV, given.tokens_BT)
    ratio_B = preference.response_log_ratio(
        logp_BT, given.ref_BT, given.mask_BT, mean=kind == "ipo"
    )
    chosen_B, rejected_B = jnp.split(ratio_B, 2)
    return losses.preference(
        chosen_B, rejected_B, jnp.ones(chosen_B.shape), kind=kind, **options
    ).mean


# Our kind by TRL's name of it. TRL's IPO is on means over tokens.
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("theirs", "kind"), [("sigmoid", "dpo"), ("ipo", "ipo")])
def test_preference_losses(theirs, kind, beta):
    given = make_batch()
    arrays = (given.logits_BTV, given.tokens_BT, given.mask_BT, given.ref_BT)
    expected, expected_BTV = trl_reference.dpo(*arrays, beta=beta, loss_type=theirs)
    value, gradient_BTV = differentiate(
        functools.partial(our_preference, given, kind=kind, beta=beta), given.logits_BTV
    )
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


def test_conservative_dpo_is_dpo_of_pairs_and_of_swapped_pairs():
    # TRL has no conservative DPO: 1 - e times its DPO, and e times that of the pairs the other way.
    given, beta, smoothing = make_batch(), 0.5, 0.2
    arrays = (given.logits_BTV, given.tokens_BT, given.mask_BT, given.ref_BT)
    swap = lambda x_B: np.concatenate(np.split(x_B, 2)[::-1])
    right, right_BTV = trl_reference.dpo(*arrays, beta=beta)
    wrong, wrong_BTV = trl_reference.dpo(*map(swap, arrays), beta=beta)
    assert abs(right - wrong) > 0.02
    loss = functools.partial(
        our_preference, given, kind="dpo", beta=beta, label_smoothing=smoothing
    )
    value, gradient_BTV = differentiate(loss, given.logits_BTV)
    assert_close(value, (1 - smoothing) * right + smoothing * wrong)
    assert_close(gradient_BTV, (1 - smoothing) * right_BTV + smoothing * swap(wrong_BTV))


@pytest.mark.parametrize("far", [1.0, -1.0], ids=["KL above 0", "KL cut at 0"])
def test_kto(far):
    # Each row's mismatched response is another row's, under the same logits.
    given = make_batch()
    rng = np.random.default_rng(3)
    label_B = np.array([1, 0, 0, 1, 1, 0, 1, 1], np.float32)
    other_BT, mask_BT = np.roll(given.tokens_BT, 1, axis=0), np.roll(given.mask_BT, 1, axis=0)
    logp_BT = trl_reference.logprobs(given.logits_BTV, other_BT)
    reference_BT = np.where(mask_BT, logp_BT - far * rng.random(logp_BT.shape), np.nan)
    settings = {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    expected, expected_BTV, expected_kl = trl_reference.kto(
        given.logits_BTV,
        given.tokens_BT,
        given.mask_BT,
        given.ref_BT,
        label_B,
        (other_BT, mask_BT, reference_BT),
        **settings,
    )
    assert (expected_kl > 0.5) == (far > 0)
    weight_B = np.ones(len(label_B), np.float32)

    def ratios_of(logits_BTV, tokens_BT, reference_BT, mask_BT):
        logp_BT = next_token_logprobs(logits_BTV, tokens_BT)
        return preference.response_log_ratio(logp_BT, reference_BT, mask_BT)

    def loss(logits_BTV):
        other_B = ratios_of(logits_BTV, other_BT, reference_BT, mask_BT)
        kl_B = jnp.full(len(label_B), preference.mismatched_kl(other_B, weight_B))
        ratio_B = ratios_of(logits_BTV, given.tokens_BT, given.ref_BT, given.mask_BT)
        return preference.kto(ratio_B, label_B, kl_B, weight_B, **settings).mean

    other_B = ratios_of(given.logits_BTV, other_BT, reference_BT, mask_BT)
    kl = preference.mismatched_kl(other_B, weight_B)
    assert float(kl) == pytest.approx(expected_kl, rel=1e-5)
    value, gradient_BTV = differentiate(loss, given.logits_BTV)
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


def test_orpo():
    # TRL's likelihood is a mean over all tokens of prompts and responses: here all chosen rows have
    # ten tokens of response, and no prompt but column 0.
    given, beta = make_batch(), 0.4
    mask_BT = given.mask_BT.copy()
    mask_BT[: len(mask_BT) // 2, 1:] = True
    expected, expected_BTV = trl_reference.orpo(
        given.logits_BTV, given.tokens_BT, mask_BT, beta=beta
    )

    def loss(logits_BTV):
        logp_BT = next_token_logprobs(logits_BTV, given.tokens_BT)
        chosen_B, rejected_B = jnp.split(preference.mean_logprob(logp_BT, mask_BT), 2)
        weight_B = jnp.ones(chosen_B.shape)
        return preference.orpo(chosen_B, rejected_B, weight_B, odds_weight=beta)[0].mean

    value, gradient_BTV = differentiate(loss, given.logits_BTV)
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


@pytest.mark.parametrize(("theirs", "kind"), [("sigmoid", "dpo"), ("ipo", "ipo")])
def test_online_dpo(theirs, kind):
    # TRL's rows are all first responses, then all second ones; ours are prompt by prompt.
    given, config = make_batch(), AlgorithmConfig(f"online-{kind}")
    beta, reward_B = 0.3, np.array([1.0, -0.5, 2.0, 0.1, -0.3, 1.7, 2.5, 0.4], np.float32)
    ref_BTV = given.logits_BTV + np.random.default_rng(5).normal(size=given.logits_BTV.shape)
    ref_BTV = ref_BTV.astype(np.float32)
    expected, expected_BTV = trl_reference.online_dpo(
        given.logits_BTV,
        given.tokens_BT,
        given.mask_BT,
        ref_BTV,
        reward_B,
        beta=beta,
        loss_type=theirs,
    )
    order = np.arange(8).reshape(2, 4).T.reshape(-1)
    mask_BT, tokens_BT = given.mask_BT[order], given.tokens_BT[order]
    advantage_BT = our_advantages(config, reward_B[order], mask_BT)
    reference_BT = next_token_logprobs(ref_BTV[order], tokens_BT)

    def loss(logits_BTV):
        logp_BT = next_token_logprobs(logits_BTV[order], tokens_BT)
        beta_B = jnp.full(8, beta)
        return pairs.pair_loss(config, logp_BT, reference_BT, advantage_BT, mask_BT, beta_B)[0].mean

    value, gradient_BTV = differentiate(loss, given.logits_BTV)
    assert_close(value, expected)
    assert_close(gradient_BTV, expected_BTV)


def our_reward_loss(
    chosen_B: jax.Array, rejected_B: jax.Array, **options: np.ndarray | float
) -> jax.Array:
    return losses.bradley_terry(chosen_B, rejected_B, jnp.ones(chosen_B.shape), **options).mean


@pytest.mark.parametrize("centring", [0.0, 0.1])
@pytest.mark.parametrize("margins", [False, True], ids=["no margin", "margin"])
def test_reward_loss(margins, centring):
    rng = np.random.default_rng(1)
    chosen_B, rejected_B = rng.normal(size=(2, 6)).astype(np.float32)
    margin_B = 2 * rng.random(6).astype(np.float32)
    expected, *expected_gradients = trl_reference.reward(
        chosen_B, rejected_B, margin_B if margins else None, centring or None
    )
    options = {"margin": margin_B if margins else 0.0, "centring": centring}
    value, gradients = jax.value_and_grad(functools.partial(our_reward_loss, **options), (0, 1))(
        chosen_B, rejected_B
    )
    assert_close(value, expected)
    for gradient_B, expected_B in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient_B, expected_B)


def test_raters_who_disagree_are_pairs_both_ways():
    # p of them prefer the chosen response: p times TRL's loss, and 1 - p times the other way.
    rng = np.random.default_rng(2)
    chosen_B, rejected_B = rng.normal(size=(2, 6)).astype(np.float32)
    margin_B, p = rng.random(6).astype(np.float32), 0.7
    right, right_chosen_B, right_rejected_B = trl_reference.reward(chosen_B, rejected_B, margin_B)
    wrong, wrong_rejected_B, wrong_chosen_B = trl_reference.reward(rejected_B, chosen_B, -margin_B)
    loss = functools.partial(our_reward_loss, margin=margin_B, probability=p)
    value, (to_chosen_B, to_rejected_B) = jax.value_and_grad(loss, (0, 1))(chosen_B, rejected_B)
    assert_close(value, p * right + (1 - p) * wrong)
    assert_close(to_chosen_B, p * right_chosen_B + (1 - p) * wrong_chosen_B)
    assert_close(to_rejected_B, p * right_rejected_B + (1 - p) * wrong_rejected_B)
