"""Facts of published config.json files: each is read, as the model that transformers builds from
it.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import transformers

from perl_jax.errors import UserError
from perl_jax.hub import config_json, weights
from perl_jax.hub.families import Settings
from perl_jax.hub.model import ModelOptions, load_model
from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees
from tests import small
from tests.hub.test_families import SIZES, write_random
from tests.training.test_exchange import write_base

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _shaped(family: Settings, *shape: int, **more: Any) -> Settings:
    return family | dict(zip(_SHAPE, shape, strict=True)) | more


def _llama3(factor: float) -> Settings:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


_USUAL = {
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    **_USUAL,
}
_LLAMA3 = _LLAMA | {
    "bos_token_id": 128000,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
_LLAMA31 = _LLAMA3 | {
    "rope_scaling": _llama3(8.0),
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
}
_LLAMA32 = _LLAMA3 | {
    "rope_scaling": _llama3(32.0),
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
}
_SMOLLM2 = _LLAMA | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
_SMOLLM2_BASE = {
    name: value
    for name, value in _SMOLLM2.items()
    if name not in ("pad_token_id", "transformers.js_config")
}
_SMOLLM2_BASE |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.041666666666666664}
# Written before the class had biases; its chat model is the same but for the ids.
_TINYLLAMA = {
    name: value
    for name, value in _LLAMA.items()
    if name not in ("attention_bias", "mlp_bias", "attention_dropout")
}
_TINYLLAMA |= {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    **_USUAL,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    **_USUAL,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    **_USUAL,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    **_USUAL,
}
_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 107],
    "pad_token_id": 0,
    "cache_implementation": "hybrid",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    **_USUAL,
}
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    **_USUAL,
}
_FIVE_OF_SIX = [
    "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(18)
]
# What the text_config of the models that also see images says; the rest is the class's own.
_GEMMA3_SEEING = {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}

PUBLISHED: dict[str, Settings] = {
    "llama3.1-8b": _shaped(_LLAMA31, 128256, 4096, 14336, 32, 32, 8),
    "llama3.1-8b-instruct": _shaped(
        _LLAMA31, 128256, 4096, 14336, 32, 32, 8, eos_token_id=[128001, 128008, 128009]
    ),
    "llama3.2-1b": _shaped(_LLAMA32, 128256, 2048, 8192, 16, 32, 8, head_dim=64),
    "llama3.2-3b-instruct": _shaped(_LLAMA32, 128256, 3072, 8192, 28, 24, 8, head_dim=128),
    "smollm2-135m": _shaped(_SMOLLM2_BASE, 49152, 576, 1536, 30, 9, 3),
    "smollm2-135m-instruct": _shaped(_SMOLLM2, 49152, 576, 1536, 30, 9, 3),
    "smollm2-360m-instruct": _shaped(_SMOLLM2, 49152, 960, 2560, 32, 15, 5),
    "smollm2-1.7b-instruct": _shaped(_SMOLLM2, 49152, 2048, 8192, 24, 32, 32, rope_theta=130000),
    "smollm3-3b-base": _shaped(_SMOLLM3, 128256, 2048, 11008, 36, 16, 4),
    "smollm3-3b": _shaped(_SMOLLM3, 128256, 2048, 11008, 36, 16, 4, eos_token_id=128012),
    "tinyllama": _shaped(_TINYLLAMA, 32000, 2048, 5632, 22, 32, 4),
    "mistral-7b-v0.1": _shaped(
        _MISTRAL, 32000, 4096, 14336, 32, 32, 8, rope_theta=10000.0, sliding_window=4096
    ),
    "mistral-7b-instruct-v0.3": _shaped(
        _MISTRAL,
        32768,
        4096,
        14336,
        32,
        32,
        8,
        rope_theta=1e6,
        sliding_window=None,
        attention_dropout=0.0,
    ),
    "mistral-nemo": _shaped(
        _MISTRAL,
        131072,
        5120,
        14336,
        40,
        32,
        8,
        rope_theta=1e6,
        sliding_window=None,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    "qwen2.5-0.5b": _shaped(
        _QWEN2,
        151936,
        896,
        4864,
        24,
        14,
        2,
        use_mrope=False,
        max_window_layers=24,
        eos_token_id=151643,
    ),
    "qwen2.5-1.5b-instruct": _shaped(_QWEN2, 151936, 1536, 8960, 28, 12, 2),
    "qwen2.5-7b-instruct": _shaped(
        _QWEN2,
        152064,
        3584,
        18944,
        28,
        28,
        4,
        tie_word_embeddings=False,
        sliding_window=131072,
        max_window_layers=28,
    ),
    "qwen3-0.6b": _shaped(_QWEN3, 151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": _shaped(
        _QWEN3, 151936, 2560, 9728, 36, 32, 8, tie_word_embeddings=True, max_window_layers=36
    ),
    "gemma2-2b": _shaped(_GEMMA2, 256000, 2304, 9216, 26, 8, 4),
    "gemma3-270m": _shaped(
        _GEMMA3,
        262144,
        640,
        2048,
        18,
        4,
        1,
        _sliding_window_pattern=6,
        layer_types=_FIVE_OF_SIX,
        use_bidirectional_attention=False,
    ),
    "gemma3-1b-it": _shaped(_GEMMA3, 262144, 1152, 6912, 26, 4, 1, sliding_window_pattern=6),
    # Of the smallest one the text_config has neither a vocabulary nor heads.
    "gemma3-4b-it": _GEMMA3_SEEING
    | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "gemma3-12b-it": _GEMMA3_SEEING
    | {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
# Totals in the headers of the published weights; of the Gemma 3 models with images as
# tests/hub/test_presets.py says.
PARAMETERS = {
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-8b-instruct": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b-instruct": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-instruct": 1_711_376_384,
    "smollm3-3b-base": 3_075_098_624,
    "smollm3-3b": 3_075_098_624,
    "tinyllama": 1_100_048_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "gemma2-2b": 2_614_341_888,
    "gemma3-270m": 268_098_176,
    "gemma3-1b-it": 999_885_952,
    "gemma3-4b-it": 3_880_099_328 + 64 * 2560,
    "gemma3-12b-it": 11_765_788_416 + 64 * 3840,
}
# Fields of ModelConfig that a count of parameters does not show, where they are not the default.
EXPECTED: dict[str, Settings] = {
    **dict.fromkeys(
        ("llama3.1-8b", "llama3.1-8b-instruct"),
        {"theta": 500000.0, "scaling": "llama3", "factor": 8.0},
    ),
    **dict.fromkeys(
        ("llama3.2-1b", "llama3.2-3b-instruct"),
        {"theta": 500000.0, "scaling": "llama3", "factor": 32.0},
    ),
    **dict.fromkeys(
        ("smollm2-135m", "smollm2-135m-instruct", "smollm2-360m-instruct"), {"theta": 100000.0}
    ),
    "smollm2-1.7b-instruct": {"theta": 130000.0},
    **dict.fromkeys(
        ("smollm3-3b", "smollm3-3b-base"),
        {"theta": 5e6, "unrotated": tuple(range(3, 36, 4)), "norm_epsilon": 1e-6},
    ),
    "tinyllama": {"theta": 10000.0},
    "mistral-7b-v0.1": {"theta": 10000.0, "window": 4096, "windowed": tuple(range(32))},
    **dict.fromkeys(("mistral-7b-instruct-v0.3", "mistral-nemo"), {"theta": 1e6}),
    **dict.fromkeys(
        ("qwen2.5-0.5b", "qwen2.5-1.5b-instruct", "qwen2.5-7b-instruct"),
        {"theta": 1e6, "norm_epsilon": 1e-6},
    ),
    **dict.fromkeys(("qwen3-0.6b", "qwen3-4b"), {"theta": 1e6, "norm_epsilon": 1e-6}),
    "gemma2-2b": {
        "theta": 1e4,
        "norm_epsilon": 1e-6,
        "window": 4096,
        "windowed": tuple(range(0, 26, 2)),
        "attention_cap": 50.0,
        "logit_cap": 30.0,
    },
    **dict.fromkeys(
        ("gemma3-270m", "gemma3-1b-it"), {"theta": 1e6, "norm_epsilon": 1e-6, "window": 512}
    ),
    **dict.fromkeys(
        ("gemma3-4b-it", "gemma3-12b-it"),
        {"theta": 1e6, "norm_epsilon": 1e-6, "window": 1024, "scaling": "linear", "factor": 8.0},
    ),
}
# Said to the reader, and nothing else of these files.
LEFTOVERS = {"smollm2-135m": ("is_llama_config",)}
LEFTOVERS |= dict.fromkeys(
    (name for name in PUBLISHED if name.startswith("smollm2") and "instruct" in name),
    ("is_llama_config", "transformers.js_config"),
)
# Of files saved by trainers and converters; none of them changes a number.
FINE_TUNED = {
    "_name_or_path": "somewhere/a-model",
    "_model_name_or_path": "a-model",
    "_attn_implementation_autoset": True,
    "neftune_noise_alpha": 5,
    "is_llama_config": True,
    "rope_interleaved": False,
    "unsloth_version": "2025.3.19",
    "unsloth_fixed": True,
    "gradient_checkpointing": True,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "max_length": 20,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "do_sample": True,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_bfloat16": True,
    "use_mrope": False,
    "tokenizer_class": "LlamaTokenizer",
    "max_sequence_length": 4096,
    "use_cache": False,
}


def write(folder: pathlib.Path, fields: Settings) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_read_as_its_model(name, tmp_path):
    folder = write(tmp_path, PUBLISHED[name])
    config = config_json.read_config(folder)
    assert trees.count(LanguageModel(config).abstract_base()) == PARAMETERS[name]
    expected = dict(EXPECTED[name])
    rope = {
        field: expected.pop(field) for field in ("theta", "scaling", "factor") if field in expected
    }
    assert rope | {field: getattr(config.rope, field) for field in rope} == rope
    assert ("scaling" in rope) == (config.rope.scaling != "none")
    if name.startswith("gemma3"):
        expected |= {"windowed": tuple(layer for layer in range(config.layers) if (layer + 1) % 6)}
    default = {
        field: getattr(ModelConfig, field)
        for field in (
            "norm_epsilon",
            "window",
            "windowed",
            "unrotated",
            "attention_cap",
            "logit_cap",
        )
    }
    assert {field: getattr(config, field) for field in default} == default | expected
    assert config_json.leftovers(folder) == LEFTOVERS.get(name, ())


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_scales_are_those_of_transformers(name):
    pytest.importorskip("torch")
    config = config_json.from_json(PUBLISHED[name], name)
    theirs = transformers.AutoConfig.for_model(**PUBLISHED[name])
    family = theirs.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = next(
        getattr(module, found) for found in dir(module) if found.endswith("RotaryEmbedding")
    )
    buffers = dict(kind(theirs).named_buffers())
    for rope, buffer in (
        (config.rope, "inv_freq"),
        (config.rope, "full_attention_inv_freq"),
        (config.local_rope, "sliding_attention_inv_freq"),
    ):
        if buffer in buffers:
            np.testing.assert_allclose(
                attention.frequencies(rope, config.head_dim), buffers[buffer].numpy(), rtol=2e-6
            )
    assert {"inv_freq", "full_attention_inv_freq"} & set(buffers)
    scalar = getattr(theirs, "query_pre_attn_scalar", None) or config.head_dim
    assert config.attention_scale == pytest.approx(scalar**-0.5, rel=1e-12)
    assert (config.heads, config.kv_heads, config.vocab_size) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.vocab_size,
    )
    assert config.max_positions == theirs.max_position_embeddings


@pytest.mark.parametrize(
    "name",
    [
        "llama3.1-8b",
        "smollm3-3b",
        "mistral-7b-v0.1",
        "qwen2.5-0.5b",
        "qwen3-0.6b",
        "gemma2-2b",
        "gemma3-270m",
    ],
)
def test_what_fine_tuning_leaves_behind_changes_nothing(name):
    assert config_json.from_json(PUBLISHED[name] | FINE_TUNED, name) == config_json.from_json(
        PUBLISHED[name], name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama3.2-1b",
        "smollm2-135m-instruct",
        "smollm3-3b",
        "mistral-7b-v0.1",
        "qwen2.5-0.5b",
        "qwen3-0.6b",
        "gemma2-2b",
        "gemma3-270m",
    ],
)
def test_a_small_model_of_a_fine_tuned_file_gives_transformers_logits(name, tmp_path):
    fields = PUBLISHED[name]
    shape = {field: SIZES[field] for field in (*_SHAPE, "max_position_embeddings")} | {
        "hidden_size": 24
    }
    per_layer = {
        field: fields[field][: shape["num_hidden_layers"]]
        for field in ("no_rope_layers", "layer_types")
        if field in fields
    }
    less = (
        shape
        | per_layer
        | ({"head_dim": 6} if "head_dim" in fields else {})
        | ({"sliding_window": 5} if fields.get("sliding_window") else {})
    )
    ids = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": fields.get("tie_word_embeddings", True),
    }
    settings = {
        field: value
        for field, value in (fields | less | ids).items()
        if field not in ("model_type", "architectures", "torch_dtype")
    }
    folder = write_random(tmp_path, fields["model_type"], **settings)
    (folder / "config.json").write_text(
        json.dumps(fields | less | ids | FINE_TUNED), encoding="utf-8"
    )
    config = config_json.read_config(folder)
    base = weights.load_base(folder, config)
    tokens = small.make_tokens([("none", 17), ("left", 12), ("right", 9)], columns=17)
    theirs_BTV = small.torch_logits(small.load_torch(folder), tokens)
    mine_BTV = np.array(small.logits(LanguageModel(config), base, None, tokens))
    assert theirs_BTV[tokens.valid_BT].std() > 0.3
    np.testing.assert_allclose(mine_BTV[tokens.valid_BT], theirs_BTV[tokens.valid_BT], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("smollm2-135m", {"rope_interleaved": True}, "sets rope_interleaved True"),
        ("qwen2.5-0.5b", {"use_mrope": True}, "sets use_mrope True"),
        ("llama3.1-8b", {"pruned_heads": {"0": [1]}}, "sets pruned_heads {'0': [1]}"),
        ("llama3.1-8b", {"sliding_window": 4096}, "sets sliding_window 4096"),
        # An underscore is no pass for what another family reads.
        ("llama3.1-8b", {"_sliding_window_pattern": 6}, "sets _sliding_window_pattern 6"),
        (
            "llama3.1-8b",
            {"embedding_multiplier": 12.0, "neftune_noise_alpha": 5},
            "sets embedding_multiplier 12.0, which is not supported for llama",
        ),
        ("gemma3-270m", {"hidden_size": None}, "has no field 'hidden_size'"),
        ("qwen3-0.6b", {"vocab_size": None}, "has no field 'vocab_size'"),
        (
            "gemma3-4b-it",
            {"model_type": "gemma3", "text_config": PUBLISHED["gemma3-4b-it"]},
            "'gemma3'; its text model (gemma3_text) can be used",
        ),
    ],
)
def test_what_could_change_the_numbers_is_still_refused(name, fields, named):
    with pytest.raises(UserError) as error:
        config_json.from_json(PUBLISHED[name] | fields, "a file")
    assert named in str(error.value)


def test_one_line_names_what_is_not_read(tmp_path, capfd):
    folder = write_base(tmp_path / "base")
    load_model(ModelOptions(model=str(folder)))
    assert "do not affect outputs" not in capfd.readouterr().err
    small.change_config(folder, **FINE_TUNED)
    load_model(ModelOptions(model=str(folder)))
    lines = [
        line for line in capfd.readouterr().err.splitlines() if "do not affect outputs" in line
    ]
    silent = {"rope_interleaved", "tie_encoder_decoder", "pruned_heads", "use_mrope", "use_cache"}
    assert lines == [
        f"{folder}/config.json: these fields do not affect outputs and are ignored: "
        f"{', '.join(sorted(set(FINE_TUNED) - silent))}."
    ]
