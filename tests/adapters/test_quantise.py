"""A base in 8 or 4 bits: its rounding by hand, the same functions over it, and who is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig, dense, is_quantised, quantise_leaf
from perl_jax.errors import UserError
from perl_jax.generation.decoding import decode, prefill
from perl_jax.runtime import trees
from tests import small

BASE = small.make_base()
TOKENS = small.make_tokens()
CONFIGS = {
    "int8": QuantiseConfig("int8"),
    "int4": QuantiseConfig("int4", 4),
    "nf4": QuantiseConfig("nf4", 4),
}


@functools.cache
def quantised(name: str):
    return trees.map_named(
        lambda leaf_name, leaf: quantise_leaf(leaf_name, leaf, CONFIGS[name]), BASE
    )


def made_dense(base):
    """The weights that a quantised base stands for."""
    return jax.tree.map(dense, base, is_leaf=is_quantised)


def test_int8_rounds_to_255_steps_over_each_outputs_range():
    kernel = np.asarray(trees.named_leaves(BASE)["layers/mlp/up/kernel"], np.float64)
    scale = np.abs(kernel).max(axis=1, keepdims=True) / 127.5
    found = np.asarray(
        trees.named_leaves(made_dense(quantised("int8")))["layers/mlp/up/kernel"], np.float64
    )
    steps = found / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert np.abs(steps).max() < 128.5 and (np.abs(found - kernel) <= 0.5001 * scale).all()
    # Rounded to the nearest step, not cut off.
    assert abs((found - kernel).mean()) < 0.02 * scale.mean()


def test_blocks_have_scales_of_their_own():
    # One large weight spoils the scale of its own block of inputs and of no other.
    kernel = np.full((1, 8, 3), 0.01, np.float32)
    kernel[0, 1, 2] = 100.0
    leaf = quantise_leaf("layers/mlp/up/kernel", jnp.asarray(kernel), QuantiseConfig("int4", 4))
    assert leaf.scale.shape == (1, 2, 3)
    found = np.asarray(dense(leaf))
    # The largest weight is 7.5 steps from 0 and there are 7.
    np.testing.assert_allclose(found[0, 4:], 0.01 * 7 / 7.5, rtol=1e-5)
    np.testing.assert_allclose(found[0, :4, :2], 0.01 * 7 / 7.5, rtol=1e-5)
    np.testing.assert_allclose(found[0, :4, 2], [0, 700 / 7.5, 0, 0], rtol=1e-5)


def test_only_the_layers_matrices_are_quantised():
    leaves = trees.named_leaves(quantised("int8"), is_leaf=is_quantised)
    assert {name for name, leaf in leaves.items() if is_quantised(leaf)} == {
        name for name in leaves if name.endswith("/kernel")
    }
    kernels = [leaf for name, leaf in trees.named_leaves(BASE).items() if name.endswith("/kernel")]
    sizes = {
        name: trees.size_bytes(
            [
                leaf
                for leaf in jax.tree.leaves(quantised(name), is_leaf=is_quantised)
                if is_quantised(leaf)
            ]
        )
        for name in CONFIGS
    }
    scales = sum(4 * leaf.size // leaf.shape[1] for leaf in kernels)
    assert sizes["int8"] == trees.count(kernels) + scales
    assert sizes["int4"] == trees.count(kernels) // 2 + sum(leaf.size for leaf in kernels)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("role", ["base", "lora", "dora", "pissa"])
def test_every_function_is_that_of_the_dense_weights(name, role):
    config = {
        "lora": small.LORA,
        "dora": LoRAConfig(rank=3, dora=True),
        "pissa": LoRAConfig(rank=3, init="pissa"),
    }.get(role)
    low, stands_for = quantised(name), made_dense(quantised(name))
    adapter = None
    if config is not None:
        adapter = small.LM.init_adapter(jax.random.key(0), config, low)
        adapter = adapter.replace(lora=jax.tree.map(lambda leaf: leaf + 0.1, adapter.lora))
        (loss, grads), (loss2, grads2) = (
            small.gradient(small.sft_loss, small.LM, adapter, base, TOKENS)
            for base in (low, stands_for)
        )
        np.testing.assert_allclose(loss, loss2, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(
        small.logits(small.LM, low, adapter, TOKENS),
        small.logits(small.LM, stands_for, adapter, TOKENS),
        atol=2e-5,
    )


def test_more_bits_are_nearer():
    exact = np.array(small.logits(small.LM, BASE, None, TOKENS))
    error = {
        name: np.abs(small.logits(small.LM, quantised(name), None, TOKENS) - exact)[
            TOKENS.valid_BT
        ].mean()
        for name in CONFIGS
    }
    assert 0 < error["int8"] < 0.15 * error["int4"] and error["nf4"] < 0.5


def test_cached_decoding_reads_the_quantised_base():
    base = quantised("int8")
    prompt_BP, valid_BP = TOKENS.tokens_BT[:2, :8], np.ones((2, 8), bool)
    first_BV, cache = jax.jit(prefill, static_argnums=(0, 5))(
        small.LM, base, None, prompt_BP, valid_BP, 2
    )
    second_BV, _ = jax.jit(decode, static_argnums=0)(
        small.LM, base, None, TOKENS.tokens_BT[:2, 8], cache
    )
    full_BTV = jax.jit(small.LM.logits)(base, None, TOKENS.tokens_BT[:2, :9], np.ones((2, 9), bool))
    np.testing.assert_allclose(first_BV, full_BTV[:, 7], atol=2e-5)
    np.testing.assert_allclose(second_BV, full_BTV[:, 8], atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "int2"}, "quantise.kind is 'int2'; it must be one of none, int8, int4, nf4"),
        ({"kind": "int8", "block": 0}, "quantise.block is 0"),
        ({"block": 4}, "quantise.block is 4; it needs a quantise.kind"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        QuantiseConfig(**fields)


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(
        UserError,
        match=r"quantise\.block is 5; it must divide the 32 inputs of layers/attention/k/kernel",
    ):
        trees.map_named(
            lambda name, leaf: quantise_leaf(name, leaf, QuantiseConfig("int4", 5)), BASE
        )
