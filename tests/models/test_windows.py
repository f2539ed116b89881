"""Layers with a sliding window keep no more tokens than the window has, and nothing else
changes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.generation import sampling
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.decoding import decode, prefill
from perl_jax.hub import config_json
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.attention_path import attention_paths, for_devices
from perl_jax.models.config import Rope
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.layer_kinds import periodic_scans
from perl_jax.planning.topology import topology
from perl_jax.runtime import trees
from perl_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from perl_jax.types import Prompts, Tokens
from tests import small
from tests.paths import GEMMA

WINDOW, SAMPLES, STEPS = 4, 2, 9
# Two local layers and a global one, twice, and a local one; another rotary table in local layers.
MIXED = small.changed(layers=7, window=WINDOW, windowed=(0, 1, 3, 4, 6), local_rope=Rope(100.0))
EVERY = small.changed(window=WINDOW, windowed=(0, 1, 2))
# Shorter than the window, as long, and longer; padded on every side.
PROMPTS = small.make_tokens((("left", 3), ("left", 4), ("right", 5), ("both", 9), ("none", 17)), 17)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [(0, 4, 1)]),
        ("llgllgl", [(0, 6, 3), (6, 7, 1)]),
        ("llllgllll", [(0, 4, 1), (4, 5, 1), (5, 9, 1)]),
        ("lglglg", [(0, 6, 2)]),
        ("ffffffwwwwww", [(0, 6, 1), (6, 12, 1)]),
        ("lllllg" * 4 + "ll", [(0, 24, 6), (24, 26, 1)]),
    ],
)
def test_layers_are_cut_into_few_turns(kinds, expected):
    assert periodic_scans(kinds, 0, len(kinds)) == expected
    # Every layer once, and in every turn of a scan the same kinds.
    assert [index for start, stop, _ in expected for index in range(start, stop)] == list(
        range(len(kinds))
    )
    for start, stop, period in expected:
        assert all(kinds[index] == kinds[index - period] for index in range(start + period, stop))


def test_only_some_of_the_layers_are_cut():
    assert periodic_scans("lglglgll", 1, 6) == [(1, 5, 2), (5, 6, 1)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(lm: LanguageModel, columns: tuple[int, ...], base, adapter, new_BC):
    """Logits of given tokens, decoded one after the other behind PROMPTS."""
    first_PV, cache = prefill(
        lm, base, adapter, PROMPTS.tokens_BT, PROMPTS.valid_BT, columns[0], SAMPLES
    )

    def step(cache, token_B):
        logits_BV, cache = decode(lm, base, adapter, token_B, cache)
        return cache, logits_BV

    out = [jnp.repeat(first_PV, SAMPLES, axis=0)[None]]
    for start, stop in zip((0, *columns), columns, strict=False):
        cache = cache.grown(stop)
        cache, logits_CBV = jax.lax.scan(step, cache, new_BC.T[start:stop])
        out.append(logits_CBV)
    return jnp.swapaxes(jnp.concatenate(out), 0, 1)


@pytest.mark.parametrize(
    ("lm", "columns"),
    [
        (MIXED, (STEPS,)),
        pytest.param(MIXED, (3, 6, STEPS), marks=pytest.mark.slow),
        pytest.param(EVERY, (2, STEPS), marks=pytest.mark.slow),
    ],
    ids=["mixed", "mixed-growing", "every"],
)
def test_a_cache_of_the_windows_length_gives_the_logits_of_the_whole_sequence(lm, columns):
    base, adapter = small.make_base(lm), small.make_adapter(lm)
    rows = SAMPLES * len(PROMPTS.tokens_BT)
    new_BC = np.random.default_rng(3).integers(61, size=(rows, STEPS), dtype=np.int32)
    wide = lambda x_PS: np.repeat(x_PS, SAMPLES, axis=0)
    tokens_BT = np.concatenate([wide(PROMPTS.tokens_BT), new_BC], axis=1)
    valid_BT = np.concatenate([wide(PROMPTS.valid_BT), np.ones(new_BC.shape, bool)], axis=1)
    full_BTV = np.asarray(small.logits(lm, base, adapter, Tokens(tokens_BT, valid_BT, valid_BT)))
    last_B = np.array([np.flatnonzero(valid_T)[-1] for valid_T in wide(PROMPTS.valid_BT)])
    expected = np.concatenate(
        [full_BTV[np.arange(rows), last_B][:, None], full_BTV[:, 17:]], axis=1
    )
    found = decoded(lm, columns, base, adapter, new_BC)
    np.testing.assert_allclose(found, expected, atol=3e-5)
    np.testing.assert_array_equal(np.argmax(found, axis=-1), np.argmax(expected, axis=-1))


def cache_of(lm: LanguageModel, room: int, kind: str = "auto"):
    read = lambda base: prefill(
        lm, base, None, PROMPTS.tokens_BT, PROMPTS.valid_BT, room, SAMPLES, kind
    )[1]
    return jax.eval_shape(read, lm.abstract_base())


@pytest.mark.parametrize(("kind", "size"), [("auto", 4 * 6), ("bfloat16", 2 * 6), ("int8", 6 + 4)])
def test_what_the_cache_holds(kind, size):
    """5 prompts of 17 columns, 10 rows of 30; keys and values of 2 heads of 6 numbers; 5 layers
    with a window of 4, 2 without.
    """
    local, whole = cache_of(MIXED, 30, kind).parts
    assert (local.window, whole.window) == (WINDOW, None)
    shapes = lambda part: [kept.values.shape for kept in part.by_layer]
    assert shapes(whole) == [(2, 5, 2, 17, 6)] * 2 + [(2, 10, 2, 30, 6)] * 2
    assert shapes(local) == [(5, 5, 2, 4, 6)] * 2 + [(5, 10, 2, 4, 6)] * 2
    held = lambda part: trees.size_bytes(part.by_layer)
    assert held(whole) == 2 * 2 * 2 * (5 * 17 + 10 * 30) * size
    # Of 385 tokens a layer and head 60 are left.
    assert held(local) == 5 * 2 * 2 * (5 * 4 + 10 * 4) * size
    # Of fewer tokens than the window nothing is made up.
    assert cache_of(MIXED, 3).parts[0].own_k.values.shape == (5, 10, 2, 3, 6)


def test_the_paths_are_said_with_the_window():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = attention_paths(LanguageModel(for_devices(MIXED.config, mesh), mesh))
    assert found["sampling"].startswith("prompts blocked, ") and found["sampling"].endswith(
        "holds 4 tokens in 5 of 7 layers"
    )
    asked = attention_paths(LanguageModel(for_devices(MIXED.config, mesh, "plain"), mesh))
    assert asked["training"] == "plain (--attention asks for it)"


@pytest.mark.slow
@pytest.mark.parametrize("lm", [MIXED, EVERY], ids=["mixed", "every"])
def test_slots_that_are_filled_again_give_the_same_tokens(lm):
    given = Prompts(PROMPTS.tokens_BT, PROMPTS.valid_BT, np.arange(5, dtype=np.int32))
    config = SamplingConfig(24, stop_ids=(3, 11, 29, 40, 50), pad_id=60)
    base, key = small.make_base(lm), np.array([0, 4], np.uint32)
    expected = sampling.sample_prompts(lm, config, 2, base, None, given, key)
    made = ContinuousSampler(lm, config, 2, 4, chunk=3)(base, None, given, key)
    lengths = np.asarray(expected.sequences.response_BT).sum(axis=1)
    assert lengths.max() > 2 * WINDOW > lengths.min()
    small.assert_same(expected.sequences, made.sequences)
    np.testing.assert_allclose(made.logp_BT, expected.logp_BT, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "short"),
    [("float32", "f32"), pytest.param("bfloat16", "bf16", marks=pytest.mark.exhaustive)],
)
def test_decoding_with_windows_compiles_for_tpus(dtype, short):
    """Prompts and the decode loop of a model split over four chips, both caches inside; in float32
    with the highest precision everywhere.
    """
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), topology("v5e:2x2"))
    lm = LanguageModel(
        dataclasses.replace(
            MIXED.config, head_dim=8, dtype=dtype, param_dtype=dtype, attention="splash"
        ),
        mesh,
    )
    places = lm.base_shardings()
    base = trees.map_named(
        lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]),
        lm.abstract_base(),
    )
    rows = lambda dtype: jax.ShapeDtypeStruct((4, 140), dtype, sharding=batch_sharding(mesh))
    sample = functools.partial(sampling.sample, lm, config=SamplingConfig(150), samples=2)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(mesh))
    text = (
        jax.jit(sample)
        .trace(base, None, rows(jnp.int32), rows(jnp.bool_), key)
        .lower(lowering_platforms=("tpu",))
        .compile()
        .as_text()
    )
    # Of a device: 4 of 8 rows and one of 2 heads; 5 layers of 4 tokens, 2 of 150.
    assert (
        f"{short}[5,4,1,4,8]" in text
        and f"{short}[2,4,1,150,8]" in text
        and f"{short}[7,4,1,150,8]" not in text
    )


@pytest.mark.exhaustive
@pytest.mark.skipif(
    GEMMA is None or not GEMMA.is_dir(), reason="needs Gemma 3 270M in PERL_JAX_MODELS"
)
def test_gemma_3_decodes_beyond_its_window():
    """15 of 18 layers have a window of 512: 530 tokens and eight more, against the whole sequences
    without a cache.
    """
    config = dataclasses.replace(
        config_json.read_config(GEMMA, dtype="float32", param_dtype="float32"), attention="blocked"
    )
    lm = LanguageModel(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    base = hf_checkpoint.load_base(GEMMA, config, lm.base_shardings())
    length, more = 530, 8
    tokens_BT = np.random.default_rng(0).integers(2, 20000, size=(1, length + more), dtype=np.int32)
    valid_BT = np.ones(tokens_BT.shape, bool)

    @jax.jit
    def both(base):
        hidden_BTD = lm.hidden(base, None, tokens_BT, valid_BT)
        full = lm.logits_of(base, None, hidden_BTD[:, length - 1 :], lm.placement())
        first_BV, cache = prefill(lm, base, None, tokens_BT[:, :length], valid_BT[:, :length], more)

        def step(cache, token_B):
            logits_BV, cache = decode(lm, base, None, token_B, cache)
            return cache, logits_BV

        cache, rest = jax.lax.scan(step, cache, tokens_BT.T[length:])
        return (
            full[0],
            jnp.concatenate([first_BV, rest[:, 0]]),
            [part.prompt_k.values for part in cache.parts],
        )

    full_CV, found_CV, held = both(base)
    assert [(x.shape[0], x.shape[3]) for x in held] == [(15, 512), (3, 530)]
    np.testing.assert_allclose(found_CV, full_CV, atol=2e-3)
    np.testing.assert_array_equal(np.argmax(found_CV, axis=-1), np.argmax(full_CV, axis=-1))
