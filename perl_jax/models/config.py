"""Configuration of the decoder, one set of fields for the Llama, Qwen and Gemma families."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from perl_jax import errors
from perl_jax.adapters.lora import LINEAR

DTYPES = ("float32", "bfloat16")
ATTENTION = ("plain", "blocked", "splash", "cudnn")
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of rotary positions: theta^(-2i/K), then scaled.

    Attributes:
        theta: Base of the frequencies.
        scaling: none; linear: divide every frequency by `factor` (position interpolation, arXiv
            2306.15595); llama3: divide frequencies whose wavelength exceeds original_positions /
            low_factor, keep those whose wavelength is below original_positions / high_factor, and
            interpolate between (Llama 3.1).
        factor: Divisor of scaled frequencies.
        low_factor: For llama3: sets the wavelength above which frequencies are divided.
        high_factor: For llama3: sets the wavelength below which frequencies are kept.
        original_positions: For llama3: context length of the original training, in tokens.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        errors.in_range(self, "rope")
        errors.one_of("rope.scaling", self.scaling, ("none", "linear", "llama3"))
        for field in ("theta", "factor", "low_factor", "high_factor", "original_positions"):
            errors.positive(f"rope.{field}", getattr(self, field))
        rising = self.scaling != "llama3" or self.high_factor > self.low_factor
        errors.require(
            rising,
            f"rope.high_factor is {self.high_factor}; it must exceed rope.low_factor, "
            f"{self.low_factor}.",
        )


# Fields that change how a model is computed, not its function: precision, implementation, and the
# largest length.
COMPUTING = ("dtype", "param_dtype", "remat", "unroll", "attention", "max_positions")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder.

    Attributes:
        vocab_size: V.
        width: D.
        ffn_width: F.
        layers: L.
        heads: H, the number of query heads.
        kv_heads: N, the number of key/value heads.
        head_dim: K.
        max_positions: Largest number of tokens of a row.
        norm_epsilon: Added to the mean square in RMSNorm.
        rope: Rotary positions.
        local_rope: Rotary positions of layers with a window; None: the same.
        window: Number of tokens that a token sees in the layers of `windowed`, itself included.
        windowed: Indices of layers with a sliding window.
        unrotated: Indices of layers without rotary positions.
        biases: Names of projections with a bias.
        qk_norm: RMSNorm over each head of queries and keys.
        sandwich_norms: Another norm after attention and after the feed-forward layer.
        unit_offset_norms: Norms multiply by 1 + scale, in float32 (Gemma), instead of by scale.
        activation: Activation of the feed-forward layers.
        scaled_embedding: Embeddings are multiplied by sqrt(width).
        query_scale: Factor of q k^T; None: 1 / sqrt(K).
        attention_cap: Attention logits become cap tanh(x / cap); None: off.
        logit_cap: Output logits become cap tanh(x / cap); None: off.
        tied_embeddings: Whether the output projection is the transposed embedding.
        dtype: Dtype of activations.
        param_dtype: Dtype of the base's (frozen) weights.
        remat: What the backward pass recomputes instead of keeping: none; dots: everything but the
            products with weights; full: whole layers.
        unroll: Number of layers inlined per turn of the layer scan; results do not depend on it. 1
            compiles deep models quickly; a CPU trains a shallow model up to 1.7 times as fast
            unrolled.
        attention: How whole sequences are attended to. plain: XLA operations, on any platform;
            blocked: the same in blocks of queries, so that the [B, H, T, T] weights never exist
            whole; splash, cudnn: kernels for TPUs and GPUs.
    """

    vocab_size: int
    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_epsilon: float = 1e-5
    rope: Rope = Rope()
    local_rope: Rope | None = None
    window: int | None = None
    windowed: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scaled_embedding: bool = False
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    tied_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 1
    attention: Literal["plain", "blocked", "splash", "cudnn"] = "plain"

    def __post_init__(self) -> None:
        errors.in_range(self, "model")
        for field in (
            "vocab_size",
            "width",
            "ffn_width",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "max_positions",
            "unroll",
        ):
            errors.positive(f"model.{field}", getattr(self, field))
        errors.require(
            self.heads % self.kv_heads == 0,
            f"model.heads is {self.heads}; it must be a multiple of model.kv_heads, "
            f"{self.kv_heads}.",
        )
        errors.require(
            self.head_dim % 2 == 0,
            f"model.head_dim is {self.head_dim}; it must be even, because rotary positions "
            "rotate pairs.",
        )
        errors.require(
            not self.windowed or bool(self.window),
            f"model.windowed is {self.windowed}; it needs a model.window.",
        )
        for field in ("windowed", "unrotated"):
            outside = [index for index in getattr(self, field) if not 0 <= index < self.layers]
            errors.require(
                not outside, f"model.{field} has {outside}; layers are 0 to {self.layers - 1}."
            )
        for field in ("window", "query_scale", "attention_cap", "logit_cap"):
            if getattr(self, field) is not None:
                errors.positive(f"model.{field}", getattr(self, field))
        unknown = sorted(set(self.biases) - set(LINEAR))
        errors.require(
            not unknown, f"model.biases has {unknown}; projections are {', '.join(LINEAR)}."
        )
        errors.one_of("model.activation", self.activation, ("silu", "gelu_tanh"))
        errors.one_of("model.remat", self.remat, REMAT)
        errors.one_of("model.dtype", self.dtype, DTYPES)
        errors.one_of("model.attention", self.attention, ATTENTION)
        errors.one_of("model.param_dtype", self.param_dtype, DTYPES)
        cappable = self.attention != "cudnn" or self.attention_cap is None
        errors.require(
            cappable,
            f"model.attention is {self.attention!r}; with model.attention_cap it must be 'plain', "
            "'blocked' or 'splash'.",
        )

    @property
    def attention_scale(self) -> float:
        """The factor of q k^T: `query_scale`, or 1 / sqrt(K) if that is None."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None: no window."""
        return tuple(
            self.window if index in self.windowed else None for index in range(self.layers)
        )

    @property
    def function(self) -> dict[str, Any]:
        """The fields, keyed by name, that the outputs depend on, without those at their defaults.

        Nested configs are dictionaries. The fields of COMPUTING are left out. A field that a later
        version adds therefore does not change the record of models that leave it at its default.
        """
        return {
            name: value for name, value in _unlike_defaults(self).items() if name not in COMPUTING
        }


def _unlike_defaults(config: Any) -> dict[str, Any]:
    """Returns the fields of a frozen config that differ from their defaults, keyed by name.

    A field that is a config itself becomes a dictionary of the same kind.
    """
    fields = {
        field.name: (vars(config)[field.name], field.default)
        for field in dataclasses.fields(config)
    }
    return {
        name: _unlike_defaults(value) if dataclasses.is_dataclass(value) else value
        for name, (value, default) in fields.items()
        if value != default
    }
