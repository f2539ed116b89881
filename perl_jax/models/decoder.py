"""The decoder's modules (Flax NNX). They are built once, split, and then used as plain functions.

Each weight names its logical axes beside its shape; sharding rules map those to mesh axes. LoRA
leaves are variables of their own type in the same modules, so that one split separates the frozen
base from the adapter and from what lies frozen under it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from perl_jax import sharding
from perl_jax.lora import LINEAR, LoRAConfig, output_norms
from perl_jax.models import attention
from perl_jax.models.cache import attend_cached
from perl_jax.models.config import ModelConfig
from perl_jax.models.placement import Placement
from perl_jax.quantise import dense, is_quantised
from perl_jax.types import Array


# (q_BTHK, k_BTNK, v_BTNK) -> out_BTHK over whole sequences, its mask inside.
Attend = Callable[[Array, Array, Array], Array]


class LoRAParam(nnx.Variable):
    """A leaf of an adapter."""


class UnderParam(nnx.Variable):
    """A leaf of the frozen pairs under an adapter."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What sits on the linear layers of a block: an adapter's config, and targets of frozen pairs."""

    lora: LoRAConfig | None = None
    under: tuple[str, ...] = ()


def matmul(x_BTD: Array, weight_DF: Array, dtype: object = None) -> jax.Array:
    """x W over rows flattened to [B T, D].

    On three dimensions XLA's CPU backend writes a transposed copy of each operand of dW = x^T dy;
    flattened it runs a feed-forward layer's backward pass 1.6 times as fast. Merging B into T
    leaves rows that are sharded over devices where they are.

    A weight of another dtype than x is one that is trained (float32 under bfloat16 activations): it
    is rounded to x's for the product, and its gradient is not (`_rounded_product`).
    dtype: of the result; None: x's.
    """
    x_ND, dtype = x_BTD.reshape(-1, x_BTD.shape[-1]), jnp.dtype(dtype or x_BTD.dtype)
    if weight_DF.dtype == x_BTD.dtype:
        flat = jnp.matmul(x_ND, weight_DF, preferred_element_type=dtype)
    else:
        flat = _rounded_product(x_ND, weight_DF, dtype)
    return flat.reshape(*x_BTD.shape[:-1], weight_DF.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x_ND: jax.Array, weight_DF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x round(W). dL/dW = x^T dy has W's own dtype: sums over tokens, and over devices, are not rounded to x's."""
    return jnp.matmul(x_ND, weight_DF.astype(x_ND.dtype), preferred_element_type=dtype)


def _rounded_product_forward(x_ND, weight_DF, dtype):
    return _rounded_product(x_ND, weight_DF, dtype), (x_ND, weight_DF)


def _rounded_product_backward(dtype, kept, dy_NF):
    x_ND, weight_DF = kept
    dx_ND = jnp.matmul(dy_NF, weight_DF.astype(x_ND.dtype).T, preferred_element_type=x_ND.dtype)
    return dx_ND, jnp.matmul(x_ND.T, dy_NF, preferred_element_type=weight_DF.dtype)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


class Linear(nnx.Module):
    """y = x W + bias, plus s (dropout(x) A) B where an adapter sits on it (see `perl_jax.lora`)."""

    def __init__(self, name: str, config: ModelConfig, adapted: Adapted, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        # 1 / sqrt(in) keeps activations at their size for any width; the family's usual 0.02 is that
        # of a width of 2,500 and leaves narrow models nearly linear for hundreds of steps.
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(shape[0]), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype), axes=axes[1:]) if name in config.biases else None
        self.lora = adapted.lora if adapted.lora is not None and name in adapted.lora.projections else None
        self.name = name
        if self.lora is not None:
            rank = self.lora.rank_of(name)
            self.lora_a = LoRAParam(jnp.zeros((shape[0], rank), self.lora.dtype), axes=(axes[0], "rank"))
            self.lora_b = LoRAParam(jnp.zeros((rank, shape[1]), self.lora.dtype), axes=("rank", axes[1]))
            if self.lora.dora:
                self.magnitude = LoRAParam(jnp.zeros(shape[1:], self.lora.dtype), axes=axes[1:])
        self.has_under = name in adapted.under
        if self.has_under:
            # Shapes do not matter here: the tree that is merged in brings its own rank.
            self.under_a = UnderParam(jnp.zeros((shape[0], 1)), axes=(axes[0], "rank"))
            self.under_b = UnderParam(jnp.zeros((1, shape[1])), axes=("rank", axes[1]))

    def __call__(self, x_BTD: Array, dropout_key: Array | None = None) -> jax.Array:
        out_BTF = self._product(x_BTD)
        if self.has_under:
            under_a, under_b = (jax.lax.stop_gradient(leaf[...]).astype(x_BTD.dtype) for leaf in (self.under_a, self.under_b))
            out_BTF = out_BTF + matmul(matmul(x_BTD, under_a), under_b)
        if self.lora is not None:
            out_BTF = self._adapted(x_BTD, out_BTF, dropout_key)
        if self.bias is not None:
            out_BTF = out_BTF + self.bias[...].astype(x_BTD.dtype)[None, None, :]
        return out_BTF

    def _product(self, x_BTD: Array) -> jax.Array:
        """x W."""
        kernel = self.kernel.get_value()
        # Of a quantised matrix there is no gradient.
        return matmul(x_BTD, dense(kernel).astype(x_BTD.dtype) if is_quantised(kernel) else kernel)

    def _adapted(self, x_BTD: Array, out_BTF: Array, dropout_key: Array | None) -> jax.Array:
        """x W -> x W + s (x A) B, or DoRA's m / ||W + s A B|| of it."""
        dropped = dropout_key is not None and self.lora.dropout > 0
        if dropped:
            keep = 1.0 - self.lora.dropout
            key = jax.random.fold_in(dropout_key, LINEAR.index(self.name))
            x_BTD = jnp.where(jax.random.bernoulli(key, keep, x_BTD.shape), x_BTD / keep, 0)
        scale = self.lora.scale_of(self.name)
        delta_BTF = scale * matmul(matmul(x_BTD, self.lora_a[...]), self.lora_b[...])
        if not self.lora.dora:
            return out_BTF + delta_BTF
        norm_F = jax.lax.stop_gradient(output_norms(dense(self.kernel.get_value()), self.lora_a[...], self.lora_b[...], scale))
        share_F = (self.magnitude[...] / norm_F)[None, None, :]
        # Taken from 1 in float32: in bfloat16 a share near 1 would be 1.
        share_F, beyond_F = share_F.astype(x_BTD.dtype), (share_F - 1).astype(x_BTD.dtype)
        # With dropout the rescaled part sees the dropped input, the base the whole one.
        seen_BTF = self._product(x_BTD) if dropped else out_BTF
        return out_BTF + beyond_F * seen_BTF + share_F * delta_BTF


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    The quotient is taken in float32. With `unit_offset_norms` the factor is 1 + scale, applied
    before rounding to the activations' dtype (Gemma); otherwise scale, applied after (Llama).
    """

    def __init__(self, config: ModelConfig, size: int | None = None, axis: str = "embed"):
        self.epsilon = config.norm_epsilon
        self.offset = config.unit_offset_norms
        initial = jnp.zeros if self.offset else jnp.ones
        self.scale = nnx.Param(initial((size or config.width,), config.param_dtype), axes=(axis,))

    def __call__(self, x: Array) -> jax.Array:
        # Flat like products: XLA's CPU backend is slow at sums over [1, T, D].
        x32 = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale[...], range(x32.ndim - 1))
        if self.offset:
            out = (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        else:
            out = normed.astype(x.dtype) * scale.astype(x.dtype)
        return out.reshape(x.shape)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, adapted: Adapted, rngs: nnx.Rngs):
        query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.q = Linear("q", config, adapted, (config.width, query), ("embed", "heads"), rngs)
        self.k = Linear("k", config, adapted, (config.width, key_value), ("embed", "kv_heads"), rngs)
        self.v = Linear("v", config, adapted, (config.width, key_value), ("embed", "kv_heads"), rngs)
        self.o = Linear("o", config, adapted, (query, config.width), ("heads", "embed"), rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim, "head_dim")
            self.k_norm = RMSNorm(config, config.head_dim, "head_dim")

    def project(self, x_BTD: Array, rotary: tuple, key: Array | None, place: Placement) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B,T,H,K], rotated keys and values [B,T,N,K]."""
        split = lambda x: place.heads(x.reshape(*x.shape[:2], -1, self.config.head_dim))
        q_BTHK, k_BTNK, v_BTNK = split(self.q(x_BTD, key)), split(self.k(x_BTD, key)), split(self.v(x_BTD, key))
        if self.config.qk_norm:
            q_BTHK, k_BTNK = self.q_norm(q_BTHK), self.k_norm(k_BTNK)
        return attention.rotate(q_BTHK, *rotary), attention.rotate(k_BTNK, *rotary), v_BTNK

    def output(self, heads_BTHK: Array, key: Array | None, place: Placement) -> jax.Array:
        """The output projection over all heads."""
        heads_BTF = place.features(heads_BTHK.reshape(*heads_BTHK.shape[:2], -1), place.split_heads)
        return self.o(heads_BTF, key)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, adapted: Adapted, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = Linear("gate", config, adapted, (config.width, config.ffn_width), ("embed", "mlp"), rngs)
        self.up = Linear("up", config, adapted, (config.width, config.ffn_width), ("embed", "mlp"), rngs)
        self.down = Linear("down", config, adapted, (config.ffn_width, config.width), ("mlp", "embed"), rngs)

    def __call__(self, x_BTD: Array, key: Array | None, place: Placement) -> jax.Array:
        gate_BTF, up_BTF = place.features(self.gate(x_BTD, key)), place.features(self.up(x_BTD, key))
        # Of the elementwise part its two inputs alone are kept for the backward pass, unless a policy around the layer says otherwise.
        gated = jax.checkpoint(lambda gate, up: ACTIVATIONS[self.activation](gate) * up, prevent_cse=False)
        return self.down(gated(gate_BTF, up_BTF), key)


class Block(nnx.Module):
    """One pre-norm layer. Returns its output and the keys and values a cache would keep."""

    def __init__(self, config: ModelConfig, adapted: Adapted, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, adapted, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, adapted, rngs)
        if config.sandwich_norms:
            self.attention_post_norm = RMSNorm(config)
            self.mlp_post_norm = RMSNorm(config)

    def __call__(self, x_BTD: Array, rotary: tuple, attend: Attend, key: Array | None, place: Placement) -> tuple[jax.Array, tuple]:
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rotary, key, place)
        return self._after_attention(x_BTD, attend(q, k, v), key, place), (k, v)

    def decode(self, x_B1D: Array, rotary: tuple, cache: tuple, visible_BS: Array, place: Placement) -> tuple[jax.Array, tuple]:
        """The same layer for one new token against its part of a cache (`cache.KVCache.by_layer`)."""
        q, k, v = self.attention.project(self.attention_norm(x_B1D), rotary, None, place)
        heads = attend_cached(q, k, v, cache, visible_BS, self.config.attention_scale, self.config.attention_cap)
        return self._after_attention(x_B1D, heads, None, place), (k, v)

    def _after_attention(self, x_BTD: Array, heads_BTHK: Array, key: Array | None, place: Placement) -> jax.Array:
        sandwich = self.config.sandwich_norms
        out_BTD = place.residual(self.attention.output(heads_BTHK, key, place))
        x_BTD = x_BTD + (self.attention_post_norm(out_BTD) if sandwich else out_BTD)
        out_BTD = place.residual(self.mlp(self.mlp_norm(x_BTD), key, place))
        return x_BTD + (self.mlp_post_norm(out_BTD) if sandwich else out_BTD)


class Outer(nnx.Module):
    """What lies around the layers: embedding, final norm, output projection (untied models)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocab_size, config.width)
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(config.width), axes=("vocab", "embed"))
        self.final_norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.lm_head = nnx.Param(jax.random.normal(rngs.params(), shape[::-1], dtype) / math.sqrt(config.width), axes=("embed", "vocab"))

    def embed(self, tokens_BT: Array, place: Placement) -> jax.Array:
        """x_BTD in the activations' dtype."""
        x_BTD = place.looked_up(jnp.take(self.embedding[...], place.looking_up(tokens_BT), axis=0).astype(self.config.dtype))
        x_BTD = place.residual(x_BTD)
        # The factor is rounded to the activations' dtype, as the model was trained.
        return x_BTD * jnp.asarray(math.sqrt(self.config.width), x_BTD.dtype) if self.config.scaled_embedding else x_BTD

    def output_matrix(self, place: Placement) -> jax.Array:
        """The output projection where logits are computed with it."""
        tied = self.config.tied_embeddings
        axes = (self.embedding if tied else self.lm_head).get_metadata()["axes"]
        own = tuple(sharding.RULES[axis] for axis in (axes[::-1] if tied else axes))
        weight_DV = self.embedding[...].T if tied else self.lm_head[...]
        return place.output_matrix(weight_DV, own, self.config.dtype)

    def logits(self, hidden_BTD: Array, weight_DV: Array, place: Placement) -> jax.Array:
        """logits_BTV in float32, of hidden states that the final norm has already been applied to."""
        logits_BTV = place.logits(matmul(place.before_logits(hidden_BTD), weight_DV, jnp.float32))
        return attention.capped(logits_BTV, self.config.logit_cap)
