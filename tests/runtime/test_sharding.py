"""Where arrays live, and that a job's numbers do not depend on it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from perl_jax.adapters.full import full_weights
from perl_jax.errors import UserError
from perl_jax.objectives import supervised as supervised_lib
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.runtime import sharding, trees
from perl_jax.runtime.programs import Program
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training.commands import SFTCommand
from perl_jax.training.fit import initial_state, learn_program
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import init_state
from perl_jax.types import Pairs
from tests import small
from tests.rollouts import OPTIMIZER, Rehearsal, even_base, placed_model, prompts, rl_config

LM = small.changed(layers=2, vocab_size=64)
BASE = even_base(LM)
DEVICES = jax.devices()
# Name -> mesh and the order of its devices.
MESHES = {
    "data": (MeshConfig(data=8), DEVICES),
    "fsdp and tensor": (MeshConfig(data=1, fsdp=4, tensor=2), DEVICES),
    "all three": (MeshConfig(data=2, fsdp=2, tensor=2), DEVICES),
    "four": (MeshConfig(data=2, fsdp=2), DEVICES[:4]),
    "permuted": (
        MeshConfig(data=2, fsdp=2, tensor=2),
        [DEVICES[i] for i in (3, 0, 6, 1, 7, 4, 2, 5)],
    ),
}
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
# float32: a device adds its own part first, so sums differ in their last bits, about 1e-7 of the
# largest term; a few layers of that.
TOLERANCE = 2e-5


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), DEVICES)


# Rules.


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("layers", "embed", "heads"), (3, 32, 24), (None, "fsdp", "tensor")),
        (("layers", "heads", "embed"), (3, 24, 32), (None, "tensor", "fsdp")),
        (("layers", "embed", "kv_heads"), (3, 32, 12), (None, "fsdp", "tensor")),
        (("layers", "mlp", "embed"), (3, 44, 32), (None, "tensor", "fsdp")),
        (("vocab", "embed"), (64, 32), ("tensor", "fsdp")),
        (("embed", "rank"), (32, 8), ("fsdp", None)),
        # What a mesh axis does not divide stays whole, and only that dimension.
        (("vocab", "embed"), (61, 32), (None, "fsdp")),
        (("vocab", "embed"), (64, 33), ("tensor", None)),
        # Vectors stay whole.
        (("embed",), (32,), (None,)),
        (("layers", "embed"), (3, 32), (None, None)),
    ],
)
def test_partition_follows_the_rules(axes, shape, spec):
    assert sharding.partition_spec(axes, shape, mesh(2, 2, 2)) == PartitionSpec(*spec)


def test_two_dimensions_cannot_have_one_mesh_axis():
    with pytest.raises(ValueError, match="map two dimensions to one mesh axis"):
        sharding.partition_spec(("heads", "mlp"), (8, 8), mesh(2, 2, 2))
    # One of the two is not divided, so that only one is split.
    assert sharding.partition_spec(("heads", "mlp"), (8, 7), mesh(2, 2, 2)) == PartitionSpec(
        "tensor", None
    )


def test_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="experts"):
        sharding.partition_spec(("experts", "embed"), (8, 8), mesh(2, 2, 2))


def test_every_leaf_of_the_base_has_a_place():
    places = dataclasses.replace(LM, mesh=mesh(2, 2, 2)).base_shardings()
    kernel = lambda *spec: PartitionSpec(None, *spec)
    expected = {
        "layers/attention/q/kernel": kernel("fsdp", "tensor"),
        "layers/attention/k/kernel": kernel("fsdp", "tensor"),
        "layers/attention/v/kernel": kernel("fsdp", "tensor"),
        "layers/attention/o/kernel": kernel("tensor", "fsdp"),
        "layers/mlp/gate/kernel": kernel("fsdp", "tensor"),
        "layers/mlp/up/kernel": kernel("fsdp", "tensor"),
        "layers/mlp/down/kernel": kernel("tensor", "fsdp"),
        "layers/attention_norm/scale": kernel(None),
        "layers/mlp_norm/scale": kernel(None),
        "outer/embedding": PartitionSpec("tensor", "fsdp"),
        "outer/final_norm/scale": PartitionSpec(None),
    }
    assert {name: place.spec for name, place in places.items()} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data": 0},
            "mesh.data is 0; it must be greater than 0, or -1 for all remaining devices.",
        ),
        ({"fsdp": 0}, "mesh.fsdp is 0; it must be a finite number greater than 0."),
        ({"tensor": -1}, "mesh.tensor is -1"),
    ],
)
def test_wrong_meshes_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        MeshConfig(**fields)
    assert message in str(error.value)


def test_a_mesh_fills_its_devices_in_their_order():
    made = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), DEVICES)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [device.id for device in made.devices.flat] == [device.id for device in DEVICES]
    for config in (MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=-1, fsdp=16)):
        with pytest.raises(UserError, match="does not fill 8 devices"):
            sharding.make_mesh(config, DEVICES)


# Batches.


def test_a_batch_is_split_over_rows():
    batch = small.make_tokens()
    placed = sharding.put_batch(batch, mesh(2, 2, 2))
    small.assert_same(jax.device_get(placed), batch)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.spec == PartitionSpec(("data", "fsdp"))
        # Two rows on a device, the two devices of the tensor axis holding the same ones.
        starts = [
            (shard.index[0].start or 0, shard.data.shape[0]) for shard in leaf.addressable_shards
        ]
        assert sorted(starts) == sorted([(row, 2) for row in (0, 2, 4, 6)] * 2)


def test_rows_that_do_not_divide_are_refused():
    batch = jax.tree.map(lambda leaf: leaf[:6], small.make_tokens())
    message = (
        "A batch of 6 rows does not divide over the mesh's data x fsdp = 4 parts; change "
        "batch_size or mesh."
    )
    with pytest.raises(UserError) as error:
        sharding.put_batch(batch, mesh(2, 2, 2))
    assert str(error.value) == message


# States.


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_full_weights_and_their_moments_are_placed_like_the_base(name):
    # Wide enough for Adafactor to factor its second moments (128 and more).
    lm = small.changed(layers=2, width=128, ffn_width=136, vocab_size=64)
    model = placed_model(lm, jax.jit(lm.init_base)(jax.random.key(0)), MeshConfig(1, 4, 2), DEVICES)
    optimizers = {"policy": make_optimizer(OptimizerConfig(name=name), 10, "full")}
    role = full_weights(model.base).replace(head=small.make_head(lm))
    state = model.place(init_state({"policy": role}, optimizers, jax.random.key(0)))
    seen = dict.fromkeys(model.lm.base_shardings(), 0)
    for path, leaf in trees.named_leaves(state).items():
        mirrored = [
            n
            for n, w in trees.named_leaves(model.base).items()
            if path.endswith("weights/" + n) and w.shape == leaf.shape
        ]
        if mirrored:
            seen[mirrored[0]] += 1
            assert leaf.sharding == model.lm.base_shardings()[mirrored[0]], path
        else:
            assert leaf.sharding.is_fully_replicated, path
    # The weight itself; two moments of Adam; of Adafactor one where it is not factored.
    factored = [n for n, s in model.lm.base_shardings().items() if "mlp" in n and "kernel" in n]
    assert {seen[n] for n in factored} == {3 if name == "adamw" else 1}
    assert seen["outer/embedding"] == (3 if name == "adamw" else 2)


def test_adapters_are_replicated():
    model = placed_model(LM, BASE, *MESHES["all three"])
    optimizers = {"policy": make_optimizer(OPTIMIZER, 10)}
    state = model.place(
        init_state({"policy": small.make_adapter(LM)}, optimizers, jax.random.key(0))
    )
    assert all(
        leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
        for leaf in jax.tree.leaves(state)
    )


# One update, on one device and on eight.


def supervised(objective: str, tuning: str, where: str | None) -> tuple[Any, dict]:
    """The new state and metrics of one update of a supervised job on a mesh."""
    model = placed_model(LM, BASE, *([] if where is None else MESHES[where]))
    chosen, rejected = small.make_tokens(), small.make_tokens(small.ROWS[::-1], seed=5)
    name, function, batch = {
        "sft": ("policy", supervised_lib.sft_objective, chosen),
        "pairwise": (
            "reward",
            supervised_lib.pairwise_objective,
            Pairs(chosen, rejected, np.ones(8, np.float32)),
        ),
    }[objective]
    config = SFTCommand(
        run="-", model="-", tuning=tuning, batch_size=8, optimizer=OPTIMIZER, microbatches=2
    )
    role = small.make_adapter(LM) if tuning == "lora" else small.make_full(BASE, LM)
    optimizers = {name: make_optimizer(config.optimizer, 10, tuning)}
    state = initial_state(model, config, {name: role}, optimizers)
    program = learn_program(model, config, functools.partial(function, LM), state, optimizers)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    state, metrics = program(
        state, None if tuning == "full" else model.base, sharding.put_batch(batch, model.mesh)
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    return jax.device_get(state), jax.device_get(metrics)


@functools.cache
def on_one_device(objective: str, tuning: str) -> tuple[Any, dict]:
    return supervised(objective, tuning, None)


def assert_near(left: Any, right: Any, least: float = 1e-3) -> None:
    """Every leaf, relative to the size of its largest number (or `least`, if that is larger)."""
    for (name, a), b in zip(trees.named_leaves(left).items(), jax.tree.leaves(right), strict=True):
        scale = max(float(np.abs(b).max()), least)
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=0,
            atol=TOLERANCE * scale,
            err_msg=name,
        )


def supervised_cases() -> list:
    quick = {("sft", "full", "all three")}
    cases = [
        (objective, tuning, where)
        for objective in ("sft", "pairwise")
        for tuning in ("lora", "full")
        for where in MESHES
    ]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("objective", "tuning", "where"), supervised_cases())
def test_supervised_update_is_the_same_on_any_mesh(objective, tuning, where):
    state, metrics = supervised(objective, tuning, where)
    expected, expected_metrics = on_one_device(objective, tuning)
    assert metrics["finite"] and expected_metrics["finite"]
    # Means of numbers of both signs: their size says nothing of the size of what was added.
    assert_near(metrics, expected_metrics, least=1.0)
    assert_near(state.roles, expected.roles)
    assert_near(state.optimizers, expected.optimizers)


def reinforce_update(where: str | None) -> tuple[Any, dict, Any]:
    """Samples, scores and learns once; also returns the rollout."""
    model = placed_model(LM, BASE, *([] if where is None else MESHES[where]))
    config = rl_config(
        temperature=1.0, shaping=ShapingConfig(missing_eos_penalty=0.5), microbatches=2
    )
    run = Rehearsal(
        model, small.make_adapter(LM, head=False), small.make_adapter(LM, seed=7), config
    )
    # The programs are replaced on this one object, so that the rollout can be looked at.
    kept, sample = [], run.programs.sample
    run.programs.sample = lambda *arguments: kept.append(sample(*arguments)) or kept[0]
    metrics = run.step(prompts(LM))
    return jax.device_get(run.state), metrics, jax.device_get(kept[0])


@functools.cache
def reinforce_on_one_device() -> tuple[Any, dict, Any]:
    return reinforce_update(None)


@pytest.mark.parametrize(
    "where",
    [slow("data"), slow("fsdp and tensor"), slow("permuted"), slow("all three"), slow("four")],
)
def test_reinforce_update_is_the_same_on_any_mesh(where):
    (state, metrics, rollout), (expected, expected_metrics, expected_rollout) = (
        reinforce_update(where),
        reinforce_on_one_device(),
    )
    # The draws are functions of the key and the row alone. Logits differ by rounding, about 1e-6,
    # and would change a token only where two sums of logit and noise are as close as that.
    small.assert_same(rollout.sequences, expected_rollout.sequences)
    assert len(np.unique(rollout.sequences.tokens_BT[rollout.sequences.response_BT])) > 10
    assert_near(rollout.logp_BT, expected_rollout.logp_BT)
    assert metrics["kl/sequence"] == expected_metrics["kl/sequence"] == 0.0
    # These two are rounding itself: ratios of numbers that are equal but for it.
    metrics, expected_metrics = dict(metrics), dict(expected_metrics)
    for values in (metrics, expected_metrics):
        assert (
            values.pop("policy/ratio_deviation") < 1e-5
            and abs(values.pop("sampler/mismatch") - 1) < 1e-5
        )
    assert_near(metrics, expected_metrics, least=1.0)
    assert_near(state.roles, expected.roles)


def test_programs_follow_their_arguments_to_another_mesh():
    # One program, two meshes: arrays of the second are not forced into what was compiled for the
    # first.
    program = Program("double", lambda x: 2 * x)
    for made in (mesh(8, 1, 1), mesh(1, 4, 2)):
        for _ in range(2):
            x = sharding.put_batch(np.arange(8.0, dtype=np.float32), made)
            np.testing.assert_array_equal(program(x), 2 * np.arange(8))
    assert program.compilations == 2
