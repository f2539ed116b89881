"""Checkpoints and artefacts: bit for bit there and back, no base in them, refusals by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError
from perl_jax.hub import artefacts
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.artefacts import Record
from perl_jax.models.config import Rope
from perl_jax.runs import checkpoints as checkpoints_lib
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import files, json_values, trees
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import TrainState, init_state
from tests import small

BASE = small.make_base()
OPTIMIZERS = {
    "policy": make_optimizer(
        OptimizerConfig(name="adamw", learning_rate=1e-3, warmup_steps=2, schedule="cosine"), 10
    ),
    "reward": make_optimizer(OptimizerConfig(name="adafactor", head_learning_rate=1e-2), 10),
}


@functools.cache
def weights() -> str:
    return trees.fingerprint(BASE)


def fingerprint() -> str:
    return artefacts.base_fingerprint(small.CONFIG, weights())


def make_state(seed: int = 0, lora: LoRAConfig = small.LORA) -> TrainState:
    """Two roles with unlike optimizers and a frozen one; no leaf is zero or like another."""
    roles = {
        name: small.make_adapter(lora=lora, seed=seed + i, head=name == "reward")
        for i, name in enumerate(OPTIMIZERS)
    }
    state = init_state(
        roles,
        OPTIMIZERS,
        jax.random.key(seed),
        frozen={"reference": small.make_adapter(lora=lora, seed=9, head=False)},
    )
    noise = np.random.default_rng(seed)
    fill = lambda leaf: jnp.asarray(9 * noise.random(leaf.shape) + 1, leaf.dtype)
    return state.replace(step=jnp.int32(2), optimizers=jax.tree.map(fill, state.optimizers))


@functools.cache
def the_state() -> TrainState:
    return make_state()


def at_step(step: int) -> TrainState:
    """The same state at another step, told apart by its first role's leaves."""
    state = the_state()
    moved = jax.tree.map(lambda leaf: leaf + step, state.roles["policy"])
    return state.replace(step=jnp.int32(step), roles=state.roles | {"policy": moved})


def abstract(state: TrainState) -> TrainState:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state
    )


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return tmp_path / "checkpoints"


# Checkpoints.


def test_a_state_comes_back_bit_for_bit(folder):
    state, host = the_state(), {"cursor": {"epoch": 3, "row": 17}, "best": -0.25}
    saved = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None
    checkpoints.save(state, host)
    checkpoints.close()
    # Read by a manager that has never seen the state.
    again = Checkpoints(folder)
    restored, restored_host = again.restore(abstract(state))
    again.close()
    small.assert_same(jax.tree.map(np.array, restored), saved)
    assert restored_host == host and again.latest_step() == 2
    names = set(trees.named_leaves(restored))
    assert (
        "roles/reward/head/kernel" in names
        and "frozen/reference/lora/layers/mlp/up/lora_b" in names
    )
    assert any(name.startswith("optimizers/policy") and "mu" in name for name in names)
    assert any(name.startswith("optimizers/reward") and "head" in name for name in names)


def test_a_restored_state_lies_where_it_is_asked_to(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(the_state(), {})
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    specs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), the_state()
    )
    restored, _ = checkpoints.restore(specs)
    checkpoints.close()
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {place}


def stored_leaves(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what lies in a checkpoint's state, by its own metadata."""
    tree = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    return {
        "/".join(part["key"] for part in entry["key_metadata"]): tuple(
            entry["value_metadata"].get("write_shape") or ()
        )
        for entry in tree.values()
    }


def test_no_base_leaf_is_saved(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(the_state(), {})
    checkpoints.close()
    stored = stored_leaves(folder / "2" / "state")
    assert len(stored) >= len(jax.tree.leaves(the_state()))
    assert stored["roles/policy/lora/layers/attention/q/lora_a"] == (3, 32, 5)
    base = trees.named_leaves(BASE)
    matrices = {leaf.shape for leaf in base.values() if leaf.ndim > 1} - {(3, 32)}
    for name, shape in stored.items():
        assert not any(name.endswith(base_name) for base_name in base), name
        assert shape not in matrices, name
    # Smaller on disk than the base alone would be in memory, optimizer state and all.
    assert files.folder_bytes(folder / "2") < 4 * trees.size_bytes(the_state())


def test_the_last_and_the_best_are_kept(folder):
    checkpoints = Checkpoints(folder, keep=2, best="accuracy")
    for step, accuracy in (
        (1, 0.6),
        (2, 0.9),
        (3, None),
        (4, 0.7),
        (5, None),
        (6, 0.9 - 1e-9),
        (7, 0.8),
    ):
        checkpoints.save(
            at_step(step), {"step": step}, None if accuracy is None else {"accuracy": accuracy}
        )
    kept = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert kept == [2, 6, 7] and checkpoints.best_step() == 2 and checkpoints.latest_step() == 7
    for step in kept:
        restored, host = checkpoints.restore(abstract(the_state()), step)
        small.assert_same(jax.tree.map(np.array, restored), jax.tree.map(np.array, at_step(step)))
        assert host == {"step": step}
    assert int(checkpoints.restore(abstract(the_state()))[0].step) == 7
    checkpoints.close()
    # A new manager over the same folder knows the best one too.
    again = Checkpoints(folder, keep=2, best="accuracy")
    assert again.best_step() == 2
    again.save(at_step(8), {}, {"accuracy": 0.95})
    again.close()
    assert sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) == [7, 8]


def test_without_a_metric_only_the_last_are_kept(folder):
    checkpoints = Checkpoints(folder, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(at_step(step), {})
    checkpoints.close()
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["3"]


@pytest.mark.parametrize("leftover", ["4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"])
def test_an_interrupted_save_does_no_harm(folder, leftover):
    checkpoints = Checkpoints(folder)
    checkpoints.save(at_step(3), {"step": 3})
    checkpoints.close()
    # What a killed process leaves behind: some of the files, under the temporary name.
    shutil.copytree(folder / "3" / "state", folder / leftover / "state")
    again = Checkpoints(folder)
    assert again.latest_step() == 3
    restored, host = again.restore(abstract(the_state()))
    assert host == {"step": 3} and int(restored.step) == 3
    again.save(at_step(4), {"step": 4})
    restored, host = again.restore(abstract(the_state()))
    again.close()
    small.assert_same(jax.tree.map(np.array, restored), jax.tree.map(np.array, at_step(4)))
    assert host == {"step": 4}


def test_a_checkpoint_of_another_job_is_refused(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(the_state(), {})
    for lora in (LoRAConfig(rank=3, targets="all-linear"), LoRAConfig(rank=5, targets="q")):
        other = jax.eval_shape(functools.partial(make_state, lora=lora))
        with pytest.raises(
            UserError, match=f"The checkpoint of step 2 in {folder} does not fit this job"
        ):
            checkpoints.restore(abstract(other))
    checkpoints.close()


# One changed bit.


def flip(path: pathlib.Path, draw: random.Random) -> str:
    """Turns one bit of a file; says which."""
    content = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path}, byte {at}, bit {bit}"


def files_below(folder: pathlib.Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    )


@functools.cache
def few_leaves() -> TrainState:
    """A state that is quick to save."""
    lora = LoRAConfig(rank=2, targets="q")
    state = init_state(
        {"policy": small.make_adapter(lora=lora, head=False)},
        {"policy": OPTIMIZERS["policy"]},
        jax.random.key(0),
    )
    return state.replace(step=jnp.int32(3))


FLIPS = [pytest.param(1, id="once"), pytest.param(12, id="often", marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", FLIPS)
def test_one_flipped_bit_in_a_checkpoint_never_passes(tmp_path, times):
    older = few_leaves()
    newer = older.replace(step=jnp.int32(4), roles=jax.tree.map(lambda leaf: leaf + 1, older.roles))
    checkpoints = Checkpoints(tmp_path / "whole", best="accuracy")
    checkpoints.save(older, {"cursor": 3}, {"accuracy": 0.5})
    checkpoints.save(newer, {"cursor": 4}, {"accuracy": 0.25})
    checkpoints.close()
    seen, draw = {"refused": 0, "older": 0, "newer": 0}, random.Random(0)
    for name in times * files_below(tmp_path / "whole" / "4"):
        folder = tmp_path / "flipped"
        shutil.copytree(tmp_path / "whole", folder)
        where = flip(folder / "4" / name, draw)
        try:
            again = Checkpoints(folder, best="accuracy")
            state, host = again.restore_newest(abstract(older))
            best = again.best_step()
            again.close()
        except UserError as error:
            assert str(folder) in str(error)  # noqa: PT017  refused, or unharmed
            seen["refused"] += 1
        else:
            # The one before it, or the very same.
            step = int(state.step)
            small.assert_same(
                jax.tree.map(np.array, state), jax.tree.map(np.array, {3: older, 4: newer}[step])
            )
            assert host == {"cursor": step} and best == 3, where
            seen["older" if step == 3 else "newer"] += 1
        shutil.rmtree(folder)
    assert seen["older"] >= 3 * times, seen


def test_a_damaged_array_is_named_and_the_checkpoint_before_it_taken(folder, capsys):
    checkpoints = Checkpoints(folder)
    older = few_leaves()
    checkpoints.save(older, {"cursor": 3})
    checkpoints.save(older.replace(step=jnp.int32(4)), {"cursor": 4})
    checkpoints.close()
    # What is in the newest one is whole to its storage, but not what its checksums are of.
    shutil.rmtree(folder / "4" / "state")
    with ocp.StandardCheckpointer() as checkpointer:
        moved = jax.tree.map(lambda leaf: leaf, older).replace(step=jnp.int32(4))
        kernel = moved.roles["policy"].lora["layers"]["attention"]["q"]
        kernel["lora_b"] = kernel["lora_b"].at[0, 1, 3].mul(-1)
        checkpointer.save(folder / "4" / "state", moved)
    again = Checkpoints(folder)
    with pytest.raises(
        UserError,
        match=r"The checkpoint of step 4 in .* is damaged "
        r"\(roles/policy/lora/layers/attention/q/lora_b\)",
    ):
        again.restore(abstract(older))
    state, host = again.restore_newest(abstract(older))
    assert int(state.step) == 3 and host == {"cursor": 3}
    assert (
        "It is set aside as 4.damaged, and the run goes on from step 3." in capsys.readouterr().out
    )
    again.save(older.replace(step=jnp.int32(4)), {"cursor": 4})
    assert int(again.restore(abstract(older))[0].step) == 4
    again.close()


def test_a_cursor_or_a_metric_that_is_not_the_saved_one_is_refused(folder):
    """Files that are whole in themselves, with another number in them."""
    checkpoints = Checkpoints(folder, best="accuracy")
    checkpoints.save(few_leaves(), {"cursor": 3}, {"accuracy": 0.5})
    checkpoints.close()
    path = folder / "3" / "host" / "metadata"
    assert json.loads(path.read_text()) == {"cursor": 3}
    path.write_text(json.dumps({"cursor": 4}))
    with pytest.raises(
        UserError, match=r"The checkpoint of step 3 in .* is damaged \(its data cursor\)"
    ):
        Checkpoints(folder, best="accuracy")
    path.write_text(json.dumps({"cursor": 3}))
    measured = folder / "3" / "metrics" / "metrics"
    assert json.loads(measured.read_text()) == {"accuracy": 0.5}
    measured.write_text(json.dumps({"accuracy": 0.75}))
    with pytest.raises(
        UserError,
        match=r"The checkpoint of step 3 in .* is damaged \(its checksums or its metrics\)",
    ):
        Checkpoints(folder, best="accuracy")


def test_a_checkpoint_of_which_a_part_is_gone_gives_way_to_the_one_before_it(folder, capsys):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (3, 4, 5):
        checkpoints.save(few_leaves().replace(step=jnp.int32(step)), {"cursor": step})
    checkpoints.close()
    shutil.rmtree(folder / "5" / "state")
    shutil.rmtree(folder / "4" / "host")
    again = Checkpoints(folder, keep=3)
    state, host = again.restore_newest(abstract(few_leaves()))
    again.close()
    assert (int(state.step), host) == (3, {"cursor": 3})
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[2] for line in said] == [
        f"{part} is missing): what is read is not what was saved. It is set aside as "
        f"{step}.damaged."
        for step, part in ((4, "host/metadata"), (5, "state/_METADATA"))
    ]


def test_a_checkpoint_without_checksums_is_read_as_before(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(few_leaves(), {"cursor": 3})
    checkpoints.close()
    # As an earlier version wrote it.
    shutil.rmtree(folder / "3" / "digests")
    record = folder / "3" / "_CHECKPOINT_METADATA"
    values = json.loads(record.read_text())
    del values["item_handlers"]["digests"]
    record.write_text(json.dumps(values))
    again = Checkpoints(folder)
    state, host = again.restore_newest(abstract(few_leaves()))
    again.close()
    small.assert_same(jax.tree.map(np.array, state), jax.tree.map(np.array, few_leaves()))
    assert host == {"cursor": 3}


# Artefacts.


def record(role: str = "reward", **fields) -> Record:
    values = {
        "tuning": "lora",
        "lora": small.LORA,
        "has_head": True,
        "base_name": "tiny",
        "base_fingerprint": fingerprint(),
    }
    values |= {
        "tokenizer_fingerprint": "f" * 16,
        "step": 12,
        "metrics": {"accuracy": 0.75},
        "score_mean": 0.5,
        "score_std": 2.0,
    }
    return Record(role=role, **values | fields)


def load(folder, role: str = "reward", **options):
    return artefacts.load_artefact(
        folder, small.LM, weights=weights(), base_name="tiny", role=role, **options
    )


@pytest.fixture
def artefact(tmp_path) -> pathlib.Path:
    artefacts.save_artefact(tmp_path / "reward", small.make_adapter(), record())
    return tmp_path / "reward"


def change_record(folder: pathlib.Path, **fields) -> None:
    path = folder / artefacts.RECORD
    path.write_text(json.dumps(json_values.with_checksum(json.loads(path.read_text()) | fields)))


@pytest.mark.parametrize("kind", ["lora", "lora without head", "full"])
def test_artefacts_come_back_bit_for_bit(tmp_path, kind):
    adapter = {
        "lora": small.make_adapter(),
        "lora without head": small.make_adapter(head=False),
        "full": small.make_full(BASE),
    }[kind]
    role = "policy" if adapter.head is None else "reward"
    written = record(
        role,
        has_head=adapter.head is not None,
        tuning="full" if kind == "full" else "lora",
        lora=adapter.config,
    )
    artefacts.save_artefact(tmp_path / "a", adapter, written)
    loaded, read = load(tmp_path / "a", role)
    assert read == written and loaded.config == adapter.config
    small.assert_same(loaded, adapter)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["artefact.json", "tree"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


FRESH = """
import pathlib, sys
import jax, numpy as np
from perl_jax.hub import artefacts, config_json, weights
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees

folder = pathlib.Path(sys.argv[1])
np.random.default_rng(123).standard_normal(3)
config = config_json.read_config(folder / "model")
lm, base = LanguageModel(config), weights.load_base(folder / "model", config)
adapter, record = artefacts.load_artefact(
    folder / "reward", lm, weights=trees.fingerprint(base), base_name="again", role="reward"
)
batch = np.load(folder / "batch.npz")
score_B = jax.jit(lm.score)(base, adapter, batch["tokens"], batch["valid"])
np.save(folder / "scores.npy", np.stack([score_B, record.normalise(score_B)]))
"""


def test_a_fresh_process_scores_identically(tmp_path, artefact):
    tokens = small.make_tokens()
    hf_checkpoint.save_base(tmp_path / "model", small.CONFIG, BASE, small.TOKEN_IDS)
    np.savez(tmp_path / "batch.npz", tokens=tokens.tokens_BT, valid=tokens.valid_BT)
    subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    score_B, normalised_B = np.load(tmp_path / "scores.npy")
    expected_B = small.score(small.LM, BASE, small.make_adapter(), tokens)
    np.testing.assert_array_equal(score_B, expected_B)
    np.testing.assert_allclose(normalised_B, (np.array(expected_B) - 0.5) / 2, rtol=1e-6)


def test_shardings_are_those_asked_for(artefact):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded, _ = load(artefact, shardings=lambda abstract: jax.tree.map(lambda _: place, abstract))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {place}
    small.assert_same(loaded, small.make_adapter())


def test_saving_again_replaces_the_whole_artefact(tmp_path, artefact):
    (artefact / "stale").write_text("")
    # Leftovers of interrupted saves are in nobody's way.
    for leftover in ("reward.tmp", "reward.old"):
        (tmp_path / leftover / "tree").mkdir(parents=True)
    other = small.make_adapter(seed=7)
    artefacts.save_artefact(artefact, other, record(step=13))
    loaded, read = load(artefact)
    small.assert_same(loaded, other)
    assert read.step == 13 and sorted(path.name for path in tmp_path.iterdir()) == ["reward"]
    assert not (artefact / "stale").exists()


def test_an_interrupted_save_leaves_the_old_artefact(artefact, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts.files, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        artefacts.save_artefact(artefact, small.make_adapter(seed=7), record(step=13))
    loaded, read = load(artefact)
    small.assert_same(loaded, small.make_adapter())
    assert read.step == 12


def test_another_base_is_refused_and_both_are_named(artefact):
    other = trees.fingerprint(jax.tree.map(lambda leaf: 1.5 * np.array(leaf), BASE))
    with pytest.raises(UserError) as error:
        artefacts.load_artefact(artefact, small.LM, weights=other, base_name="other", role="reward")
    for text in (
        str(artefact),
        f"tiny ({fingerprint()})",
        f"other ({artefacts.base_fingerprint(small.CONFIG, other)})",
    ):
        assert text in str(error.value)


def test_another_role_is_refused(artefact):
    with pytest.raises(UserError, match="holds a reward adapter; a policy adapter is needed here"):
        load(artefact, "policy")


@pytest.mark.parametrize("role", ["reward", "value"])
def test_a_scoring_artefact_without_its_head_is_refused(tmp_path, role):
    artefacts.save_artefact(
        tmp_path / "a", small.make_adapter(head=False), record(role, has_head=False)
    )
    with pytest.raises(
        UserError, match=f"{tmp_path}/a is a {role} artefact without its scalar head"
    ):
        load(tmp_path / "a", role)


@pytest.mark.parametrize(
    "change",
    [
        {"lora": {**dataclasses.asdict(small.LORA), "rank": 4}},
        {"lora": {**dataclasses.asdict(small.LORA), "targets": "attention"}},
        {"tuning": "full", "lora": None},
    ],
    ids=["rank", "targets", "tuning"],
)
def test_a_tree_that_does_not_fit_its_record_is_refused(artefact, change):
    change_record(artefact, **change)
    with pytest.raises(UserError, match=r"does not fit its artefact\.json"):
        load(artefact)


def test_a_record_that_claims_a_head_the_tree_lacks_is_refused(tmp_path):
    artefacts.save_artefact(tmp_path / "a", small.make_adapter(head=False), record())
    with pytest.raises(UserError, match=r"does not fit its artefact\.json"):
        load(tmp_path / "a")


def test_a_missing_tree_is_refused(artefact):
    shutil.rmtree(artefact / "tree")
    with pytest.raises(UserError, match=r"does not fit its artefact\.json"):
        load(artefact)


def test_other_folders_and_newer_formats_are_refused(tmp_path, artefact):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=f"{path} is not an artefact: there is no artefact.json in it"
        ):
            load(path)
    # The folder of a run, whose artefacts are below it.
    run = tmp_path / "run"
    shutil.copytree(artefact, run / "adapters" / "policy")
    (run / "adapters" / "torn").mkdir()
    expected = f"there is no artefact.json in it; did you mean {run}/adapters/policy?"
    with pytest.raises(UserError, match=f"{run} is not an artefact: {re.escape(expected)}$"):
        load(run)
    shutil.copytree(artefact, run / "adapters" / "value")
    with pytest.raises(UserError, match=r"adapters/policy or .*/run/adapters/value\?$"):
        load(run)
    change_record(artefact, format=3, surprise=True)
    with pytest.raises(UserError, match="has format 3; this version reads formats 1 and 2"):
        load(artefact)
    change_record(artefact, format=2)
    with pytest.raises(UserError, match=r"artefact\.json has no field surprise"):
        load(artefact)


def test_scores_are_normalised_with_the_stored_moments():
    np.testing.assert_array_equal(record().normalise(np.array([0.5, 4.5])), [0.0, 2.0])
    with pytest.raises(UserError, match="The value artefact has no stored score normalisation"):
        record("value", score_mean=None, score_std=None).normalise(1.0)


def test_the_newest_checkpoint_is_none_that_was_set_aside_or_is_half_written(tmp_path):
    assert checkpoints_lib.newest_bytes(tmp_path / "none") is None
    for name, size in {"9": 3, "10": 5, "11.damaged": 7, "12.orbax-checkpoint-tmp-1": 11}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x" * size)
    assert (
        checkpoints_lib.saved_steps(tmp_path) == [9, 10]
        and checkpoints_lib.newest_bytes(tmp_path) == 5
    )


def test_bytes_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"67")
    assert files.folder_bytes(tmp_path) == 7


def test_an_abstract_adapter_has_the_trees_shapes():
    for adapter, tuning in ((small.make_adapter(), "lora"), (small.make_full(BASE), "full")):
        specs = artefacts.abstract_adapter(small.LM, tuning, adapter.config, True)
        assert isinstance(specs, Adapter)
        shapes = lambda tree: {
            name: (leaf.shape, leaf.dtype) for name, leaf in trees.named_leaves(tree).items()
        }
        assert shapes(specs) == shapes(adapter)


@pytest.mark.parametrize("times", FLIPS)
def test_one_flipped_bit_in_an_artefact_never_passes(tmp_path, times):
    adapter, written = (
        small.make_adapter(lora=LoRAConfig(rank=2, targets="q")),
        record(lora=LoRAConfig(rank=2, targets="q")),
    )
    artefacts.save_artefact(tmp_path / "whole", adapter, written)
    caught, draw = [], random.Random(0)
    for name in times * files_below(tmp_path / "whole"):
        shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
        where = flip(tmp_path / "flipped" / name, draw)
        try:
            loaded, read = load(tmp_path / "flipped")
        except UserError as error:
            assert str(tmp_path / "flipped") in str(error)  # noqa: PT017  refused, or unharmed
            caught.append(name)
        else:
            small.assert_same(loaded, adapter)
            assert read == written, where
        shutil.rmtree(tmp_path / "flipped")
    assert caught.count("artefact.json") == times and any("/d/" in name for name in caught)


def test_an_array_that_is_not_the_saved_one_is_refused(artefact):
    values = json.loads((artefact / artefacts.RECORD).read_text())
    name, text = next(iter(values["digests"].items()))
    change_record(
        artefact, digests=values["digests"] | {name: text[:-1] + ("0" if text[-1] != "0" else "1")}
    )
    with pytest.raises(
        UserError, match=f"The tree in {artefact} is damaged: {name} is not what was saved"
    ):
        load(artefact)


def test_a_record_edited_by_hand_is_refused(artefact):
    path = artefact / artefacts.RECORD
    path.write_text(path.read_text().replace('"score_std": 2.0', '"score_std": 3.0'))
    with pytest.raises(
        UserError,
        match=r"artefact\.json is damaged: it does not have the checksum that it was written with",
    ):
        load(artefact)


def test_artefacts_of_format_1_are_read(artefact):
    path = artefact / artefacts.RECORD
    values = json.loads(path.read_text()) | {"format": 1, "base_fingerprint": weights()}
    del values["digests"], values["checksum"]
    path.write_text(json.dumps(values))
    loaded, read = load(artefact)
    small.assert_same(loaded, small.make_adapter())
    assert (read.format, read.score_std) == (1, 2.0)
    # Nothing but their fields can be compared: one that is broken is named.
    broken = {
        "was trained on the base": values | {"base_fingerprint": fingerprint()},
        "artefact.json needs the field role": {
            name: value for name, value in values.items() if name != "role"
        },
        "artefact.json has no field rolf": {
            "rolf" if name == "role" else name: value for name, value in values.items()
        },
        "artefact.json.role is 'rewarf'; it must be one of policy, reward, value": values
        | {"role": "rewarf"},
        "artefact.json.tuning is 'mora'; it must be one of lora, full": values | {"tuning": "mora"},
        "artefact.json does not describe its adapter": values | {"lora": None},
    }
    for message, found in broken.items():
        path.write_text(json.dumps(found))
        with pytest.raises(UserError, match=message):
            load(artefact)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"rope": Rope(theta=500_000.0)}, False),
        ({"rope": Rope(scaling="linear", factor=2.0)}, False),
        ({"norm_epsilon": 1e-6}, False),
        ({"window": 8, "windowed": (0,)}, False),
        ({"unrotated": (1,)}, False),
        ({"logit_cap": 30.0}, False),
        ({"attention_cap": 50.0}, False),
        ({"activation": "gelu_tanh"}, False),
        ({"query_scale": 0.5}, False),
        (
            {
                "dtype": "bfloat16",
                "param_dtype": "bfloat16",
                "remat": "full",
                "unroll": 3,
                "attention": "blocked",
                "max_positions": 128,
            },
            True,
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_the_fingerprint_of_a_base_covers_what_its_weights_are_used_for(artefact, fields, same):
    lm = small.changed(**fields)
    assert (artefacts.base_fingerprint(lm.config, weights()) == fingerprint()) is same
    read = lambda: artefacts.load_artefact(
        artefact, lm, weights=weights(), base_name="tiny", role="reward"
    )
    if same:
        small.assert_same(read()[0], small.make_adapter())
    else:
        with pytest.raises(UserError, match="was trained on the base tiny"):
            read()
