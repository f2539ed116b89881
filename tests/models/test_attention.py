"""Rotary positions, masks and grouped-query attention against slow references."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.lora import Adapter
from perl_jax.models import attention, kernels, language_model
from perl_jax.models.config import Rope
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.packing import pack
from perl_jax.runtime import sharding
from perl_jax.types import Layout, Tokens
from tests import small
from tests.jaxprs import equations

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
    seen_BTS = attention.within_window(2, np.array([[0, 1, 2]]), np.array([[0, 1, 2]]))
    np.testing.assert_array_equal(seen_BTS, [[[1, 1, 1], [1, 1, 1], [0, 1, 1]]])


def test_rotation_is_a_complex_product(qkv):
    # The pair (i, i + K/2) is one complex number, turned by position * theta^(-2i/K).
    q_BTHK, theta = qkv[0], 100.0
    positions_BT = np.array([[0, 1, 2, 3, 4], [0, 0, 5, 6, 1000]])
    rotated = attention.rotate(
        q_BTHK, *attention.rotary_angles(positions_BT, HEAD_DIM, Rope(theta))
    )
    frequencies = theta ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    turned = (q_BTHK[..., :2] + 1j * q_BTHK[..., 2:]) * np.exp(
        1j * positions_BT[:, :, None, None] * frequencies
    )
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
    same = (
        np.array(attention.attend(q, k, v, mask_BTS))[read_BT],
        np.array(attention.attend(q, k2, v2, mask_BTS))[read_BT],
    )
    np.testing.assert_array_equal(*same)


def test_gradient_is_finite_with_rows_that_see_nothing(qkv):
    mask_BTS = jnp.zeros((BATCH, LENGTH, LENGTH), bool)
    grads = jax.grad(lambda *x: jnp.sum(attention.attend(*x, mask_BTS)), argnums=(0, 1, 2))(*qkv)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(("block", "cached_bytes"), [(2, 1), (2, 10**9), (3, 600), (128, 10**9)])
def test_attention_in_blocks_has_the_values_and_gradients_of_plain_attention(
    monkeypatch, block, cached_bytes
):
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
    plain, blocked = (
        attention.attend(q, k, v, mask_BTS),
        attention.attend_blocked(q, k, v, mask_BTS),
    )
    np.testing.assert_allclose(np.array(blocked)[valid_BT], np.array(plain)[valid_BT], atol=1e-6)
    assert np.isfinite(blocked).all()
    gradients = lambda total: jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    expected = gradients(total(attention.attend))
    for got, want in zip(gradients(total(attention.attend_blocked)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    everything = gradients(lambda *x: jnp.sum(attention.attend_blocked(*x, mask_BTS)))
    assert all(np.isfinite(g).all() for g in everything)


def test_attention_in_blocks_keeps_bfloat16(qkv):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv)
    mask_BTS = attention.causal_mask(np.ones((BATCH, LENGTH), bool))
    total = lambda *x: jnp.sum(attention.attend_blocked(*x, mask_BTS).astype(jnp.float32))
    assert attention.attend_blocked(q, k, v, mask_BTS).dtype == jnp.bfloat16
    assert [g.dtype for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v)] == [jnp.bfloat16] * 3
    np.testing.assert_allclose(
        attention.attend_blocked(q, k, v, mask_BTS).astype(np.float32),
        attention.attend(*qkv, mask_BTS),
        atol=0.03,
    )


def reference(q, k, v, valid_BT, window, scale, cap, cotangent):
    """Causal attention of one layer in float64 with whole weights: the output, and by the chain
    rule its gradients in q, k, v.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    position_BT = np.cumsum(valid_BT, axis=1)
    seen_BTS = np.tril(np.ones((q.shape[1],) * 2, bool)) & valid_BT[:, None, :]
    if window is not None:
        seen_BTS &= position_BT[:, :, None] - position_BT[:, None, :] < window
    raw = scale * np.einsum("bthk,bshk->bhts", q, k)
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    weights = np.where(seen_BTS[:, None], np.exp(logits), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshk->bthk", weights, v)
    d_weights = np.einsum("bthk,bshk->bhts", cotangent, v)
    d_logits = weights * (d_weights - np.sum(weights * d_weights, -1, keepdims=True))
    d_raw = scale * d_logits * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
    in_groups = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(axis=3)
    dq = np.einsum("bhts,bshk->bthk", d_raw, k)
    dk, dv = (
        np.einsum("bhts,bthk->bshk", d_raw, q),
        np.einsum("bhts,bthk->bshk", weights, cotangent),
    )
    return out, dq, in_groups(dk), in_groups(dv)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("window", "cap"), [(None, 2.0), (3, None), (4, 1.5)])
def test_attention_in_blocks_equals_the_formula_with_caps_and_windows(
    monkeypatch, wide, window, cap
):
    # Blocks of 2 queries over 7 columns; wide: two rows at a time of three, at most three blocks,
    # of 4 queries.
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    monkeypatch.setattr(attention, "WIDE_BLOCKS", 3)
    monkeypatch.setattr(attention, "WIDE_BYTES", 2 * HEADS * 4 * 7 * 4)
    noise = np.random.default_rng(5)
    draw = lambda heads: 2 * noise.standard_normal((3, 7, heads, HEAD_DIM)).astype(np.float32)
    q, k, v, cotangent = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS)
    valid_BT = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
    cotangent = cotangent * valid_BT[:, :, None, None]
    mask_BTS, positions_BT = attention.causal_mask(valid_BT), attention.positions(valid_BT)
    if window is not None:
        mask_BTS = mask_BTS & attention.within_window(window, positions_BT, positions_BT)
    attend = lambda q, k, v: attention.attend_blocked(q, k, v, mask_BTS, 0.7, cap, wide=wide)
    out, gradients = jax.jit(
        lambda qkv, d: (lambda out, backward: (out, backward(d)))(*jax.vjp(attend, *qkv))
    )((q, k, v), cotangent)
    for got, want in zip(
        (out, *gradients), reference(q, k, v, valid_BT, window, 0.7, cap, cotangent), strict=True
    ):
        np.testing.assert_allclose(np.where(valid_BT[:, :, None, None], got, want), want, atol=1e-5)


def squares(function, *arguments, length: int) -> list[str]:
    """Floating-point intermediates [..., T, T] of a program."""
    found = []
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if shape[-2:] == (length, length) and jnp.issubdtype(variable.aval.dtype, jnp.floating):
                found.append(str(variable.aval))
    return found


@pytest.mark.parametrize(
    ("dtype", "packed", "mesh"),
    [
        ("float32", True, None),
        pytest.param("bfloat16", False, None, marks=pytest.mark.slow),
        pytest.param("float32", False, {"data": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, {"data": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_where_no_kernel_of_a_gpu_fits_no_weights_exist_whole(monkeypatch, dtype, packed, mesh):
    """A model with a cap and windows, forward and backward, at 2,048 tokens: what a GPU would run,
    traced and not run.
    """
    length, parts = 2048, 1 if mesh is None else 2
    config = dataclasses.replace(
        small.CONFIG,
        max_positions=length,
        dtype=dtype,
        attention_cap=50.0,
        window=300,
        windowed=(0, 2),
    )
    monkeypatch.setattr(language_model, "platform_of", lambda mesh: "gpu")
    chosen = kernels.choose_attention("gpu", config, "9.0").path
    assert chosen == "blocked"

    def found(path: str) -> list[str]:
        lm = LanguageModel(
            dataclasses.replace(config, attention=path),
            None
            if mesh is None
            else sharding.make_mesh(sharding.MeshConfig(**mesh), jax.devices()[:4]),
        )
        ids, flags = (jax.ShapeDtypeStruct((4, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        layout = Layout(capacity=4 * length // parts, parts=parts) if packed else None

        def loss(weights, base, tokens_BT, valid_BT, response_BT):
            packing = pack(Tokens(tokens_BT, valid_BT, response_BT, layout))
            hidden = lm.hidden(
                base, Adapter(lora=weights, config=small.LORA), tokens_BT, valid_BT, packing=packing
            )
            return jnp.sum(hidden.astype(jnp.float32))

        return squares(
            jax.value_and_grad(loss),
            lm.abstract_lora(small.LORA),
            lm.abstract_base(),
            ids,
            flags,
            flags,
            length=length,
        )

    assert not found(chosen)
    # Of the plain path the weights are found, so that the search can find them.
    assert found("plain")
