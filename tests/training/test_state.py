"""Schedules and optimizers against numbers worked out by hand; a state that shares no buffer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.training.optimizers import OptimizerConfig, learning_rate, make_optimizer, schedule
from perl_jax.training.state import SAMPLE, UPDATE, init_state

LORA = LoRAConfig(rank=1)


def rates(steps, **fields):
    """The rate of every step of a run and of the one after it, the largest being 1."""
    rule = schedule(OptimizerConfig(**fields), 1.0, steps)
    return [float(rule(step)) for step in range(steps + 1)]


def role(a=1.0, b=0.0, head=0.5):
    """Three leaves: A, B and the head's kernel; its bias is left out to keep the sums short."""
    return Adapter(
        lora={"a": jnp.full((2,), a), "b": jnp.full((3,), b)},
        head={"kernel": jnp.full((2,), head)},
        config=LORA,
    )


def first_update(config, gradients, parameters=None, tuning="lora"):
    """What one step of the optimizer adds to a role."""
    parameters = role() if parameters is None else parameters
    optimizer = make_optimizer(config, 10, tuning)
    return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]


# Schedules.


def test_constant_without_warmup():
    assert rates(4, schedule="constant") == [1.0] * 5


def test_warmup_begins_above_zero_and_ends_at_the_rate():
    # The first of 4 steps of warm-up has a quarter of the rate, the fourth all of it.
    assert rates(6, schedule="constant", warmup_steps=4) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1]
    )
    assert rates(3, schedule="constant", warmup_steps=1) == pytest.approx([1, 1, 1, 1])


def test_linear_decay_after_warmup():
    # 6 steps are left after the warm-up; step 9, the last, has a sixth of the rate, and 0 is after
    # it.
    expected = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates(10, schedule="linear", warmup_steps=4) == pytest.approx(expected, abs=1e-7)
    assert rates(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_cosine_decay_after_warmup():
    # (1 + cos(pi k / 4)) / 2 for k = 0..4.
    cosine = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    assert rates(6, schedule="cosine", warmup_steps=2) == pytest.approx([0.5, 1, *cosine], abs=1e-7)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_warmup_as_long_as_the_run(kind):
    assert rates(4, schedule=kind, warmup_steps=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1])


# Rates.


def test_default_rates_go_with_the_tuning():
    assert learning_rate(OptimizerConfig(), "lora") == 1e-4
    assert learning_rate(OptimizerConfig(), "full") == 1e-5
    assert learning_rate(OptimizerConfig(learning_rate=0.5), "full", 64) == 0.5
    # Sixteen times narrower: 16^0.75 = 8 times the rate; wider: the same.
    assert learning_rate(OptimizerConfig(), "lora", 128) == pytest.approx(8e-4)
    assert learning_rate(OptimizerConfig(), "full", 8192) == 1e-5


@pytest.mark.parametrize(("tuning", "rate"), [("lora", 1e-4), ("full", 1e-5)])
def test_first_update_of_adam_is_the_rate(tuning, rate):
    # Both moments of Adam begin as those of the gradient: -rate g / (|g| + epsilon).
    gradients = jax.tree.map(lambda x: jnp.full_like(x, -3.0), role())
    update = first_update(OptimizerConfig(name="adamw", clip_norm=None), gradients, tuning=tuning)
    for leaf in jax.tree.leaves(update):
        np.testing.assert_allclose(leaf, rate, rtol=2e-5)


def test_full_weights_have_the_body_rate():
    whole = Adapter(weights={"w": jnp.ones(2)}, head={"kernel": jnp.ones(2)})
    gradients = jax.tree.map(jnp.ones_like, whole)
    update = first_update(
        OptimizerConfig(name="adamw", learning_rate=0.1, head_learning_rate=0.7),
        gradients,
        whole,
        "full",
    )
    np.testing.assert_allclose(update.weights["w"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(update.head["kernel"], -0.7, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_head_has_its_own_rate(name):
    gradients = jax.tree.map(jnp.ones_like, role())
    same = first_update(OptimizerConfig(name=name, learning_rate=0.01), gradients)
    own = first_update(
        OptimizerConfig(name=name, learning_rate=0.01, head_learning_rate=0.2), gradients
    )
    np.testing.assert_allclose(same.head["kernel"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(own.head["kernel"], -0.2, rtol=1e-4)
    np.testing.assert_array_equal(own.lora["a"], same.lora["a"])
    np.testing.assert_allclose(own.lora["a"], -0.01, rtol=1e-4)


def test_rate_follows_the_schedule_step_by_step():
    # Steps 0, 1, 2 of 2 steps of warm-up and a linear decay over 2 more: half, all, all, half.
    config = OptimizerConfig(
        name="adamw", learning_rate=1.0, schedule="linear", warmup_steps=2, clip_norm=None
    )
    optimizer = make_optimizer(config, 4, "lora")
    parameters, state, sizes = role(), None, []
    state = optimizer.init(parameters)
    for _ in range(4):
        update, state = optimizer.update(jax.tree.map(jnp.ones_like, parameters), state, parameters)
        sizes.append(-float(update.lora["a"][0]))
    assert sizes == pytest.approx([0.5, 1, 1, 0.5], rel=1e-4)


# Clipping. With an epsilon of a million Adam's first update is -rate g / 1e6: it shows g itself.

SHOWS_GRADIENT = {"name": "adamw", "learning_rate": 1.0, "epsilon": 1e6}


@pytest.mark.parametrize(("norm", "factor"), [(1.0, 1 / 13), (26.0, 1.0), (6.5, 0.5), (None, 1.0)])
def test_clipping_is_by_the_norm_of_lora_and_head_together(norm, factor):
    # sqrt(2 * 2^2 + 3 * 1^2 + 2 * x^2) = 13 for the head's x^2 = 79.
    gradients = Adapter(
        lora={"a": jnp.full((2,), 2.0), "b": jnp.full((3,), 1.0)},
        head={"kernel": jnp.full((2,), 79**0.5)},
        config=LORA,
    )
    update = first_update(OptimizerConfig(clip_norm=norm, **SHOWS_GRADIENT), gradients)
    for leaf, gradient in zip(jax.tree.leaves(update), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(-1e6 * leaf, factor * gradient, rtol=1e-4)


# The two rules.


def test_adafactor_moves_a_zero_matrix():
    # At its first step the second moment is g^2, so the update is -rate sign(g); scaled by the size
    # of a B that is zero it would be about a thousandth of that.
    gradients = jax.tree.map(lambda x: jnp.full_like(x, -0.25), role())
    update = first_update(OptimizerConfig(learning_rate=0.01), gradients)
    np.testing.assert_allclose(update.lora["b"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(update.lora["a"], 0.01, rtol=1e-4)


def test_weight_decay():
    gradients = jax.tree.map(jnp.ones_like, role())
    adamw = first_update(
        OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5), gradients, role(a=4.0)
    )
    np.testing.assert_allclose(adamw.lora["a"], -0.1 * (1 + 0.5 * 4), rtol=1e-4)
    adafactor = first_update(
        OptimizerConfig(learning_rate=0.1, weight_decay=0.5), gradients, role(a=4.0)
    )
    np.testing.assert_allclose(adafactor.lora["a"], -(0.1 + 0.5 * 4), rtol=1e-4)


# The state.


def fresh_state():
    one = role()
    optimizers = {name: make_optimizer(OptimizerConfig(), 10) for name in ("policy", "value")}
    return one, init_state(
        {"policy": one, "value": one}, optimizers, jax.random.key(3), {"reference": one}
    )


def test_every_role_is_a_copy():
    # The state is donated each step: a buffer that two roles share would be given away twice.
    one, state = fresh_state()
    trees = (one, *state.roles.values(), *state.frozen.values())
    pointers = [leaf.unsafe_buffer_pointer() for tree in trees for leaf in jax.tree.leaves(tree)]
    assert len(set(pointers)) == len(pointers) == 12
    for tree in trees[1:]:
        for leaf, original in zip(jax.tree.leaves(tree), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(leaf, original)


def test_state_begins_at_step_zero():
    _, state = fresh_state()
    assert state.step == 0 and state.step.dtype == jnp.int32
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(3)))
    assert sorted(state.optimizers) == ["policy", "value"] and sorted(state.frozen) == ["reference"]


def test_step_keys_do_not_meet_their_own_children():
    # fold_in(key, i) and split(key, n)[i] are one key, so uses must not be folds of what is split.
    _, state = fresh_state()
    keys = []
    for step in range(3):
        for use in (UPDATE, SAMPLE):
            key = state.replace(step=jnp.int32(step)).step_key(use)
            keys += [
                key,
                *jax.random.split(key, 4),
                *(jax.random.fold_in(key, i) for i in range(4, 8)),
            ]
    distinct = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(distinct) == len(keys) == 54
