"""Packed batches: the same losses and gradients as padded ones, with every real token computed
once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.full import full_weights
from perl_jax.models import attention, passes
from perl_jax.models import microbatches as microbatches_lib
from perl_jax.models.packing import pack
from perl_jax.objectives import policy_gradient, supervised
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.runtime import trees
from perl_jax.training import fit
from perl_jax.types import Labelled, Layout, Pairs, Tokens
from tests import small

BASE = small.make_base()
POLICY = small.make_adapter()
REWARD = POLICY.replace(head=small.make_head())
LENGTH, PROMPT = 12, 5
GROUP = 4


def group_rows(groups: int, lengths: list[int], left: bool = False, seed: int = 0) -> Tokens:
    """Rows in groups that begin with one prompt; right-padded, or with the prompt padded on the
    left as rollouts are.
    """
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    each = rows // groups
    tokens_BT = rng.integers(1, 61, (rows, LENGTH), dtype=np.int32)
    valid_BT, response_BT = np.zeros((rows, LENGTH), bool), np.zeros((rows, LENGTH), bool)
    for group in range(groups):
        prompt = PROMPT - group % 3
        for row in range(group * each, (group + 1) * each):
            start = PROMPT - prompt if left else 0
            tokens_BT[row, start : start + prompt] = tokens_BT[group * each, start : start + prompt]
            valid_BT[row, start : start + prompt + lengths[row]] = True
            response_BT[row, start + prompt : start + prompt + lengths[row]] = True
    return Tokens(tokens_BT, valid_BT, response_BT)


LENGTHS = [7, 1, 3, 0, 5, 5, 2, 7]


def real_tokens(tokens: Tokens, group: int) -> int:
    first_B = np.arange(len(tokens.tokens_BT)) % group == 0
    return int(tokens.response_BT.sum() + (tokens.valid_BT & ~tokens.response_BT)[first_B].sum())


@pytest.mark.parametrize(("group", "parts"), [(1, 1), (1, 4), (4, 1), (4, 2)])
def test_every_real_token_has_a_slot_and_copies_share_one(group, parts):
    tokens = group_rows(2, LENGTHS)
    packing = pack(tokens.replace(layout=Layout(80, parts, group)))
    assert int(packing.filled_WU.sum()) == real_tokens(tokens, group)
    packed_WU = np.array(packing.packed(tokens.tokens_BT))
    back_BT = np.array(packing.spread(packed_WU))
    np.testing.assert_array_equal(back_BT[tokens.valid_BT], tokens.tokens_BT[tokens.valid_BT])
    # No slot is two different tokens'.
    index_BT, part_B = np.array(packing.index_BT), np.arange(8) // (8 // parts)
    places = {
        (part_B[b], index_BT[b, t]) for b, t in zip(*np.nonzero(tokens.valid_BT), strict=True)
    }
    assert len(places) == real_tokens(tokens, group)


def test_both_gathers_have_the_gradients_of_their_sums():
    # Against JAX's own derivative of plain indexing.
    tokens = group_rows(2, LENGTHS)
    packing = pack(tokens.replace(layout=Layout(56, 1, GROUP)))
    x_WU3 = jax.random.normal(jax.random.key(0), (1, 56, 3))
    weight_BT3 = jax.random.normal(jax.random.key(1), (8, LENGTH, 3)) * tokens.valid_BT[:, :, None]
    plain = lambda x: jnp.sum(x[0][packing.index_BT] * weight_BT3)
    ours = lambda x: jnp.sum(packing.to_sequences(x) * weight_BT3)
    gradient = lambda total, x: jax.jit(jax.grad(total))(x)
    np.testing.assert_allclose(gradient(ours, x_WU3), gradient(plain, x_WU3), atol=1e-5)
    weight_WU3 = jax.random.normal(jax.random.key(2), (1, 56, 3)) * packing.filled_WU[:, :, None]
    # Copies equal, as hidden states of shared prompts are: each slot reads its first owner.
    x_BT3 = jax.random.normal(jax.random.key(3), (8, LENGTH, 3))
    plain = lambda x: jnp.sum(x.reshape(-1, 3)[packing.token_WU[0]] * weight_WU3[0])
    ours = lambda x: jnp.sum(packing.unpacked(lambda q: q * x)(jnp.ones((1, 56, 3))) * weight_WU3)
    np.testing.assert_allclose(gradient(ours, x_BT3), gradient(plain, x_BT3), atol=1e-5)


def value_and_gradient(objective, role, batch, microbatches: int = 1, lm=small.LM):
    name = (
        "reward"
        if objective in (supervised.pairwise_objective, supervised.pointwise_objective)
        else "policy"
    )
    function = lambda role: small.update_gradients(
        lambda *a: objective(lm, *a), {name: role}, BASE, batch, jax.random.key(0), microbatches
    )
    loss, _, grads = jax.jit(function)(role)
    return loss, grads


def assert_close(a, b) -> None:
    (loss_a, grads_a), (loss_b, grads_b) = a, b
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
    scale = float(trees.global_norm(grads_a))
    assert scale > 1e-3
    for x, y in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * scale)


def experience(tokens: Tokens) -> policy_gradient.Experience:
    rng = np.random.default_rng(4)
    noise = lambda: jnp.asarray(rng.standard_normal(tokens.tokens_BT.shape), jnp.float32)
    return policy_gradient.Experience(tokens, -3 + noise(), noise(), noise())


def cases() -> dict:
    ragged, rollouts = group_rows(8, LENGTHS), group_rows(2, LENGTHS, left=True)
    weight = np.ones(4, np.float32)
    pairs = lambda layout: Pairs(
        *(
            jax.tree.map(lambda x: x[side::2], group_rows(4, LENGTHS)).replace(layout=layout)
            for side in (0, 1)
        ),
        weight,
    )
    labelled = lambda layout: Labelled(
        ragged.replace(layout=layout),
        np.linspace(0, 1, 8, dtype=np.float32),
        np.ones(8, np.float32),
    )
    gradient = lambda lm, *a: policy_gradient.policy_gradient_objective(
        lm, AlgorithmConfig(name="rloo", samples=4), 0.9, "k2", 7, *a
    )
    return {
        "sft": (supervised.sft_objective, POLICY, lambda layout: ragged.replace(layout=layout), 1),
        "pairs": (supervised.pairwise_objective, REWARD, pairs, 2),
        "labels": (supervised.pointwise_objective, REWARD, labelled, 1),
        "rl": (gradient, POLICY, lambda layout: experience(rollouts.replace(layout=layout)), 4),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize(("parts", "microbatches"), [(1, 1), (2, 1), (1, 2)])
def test_losses_and_gradients_equal_the_padded_ones(name, parts, microbatches):
    objective, role, batch, group = cases()[name]
    if name == "pairs" and parts * microbatches == 1:
        group = 2
    padded = value_and_gradient(objective, role, batch(None), microbatches)
    packed = value_and_gradient(objective, role, batch(Layout(72, parts, group)), microbatches)
    assert_close(padded, packed)


@pytest.mark.parametrize("block", [attention.QUERY_BLOCK, 5])
@pytest.mark.parametrize("name", ["pairs", "labels", "rl"])
def test_attention_in_blocks_takes_packed_tokens(name, block, monkeypatch):
    # Rows of one block are worked on together, longer ones block by block; both against the plain
    # path, padded.
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    objective, role, batch, group = cases()[name]
    padded = value_and_gradient(objective, role, batch(None))
    packed = value_and_gradient(
        objective, role, batch(Layout(72, 2, group)), lm=small.changed(attention="blocked")
    )
    assert_close(padded, packed)


def test_full_tuning_and_dropout_of_nothing_are_packed_too():
    tokens = group_rows(8, LENGTHS)
    role = full_weights(BASE)
    whole = [
        value_and_gradient(supervised.sft_objective, role, tokens.replace(layout=layout))
        for layout in (None, Layout(72))
    ]
    assert_close(*whole)


def test_scores_and_values_are_those_of_padded_rows():
    tokens = group_rows(2, LENGTHS, left=True)
    layout = Layout(40, 2, GROUP)
    for function, path in itertools.product((passes.scores, passes.values), ("plain", "blocked")):
        function = jax.jit(function, static_argnums=0)
        padded = np.array(function(small.LM, BASE, REWARD, tokens))
        packed = np.array(
            function(small.changed(attention=path), BASE, REWARD, tokens.replace(layout=layout))
        )
        if padded.ndim == 2:
            # The column after a real token is about the next one.
            about_BT = np.pad(tokens.valid_BT[:, :-1], ((0, 0), (1, 0)))
            padded, packed = padded[about_BT], packed[about_BT]
        np.testing.assert_allclose(packed, padded, atol=2e-5)


def test_a_group_that_does_not_divide_is_refused():
    tokens = group_rows(2, LENGTHS)
    with pytest.raises(AssertionError):
        pack(tokens.replace(layout=Layout(40, 1, 3)))
    with pytest.raises(ValueError, match="8 rows in groups of 4 do not split into 4 microbatches"):
        microbatches_lib.split_microbatches(dataclasses.asdict(tokens)["tokens_BT"], 4, 4)


@pytest.mark.parametrize(
    ("microbatches", "layout"),
    [
        (2, None),
        (4, None),
        (3, None),
        (4, Layout(40, 1, 1, 4)),
        (2, Layout(40, 1, GROUP, 2)),
        (2, Layout(40, 2, 1, 2)),
    ],
    ids=["2", "4", "do not divide", "4 packed", "2 packed groups", "2 packed parts"],
)
def test_passes_without_a_gradient_go_microbatch_by_microbatch(microbatches, layout):
    """The numbers of the whole batch, row by row, whichever microbatch a row went to."""
    tokens = group_rows(2, LENGTHS, left=True)
    split = tokens.replace(layout=layout)
    logprobs = jax.jit(
        functools.partial(passes.logprobs_in_microbatches, small.LM), static_argnums=0
    )
    found, expected = logprobs(microbatches, BASE, POLICY, split), logprobs(1, BASE, POLICY, tokens)
    np.testing.assert_allclose(
        np.array(found)[tokens.response_BT], np.array(expected)[tokens.response_BT], atol=2e-5
    )
    score = lambda part: passes.scores(small.LM, BASE, REWARD, part)
    scores = jax.jit(
        lambda part, number: microbatches_lib.each_microbatch(score, part, number), static_argnums=1
    )
    np.testing.assert_allclose(scores(split, microbatches), scores(tokens, 1), atol=2e-5)


def test_a_pass_in_microbatches_holds_one_at_a_time():
    # What the compiler says of temporaries: about a quarter for four microbatches, and never half.
    tokens = Tokens(*(np.ones((16, 256), dtype) for dtype in (np.int32, bool, bool)))
    values = jax.jit(
        functools.partial(passes.values_in_microbatches, small.changed(max_positions=256)),
        static_argnums=0,
    )
    whole, split = (
        values.lower(number, BASE, REWARD, tokens).compile().memory_analysis().temp_size_in_bytes
        for number in (1, 4)
    )
    assert split < 0.5 * whole


def test_held_out_sums_are_those_of_the_whole_batch():
    tokens = group_rows(2, LENGTHS)
    measure = lambda number: fit._held_out(
        functools.partial(supervised.sft_objective, small.LM),
        number,
        {"policy": POLICY},
        BASE,
        tokens,
    )
    (loss, _), (whole, _) = (
        jax.jit(measure, static_argnums=0)(4),
        jax.jit(measure, static_argnums=0)(1),
    )
    np.testing.assert_allclose([loss.total, loss.weight], [whole.total, whole.weight], rtol=1e-6)
