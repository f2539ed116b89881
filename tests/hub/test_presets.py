"""Presets against published counts of parameters, transformers' config classes and released
files.
"""

from __future__ import annotations

import copy
import json

import pytest
import transformers

from perl_jax.errors import UserError
from perl_jax.hub import config_json, presets
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees

# Keras Hub's registry of weights (keras-team/keras-hub, keras_hub/src/models/*/*_presets.py,
# "params"); of Gemma 3 its text models, whose embedding has 262,144 rows. Llama 3.1's are the
# totals in the headers of the hub's safetensors (as debaditc/kvfit lists them,
# src/kvfit/data/models.json; its 70B is Llama 3.3's), which for gemma2-9b, gemma2-27b, qwen3-8b and
# qwen3-32b are Keras Hub's numbers too.
PUBLISHED = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_099_328,
    "gemma3-12b": 11_765_788_416,
    "gemma3-27b": 27_009_002_240,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# In those headers, vision tower and projection included; Keras Hub has medgemma's 4B and 27B the
# same.
WITH_VISION = {
    "gemma3-4b": 4_300_079_472,
    "gemma3-12b": 12_187_325_040,
    "gemma3-27b": 27_432_406_640,
}


def count(config: ModelConfig) -> int:
    return trees.count(LanguageModel(config).abstract_base())


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameters_are_as_many_as_published(name):
    rows = {"vocab_size": 262_144} if name in WITH_VISION else {}
    assert count(presets.preset(name, **rows)) == PUBLISHED[name]


@pytest.mark.parametrize("name", WITH_VISION)
def test_what_a_released_gemma_3_has_beyond_the_preset_is_its_vision_tower(name):
    # SigLIP (transformers' convert_gemma3_weights.py): patches of 14 x 14 in 896 x 896, 27 layers.
    width, ffn, layers, patch, positions = 1152, 4304, 27, 3 * 14**2, (896 // 14) ** 2
    attention, mlp, norms = (
        4 * (width + 1) * width,
        (width + 1) * ffn + (ffn + 1) * width,
        2 * 2 * width,
    )
    tower = (patch + 1) * width + positions * width + layers * (attention + mlp + norms) + 2 * width
    config = presets.preset(name)
    projection = width + width * config.width
    assert config.vocab_size == 262_144 + 64
    assert count(config) + tower + projection == WITH_VISION[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_transformers_keeps_every_field_and_its_folder_is_read_as_the_preset(name, tmp_path):
    fields = copy.deepcopy(presets.PRESETS[name])
    theirs = transformers.AutoConfig.for_model(**fields)
    kept = theirs.to_dict()
    assert {field: kept[field] for field in fields} == presets.PRESETS[name]
    theirs.save_pretrained(tmp_path)
    assert presets.model_config(str(tmp_path)) == presets.model_config(name) == presets.preset(name)


def test_reading_fields_leaves_them_as_they_are():
    # The config class writes the theta that is missing into the dict it is given.
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default"},
    }
    fields = presets.PRESETS["gemma3-4b"] | {"rope_parameters": rope}
    before = copy.deepcopy(fields)
    assert config_json.from_json(fields, "fields") == presets.preset("gemma3-4b")
    assert fields == before


# What files on the hub say, as they spell it, less ids of tokens and the like: google/gemma-2-27b,
# google/gemma-3-1b-it, the text_config of google/gemma-3-27b-it with the vocabulary that its class
# has by default, meta-llama/Llama-3.1-8B-Instruct and Qwen/Qwen3-32B.
RELEASED = {
    "gemma2-27b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "cache_implementation": "hybrid",
        "torch_dtype": "float32",
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "torch_dtype": "bfloat16",
    },
    "gemma3-27b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "llama3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 40960,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 64,
        "torch_dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_is_read_as_the_preset(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]), encoding="utf-8")
    assert presets.model_config(str(tmp_path)) == presets.preset(name)


def test_what_counts_of_parameters_cannot_show():
    config = {name: presets.preset(name) for name in presets.PRESETS}
    windows = {name: one.window for name, one in config.items() if one.windowed}
    assert windows == {
        "gemma2-2b": 4096,
        "gemma2-9b": 4096,
        "gemma2-27b": 4096,
        "gemma3-1b": 512,
        "gemma3-4b": 1024,
        "gemma3-12b": 1024,
        "gemma3-27b": 1024,
    }
    for name in windows:
        every = 2 if "gemma2" in name else 6
        assert config[name].windowed == tuple(
            layer for layer in range(config[name].layers) if (layer + 1) % every
        ), name
    # Queries are scaled by 1 / sqrt of these.
    over_heads = {"gemma2-27b": 4608 // 32, "gemma3-27b": 5376 // 32}
    for name, one in config.items():
        assert one.attention_scale == pytest.approx(
            over_heads.get(name, one.head_dim) ** -0.5, rel=1e-12
        ), name
    untied = {name for name, one in config.items() if not one.tied_embeddings}
    assert untied == {"llama3.1-8b", "llama3.1-70b", "qwen3-8b", "qwen3-14b", "qwen3-32b"}


def test_overrides_change_fields_of_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["qwen3-32b"]), encoding="utf-8")
    changed = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full", "layers": 2}
    for model in ("qwen3-32b", str(tmp_path)):
        config = presets.model_config(model, **changed)
        assert {field: getattr(config, field) for field in changed} == changed
        assert config.width == 5120
    with pytest.raises(UserError, match=r"model\.dtype is 'float8'"):
        presets.preset("qwen3-8b", dtype="float8")


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError) as error:
        presets.preset("gemma2-3b")
    assert "preset is 'gemma2-3b'; it must be one of gemma2-2b, gemma2-9b," in str(
        error.value
    ) and "qwen3-32b." in str(error.value)
    with pytest.raises(UserError) as error:
        presets.model_config(str(tmp_path / "absent"))
    assert "absent'; it must be a folder with a config.json or one of gemma2-2b, gemma2-9b," in str(
        error.value
    )
    with pytest.raises(UserError, match=r"There is no file .*config\.json"):
        presets.model_config(str(tmp_path))
