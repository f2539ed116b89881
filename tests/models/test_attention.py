"""Rotary positions, masks and grouped-query attention against slow references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.models import attention
from perl_jax.models.config import Rope

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 6, 2, 4


@pytest.fixture
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    noise = np.random.default_rng(0)
    draw = lambda heads: noise.standard_normal((BATCH, LENGTH, heads, HEAD_DIM)).astype(np.float32)
    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def slow_attention(q_BTHK, k_BSNK, v_BSNK, mask_BTS):
    """Row by row, head by head; query head h reads key/value head h // (H / N). float64."""
    out = np.zeros(q_BTHK.shape)
    group = q_BTHK.shape[2] // k_BSNK.shape[2]
    for b, t, h in np.ndindex(q_BTHK.shape[:3]):
        visible_S = mask_BTS[b, t]
        keys_SK = k_BSNK[b, visible_S, h // group].astype(np.float64)
        logits_S = keys_SK @ q_BTHK[b, t, h] / np.sqrt(q_BTHK.shape[3])
        weights_S = np.exp(logits_S - logits_S.max())
        out[b, t, h] = (weights_S / weights_S.sum()) @ v_BSNK[b, visible_S, h // group]
    return out


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 1, 1, 0], [0, 0, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_positions_count_real_tokens(valid, expected):
    for dtype in (bool, np.int32):
        positions_BT = attention.positions(np.array([valid], dtype))
        assert positions_BT.dtype == jnp.int32
        np.testing.assert_array_equal(positions_BT, [expected])


def test_causal_mask_by_hand():
    mask_BTS = attention.causal_mask(np.array([[False, True, True], [True, True, False]]))
    left = [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    right = [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    np.testing.assert_array_equal(mask_BTS, np.array([left, right], bool))


def test_a_window_of_two_is_a_token_and_the_one_before_it():
    seen_BTS = attention.within(2, np.array([[0, 1, 2]]), np.array([[0, 1, 2]]))
    np.testing.assert_array_equal(seen_BTS, [[[1, 1, 1], [1, 1, 1], [0, 1, 1]]])


def test_rotation_is_a_complex_product(qkv):
    # The pair (i, i + K/2) is one complex number, turned by position * theta^(-2i/K).
    q_BTHK, theta = qkv[0], 100.0
    positions_BT = np.array([[0, 1, 2, 3, 4], [0, 0, 5, 6, 1000]])
    rotated = attention.rotate(q_BTHK, *attention.rotary_angles(positions_BT, HEAD_DIM, Rope(theta)))
    frequencies = theta ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    turned = (q_BTHK[..., :2] + 1j * q_BTHK[..., 2:]) * np.exp(1j * positions_BT[:, :, None, None] * frequencies)
    np.testing.assert_allclose(rotated, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)
    np.testing.assert_array_equal(rotated[:, 0], q_BTHK[:, 0])


def test_rotation_is_done_in_float32(qkv):
    # The angle of position 1000 in bfloat16 would be a different angle.
    positions_BT = np.full((BATCH, LENGTH), 1001)
    angles = attention.rotary_angles(positions_BT, HEAD_DIM, Rope())
    assert angles[0].dtype == jnp.float32
    low = attention.rotate(qkv[0].astype(jnp.bfloat16), *angles)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), attention.rotate(qkv[0], *angles), atol=0.03)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_attention_equals_slow_attention(qkv, wrap):
    valid_BT = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    mask_BTS = np.array(attention.causal_mask(valid_BT))
    out = wrap(attention.attend)(*qkv, mask_BTS)
    # A query that sees nothing (leading padding) gets the mean of all values: finite, and unread.
    np.testing.assert_allclose(out[0, 0, 0], qkv[2][0, :, 0].mean(axis=0), atol=1e-6)
    mask_BTS[0, 0] = True
    expected = slow_attention(*qkv, mask_BTS)
    seen_BT = valid_BT | np.array([[False] * 5, [False] * 4 + [True]])
    np.testing.assert_allclose(out[seen_BT], expected[seen_BT], atol=1e-6)


def test_hidden_keys_have_no_influence(qkv):
    q, k, v = qkv
    mask_BTS = attention.causal_mask(np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool))
    hidden_BS = ~np.any(np.array(mask_BTS), axis=1)
    k2, v2 = (np.where(hidden_BS[:, :, None, None], x + 100, x) for x in (k, v))
    read_BT = np.any(np.array(mask_BTS), axis=2)
    same = np.array(attention.attend(q, k, v, mask_BTS))[read_BT], np.array(attention.attend(q, k2, v2, mask_BTS))[read_BT]
    np.testing.assert_array_equal(*same)


def test_gradient_is_finite_with_rows_that_see_nothing(qkv):
    mask_BTS = jnp.zeros((BATCH, LENGTH, LENGTH), bool)
    grads = jax.grad(lambda *x: jnp.sum(attention.attend(*x, mask_BTS)), argnums=(0, 1, 2))(*qkv)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(("block", "cached_bytes"), [(2, 1), (2, 10**9), (3, 600), (128, 10**9)])
def test_attention_in_blocks_has_the_values_and_gradients_of_plain_attention(monkeypatch, block, cached_bytes):
    # Blocks that do and do not divide the length; rows one at a time, all at once, and 2 + 1.
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "CACHED_BYTES", cached_bytes)
    noise = np.random.default_rng(1)
    draw = lambda heads: noise.standard_normal((3, LENGTH, heads, HEAD_DIM)).astype(np.float32)
    q, k, v, cotangent = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS)
    valid_BT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    mask_BTS = attention.causal_mask(valid_BT)
    # Only queries that no real token reads may differ: they get no cotangent.
    cotangent = cotangent * valid_BT[:, :, None, None]
    total = lambda attend: lambda q, k, v: jnp.sum(attend(q, k, v, mask_BTS) * cotangent)
    plain, blocked = attention.attend(q, k, v, mask_BTS), attention.attend_blocked(q, k, v, mask_BTS)
    np.testing.assert_allclose(np.array(blocked)[valid_BT], np.array(plain)[valid_BT], atol=1e-6)
    assert np.isfinite(blocked).all()
    expected = jax.grad(total(attention.attend), argnums=(0, 1, 2))(q, k, v)
    for got, want in zip(jax.grad(total(attention.attend_blocked), argnums=(0, 1, 2))(q, k, v), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    everything = jax.grad(lambda *x: jnp.sum(attention.attend_blocked(*x, mask_BTS)), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in everything)


def test_attention_in_blocks_keeps_bfloat16(qkv):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv)
    mask_BTS = attention.causal_mask(np.ones((BATCH, LENGTH), bool))
    total = lambda *x: jnp.sum(attention.attend_blocked(*x, mask_BTS).astype(jnp.float32))
    assert attention.attend_blocked(q, k, v, mask_BTS).dtype == jnp.bfloat16
    assert [g.dtype for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v)] == [jnp.bfloat16] * 3
    np.testing.assert_allclose(
        attention.attend_blocked(q, k, v, mask_BTS).astype(np.float32), attention.attend(*qkv, mask_BTS), atol=0.03
    )
