"""The decoder's pure functions: cached decoding, padding, heads, remat, dtypes, scanned layers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perl_jax.adapters.full import full_weights
from perl_jax.errors import UserError
from perl_jax.generation.decoding import decode, prefill
from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import Block, Embedder
from perl_jax.models.language_model import last_valid
from perl_jax.models.linear import AdapterSpec, Linear, matmul
from perl_jax.models.packing import pack
from perl_jax.models.placement import Placement
from perl_jax.runtime import trees
from perl_jax.types import Layout, Tokens
from tests import small

BASE = small.make_base()
ROLES = {"base": None, "lora": small.make_adapter(), "full": small.make_full(BASE)}
BATCH = len(small.ROWS)


def test_adapters_and_full_weights_differ_from_the_base():
    tokens = small.make_tokens()
    logits = [small.logits(small.LM, BASE, role, tokens) for role in ROLES.values()]
    assert all(x.shape == (BATCH, 11, 61) and x.dtype == jnp.float32 for x in logits)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logits[a] - logits[b]).mean() > 0.05


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(lm, role, prompt, new_BC):
    """Logits of prefilling a prompt and then decoding given tokens one by one, and the cache."""
    first_BV, cache = prefill(
        lm, BASE, role, prompt.tokens_BT, prompt.valid_BT, new_BC.shape[1] + 2
    )

    def step(cache, token_B):
        logits_BV, cache = decode(lm, BASE, role, token_B, cache)
        return cache, logits_BV

    cache, rest_CBV = jax.lax.scan(step, cache, new_BC.T)
    return first_BV, jnp.swapaxes(rest_CBV, 0, 1), cache


@pytest.mark.parametrize("role", ROLES)
def test_cached_decoding_equals_the_full_forward(role):
    # Prompts padded in every way, then four tokens a row, one at a time.
    prompt = small.make_tokens()
    new_BC = np.random.default_rng(5).integers(61, size=(BATCH, 4), dtype=np.int32)
    tokens_BT = np.concatenate([prompt.tokens_BT, new_BC], axis=1)
    valid_BT = np.concatenate([prompt.valid_BT, np.ones((BATCH, 4), bool)], axis=1)
    full_BTV = small.logits(small.LM, BASE, ROLES[role], Tokens(tokens_BT, valid_BT, valid_BT))
    first_BV, rest_BCV, cache = teacher_forced(small.LM, ROLES[role], prompt, new_BC)
    last_B = np.array(last_valid(prompt.valid_BT))
    np.testing.assert_allclose(first_BV, full_BTV[np.arange(BATCH), last_B], atol=2e-5)
    np.testing.assert_allclose(rest_BCV, full_BTV[:, 11:], atol=2e-5)
    assert int(cache.step) == 4
    np.testing.assert_array_equal(cache.position_B, valid_BT.sum(axis=1))
    np.testing.assert_array_equal(
        cache.parts[0].visible(cache.position_B), np.pad(valid_BT, ((0, 0), (0, 2)))
    )


def test_padding_sides_agree():
    # The same rows: left, right and double padding give the same logits at their real tokens.
    tokens = small.make_tokens()
    logits_BTV = np.array(small.logits(small.LM, BASE, ROLES["lora"], tokens))
    for rows in ((1, 2, 3), (4, 5), (6, 7)):
        first, *others = (logits_BTV[row][tokens.valid_BT[row]] for row in rows)
        for other in others:
            np.testing.assert_allclose(other, first, atol=2e-5)


@pytest.mark.parametrize("role", ["lora", "full"])
def test_ids_in_padding_change_nothing(role):
    tokens, role = small.make_tokens(), ROLES[role]
    other = small.other_padding(tokens)
    assert (tokens.tokens_BT != other.tokens_BT).sum() == (~tokens.valid_BT).sum() == 46
    for function in (small.logits, small.values):
        results = [
            np.array(function(small.LM, BASE, role, batch))[tokens.valid_BT]
            for batch in (tokens, other)
        ]
        np.testing.assert_array_equal(*results)
    small.assert_same(*(small.score(small.LM, BASE, role, batch) for batch in (tokens, other)))
    for loss in (small.sft_loss, small.pair_loss) if role.lora else (small.sft_loss,):
        small.assert_same(
            *(small.gradient(loss, small.LM, role, BASE, batch) for batch in (tokens, other))
        )


def test_score_is_the_value_at_the_last_real_token():
    tokens = small.make_tokens()
    values_BT = np.array(small.values(small.LM, BASE, ROLES["lora"], tokens))
    score_B = small.score(small.LM, BASE, ROLES["lora"], tokens)
    last_B = [np.flatnonzero(valid_T)[-1] for valid_T in tokens.valid_BT]
    np.testing.assert_array_equal(last_valid(tokens.valid_BT), last_B)
    np.testing.assert_allclose(score_B, values_BT[np.arange(BATCH), last_B], rtol=1e-5, atol=1e-6)
    # Four different rows; a row's score does not depend on its padding.
    np.testing.assert_allclose(
        score_B[jnp.array([2, 3, 5, 7])], score_B[jnp.array([1, 1, 4, 6])], atol=2e-5
    )
    assert len(set(np.round(np.array(score_B), 3))) == 4


@pytest.mark.parametrize("role", ["lora", "layers", "full"])
@pytest.mark.parametrize("attention_path", ["plain", "blocked"])
def test_gradients_of_scores_are_those_of_values_at_the_last_real_token(role, attention_path):
    # A score's last layer computes its own token alone; values come from the whole last layer.
    tokens, lm = small.make_tokens(), small.changed(attention=attention_path)
    roles = ROLES | {
        "layers": lm.init_adapter(
            jax.random.key(0), dataclasses.replace(small.LORA, layers="0,2")
        ).replace(head=small.make_head())
    }
    weight_B = jnp.arange(1.0, BATCH + 1)
    last_B = np.array([np.flatnonzero(valid_T)[-1] for valid_T in tokens.valid_BT])
    by_value = lambda role: jnp.sum(
        weight_B
        * lm.values(BASE, role, tokens.tokens_BT, tokens.valid_BT)[np.arange(BATCH), last_B]
    )
    by_score = lambda role: jnp.sum(
        weight_B * lm.score(BASE, role, tokens.tokens_BT, tokens.valid_BT)
    )
    role = roles[role] if role != "full" else full_weights(BASE).replace(head=small.make_head())
    expected, found = (jax.jit(jax.grad(loss))(role) for loss in (by_value, by_score))
    scale = float(trees.global_norm(expected))
    assert scale > 1e-2
    for (name, a), b in zip(
        trees.named_leaves(found).items(), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6 * scale, err_msg=name)


def test_score_is_the_head_of_the_last_hidden_state():
    # kernel . h + bias, in numpy.
    tokens, role = small.make_tokens(), ROLES["lora"]
    hidden_BTD = np.array(jax.jit(small.LM.hidden)(BASE, role, tokens.tokens_BT, tokens.valid_BT))
    expected_BT = hidden_BTD @ np.array(role.head["kernel"]) + np.array(role.head["bias"])
    np.testing.assert_allclose(small.values(small.LM, BASE, role, tokens), expected_BT, atol=1e-5)


@pytest.mark.parametrize("kind", ROLES)
def test_a_role_without_a_head_has_no_score(kind):
    tokens, role = small.make_tokens(), ROLES[kind]
    role = None if role is None else role.replace(head=None)
    for function in (small.LM.score, small.LM.values):
        with pytest.raises(ValueError, match="no scalar head"):
            jax.eval_shape(function, BASE, role, tokens.tokens_BT, tokens.valid_BT)


@pytest.mark.parametrize("kind", ["dots", "full"])
def test_remat_changes_nothing_but_memory(kind):
    tokens, role = small.make_tokens(), ROLES["lora"]
    plain, remat = small.LM, small.changed(remat=kind)
    (loss, grads), (loss2, grads2) = (
        small.gradient(small.sft_loss, lm, role, BASE, tokens) for lm in (plain, remat)
    )
    np.testing.assert_allclose(loss, loss2, rtol=1e-6)
    for (name, a), b in zip(
        trees.named_leaves(grads).items(), jax.tree.leaves(grads2), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
    count = lambda lm: str(
        jax.make_jaxpr(functools.partial(small.gradient, small.sft_loss, lm))(role, BASE, tokens)
    ).count("remat")
    assert count(plain) == 0 < count(remat)


def kept_for_the_backward_pass(lm, role, tokens) -> dict[int, dict[tuple, int]]:
    """By a layer scan's length: how often it stacks a shape of floats up, one layer's part of
    it.
    """
    base = small.make_base(lm)

    def loss(lora):
        return jnp.sum(
            lm.hidden(
                base,
                role.replace(lora=lora),
                tokens.tokens_BT,
                tokens.valid_BT,
                packing=pack(tokens),
            )
        )

    found: dict[int, dict[tuple, int]] = {}
    for equation in jax.make_jaxpr(jax.grad(loss))(role.lora).eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            shapes = collections.Counter(
                out.aval.shape[1:]
                for out in equation.outvars[equation.params["num_carry"] :]
                if out.aval.dtype == jnp.float32
            )
            found[equation.params["length"]] = dict(shapes)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_layer_keeps_for_the_backward_pass(packed):
    lm, config = small.changed(attention="blocked"), small.CONFIG
    tokens, lora = small.make_tokens(), dataclasses.replace(small.LORA, targets="attention")
    rows, length = tokens.tokens_BT.shape
    place = (1, 60) if packed else (rows, length)
    number = math.prod(place)
    tokens = tokens.replace(layout=Layout(60) if packed else None)
    kept = kept_for_the_backward_pass(lm, small.make_adapter(lm, lora, head=False), tokens)[
        config.layers
    ]
    flat = collections.Counter()
    for shape, times in kept.items():
        flat[(number, math.prod(shape) // number) if shape[:2] == place else shape] += times
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    assert flat == {
        # What either norm reads, and what q, k and v read.
        (number, config.width): 3,
        # Queries, what attention gives, and the same as o reads it.
        (number, heads * head_dim): 3,
        (number, kv_heads * head_dim): 2,
        (rows, kv_heads, heads // kv_heads, length, 1): 2,
        # gate(x) and up(x).
        (number, config.ffn_width): 2,
        (number, lora.rank): 4,
    }


def test_no_layer_keeps_weights_for_the_backward_pass():
    tokens = small.make_tokens()
    role = small.LM.init_adapter(jax.random.key(0), dataclasses.replace(small.LORA, layers="1-2"))
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(BASE["layers"]) if leaf.ndim > 2}
    kept = kept_for_the_backward_pass(small.LM, role, tokens)
    assert kept[2] and not weights & set(kept[2])


@jax.jit
def unrolled_logits(base, role, tokens):
    """The modules themselves, three layers one after the other, each with its own leaves."""
    rotary = attention.rotary_angles(
        attention.positions(tokens.valid_BT), small.CONFIG.head_dim, small.CONFIG.rope
    )
    attend = functools.partial(attention.attend, mask_BTS=attention.causal_mask(tokens.valid_BT))
    place = Placement()
    outer, block = (
        Embedder(small.CONFIG, nnx.Rngs(0)),
        Block(small.CONFIG, AdapterSpec(small.LORA), nnx.Rngs(0)),
    )
    nnx.update(outer, base["outer"])
    x_BTD = outer.embed(tokens.tokens_BT, place)
    for index in range(small.CONFIG.layers):
        for leaves in (base["layers"], role.lora["layers"]):
            nnx.update(block, jax.tree.map(lambda leaf: leaf[index], leaves))
        x_BTD, _ = block(x_BTD, rotary, attend, None, place)
    return outer.logits(outer.final_norm(x_BTD), outer.output_matrix(place), place)


def test_layers_are_scanned_in_order():
    tokens, role = small.make_tokens(), ROLES["lora"]
    logits_BTV = small.logits(small.LM, BASE, role, tokens)
    np.testing.assert_allclose(logits_BTV, unrolled_logits(BASE, role, tokens), atol=2e-5)
    turned = role.replace(lora=jax.tree.map(lambda leaf: leaf[::-1], role.lora))
    assert np.abs(small.logits(small.LM, BASE, turned, tokens) - logits_BTV).max() > 0.05


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_activations_stay_close(param_dtype):
    tokens, role = small.make_tokens(), ROLES["lora"]
    low = small.changed(dtype="bfloat16", param_dtype=param_dtype)
    base = jax.tree.map(lambda leaf: leaf.astype(param_dtype), BASE)
    hidden = jax.eval_shape(low.hidden, base, role, tokens.tokens_BT, tokens.valid_BT)
    score = jax.eval_shape(low.score, base, role, tokens.tokens_BT, tokens.valid_BT)
    assert hidden.dtype == jnp.bfloat16 and score.dtype == jnp.float32
    logits_BTV, exact_BTV = (
        small.logits(low, base, role, tokens),
        small.logits(small.LM, BASE, role, tokens),
    )
    assert logits_BTV.dtype == jnp.float32
    deviation = np.abs(np.array(logits_BTV - exact_BTV))[tokens.valid_BT]
    assert 0 < deviation.mean() < 0.03 * np.array(exact_BTV)[tokens.valid_BT].std()
    # Adapters and their gradients are float32 over a bfloat16 base.
    grads = jax.eval_shape(
        jax.grad(lambda role: jnp.sum(low.values(base, role, tokens.tokens_BT, tokens.valid_BT))),
        role,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_gradients_of_float32_weights_are_not_rounded_to_the_activations(dtype):
    random = np.random.default_rng(0)
    x_ND = jnp.asarray(random.normal(size=(300, 16)), jnp.bfloat16)
    weight_DF, dy_NF = (
        jnp.asarray(random.normal(size=(16, 8)), jnp.float32),
        jnp.asarray(random.normal(size=(300, 8)), jnp.bfloat16),
    )
    product, back = jax.vjp(lambda x, w: matmul(x, w, dtype), x_ND, weight_DF)
    assert product.dtype == (dtype or jnp.bfloat16)
    dx_ND, dw_DF = back(dy_NF.astype(product.dtype))
    exact = lambda array: np.asarray(array, np.float64)
    dw = exact(x_ND).T @ exact(dy_NF)
    assert dw_DF.dtype == jnp.float32 and dx_ND.dtype == jnp.bfloat16
    # float32 sums of 300 terms; rounded to bfloat16 they would be 2e-3 of their size away.
    np.testing.assert_allclose(dw_DF, dw, atol=2e-6 * np.abs(dw).max())
    rounded = exact(weight_DF.astype(jnp.bfloat16))
    np.testing.assert_allclose(exact(dx_ND), exact(dy_NF) @ rounded.T, rtol=1e-2, atol=5e-2)
    np.testing.assert_allclose(exact(product), exact(x_ND) @ rounded, rtol=1e-2, atol=5e-2)


def test_bfloat16_decoding_equals_its_forward():
    low, tokens = small.changed(dtype="bfloat16"), small.make_tokens((("none", 11),) * 2)
    prompt = jax.tree.map(lambda x: x[:, :7], tokens)
    full_BTV = small.logits(low, BASE, None, tokens)
    _, rest_BCV, cache = teacher_forced(low, None, prompt, tokens.tokens_BT[:, 7:])
    assert cache.parts[0].own_k.values.dtype == cache.parts[0].prompt_v.values.dtype == jnp.bfloat16
    np.testing.assert_allclose(rest_BCV, full_BTV[:, 7:], atol=0.1 * float(full_BTV.std()))


def test_untied_models_have_an_output_projection_of_their_own():
    # Its numbers are compared with torch's in tests/hf.
    outer = small.changed(tied_embeddings=False).abstract_base()["outer"]
    assert outer["lm_head"].shape == (32, 61) and "lm_head" not in BASE["outer"]


def test_full_weights_are_a_float32_copy():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    weights = full_weights(low).weights
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    for mine, base in zip(
        jax.tree.leaves(full_weights(BASE).weights), jax.tree.leaves(BASE), strict=True
    ):
        assert mine.unsafe_buffer_pointer() != base.unsafe_buffer_pointer()
        np.testing.assert_array_equal(mine, base)


def test_abstract_trees_have_axes_for_every_dimension():
    for tied in (True, False):
        lm = small.changed(tied_embeddings=tied)
        pairs = [
            (lm.abstract_base(), lm.base_axes()),
            (lm.abstract_lora(small.LORA), lm.lora_axes(small.LORA)),
        ]
        for abstract, axes in pairs:
            names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
            for (leaf_name, leaf), name in zip(
                trees.named_leaves(abstract).items(), names, strict=True
            ):
                assert len(name) == len(leaf.shape), leaf_name
                assert (name[0] == "layers") == leaf_name.startswith("layers")
    lora = small.LM.lora_axes(small.LORA)["layers"]["mlp"]["down"]
    assert lora == {"lora_a": ("layers", "mlp", "rank"), "lora_b": ("layers", "rank", "embed")}


def test_initial_weights():
    base = jax.jit(small.LM.init_base)(jax.random.key(0))
    kernel_LDF = np.array(base["layers"]["mlp"]["up"]["kernel"])
    assert kernel_LDF.shape == (3, 32, 44)
    np.testing.assert_allclose(kernel_LDF.std(axis=(1, 2)), 1 / np.sqrt(32), rtol=0.1)
    assert np.abs(kernel_LDF[0] - kernel_LDF[1]).max() > 0.01
    np.testing.assert_array_equal(base["layers"]["mlp_norm"]["scale"], 1)


def test_dropout_keeps_the_adapters_mean():
    # One adapted projection, 4,000 masks: the mean of the dropped-out outputs is the plain output.
    lora = small.LoRAConfig(rank=5, alpha=10.0, targets="q", dropout=0.3)
    linear = Linear("q", small.CONFIG, AdapterSpec(lora), (32, 24), ("embed", "heads"), nnx.Rngs(0))
    noise = np.random.default_rng(0)
    linear.lora_a[...], linear.lora_b[...] = (
        noise.standard_normal((32, 5)),
        noise.standard_normal((5, 24)),
    )
    x_BTD = noise.standard_normal((1, 1, 32)).astype(np.float32)
    plain = linear(x_BTD)
    dropped = jax.jit(jax.vmap(lambda key: linear(x_BTD, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    deviation = np.array(dropped.std(axis=0))
    assert deviation.min() > 1
    np.testing.assert_array_less(
        np.abs(dropped.mean(axis=0) - plain), 4.5 * deviation / np.sqrt(4000)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "model.heads is 5; it must be a multiple of model.kv_heads, 2"),
        ({"head_dim": 7}, "model.head_dim is 7"),
        ({"layers": 0}, "model.layers is 0"),
        ({"dtype": "float16"}, "model.dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "model.param_dtype is 'int8'"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        small.changed(**fields)
    assert isinstance(small.CONFIG, ModelConfig)
