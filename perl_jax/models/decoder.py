"""The decoder's modules (Flax NNX). They are built once, split, and then used as pure functions.

Each weight states its logical axes beside its shape; sharding rules map them to mesh axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.models.linear import FUSED, AdapterSpec, FusedLinear, Linear, flatten_tokens, matmul
from perl_jax.models.packing import gather
from perl_jax.models.placement import Placement
from perl_jax.runtime import sharding
from perl_jax.types import Array, Tree

# (q_BTHK, k_BTNK, v_BTNK) -> out_BTHK over whole sequences; the function contains the mask.
Attend = Callable[[Array, Array, Array], Array]


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467). The quotient is computed in float32. With
    `unit_offset_norms` the factor is 1 + scale, applied before rounding to the activations' dtype
    (Gemma); otherwise it is scale, applied after (Llama).

    Args:
        config: The model.
        size: Length of the last axis; None: the model's width.
        axis: Logical axis of the scale.
    """

    def __init__(self, config: ModelConfig, size: int | None = None, axis: str = "embed"):
        self.epsilon = config.norm_epsilon
        self.offset = config.unit_offset_norms
        initial = jnp.zeros if self.offset else jnp.ones
        self.scale = nnx.Param(initial((size or config.width,), config.param_dtype), axes=(axis,))

    def __call__(self, x: Array) -> jax.Array:
        """Returns the norm of x [B, T, ...] over its last axis, in the shape and dtype of x."""
        scale = self.scale[...]
        return _normed(x.reshape(-1, *x.shape[2:]), scale, self.epsilon, self.offset).reshape(
            x.shape
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normed(x: jax.Array, scale: jax.Array, epsilon: float, offset: bool) -> jax.Array:
    """Returns the RMSNorm of [N, D] or [N, H, K]; the backward pass keeps only the inputs."""
    return _norm(x, scale, epsilon, offset)


def _norm(x: jax.Array, scale: jax.Array, epsilon: float, offset: bool) -> jax.Array:
    """Returns the RMSNorm of x over the last axis, in the dtype of x.

    Args:
        x: Input [N, D] or [N, H, K].
        scale: Scale of the last axis.
        epsilon: Added to the mean square.
        offset: Whether the factor is 1 + scale instead of scale.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    if offset:
        return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def _normed_forward(x, scale, epsilon, offset):
    return _norm(x, scale, epsilon, offset), (x, scale)


def _normed_backward(epsilon, offset, kept, cotangent):
    return jax.vjp(lambda x, scale: _norm(x, scale, epsilon, offset), *kept)[1](cotangent)


_normed.defvjp(_normed_forward, _normed_backward)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions: its projections and norms.

    `adapted` says which projections have adapters, and whether they are fused.
    """

    def __init__(self, config: ModelConfig, adapted: AdapterSpec, rngs: nnx.Rngs):
        query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.fused = adapted.fused is not None
        if adapted.fused is not None:
            inputs = ((config.width, query), (config.width, key_value), (config.width, key_value))
            self.qkv = FusedLinear(
                FUSED["qkv"], config, "qkv" in adapted.fused, inputs, ("embed", "heads")
            )
            self.o = FusedLinear(
                FUSED["o"],
                config,
                "o" in adapted.fused,
                ((query, config.width),),
                ("heads", "embed"),
            )
        else:
            self.q = Linear("q", config, adapted, (config.width, query), ("embed", "heads"), rngs)
            self.k = Linear(
                "k", config, adapted, (config.width, key_value), ("embed", "kv_heads"), rngs
            )
            self.v = Linear(
                "v", config, adapted, (config.width, key_value), ("embed", "kv_heads"), rngs
            )
            self.o = Linear("o", config, adapted, (query, config.width), ("heads", "embed"), rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim, "head_dim")
            self.k_norm = RMSNorm(config, config.head_dim, "head_dim")

    def project(
        self, x_BTD: Array, rotary: tuple, key: Array | None, placement: Placement
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, T, H, K], rotated keys [B, T, N, K], and values [B, T, N, K].

        Args:
            x_BTD: Input after the layer's norm.
            rotary: (cos, sin) of the positions (`attention.rotary_angles`).
            key: Random key of dropout; None: no dropout. Unused by fused projections.
            placement: Sharding constraints.
        """
        x_ND = flatten_tokens(x_BTD)
        split = lambda x_NF: placement.heads(
            x_NF.reshape(*x_BTD.shape[:2], -1, self.config.head_dim)
        )
        q_BTHK, k_BTNK, v_BTNK = map(
            split,
            self.qkv(x_ND)
            if self.fused
            else (self.q(x_ND, key), self.k(x_ND, key), self.v(x_ND, key)),
        )
        if self.config.qk_norm:
            q_BTHK, k_BTNK = self.q_norm(q_BTHK), self.k_norm(k_BTNK)
        return attention.rotate(q_BTHK, *rotary), attention.rotate(k_BTNK, *rotary), v_BTNK

    def output(self, heads_BTHK: Array, key: Array | None, placement: Placement) -> jax.Array:
        """Returns the output projection of all heads, [B, T, D].

        Args:
            heads_BTHK: Output of attention.
            key: Random key of dropout; None: no dropout. Unused by a fused projection.
            placement: Sharding constraints.
        """
        heads_BTF = placement.features(
            heads_BTHK.reshape(*heads_BTHK.shape[:2], -1), placement.split_heads
        )
        out_ND = (
            self.o(flatten_tokens(heads_BTF))[0]
            if isinstance(self.o, FusedLinear)
            else self.o(flatten_tokens(heads_BTF), key)
        )
        return out_ND.reshape(*heads_BTF.shape[:2], -1)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns activation(gate) * up; only the two inputs are kept for the backward pass."""
    return ACTIVATIONS[activation](gate) * up


def _gated_forward(activation, gate, up):
    return _gated(activation, gate, up), (gate, up)


def _gated_backward(activation, kept, cotangent):
    return jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, *kept)[1](cotangent)


_gated.defvjp(_gated_forward, _gated_backward)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, adapted: AdapterSpec, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = Linear(
            "gate", config, adapted, (config.width, config.ffn_width), ("embed", "mlp"), rngs
        )
        self.up = Linear(
            "up", config, adapted, (config.width, config.ffn_width), ("embed", "mlp"), rngs
        )
        self.down = Linear(
            "down", config, adapted, (config.ffn_width, config.width), ("mlp", "embed"), rngs
        )

    def __call__(self, x_BTD: Array, key: Array | None, placement: Placement) -> jax.Array:
        """Returns the gated feed-forward layer's output, [B, T, D].

        Args:
            x_BTD: Input after the layer's norm.
            key: Random key of dropout; None: no dropout.
            placement: Sharding constraints.
        """
        x_ND = flatten_tokens(x_BTD)
        features = lambda x_NF: placement.features(x_NF.reshape(*x_BTD.shape[:2], -1))
        gated_BTF = _gated(
            self.activation, features(self.gate(x_ND, key)), features(self.up(x_ND, key))
        )
        return self.down(flatten_tokens(gated_BTF), key).reshape(x_BTD.shape)


class Block(nnx.Module):
    """One pre-norm transformer layer; returns its output, and keys and values for a cache."""

    def __init__(self, config: ModelConfig, adapted: AdapterSpec, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, adapted, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, adapted, rngs)
        if config.sandwich_norms:
            self.attention_post_norm = RMSNorm(config)
            self.mlp_post_norm = RMSNorm(config)

    def __call__(
        self,
        x_BTD: Array,
        rotary: tuple,
        attend: Attend,
        key: Array | None,
        placement: Placement,
        only_BR: Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """Returns the layer's output x_BTD and its (keys, values), [B, T, N, K] each.

        Args:
            x_BTD: Input of the layer.
            rotary: (cos, sin) of the positions (`attention.rotary_angles`).
            attend: (queries, keys, values) -> attention output.
            key: Random key of dropout; None: no dropout.
            placement: Sharding constraints.
            only_BR: Indices of the columns that are computed after attention; the output is [B, R,
                D]. None: all.
        """
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rotary, key, placement)
        heads_BTHK = attend(q, k, v)
        if only_BR is not None:
            x_BTD, heads_BTHK = gather(x_BTD, only_BR), gather(heads_BTHK, only_BR)
        return self._after_attention(x_BTD, heads_BTHK, key, placement), (k, v)

    def decode(
        self,
        x_B1D: Array,
        rotary: tuple,
        attend: Callable[[Array, Array, Array], tuple[Array, Tree]],
        placement: Placement,
    ) -> tuple[jax.Array, Tree]:
        """Returns the layer's output x_B1D for one new token, and the second result of `attend`.

        Args:
            x_B1D: Input of the layer.
            rotary: (cos, sin) of the new token's position.
            attend: (query, key, value) -> (attention output, what the cache needs of the token).
            placement: Sharding constraints.
        """
        heads, kept = attend(
            *self.attention.project(self.attention_norm(x_B1D), rotary, None, placement)
        )
        return self._after_attention(x_B1D, heads, None, placement), kept

    def _after_attention(
        self, x_BTD: Array, heads_BTHK: Array, key: Array | None, placement: Placement
    ) -> jax.Array:
        """Returns the layer's output x_BTD, given the output of attention.

        The output projection and the feed-forward layer are each added to x.

        Args:
            x_BTD: Input of the layer.
            heads_BTHK: Output of attention.
            key: Random key of dropout; None: no dropout.
            placement: Sharding constraints.
        """
        sandwich = self.config.sandwich_norms
        out_BTD = placement.residual(self.attention.output(heads_BTHK, key, placement))
        x_BTD = x_BTD + (self.attention_post_norm(out_BTD) if sandwich else out_BTD)
        out_BTD = placement.residual(self.mlp(self.mlp_norm(x_BTD), key, placement))
        return x_BTD + (self.mlp_post_norm(out_BTD) if sandwich else out_BTD)


class Embedder(nnx.Module):
    """The parts around the layers: embedding, final norm and, if untied, output projection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocab_size, config.width)
        self.config = config
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(config.width),
            axes=("vocab", "embed"),
        )
        self.final_norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.lm_head = nnx.Param(
                jax.random.normal(rngs.params(), shape[::-1], dtype) / math.sqrt(config.width),
                axes=("embed", "vocab"),
            )

    def embed(self, tokens_BT: Array, placement: Placement) -> jax.Array:
        """Returns the embeddings x_BTD of token ids, in the activations' dtype.

        With `scaled_embedding` they are multiplied by sqrt(D).
        """
        x_BTD = placement.looked_up(
            jnp.take(self.embedding[...], placement.ids_to_look_up(tokens_BT), axis=0).astype(
                self.config.dtype
            )
        )
        x_BTD = placement.residual(x_BTD)
        # The factor is rounded to the activations' dtype, as in the model's training.
        return (
            x_BTD * jnp.asarray(math.sqrt(self.config.width), x_BTD.dtype)
            if self.config.scaled_embedding
            else x_BTD
        )

    def output_matrix(self, placement: Placement) -> jax.Array:
        """Returns the output projection [D, V], sharded as `logits` reads it.

        It is the transposed embedding if embeddings are tied.
        """
        tied = self.config.tied_embeddings
        axes = (self.embedding if tied else self.lm_head).get_metadata()["axes"]
        width, vocabulary = axes[::-1] if tied else axes
        own = (sharding.RULES[width], sharding.RULES[vocabulary])
        weight_DV = self.embedding[...].T if tied else self.lm_head[...]
        return placement.output_matrix(weight_DV, own, self.config.dtype)

    def logits(self, hidden_BTD: Array, weight_DV: Array, placement: Placement) -> jax.Array:
        """Returns logits_BTV in float32, with the model's cap.

        Args:
            hidden_BTD: Hidden states after the final norm.
            weight_DV: The output projection (`output_matrix`).
            placement: Sharding constraints.
        """
        logits_NV = matmul(
            flatten_tokens(placement.before_logits(hidden_BTD)), weight_DV, jnp.float32
        )
        return attention.soft_cap(
            placement.logits(logits_NV.reshape(*hidden_BTD.shape[:2], -1)), self.config.logit_cap
        )
