"""The table of all programs, the pieces that commands are planned from, and how large loading's are
on a slice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from perl_jax.adapters import combine
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.generation.config import RolloutConfig
from perl_jax.hub.model import merge_program, weights_program
from perl_jax.hub.presets import model_config
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.planning import starting
from perl_jax.planning.config import JOBS, READING, PlanConfig
from perl_jax.planning.jobs import plan_job, planned_model
from perl_jax.planning.known import COMMANDS, planned_for
from perl_jax.planning.measure import measure
from perl_jax.planning.pieces import Piece, Planned, device_bytes
from perl_jax.planning.reading import Role, plan_command
from perl_jax.planning.topology import topology
from perl_jax.runtime import sharding, trees
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training.rl_config import KLConfig
from tests import small
from tests.rollouts import even_base, placed_model

INT8 = QuantiseConfig("int8")


def small_model(quantised: QuantiseConfig = QuantiseConfig()):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices())
    return planned_model(
        dataclasses.replace(small.changed(layers=2, vocab_size=64), mesh=mesh),
        "planned",
        quantised,
        shard_adapters=False,
    )


def plans_of(command: str) -> Iterator[Planned]:
    """A command's plans over all settings that bring programs of their own."""
    settings = [{"lora": LoRAConfig(dora=True), "quantise": INT8}, {"tuning": "full"}, {}]
    if command == "rl":
        settings += [
            {"algorithm": AlgorithmConfig("ppo", minibatches=2)},
            {"algorithm": AlgorithmConfig("remax")},
        ]
    if command == "dpo":
        settings += [{"loss": "kto"}, {"loss": "orpo"}, {"loss": "kto", "tuning": "full"}]
    for fields in settings:
        config = PlanConfig(
            job=command,
            model="gemma2-2b",
            topology="v5e:2x2",
            batch=16,
            prompt_length=8,
            response_length=8,
            **fields,
        ).job_config()
        model = small_model(fields.get("quantise", QuantiseConfig()))
        if command in READING:
            role = Role(None if fields.get("tuning") == "full" else small.LORA)
            yield plan_command(model, config, role)
            if command in ("evaluate", "best-of"):
                yield plan_command(
                    model, dataclasses.replace(config, rollout=RolloutConfig(slots=8)), role
                )
            continue
        yield plan_job(model, config)
        if command in ("rl", "dpo") and config.tuning == "full":
            yield plan_job(model, dataclasses.replace(config, policy="-"))
        if command == "rl":
            yield plan_job(
                model,
                dataclasses.replace(config, kl=KLConfig(refresh=2), rollout=RolloutConfig(slots=8)),
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_program_of_the_table_is_planned_and_no_other(command):
    assert {*JOBS, *READING} == set(COMMANDS)
    found = set()
    for planned in plans_of(command):
        found |= {piece.name for piece in planned.pieces}
        for piece in planned.pieces:
            # Every shape has a place, and every component a piece names is one of the plan's.
            assert device_bytes((piece.args, piece.own, piece.cache)) > 0, piece.name
            assert set(piece.resident or ()) <= planned.resident.keys(), piece.name
    assert found == planned_for(command)


def test_each_reward_model_is_planned():
    """An ensemble's members are on the devices together; with terms alone there is no such
    program.
    """
    model = small_model()
    config = PlanConfig(
        job="rl",
        model="gemma2-2b",
        topology="v5e:2x2",
        batch=16,
        prompt_length=8,
        response_length=8,
    ).job_config()
    whole = lambda **fields: plan_job(model, dataclasses.replace(config, **fields))
    terms = '{"kind": "length", "maximum": 8}'
    one, three, none = whole(), whole(reward=("a", "b", "c")), whole(reward=(), terms=terms)
    assert {"reward", "reward_1", "reward_2"} <= three.resident["frozen roles"].keys()
    assert "reward" in {piece.name for piece in one.pieces} and "reward" not in {
        piece.name for piece in none.pieces
    }
    sizes = [planned.resident_bytes()["frozen roles"] for planned in (none, one, three)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0


# On a slice.

GATE = (80, 8192, 28672)


def llama_70b(quantised: QuantiseConfig = QuantiseConfig(), **mesh: int):
    """Llama 3.1 70B in bfloat16 on 16 v5e chips, fsdp 16."""
    devices = topology("v5e:4x4")
    shape = model_config("llama3.1-70b", dtype="bfloat16", param_dtype="bfloat16")
    lm = LanguageModel(
        shape, sharding.make_mesh(MeshConfig(**(mesh or {"data": 1, "fsdp": 16})), devices)
    )
    return planned_model(lm, "llama3.1-70b", quantised, shard_adapters=False)


def beside(piece: Piece) -> int:
    """Bytes of one device that a program takes beside its arguments, what they were padded with
    among them.
    """
    found = measure(Planned({}, ()), piece, "quick")
    assert found.refused is None, found.refused
    return sum(found.memory[part] for part in ("padding", "cache", "temporaries"))


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 16}, {"data": 1, "fsdp": 4, "tensor": 4}])
def test_70b_is_loaded_piece_by_piece(axes):
    """Writing a piece into a leaf, and the leaf's fingerprint, take no memory of the leaf's size
    (here 2.2 GiB a chip).
    """
    pytest.importorskip("libtpu")
    model = llama_70b(**axes)
    pieces = [
        piece
        for piece in starting.loading(model)
        if piece.of
        in ("layers/mlp/gate/kernel", "layers/mlp/down/kernel", "outer/embedding", "outer/lm_head")
    ]
    assert sorted({piece.name for piece in pieces}) == ["fingerprint", "place"] and len(pieces) == 8
    for piece in pieces:
        assert device_bytes(piece.args) > 100 * 2**20, piece.of
        # A piece from a file has 16 MiB.
        assert beside(piece) < 2**25, (piece.name, piece.of)


def test_first_values_of_dora_take_a_layer_of_70b():
    pytest.importorskip("libtpu")
    model = llama_70b()
    pieces = list(starting.first_values(model, LoRAConfig(targets="gate", dora=True)))
    assert [piece.of for piece in pieces] == ["layers/mlp/gate"]
    layer = math.prod(GATE[1:]) * 4 // 16
    assert beside(pieces[0]) < 2 * layer


def test_checksums_of_full_tuning_take_no_memory_of_a_leafs_size():
    pytest.importorskip("libtpu")
    model = llama_70b()
    leaf = trees.named_leaves(model.base)["layers/mlp/gate/kernel"]
    weight = jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)
    (piece,) = starting.digests({"weights": weight})
    assert beside(piece) < 2**20


def test_quantising_a_leaf_of_70b_fits_beside_the_quantised_base():
    pytest.importorskip("libtpu")
    model = llama_70b(INT8)
    piece = next(
        piece
        for piece in starting.loading(model)
        if piece.name == "quantise" and piece.of == "layers/mlp/gate/kernel"
    )
    found = measure(Planned({"base": model.base}, ()), piece, "quick")
    assert found.refused is None and found.peak < 15.7 * 2**30


def test_what_full_tuning_starts_from_is_where_the_base_is():
    """Float32 weights, and a base with an adapter in it; taken op by op, layers of a split leaf
    come whole onto the first device.
    """
    lm = dataclasses.replace(small.changed(layers=2, vocab_size=64), mesh=small_model().mesh)
    model = placed_model(lm, even_base(lm), MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    adapter = lm.init_adapter(jax.random.key(0), small.LORA)
    adapter = adapter.replace(lora=jax.tree.map(lambda leaf: leaf + 0.1, adapter.lora))
    merged = merge_program(model.lm)(model.base, adapter)
    weights = weights_program(model.lm)(merged).weights
    places = model.lm.base_shardings()
    one_device = combine.merge(jax.tree.map(np.asarray, model.base), adapter)
    for name, leaf in trees.named_leaves(weights).items():
        assert (
            leaf.sharding == places[name] == trees.named_leaves(merged)[name].sharding
            and leaf.dtype == np.float32
        ), name
        np.testing.assert_allclose(
            leaf, trees.named_leaves(one_device)[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "fields",
    [{"lora": LoRAConfig(init="pissa")}, {"rollout": RolloutConfig(slots=8)}],
    ids=["pissa", "slots"],
)
def test_first_values_and_slots_compile_for_a_slice(fields):
    """What no other plan of the tests compiles for a TPU: singular values, and continuous
    batching.
    """
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), topology("v5e:2x2"))
    model = planned_model(
        dataclasses.replace(small.changed(layers=2, vocab_size=256), mesh=mesh),
        "planned",
        QuantiseConfig(),
        shard_adapters=False,
    )
    config = PlanConfig(
        job="rl",
        model="gemma2-2b",
        topology="v5e:2x2",
        batch=16,
        prompt_length=8,
        response_length=8,
    ).job_config()
    planned = plan_job(model, dataclasses.replace(config, **fields))
    names = {piece.name for piece in planned.pieces}
    assert names >= (
        {"first values"} if "lora" in fields else {"vacant", "admit", "decode", "fewer"}
    )
    for piece in planned.pieces:
        assert measure(planned, piece, "quick").refused is None, piece.name
