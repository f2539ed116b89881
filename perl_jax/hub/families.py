"""The supported model families: what each reads of its `config.json`, as fields of ModelConfig.

`config_json` reads the fields that all families share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from perl_jax.adapters.lora import ATTENTION, FEED_FORWARD
from perl_jax.errors import require

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        reads: The fields of `config.json` that are read, besides those shared by all families.
        settings: Maps transformers' config object (which resolves old spellings and defaults) to
            fields of ModelConfig.
        implied: Required fields that published files leave to the defaults of transformers' class.
    """

    reads: frozenset[str]
    settings: Callable[[Any], Settings]
    implied: frozenset[str] = frozenset()


def _llama(values: Any) -> Settings:
    """Returns the ModelConfig field `biases`, read from transformers' config object of a Llama
    model.
    """
    return {"biases": _biases(values)}


def _mistral(values: Any) -> Settings:
    """Returns the ModelConfig fields `window` and `windowed`, read from transformers' config
    object.

    If the config has a sliding window, all layers use it; else the fields are None and ().
    """
    every = range(values.num_hidden_layers) if values.sliding_window else ()
    return {"window": values.sliding_window or None, "windowed": tuple(every)}


def _smollm3(values: Any) -> Settings:
    """Returns the ModelConfig fields `biases`, `unrotated` and those of sliding windows of SmolLM3.

    `unrotated` lists the layers without rotary positions. `values` is transformers' config object.
    """
    # no_rope_layers is 1 for a layer with rotary positions.
    unrotated = tuple(index for index, rotated in enumerate(values.no_rope_layers) if not rotated)
    return {
        "biases": _biases(values),
        "unrotated": unrotated,
        **_windows(values, values.use_sliding_window),
    }


def _qwen2(values: Any) -> Settings:
    """Returns the ModelConfig fields `biases` and those of sliding windows of Qwen2.

    Queries, keys and values always have biases. `values` is transformers' config object.
    """
    return {"biases": ("q", "k", "v"), **_windows(values, values.use_sliding_window)}


def _qwen3(values: Any) -> Settings:
    """Returns the ModelConfig fields `biases`, `qk_norm` and those of sliding windows of Qwen3.

    `values` is transformers' config object.
    """
    return {
        "biases": _biases(values),
        "qk_norm": True,
        **_windows(values, values.use_sliding_window),
    }


def _gemma(values: Any) -> Settings:
    """Returns the ModelConfig fields in which Gemma 2 differs from Llama; Gemma 3 shares most of
    them.

    They are `biases`, the norms, the scales of embedding and queries, the caps of logits, and
    sliding windows. `values` is transformers' config object.
    """
    return {
        "biases": _biases(values),
        "sandwich_norms": True,
        "unit_offset_norms": True,
        "scaled_embedding": True,
        "query_scale": values.query_pre_attn_scalar**-0.5,
        "attention_cap": values.attn_logit_softcapping,
        "logit_cap": values.final_logit_softcapping,
        **_windows(values, True),
    }


def _gemma3(values: Any) -> Settings:
    """Returns the ModelConfig fields in which Gemma 3 differs from Llama: those of Gemma 2, with
    normalised queries and keys and without a cap in attention.

    `values` is transformers' config object.
    """
    # The config class has an attention cap, which the model does not use.
    return _gemma(values) | {"qk_norm": True, "attention_cap": None}


_WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_BIASES = {"attention_bias", "mlp_bias"}
_GEMMA = {
    "sliding_window",
    "layer_types",
    "attention_bias",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
_GEMMA3 = {*_GEMMA, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}
_ENTRIES: dict[str, Family] = {
    "llama": Family(frozenset({*_BIASES, "hidden_act"}), _llama),
    "mistral": Family(frozenset({"sliding_window", "hidden_act"}), _mistral),
    "smollm3": Family(
        frozenset({*_BIASES, *_WINDOWS, "hidden_act", "no_rope_layers", "no_rope_layer_interval"}),
        _smollm3,
    ),
    "qwen2": Family(frozenset({*_WINDOWS, "hidden_act"}), _qwen2),
    "qwen3": Family(frozenset({*_WINDOWS, "attention_bias", "hidden_act"}), _qwen3),
    # Gemma 2's files say hidden_act beside hidden_activation, and sliding_window_size beside
    # sliding_window; only the latter of each is used.
    "gemma2": Family(
        frozenset({*_GEMMA, "hidden_activation", "hidden_act", "sliding_window_size"}), _gemma
    ),
    "gemma3_text": Family(
        frozenset({*_GEMMA3, "hidden_activation"}),
        _gemma3,
        frozenset({"vocab_size", "num_attention_heads"}),
    ),
}
# Families by the `model_type` of their config.json; `register_family` adds to them.
FAMILIES: Mapping[str, Family] = MappingProxyType(_ENTRIES)


def register_family(model_type: str, family: Family) -> None:
    """Registers a model family for this process.

    The tensors of the family must have the names and shapes of Llama's, with norms and biases as
    the fields of `family` say. transformers must know its config class.

    Args:
        model_type: The `model_type` in the family's config.json.
        family: Which fields of config.json are read, and how they become fields of ModelConfig.

    Raises:
        UserError: Another family has this `model_type`.
    """
    require(
        _ENTRIES.get(model_type, family) == family,
        f"There is another family {model_type!r}; the package reads it already.",
    )
    _ENTRIES[model_type] = family


def _biases(values: Any) -> tuple[str, ...]:
    """Returns the names of the projections that have biases (`q`, `k`, ...)."""
    attention = ATTENTION if getattr(values, "attention_bias", False) else ()
    return attention + (FEED_FORWARD if getattr(values, "mlp_bias", False) else ())


def _windows(values: Any, used: bool) -> Settings:
    """Returns the ModelConfig fields `window`, the size in tokens, and `windowed`, the indices of
    the layers with a sliding window.

    Returns {} if `used` is False or no layer has a sliding window.

    Args:
        values: transformers' config object, with `layer_types` and `sliding_window`.
        used: Whether the config turns windows on.

    Raises:
        UserError: A layer is of another type than full or sliding attention.
    """
    kinds = values.layer_types
    known = {"full_attention", "sliding_attention"}
    require(
        set(kinds) <= known,
        f"config.json has layer_types {sorted(set(kinds) - known)}; supported: "
        f"{', '.join(sorted(known))}.",
    )
    windowed = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
    if not used or not windowed:
        return {}
    return {"window": values.sliding_window, "windowed": windowed}
