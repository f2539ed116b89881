"""Importance ratios, and the losses of stale samples: hand numbers, bounds, padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.objectives import losses, ratios

NAN = float("nan")
LOG2, LOG3 = np.log(2.0), np.log(3.0)

# Two tokens with a gap, one, none.
MASK_BT = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
LOGP_BT = np.where(MASK_BT, np.float32(-2), np.float32(NAN))


@pytest.fixture(params=["eager", "jit"])
def wrap(request):
    return jax.jit if request.param == "jit" else (lambda f: f)


def older(first: float, second: float, third: float) -> np.ndarray:
    """Old log-probabilities from log-ratios: of the first row's tokens, and the second's."""
    out = np.full(MASK_BT.shape, NAN, np.float32)
    out[MASK_BT] = LOGP_BT[MASK_BT] - np.array([first, second, third], np.float32)
    return out


@pytest.mark.parametrize(
    ("level", "rows", "slopes"),
    [
        # Ratios 2, 1/3 and 4. Slopes of the sum over tokens: a row's ratio counts for each of its
        # tokens.
        ("token", [[1, 2, 1, 1 / 3], [1, 1, 4, 1]], [2, 1 / 3, 4]),
        ("product", [[1, 2 / 3, 1, 2 / 3], [1, 1, 4, 1]], [4 / 3, 4 / 3, 4]),
        (
            "sequence",
            [[1, np.sqrt(2 / 3), 1, np.sqrt(2 / 3)], [1, 1, 4, 1]],
            [np.sqrt(2 / 3), np.sqrt(2 / 3), 4],
        ),
    ],
)
def test_importance_ratio_by_hand(wrap, level, rows, slopes):
    old_BT = older(LOG2, -LOG3, 2 * LOG2)
    ratio = wrap(lambda p, o: ratios.importance_ratio(p, o, MASK_BT, level))
    np.testing.assert_allclose(ratio(LOGP_BT, old_BT), [*rows, [1, 1, 1, 1]], rtol=1e-6)
    # Masked columns hold NaN, and give none.
    gradient_BT = wrap(
        jax.grad(lambda p: ratios.importance_ratio(p, old_BT, MASK_BT, level).sum())
    )(LOGP_BT)
    expected_BT = np.zeros(MASK_BT.shape)
    expected_BT[MASK_BT] = slopes
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-6)
    np.testing.assert_array_equal(ratio(LOGP_BT, LOGP_BT), np.ones(MASK_BT.shape))
    for fill in (np.inf, -np.inf, 1e30, 7.0):
        filled = [np.where(MASK_BT, x_BT, np.float32(fill)) for x_BT in (LOGP_BT, old_BT)]
        np.testing.assert_array_equal(ratio(*filled), ratio(LOGP_BT, old_BT))


@pytest.mark.parametrize(
    ("level", "log_first", "log_second"),
    [
        # Log-ratios 15, 16 and -30: each token's own, their sum 31, their mean 15.5; within +-20.
        ("token", (15, 16), -20),
        ("product", (20, 20), -20),
        ("sequence", (15.5, 15.5), -20),
    ],
)
def test_the_log_ratio_is_clamped_where_it_is_used(wrap, level, log_first, log_second):
    old_BT = older(15, 16, -30)
    compute = lambda p: ratios.importance_ratio(p, old_BT, MASK_BT, level)
    expected_BT = np.ones(MASK_BT.shape)
    expected_BT[MASK_BT] = np.exp([*log_first, log_second])
    np.testing.assert_allclose(wrap(compute)(LOGP_BT), expected_BT, rtol=1e-4)
    # Beyond the clamp nothing moves it.
    gradient_BT = wrap(jax.grad(lambda p: compute(p).sum()))(LOGP_BT)
    assert gradient_BT[1, 2] == 0
    assert (gradient_BT[0, 1] == 0) == (level == "product")


def test_an_unknown_level_lists_the_known_ones():
    with pytest.raises(ValueError, match="'row'; known: token, sequence, product"):
        ratios.importance_ratio(LOGP_BT, LOGP_BT, MASK_BT, "row")


# Ratio, advantage, -min(r A, clip(r, 0.8, 1.3) A), and the slope by r: 0 where the bound holds.
CORNERS = [
    (1.5, 2.0, -2.6, 0.0),  # better, and taken far enough: 1.3 * 2
    (1.25, 2.0, -2.5, -2.0),  # within the upper bound, which is not the lower one's mirror
    (1.1, 2.0, -2.2, -2.0),
    (0.5, 2.0, -1.0, -2.0),  # better, and gone the wrong way: may come back
    (0.5, -2.0, 1.6, 0.0),  # worse, and left far enough: 0.8 * 2
    (0.75, -2.0, 1.6, 0.0),
    (0.9, -2.0, 1.8, 2.0),
    (1.5, -2.0, 3.0, 2.0),  # worse, and gone the wrong way: may come back
    (1.0, 5.0, -5.0, -5.0),
    (1.5, 0.0, 0.0, 0.0),
]


def test_clipped_in_every_corner(wrap):
    ratio_T, advantage_T, _, slope_T = np.array(CORNERS, np.float32).T
    pad = lambda x_T: np.concatenate([[NAN], x_T]).astype(np.float32)[None]
    mask_BT = np.arange(len(CORNERS) + 1)[None] > 0
    loss = lambda r, a: losses.clipped(r, a, mask_BT, low=0.2, high=0.3, normalise="token")
    found = wrap(loss)(pad(ratio_T), pad(advantage_T))
    np.testing.assert_allclose(
        found.total, np.sum([-2.6, -2.5, -2.2, -1, 1.6, 1.6, 1.8, 3, -5, 0]), rtol=1e-6
    )
    assert found.weight == 10
    compute = wrap(jax.grad(lambda r, a: loss(r, a).total, (0, 1)))
    to_ratio_BT, to_advantage_BT = compute(pad(ratio_T), pad(advantage_T))
    np.testing.assert_allclose(to_ratio_BT[0], [0, *slope_T], rtol=1e-6)
    np.testing.assert_array_equal(to_advantage_BT, np.zeros(mask_BT.shape))
    for t, (ratio, advantage, value, _) in enumerate(CORNERS):
        alone = loss(
            pad(np.full(len(CORNERS), ratio)),
            np.where(np.arange(len(CORNERS) + 1) == t + 1, advantage, 0)[None],
        )
        np.testing.assert_allclose(alone.total, value, rtol=1e-6)


def test_a_ratio_of_sequences_gives_one_term_a_sequence(wrap):
    # Ratios 2/3 and 4, advantages 3 and -1: -min(2, 0.8 * 3) and -min(-4, -1.3), over two rows.
    advantage_BT = np.where(MASK_BT, np.array([[3], [-1], [5]], np.float32), NAN)

    def loss(logp_BT):
        ratio_BT = ratios.importance_ratio(
            logp_BT, older(LOG2, -LOG3, 2 * LOG2), MASK_BT, "product"
        )
        return losses.clipped(
            ratio_BT, advantage_BT, MASK_BT, low=0.2, high=0.3, normalise="sequence-mean"
        )

    found = wrap(loss)(LOGP_BT)
    np.testing.assert_allclose(found.total, -2 + 4, rtol=1e-6)
    assert found.weight == 2
    # Each token of a row moves its only term alike: -r A.
    gradient_BT = wrap(jax.grad(lambda p: loss(p).total))(LOGP_BT)
    np.testing.assert_allclose(gradient_BT, [[0, -2, 0, -2], [0, 0, 4, 0], [0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("normalise", "length"),
    [("token", None), ("sequence", None), ("sequence-mean", None), ("constant", 9)],
)
def test_at_the_sampling_policy_clipping_is_reinforce(wrap, normalise, length):
    advantage_BT = np.where(MASK_BT, np.array([[3], [-1], [5]], np.float32), NAN)

    def clipped(logp_BT):
        ratio_BT = ratios.importance_ratio(logp_BT, LOGP_BT, MASK_BT, "token")
        return losses.clipped(
            ratio_BT, advantage_BT, MASK_BT, low=0.2, high=0.2, normalise=normalise, length=length
        ).mean

    reinforce = lambda p: losses.reinforce(p, advantage_BT, MASK_BT, normalise, length=length).mean
    gradient_BT = wrap(jax.grad(clipped))(LOGP_BT)
    np.testing.assert_allclose(gradient_BT, wrap(jax.grad(reinforce))(LOGP_BT), rtol=1e-6)
    assert np.abs(gradient_BT).max() > 0.1


def test_a_range_without_one_inside_is_refused():
    one_BT, mask_BT = jnp.ones((1, 1)), jnp.ones((1, 1), bool)
    for low, high in ((0.0, 0.2), (1.0, 0.2), (0.2, 0.0), (-0.1, 0.2), (NAN, 0.2)):
        with pytest.raises(ValueError, match="a ratio cannot be clipped to"):
            losses.clipped(one_BT, one_BT, mask_BT, low=low, high=high, normalise="token")


def test_stale_samples_weigh_their_truncated_ratio(wrap):
    # Ratios 3, 1/2 and 2, at most 1.5: weights 1.5, 0.5, 1.5; log p = -2, advantages 6, 0.5, -1.
    advantage_BT = np.full(MASK_BT.shape, NAN, np.float32)
    advantage_BT[MASK_BT] = [6, 0.5, -1]
    old_BT = older(LOG3, -LOG2, LOG2)
    loss = lambda p, o, a: losses.reinforce(p, a, MASK_BT, old_BT=o, max_ratio=1.5)
    found = wrap(loss)(LOGP_BT, old_BT, advantage_BT)
    np.testing.assert_allclose(found.total, 2 * (9 + 0.25 - 1.5), rtol=1e-6)
    assert found.weight == 2
    compute = wrap(jax.grad(lambda *arrays_BT: loss(*arrays_BT).total, (0, 1, 2)))
    to_logp_BT, *others = compute(LOGP_BT, old_BT, advantage_BT)
    # The weight is a number: its own slope is not in the gradient, also where it is not truncated.
    np.testing.assert_allclose(
        to_logp_BT, [[0, -9, 0, -0.25], [0, 0, 1.5, 0], [0, 0, 0, 0]], rtol=1e-6
    )
    for gradient_BT in others:
        np.testing.assert_array_equal(gradient_BT, np.zeros(MASK_BT.shape))
    # Another mean of the same tokens: (9 + 0.25) / 2 in the first row.
    averaged = losses.reinforce(
        LOGP_BT, advantage_BT, MASK_BT, "sequence-mean", old_BT=old_BT, max_ratio=1.5
    )
    np.testing.assert_allclose(averaged.total, 9.25 - 3, rtol=1e-6)
    constant = losses.reinforce(
        LOGP_BT, advantage_BT, MASK_BT, "constant", length=4, old_BT=old_BT, max_ratio=1.5
    )
    np.testing.assert_allclose(constant.total, 15.5 / 4, rtol=1e-6)


def test_fresh_samples_weigh_one(wrap):
    advantage_BT = np.where(MASK_BT, np.float32(3), NAN)
    fresh = wrap(lambda p, o: losses.reinforce(p, advantage_BT, MASK_BT, old_BT=o, max_ratio=1.0))(
        LOGP_BT, LOGP_BT
    )
    assert fresh.total == losses.reinforce(LOGP_BT, advantage_BT, MASK_BT).total == 18
    for options in ({"old_BT": LOGP_BT}, {"max_ratio": 2.0}):
        with pytest.raises(ValueError, match="must be given together"):
            losses.reinforce(LOGP_BT, advantage_BT, MASK_BT, **options)
