"""Linear layers with adapters, in Flax NNX modules.

LoRA leaves are variables of their own type in the same modules as the weights, so that one split
separates the frozen base, the adapter, and the frozen pairs under the adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from perl_jax.adapters.combine import output_norms
from perl_jax.adapters.lora import LINEAR, LoRAConfig
from perl_jax.adapters.quantise import dense, is_quantised
from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.runtime import precision
from perl_jax.types import Array

# Attention projections with the same input, keyed by the name of their fused product.
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",)}


class LoRAParam(nnx.Variable):
    """A leaf of an adapter."""


class UnderParam(nnx.Variable):
    """A leaf of the frozen pairs under an adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Which adapters the linear layers of a block have.

    Attributes:
        lora: Config of the adapter. None: no adapter.
        under: Projections with frozen pairs (`Adapter.under`).
        fused: For fused attention (`generation.fused`): names of the fused products that include
            pairs. None: attention is not fused.
    """

    lora: LoRAConfig | None = None
    under: tuple[str, ...] = ()
    fused: tuple[str, ...] | None = None


def flatten_tokens(x_BTD: Array) -> jax.Array:
    """Returns [B T, D] from [B, T, D]; an input of several products should be flattened once.

    With three dimensions XLA's CPU backend writes a transposed copy of each operand of dW = x^T dy,
    and is slow at sums over [1, T, D]. Flattened, the backward pass of a feed-forward layer is 1.6
    times as fast. The reshape leaves rows that are sharded over devices in place. The backward pass
    keeps every reshaped array.
    """
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def matmul(x_ND: Array, weight_DF: Array, dtype: object = None) -> jax.Array:
    """Returns x W, [N, F].

    If W has another dtype than x, W is a trained weight (float32 under bfloat16 activations). It is
    rounded to the dtype of x for the product, but its gradient is not rounded (`_rounded_product`).

    Args:
        x_ND: Input.
        weight_DF: The matrix W.
        dtype: Dtype of the result; None: the dtype of x.
    """
    dtype = jnp.dtype(dtype or x_ND.dtype)
    if weight_DF.dtype == x_ND.dtype:
        return precision.matmul(x_ND, weight_DF, dtype)
    return _rounded_product(x_ND, weight_DF, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x_ND: jax.Array, weight_DF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x round(W) in `dtype`, where dL/dW = x^T dy has the dtype of W.

    So sums over tokens, and over devices, are not rounded to the dtype of x.
    """
    return precision.matmul(x_ND, weight_DF.astype(x_ND.dtype), dtype)


def _rounded_product_forward(x_ND, weight_DF, dtype):
    return _rounded_product(x_ND, weight_DF, dtype), (x_ND, weight_DF)


def _rounded_product_backward(dtype, kept, dy_NF):
    """Returns (dx in the dtype of x, dW in the dtype of W)."""
    x_ND, weight_DF = kept
    dx_ND = precision.matmul(dy_NF, weight_DF.astype(x_ND.dtype).T, x_ND.dtype)
    return dx_ND, precision.matmul(x_ND.T, dy_NF, weight_DF.dtype)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


class Linear(nnx.Module):
    """y = x W + bias, plus s (dropout(x) A) B if it has an adapter (`perl_jax.adapters.lora`).

    Args:
        name: Name of the projection: q, k, v, o, gate, up or down.
        config: The model.
        adapted: Which projections have adapters.
        shape: (D, F), widths of input and output.
        axes: Logical axes of the two dimensions.
        rngs: Random numbers of the initial weights.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        adapted: AdapterSpec,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.param_dtype)
        # 1 / sqrt(in) keeps the size of activations for any width. The usual 0.02 fits a width of
        # 2,500 and leaves narrow models nearly linear for hundreds of steps.
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
            # Placeholders: the rank is that of the weights that are merged in.
            self.under_a = UnderParam(jnp.zeros((shape[0], 1)), axes=(axes[0], "rank"))
            self.under_b = UnderParam(jnp.zeros((1, shape[1])), axes=("rank", axes[1]))

    def __call__(self, x_ND: Array, dropout_key: Array | None = None) -> jax.Array:
        """Returns x W, plus what the adapters add and the bias, [N, F].

        Args:
            x_ND: Input.
            dropout_key: Random key of the layer's dropout; None: no dropout.
        """
        out_NF = self._product(x_ND)
        if self.has_under:
            under_a, under_b = (
                jax.lax.stop_gradient(leaf[...]).astype(x_ND.dtype)
                for leaf in (self.under_a, self.under_b)
            )
            out_NF = out_NF + matmul(matmul(x_ND, under_a), under_b)
        if self.lora is not None:
            out_NF = self._adapted(self.lora, x_ND, out_NF, dropout_key)
        if self.bias is not None:
            out_NF = out_NF + self.bias[...].astype(x_ND.dtype)[None, :]
        return out_NF

    def _product(self, x_ND: Array) -> jax.Array:
        """Returns x W, [N, F]; a quantised W is cast to the dtype of x."""
        kernel = self.kernel.get_value()
        # A quantised matrix is cast; it has no gradient.
        return matmul(x_ND, dense(kernel).astype(x_ND.dtype) if is_quantised(kernel) else kernel)

    def _adapted(
        self, lora: LoRAConfig, x_ND: Array, out_NF: Array, dropout_key: Array | None
    ) -> jax.Array:
        """Returns x W + s (dropout(x) A) B; for DoRA that times m / ||W + s A B||.

        Args:
            lora: Config of the adapter.
            x_ND: Input.
            out_NF: x W, with the frozen pairs' part.
            dropout_key: Random key of the layer's dropout; None: no dropout.
        """
        dropped = dropout_key is not None and lora.dropout > 0
        if dropped:
            keep = 1.0 - lora.dropout
            key = jax.random.fold_in(dropout_key, LINEAR.index(self.name))
            x_ND = jnp.where(jax.random.bernoulli(key, keep, x_ND.shape), x_ND / keep, 0)
        scale = lora.scale_of(self.name)
        delta_NF = scale * matmul(matmul(x_ND, self.lora_a[...]), self.lora_b[...])
        if not lora.dora:
            return out_NF + delta_NF
        norm_F = jax.lax.stop_gradient(
            output_norms(dense(self.kernel.get_value()), self.lora_a[...], self.lora_b[...], scale)
        )
        share_F = (self.magnitude[...] / norm_F)[None, :]
        # share - 1 is computed in float32, because bfloat16 would round a share near 1 to 1.
        share_F, beyond_F = share_F.astype(x_ND.dtype), (share_F - 1).astype(x_ND.dtype)
        # With dropout, only the rescaled part sees the dropped input.
        seen_NF = self._product(x_ND) if dropped else out_NF
        return out_NF + beyond_F * seen_NF + share_F * delta_NF


class FusedLinear(nnx.Module):
    """Several linear layers of one input with their adapters, computed as few products.

    The layers are x W + (x A) B + bias. The first product is with [W | A] (`generation.fused`).
    Only the output widths are fixed here; the ranks are those of the weights that are merged in.

    Args:
        names: Names of the projections.
        config: The model.
        paired: Whether any projection has an adapter.
        shapes: (D, F) of each projection; D is the same.
        axes: Logical axes of the two dimensions.
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
        """Returns a list of each layer's output [N, its F], in the order of `names`."""
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
