"""Masked sums, means, variances and whitening: hand numbers, padding, dtypes, shardings."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from perl_jax.runtime import masked

NAN = float("nan")
X_BT = np.array([[1.0, 2.0, NAN], [6.0, NAN, -np.inf]], np.float32)
MASK_BT = np.array([[True, True, False], [True, False, False]])
EMPTY_BT = np.zeros_like(MASK_BT)


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Calls a function of arrays as it is, or compiled."""
    return (
        (lambda f, *arrays: f(*arrays))
        if request.param == "eager"
        else (lambda f, *arrays: jax.jit(f)(*arrays))
    )


def test_sum_and_mean_by_hand(run):
    # 1 + 2 + 6 = 9, over 3 true positions = 3. Rows: 1 + 2 = 3 over 2; 6 over 1.
    np.testing.assert_array_equal(run(masked.masked_sum, X_BT, MASK_BT), 9.0)
    np.testing.assert_array_equal(run(masked.masked_mean, X_BT, MASK_BT), 3.0)
    by_row = run(lambda x, m: masked.masked_mean(x, m, axis=1), X_BT, MASK_BT)
    np.testing.assert_array_equal(by_row, [1.5, 6.0])
    by_column = run(lambda x, m: masked.masked_sum(x, m, axis=0), X_BT, MASK_BT)
    np.testing.assert_array_equal(by_column, [7.0, 2.0, 0.0])


def test_variance_by_hand(run):
    # Mean 3: deviations -2, -1, 3; squares 4 + 1 + 9 = 14; over 3, or over 3 - 1.
    np.testing.assert_allclose(run(masked.masked_var, X_BT, MASK_BT), 14 / 3, rtol=1e-6)
    unbiased = run(lambda x, m: masked.masked_var(x, m, ddof=1), X_BT, MASK_BT)
    np.testing.assert_allclose(unbiased, 7.0, rtol=1e-6)
    deviation_BT = run(masked.masked_deviation, X_BT, MASK_BT)
    np.testing.assert_allclose(deviation_BT, [[-2, -1, 0], [3, 0, 0]], rtol=1e-6)


def test_whitening_by_hand(run):
    # Unbiased variance 7, so deviations -2, -1, 3 divided by sqrt(7); the mean is 3.
    whiten = lambda shift: lambda x, m: masked.masked_whiten(x, m, shift_mean=shift)
    root = np.sqrt(7.0)
    shifted_BT = run(whiten(True), X_BT, MASK_BT)
    np.testing.assert_allclose(shifted_BT, [[-2 / root, -1 / root, 0], [3 / root, 0, 0]], rtol=1e-6)
    kept_BT = run(whiten(False), X_BT, MASK_BT)
    expected_BT = [[3 - 2 / root, 3 - 1 / root, 0], [3 + 3 / root, 0, 0]]
    np.testing.assert_allclose(kept_BT, expected_BT, rtol=1e-6)


def test_an_empty_mask_gives_zero(run):
    for function in (
        masked.masked_sum,
        masked.masked_mean,
        masked.masked_var,
        masked.masked_deviation,
        lambda x, m: masked.masked_var(x, m, ddof=1),
        lambda x, m: masked.masked_whiten(x, m, shift_mean=True),
        lambda x, m: masked.masked_whiten(x, m, shift_mean=False),
    ):
        np.testing.assert_array_equal(run(function, X_BT, EMPTY_BT), 0.0)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_one_or_equal_elements_whiten_to_zero_or_to_themselves(run, count):
    # 0.1 is not a binary fraction: the rounded mean of several differs from it.
    x_BT = np.full((1, 8), 0.1, np.float32)
    mask_BT = np.arange(8)[None] < count
    shifted_BT = run(lambda x, m: masked.masked_whiten(x, m, shift_mean=True), x_BT, mask_BT)
    np.testing.assert_array_equal(shifted_BT, np.zeros((1, 8)))
    kept_BT = run(lambda x, m: masked.masked_whiten(x, m, shift_mean=False), x_BT, mask_BT)
    np.testing.assert_array_equal(kept_BT, np.where(mask_BT, x_BT, 0))
    np.testing.assert_array_equal(run(masked.masked_var, x_BT, mask_BT), 0.0)


def test_against_float64_numpy_over_each_axis(run):
    rng = np.random.default_rng(0)
    x_BT = rng.normal(50.0, 3.0, (7, 11)).astype(np.float32)
    mask_BT = rng.random((7, 11)) < 0.6
    mask_BT[3] = False
    for axis in (None, 0, 1, (0, 1)):
        kept = np.ma.masked_array(x_BT.astype(np.float64), ~mask_BT)
        mean = run(lambda x, m, a=axis: masked.masked_mean(x, m, a), x_BT, mask_BT)
        np.testing.assert_allclose(mean, np.ma.filled(kept.mean(axis), 0), rtol=1e-6)
        var = run(lambda x, m, a=axis: masked.masked_var(x, m, a, ddof=1), x_BT, mask_BT)
        expected = np.ma.filled(kept.var(axis, ddof=1), 0)
        np.testing.assert_allclose(var, expected, rtol=1e-5)


def test_low_precision_input_is_accumulated_in_float32(run):
    # In bfloat16 (8 bits) a running sum of ones stops at 256.
    ones_BT = jnp.ones((4, 1024), jnp.bfloat16)
    mask_BT = jnp.ones((4, 1024), bool)
    total = run(masked.masked_sum, ones_BT, mask_BT)
    assert total.dtype == jnp.float32
    assert total == 4096
    assert masked.masked_mean(np.array([True, False]), np.array([True, True])) == 0.5
    assert masked.masked_whiten(ones_BT, mask_BT, shift_mean=True).dtype == jnp.float32


def test_padding_does_not_reach_the_gradient(run):
    def loss(x_BT):
        whitened_BT = masked.masked_whiten(x_BT, MASK_BT, shift_mean=True)
        return masked.masked_mean(whitened_BT**3, MASK_BT) + masked.masked_var(x_BT, MASK_BT)

    clean_BT = np.where(MASK_BT, X_BT, 0)
    gradient_BT = run(jax.grad(loss), X_BT)
    np.testing.assert_array_equal(gradient_BT, run(jax.grad(loss), clean_BT))
    assert np.all(gradient_BT[~MASK_BT] == 0)
    assert np.all(gradient_BT[MASK_BT] != 0)


def test_the_gradient_of_the_variance_by_hand(run):
    # d/dx_i of sum (x_j - mean)^2 / 3 = 2 (x_i - mean) / 3: the offset in use adds nothing.
    gradient_BT = run(jax.grad(lambda x: masked.masked_var(x, MASK_BT)), X_BT)
    np.testing.assert_allclose(gradient_BT, [[-4 / 3, -2 / 3, 0], [2, 0, 0]], rtol=1e-6)


def test_a_mask_that_is_no_mask_is_refused():
    with pytest.raises(AssertionError):
        masked.masked_mean(X_BT, MASK_BT.astype(np.float32))
    with pytest.raises(AssertionError):
        masked.masked_mean(X_BT, MASK_BT[:, :1])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data")])
def test_sharded_over_eight_devices_is_the_global_reduction(spec):
    rng = np.random.default_rng(1)
    x_BT = rng.normal(2.0, 5.0, (16, 24)).astype(np.float32)
    # Whole shards are empty: a mean of per-device means would be wrong.
    mask_BT = np.zeros((16, 24), bool)
    mask_BT[:3, :20] = rng.random((3, 20)) < 0.7
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put((x_BT, mask_BT), NamedSharding(mesh, spec))
    for function in (
        masked.masked_mean,
        lambda x, m: masked.masked_var(x, m, ddof=1),
        lambda x, m: masked.masked_whiten(x, m, shift_mean=True),
        lambda x, m: masked.masked_whiten(x, m, shift_mean=False),
    ):
        chex.assert_trees_all_close(
            jax.jit(function)(*placed), function(x_BT, mask_BT), rtol=2e-6, atol=2e-6
        )
    kept = x_BT.astype(np.float64)[mask_BT]
    mean = jax.jit(masked.masked_mean)(*placed)
    np.testing.assert_allclose(mean, kept.mean(), rtol=1e-6)
