"""Log-probabilities and entropies: alignment, temperature, precision, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.models import logprobs
from perl_jax.planning.flops import flops

B, T, V = 3, 5, 7


def batch(seed: int = 0, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits_BTV = (scale * rng.normal(size=(B, T, V))).astype(np.float32)
    return logits_BTV, rng.integers(0, V, (B, T)).astype(np.int32)


def reference_logprobs(logits_BTV, tokens_BT, temperature):
    """Token by token in float64: softmax of the logits one place to the left."""
    out_BT = np.zeros(tokens_BT.shape)
    for b in range(tokens_BT.shape[0]):
        for t in range(1, tokens_BT.shape[1]):
            weights = np.exp(logits_BTV[b, t - 1].astype(np.float64) / temperature)
            out_BT[b, t] = np.log(weights[tokens_BT[b, t]] / weights.sum())
    return out_BT


def test_by_hand():
    # Logits log 1, log 3 at position 0 predict token 1: p = (1/4, 3/4). At temperature 1/2 the
    # weights are squared: (1/10, 9/10).
    logits_BTV = jnp.log(jnp.array([[[1.0, 3.0], [5.0, 5.0], [7.0, 9.0]]]))
    tokens_BT = jnp.array([[0, 1, 0]])
    logp_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT)
    np.testing.assert_allclose(logp_BT, [[0, np.log(3 / 4), np.log(1 / 2)]], rtol=1e-6)
    sharp_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT, temperature=0.5)
    np.testing.assert_allclose(sharp_BT, [[0, np.log(9 / 10), np.log(1 / 2)]], rtol=1e-6)
    entropy_BT = logprobs.next_token_entropy(logits_BTV)
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(entropy_BT, [[0, quarter, np.log(2)]], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_against_float64_numpy(temperature, wrap):
    logits_BTV, tokens_BT = batch()
    compute = wrap(lambda a, b: logprobs.next_token_logprobs(a, b, temperature))
    logp_BT = compute(logits_BTV, tokens_BT)
    assert logp_BT.shape == (B, T)
    assert logp_BT.dtype == jnp.float32
    expected_BT = reference_logprobs(logits_BTV, tokens_BT, temperature)
    np.testing.assert_allclose(logp_BT, expected_BT, rtol=1e-5, atol=1e-6)
    entropy_BT = wrap(lambda a: logprobs.next_token_entropy(a, temperature))(logits_BTV)
    every = [reference_logprobs(logits_BTV, np.full((B, T), v), temperature) for v in range(V)]
    expected_BT = -np.sum(np.exp(every) * every, axis=0)
    expected_BT[:, 0] = 0
    np.testing.assert_allclose(entropy_BT, expected_BT, rtol=1e-5, atol=1e-6)


def test_only_the_logits_before_a_token_and_the_token_itself_matter():
    logits_BTV, tokens_BT = batch()
    before_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT)
    for t in range(T):
        changed_BTV = logits_BTV.copy()
        changed_BTV[:, t] += np.arange(V) ** 2
        after_BT = logprobs.next_token_logprobs(changed_BTV, tokens_BT)
        moved_T = np.any(np.asarray(after_BT != before_BT), axis=0)
        assert list(np.flatnonzero(moved_T)) == ([t + 1] if t + 1 < T else [])
        other_BT = tokens_BT.copy()
        other_BT[:, t] = (other_BT[:, t] + 1) % V
        after_BT = logprobs.next_token_logprobs(logits_BTV, other_BT)
        moved_T = np.any(np.asarray(after_BT != before_BT), axis=0)
        assert list(np.flatnonzero(moved_T)) == ([t] if t else [])


def test_shift_right_agrees_with_the_alignment_of_logprobs():
    values_BT = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    shifted_BT = logprobs.shift_right(values_BT)
    np.testing.assert_array_equal(shifted_BT, [[0, 1, 2], [0, 4, 5]])
    # The logits a sampler holds after position t - 1 give column t.
    logits_BTV, tokens_BT = batch()
    logp_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT, 0.7)
    for t in range(1, T):
        step_B = logprobs.token_logprobs(logits_BTV[:, t - 1], tokens_BT[:, t], 0.7)
        np.testing.assert_allclose(step_B, logp_BT[:, t], rtol=1e-6)


def test_bfloat16_logits_are_worked_on_in_float32():
    logits_BTV, tokens_BT = batch()
    low_BTV = jnp.asarray(logits_BTV, jnp.bfloat16)
    logp_BT = logprobs.next_token_logprobs(low_BTV, tokens_BT, 0.7)
    assert logp_BT.dtype == jnp.float32
    expected_BT = reference_logprobs(np.asarray(low_BTV, np.float64), tokens_BT, 0.7)
    np.testing.assert_allclose(logp_BT, expected_BT, rtol=1e-5, atol=1e-6)
    assert logprobs.next_token_entropy(low_BTV).dtype == jnp.float32


def test_the_gradient_is_one_hot_minus_softmax():
    logits_BTV, tokens_BT = batch()
    weights_BT = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def total(logits_BTV):
        return jnp.sum(weights_BT * logprobs.next_token_logprobs(logits_BTV, tokens_BT, 0.7))

    expected_BTV = np.zeros((B, T, V))
    for b in range(B):
        for t in range(1, T):
            p_V = np.exp(logits_BTV[b, t - 1].astype(np.float64) / 0.7)
            expected_BTV[b, t - 1] = (np.eye(V)[tokens_BT[b, t]] - p_V / p_V.sum()) / 0.7
            expected_BTV[b, t - 1] *= weights_BT[b, t]
    for wrap in (lambda f: f, jax.jit):
        gradient_BTV = wrap(jax.grad(total))(logits_BTV)
        np.testing.assert_allclose(gradient_BTV, expected_BTV, rtol=1e-5, atol=1e-6)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        logits_BTV, tokens_BT = batch(scale=1.0)
        weights_BT = np.random.default_rng(1).normal(size=(B, T))

        @jax.jit
        def total(logits_BTV):
            logp_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT, 0.7)
            entropy_BT = logprobs.next_token_entropy(logits_BTV, 0.7)
            return jnp.sum(weights_BT * (logp_BT + 2 * entropy_BT))

        logits_BTV = logits_BTV.astype(np.float64)
        gradient_BTV = jax.jit(jax.grad(total))(logits_BTV)
        assert gradient_BTV.dtype == jnp.float64
        for index in [(0, 0, 0), (1, 2, 3), (2, 3, 6), (0, 4, 1)]:
            step_BTV = np.zeros_like(logits_BTV)
            step_BTV[index] = 1e-6
            slope = (total(logits_BTV + step_BTV) - total(logits_BTV - step_BTV)) / 2e-6
            np.testing.assert_allclose(gradient_BTV[index], slope, rtol=1e-6, atol=1e-8)


def test_a_confident_token_keeps_its_gradient_in_bfloat16():
    # Two tokens, logits 8 and 0: the gradient is 1 - p = 1 / (1 + e^8) = 3.3535e-4, which a
    # difference of bfloat16 numbers near 1 (spacing 2^-8) would round to 0.
    logits_BTV = jnp.array([[[8.0, 0.0], [0.0, 0.0]]], jnp.bfloat16)
    tokens_BT = jnp.array([[0, 0]])
    total = lambda x: jnp.sum(logprobs.next_token_logprobs(x, tokens_BT))
    gradient_BTV = jax.grad(total)(logits_BTV)
    assert gradient_BTV.dtype == jnp.bfloat16
    first_V = gradient_BTV[0, 0].astype(np.float32)
    np.testing.assert_allclose(first_V, [3.3535e-4, -3.3535e-4], rtol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_most_one_extra_float32_copy_of_the_logits(dtype):
    b, t, v = 2, 32, 4096
    logits_BTV = jax.ShapeDtypeStruct((b, t, v), dtype)
    tokens_BT = jax.ShapeDtypeStruct((b, t), jnp.int32)

    def forward(logits_BTV, tokens_BT):
        return logprobs.next_token_logprobs(logits_BTV, tokens_BT, 0.7)

    def both(logits_BTV, tokens_BT):
        return jax.value_and_grad(lambda x: forward(x, tokens_BT).sum())(logits_BTV)

    for function in (forward, both):
        memory = jax.jit(function).lower(logits_BTV, tokens_BT).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1.05 * b * t * v * 4


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 3, 100])
@pytest.mark.parametrize("start", [0, 3])
def test_by_pieces_against_float64_numpy(columns, frozen, start):
    rng = np.random.default_rng(2)
    hidden_BTD, weight_DV, weights_BT = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, T, 4), (4, V), (B, T))
    )
    tokens_BT = rng.integers(0, V, (B, T)).astype(np.int32)

    @jax.jit
    def found(hidden_BTD, weight_DV):
        # The matrix is traced, as in a program that is given it.
        head = lambda hidden_BCD: 5 * jnp.tanh(hidden_BCD @ weight_DV)
        total = lambda hidden_BTD: logprobs.logprobs_from_hidden(
            head, hidden_BTD, tokens_BT, 0.7, start=start, columns=columns, frozen=frozen
        )

        def loss(hidden_BTD):
            logp_BT, entropy_BT = total(hidden_BTD)
            return jnp.sum(weights_BT * (logp_BT + entropy_BT))

        return total(hidden_BTD), jax.grad(loss)(hidden_BTD)

    (logp_BT, entropy_BT), gradient_BTD = found(hidden_BTD, weight_DV)
    squashed_BTV = np.tanh(hidden_BTD.astype(np.float64) @ weight_DV)
    expected_BT, expected_BTD = (
        reference_logprobs(5 * squashed_BTV, tokens_BT, 0.7),
        np.zeros(hidden_BTD.shape),
    )
    expected_BT[:, :start] = 0
    for t in range(max(start, 1), T):
        p_BV = np.exp(5 * squashed_BTV[:, t - 1] / 0.7)
        p_BV /= p_BV.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(entropy_BT[:, t], -(p_BV * np.log(p_BV)).sum(axis=1), rtol=1e-5)
        slope_BV = 5 * (1 - squashed_BTV[:, t - 1] ** 2) * (np.eye(V)[tokens_BT[:, t]] - p_BV) / 0.7
        # The entropy has no gradient.
        expected_BTD[:, t - 1] = weights_BT[:, t, None] * (slope_BV @ weight_DV.T)
    np.testing.assert_allclose(logp_BT, expected_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient_BTD, expected_BTD, rtol=1e-5, atol=1e-5)


def test_no_logits_are_made_twice_or_kept_where_the_head_is_frozen():
    b, t, d, v, columns = 4, 32, 16, 4096, 2
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, t, d), (d, v))] + [
        jax.ShapeDtypeStruct((b, t), jnp.int32)
    ]

    def gradient(frozen):
        def loss(hidden_BTD, weight_DV, tokens_BT):
            return logprobs.logprobs_from_hidden(
                lambda hidden: hidden @ weight_DV,
                hidden_BTD,
                tokens_BT,
                columns=columns,
                frozen=frozen,
            )[0].sum()

        return jax.jit(jax.grad(loss)).trace(*shapes)

    product = 2 * b * t * d * v
    assert flops(gradient(True).jaxpr) == 2 * product
    assert flops(gradient(False).jaxpr) == 3 * product
    memory = gradient(True).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * b * columns * v * 4 < b * t * v * 4


def test_extreme_and_banned_logits():
    logits_BTV = jnp.array([[[1e4, -1e4, -jnp.inf], [0.0, 0.0, 0.0]]])
    tokens_BT = jnp.array([[0, 1]])
    np.testing.assert_allclose(logprobs.next_token_logprobs(logits_BTV, tokens_BT), [[0, -2e4]])
    np.testing.assert_allclose(logprobs.next_token_entropy(logits_BTV), [[0, 0]], atol=1e-6)
    for function in (
        lambda x: logprobs.next_token_logprobs(x, tokens_BT).sum(),
        lambda x: logprobs.next_token_entropy(x).sum(),
    ):
        assert np.all(np.isfinite(jax.jit(jax.grad(function))(logits_BTV)))


def test_an_id_outside_the_vocabulary_is_not_silent():
    logits_BTV, tokens_BT = batch()
    tokens_BT[1, 2] = V
    logp_BT = logprobs.next_token_logprobs(logits_BTV, tokens_BT)
    assert np.argwhere(np.isnan(logp_BT)).tolist() == [[1, 2]]


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_without_logprobs_is_refused(temperature):
    logits_BTV, tokens_BT = batch()
    with pytest.raises(ValueError, match=r"temperature .* above 0"):
        logprobs.next_token_logprobs(logits_BTV, tokens_BT, temperature)
    with pytest.raises(ValueError, match=r"temperature .* above 0"):
        logprobs.next_token_entropy(logits_BTV, temperature)


def test_shapes_are_checked():
    logits_BTV, tokens_BT = batch()
    with pytest.raises(AssertionError):
        logprobs.next_token_logprobs(logits_BTV[:, :-1], tokens_BT)
    with pytest.raises(AssertionError):
        logprobs.next_token_logprobs(logits_BTV[0], tokens_BT[0])
    with pytest.raises(AssertionError):
        logprobs.shift_right(logits_BTV)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_sharded_vocabulary_is_not_gathered():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(2)
    logits_BTV = rng.normal(size=(4, 6, 64)).astype(np.float32)
    tokens_BT = rng.integers(0, 64, (4, 6)).astype(np.int32)
    weights_BT = rng.normal(size=(4, 6)).astype(np.float32)
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    placed_BTV = jax.device_put(logits_BTV, jax.sharding.NamedSharding(mesh, spec))

    @jax.jit
    def value_and_gradient(logits_BTV):
        def total(x):
            return jnp.sum(weights_BT * logprobs.next_token_logprobs(x, tokens_BT))

        return jax.value_and_grad(total)(logits_BTV)

    compiled = value_and_gradient.lower(placed_BTV).compile()
    assert "all-gather" not in compiled.as_text()
    value, gradient_BTV = compiled(placed_BTV)
    expected, expected_BTV = value_and_gradient(logits_BTV)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient_BTV, expected_BTV, rtol=1e-5, atol=1e-7)
