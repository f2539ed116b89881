"""The cache of decoding: shared prompts, columns used in turn, fewer bits; against attention
without a cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.generation.cache import CacheEntry, cache_entry
from perl_jax.generation.decoding import attend_cached, decode, prefill
from perl_jax.models import attention
from perl_jax.types import Tokens
from tests import small

PROMPTS, SAMPLES, LENGTH, OWN = 2, 3, 5, 4
ROWS, HEADS, KV_HEADS, HEAD_DIM = PROMPTS * SAMPLES, 6, 2, 4
BASE, ROLE = small.make_base(), small.make_adapter()


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def sequences() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of whole sequences, prompt columns equal within a prompt's samples, and real
    tokens.
    """
    total = LENGTH + OWN
    q, k, v = (
        draw(ROWS, total, HEADS, HEAD_DIM),
        draw(ROWS, total, KV_HEADS, HEAD_DIM),
        1 + draw(ROWS, total, KV_HEADS, HEAD_DIM),
    )
    for x in (k, v):
        x[:, :LENGTH] = np.repeat(x[::SAMPLES, :LENGTH], SAMPLES, axis=0)
    valid_BT = np.ones((ROWS, total), bool)
    valid_BT[SAMPLES:, :2] = False
    return q, k, v, valid_BT


def cached(q, k, v, valid_BT, kind: str = "auto", spare: int = 2) -> jax.Array:
    """The last token against a cache of those before it, with spare columns that hold other
    numbers.
    """
    head_first = lambda x: jnp.swapaxes(x, 1, 2)
    prompt = lambda x: cache_entry(head_first(x[::SAMPLES, :LENGTH]), kind)
    own = lambda x: cache_entry(
        head_first(
            np.concatenate(
                [x[:, LENGTH:-1], np.full((ROWS, spare, *x.shape[2:]), 9.0, np.float32)], axis=1
            )
        ),
        kind,
    )
    visible_BS = np.concatenate([valid_BT[:, :-1], np.zeros((ROWS, spare), bool)], axis=1)
    return attend_cached(
        q[:, -1:], k[:, -1:], v[:, -1:], (prompt(k), prompt(v), own(k), own(v)), visible_BS
    )


def test_cached_attention_equals_the_last_query(sequences):
    q, k, v, valid_BT = sequences
    full = attention.attend(q, k, v, attention.causal_mask(valid_BT))[:, -1:]
    np.testing.assert_allclose(cached(q, k, v, valid_BT), full, atol=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 0.02), ("int8", 0.04)])
def test_fewer_bits_are_near(sequences, kind, error):
    q, k, v, valid_BT = sequences
    exact, rounded = (np.array(cached(q, k, v, valid_BT, kind)) for kind in ("auto", kind))
    assert 1e-5 < np.abs(rounded - exact).max() < error


def test_int8_keeps_a_scale_for_each_token_and_head():
    x = (
        draw(3, 2, 5, HEAD_DIM)
        * np.array([1e-3, 1.0, 1e3, 0.0, 5.0], np.float32)[None, None, :, None]
    )
    kept = cache_entry(x, "int8")
    assert kept.values.dtype == jnp.int8 and kept.scale.shape == (3, 2, 5)
    # Half a step of the largest entry's 127.
    assert (
        np.abs(kept.values * kept.scale[..., None] - x)
        <= np.abs(x).max(axis=-1, keepdims=True) / 254 * 1.001
    ).all()


def test_a_first_token_without_a_prompt_is_its_own_value():
    q, k, v = (draw(ROWS, 1, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    empty = CacheEntry(jnp.zeros((ROWS, KV_HEADS, 2, HEAD_DIM)))
    out = attend_cached(q, k, v, (empty,) * 4, np.zeros((ROWS, 4), bool))
    np.testing.assert_allclose(out[:, 0], np.repeat(v[:, 0], HEADS // KV_HEADS, axis=1), atol=1e-6)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def decoded(lm, prompt: Tokens, samples: int, columns: tuple[int, ...], new_BC):
    """Logits of decoding given tokens; at the steps in `columns` the cache grows to the next."""
    first_PV, cache = prefill(
        lm, BASE, ROLE, prompt.tokens_BT, prompt.valid_BT, columns[0], samples
    )
    out = [jnp.repeat(first_PV, samples, axis=0)]
    for step in range(new_BC.shape[1]):
        if step in columns:
            cache = cache.grown(columns[columns.index(step) + 1])
        logits_BV, cache = decode(lm, BASE, ROLE, new_BC[:, step], cache)
        out.append(logits_BV)
    return jnp.stack(out, axis=1)


@pytest.mark.parametrize("columns", [(6,), (2, 3, 6)])
def test_samples_of_a_prompt_share_what_was_read_once(columns):
    # Left-padded and unpadded prompts, three rows each, against the whole sequences without a
    # cache.
    prompt = small.make_tokens([("none", 6), ("left", 4)], 6)
    new_BC = np.random.default_rng(3).integers(61, size=(ROWS, 5), dtype=np.int32)
    wide = lambda x: np.repeat(x, SAMPLES, axis=0)
    tokens_BT = np.concatenate([wide(prompt.tokens_BT), new_BC], axis=1)
    valid_BT = np.concatenate([wide(prompt.valid_BT), np.ones(new_BC.shape, bool)], axis=1)
    full_BTV = small.logits(small.LM, BASE, ROLE, Tokens(tokens_BT, valid_BT, valid_BT))
    np.testing.assert_allclose(
        decoded(small.LM, prompt, SAMPLES, columns, new_BC), full_BTV[:, 5:], atol=2e-5
    )
