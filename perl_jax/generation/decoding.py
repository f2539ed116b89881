"""Cached decoding: prompts are read once, then each step appends one token to every row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.generation.cache import (
    CacheEntry,
    CacheKind,
    KVCache,
    WindowCache,
    cache_entry,
    last_tokens,
    own_columns,
)
from perl_jax.models import attention
from perl_jax.models.attention import MASKED, rounded_sum, soft_cap
from perl_jax.models.language_model import LanguageModel, last_valid
from perl_jax.models.layer_kinds import LayerKinds
from perl_jax.runtime import precision
from perl_jax.types import Array, Tree


def prefill(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    tokens_PS: Array,
    valid_PS: Array,
    max_new_tokens: int,
    samples: int = 1,
    kind: CacheKind = "auto",
) -> tuple[jax.Array, KVCache]:
    """Reads prompts; returns logits_PV of each prompt's next token, and a cache for decoding.

    The cache has P * `samples` rows; a prompt's rows are consecutive.

    Args:
        lm: The model's functions.
        base: The frozen base, or what `prepare.prepare_for_decoding` made of it.
        adapter: The adapter; None: the base itself.
        tokens_PS: Token ids of the prompts.
        valid_PS: True on real tokens.
        max_new_tokens: Number of cache columns per row for decoded tokens; layers with a window
            have at most the window.
        samples: Number of rows per prompt.
        kind: Dtype of the cache; auto: the activations' dtype.
    """
    placement = lm.placement()
    # Keys and values of the tokens that a window does not hold are dropped layer by layer.
    taken = {window: last_tokens(valid_PS, window) for window in lm.config.windows}
    hidden_PSD, kept = lm.hidden_and_kept(
        base, adapter, tokens_PS, valid_PS, lambda kv, window: tuple(map(taken[window], kv))
    )
    rows = samples * tokens_PS.shape[0]

    def part(window: int | None, kv: tuple[Array, Array]) -> WindowCache:
        """Returns the cache of the layers with this window, given their (keys, values)."""
        prompt_k, prompt_v = (
            placement.cache(cache_entry(jnp.swapaxes(x_LPSNK, -3, -2), kind)) for x_LPSNK in kv
        )
        own = own_columns(max_new_tokens, window)
        return WindowCache(
            prompt_k=prompt_k,
            prompt_v=prompt_v,
            own_k=placement.cache(prompt_k.vacant(rows, own)),
            own_v=placement.cache(prompt_v.vacant(rows, own)),
            prompt_visible_PS=taken[window](jnp.asarray(valid_PS, bool)),
            prompt_position_PS=taken[window](attention.positions(valid_PS)),
            own_visible_BC=jnp.zeros((rows, own), bool),
            own_position_BC=jnp.zeros((rows, own), jnp.int32),
            window=window,
        )

    position_B = jnp.repeat(jnp.sum(valid_PS.astype(jnp.int32), axis=1), samples)
    cache = KVCache(tuple(part(*pair) for pair in kept.items()), position_B, jnp.int32(0))
    last_P1D = jnp.take_along_axis(hidden_PSD, last_valid(valid_PS)[:, None, None], axis=1)
    return _next_logits(lm, base, adapter, last_P1D), cache


def decode(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    token_B: Array,
    cache: KVCache,
    kind: CacheKind = "auto",
) -> tuple[jax.Array, KVCache]:
    """Appends one token to every row; returns logits_BV of the next token, and the new cache.

    Args:
        lm: The model's functions.
        base: The frozen base, or what `prepare.prepare_for_decoding` made of it.
        adapter: The adapter; None: the base itself.
        token_B: Id of the token that each row appends.
        cache: Keys and values of the tokens before it.
        kind: Dtype of the cache, as in `prefill`.
    """
    outer, placement = lm.embedder(base, adapter), lm.placement(stationary=True)
    kinds = LayerKinds.of(lm.config, cache.position_B[:, None])
    visible = {part.window: part.visible(cache.position_B) for part in cache.parts}

    def layer(block, x, by_layer, window, entries):
        """Runs one layer for the new token; returns its output x, and the token's (key, value)."""

        def attend(q, k, v):
            """Returns the attention output, and (key, value) for the cache."""
            heads = attend_cached(
                q,
                k,
                v,
                entries,
                visible[window],
                lm.config.attention_scale,
                lm.config.attention_cap,
            )
            return heads, (k, v)

        return block.decode(x, kinds.rotary(by_layer), attend, placement)

    x_B1D, new = lm.layers(base, adapter, placement).run(
        layer,
        outer.embed(token_B[:, None], placement),
        kinds.by_layer,
        windows=lm.config.windows,
        caches={part.window: part.by_layer for part in cache.parts},
    )

    def appended(part: WindowCache) -> WindowCache:
        """Returns a part of the cache with the new token in it."""
        k_LB1NK, v_LB1NK = new[part.window]
        part = part.appended(k_LB1NK, v_LB1NK, cache.position_B, cache.step, kind)
        return dataclasses.replace(
            part, own_k=placement.cache(part.own_k), own_v=placement.cache(part.own_v)
        )

    after = KVCache(tuple(map(appended, cache.parts)), cache.position_B + 1, cache.step + 1)
    return _next_logits(lm, base, adapter, outer.final_norm(x_B1D)), after


def _next_logits(
    lm: LanguageModel, base: Tree, adapter: Adapter | None, hidden_B1D: Array
) -> jax.Array:
    """Returns logits_BV of the next token.

    Args:
        lm: The model's functions.
        base: The frozen base.
        adapter: The adapter; None: the base itself.
        hidden_B1D: Hidden state of each row's last token, after the final norm.
    """
    placement = lm.placement()
    return placement.next_logits(lm.logits_of(base, adapter, hidden_B1D, placement)[:, 0])


def attend_cached(
    q_B1HK: Array,
    k_B1NK: Array,
    v_B1NK: Array,
    layer: tuple[CacheEntry, CacheEntry, CacheEntry, CacheEntry],
    visible_BS: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Returns the attention output [B, 1, H, K] of one new token of each row.

    The token sees its prompt, the tokens that its row has decoded, and itself. Its key and value
    are not in the cache yet. The cache is read-only here, so a scan over layers returns one token
    per layer, and the caller writes all layers with one in-place update.

    Args:
        q_B1HK: Query of the new token.
        k_B1NK: Key of the new token.
        v_B1NK: Value of the new token.
        layer: The entries of one layer of `WindowCache.by_layer`.
        visible_BS: Whether the token sees each key of prompt and row (`WindowCache.visible`).
        scale: Factor of q k^T; None: 1 / sqrt(K).
        cap: Cap of the logits (`attention.soft_cap`); None: no cap.
    """
    prompt_k, prompt_v, own_k, own_v = layer
    batch, _, heads, head_dim = q_B1HK.shape
    prompts, kv_heads, length, _ = prompt_k.values.shape
    grouped = (prompts, batch // prompts, kv_heads, heads // kv_heads)
    q_BNGK = q_B1HK.reshape(batch, kv_heads, -1, head_dim)
    # One product for all queries that read the same keys of a prompt: [P, N, samples x group, K].
    q_PNXK = jnp.swapaxes(q_B1HK.reshape(*grouped, head_dim), 1, 2).reshape(
        prompts, kv_heads, -1, head_dim
    )
    prompt_PNXS = _logits(q_PNXK, prompt_k)
    prompt_BNGS = jnp.swapaxes(
        prompt_PNXS.reshape(prompts, kv_heads, grouped[1], grouped[3], length), 1, 2
    ).reshape(batch, kv_heads, -1, length)
    own_BNGC = _logits(q_BNGK, own_k)
    self_BNG = precision.einsum("bngk,bnk->bng", q_BNGK, k_B1NK[:, 0], dtype=jnp.float32)
    scale = head_dim**-0.5 if scale is None else scale
    past = jnp.where(
        visible_BS[:, None, None, :],
        soft_cap(jnp.concatenate([prompt_BNGS, own_BNGC], axis=-1) * scale, cap),
        MASKED,
    )
    own = soft_cap(self_BNG[..., None] * scale, cap)
    most = jnp.maximum(jnp.max(past, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(past - most), jnp.exp(own - most)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    weights, own = weights / total, own / total
    prompt_PNXS = jnp.swapaxes(weights[..., :length].reshape(*grouped, length), 1, 2).reshape(
        prompts, kv_heads, -1, length
    )
    out_PNXK = _mixed(prompt_PNXS, prompt_v, v_B1NK.dtype)
    out_BNGK = jnp.swapaxes(
        out_PNXK.reshape(prompts, kv_heads, grouped[1], grouped[3], head_dim), 1, 2
    ).reshape(batch, kv_heads, -1, head_dim)
    own_BNGK = _mixed(weights[..., length:], own_v, v_B1NK.dtype)
    out_BNGK = rounded_sum(out_BNGK, own_BNGK, own.astype(v_B1NK.dtype) * v_B1NK[:, 0, :, None, :])
    return out_BNGK.reshape(batch, 1, heads, head_dim)


def _logits(q_BNXK: Array, k_BNSK: CacheEntry) -> jax.Array:
    """Returns q k^T, float32 [B, N, X, S].

    Args:
        q_BNXK: X queries per key/value head.
        k_BNSK: Cached keys; the scale of int8 keys is multiplied into the result.
    """
    logits = precision.einsum(
        "bnxk,bnsk->bnxs", q_BNXK, k_BNSK.values.astype(q_BNXK.dtype), dtype=jnp.float32
    )
    return logits if k_BNSK.scale is None else logits * k_BNSK.scale[:, :, None, :]


def _mixed(weights_BNXS: Array, v_BNSK: CacheEntry, dtype: jnp.dtype) -> jax.Array:
    """Returns the product of weights and values, [B, N, X, K], in `dtype`.

    Args:
        weights_BNXS: Attention weights of X queries per key/value head.
        v_BNSK: Cached values; the scale of int8 values is multiplied into the weights.
        dtype: Dtype of the activations.
    """
    if v_BNSK.scale is not None:
        weights_BNXS = weights_BNXS * v_BNSK.scale[:, :, None, :]
    return precision.einsum(
        "bnxs,bnsk->bnxk", weights_BNXS.astype(dtype), v_BNSK.values.astype(dtype)
    )
