"""Losses and diagnostics: hand numbers, padding, microbatches, stability."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.objectives import losses, ratios
from perl_jax.objectives.losses import LossSum

NAN = float("nan")
LOG2, LOG3 = np.log(2.0), np.log(3.0)

# Rows of 2, 1 and 0 tokens.
MASK_BT = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
LOGP_BT = np.array([[NAN, -1.0, -2.0], [NAN, NAN, -4.0], [NAN, NAN, NAN]], np.float32)


@pytest.fixture(params=["eager", "jit"])
def wrap(request):
    return jax.jit if request.param == "jit" else (lambda f: f)


def check(loss: LossSum, total: float, weight: float) -> None:
    np.testing.assert_allclose(loss.total, total, rtol=1e-6)
    assert loss.weight == weight
    np.testing.assert_allclose(loss.mean, total / weight if weight else 0, rtol=1e-6)
    assert loss.total.dtype == loss.weight.dtype == jnp.float32
    assert jnp.shape(loss.total) == jnp.shape(loss.weight) == ()


def test_sums_add_and_divide_once(wrap):
    # Microbatches of 3 tokens with loss 6 and 1 token with loss 10: 16 / 4, not (2 + 10) / 2.
    first = LossSum(jnp.float32(6), jnp.float32(3))
    second = LossSum(jnp.float32(10), jnp.float32(1))
    check(wrap(lambda a, b: a + b)(first, second), 16, 4)
    # Weights that add up to less than 1 divide as well: four rows of a quarter of a sixth.
    check(LossSum(jnp.float32(0.5), jnp.float32(0.25)), 0.5, 0.25)
    check(LossSum(jnp.float32(0), jnp.float32(0)), 0, 0)


@pytest.mark.parametrize(
    ("normalise", "length", "total", "weight", "slopes"),
    [
        # Losses 1 and 2, 4, and a row without a token. Slopes of the total, of each row's tokens.
        ("token", None, 7.0, 3, (1.0, 1.0)),
        ("sequence", None, 7.0, 2, (1.0, 1.0)),
        ("sequence-mean", None, 1.5 + 4, 2, (0.5, 1.0)),
        ("constant", 5, 7 / 5, 2, (0.2, 0.2)),
    ],
)
def test_reduce_tokens_by_hand(wrap, normalise, length, total, weight, slopes):
    reduce = lambda x, m: losses.reduce_tokens(x, m, normalise, length)
    check(wrap(reduce)(-LOGP_BT, MASK_BT), total, weight)
    gradient_BT = wrap(jax.grad(lambda x: reduce(x, MASK_BT).total))(-LOGP_BT)
    one, two = slopes
    np.testing.assert_allclose(gradient_BT, [[0, one, one], [0, 0, two], [0, 0, 0]], rtol=1e-6)
    # Filler alone: no weight, and no NaN.
    check(wrap(reduce)(-LOGP_BT, np.zeros_like(MASK_BT)), 0, 0)


def test_a_length_belongs_to_the_constant_normalisation():
    for normalise, length in (
        ("constant", None),
        ("sequence", 5),
        ("token", 5),
        ("sequence-mean", 5),
    ):
        with pytest.raises(
            ValueError, match="the normalisation 'constant' needs a length, and no other has one"
        ):
            losses.reduce_tokens(-LOGP_BT, MASK_BT, normalise, length)


def test_sft_by_hand(wrap):
    # 1 + 2 + 4 = 7 over 3 tokens, or over 2 rows that are not empty.
    check(wrap(losses.sft_loss)(LOGP_BT, MASK_BT), 7, 3)
    sequence = wrap(lambda a, m: losses.sft_loss(a, m, normalise="sequence"))
    check(sequence(LOGP_BT, MASK_BT), 7, 2)
    gradient_BT = wrap(jax.grad(lambda a: losses.sft_loss(a, MASK_BT).mean))(LOGP_BT)
    np.testing.assert_allclose(gradient_BT, MASK_BT / -3.0, rtol=1e-6)


def test_bradley_terry_by_hand(wrap):
    # sigmoid(log 3) = 3/4, sigmoid(-log 2) = 1/3. Weights 1 and 0.5; the third row is filler.
    chosen_B, rejected_B = jnp.array([LOG3 + 1, 0.0, NAN]), jnp.array([1.0, LOG2, NAN])
    weight_B = jnp.array([1.0, 0.5, 0.0])
    expected = -np.log(3 / 4) - 0.5 * np.log(1 / 3)
    check(wrap(losses.bradley_terry)(chosen_B, rejected_B, weight_B), expected, 1.5)
    # A margin of log 3: sigmoid(0) = 1/2; sigmoid(-log 6) = 1/7. One a row: only the first.
    for margin, second in ((LOG3, 1 / 7), (jnp.array([LOG3, 0.0, NAN]), 1 / 3)):
        expected = -np.log(1 / 2) - 0.5 * np.log(second)
        check(wrap(losses.bradley_terry)(chosen_B, rejected_B, weight_B, margin), expected, 1.5)
    # d/dc = sigmoid(c - r) - 1 times the weight; d/dr its opposite.
    total = lambda c, r: losses.bradley_terry(c, r, weight_B).total
    to_chosen_B, to_rejected_B = wrap(jax.grad(total, (0, 1)))(chosen_B, rejected_B)
    np.testing.assert_allclose(to_chosen_B, [-1 / 4, -1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(to_rejected_B, [1 / 4, 1 / 3, 0], rtol=1e-6)


def test_equal_scores_cost_log_two():
    check(losses.bradley_terry(jnp.ones(4), jnp.ones(4), jnp.ones(4)), 4 * LOG2, 4)


def test_bradley_terry_of_raters_who_disagree(wrap):
    # Three of four prefer the first: sigmoid(log 3) is what they ask for, and the gradient is 0.
    chosen_B, rejected_B = jnp.array([LOG3 + 1, 0.0, NAN]), jnp.array([1.0, LOG2, NAN])
    weight_B, share_B = jnp.array([1.0, 0.5, 0.0]), jnp.array([3 / 4, 1.0, NAN])
    first = -3 / 4 * np.log(3 / 4) - 1 / 4 * np.log(1 / 4)
    compute = wrap(lambda c, r, p: losses.bradley_terry(c, r, weight_B, probability=p))
    check(compute(chosen_B, rejected_B, share_B), first - 0.5 * np.log(1 / 3), 1.5)
    # One number for all rows: nobody preferred the first. sigmoid(-log 3) = 1/4, sigmoid(log 2) =
    # 2/3.
    check(compute(chosen_B, rejected_B, 0.0), -np.log(1 / 4) - 0.5 * np.log(2 / 3), 1.5)
    slope = lambda c: losses.bradley_terry(c, rejected_B, weight_B, probability=share_B).total
    np.testing.assert_allclose(wrap(jax.grad(slope))(chosen_B), [0, -1 / 3, 0], atol=1e-7)


def test_centring_keeps_a_pair_around_zero(wrap):
    # 0.1 (chosen + rejected)^2 beside the loss: 0.1 (3 + 1)^2 = 1.6, and 0.5 times 0.1 (-2 + 1)^2.
    chosen_B, rejected_B = jnp.array([3.0, -2.0, NAN]), jnp.array([1.0, 1.0, NAN])
    weight_B = jnp.array([1.0, 0.5, 0.0])
    total = lambda c, r, centring: losses.bradley_terry(c, r, weight_B, centring=centring).total
    compute = wrap(jax.value_and_grad(lambda c, r: total(c, r, 0.1), (0, 1)))
    plain = wrap(jax.value_and_grad(lambda c, r: total(c, r, 0.0), (0, 1)))
    (value, slopes), (bare, bare_slopes) = (
        compute(chosen_B, rejected_B),
        plain(chosen_B, rejected_B),
    )
    np.testing.assert_allclose(value - bare, 1.6 + 0.05, rtol=1e-6)
    # 2 * 0.1 * (4, and half of -1) on either side.
    for slope_B, bare_B in zip(slopes, bare_slopes, strict=True):
        np.testing.assert_allclose(slope_B - bare_B, [0.8, -0.1, 0], rtol=1e-6)
    assert losses.bradley_terry(chosen_B, rejected_B, weight_B, centring=0.1).weight == 1.5


def test_a_margin_and_a_probability_a_row(wrap):
    # d = 2 - log 2 - (2 - log 3) = log 3/2, and 1 - 1 - (log 2 - log 3), the same: sigmoid 3/5.
    margin_B, share_B = jnp.array([2 - LOG3, LOG2 - LOG3, NAN]), jnp.array([0.25, 1.0, NAN])
    chosen_B, rejected_B = jnp.array([2.0, 1.0, NAN]), jnp.array([LOG2, 1.0, NAN])
    compute = wrap(
        lambda m, p: losses.bradley_terry(
            chosen_B, rejected_B, jnp.array([1.0, 1.0, 0.0]), m, probability=p
        )
    )
    expected = -0.25 * np.log(3 / 5) - 0.75 * np.log(2 / 5) - np.log(3 / 5)
    check(compute(margin_B, share_B), expected, 2)


def test_squared_error_by_hand(wrap):
    # (3 - 1)^2 + 0.5 (1 - 2)^2; slopes twice the error times the weight.
    score_B, label_B, weight_B = (
        jnp.array([3.0, 1.0, NAN]),
        jnp.array([1.0, 2.0, NAN]),
        jnp.array([1.0, 0.5, 0.0]),
    )
    check(wrap(losses.squared_error)(score_B, label_B, weight_B), 4.5, 1.5)
    slope = wrap(jax.grad(lambda s: losses.squared_error(s, label_B, weight_B).total))
    np.testing.assert_allclose(slope(score_B), [4, -1, 0], rtol=1e-6)


# Differences of log-ratios h = 2 log 3 and -2 log 2, the third row filler.
PREFERENCE = tuple(
    np.array(values, np.float32)
    for values in ([2 * LOG3 - 1, -LOG2, NAN], [-1.0, LOG2, NAN], [1.0, 0.5, 0.0])
)


@pytest.mark.parametrize(
    ("options", "total", "slopes"),
    [
        # beta h = log 3, -log 2: sigmoids 3/4, 1/3. Slopes -beta (1 - sigmoid), times the weight.
        ({}, -np.log(3 / 4) - 0.5 * np.log(1 / 3), (-1 / 8, -1 / 6)),
        # A tenth of the labels wrong. Slopes -beta (0.9 - sigmoid).
        (
            {"label_smoothing": 0.1},
            -0.9 * np.log(3 / 4)
            - 0.1 * np.log(1 / 4)
            - 0.5 * (0.9 * np.log(1 / 3) + 0.1 * np.log(2 / 3)),
            (-0.5 * (0.9 - 3 / 4), -0.25 * (0.9 - 1 / 3)),
        ),
        # A rater's probabilities 0.9 and 0.2, a row each.
        (
            {"label_smoothing": np.array([0.1, 0.8, 0.0], np.float32)},
            -0.9 * np.log(3 / 4)
            - 0.1 * np.log(1 / 4)
            - 0.5 * (0.2 * np.log(1 / 3) + 0.8 * np.log(2 / 3)),
            (-0.5 * (0.9 - 3 / 4), -0.25 * (0.2 - 1 / 3)),
        ),
        # 1 / (2 beta) = 1. Slopes 2 (h - 1).
        (
            {"kind": "ipo"},
            (2 * LOG3 - 1) ** 2 + 0.5 * (-2 * LOG2 - 1) ** 2,
            (2 * (2 * LOG3 - 1), -2 * LOG2 - 1),
        ),
    ],
    ids=["dpo", "smoothed", "soft", "ipo"],
)
def test_preference_by_hand(wrap, options, total, slopes):
    preference = lambda c, r, w: losses.preference(c, r, w, beta=0.5, **options)
    check(wrap(preference)(*PREFERENCE), total, 1.5)
    compute = wrap(jax.grad(lambda c, r: preference(c, r, PREFERENCE[2]).total, (0, 1)))
    to_chosen_B, to_rejected_B = compute(*PREFERENCE[:2])
    np.testing.assert_allclose(to_chosen_B, [*slopes, 0], rtol=1e-5)
    np.testing.assert_allclose(to_rejected_B, [-slopes[0], -slopes[1], 0], rtol=1e-5)


def test_preference_refuses_what_it_does_not_know():
    for options, message in (
        ({"beta": 0.0}, "beta 0.0 must be above 0"),
        ({"beta": NAN}, "beta nan must be above 0"),
        ({"beta": 0.1, "label_smoothing": 0.5}, r"label smoothing 0.5 in \[0, 1/2\)"),
        ({"beta": 0.1, "label_smoothing": -0.1}, "label smoothing -0.1"),
        (
            {"beta": 0.1, "kind": "hinge"},
            "unknown preference loss 'hinge'.*known: dpo, and ipo without smoothing",
        ),
        ({"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}, r"'ipo' \(smoothing 0.1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.preference(*PREFERENCE, **options)


def test_binary_cross_entropy_by_hand(wrap):
    # sigmoid(log 3) = 3/4. Labels 1, 0, 1/2: -log 3/4, -log 1/4, the mean of the two.
    score_B, label_B = jnp.array([LOG3, LOG3, LOG3, NAN]), jnp.array([1.0, 0.0, 0.5, NAN])
    weight_B = jnp.array([1.0, 1.0, 2.0, 0.0])
    expected = 2 * -np.log(3 / 4) + 2 * -np.log(1 / 4)
    check(wrap(losses.binary_cross_entropy)(score_B, label_B, weight_B), expected, 4)
    # d/ds = (sigmoid(s) - y) times the weight.
    total = lambda s: losses.binary_cross_entropy(s, label_B, weight_B).total
    np.testing.assert_allclose(wrap(jax.grad(total))(score_B), [-1 / 4, 3 / 4, 1 / 2, 0], rtol=1e-6)


def test_reward_losses_are_stable_for_scores_of_any_size(wrap):
    one_B = jnp.ones(1)
    for size in (30.0, 1e4, 1e30):
        right = wrap(losses.bradley_terry)(size * one_B, 0 * one_B, one_B).total
        wrong = wrap(losses.bradley_terry)(0 * one_B, size * one_B, one_B).total
        # log(1 + e^-x) is e^-x to first order: not rounded to 0 at 30.
        np.testing.assert_allclose(right, np.exp(-size), rtol=1e-5)
        np.testing.assert_allclose(wrong, size, rtol=1e-6)
        for label, score in ((1.0, size), (0.0, -size)):
            right = wrap(losses.binary_cross_entropy)(score * one_B, label * one_B, one_B).total
            wrong = wrap(losses.binary_cross_entropy)(-score * one_B, label * one_B, one_B).total
            np.testing.assert_allclose(right, np.exp(-size), rtol=1e-5)
            np.testing.assert_allclose(wrong, size, rtol=1e-6)
            slope = jax.grad(lambda s: losses.binary_cross_entropy(s, one_B, one_B).total)
            assert np.all(np.isfinite(slope(score * one_B)))


def test_reinforce_by_hand(wrap):
    # -(-1 * 6 + -2 * 0.5 + -4 * -1) = 3, over 2 rows that are not empty, or 3 tokens.
    advantage_BT = jnp.array([[NAN, 6.0, 0.5], [NAN, NAN, -1.0], [NAN, NAN, NAN]])
    check(wrap(losses.reinforce)(LOGP_BT, advantage_BT, MASK_BT), 3, 2)
    token = wrap(lambda *a: losses.reinforce(*a, normalise="token"))
    check(token(LOGP_BT, advantage_BT, MASK_BT), 3, 3)
    mean = lambda p, a: losses.reinforce(p, a, MASK_BT).mean
    to_logp_BT, to_advantage_BT = wrap(jax.grad(mean, (0, 1)))(LOGP_BT, advantage_BT)
    np.testing.assert_allclose(to_logp_BT, [[0, -3, -0.25], [0, 0, 0.5], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(to_advantage_BT, np.zeros((3, 3)))


def test_value_loss_by_hand(wrap):
    # (2 - 1)^2 + (2 - 4)^2 + (-1 - 0)^2 = 6; gradient -2 (Z - V).
    returns_BT = jnp.array([[NAN, 2.0, 2.0], [NAN, NAN, -1.0], [NAN, NAN, NAN]])
    values_BT = jnp.array([[NAN, 1.0, 4.0], [NAN, NAN, 0.0], [NAN, NAN, NAN]])
    check(wrap(losses.value_loss)(values_BT, returns_BT, MASK_BT), 6, 2)
    token = wrap(lambda *a: losses.value_loss(*a, normalise="token"))
    check(token(values_BT, returns_BT, MASK_BT), 6, 3)
    total = lambda v, z: losses.value_loss(v, z, MASK_BT).total
    to_values_BT, to_returns_BT = wrap(jax.grad(total, (0, 1)))(values_BT, returns_BT)
    np.testing.assert_allclose(to_values_BT, [[0, -2, 4], [0, 0, 2], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(to_returns_BT, np.zeros((3, 3)))


def test_value_loss_kept_near_the_old_values(wrap):
    # Within 0.5 of the old values: V = 1 becomes 0.5 and costs (2 - 0.5)^2, more than (2 - 1)^2;
    # V = 4 stays; V = 5 becomes 3.5, but (2 - 5)^2 costs more; V = 0 becomes 0.5 and costs 1.5^2.
    mask_BT = jnp.array([[0, 1, 1, 1], [1, 0, 0, 0]], bool)
    returns_BT = jnp.array([[NAN, 2.0, 2.0, 2.0], [-1.0, NAN, NAN, NAN]])
    values_BT = jnp.array([[NAN, 1.0, 4.0, 5.0], [0.0, NAN, NAN, NAN]])
    old_BT = jnp.array([[NAN, 0.0, 4.25, 3.0], [1.0, NAN, NAN, NAN]])
    clipped = lambda v, z, o: losses.value_loss(v, z, mask_BT, old_BT=o, clip=0.5)
    check(wrap(clipped)(values_BT, returns_BT, old_BT), 2.25 + 4 + 9 + 2.25, 2)
    total = lambda *arrays_BT: clipped(*arrays_BT).total
    to_values_BT, *others = wrap(jax.grad(total, (0, 1, 2)))(values_BT, returns_BT, old_BT)
    # Where the bound holds, V moves nothing.
    np.testing.assert_allclose(to_values_BT, [[0, 0, 4, 6], [0, 0, 0, 0]], rtol=1e-6)
    for gradient_BT in others:
        np.testing.assert_array_equal(gradient_BT, np.zeros((2, 4)))
    for options in ({"old_BT": old_BT}, {"clip": 0.5}):
        with pytest.raises(ValueError, match="old_BT and clip must be given together"):
            losses.value_loss(values_BT, returns_BT, mask_BT, **options)


def test_kl_loss_by_hand(wrap):
    # d = log 2, -log 3 in the first row, 0 in the second. k2: halves of squares.
    ref_BT = jnp.array([[NAN, -1 - LOG2, -2 + LOG3], [NAN, NAN, -4.0], [NAN, NAN, NAN]])
    check(wrap(losses.kl_loss)(LOGP_BT, ref_BT, MASK_BT), (LOG2**2 + LOG3**2) / 2, 2)
    straight = wrap(lambda *a: losses.kl_loss(*a, estimator="k3", normalise="token"))
    check(straight(LOGP_BT, ref_BT, MASK_BT), LOG2 - 0.5 + 2 - LOG3, 3)
    # A coefficient a row, of which a filler row's may be anything.
    weight_B = jnp.array([0.5, 2.0, NAN])
    weighed = wrap(lambda *a: losses.kl_loss(*a, weight_B=weight_B))
    check(weighed(LOGP_BT, ref_BT, MASK_BT), (LOG2**2 + LOG3**2) / 4, 2)
    slope = wrap(
        jax.grad(lambda p, w: losses.kl_loss(p, ref_BT, MASK_BT, weight_B=w).total, (0, 1))
    )
    to_logp_BT, to_weight_B = slope(LOGP_BT, weight_B)
    np.testing.assert_allclose(
        to_logp_BT, [[0, LOG2 / 2, -LOG3 / 2], [0, 0, 0], [0, 0, 0]], rtol=1e-5
    )
    np.testing.assert_array_equal(to_weight_B, np.zeros(3))
    for name in ("k2", "k3"):
        total = lambda p, n=name: losses.kl_loss(p, ref_BT, MASK_BT, n).total
        gradient_BT = wrap(jax.grad(total))(LOGP_BT)
        expected_BT = [[0, LOG2, -LOG3], [0, 0, 0], [0, 0, 0]]
        np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-5)


TOKEN_LOSSES = {
    "sft": lambda x, y, m, n: losses.sft_loss(x, m, n),
    "reinforce": losses.reinforce,
    "value": losses.value_loss,
    "kl_k2": lambda x, y, m, n: losses.kl_loss(x, y, m, "k2", n),
    "kl_k3": lambda x, y, m, n: losses.kl_loss(x, y, m, "k3", n),
}


def random_batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x_BT, y_BT = rng.normal(-1, 1, (2, 6, 7)).astype(np.float32)
    mask_BT = np.arange(7)[None] < rng.integers(1, 8, (6, 1))
    mask_BT[4] = False
    return x_BT, y_BT, mask_BT


@pytest.mark.parametrize("normalise", ["token", "sequence"])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_microbatches_of_uneven_length_add_up_to_the_full_batch(name, normalise):
    x_BT, y_BT, mask_BT = random_batch()

    def total(x_BT, rows):
        loss = TOKEN_LOSSES[name](x_BT[rows], y_BT[rows], mask_BT[rows], normalise)
        return loss.total, loss

    full_BT, full = jax.grad(total, has_aux=True)(jnp.asarray(x_BT), slice(None))
    halves = (slice(0, 4), slice(4, 6))
    parts = [jax.grad(total, has_aux=True)(jnp.asarray(x_BT), rows) for rows in halves]
    added = parts[0][1] + parts[1][1]
    np.testing.assert_allclose(added.mean, full.mean, rtol=1e-6)
    assert added.weight == full.weight
    gradient_BT = (parts[0][0] + parts[1][0]) / added.weight
    np.testing.assert_allclose(gradient_BT, full_BT / full.weight, rtol=1e-6)
    assert np.any(full_BT != 0)


@pytest.mark.parametrize("fill", [NAN, np.inf, 1e30, -7.0])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_the_content_of_padding_changes_nothing(name, fill):
    x_BT, y_BT, mask_BT = random_batch()

    def total(x_BT, y_BT):
        return TOKEN_LOSSES[name](x_BT, y_BT, mask_BT, "sequence").total

    filled = [np.where(mask_BT, z, fill).astype(np.float32) for z in (x_BT, y_BT)]
    compute = jax.jit(jax.value_and_grad(total))
    for changed, plain in zip(
        jax.tree.leaves(compute(*filled)), jax.tree.leaves(compute(x_BT, y_BT)), strict=True
    ):
        np.testing.assert_array_equal(changed, plain)
    assert np.all(np.asarray(compute(*filled)[1])[~mask_BT] == 0)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_an_empty_batch_is_zero_not_nan(name):
    x_BT, y_BT, mask_BT = random_batch()
    loss = TOKEN_LOSSES[name](x_BT, y_BT, np.zeros_like(mask_BT), "token")
    assert loss.mean == 0
    assert loss.weight == 0


@pytest.mark.parametrize("name", ["sft", "reinforce", "value", "kl_k2"])
def test_gradients_against_finite_differences(name):
    with jax.enable_x64(True):
        x_BT, y_BT, mask_BT = random_batch()
        x_BT, y_BT = x_BT.astype(np.float64), y_BT.astype(np.float64)

        def total(x_BT):
            return TOKEN_LOSSES[name](x_BT, y_BT, mask_BT, "token").total

        gradient_BT = jax.grad(total)(x_BT)
        for index in [(0, 0), (3, 1), (4, 2), (5, 6)]:
            step_BT = np.zeros_like(x_BT)
            step_BT[index] = 1e-6
            slope = (total(x_BT + step_BT) - total(x_BT - step_BT)) / 2e-6
            np.testing.assert_allclose(gradient_BT[index], slope, rtol=1e-6, atol=1e-8)


def test_an_unknown_normalisation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'mean'.*token, sequence, sequence-mean, constant$"):
        losses.sft_loss(LOGP_BT, MASK_BT, normalise="mean")


def test_shapes_are_checked():
    x_BT, y_BT, mask_BT = random_batch()
    with pytest.raises(AssertionError):
        losses.reinforce(x_BT, y_BT[:, :1], mask_BT)
    with pytest.raises(AssertionError):
        losses.value_loss(x_BT, y_BT[:, 0], mask_BT)
    with pytest.raises(AssertionError):
        losses.sft_loss(x_BT, mask_BT.astype(np.float32))
    with pytest.raises(AssertionError):
        losses.bradley_terry(jnp.zeros(2), jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(AssertionError):
        losses.bradley_terry(jnp.zeros(2), jnp.zeros(2), jnp.zeros((2, 1)))


def test_bfloat16_inputs_give_float32_sums():
    low_BT, mask_BT = jnp.full((4, 512), -1.0, jnp.bfloat16), jnp.ones((4, 512), bool)
    check(losses.sft_loss(low_BT, mask_BT), 2048, 2048)
    check(losses.value_loss(low_BT, 0 * low_BT, mask_BT), 2048, 4)
    one_B = jnp.ones(1024, jnp.bfloat16)
    check(losses.binary_cross_entropy(0 * one_B, one_B, one_B), 1024 * LOG2, 1024)


def test_sampler_mismatch_by_hand(wrap):
    # exp |log 2| = 2, exp |-log 3| = 3, 1: mean 2. The sign of a difference does not matter.
    trainer_BT = jnp.array([[NAN, -1.0, -2.0, -3.0]])
    sampler_BT = trainer_BT + jnp.array([[0.0, LOG2, -LOG3, 0.0]])
    mask_BT = jnp.array([[0, 1, 1, 1]], bool)
    mismatch = wrap(ratios.sampler_mismatch)
    np.testing.assert_allclose(mismatch(sampler_BT, trainer_BT, mask_BT), 2.0, rtol=1e-6)
    np.testing.assert_allclose(mismatch(trainer_BT, sampler_BT, mask_BT), 2.0, rtol=1e-6)
    assert mismatch(trainer_BT, trainer_BT, mask_BT) == 1
