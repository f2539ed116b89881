"""Shapes of known models by name, for planning and timing without their weights.

Each preset holds the fields of the model's own `config.json` that `families` reads, in the spelling
of transformers 5. Pre-trained and tuned models of one name have the same shape; the number of
positions of Qwen3 is that of the tuned models. For Gemma 3 models that also see images a preset is
the text part. Its embedding has 64 more rows than the 262,144 tokens, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perl_jax import errors
from perl_jax.hub import config_json
from perl_jax.hub.families import Settings
from perl_jax.models.config import ModelConfig
from perl_jax.runtime import files

_GEMMA2: Settings = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_GEMMA3_LOCAL: Settings = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3: Settings = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": _GEMMA3_LOCAL,
    },
}
# The one model without images: no image rows, fewer positions, unscaled rope, a shorter window.
_GEMMA3_1B: Settings = _GEMMA3 | {
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": _GEMMA3_LOCAL,
    },
}
_LLAMA31: Settings = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3: Settings = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_QWEN3_TIED: Settings = _QWEN3 | {"tie_word_embeddings": True}
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def _shaped(family: Settings, *shape: int, **more: Any) -> Settings:
    """Returns the `config.json` fields of a preset.

    Args:
        family: The fields that presets of the family share.
        shape: The values of the fields `_SHAPE`, in their order.
        more: Further fields.
    """
    return family | dict(zip(_SHAPE, shape, strict=True)) | more


PRESETS: Mapping[str, Settings] = {
    # Family; width, feed-forward width, layers, query heads, key/value heads, head dimension.
    "gemma2-2b": _shaped(_GEMMA2, 2304, 9216, 26, 8, 4, 256, query_pre_attn_scalar=256),
    # The first files had 224, width / heads; Google corrected it (google/gemma_pytorch 03e6575).
    "gemma2-9b": _shaped(_GEMMA2, 3584, 14336, 42, 16, 8, 256, query_pre_attn_scalar=256),
    # Here width / heads is intended, as in Gemma 3's 27B.
    "gemma2-27b": _shaped(_GEMMA2, 4608, 36864, 46, 32, 16, 128, query_pre_attn_scalar=144),
    "gemma3-1b": _shaped(_GEMMA3_1B, 1152, 6912, 26, 4, 1, 256, query_pre_attn_scalar=256),
    "gemma3-4b": _shaped(_GEMMA3, 2560, 10240, 34, 8, 4, 256, query_pre_attn_scalar=256),
    "gemma3-12b": _shaped(_GEMMA3, 3840, 15360, 48, 16, 8, 256, query_pre_attn_scalar=256),
    "gemma3-27b": _shaped(_GEMMA3, 5376, 21504, 62, 32, 16, 128, query_pre_attn_scalar=168),
    "llama3.1-8b": _shaped(_LLAMA31, 4096, 14336, 32, 32, 8, 128),
    "llama3.1-70b": _shaped(_LLAMA31, 8192, 28672, 80, 64, 8, 128),
    "qwen3-0.6b": _shaped(_QWEN3_TIED, 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": _shaped(_QWEN3_TIED, 2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": _shaped(_QWEN3_TIED, 2560, 9728, 36, 32, 8, 128),
    "qwen3-8b": _shaped(_QWEN3, 4096, 12288, 36, 32, 8, 128),
    "qwen3-14b": _shaped(_QWEN3, 5120, 17408, 40, 40, 8, 128),
    "qwen3-32b": _shaped(_QWEN3, 5120, 25600, 64, 64, 8, 128),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Returns the ModelConfig of a preset with some fields overridden.

    Args:
        name: A key of `PRESETS`.
        overrides: Fields of ModelConfig to change.

    Raises:
        UserError: There is no such preset; the message lists the names.
    """
    errors.one_of("preset", name, PRESETS)
    return dataclasses.replace(config_json.from_json(PRESETS[name], f"preset {name}"), **overrides)


def model_config(model: str, **overrides: Any) -> ModelConfig:
    """Returns the ModelConfig of a preset, or else of a folder in Hugging Face's format.

    Only `config.json` is read, so the folder needs no weights. A preset's name takes precedence
    over a folder of that name; write `./NAME` for the folder.

    Args:
        model: The preset's name, or the folder.
        overrides: Fields of ModelConfig to change.

    Raises:
        UserError: There is neither such a preset nor such a folder, or its config is not supported.
    """
    if model in PRESETS:
        return preset(model, **overrides)
    folder = files.path_of(model)
    errors.require(
        files.is_folder(folder),
        f"model is {model!r}; it must be a folder with a config.json or one of "
        f"{', '.join(PRESETS)}.",
    )
    return dataclasses.replace(config_json.read_config(folder), **overrides)
