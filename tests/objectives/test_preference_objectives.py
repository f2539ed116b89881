"""KTO and ORPO: values and gradients by hand in float64, corners, and the partners of rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.data.mismatched import partners, with_others
from perl_jax.data.tokenise import Ragged, TokenRows
from perl_jax.errors import UserError
from perl_jax.models import passes
from perl_jax.objectives import preference
from perl_jax.objectives.losses import LossSum
from perl_jax.types import Labelled, Pairs
from tests import small

NAN = float("nan")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# Four responses and filler. beta (r - z) = 1, -1/2, 1/2 and -1 with beta 1/2 and z = 1.
RATIO_B = np.array([3.0, 0.0, 2.0, -1.0, NAN])
LABEL_B = np.array([1.0, 1.0, 0.0, 0.25, NAN])
WEIGHT_B = np.array([1.0, 0.5, 1.0, 2.0, 0.0])
KL_B = np.array([1.0, 1.0, 1.0, 1.0, NAN])
KTO = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}


def test_kto_by_hand():
    with jax.enable_x64(True):
        loss = functools.partial(preference.kto, **KTO)
        found = loss(RATIO_B, LABEL_B, KL_B, WEIGHT_B)
        desirable, undesirable = 1.5, 0.8
        total = (
            desirable * (1 - sigmoid(1))
            + 0.5 * desirable * (1 - sigmoid(-0.5))
            + undesirable * (1 - sigmoid(-0.5))
            + 2 * (0.25 * desirable * (1 - sigmoid(-1)) + 0.75 * undesirable * (1 - sigmoid(1)))
        )
        np.testing.assert_allclose(found.total, total, rtol=1e-12)
        assert float(found.weight) == 4.5
        # The derivative of sigmoid(x) is s (1 - s); a larger r helps a desirable response.
        slope = lambda x: 0.5 * sigmoid(x) * (1 - sigmoid(x))
        expected_B = [
            -desirable * slope(1),
            -0.5 * desirable * slope(-0.5),
            undesirable * slope(0.5),
            2 * (0.75 * undesirable - 0.25 * desirable) * slope(-1),
            0,
        ]
        to_ratio_B, to_kl_B = jax.grad(
            lambda r_B, z_B: loss(r_B, LABEL_B, z_B, WEIGHT_B).total, (0, 1)
        )(jnp.asarray(RATIO_B), jnp.asarray(KL_B))
        np.testing.assert_allclose(to_ratio_B, expected_B, rtol=1e-12)
        np.testing.assert_array_equal(to_kl_B, np.zeros(5))


def test_the_kl_is_the_mean_of_real_rows_and_never_negative():
    weight_B = np.array([1.0, 3.0, 0.0], np.float32)
    estimate = lambda *ratio: preference.mismatched_kl(jnp.array(ratio), weight_B)
    # Rows count once, whatever their weight in the loss.
    assert float(estimate(0.5, 1.5, NAN)) == 1.0
    assert float(estimate(-2.0, 1.0, NAN)) == 0.0
    np.testing.assert_array_equal(jax.grad(estimate, (0, 1))(0.5, 1.5, 9.0), (0.0, 0.0))


# log p: of four pairs, the last one filler.
CHOSEN_B, REJECTED_B = np.log([0.5, 0.9, 0.2, NAN]), np.log([0.25, 0.1, 0.8, NAN])
PAIR_B = np.array([1.0, 0.5, 2.0, 0.0])


def test_orpo_by_hand():
    # Odds 1 against 1/3, 9 against 1/9, 1/4 against 4: sigmoid(log ratio) = ratio / (1 + ratio).
    ratios = np.array([3.0, 81.0, 1 / 16])
    odds = PAIR_B[:3] @ -np.log(ratios / (1 + ratios))
    supervised = PAIR_B[:3] @ -np.log([0.5, 0.9, 0.2])
    with jax.enable_x64(True):
        loss, terms = preference.orpo(CHOSEN_B, REJECTED_B, PAIR_B, odds_weight=0.3)
        np.testing.assert_allclose(loss.total, supervised + 0.3 * odds, rtol=1e-12)
        np.testing.assert_allclose(terms["orpo/odds_loss"].total, odds, rtol=1e-12)
        np.testing.assert_allclose(terms["orpo/sft_loss"].total, supervised, rtol=1e-12)
        assert {float(each.weight) for each in (loss, *terms.values())} == {3.5}
        total = lambda c_B, r_B: preference.orpo(c_B, r_B, PAIR_B, odds_weight=0.3)[0].total
        to_chosen_B, to_rejected_B = jax.grad(total, (0, 1))(
            jnp.asarray(CHOSEN_B), jnp.asarray(REJECTED_B)
        )
    # d log odds / d log p = 1 / (1 - p).
    wrong = 1 / (1 + ratios)
    expected = -PAIR_B[:3] * (1 + 0.3 * wrong / np.array([0.5, 0.1, 0.8]))
    np.testing.assert_allclose(to_chosen_B, [*expected, 0], rtol=1e-12)
    expected = PAIR_B[:3] * 0.3 * wrong / np.array([0.75, 0.9, 0.2])
    np.testing.assert_allclose(to_rejected_B, [*expected, 0], rtol=1e-12)


def test_odds_are_accurate_and_finite_for_every_probability():
    logp_B = np.array([0.0, -1e-7, -1e-3, -0.6, -0.8, -20.0, -300.0], np.float32)
    exact_B = np.minimum(logp_B.astype(np.float64), preference.MOST_LIKELY)
    exact_B = exact_B - np.log(-np.expm1(exact_B))
    np.testing.assert_allclose(preference.log_odds(logp_B), exact_B, rtol=1e-6, atol=1e-6)
    slope_B = jax.vmap(jax.grad(preference.log_odds))(jnp.asarray(logp_B))
    assert np.all(np.isfinite(slope_B))
    np.testing.assert_allclose(slope_B[2:], -1 / np.expm1(logp_B[2:].astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("field", KTO)
def test_kto_refuses_numbers_that_are_not_above_0(field):
    for value in (0.0, NAN):
        with pytest.raises(ValueError, match="must be above 0"):
            preference.kto(RATIO_B, LABEL_B, KL_B, WEIGHT_B, **{**KTO, field: value})
    with pytest.raises(ValueError, match=r"odds_weight 0\.0 must be above 0"):
        preference.orpo(CHOSEN_B, REJECTED_B, PAIR_B, odds_weight=0.0)


@pytest.mark.slow
def test_the_objectives_read_a_model():
    """Losses, metrics and gradients of the tiny decoder, from its log-probabilities in NumPy; one
    gradient by finite differences.
    """
    noise = np.random.default_rng(3)
    base, role = small.make_base(), small.make_adapter(head=False)
    own, other = small.make_tokens(), small.make_tokens(small.ROWS[::-1], seed=5)
    weight_B = np.array([1, 1, 0, 1, 1, 2, 1, 0.5], np.float32)
    response = lambda tokens: np.asarray(tokens.response_BT)
    read = jax.jit(lambda tokens: passes.sequence_logprobs(small.LM, base, role, tokens))
    logp = lambda tokens: np.asarray(read(tokens), np.float64)
    mean = lambda x_B, w_B: np.sum(x_B * w_B) / np.sum(w_B)
    label_B = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32)
    reference_BT = logp(own) + noise.normal(0, 0.7, own.tokens_BT.shape)
    kl_B = np.full(8, 0.3, np.float32)
    batch = preference.Unpaired(
        Labelled(own, label_B, weight_B), reference_BT.astype(np.float32), kl_B
    )
    ratio_B = np.sum((logp(own) - reference_BT) * response(own), axis=1)
    settings = {"beta": 0.4, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    objective = lambda role: preference.kto_objective(
        small.LM, {"policy": role}, base, batch, None, **settings
    )
    loss, logs, error = tried(objective, role)
    assert error < 1e-3
    value_B = np.where(
        label_B > 0.5,
        1.2 * (1 - sigmoid(0.4 * (ratio_B - 0.3))),
        0.7 * (1 - sigmoid(0.4 * (0.3 - ratio_B))),
    )
    right_B = (ratio_B > 0.3) == (label_B > 0.5)
    for found, expected in (
        (loss, mean(value_B, weight_B)),
        (logs["train/accuracy"], mean(right_B, weight_B)),
        (logs["kto/desirable_reward"], mean(0.4 * ratio_B, weight_B * label_B)),
        (logs["kto/undesirable_reward"], mean(0.4 * ratio_B, weight_B * (1 - label_B))),
        (logs["kto/kl"], 0.3),
    ):
        assert float(found.mean) == pytest.approx(expected, rel=1e-4)

    chosen_B, rejected_B = (
        np.sum(logp(side) * response(side), axis=1) / np.maximum(response(side).sum(axis=1), 1)
        for side in (own, other)
    )
    odds = lambda x_B: x_B - np.log(-np.expm1(x_B))
    # A row of weight 0 may have an empty response: its mean log-probability is 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_B = np.logaddexp(0, odds(rejected_B) - odds(chosen_B))
    tokens = response(own).any(axis=1) & response(other).any(axis=1)
    weight_B = weight_B * tokens
    objective = lambda role: preference.orpo_objective(
        small.LM, {"policy": role}, base, Pairs(own, other, weight_B), None, odds_weight=0.6
    )
    loss, logs, error = tried(objective, role)
    assert error < 1e-3
    ratio_B, chosen_B, rejected_B = (
        np.where(tokens, x_B, 0) for x_B in (ratio_B, chosen_B, rejected_B)
    )
    for found, expected in (
        (loss, mean(-chosen_B + 0.6 * ratio_B, weight_B)),
        (logs["orpo/odds_loss"], mean(ratio_B, weight_B)),
        (logs["orpo/sft_loss"], mean(-chosen_B, weight_B)),
        (logs["train/accuracy"], mean(chosen_B > rejected_B, weight_B)),
    ):
        assert float(found.mean) == pytest.approx(expected, rel=1e-4)


def tried(objective, role) -> tuple[LossSum, dict[str, LossSum], float]:
    """Loss and logs of an objective; and how far the gradient of its mean lies from a central
    difference along a random direction, relative to the difference.
    """

    def mean(role):
        loss, logs = objective(role)
        return loss.mean, (loss, logs)

    compute = jax.jit(jax.value_and_grad(mean, has_aux=True))
    noise = np.random.default_rng(4)
    direction = jax.tree.map(lambda leaf: noise.normal(size=leaf.shape).astype(np.float32), role)
    at = lambda size: float(compute(jax.tree.map(lambda x, d: x + size * d, role, direction))[0][0])
    expected = (at(1e-3) - at(-1e-3)) / 2e-3
    (_, (loss, logs)), gradient = compute(role)
    found = sum(
        np.vdot(g, d)
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert abs(expected) > 1e-2
    return loss, logs, abs(found - expected) / abs(expected)


def test_partners_have_other_prompts():
    assert partners(["a", "b"]).tolist() == [1, 0]
    # Half way round, and on to the first prompt that differs; white space does not count.
    assert partners(["a", "a", "b", "b "]).tolist() == [2, 3, 0, 1]
    assert partners(["a", "b", "a", "b"]).tolist() == [3, 0, 1, 2]
    assert partners(["a", "a", "a", "b"]).tolist() == [3, 3, 3, 1]
    # No other prompt: another row.
    assert partners(["a", " a", "a"]).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="has 1 labelled row; KTO compares rows"):
        partners(["a"])


def test_the_response_of_the_partner_follows_the_prompt():
    ragged = lambda *rows: Ragged.of(rows)
    rows = TokenRows(
        "labels",
        ragged([1], [2, 3], [4]),
        (ragged([5], [6, 7, 9], [8, 9]),),
        {"label": np.array([1.0, 0.0, 1.0], np.float32)},
        {},
        tails=(np.array([0, 1, 1]),),
    )
    found = with_others(rows, ["x", "y", "z"])
    own, other = found.responses
    assert found.kind == "mismatched" and own is rows.responses[0]
    assert [other[index].tolist() for index in range(3)] == [[6, 7, 9], [8, 9], [5]]
    assert [tail.tolist() for tail in found.tails] == [[0, 1, 1], [1, 1, 0]]
    assert found.lengths.tolist() == [4, 5, 3]
