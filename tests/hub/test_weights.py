"""Weights and configs: the same numbers as transformers, in both directions, and refusals by
name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors import numpy as safetensors

from perl_jax.errors import UserError
from perl_jax.hub import config_json, weights
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import sharding, trees
from tests import small
from tests.paths import STORIES

needs_stories = pytest.mark.skipif(
    STORIES is None or not STORIES.is_dir(), reason="no stories260k model here"
)


def load(folder: pathlib.Path, **options):
    """The model and its base."""
    config = config_json.read_config(folder, **options)
    return LanguageModel(config), weights.load_base(folder, config)


def write_llama(folder: pathlib.Path, *, dtype: str = "float32", shard: str = "50GB", **settings):
    """A random Llama, written by transformers: 8 query heads over 2, no two widths alike."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    defaults = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    defaults |= {
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**defaults | settings)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


@functools.cache
def cached_llama(folder: pathlib.Path) -> pathlib.Path:
    return write_llama(folder)


@pytest.fixture
def llama(tmp_path, tmp_path_factory) -> pathlib.Path:
    """A copy of an untied float32 Llama that a test may break."""
    source = cached_llama(tmp_path_factory.getbasetemp() / "llama")
    return pathlib.Path(shutil.copytree(source, tmp_path / "llama"))


def assert_same_logits(lm, base, model, tokens, atol=1e-4) -> None:
    mine_BTV, other_BTV = (
        np.array(small.logits(lm, base, None, tokens)),
        small.torch_logits(model, tokens),
    )
    assert other_BTV[tokens.valid_BT].std() > 0.3
    np.testing.assert_allclose(mine_BTV[tokens.valid_BT], other_BTV[tokens.valid_BT], atol=atol)


# The same numbers as transformers.


@needs_stories
def test_stories_logits_equal_transformers():
    lm, base = load(STORIES)
    assert lm.config.layers == 5 and lm.config.kv_heads == 4 and lm.config.tied_embeddings
    assert trees.count(base) == 260_032
    assert_same_logits(lm, base, small.load_torch(STORIES), small.make_tokens(vocab=512))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 100.0, "shard": "20KB"},
        {"num_key_value_heads": 8, "head_dim": 10, "dtype": "bfloat16"},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": "float16"},
    ],
    ids=["untied", "tied-sharded", "bfloat16", "float16"],
)
def test_random_llamas_equal_transformers(tmp_path, settings):
    if "rope_theta" in settings:
        settings = settings | {
            "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_theta"]}
        }
        settings.pop("rope_theta")
    write_llama(tmp_path, **settings)
    sharded = "shard" in settings
    assert (
        (len(list(tmp_path.glob("*.safetensors"))) > 2)
        == sharded
        == (tmp_path / "model.safetensors.index.json").exists()
    )
    lm, base = load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("float32")}
    model, tokens = small.load_torch(tmp_path), small.make_tokens()
    assert_same_logits(lm, base, model, tokens)
    # Back: what this package writes, transformers reads as the same model.
    weights.save_base(tmp_path / "again", lm.config, base, small.TOKEN_IDS)
    again = small.load_torch(tmp_path / "again")
    np.testing.assert_array_equal(
        small.torch_logits(again, tokens), small.torch_logits(model, tokens)
    )
    assert again.config.eos_token_id == 2
    config, (_, base_again) = dataclasses.asdict(lm.config), load(tmp_path / "again")
    assert dataclasses.asdict(config_json.read_config(tmp_path / "again")) == config
    small.assert_same(base_again, base)


def test_a_tied_models_own_output_tensor_is_ignored(tmp_path):
    # Some writers store the tied projection a second time.
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    tensors = safetensors.load_file(folder / "model.safetensors")
    _, base = load(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    small.assert_same(load(folder)[1], base)


def test_bfloat16_loads_are_rounded_float32_loads(llama):
    _, base = load(llama)
    lm, low = load(llama, param_dtype="bfloat16", dtype="bfloat16", remat="full")
    assert (lm.config.dtype, lm.config.param_dtype, lm.config.remat) == (
        "bfloat16",
        "bfloat16",
        "full",
    )
    small.assert_same(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base))
    # Written in its own dtype.
    weights.save_base(llama / "low", lm.config, low, small.TOKEN_IDS)
    stored = safetensors.load_file(llama / "low" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {jnp.dtype("bfloat16")}
    small.assert_same(load(llama / "low", param_dtype="bfloat16")[1], low)


def test_leaves_go_where_they_are_placed(llama):
    config = config_json.read_config(llama)
    names = trees.named_leaves(LanguageModel(config).abstract_base())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    base = weights.load_base(llama, config, dict.fromkeys(names, place))
    assert {device for leaf in jax.tree.leaves(base) for device in leaf.devices()} == {
        jax.devices()[3]
    }
    small.assert_same(jax.device_get(base), jax.device_get(weights.load_base(llama, config)))


@pytest.mark.parametrize("piece_bytes", [1, 700, 2**26])
def test_parts_read_in_pieces_make_the_whole(monkeypatch, llama, piece_bytes):
    # Split over 8 devices as the rules say, read a row, some rows and all rows at a time.
    monkeypatch.setattr(weights, "_PIECE_BYTES", piece_bytes)
    lm, whole = load(llama)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    places = dataclasses.replace(lm, mesh=mesh).base_shardings()
    split = weights.load_base(llama, lm.config, places)
    assert {name: leaf.sharding for name, leaf in trees.named_leaves(split).items()} == places
    assert (
        max(
            len({str(shard.index) for shard in leaf.addressable_shards})
            for leaf in jax.tree.leaves(split)
        )
        == 8
    )
    for (name, a), b in zip(trees.named_leaves(split).items(), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_single_file_comes_before_an_index_that_an_earlier_save_left(llama):
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    _, before = load(llama)
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    small.assert_same(load(llama)[1], before)


# Fingerprints.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fingerprint_does_not_depend_on_the_dtype_of_the_load(tmp_path, dtype):
    folder = write_llama(tmp_path, dtype=dtype)
    prints = {
        trees.fingerprint(load(folder, param_dtype=param_dtype)[1])
        for param_dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 1 and len(prints.pop()) == 16


def test_a_sample_of_stored_weights_is_of_every_tensors_rows(tmp_path):
    """Vectors whole, of a matrix each second of its 40 rows: those, and no others, tell one file
    from another.
    """
    noise = np.random.default_rng(0)
    tensors = {
        "matrix": noise.standard_normal((40, 6)).astype(jnp.bfloat16),
        "vector": noise.standard_normal(50).astype(np.float32),
        "few": noise.standard_normal((3, 5)).astype(np.float16),
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    digest = lambda array: hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()
    assert weights.sampled_content(tmp_path) == {
        "matrix": ["BF16", [40, 6], digest(tensors["matrix"][::2])],
        "vector": ["F32", [50], digest(tensors["vector"])],
        "few": ["F16", [3, 5], digest(tensors["few"])],
    }


def test_fingerprint_tells_a_change_of_any_layer(llama):
    _, base = load(llama)
    base, seen = jax.tree.map(np.array, base), {trees.fingerprint(base)}
    assert trees.fingerprint(jax.tree.map(jnp.asarray, base)) in seen
    names = trees.named_leaves(base)
    for changed in names:
        for index in range(3 if changed.startswith("layers") else 1):
            part = (index,) if changed.startswith("layers") else ...
            scale = np.ones_like(names[changed])
            scale[part] = 1.02
            seen.add(
                trees.fingerprint(
                    trees.map_named(
                        lambda name, leaf: leaf * scale if name == changed else leaf, base
                    )
                )
            )
    assert len(seen) == 1 + 3 * 9 + 3


# Refusals.


def test_tensors_that_do_not_fit_are_all_named_in_one_error(llama):
    tensors = safetensors.load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((13, 32), np.float32)
    safetensors.save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(llama)
    for text in (
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.self_attn.k_proj.weight has shape (13, 32), config.json asks for (12, 32)",
    ):
        assert text in str(error.value)
    assert str(llama) in str(error.value)


def test_a_config_of_another_size_is_refused(llama):
    small.change_config(llama, num_hidden_layers=2, intermediate_size=45)
    with pytest.raises(
        UserError,
        match=r"unexpected model.layers.2.*down_proj.weight has shape \(32, 44\), config.json "
        r"asks for \(32, 45\)",
    ):
        load(llama)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights_are_refused(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        load(llama)


def test_missing_files_are_refused(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"There is no file .*model\.safetensors; weights are read from safetensors only",
    ):
        load(llama)
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001.safetensors"}})
    )
    with pytest.raises(UserError, match=r"There is no file .*model-00001\.safetensors"):
        load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match=r"There is no file .*config\.json"):
        load(llama)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; supported: llama, mistral"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        ({"hidden_size": ...}, "config.json has no field 'hidden_size'"),
        ({"num_attention_heads": ...}, "config.json has no field 'num_attention_heads'"),
        ({"vocab_size": ...}, "config.json has no field 'vocab_size'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(llama, fields, message):
    small.change_config(llama, **fields)
    with pytest.raises(UserError) as error:
        config_json.read_config(llama)
    assert message in str(error.value) and "config.json" in str(error.value)


def test_explicit_nulls_mean_the_default(llama):
    # 32 wide, 4 heads: head_dim 8 and as many key/value heads.
    nulls = {
        "rope_scaling": None,
        "rope_parameters": None,
        "num_key_value_heads": None,
        "head_dim": None,
    }
    small.change_config(llama, num_attention_heads=4, **nulls)
    config = config_json.read_config(llama)
    assert (config.kv_heads, config.head_dim, config.rope.theta) == (4, 8, 10000.0)
    small.change_config(llama, rope_theta=500.0)
    assert config_json.read_config(llama).rope.theta == 500.0
    small.change_config(
        llama, **dict.fromkeys(nulls, ...), tie_word_embeddings=..., rms_norm_eps=...
    )
    config = config_json.read_config(llama)
    assert (config.kv_heads, config.head_dim, config.tied_embeddings, config.norm_epsilon) == (
        4,
        8,
        False,
        1e-6,
    )


# Finding a model.


def test_a_folder_is_its_own_model(llama):
    assert weights.find_model(str(llama)) == llama


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such-folder", "../no-such-folder"])
def test_a_folder_that_is_not_there_is_no_hub_name(model):
    with pytest.raises(UserError, match="There is no model folder"):
        weights.find_model(model)


@pytest.mark.parametrize("model", ["no-such-owner/no-such-model", "three/part/name"])
def test_a_name_the_hub_cannot_give_is_refused(model):
    with pytest.raises(
        UserError, match=f"{model} is neither a local folder nor a model that the hub provides"
    ):
        weights.find_model(model)


def hub_error(kind: type[Exception], status: int) -> Exception:
    """An error as the hub's client raises it for a status."""
    response = types.SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("first line\nsecond", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError, 403), "Accept its terms at https://huggingface.co/a/b"),
        (hub_error(errors.RepositoryNotFoundError, 401), "there is none of this name, or it is"),
        (hub_error(errors.RepositoryNotFoundError, 404), "there is none of this name, or it is"),
        (hub_error(errors.HfHubHTTPError, 401), "the hub refused access (401). Set HF_TOKEN to a"),
        (hub_error(errors.RevisionNotFoundError, 404), "it has no such revision"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached from here (no network"),
        (hub_error(errors.HfHubHTTPError, 500), "first line"),
        (ConnectionError("no route"), "no route"),
    ],
)
@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_why_the_hub_gives_no_model_is_one_sentence(error, message, token, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as found:
        weights.find_model("a/b@main")
    said = str(found.value)
    assert message in said and "\n" not in said and "hf_secret" not in said
    if "HF_TOKEN" in message or "Accept" in message:
        assert f"HF_TOKEN is {'set' if token else 'not set'}" in said
