"""Layers apart: the same numbers as a scan over their stack, and caches that are written where they
lie.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters import quantise
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.generation import sampling
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.sampling import SamplingConfig
from perl_jax.models import stacks
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import sharding, trees
from perl_jax.types import Prompts
from tests import small

PROMPTS = small.make_tokens((("none", 5), ("left", 3), ("left", 1), ("left", 0)), 5)
MIXED = small.changed(window=4, windowed=(0, 2), unrotated=(1,))


def sample(lm, base, adapter, samples=2, **settings):
    config = SamplingConfig(9, stop_ids=(7,), **settings)
    return sampling.sample(
        lm, base, adapter, PROMPTS.tokens_BT, PROMPTS.valid_BT, jax.random.key(4), config, samples
    )


def check_same(found, expected, atol=2e-5):
    np.testing.assert_array_equal(found.sequences.tokens_BT, expected.sequences.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=atol)
    assert int(found.steps) == int(expected.steps)


@pytest.mark.parametrize(
    "lm",
    [
        small.LM,
        MIXED,
        small.changed(biases=("q", "v"), qk_norm=True, tied_embeddings=False),
        small.changed(activation="gelu_tanh", logit_cap=3.0, sandwich_norms=True),
        small.changed(biases=("up", "down")),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"adapters": "merged", "stages": 4},
        {"adapters": "applied"},
        {"adapters": "applied", "fused": True},
    ],
)
def test_sampling_gives_the_same_tokens(lm, settings):
    base, adapter = small.make_base(lm), small.make_adapter(lm)
    check_same(
        sample(lm, base, adapter, inlined=True, **settings), sample(lm, base, adapter, **settings)
    )


def test_adapters_of_some_layers_what_lies_under_them_and_full_weights():
    base = small.make_base()
    some = small.make_adapter(lora=LoRAConfig(rank=4, targets="k,down", layers="1-2"))
    pissa = small.LM.init_adapter(jax.random.key(0), LoRAConfig(rank=2, init="pissa"), base)
    for weights, role in ((base, some), (base, pissa), (None, small.make_full(base)), (base, None)):
        check_same(
            sample(small.LM, weights, role, adapters="applied", inlined=True),
            sample(small.LM, weights, role, adapters="applied"),
        )


def test_quantised_matrices_and_caches():
    base = trees.map_named(
        lambda name, leaf: quantise.quantise_leaf(name, leaf, quantise.QuantiseConfig(kind="int8")),
        small.make_base(),
    )
    check_same(sample(small.LM, base, None, inlined=True), sample(small.LM, base, None), atol=1e-4)
    for cache in ("int8", "bfloat16"):
        # A sum in another order can round a key to the next of few values.
        check_same(
            sample(small.LM, small.make_base(), None, cache=cache, inlined=True),
            sample(small.LM, small.make_base(), None, cache=cache),
            atol=2e-2,
        )


def test_slots_give_the_same_tokens():
    base, adapter = small.make_base(), small.make_adapter()
    prompts = Prompts(
        np.array(PROMPTS.tokens_BT), np.array(PROMPTS.valid_BT), np.arange(4, dtype=np.int32)
    )
    made = []
    for inlined in (False, True):
        slots = ContinuousSampler(small.LM, SamplingConfig(9, stop_ids=(7,), inlined=inlined), 2, 4)
        made.append(slots(base, adapter, prompts, jax.random.key_data(jax.random.key(4))))
        assert slots.part.compilations == int(inlined)
    np.testing.assert_array_equal(made[0].sequences.tokens_BT, made[1].sequences.tokens_BT)
    np.testing.assert_allclose(made[0].logp_BT, made[1].logp_BT, atol=2e-5)


def test_a_layers_leaves():
    stack = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(3)}
    parted = stacks.unstack(stack)
    for index in range(3):
        for tree in (stack, parted):
            np.testing.assert_array_equal(stacks.take_layer(tree, index)["a"], stack["a"][index])
    mixed = stacks.take_layer({"one": parted, "other": stack}, 2)
    np.testing.assert_array_equal(mixed["one"]["b"], mixed["other"]["b"])
    doubled = stacks.map_stacks(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), parted)
    np.testing.assert_array_equal(doubled.layers[1]["a"], 2 * stack["a"][1])
    assert stacks.unstacked_outputs([None, None]) is None


def test_no_cache_and_no_matrix_is_copied_at_each_token():
    """In the compiled loop there are no slices of stacks of weights and no copies of a layer's keys
    or values.
    """
    lm, config = small.LM, SamplingConfig(24, adapters="merged")
    shapes = (jax.ShapeDtypeStruct((4, 5), jnp.int32), jax.ShapeDtypeStruct((4, 5), jnp.bool_))
    base = jax.eval_shape(lm.init_base, jax.random.key(0))
    heads, width = lm.config.kv_heads, lm.config.head_dim

    def moved(inlined: bool) -> int:
        function = functools.partial(
            sampling.sample, lm, config=dataclasses.replace(config, inlined=inlined), samples=2
        )
        text = jax.jit(function).lower(base, None, *shapes, jax.random.key(0)).compile().as_text()
        inside = [
            part
            for part in re.split(r"\n(?=%)", text)
            if part.split(" ")[0].removeprefix("%") in re.findall(r"body=%([\w.\-]+)", text)
        ]
        assert inside
        copies = re.findall(
            rf"f32\[(?:3,)?8,{heads},(?:24,{width}|{width},24)\]\S* copy\(", "".join(inside)
        )
        return len(copies) + len(re.findall(r"op_name=\"[^\"]*dynamic_slice\"", "".join(inside)))

    assert moved(True) == 0 < moved(False)


def test_products_of_few_rows_have_tokens_as_columns():
    """The compiled loop multiplies matrices that lie as they are read by [width, rows]; XLA turns
    the rest back where nothing forbids it.
    """
    lm, config = small.LM, SamplingConfig(24, adapters="merged", inlined=True)
    shapes = (jax.ShapeDtypeStruct((4, 5), jnp.int32), jax.ShapeDtypeStruct((4, 5), jnp.bool_))
    function = functools.partial(sampling.sample, lm, config=config, samples=2)
    text = (
        jax.jit(function)
        .lower(jax.eval_shape(lm.init_base, jax.random.key(0)), None, *shapes, jax.random.key(0))
        .compile()
        .as_text()
    )
    products = re.findall(r"f32\[([\d,]+)\]\S* (?:dot|fusion)\([^\n]*dot_general", text)
    width, ffn, vocabulary = lm.config.width, lm.config.ffn_width, lm.config.vocab_size
    for found, missing in (
        (f"{ffn},8", f"8,{ffn}"),
        (f"{width},8", None),
        (f"{vocabulary},8", f"8,{vocabulary}"),
    ):
        assert found in products and missing not in products, products


def test_turned_matrices():
    rng = np.random.default_rng(0)
    shapes = {"gate": (3, 4, 6), "up": (3, 4, 6), "down": (3, 6, 4)}
    stack = {
        "mlp": {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()},
        "attention": {"q": {"kernel": rng.normal(size=(3, 4, 5))}},
    }
    layer = stacks.take_layer(
        stacks.unstack(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stack)), 1
    )
    assert not stacks.is_transposed(layer["attention"]["q"]["kernel"])
    x_ND = rng.normal(size=(2, 4))
    found_NF = stacks.to_rows(
        layer["mlp"]["up"]["kernel"].times_columns(
            stacks.to_columns(jnp.asarray(x_ND, jnp.float32))
        )
    )
    np.testing.assert_allclose(
        found_NF, x_ND @ stack["mlp"]["up"]["kernel"][1], rtol=1e-5, atol=1e-6
    )


def test_over_several_devices_it_is_refused():
    lm = LanguageModel(small.CONFIG, sharding.make_mesh(sharding.MeshConfig(data=8)))
    with pytest.raises(ValueError, match="single device"):
        sampling.prepare_for_decoding(
            lm, small.make_base(), None, SamplingConfig(9, inlined=True), 1
        )
