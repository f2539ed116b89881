"""Every family against transformers: random checkpoints written by it, read here, the same
numbers.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.generation.decoding import decode, prefill
from perl_jax.hub import config_json, peft, weights
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees
from perl_jax.types import Tokens, Tree
from tests import small

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# (model_type, settings): each field that changes the numbers takes a value other than its default.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "llama",
        {
            "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16},
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "head_dim": None, "hidden_size": 24}),
    "smollm3-window": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "no_rope_layer_interval": 2,
            "head_dim": None,
            "hidden_size": 24,
        },
    ),
    "qwen2": ("qwen2", {"head_dim": None, "hidden_size": 40}),
    "qwen2-window": (
        "qwen2",
        {
            "head_dim": None,
            "hidden_size": 40,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3-window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 11,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
}


def write_random(folder: pathlib.Path, kind: str, **settings: Any) -> pathlib.Path:
    """A random checkpoint of a family, written by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {
        name: value
        for name, value in (SIZES | IDS | settings).items()
        if value is not None or name == "sliding_window"
    }
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            # Gemma's norms multiply by 1 + scale; 0.3 of noise is far from their initial value too.
            parameter.copy_(
                (0.0 if "gemma" in kind else 1.0) + 0.3 * noise if "norm" in name else 0.2 * noise
            )
    model.save_pretrained(folder)
    return folder


@functools.cache
def _written(root: pathlib.Path, case: str) -> pathlib.Path:
    kind, settings = CASES[case]
    return write_random(root / "families" / case, kind, **settings)


@pytest.fixture(params=CASES)
def case(request, tmp_path_factory) -> pathlib.Path:
    """The folder of each family's checkpoint."""
    return _written(tmp_path_factory.getbasetemp(), request.param)


def load(folder: pathlib.Path) -> tuple[LanguageModel, Tree]:
    config = config_json.read_config(folder)
    return LanguageModel(config), weights.load_base(folder, config)


def test_logits_equal_transformers_on_padded_rows_longer_than_the_window(case):
    lm, base = load(case)
    rows = [("none", 17), ("left", 12), ("right", 12), ("both", 9), ("left", 1)]
    tokens = small.make_tokens(rows, columns=17)
    theirs_BTV = small.torch_logits(small.load_torch(case), tokens)
    mine_BTV = np.array(small.logits(lm, base, None, tokens))
    assert theirs_BTV[tokens.valid_BT].std() > 0.3
    np.testing.assert_allclose(mine_BTV[tokens.valid_BT], theirs_BTV[tokens.valid_BT], atol=1e-4)


def test_cached_decoding_equals_the_full_forward(case):
    lm, base = load(case)
    prompt = small.make_tokens([("none", 7), ("left", 4), ("left", 1)], columns=7)
    new_BC = np.random.default_rng(5).integers(61, size=(3, 9), dtype=np.int32)
    tokens_BT = np.concatenate([prompt.tokens_BT, new_BC], axis=1)
    valid_BT = np.concatenate([prompt.valid_BT, np.ones(new_BC.shape, bool)], axis=1)
    full_BTV = small.logits(lm, base, None, Tokens(tokens_BT, valid_BT, valid_BT))
    first_BV, rest_BCV = _decode(lm, base, prompt, new_BC)
    np.testing.assert_allclose(first_BV, full_BTV[:, 6], atol=2e-5)
    np.testing.assert_allclose(rest_BCV, full_BTV[:, 7:], atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def _decode(lm, base, prompt, new_BC):
    first_BV, cache = prefill(lm, base, None, prompt.tokens_BT, prompt.valid_BT, 18)

    def step(cache, token_B):
        logits_BV, cache = decode(lm, base, None, token_B, cache)
        return cache, logits_BV

    return first_BV, jnp.swapaxes(jax.lax.scan(step, cache, new_BC.T)[1], 0, 1)


@pytest.mark.slow
def test_sft_gradients_of_an_adapter_equal_pefts(case):
    # The same random LoRA on every linear layer, by PEFT and here; d loss / d A and d loss / d B.
    torch, peft_library = pytest.importorskip("torch"), pytest.importorskip("peft")
    lm, base = load(case)
    torch.manual_seed(2)
    config = peft_library.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft_library.get_peft_model(small.load_torch(case), config).eval()
    leaves = {
        name.replace(".default", ""): leaf
        for name, leaf in model.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(0.2 * torch.randn(leaf.shape))
    tokens = small.make_tokens([("none", 11), ("left", 9), ("right", 7)])
    small.torch_sft_loss(model(**small.torch_inputs(tokens)).logits, tokens).backward()
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}
    role = peft.from_peft(
        values, {name: leaf.detach().numpy() for name, leaf in leaves.items()}, lm.config
    )
    expected = peft.from_peft(
        values, {name: leaf.grad.numpy() for name, leaf in leaves.items()}, lm.config
    )
    _, grads = small.gradient(small.sft_loss, lm, role, base, tokens)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.lora))
    assert largest > 1e-3
    for (name, mine), theirs in zip(
        trees.named_leaves(grads.lora).items(), jax.tree.leaves(expected.lora), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * max(1.0, largest), err_msg=name)


def test_a_window_hides_what_lies_further_back():
    # One layer with a window of 3: the logits at column t do not move with tokens before t - 2.
    lm = small.changed(window=3, windowed=(0,), layers=1)
    base, tokens = small.make_base(lm), small.make_tokens([("none", 9)], columns=9)
    other = tokens.replace(
        tokens_BT=np.concatenate(
            [(tokens.tokens_BT[:, :4] + 1) % 61, tokens.tokens_BT[:, 4:]], axis=1
        )
    )
    difference_T = np.abs(
        small.logits(lm, base, None, tokens) - small.logits(lm, base, None, other)
    ).max(axis=(0, 2))
    assert (difference_T[:6] > 1e-3).all() and (difference_T[6:] == 0).all()


# Older files, and refusals.


def copy(tmp_path: pathlib.Path, tmp_path_factory, case: str) -> pathlib.Path:
    return pathlib.Path(
        shutil.copytree(_written(tmp_path_factory.getbasetemp(), case), tmp_path / case)
    )


def test_fields_as_older_files_spell_them(tmp_path, tmp_path_factory):
    llama, gemma = (
        copy(tmp_path, tmp_path_factory, "llama3"),
        copy(tmp_path, tmp_path_factory, "gemma3"),
    )
    before = config_json.read_config(llama), config_json.read_config(gemma)
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"} | {
        "original_max_position_embeddings": 16
    }
    small.change_config(llama, rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)
    small.change_config(
        gemma,
        rope_parameters=...,
        layer_types=...,
        sliding_window_pattern=6,
        rope_theta=1000.0,
        rope_local_base_freq=100.0,
    )
    small.change_config(gemma, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (config_json.read_config(llama), config_json.read_config(gemma)) == before
    assert before[1].windowed == (0, 1, 2, 3, 4, 6) and before[1].local_rope.theta == 100.0


def test_a_gemma_without_caps_has_none(tmp_path, tmp_path_factory):
    folder = copy(tmp_path, tmp_path_factory, "gemma2")
    small.change_config(folder, attn_logit_softcapping=None, final_logit_softcapping=None)
    config = config_json.read_config(folder)
    assert config.attention_cap is None and config.logit_cap is None


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope type 'yarn'; supported: default, linear, llama3",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor 0.5",
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5; only 1.0 is supported",
        ),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1; only 0.0 is supported"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config {'bits': 4}; only None is supported",
        ),
        (
            "llama",
            {"residual_multiplier": 0.2},
            "sets residual_multiplier 0.2, which is not supported for llama",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"] * 2},
            "chunked_attention",
        ),
        (
            "gemma2",
            {"hidden_activation": "relu"},
            "hidden_activation 'relu'; supported: silu, swish, gelu_pytorch_tanh",
        ),
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention True; only False is supported",
        ),
        (
            "mistral",
            {"model_type": "mixtral"},
            "model_type 'mixtral'; supported: llama, mistral, smollm3, qwen2, qwen3, gemma2, "
            "gemma3_text",
        ),
        ("mistral", {"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, tmp_path_factory, case, fields, message):
    folder = copy(tmp_path, tmp_path_factory, case)
    small.change_config(folder, **fields)
    with pytest.raises(UserError) as error:
        config_json.read_config(folder)
    assert message in str(error.value) and "config.json" in str(error.value)


def test_a_field_that_is_off_is_no_reason_to_refuse(tmp_path, tmp_path_factory):
    folder = copy(tmp_path, tmp_path_factory, "llama")
    before = config_json.read_config(folder)
    small.change_config(
        folder, residual_multiplier=None, use_something=False, extra=[], unsloth_version="2025.1"
    )
    assert config_json.read_config(folder) == before


def test_only_a_plain_llama_is_written_as_one():
    with pytest.raises(ValueError, match="biases"):
        config_json.llama_json(small.changed(biases=("q",)).config, small.TOKEN_IDS)
    with pytest.raises(ValueError, match="scaled_embedding"):
        config_json.llama_json(small.changed(scaled_embedding=True).config, small.TOKEN_IDS)
