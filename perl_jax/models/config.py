"""Configuration of the decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder of the Llama family.

    dtype: of activations. param_dtype: of the base's weights (the frozen ones).
    remat: recompute each layer in the backward pass instead of keeping its activations.
    unroll: layers inlined in each turn of the layer scan; the numbers do not depend on it. 1 keeps
      compiling quick for deep models; a CPU runs a shallow one up to 1.7 times as fast unrolled.
    attention: plain, or blocked: the same numbers in cache-sized pieces, for one CPU device.
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
    rope_theta: float = 10000.0
    tied_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    unroll: int = 1
    attention: Literal["plain", "blocked"] = "plain"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "ffn_width", "layers", "heads", "kv_heads", "head_dim", "max_positions", "unroll"):
            config_lib.positive(f"model.{field}", getattr(self, field))
        config_lib.require(
            self.heads % self.kv_heads == 0,
            f"model.heads is {self.heads}; it must be a multiple of model.kv_heads, {self.kv_heads}.",
        )
        config_lib.require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}; rotary embedding needs an even one.")
        config_lib.one_of("model.dtype", self.dtype, config_lib.DTYPES)
        config_lib.one_of("model.attention", self.attention, ("plain", "blocked"))
        config_lib.one_of("model.param_dtype", self.param_dtype, config_lib.DTYPES)
