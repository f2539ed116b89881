"""Fused projections: the same numbers by fewer products, whatever sits on the projections."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters import combine, quantise
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.generation import fused, prepare, sampling
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.runtime import trees
from perl_jax.types import Prompts
from tests import small

PROMPTS = small.make_tokens((("none", 5), ("left", 3), ("left", 1)), 5)
CONFIG = SamplingConfig(6, temperature=0.0, adapters="applied")
BIASED = small.changed(biases=("q", "k", "v"), qk_norm=True)
ATTENTION = LoRAConfig(rank=5, alpha=10.0)


def logits_of(lm, base, adapter):
    return np.array(lm.logits(base, adapter, PROMPTS.tokens_BT, PROMPTS.valid_BT))


def read(lm, base, adapter, config=dataclasses.replace(CONFIG, fused=True)):
    """What decoding reads: it must be fused, and beside it no pair of attention may be left."""
    base, adapter = prepare.prepare_for_decoding(lm, base, adapter, config, 10**6)
    assert (
        set(base["layers"]["attention"]) >= {"qkv", "o"} and "q" not in base["layers"]["attention"]
    )
    assert adapter is None or all(
        "attention" not in name for name in trees.named_leaves((adapter.lora, adapter.under))
    )
    return base, adapter


def biased_base():
    """Biases are zero in fresh weights."""
    noise = np.random.default_rng(5)
    move = lambda name, leaf: (
        leaf + noise.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("bias")
        else leaf
    )
    return trees.map_named(move, small.make_base(BIASED))


@pytest.mark.parametrize(
    ("lm", "lora"),
    [
        (small.LM, ATTENTION),
        (
            small.LM,
            LoRAConfig(
                rank=5,
                alpha=10.0,
                targets="all-linear",
                ranks="q=3,up=2",
                alphas="v=7",
                rank_stabilised=True,
            ),
        ),
        (small.LM, LoRAConfig(rank=4, targets="k,down", layers="1-2")),
        (small.LM, LoRAConfig(rank=4, targets="gate")),
        (BIASED, ATTENTION),
        (small.changed(sandwich_norms=True, unit_offset_norms=True, attention_cap=5.0), ATTENTION),
    ],
)
def test_logits_are_those_of_the_adapter_applied(lm, lora):
    base = biased_base() if lm is BIASED else small.make_base(lm)
    adapter = small.make_adapter(lm, lora)
    base_alone, applied = logits_of(lm, base, None), logits_of(lm, base, adapter)
    np.testing.assert_allclose(logits_of(lm, *read(lm, base, adapter)), applied, atol=2e-5)
    assert np.abs(applied - base_alone).max() > 0.1
    np.testing.assert_allclose(logits_of(lm, *read(lm, base, None)), base_alone, atol=2e-5)


def test_what_lies_under_an_adapter_is_fused_too():
    base = small.make_base()
    lower, upper = (
        small.make_adapter(lora=LoRAConfig(rank=rank, targets=targets), seed=rank)
        for rank, targets in ((2, "all-linear"), (3, "attention"))
    )
    stacked = combine.stack(lower, upper, small.LM.config.layers)
    np.testing.assert_allclose(
        logits_of(small.LM, *read(small.LM, base, stacked)),
        logits_of(small.LM, base, stacked),
        atol=2e-5,
    )


def test_full_tuning_and_a_merged_copy_are_fused():
    base, role, adapter = (
        small.make_base(),
        small.make_full(small.make_base()),
        small.make_adapter(),
    )
    np.testing.assert_allclose(
        logits_of(small.LM, *read(small.LM, None, role)), logits_of(small.LM, None, role), atol=2e-5
    )
    merged = read(
        small.LM, base, adapter, dataclasses.replace(CONFIG, fused=True, adapters="merged")
    )
    assert merged[1] is None and "up" not in merged[0]["layers"]["attention"]["qkv"]
    np.testing.assert_allclose(
        logits_of(small.LM, *merged), logits_of(small.LM, base, adapter), atol=2e-5
    )


def test_in_bfloat16_pairs_act_by_themselves():
    # A merged copy loses an update of this size to rounding: where it is fused it acts as in
    # training.
    lm = small.changed(dtype="bfloat16", param_dtype="bfloat16")
    base, adapter = small.make_base(lm), small.make_adapter(lm, ATTENTION)
    adapter = adapter.replace(
        lora=trees.map_named(
            lambda name, leaf: leaf * 2e-2 if name.endswith("lora_b") else leaf, adapter.lora
        )
    )
    exact = logits_of(small.LM, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), adapter)
    alone = logits_of(small.LM, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), None)
    moved = exact - alone
    found = logits_of(lm, *read(lm, base, adapter)) - logits_of(lm, *read(lm, base, None))
    assert np.corrcoef(found.ravel(), moved.ravel())[0, 1] > 0.5


def test_dora_and_quantised_matrices_stay_as_they_are():
    base = small.make_base()
    dora = small.LM.init_adapter(jax.random.key(0), LoRAConfig(dora=True), base)
    assert not fused.fusible(base, dora)
    eight = trees.map_named(
        lambda name, leaf: quantise.quantise_leaf(name, leaf, quantise.QuantiseConfig(kind="int8")),
        base,
    )
    assert not fused.fusible(eight, None)
    kept, adapter = prepare.prepare_for_decoding(
        small.LM, base, dora, dataclasses.replace(CONFIG, fused=True), 10**6
    )
    assert kept is base and adapter is dora


def test_sampling_and_slots_give_the_same_tokens():
    base, adapter = small.make_base(), small.make_adapter()
    config = SamplingConfig(6, adapters="applied", stop_ids=(7,))
    tokens_PS, valid_PS = np.array(PROMPTS.tokens_BT), np.array(PROMPTS.valid_BT)
    both = [
        sampling.sample(
            small.LM,
            base,
            adapter,
            tokens_PS,
            valid_PS,
            jax.random.key(4),
            dataclasses.replace(config, fused=fuse),
            2,
        )
        for fuse in (False, True)
    ]
    np.testing.assert_array_equal(both[0].sequences.tokens_BT, both[1].sequences.tokens_BT)
    np.testing.assert_allclose(both[0].logp_BT, both[1].logp_BT, atol=2e-5)
    slots = ContinuousSampler(small.LM, dataclasses.replace(config, fused=True), 2, 2)
    prompts = Prompts(tokens_PS, valid_PS, np.arange(3, dtype=np.int32))
    rollout = slots(base, adapter, prompts, jax.random.key_data(jax.random.key(4)))
    np.testing.assert_array_equal(rollout.sequences.tokens_BT, both[0].sequences.tokens_BT)
    assert slots.fuse.compilations == 1
