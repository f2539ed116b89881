"""Returns and advantages: hand numbers, padding, slow references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.objectives import advantages

NAN = float("nan")


@pytest.fixture(params=["eager", "jit"])
def wrap(request):
    return jax.jit if request.param == "jit" else (lambda f: f)


def test_terminal_return_by_hand(wrap):
    # 0.95 * 2 - 0.05 * 4 = 1.7; 0.95 * -1 - 0.05 * 0.5 = -0.975. Unweighted: 2 - 0.2, -1 - 0.025.
    score_B, kl_B = jnp.array([2.0, -1.0]), jnp.array([4.0, 0.5])
    return_B = wrap(advantages.terminal_return)(score_B, kl_B, 0.05)
    np.testing.assert_allclose(return_B, [1.7, -0.975], rtol=1e-6)
    plain_B = wrap(advantages.terminal_return)(score_B, kl_B, 0.05, 1.0)
    np.testing.assert_allclose(plain_B, [1.8, -1.025], rtol=1e-6)
    gradients = wrap(jax.grad(lambda s, k: advantages.terminal_return(s, k, 0.05).sum(), (0, 1)))
    assert all(np.all(g == 0) for g in gradients(score_B, kl_B))


def test_scores_are_floats_whatever_they_came_as():
    # A score of 1 (integer) at beta 0.05 is 0.95, not 0.
    return_B = advantages.terminal_return(jnp.array([1]), jnp.array([0]), 0.05)
    assert return_B.dtype == jnp.float32
    np.testing.assert_allclose(return_B, [0.95], rtol=1e-6)
    score_B = advantages.missing_eos_penalty(np.array([1]), np.array([False]), 0.5)
    np.testing.assert_array_equal(score_B, [0.5])


def test_missing_eos_penalty(wrap):
    penalise = wrap(lambda s, f: advantages.missing_eos_penalty(s, f, 1.5))
    score_B = penalise(jnp.array([2.0, 2.0]), jnp.array([True, False]))
    np.testing.assert_array_equal(score_B, [2.0, 0.5])
    with pytest.raises(ValueError, match="penalty must be 0 or more"):
        advantages.missing_eos_penalty(jnp.zeros(1), jnp.zeros(1, bool), -1.0)


def test_overlong_penalty_by_hand(wrap):
    # Room 10, the last 4 tokens cost: 0 up to 6, then a quarter of the penalty each, all of it at
    # 10.
    length_B, score_B = jnp.array([0, 6, 7, 8, 10, 12]), jnp.array([1, 1, 1, 1, 1, -1.0])
    penalise = wrap(lambda s, n: advantages.overlong_penalty(s, n, 10, 4, 2.0))
    np.testing.assert_allclose(penalise(score_B, length_B), [1, 1, 0.5, 0, -1, -3], rtol=1e-6)
    # Without a buffer nothing is taken, whatever the length.
    free = wrap(lambda s, n: advantages.overlong_penalty(s, n, 10, 0, 2.0))
    np.testing.assert_array_equal(free(score_B, length_B), score_B)
    # Scores that are integers are not rounded; all of the room may be the buffer.
    whole_B = advantages.overlong_penalty(jnp.array([1]), jnp.array([5]), 10, 10, 0.5)
    np.testing.assert_allclose(whole_B, [0.75], rtol=1e-6)
    for buffer, penalty in ((11, 1.0), (-1, 1.0), (4, -1.0), (4, NAN)):
        with pytest.raises(ValueError, match="the over-length buffer must lie in"):
            advantages.overlong_penalty(score_B, length_B, 10, buffer, penalty)


def test_shape_scores_by_hand(wrap):
    real_B = jnp.array([True, True, True, False])
    score_B = jnp.array([1.0, 2.0, 6.0, NAN])
    shape = lambda **options: wrap(lambda s: advantages.shape_scores(s, real_B, **options))
    np.testing.assert_array_equal(shape()(score_B), score_B)
    np.testing.assert_array_equal(shape(clip=1.5)(-score_B)[:3], [-1, -1.5, -1.5])
    # Mean 3, squares 4, 1, 9 over 3 - 1: the deviations divided by sqrt 7, the mean kept.
    expected_B = [3 - 2 / np.sqrt(7), 3 - 1 / np.sqrt(7), 3 + 3 / np.sqrt(7), 0]
    np.testing.assert_allclose(shape(whiten=True)(score_B), expected_B, rtol=1e-6)
    # Clipped first, to 1, 2, 3: mean 2, deviation 1, so that nothing is left to do.
    np.testing.assert_allclose(shape(clip=3.0, whiten=True)(score_B), [1, 2, 3, 0], rtol=1e-6)
    # Equal scores stay as they are.
    np.testing.assert_array_equal(
        shape(whiten=True)(jnp.array([0.1, 0.1, 0.1, 5.0])), np.float32([0.1, 0.1, 0.1, 0])
    )


def test_token_rewards_by_hand(wrap):
    # beta 0.1; the end's reward in the last column of the response, wherever that is.
    mask_BT = jnp.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    kl_BT = jnp.array(
        [[NAN, 0.5, NAN, -1, NAN], [NAN, NAN, 2, NAN, NAN], [1.0, 2, 3, 4, 5], [NAN] * 5]
    )
    end_B = jnp.array([10.0, 4.0, -1.0, NAN])
    rewards = wrap(advantages.token_rewards)
    expected_BT = [
        [0, -0.05, 0, 10.1, 0],
        [0, 0, 3.8, 0, 0],
        [-0.1, -0.2, -0.3, -0.4, -1.5],
        [0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(rewards(end_B, kl_BT, mask_BT, 0.1), expected_BT, rtol=1e-6)
    # An integer score is not rounded, nor is its share.
    assert (
        advantages.token_rewards(
            jnp.array([1]), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), 0.1
        ).dtype
        == jnp.float32
    )


def test_token_rewards_add_up_to_the_terminal_return(wrap):
    rng = np.random.default_rng(8)
    mask_BT, kl_BT = rng.random((5, 6)) < 0.6, rng.normal(size=(5, 6)).astype(np.float32)
    score_B = rng.normal(size=5).astype(np.float32)
    rewards_BT = wrap(advantages.token_rewards)(0.7 * score_B, kl_BT, mask_BT, 0.3)
    return_B = advantages.terminal_return(score_B, np.sum(kl_BT * mask_BT, axis=1), 0.3)
    np.testing.assert_allclose(rewards_BT.sum(axis=1), return_B, rtol=1e-5, atol=1e-6)
    total = lambda s, k: jnp.sum(jnp.square(advantages.token_rewards(s, k, mask_BT, 0.3)))
    assert all(np.all(g == 0) for g in wrap(jax.grad(total, (0, 1)))(score_B, kl_BT))


def test_returns_to_tokens(wrap):
    mask_BT = jnp.array([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    returns_BT = wrap(advantages.returns_to_tokens)(jnp.array([1.5, -2.0, NAN]), mask_BT)
    np.testing.assert_array_equal(returns_BT, [[0, 1.5, 1.5, 0], [0, 0, -2, -2], [0, 0, 0, 0]])


def test_discounted_returns_by_hand(wrap):
    # From the right, the third column skipped: 8; 4 + 0.5 * 8 = 8; 2 + 0.5 * 8 = 6.
    rewards_BT = jnp.array([[NAN, 2.0, 4.0, NAN, 8.0, NAN]])
    mask_BT = jnp.array([[0, 1, 1, 0, 1, 0]], bool)
    returns_BT = wrap(lambda r, m: advantages.discounted_returns(r, m, 0.5))(rewards_BT, mask_BT)
    np.testing.assert_array_equal(returns_BT, [[0, 6, 8, 0, 8, 0]])


def test_a_terminal_reward_undiscounted_is_the_return_of_every_token(wrap):
    mask_BT = jnp.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
    rewards_BT = jnp.array([[0, 0, 0, 7.0, 0], [0, 0, -3.0, 0, 0]])
    returns_BT = wrap(lambda r, m: advantages.discounted_returns(r, m, 1.0))(rewards_BT, mask_BT)
    expected_BT = advantages.returns_to_tokens(jnp.array([7.0, -3.0]), mask_BT)
    np.testing.assert_array_equal(returns_BT, expected_BT)


def test_gae_by_hand(wrap):
    # gamma 0.5, lambda 0.5; tokens (r, V) = (1, 2), (0, 4), (3, 1), a masked column in between.
    # delta_3 = 3 - 1 = 2; delta_2 = 0 + 0.5 * 1 - 4 = -3.5; delta_1 = 1 + 0.5 * 4 - 2 = 1.
    # A_3 = 2; A_2 = -3.5 + 0.25 * 2 = -3; A_1 = 1 + 0.25 * -3 = 0.25.
    rewards_BT = jnp.array([[1.0, NAN, 0.0, 3.0, NAN]])
    values_BT = jnp.array([[2.0, NAN, 4.0, 1.0, NAN]])
    mask_BT = jnp.array([[1, 0, 1, 1, 0]], bool)
    gae = wrap(lambda r, v, m: advantages.gae(r, v, m, 0.5, 0.5))
    np.testing.assert_array_equal(gae(rewards_BT, values_BT, mask_BT), [[0.25, 0, -3, 2, 0]])


def reference_gae(rewards_BT, values_BT, mask_BT, gamma, lam):
    """The definition: sum over l of (gamma lambda)^l delta_{t + l}, on each row's own tokens."""
    out_BT = np.zeros(rewards_BT.shape)
    for b, mask_T in enumerate(mask_BT):
        columns = np.flatnonzero(mask_T)
        values = np.append(values_BT[b, columns].astype(np.float64), 0.0)
        deltas = rewards_BT[b, columns] + gamma * values[1:] - values[:-1]
        for t, column in enumerate(columns):
            weights = (gamma * lam) ** np.arange(len(columns) - t)
            out_BT[b, column] = np.sum(weights * deltas[t:])
    return out_BT


@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (1, 0.95), (0.9, 0), (0, 0.5), (0.97, 0.8)])
def test_gae_and_returns_against_the_definition(wrap, gamma, lam):
    rng = np.random.default_rng(5)
    rewards_BT, values_BT = rng.normal(size=(2, 6, 9)).astype(np.float32)
    mask_BT = rng.random((6, 9)) < 0.6
    mask_BT[2] = False
    gae = wrap(lambda r, v, m: advantages.gae(r, v, m, gamma, lam))
    result_BT = gae(rewards_BT, values_BT, mask_BT)
    expected_BT = reference_gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    np.testing.assert_allclose(result_BT, expected_BT, rtol=1e-5, atol=1e-5)
    padded = [np.where(mask_BT, x, 1e30).astype(np.float32) for x in (rewards_BT, values_BT)]
    np.testing.assert_array_equal(gae(*padded, mask_BT), result_BT)
    returns_BT = wrap(lambda r, m: advantages.discounted_returns(r, m, gamma))(rewards_BT, mask_BT)
    expected_BT = reference_gae(rewards_BT, 0 * values_BT, mask_BT, gamma, 1.0)
    np.testing.assert_allclose(returns_BT, expected_BT, rtol=1e-5, atol=1e-5)


def test_gae_with_lambda_one_plus_the_value_is_the_return():
    rng = np.random.default_rng(6)
    rewards_BT, values_BT = rng.normal(size=(2, 4, 7)).astype(np.float32)
    mask_BT = rng.random((4, 7)) < 0.7
    advantage_BT = advantages.gae(rewards_BT, values_BT, mask_BT, 0.9, 1.0)
    returns_BT = advantages.discounted_returns(rewards_BT, mask_BT, 0.9)
    target_BT = np.where(mask_BT, advantage_BT + values_BT, 0)
    np.testing.assert_allclose(target_BT, returns_BT, rtol=1e-5, atol=1e-5)


def test_discounts_outside_the_unit_interval_are_refused():
    one_BT, mask_BT = jnp.ones((1, 1)), jnp.ones((1, 1), bool)
    with pytest.raises(ValueError, match="gamma must be in"):
        advantages.gae(one_BT, one_BT, mask_BT, 1.1, 0.5)
    with pytest.raises(ValueError, match="lambda must be in"):
        advantages.gae(one_BT, one_BT, mask_BT, 1.0, -0.1)


def test_leave_one_out_by_hand(wrap):
    # 1 - (2 + 6) / 2 = -3; 2 - (1 + 6) / 2 = -1.5; 6 - (1 + 2) / 2 = 4.5.
    returns_PG = jnp.array([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1]])
    advantage_PG = wrap(advantages.leave_one_out)(returns_PG)
    np.testing.assert_allclose(advantage_PG[0], [-3, -1.5, 4.5], rtol=1e-6)
    np.testing.assert_array_equal(advantage_PG[1], [0, 0, 0])


def test_group_advantages_by_hand(wrap):
    # Mean 3, deviations -2, -1, 3, squares 14: std sqrt(7) over G - 1, sqrt(14 / 3) over G.
    returns_PG = jnp.array([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1]])
    for options, divisor in (
        ({"epsilon": 0.0}, np.sqrt(7.0)),
        ({"epsilon": 0.5}, np.sqrt(7.0) + 0.5),
        ({"epsilon": 0.0, "ddof": 0}, np.sqrt(14 / 3)),
        ({"normalise_std": False}, 1.0),
        ({}, np.sqrt(7.0) + 1e-4),
    ):
        group = wrap(lambda r, o=options: advantages.group_advantages(r, **o))
        expected_G = np.array([-2, -1, 3]) / divisor
        np.testing.assert_allclose(group(returns_PG)[0], expected_G, rtol=1e-6)
        np.testing.assert_array_equal(group(returns_PG)[1], [0, 0, 0])


def test_groups_do_not_see_one_another(wrap):
    rng = np.random.default_rng(7)
    returns_PG = rng.normal(size=(5, 4)).astype(np.float32)
    for function in (advantages.leave_one_out, advantages.group_advantages):
        together_PG = wrap(function)(returns_PG)
        for p in range(5):
            alone_PG = wrap(function)(returns_PG[p : p + 1])
            np.testing.assert_allclose(together_PG[p], alone_PG[0], rtol=1e-6)


def test_a_group_of_one_is_refused():
    for function in (advantages.leave_one_out, advantages.group_advantages):
        with pytest.raises(ValueError, match="2 or more samples"):
            function(jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match="ddof"):
        advantages.group_advantages(jnp.zeros((1, 2)), ddof=2)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        advantages.terminal_return(jnp.zeros(2), jnp.zeros(3), 0.1)
    with pytest.raises(AssertionError):
        advantages.returns_to_tokens(jnp.zeros(2), jnp.zeros((3, 2), bool))
    with pytest.raises(AssertionError):
        advantages.gae(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 4), bool), 1.0, 1.0)
