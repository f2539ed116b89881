"""The decoder's modules (Flax NNX). They are built once, split, and then used as plain functions.

Each weight names its logical axes beside its shape; sharding rules map those to mesh axes. LoRA
leaves are variables of their own type in the same modules, so that one split separates the frozen
base from the adapter and from what lies frozen under it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from perl_jax.adapters.lora import LINEAR, LoRAConfig, output_norms
from perl_jax.adapters.quantise import dense, is_quantised
from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.models.fused import GROUPS
from perl_jax.models.packing import gather
from perl_jax.models.placement import Placement
from perl_jax.models.stacks import columns, is_turned, rows
from perl_jax.runtime import precision, sharding
from perl_jax.types import Array, Tree

# (q_BTHK, k_BTNK, v_BTNK) -> out_BTHK over whole sequences, its mask inside.
Attend = Callable[[Array, Array, Array], Array]


class LoRAParam(nnx.Variable):
    """A leaf of an adapter."""


class UnderParam(nnx.Variable):
    """A leaf of the frozen pairs under an adapter."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What sits on the linear layers of a block: an adapter's config, and targets of frozen pairs.

    fused: where attention's projections are fused (`models.fused`), the products that have pairs;
    None: they are apart.
    """

    lora: LoRAConfig | None = None
    under: tuple[str, ...] = ()
    fused: tuple[str, ...] | None = None


def flat(x_BTD: Array) -> jax.Array:
    """[B T, D].

    On three dimensions XLA's CPU backend writes a transposed copy of each operand of dW = x^T dy,
    and is slow at sums over [1, T, D]; flattened it runs a feed-forward layer's backward pass 1.6
    times as fast. Merging B into T leaves rows that are sharded over devices where they are. What
    several products read is flattened once: the backward pass would keep each reshaped array.
    """
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def matmul(x_ND: Array, weight_DF: Array, dtype: object = None) -> jax.Array:
    """x W.

    A weight of another dtype than x is one that is trained (float32 under bfloat16 activations): it
    is rounded to x's for the product, and its gradient is not (`_rounded_product`).
    dtype: of the result; None: x's.
    """
    dtype = jnp.dtype(dtype or x_ND.dtype)
    if weight_DF.dtype == x_ND.dtype:
        return precision.matmul(x_ND, weight_DF, dtype)
    return _rounded_product(x_ND, weight_DF, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x_ND: jax.Array, weight_DF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x round(W). dL/dW = x^T dy has W's own dtype: sums over tokens, and over devices, are not
    rounded to x's.
    """
    return precision.matmul(x_ND, weight_DF.astype(x_ND.dtype), dtype)


def _rounded_product_forward(x_ND, weight_DF, dtype):
    return _rounded_product(x_ND, weight_DF, dtype), (x_ND, weight_DF)


def _rounded_product_backward(dtype, kept, dy_NF):
    x_ND, weight_DF = kept
    dx_ND = precision.matmul(dy_NF, weight_DF.astype(x_ND.dtype).T, x_ND.dtype)
    return dx_ND, precision.matmul(x_ND.T, dy_NF, weight_DF.dtype)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


class Linear(nnx.Module):
    """y = x W + bias, plus s (dropout(x) A) B where an adapter sits on it (see
    `perl_jax.adapters.lora`).
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        adapted: Adapted,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.param_dtype)
        # 1 / sqrt(in) keeps activations at their size for any width; the family's usual 0.02 is
        # that of a width of 2,500 and leaves narrow models nearly linear for hundreds of steps.
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(shape[0]), axes=axes
        )
        self.bias = (
            nnx.Param(jnp.zeros(shape[1:], dtype), axes=axes[1:]) if name in config.biases else None
        )
        self.lora = (
            adapted.lora if adapted.lora is not None and name in adapted.lora.projections else None
        )
        self.name = name
        if self.lora is not None:
            rank = self.lora.rank_of(name)
            self.lora_a = LoRAParam(
                jnp.zeros((shape[0], rank), self.lora.dtype), axes=(axes[0], "rank")
            )
            self.lora_b = LoRAParam(
                jnp.zeros((rank, shape[1]), self.lora.dtype), axes=("rank", axes[1])
            )
            if self.lora.dora:
                self.magnitude = LoRAParam(jnp.zeros(shape[1:], self.lora.dtype), axes=axes[1:])
        self.has_under = name in adapted.under
        if self.has_under:
            # Shapes do not matter here: the tree that is merged in brings its own rank.
            self.under_a = UnderParam(jnp.zeros((shape[0], 1)), axes=(axes[0], "rank"))
            self.under_b = UnderParam(jnp.zeros((1, shape[1])), axes=("rank", axes[1]))

    def __call__(self, x_ND: Array, dropout_key: Array | None = None) -> jax.Array:
        out_NF = self._product(x_ND)
        if self.has_under:
            under_a, under_b = (
                jax.lax.stop_gradient(leaf[...]).astype(x_ND.dtype)
                for leaf in (self.under_a, self.under_b)
            )
            out_NF = out_NF + matmul(matmul(x_ND, under_a), under_b)
        if self.lora is not None:
            out_NF = self._adapted(x_ND, out_NF, dropout_key)
        if self.bias is not None:
            out_NF = out_NF + self.bias[...].astype(x_ND.dtype)[None, :]
        return out_NF

    def _product(self, x_ND: Array) -> jax.Array:
        """x W."""
        kernel = self.kernel.get_value()
        if is_turned(kernel):
            return rows(kernel.of_columns(columns(x_ND)))
        # Of a quantised matrix there is no gradient.
        return matmul(x_ND, dense(kernel).astype(x_ND.dtype) if is_quantised(kernel) else kernel)

    @property
    def turned(self) -> bool:
        """Whether it is nothing but a matrix that is kept turned (`stacks.Turned`)."""
        return (
            is_turned(self.kernel.get_value())
            and self.lora is None
            and not self.has_under
            and self.bias is None
        )

    def _adapted(self, x_ND: Array, out_NF: Array, dropout_key: Array | None) -> jax.Array:
        """x W -> x W + s (x A) B, or DoRA's m / ||W + s A B|| of it."""
        dropped = dropout_key is not None and self.lora.dropout > 0
        if dropped:
            keep = 1.0 - self.lora.dropout
            key = jax.random.fold_in(dropout_key, LINEAR.index(self.name))
            x_ND = jnp.where(jax.random.bernoulli(key, keep, x_ND.shape), x_ND / keep, 0)
        scale = self.lora.scale_of(self.name)
        delta_NF = scale * matmul(matmul(x_ND, self.lora_a[...]), self.lora_b[...])
        if not self.lora.dora:
            return out_NF + delta_NF
        norm_F = jax.lax.stop_gradient(
            output_norms(dense(self.kernel.get_value()), self.lora_a[...], self.lora_b[...], scale)
        )
        share_F = (self.magnitude[...] / norm_F)[None, :]
        # Taken from 1 in float32: in bfloat16 a share near 1 would be 1.
        share_F, beyond_F = share_F.astype(x_ND.dtype), (share_F - 1).astype(x_ND.dtype)
        # With dropout the rescaled part sees the dropped input, the base the whole one.
        seen_NF = self._product(x_ND) if dropped else out_NF
        return out_NF + beyond_F * seen_NF + share_F * delta_NF


class FusedLinear(nnx.Module):
    """Several linear layers of one input, and the pairs on them: x W + (x A) B + bias by a product
    with [W | A] (`models.fused`).

    Shapes do not matter here but for the outputs' widths: the tree that is merged in brings its own
    ranks.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        config: ModelConfig,
        paired: bool,
        shapes: tuple[tuple[int, int], ...],
        axes: tuple[str, str],
    ):
        self.widths = tuple(features for _, features in shapes)
        width, features, dtype = shapes[0][0], sum(self.widths), jnp.dtype(config.dtype)
        self.kernel = nnx.Param(jnp.zeros((width, features), dtype), axes=axes)
        self.up = (
            nnx.Param(jnp.zeros((1, features), dtype), axes=("rank", axes[1])) if paired else None
        )
        self.bias = (
            nnx.Param(jnp.zeros((features,), dtype), axes=axes[1:])
            if any(name in config.biases for name in names)
            else None
        )

    def __call__(self, x_ND: Array) -> list[jax.Array]:
        """Each layer's output."""
        features = sum(self.widths)
        out_NF = matmul(x_ND, self.kernel[...])
        if self.up is not None:
            out_NF = attention.rounded_sum(
                out_NF[:, :features],
                matmul(out_NF[:, features : features + self.up[...].shape[0]], self.up[...]),
            )
        if self.bias is not None:
            out_NF = out_NF + self.bias[...].astype(x_ND.dtype)[None, :]
        return jnp.split(out_NF, list(itertools.accumulate(self.widths))[:-1], axis=1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019, arXiv
    1910.07467).

    The quotient is taken in float32. With `unit_offset_norms` the factor is 1 + scale, applied
    before rounding to the activations' dtype (Gemma); otherwise scale, applied after (Llama).
    """

    def __init__(self, config: ModelConfig, size: int | None = None, axis: str = "embed"):
        self.epsilon = config.norm_epsilon
        self.offset = config.unit_offset_norms
        initial = jnp.zeros if self.offset else jnp.ones
        self.scale = nnx.Param(initial((size or config.width,), config.param_dtype), axes=(axis,))

    def __call__(self, x: Array) -> jax.Array:
        scale = self.scale[...]
        return _normed(x.reshape(-1, *x.shape[2:]), scale, self.epsilon, self.offset).reshape(
            x.shape
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normed(x: jax.Array, scale: jax.Array, epsilon: float, offset: bool) -> jax.Array:
    """`RMSNorm` of [N, D] or [N, H, K], of which the input alone is kept for the backward pass."""
    return _norm(x, scale, epsilon, offset)


def _norm(x: jax.Array, scale: jax.Array, epsilon: float, offset: bool) -> jax.Array:
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
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, adapted: Adapted, rngs: nnx.Rngs):
        query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.fused = adapted.fused is not None
        if self.fused:
            inputs = ((config.width, query), (config.width, key_value), (config.width, key_value))
            self.qkv = FusedLinear(
                GROUPS["qkv"], config, "qkv" in adapted.fused, inputs, ("embed", "heads")
            )
            self.o = FusedLinear(
                GROUPS["o"],
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
        self, x_BTD: Array, rotary: tuple, key: Array | None, place: Placement
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B,T,H,K], rotated keys and values [B,T,N,K]."""
        x_ND = flat(x_BTD)
        split = lambda x_NF: place.heads(x_NF.reshape(*x_BTD.shape[:2], -1, self.config.head_dim))
        q_BTHK, k_BTNK, v_BTNK = map(
            split,
            self.qkv(x_ND)
            if self.fused
            else (self.q(x_ND, key), self.k(x_ND, key), self.v(x_ND, key)),
        )
        if self.config.qk_norm:
            q_BTHK, k_BTNK = self.q_norm(q_BTHK), self.k_norm(k_BTNK)
        return attention.rotate(q_BTHK, *rotary), attention.rotate(k_BTNK, *rotary), v_BTNK

    def output(self, heads_BTHK: Array, key: Array | None, place: Placement) -> jax.Array:
        """The output projection over all heads."""
        heads_BTF = place.features(heads_BTHK.reshape(*heads_BTHK.shape[:2], -1), place.split_heads)
        out_ND = self.o(flat(heads_BTF))[0] if self.fused else self.o(flat(heads_BTF), key)
        return out_ND.reshape(*heads_BTF.shape[:2], -1)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, of which the two inputs alone are kept for the backward pass."""
    return ACTIVATIONS[activation](gate) * up


def _gated_forward(activation, gate, up):
    return _gated(activation, gate, up), (gate, up)


def _gated_backward(activation, kept, cotangent):
    return jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, *kept)[1](cotangent)


_gated.defvjp(_gated_forward, _gated_backward)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, adapted: Adapted, rngs: nnx.Rngs):
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

    def __call__(self, x_BTD: Array, key: Array | None, place: Placement) -> jax.Array:
        x_ND = flat(x_BTD)
        if self.gate.turned and self.up.turned and self.down.turned:
            return self._in_columns(x_ND).reshape(x_BTD.shape)
        features = lambda x_NF: place.features(x_NF.reshape(*x_BTD.shape[:2], -1))
        gated_BTF = _gated(
            self.activation, features(self.gate(x_ND, key)), features(self.up(x_ND, key))
        )
        return self.down(flat(gated_BTF), key).reshape(x_BTD.shape)

    def _in_columns(self, x_ND: Array) -> jax.Array:
        """The same with tokens as columns in between, on one device."""
        gate, up, down = (linear.kernel.get_value() for linear in (self.gate, self.up, self.down))
        x_DN = columns(x_ND)
        return rows(
            down.of_columns(_gated(self.activation, gate.of_columns(x_DN), up.of_columns(x_DN)))
        )


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

    def __call__(
        self,
        x_BTD: Array,
        rotary: tuple,
        attend: Attend,
        key: Array | None,
        place: Placement,
        only_BR: Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """only_BR: columns that go on after attention; the output is theirs, [B, R, D]. None:
        all.
        """
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rotary, key, place)
        heads_BTHK = attend(q, k, v)
        if only_BR is not None:
            x_BTD, heads_BTHK = gather(x_BTD, only_BR), gather(heads_BTHK, only_BR)
        return self._after_attention(x_BTD, heads_BTHK, key, place), (k, v)

    def decode(
        self,
        x_B1D: Array,
        rotary: tuple,
        attend: Callable[[Array, Array, Array], tuple[Array, Tree]],
        place: Placement,
    ) -> tuple[jax.Array, Tree]:
        """The same layer for one new token. attend: of its query, key and value gives its heads'
        outputs, and what is kept of it.
        """
        heads, kept = attend(
            *self.attention.project(self.attention_norm(x_B1D), rotary, None, place)
        )
        return self._after_attention(x_B1D, heads, None, place), kept

    def _after_attention(
        self, x_BTD: Array, heads_BTHK: Array, key: Array | None, place: Placement
    ) -> jax.Array:
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

    def embed(self, tokens_BT: Array, place: Placement) -> jax.Array:
        """x_BTD in the activations' dtype."""
        x_BTD = place.looked_up(
            jnp.take(self.embedding[...], place.looking_up(tokens_BT), axis=0).astype(
                self.config.dtype
            )
        )
        x_BTD = place.residual(x_BTD)
        # The factor is rounded to the activations' dtype, as the model was trained.
        return (
            x_BTD * jnp.asarray(math.sqrt(self.config.width), x_BTD.dtype)
            if self.config.scaled_embedding
            else x_BTD
        )

    def output_matrix(self, place: Placement) -> jax.Array:
        """The output projection where logits are computed with it."""
        tied = self.config.tied_embeddings
        axes = (self.embedding if tied else self.lm_head).get_metadata()["axes"]
        own = tuple(sharding.RULES[axis] for axis in (axes[::-1] if tied else axes))
        weight_DV = self.embedding[...].T if tied else self.lm_head[...]
        return place.output_matrix(weight_DV, own, self.config.dtype)

    def logits(self, hidden_BTD: Array, weight_DV: Array, place: Placement) -> jax.Array:
        """logits_BTV in float32, of hidden states that the final norm has already been applied
        to.
        """
        logits_NV = matmul(flat(place.before_logits(hidden_BTD)), weight_DV, jnp.float32)
        return attention.capped(
            place.logits(logits_NV.reshape(*hidden_BTD.shape[:2], -1)), self.config.logit_cap
        )

    def logits_by_columns(self, hidden_ND: Array) -> jax.Array:
        """logits_NV of few tokens, on one device whose products are faster in columns
        (`stacks.Turned`); the embedding lies as they read it.
        """
        logits_VN = precision.matmul(
            self.embedding[...].astype(hidden_ND.dtype), columns(hidden_ND), jnp.float32
        )
        return attention.capped(rows(logits_VN), self.config.logit_cap)
