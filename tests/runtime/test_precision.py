"""Float32 means float32: what each product of a float32 model says of its precision, and that
bfloat16 ones say nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters import combine, initial_values
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.generation.decoding import decode, prefill
from perl_jax.models import kernels
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import precision
from perl_jax.types import Tokens
from tests import small
from tests.jaxprs import equations

HIGHEST = jax.lax.Precision.HIGHEST
TOKENS = small.make_tokens((("none", 5), ("left", 3)), 5)


def precisions(function, *arguments) -> set[tuple[str, bool]]:
    """(dtype of the operands, whether the product's precision is the highest) of all products."""
    found = set()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name != "dot_general":
            continue
        stated = equation.params["precision"]
        assert stated in (None, (HIGHEST, HIGHEST))
        found.add(
            (
                str(jnp.result_type(*(variable.aval for variable in equation.invars))),
                stated is not None,
            )
        )
    return found


def model(dtype: str, attention: str = "plain") -> LanguageModel:
    return LanguageModel(
        dataclasses.replace(small.CONFIG, dtype=dtype, param_dtype=dtype, attention=attention)
    )


def shapes(lm: LanguageModel, lora: LoRAConfig = small.LORA, *, head: bool) -> tuple:
    base = lm.abstract_base()
    pairs = lm.abstract_lora(lora)
    return base, Adapter(
        lora=pairs,
        head=jax.eval_shape(lambda: initial_values.init_head(None, lm.config.width))
        if head
        else None,
        config=lora,
    )


def loss(lm, adapter, base, tokens: Tokens):
    logp_BT, _ = lm.logprobs(base, adapter, tokens.tokens_BT, tokens.valid_BT)
    return jnp.sum(logp_BT)


def step(lm, base, adapter, tokens: Tokens):
    _, cache = prefill(lm, base, adapter, tokens.tokens_BT, tokens.valid_BT, 3)
    return decode(lm, base, adapter, tokens.tokens_BT[:, 0], cache)[0]


@pytest.mark.parametrize(
    ("dtype", "found"), [("float32", {("float32", True)}), ("bfloat16", {("bfloat16", False)})]
)
@pytest.mark.parametrize("attention", ["plain", "blocked"])
def test_every_product_of_a_model_states_its_precision(dtype, found, attention):
    lm = model(dtype, attention)
    base, adapter = shapes(lm, head=False)
    assert precisions(functools.partial(loss, lm), adapter, base, TOKENS) == found
    backward = precisions(jax.grad(functools.partial(loss, lm)), adapter, base, TOKENS)
    # In a bfloat16 model's backward pass float32 sums meet bfloat16 numbers: nothing is forced
    # there either.
    assert backward == found or (
        dtype == "bfloat16" and not any(highest for _, highest in backward)
    )
    if attention == "plain":
        assert precisions(functools.partial(step, lm), base, adapter, TOKENS) == found
    scored = precisions(
        lambda *a: lm.score(*a, TOKENS.tokens_BT, TOKENS.valid_BT), *shapes(lm, head=True)
    )
    # The scalar head is float32 in every model.
    assert scored == found | {("float32", True)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_and_norms_are_float32(dtype):
    lm = model(dtype)
    base, adapter = shapes(lm, dataclasses.replace(small.LORA, dora=True), head=False)
    assert precisions(combine.merge, base, adapter) == {("float32", True)}
    adapted = precisions(functools.partial(loss, lm), adapter, base, TOKENS)
    # The norms of W + s A B, and the rest of the model.
    assert adapted == {("float32", True)} | (
        {("bfloat16", False)} if dtype == "bfloat16" else set()
    )


@pytest.mark.parametrize(
    ("dtype", "found"),
    [("float32", {("float32", True)}), ("bfloat16", {("bfloat16", False), ("float32", False)})],
)
def test_products_inside_the_kernel_for_tpus(dtype, found):
    total = lambda *qkv: jnp.sum(
        kernels.splash(
            *qkv, jnp.ones((1, 5), bool), window=None, scale=1.0, cap=2.0, mesh=None, interpret=True
        ).astype(jnp.float32)
    )
    q = jax.ShapeDtypeStruct((1, 5, 2, 8), dtype)
    stated = precisions(jax.grad(total, argnums=(0, 1, 2)), q, q, q)
    assert (
        stated == found
        if dtype == "float32"
        else stated and not any(highest for _, highest in stated)
    )


@pytest.mark.slow
def test_on_this_platform_the_numbers_are_the_same_bit_for_bit(monkeypatch):
    # A CPU multiplies float32 as float32 whatever is said.
    base, adapter = small.make_base(), small.make_adapter()

    def found():
        jax.clear_caches()
        forward = jax.jit(lambda *a: small.LM.logits(*a, TOKENS.tokens_BT, TOKENS.valid_BT))(
            base, adapter
        )
        return forward, jax.jit(jax.grad(functools.partial(loss, small.LM)))(adapter, base, TOKENS)

    stated = found()
    monkeypatch.setattr(precision, "precision_of", lambda *operands: None)
    for a, b in zip(jax.tree.leaves(stated), jax.tree.leaves(found()), strict=True):
        np.testing.assert_array_equal(a, b)
