"""KL estimators by hand and against enumeration; the adaptive coefficient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.objectives import kl

LOG2, LOG3 = np.log(2.0), np.log(3.0)


@pytest.fixture(params=["eager", "jit"])
def wrap(request):
    return jax.jit if request.param == "jit" else (lambda f: f)


def test_the_estimators_by_hand(wrap):
    # p / q = 2, 1, 1/3, so d = log 2, 0, -log 3. k2 = d^2 / 2.
    # k3 = q / p - 1 + d: 1/2 - 1 + log 2, 0, 3 - 1 - log 3.
    logp_BT = jnp.array([[LOG2 - 5, -1.0, -4.0]])
    ref_BT = jnp.array([[-5.0, -1.0, LOG3 - 4]])
    np.testing.assert_allclose(wrap(kl.k1)(logp_BT, ref_BT), [[LOG2, 0, -LOG3]], rtol=1e-6)
    expected_BT = [[LOG2**2 / 2, 0, LOG3**2 / 2]]
    np.testing.assert_allclose(wrap(kl.k2)(logp_BT, ref_BT), expected_BT, rtol=1e-6)
    expected_BT = [[LOG2 - 0.5, 0, 2 - LOG3]]
    np.testing.assert_allclose(wrap(kl.k3)(logp_BT, ref_BT), expected_BT, rtol=2e-6)
    np.testing.assert_array_equal(
        wrap(kl.k3_straight_through)(logp_BT, ref_BT), wrap(kl.k3)(logp_BT, ref_BT)
    )


def test_the_same_logprobs_give_exactly_zero_everywhere(wrap):
    logp_BT = jnp.asarray(np.random.default_rng(0).normal(-3, 2, (4, 5)), jnp.float32)
    for name, estimator in {
        "k1": kl.k1,
        "k2": kl.k2,
        "k3": kl.k3,
        "st": kl.k3_straight_through,
    }.items():
        assert np.all(wrap(estimator)(logp_BT, logp_BT) == 0), name


def test_gradients_by_hand(wrap):
    # With d = logp - ref: k1' = 1, k2' = d, k3' = 1 - exp(-d); straight-through: d.
    logp_BT, ref_BT = jnp.array([[LOG2, 0.0, -LOG3]]), jnp.zeros((1, 3))
    for estimator, expected_BT in (
        (kl.k1, [[1, 1, 1]]),
        (kl.k2, [[LOG2, 0, -LOG3]]),
        (kl.k3, [[0.5, 0, -2]]),
        (kl.k3_straight_through, [[LOG2, 0, -LOG3]]),
    ):
        gradient_BT = wrap(jax.grad(lambda x, e=estimator: e(x, ref_BT).sum()))(logp_BT)
        np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-6, atol=1e-7)


def test_the_kl_in_the_reward_has_no_gradient_and_those_in_the_loss_none_to_the_reference(wrap):
    logp_BT, ref_BT = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -0.5]])
    both = wrap(jax.grad(lambda a, b: kl.kl_in_reward(a, b).sum(), (0, 1)))
    assert all(np.all(g == 0) for g in both(logp_BT, ref_BT))
    np.testing.assert_array_equal(kl.kl_in_reward(logp_BT, ref_BT), kl.k1(logp_BT, ref_BT))
    for name in kl.LOSS_ESTIMATORS:
        both = wrap(jax.grad(lambda a, b, n=name: kl.kl_in_loss(n, a, b).sum(), (0, 1)))
        to_policy_BT, to_reference_BT = both(logp_BT, ref_BT)
        np.testing.assert_allclose(to_policy_BT, [[0.5, -1.5]], rtol=1e-6)
        assert np.all(to_reference_BT == 0), name


def test_the_log_ratio_is_clamped_and_stays_finite(wrap):
    logp_BT, ref_BT = jnp.array([[-1.0, -3e4]]), jnp.array([[-2e4, -1.0]])
    np.testing.assert_array_equal(wrap(kl.k1)(logp_BT, ref_BT), [[20, -20]])
    np.testing.assert_array_equal(wrap(kl.k2)(logp_BT, ref_BT), [[200, 200]])
    expected_BT = [[19 + np.exp(-20.0), np.exp(20.0) - 21]]
    np.testing.assert_allclose(wrap(kl.k3)(logp_BT, ref_BT), expected_BT, rtol=1e-6)
    gradient_BT = wrap(jax.grad(lambda x: kl.kl_in_loss("k3", x, ref_BT).sum()))(logp_BT)
    np.testing.assert_array_equal(gradient_BT, [[0, 0]])


def test_bfloat16_logprobs_are_subtracted_in_float32():
    value_BT = kl.k1(jnp.array([[-100.0]], jnp.bfloat16), jnp.array([[-0.125]], jnp.bfloat16))
    assert value_BT.dtype == jnp.float32
    small_BT = kl.k1(jnp.array([[-10.0]], jnp.bfloat16), jnp.array([[-0.125]], jnp.bfloat16))
    np.testing.assert_array_equal(small_BT, [[-9.875]])


def test_unknown_names_list_the_known_ones():
    one_BT = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"'k1'.*loss.*known: k2, k3$"):
        kl.kl_in_loss("k1", one_BT, one_BT)
    with pytest.raises(AssertionError):
        kl.k1(jnp.zeros((1, 2)), jnp.zeros((2, 1)))


def test_sequence_kl_sums_response_tokens_only(wrap):
    kl_BT = jnp.array([[9.0, 0.25, -0.5, jnp.nan], [9.0, 1.0, 2.0, 3.0], [jnp.nan] * 4])
    mask_BT = jnp.array([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(wrap(kl.sequence_kl)(kl_BT, mask_BT), [-0.25, 6.0, 0.0])


def softmax(theta_V):
    weights_V = np.exp(theta_V - np.max(theta_V))
    return weights_V / weights_V.sum()


def divergence(p_V, q_V):
    return float(np.sum(p_V * (np.log(p_V) - np.log(q_V))))


def slopes(function, theta):
    """Central differences of a function of a float64 vector."""
    steps = 1e-6 * np.eye(theta.size)
    return np.array([(function(theta + s) - function(theta - s)) / 2e-6 for s in steps])


def expected_gradient(estimator, theta_V, ref_V):
    """sum_a p(a) d estimator(log p(a), log q(a)) / d theta: tokens drawn from the policy."""
    p_V = jax.nn.softmax(theta_V)

    def mean(theta_V):
        values_BT = estimator(jax.nn.log_softmax(theta_V)[:, None], jnp.log(ref_V)[:, None])
        return jnp.sum(p_V * values_BT[:, 0])

    return jax.grad(mean)(theta_V)


def test_in_expectation_values_are_the_kl_and_gradients_are_what_they_are_said_to_be():
    rng = np.random.default_rng(3)
    theta_V, ref_V = rng.normal(size=5), softmax(rng.normal(size=5))
    p_V = softmax(theta_V)
    reverse_V = slopes(lambda x: divergence(softmax(x), ref_V), theta_V)
    forward_V = slopes(lambda x: divergence(ref_V, softmax(x)), theta_V)
    assert np.max(np.abs(reverse_V - forward_V)) > 0.05
    with jax.enable_x64(True):
        logp_BT, logq_BT = jnp.log(p_V)[None], jnp.log(ref_V)[None]
        for estimator in (kl.k1, kl.k3, kl.k3_straight_through):
            mean = jnp.sum(p_V * estimator(logp_BT, logq_BT)[0])
            np.testing.assert_allclose(mean, divergence(p_V, ref_V), rtol=1e-10)
        assert np.all(kl.k3(logp_BT, logq_BT) >= 0)
        for estimator, expected_V in (
            (kl.k1, np.zeros(5)),
            (kl.k2, reverse_V),
            (kl.k3, forward_V),
            (kl.k3_straight_through, reverse_V),
        ):
            gradient_V = expected_gradient(estimator, theta_V, ref_V)
            np.testing.assert_allclose(gradient_V, expected_V, rtol=1e-7, atol=1e-9)


def test_in_a_reward_k1_alone_pulls_towards_the_reference():
    """There an estimator k multiplies grad log p: sum_a p(a) k(a) grad log p(a)."""
    rng = np.random.default_rng(5)
    ref_theta_V, direction_V = rng.normal(size=5), rng.normal(size=5)
    for distance in (0.01, 1.0):
        theta_V, ref_V = ref_theta_V + distance * direction_V, softmax(ref_theta_V)
        p_V = softmax(theta_V)
        reverse_V = slopes(lambda x: divergence(softmax(x), ref_V), theta_V)
        forward_V = slopes(lambda x: divergence(ref_V, softmax(x)), theta_V)
        with jax.enable_x64(True):
            # d log p(a) / d theta = e_a - p.
            estimates = {
                e: np.asarray(e(jnp.log(p_V)[None], jnp.log(ref_V)[None]))[0]
                for e in (kl.k1, kl.k2, kl.k3)
            }
        k1_V, k2_V, k3_V = ((p_V * k_V) @ (np.eye(5) - p_V) for k_V in estimates.values())
        np.testing.assert_allclose(k1_V, reverse_V, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(k3_V, reverse_V - forward_V, rtol=1e-6, atol=1e-9)
        if distance == 0.01:
            assert all(
                np.linalg.norm(k_V) < 0.05 * np.linalg.norm(reverse_V) for k_V in (k2_V, k3_V)
            )


def test_adaptive_beta_by_hand(wrap):
    # kl / target - 1 = 0.1, times 128 / 1280: 0.5 (1 + 0.01). Far off the error is 0.2 or -0.2.
    for value, expected in ((6.6, 0.505), (60.0, 0.51), (0.0, 0.49), (6.0, 0.5)):
        update = wrap(lambda b, k: kl.adaptive_beta(b, k, 6.0, episodes=128, horizon=1280))
        np.testing.assert_allclose(update(0.5, value), expected, rtol=1e-6)
    kept = kl.adaptive_beta(0.999, 60.0, 6.0, episodes=128, horizon=128)
    assert kept == 1.0
    loose = kl.adaptive_beta(0.999, 60.0, 6.0, episodes=128, horizon=128, maximum=5.0)
    np.testing.assert_allclose(loose, 1.1988, rtol=1e-6)


def test_adaptive_beta_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="KL target"):
        kl.adaptive_beta(0.1, 1.0, 0.0, episodes=8, horizon=100)
    with pytest.raises(ValueError, match="KL horizon"):
        kl.adaptive_beta(0.1, 1.0, 6.0, episodes=8, horizon=0)
    with pytest.raises(ValueError, match="KL horizon"):
        kl.adaptive_beta(0.1, 1.0, 6.0, episodes=500, horizon=100)
