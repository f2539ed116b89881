"""LoRA's variants against their formulas: where they start, what they compute, what is trained."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters import combine, initial_values
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig, quantise_leaf
from perl_jax.errors import UserError
from perl_jax.hub import peft
from perl_jax.objectives import supervised
from perl_jax.objectives.losses import LossSum
from perl_jax.runtime import trees
from perl_jax.training import step as step_lib
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import init_state
from tests import small

BASE = small.make_base()
TOKENS = small.make_tokens()


def fresh(config: LoRAConfig, seed: int = 3) -> Adapter:
    return small.LM.init_adapter(jax.random.key(seed), config, BASE)


def moved(config: LoRAConfig) -> Adapter:
    """A role whose trained leaves have all left their start."""
    noise = np.random.default_rng(0)
    start = fresh(config)
    return start.replace(
        lora=jax.tree.map(
            lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape).astype(np.float32),
            start.lora,
        )
    )


def logits(role: Adapter | None, base=BASE) -> np.ndarray:
    return np.array(small.logits(small.LM, base, role, TOKENS))


def kernel(name: str, layer: int) -> np.ndarray:
    return np.asarray(trees.named_leaves(BASE)[f"layers/{name}/kernel"][layer], np.float64)


# Configuration.


def test_ranks_and_alphas_of_each_target():
    config = LoRAConfig(
        rank=4, alpha=6.0, targets="q,v,down", ranks="q=2, down=9", alphas="v=3,down=18"
    )
    assert [config.rank_of(t) for t in ("q", "v", "down")] == [2, 4, 9]
    assert [config.scale_of(t) for t in ("q", "v", "down")] == [3.0, 0.75, 2.0]
    shapes = {
        name: leaf.shape
        for name, leaf in trees.named_leaves(small.LM.abstract_lora(config)).items()
    }
    assert shapes["layers/attention/q/lora_a"] == (3, 32, 2) and shapes[
        "layers/mlp/down/lora_b"
    ] == (3, 9, 32)
    stabilised = dataclasses.replace(config, rank_stabilised=True)
    np.testing.assert_allclose(
        [stabilised.scale_of(t) for t in ("q", "v", "down")], [6 / 2**0.5, 1.5, 6.0]
    )
    assert (config.scaling_rule, stabilised.scaling_rule) == ("alpha / rank", "alpha / sqrt(rank)")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, (0, 1, 2, 3)), ("2", (2,)), ("1-3", (1, 2, 3)), ("3,0-1", (0, 1, 3))],
)
def test_layers_by_number_and_range(layers, expected):
    config = LoRAConfig(layers=layers)
    assert config.adapted_layers(4) == expected
    assert [config.stack_index(layer) for layer in range(4)] == [
        expected.index(i) if i in expected else None for i in range(4)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": "q:4"}, "lora.ranks is 'q:4'; it must look like q=4,down=32"),
        ({"ranks": "up=4"}, "lora.ranks names up; the targets are q, k, v, o"),
        ({"ranks": "q=0"}, "lora.ranks of q is 0"),
        ({"ranks": "q=2.5"}, "lora.ranks of q is 2.5"),
        ({"alphas": "q=-1"}, "lora.alphas of q is -1.0"),
        ({"layers": "2-1"}, "lora.layers is '2-1'; it must look like 8-15 or 0,2,4-7"),
        ({"layers": "first"}, "lora.layers is 'first'"),
        ({"init": "svd"}, "lora.init is 'svd'; it must be one of b-zero, a-zero, pissa"),
        ({"init": "pissa", "dora": True}, "lora.dora and lora.init pissa cannot be combined"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        LoRAConfig(**fields)
    assert message in str(error.value)


def test_layers_that_the_model_does_not_have():
    with pytest.raises(UserError, match=r"lora\.layers is '1-7'; the model has layers 0 to 2"):
        small.LM.abstract_lora(LoRAConfig(layers="1-7"))


# Where they start.


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=4, init="a-zero"),
        LoRAConfig(rank=4, layers="1"),
        LoRAConfig(rank=4, rank_stabilised=True, ranks="q=2"),
    ],
    ids=["a-zero", "layers", "rank-stabilised"],
)
def test_one_side_zero_is_the_base_bit_for_bit(config):
    small.assert_same(logits(fresh(config)), logits(None))


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(rank=4, dora=True), LoRAConfig(rank=4, init="pissa", targets="all-linear")],
    ids=["dora", "pissa"],
)
def test_dora_and_pissa_start_as_the_base_to_rounding(config):
    np.testing.assert_allclose(logits(fresh(config)), logits(None), atol=2e-5)
    with pytest.raises(ValueError, match="give `base`"):
        small.LM.init_adapter(jax.random.key(0), config)


def test_a_zero_has_b_random():
    for name, leaf in trees.named_leaves(fresh(LoRAConfig(rank=4, init="a-zero")).lora).items():
        assert (np.abs(leaf).max() == 0) == name.endswith("lora_a")
        assert name.endswith("lora_a") or 0.4 < np.abs(leaf).max() <= 0.5


def test_dora_starts_with_the_columns_norms():
    leaves = trees.named_leaves(fresh(LoRAConfig(rank=4, dora=True)).lora)
    np.testing.assert_allclose(
        leaves["layers/attention/q/magnitude"][1],
        np.linalg.norm(kernel("attention/q", 1), axis=0),
        rtol=1e-6,
    )


def test_first_values_and_quantised_leaves_are_awaited_one_by_one(monkeypatch):
    # On several CPU devices, the next program with collectives must not begin before the last has
    # ended.
    waited, block_on_cpu = [], trees.block_on_cpu
    monkeypatch.setattr(trees, "block_on_cpu", lambda tree: waited.append(1) or block_on_cpu(tree))
    kernel_LDF = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 4)), jnp.float32)
    initial_values._over_layers(initial_values._column_norms, kernel_LDF, (0, 2))
    assert len(waited) == 2
    quantise_leaf("layers/mlp/gate/kernel", kernel_LDF, QuantiseConfig("int8"))
    assert len(waited) == 3


def test_pissa_starts_with_the_largest_singular_part():
    config = LoRAConfig(rank=4, alpha=10.0, init="pissa")
    role, scale = fresh(config), 2.5
    a, b = (
        np.asarray(trees.named_leaves(role.lora)[f"layers/attention/v/lora_{side}"][2], np.float64)
        for side in "ab"
    )
    u, s, vt = np.linalg.svd(kernel("attention/v", 2))
    np.testing.assert_allclose(scale * a @ b, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0) ** 2, s[:4], rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, dora=True, targets="q", layers="1-15"),
        LoRAConfig(rank=2, init="pissa", targets="q", layers="1-15"),
    ],
    ids=["dora", "pissa"],
)
def test_a_start_from_weights_has_one_layers_kernel_in_float32_at_a_time(config, kind, monkeypatch):
    lm, compiled = small.changed(layers=16, width=64, head_dim=16, param_dtype="bfloat16"), []

    def measured(function, kernel, index, original=initial_values.apply_to_layer):
        compiled.append(original.lower(function, kernel, index).compile().memory_analysis())
        return original(function, kernel, index)

    monkeypatch.setattr(initial_values, "apply_to_layer", measured)
    base = trees.map_named(
        lambda name, leaf: quantise_leaf(name, leaf, QuantiseConfig(kind)), small.make_base(lm)
    )
    lm.init_adapter(jax.random.key(0), config, base)
    assert len(compiled) == 15
    # U, S, V and the decomposition's workspace are a few kernels; the stack alone would be sixteen.
    assert (
        max(found.temp_size_in_bytes + found.output_size_in_bytes for found in compiled)
        < 6 * 64 * 64 * 4
    )


# What they compute: the merged weights, by hand, run as a base.


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(
            rank=4,
            alpha=6.0,
            rank_stabilised=True,
            targets="all-linear",
            ranks="up=2",
            alphas="q=3",
        ),
        LoRAConfig(rank=4, dora=True, targets="q,down"),
        LoRAConfig(rank=4, init="pissa"),
        LoRAConfig(rank=4, layers="0,2", targets="all-linear"),
        LoRAConfig(rank=4, layers="1", dora=True),
    ],
    ids=["rank-stabilised", "dora", "pissa", "layers", "dora-layer"],
)
def test_an_adapter_computes_what_its_formula_says(config):
    role = moved(config)
    leaves = {
        name: np.asarray(leaf, np.float64) for name, leaf in trees.named_leaves(role.lora).items()
    }
    start = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in trees.named_leaves(fresh(config).lora).items()
    }

    def by_hand(name, weight):
        stem, target = name.removesuffix("kernel"), name.split("/")[-2]
        if stem + "lora_a" not in leaves:
            return weight
        out = np.asarray(weight, np.float64).copy()
        for place, layer in enumerate(config.adapted_layers(3)):
            out[layer] += (
                config.scale_of(target)
                * leaves[stem + "lora_a"][place]
                @ leaves[stem + "lora_b"][place]
            )
            if config.init == "pissa":
                out[layer] -= (
                    config.scale_of(target)
                    * start[stem + "lora_a"][place]
                    @ start[stem + "lora_b"][place]
                )
            if config.dora:
                out[layer] *= leaves[stem + "magnitude"][place] / np.linalg.norm(out[layer], axis=0)
        return out.astype(np.float32)

    expected = trees.map_named(by_hand, BASE)
    for (name, a), b in zip(
        trees.named_leaves(combine.merge(BASE, role)).items(),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(logits(role), logits(None, expected), atol=5e-5)
    assert np.abs(logits(role) - logits(None)).max() > 0.05


def test_output_norms_need_no_merged_weight():
    noise = np.random.default_rng(0)
    w, a, b = (noise.standard_normal(shape) for shape in ((2, 7, 5), (2, 7, 3), (2, 3, 5)))
    np.testing.assert_allclose(
        combine.output_norms(*(jnp.asarray(x, jnp.float32) for x in (w, a, b)), 0.7),
        np.linalg.norm(w + 0.7 * a @ b, axis=1),
        rtol=1e-5,
    )


# What is trained.


def test_nothing_is_computed_backwards_below_the_lowest_adapted_layer():
    # Products of the backward pass: three layers' worth with all adapted, one with the last alone.
    def products(layers):
        role = fresh(LoRAConfig(rank=5, layers=layers))
        lm = small.changed(unroll=3)
        compiled = (
            jax.jit(jax.grad(functools.partial(small.sft_loss, lm)))
            .lower(role, BASE, TOKENS)
            .compile()
        )
        return compiled.cost_analysis()["flops"]

    forward = (
        jax.jit(functools.partial(small.sft_loss, small.changed(unroll=3)))
        .lower(fresh(LoRAConfig(rank=5)), BASE, TOKENS)
        .compile()
    )
    whole, last = (products(layers) - forward.cost_analysis()["flops"] for layers in (None, "2"))
    assert last < 0.55 * whole


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=4, init="pissa"),
        LoRAConfig(rank=4, dora=True),
        LoRAConfig(rank=4, layers="1-2"),
    ],
    ids=["pissa", "dora", "layers"],
)
def test_a_step_moves_the_trained_leaves_and_no_other(config):
    optimizers = {"policy": make_optimizer(OptimizerConfig(name="adamw", learning_rate=0.01), 10)}
    role = moved(config)
    state = init_state({"policy": role}, optimizers, jax.random.key(0))
    step = jax.jit(
        functools.partial(
            step_lib.train_step,
            functools.partial(supervised.sft_objective, small.LM),
            optimizers,
            1,
        )
    )
    after, metrics = step(state, BASE, TOKENS)
    assert bool(metrics["finite"])
    for name, leaf in trees.named_leaves(role.lora).items():
        assert np.abs(trees.named_leaves(after.roles["policy"].lora)[name] - leaf).max() > 1e-3, (
            name
        )
    if role.under is not None:
        small.assert_same(after.roles["policy"].under, role.under)
        # No moments are kept for what is not trained.
        assert trees.count(after.optimizers) < 2.1 * trees.count(role.lora)
    loss = lambda state: float(step(state, BASE, TOKENS)[1]["train/loss"])
    assert loss(after) < loss(state)


def test_doras_norm_is_a_constant_in_the_gradient():
    # d/dB of m / stop(||W + s A B||) (W + s A B), against finite differences with the norm held.
    config = LoRAConfig(rank=2, dora=True, targets="down")
    role = moved(config)
    _, grads = small.gradient(small.sft_loss, small.LM, role, BASE, TOKENS)
    name, place = "layers/mlp/down/lora_b", (1, 0, 3)
    leaves = trees.named_leaves(role.lora)
    a, b, m = (leaves[f"layers/mlp/down/{part}"] for part in ("lora_a", "lora_b", "magnitude"))
    scale = config.scale_of("down")
    w = trees.named_leaves(BASE)["layers/mlp/down/kernel"]
    share = m / jnp.linalg.norm(w + scale * a @ b, axis=1)

    def loss(delta):
        down = (w + scale * a @ b.at[place].add(delta)) * share[:, None, :]
        base = trees.map_named(
            lambda n, leaf: down if n == "layers/mlp/down/kernel" else leaf, BASE
        )
        return small.sft_loss(small.LM, None, base, TOKENS)

    np.testing.assert_allclose(
        trees.named_leaves(grads.lora)[name][place],
        jax.jit(jax.grad(loss))(0.0),
        rtol=2e-3,
        atol=1e-6,
    )


def test_lora_plus_gives_b_a_larger_rate():
    # Adam's first update is the rate itself, in the direction of the gradient.
    def objective(roles, frozen, batch, key):
        return LossSum(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(roles)), jnp.float32(1)), {}

    config = OptimizerConfig(
        name="adamw",
        learning_rate=1e-3,
        head_learning_rate=5e-3,
        lora_b_ratio=16.0,
        clip_norm=None,
        epsilon=1e-12,
    )
    optimizers = {"policy": make_optimizer(config, 10)}
    role = small.make_adapter()
    state = init_state({"policy": role}, optimizers, jax.random.key(0))
    after, _ = step_lib.train_step(objective, optimizers, 1, state, None, {})
    for name, leaf in trees.named_leaves(after.roles["policy"]).items():
        rate = 5e-3 if name.startswith("head") else 16e-3 if name.endswith("lora_b") else 1e-3
        np.testing.assert_allclose(
            trees.named_leaves(role)[name] - leaf, rate, rtol=1e-3, err_msg=name
        )


# Stacking.


def test_a_stack_computes_the_sum_and_trains_the_top_alone():
    below, top = (
        moved(LoRAConfig(rank=3, targets="q,up", layers="0-1")),
        moved(LoRAConfig(rank=2, alpha=3.0, layers="1-2")),
    )
    stacked = combine.stack(below, top, 3)
    moves = [
        jax.tree.map(lambda a, b: a - b, combine.merge(BASE, role), BASE) for role in (below, top)
    ]
    expected = jax.tree.map(lambda w, *others: w + sum(others), BASE, *moves)
    np.testing.assert_allclose(logits(stacked), logits(None, expected), atol=5e-5)
    _, grads = small.gradient(small.sft_loss, small.LM, stacked, BASE, TOKENS)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(grads.under))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads.lora))
    with pytest.raises(UserError, match="A DoRA adapter cannot lie under"):
        combine.stack(moved(LoRAConfig(rank=2, dora=True)), top, 3)
    with pytest.raises(UserError, match="A DoRA adapter cannot go on top"):
        combine.stack(top, moved(LoRAConfig(rank=2, dora=True)), 3)


# What cannot be.


def test_an_average_by_hand():
    # 1/4 of 4 (x A) B and 3/4 of 2 (x A) B, heads 1 and 5: A B of each is 6.
    one = LoRAConfig(rank=1, alpha=4.0, targets="q")
    adapter = lambda config, bias: Adapter(
        lora={
            "layers": {
                "attention": {
                    "q": {"lora_a": jnp.full((1, 1, 1), 2.0), "lora_b": jnp.full((1, 1, 1), 3.0)}
                }
            }
        },
        head={"bias": jnp.float32(bias)},
        config=config,
    )
    found = combine.average(
        [adapter(one, 1.0), adapter(dataclasses.replace(one, alpha=2.0), 5.0)], [0.25, 0.75], 1
    )
    leaves = found.lora["layers"]["attention"]["q"]
    assert (
        found.config.scale_of("q") * float((leaves["lora_a"][0] @ leaves["lora_b"][0])[0, 0])
        == 0.25 * 4 * 6 + 0.75 * 2 * 6
    )
    assert float(found.head["bias"]) == 4.0


@pytest.mark.parametrize("stabilised", [False, True])
def test_the_scale_goes_to_peft_and_back(stabilised):
    config = LoRAConfig(rank=4, alpha=3.0, targets="q,v", alphas="v=6", rank_stabilised=stabilised)
    values, tensors = peft.to_peft(
        Adapter(lora=fresh(config).lora, config=config), small.LM.config, "base"
    )
    again = peft.from_peft(values, tensors, small.LM.config)
    scales = [3 / 2, 6 / 2] if stabilised else [3 / 4, 6 / 4]
    assert [
        again.config.scale_of(target) for target in ("q", "v")
    ] == scales and again.config.rank_stabilised == stabilised


def test_merging_into_a_quantised_base_is_refused():
    low = trees.map_named(
        lambda name, leaf: quantise_leaf(name, leaf, QuantiseConfig("int8")), BASE
    )
    with pytest.raises(
        UserError,
        match=r"cannot be merged into a quantised base; load the base without --quantise\.kind",
    ):
        combine.merge(low, moved(LoRAConfig(rank=2)))


def test_pissa_has_no_more_singular_values_than_the_narrower_side():
    # k is 32 x 12.
    small.LM.init_adapter(jax.random.key(0), LoRAConfig(rank=12, init="pissa", targets="k"), BASE)
    with pytest.raises(
        UserError, match=r"The lora\.rank of k is 13; with lora\.init pissa it can be 12 at most"
    ):
        small.LM.init_adapter(
            jax.random.key(0), LoRAConfig(rank=13, init="pissa", targets="q,k"), BASE
        )
