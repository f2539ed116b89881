"""Reads the `config.json` of a model into a ModelConfig, and writes one for a decoder trained here.

`families.FAMILIES` lists, for each family, the fields that are read. Any other field must be known
not to affect outputs, or be off (null, false, 0, empty). Otherwise it is an error that names the
field, so that no checkpoint silently runs as another model. Fields without effect that transformers
does not write itself are reported by `leftovers`.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from perl_jax.errors import COUNT, MOST, UserError, listed, positive, require, shown, whole
from perl_jax.hub.families import FAMILIES, Settings
from perl_jax.models.config import ModelConfig, Rope
from perl_jax.runtime import files

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SHARED = {
    *_SHAPE,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
}
_ROPE = {"rope_parameters", "rope_theta", "rope_scaling"}
# Fields that transformers writes into most files and that do not affect outputs.
_NO_EFFECT = {
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "cache_implementation",
    # The layout of the original training; transformers' models do not read it.
    "pretraining_tp",
    "task_specific_params",
    "is_encoder_decoder",
}
# Fields without effect on outputs that trainers, converters and older versions of transformers
# leave in a file. Fields that begin with one of `_LEFTOVER_BEGINNINGS` are leftovers too.
_LEFTOVERS = {
    # Origin and training of a model.
    "is_llama_config",
    "neftune_noise_alpha",
    "gradient_checkpointing",
    "use_reentrant_checkpointing",
    "use_bfloat16",
    "model_name",
    "transformers.js_config",
    "auto_map",
    "tokenizer_class",
    "finetuning_task",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "max_sequence_length",
    "max_seq_length",
    "model_max_length",
    "attn_implementation",
    "output_past",
    "torchscript",
    "tf_legacy_loss",
    "is_decoder",
    "tie_encoder_decoder",
    # Generation settings.
    "max_length",
    "min_length",
    "max_new_tokens",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "decoder_start_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "output_scores",
    "return_dict_in_generate",
    "prefix",
}
_LEFTOVER_BEGINNINGS = ("_", "unsloth_")
# Settings of which the decoder supports a single value, in every family.
_ONLY = {
    "attention_dropout": 0.0,
    "use_bidirectional_attention": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
# Fields of whole numbers, with the field of ModelConfig that bounds each (`errors.MOST`).
_WHOLE = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "sliding_window": "window",
    "sliding_window_size": "window",
    "max_window_layers": "max_window_layers",
    "sliding_window_pattern": "layers",
    "_sliding_window_pattern": "layers",
    "no_rope_layer_interval": "layers",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "original_max_position_embeddings": "original_positions",
}
# Fields of other positive numbers, of true or false, of texts, and of lists with an entry a layer.
_REAL = {
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
}
_FLAGS = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"}
_TEXTS = {"hidden_act", "hidden_activation", "rope_type", "type"}
_LISTS = {"layer_types": str, "no_rope_layers": int}
# Fields of settings of their own: of rotary positions, maybe one object for each kind of layer.
_OBJECTS = {
    "rope_parameters",
    "rope_scaling",
    "full_attention",
    "sliding_attention",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _rope(source: str, found: Mapping[str, Any]) -> Rope:
    """Returns the settings of rotary positions.

    Args:
        source: Where the fields are from, the beginning of an error message.
        found: The fields of `rope_parameters`, or of one kind of layer in it.

    Raises:
        UserError: A setting is missing or not supported.
    """
    kind = found.get("rope_type", "default")
    scalings: dict[str, Literal["none", "linear", "llama3"]] = {
        "default": "none",
        "linear": "linear",
        "llama3": "llama3",
    }
    require(
        kind in scalings, f"{source} has rope type {shown(kind)}; supported: {', '.join(scalings)}."
    )
    known = {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
    partial = found.get("partial_rotary_factor", 1.0)
    require(
        partial == 1.0, f"{source} has partial_rotary_factor {partial!r}; only 1.0 is supported."
    )
    unknown = sorted(
        name for name in set(found) - known - {"partial_rotary_factor"} if found[name] is not None
    )
    require(not unknown, f"{source} has rope setting {', '.join(unknown)}, which is not supported.")
    names = {
        "theta": "rope_theta",
        "factor": "factor",
        "low_factor": "low_freq_factor",
        "high_factor": "high_freq_factor",
    }
    names["original_positions"] = "original_max_position_embeddings"
    if kind != "llama3":
        names = {"theta": "rope_theta"} | ({"factor": "factor"} if kind == "linear" else {})
    missing = sorted(name for name in names.values() if found.get(name) is None)
    require(not missing, f"{source} has rope type {kind!r} without {', '.join(missing)}.")
    values: Settings = {field: found[name] for field, name in names.items()}
    values["theta"] = float(values["theta"])
    return Rope(scaling=scalings[kind], **values)


def read_config(folder: files.PathLike, **computing: Any) -> ModelConfig:
    """Returns the ModelConfig that a folder's `config.json` describes.

    Args:
        folder: The model's folder.
        computing: ModelConfig fields that say how to compute, such as dtype and remat.

    Raises:
        UserError: The file is no JSON object, or a field is missing, unknown or has an unsupported
            value.
    """
    path = files.path_of(folder) / "config.json"
    return from_json(files.read_object(path), str(path), **computing)


def from_json(raw: Mapping[str, Any], source: str, **computing: Any) -> ModelConfig:
    """Returns the ModelConfig described by the fields of a `config.json`.

    Args:
        raw: The fields.
        source: Where the fields are from, for messages.
        computing: ModelConfig fields that say how to compute, such as dtype and remat.

    Raises:
        UserError: A field is missing, unknown or has an unsupported value.
    """
    kind = raw.get("model_type")
    text = raw.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    text_alone = (
        f"; its text model ({inner}) can be used where it is saved alone"
        if isinstance(inner, str) and inner in FAMILIES
        else ""
    )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{source} has model_type {shown(kind)}{text_alone}; supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[kind]
    _check_types(source, raw, _SHARED | _ROPE | family.reads)
    for field in _SHAPE:
        require(
            raw.get(field) is not None or field in family.implied,
            f"{source} has no field {field!r}.",
        )
    for field, allowed in _ONLY.items():
        found = raw.get(field, allowed)
        require(
            found == allowed or (not found and not allowed),
            f"{source} has {field} {shown(found)}; only {allowed!r} is supported.",
        )
    read = _SHARED | _ROPE | set(_ONLY) | family.reads
    unknown = sorted(
        field
        for field in _active_fields(raw)
        if field not in read | _NO_EFFECT and not _is_leftover(field)
    )
    require(
        not unknown,
        f"{source} sets {listed(f'{field} {shown(raw[field])}' for field in unknown)}, which is "
        f"not supported for {kind}; ignoring it could change the outputs. If it cannot, remove it "
        "from the file.",
    )
    values = _resolved(
        source, kind, {field: value for field, value in raw.items() if field in read}
    )
    gated = "hidden_activation" in family.reads
    activation = values.hidden_activation if gated else values.hidden_act
    field = "hidden_activation" if gated else "hidden_act"
    require(
        activation in _ACTIVATIONS,
        f"{source} has {field} {shown(activation)}; supported: {', '.join(_ACTIVATIONS)}.",
    )
    ropes = values.rope_parameters
    local = None
    if "full_attention" in ropes:
        ropes, local = ropes["full_attention"], _rope(source, ropes["sliding_attention"])
    settings = {
        "rope": _rope(source, ropes),
        "local_rope": local,
        "activation": _ACTIVATIONS[activation],
        **family.settings(values),
    }
    heads = values.num_attention_heads
    return ModelConfig(
        vocab_size=values.vocab_size,
        width=values.hidden_size,
        ffn_width=values.intermediate_size,
        layers=values.num_hidden_layers,
        heads=heads,
        kv_heads=values.num_key_value_heads or heads,
        head_dim=getattr(values, "head_dim", None) or values.hidden_size // heads,
        max_positions=values.max_position_embeddings,
        norm_epsilon=values.rms_norm_eps,
        tied_embeddings=values.tie_word_embeddings,
        **settings,
        **computing,
    )


def _check_types(source: str, raw: Mapping[str, Any], read: Collection[str]) -> None:
    """Raises UserError for a field that has another type than transformers writes, or a number that
    no model has.

    It comes before transformers reads the fields, which would make lists of as many entries as
    there are layers, and would take some wrong types.

    Args:
        source: Where the fields are from, for messages.
        raw: The fields; nulls pass.
        read: The fields to check; fields of nested settings are all checked.
    """
    for field, value in raw.items():
        if value is None or field not in read:
            continue
        where = f"{source}: {field}"
        if field in _WHOLE:
            least = field in ("sliding_window", "max_window_layers", "head_dim")
            number = int(value) if isinstance(value, float) and value.is_integer() else value
            whole(where, number, zero=least, most=MOST.get(_WHOLE[field], COUNT))
        elif field in _REAL:
            positive(where, value)
        elif field in _OBJECTS:
            require(isinstance(value, Mapping), f"{where} is {shown(value)}; it must be an object.")
            _check_types(where, value, (*_WHOLE, *_REAL, *_FLAGS, *_TEXTS, *_OBJECTS))
        elif field in _LISTS:
            good = isinstance(value, list) and all(isinstance(v, _LISTS[field]) for v in value)
            good = good and len(value) <= MOST["layers"]
            require(good, f"{where} is {shown(value)}; it must be a list with an entry a layer.")
        elif field in _FLAGS:
            require(
                isinstance(value, bool), f"{where} is {shown(value)}; it must be true or false."
            )
        elif field in _TEXTS:
            require(isinstance(value, str), f"{where} is {shown(value)}; it must be a text.")


def leftovers(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the fields of a folder's `config.json` that are set, but are read neither by this
    package nor by transformers' models; sorted.

    None of them affects outputs; a field that could is an error in `from_json`.
    """
    return tuple(
        sorted(filter(_is_leftover, _active_fields(files.read_object(folder / "config.json"))))
    )


def _is_leftover(field: str) -> bool:
    """Returns whether a field of `config.json` is ignored: no family reads it, and it is in
    `_LEFTOVERS` or begins with one of `_LEFTOVER_BEGINNINGS`.
    """
    read = any(field in family.reads for family in FAMILIES.values())
    return not read and (field in _LEFTOVERS or field.startswith(_LEFTOVER_BEGINNINGS))


def _active_fields(raw: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields whose value is not None, False, 0 or empty."""
    return [field for field, value in raw.items() if value not in (None, False, 0, [], {}, "")]


def _resolved(source: str, kind: str, raw: Mapping[str, Any]) -> Any:
    """Returns transformers' config object, which resolves old names of fields and a family's
    defaults.

    Args:
        source: Where the fields are from, for messages.
        kind: The `model_type`.
        raw: The fields that are read.

    Raises:
        UserError: transformers refuses the fields.
    """
    from transformers import AutoConfig

    # A null means the class's default, except for fields in which null is itself a setting.
    given = {
        name: value
        for name, value in raw.items()
        if value is not None or name in ("sliding_window",) or "softcapping" in name
    }
    try:
        # Copied: the class fills in nested settings in place.
        return AutoConfig.for_model(kind, **copy.deepcopy(given))
    # The class's own checks raise errors of many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} is not a valid {kind} config: {reason}") from error


def llama_json(config: ModelConfig, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns the fields of a `config.json` with which transformers loads the decoder as a Llama
    model.

    Args:
        config: The decoder's configuration.
        token_ids: The ids by name: bos, eos and pad, each None if there is none.

    Raises:
        ValueError: A Llama config cannot express a setting.
    """
    shape = (
        "vocab_size",
        "width",
        "ffn_width",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "max_positions",
        "norm_epsilon",
        "tied_embeddings",
    )
    computing = ("dtype", "param_dtype", "remat", "unroll", "attention")
    values, default = (
        dataclasses.asdict(config),
        {field.name: field.default for field in dataclasses.fields(ModelConfig)},
    )
    default["rope"] = dataclasses.asdict(Rope(theta=config.rope.theta))
    others = [
        name
        for name in values
        if name not in (*shape, *computing) and values[name] != default[name]
    ]
    if others:
        raise ValueError(
            f"a Llama config.json cannot express model.{others[0]}={values[others[0]]!r}"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": config.param_dtype,
        **{f"{name}_token_id": value for name, value in token_ids.items()},
    }
