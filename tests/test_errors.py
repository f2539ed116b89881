"""Checks whose messages help, configs that survive JSON, files that are replaced whole."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import typing

import pytest

from perl_jax import errors
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.errors import UserError
from perl_jax.runtime import files, json_values
from perl_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    lora: LoRAConfig | None = None
    path: str | None = None
    choice: typing.Literal["a", "b"] = "a"
    numbers: tuple[int, ...] = ()


def test_errors_carry_the_message_alone_and_are_no_value_errors():
    with pytest.raises(UserError) as error:
        errors.require(False, "The sentence.")
    assert str(error.value) == "The sentence."
    # The flags' library catches ValueErrors and shows them in a box.
    assert not isinstance(error.value, ValueError)
    errors.require(True, "The sentence.")


def test_one_of_names_the_field_the_value_and_the_choices():
    errors.one_of("run.mode", "fast", {"fast": 1, "slow": 2})
    with pytest.raises(UserError) as error:
        errors.one_of("run.mode", "quick", ("fast", "slow"))
    assert str(error.value) == "run.mode is 'quick'; it must be one of fast, slow."


@pytest.mark.parametrize(
    ("value", "zero", "good"),
    [(1, False, True), (0.5, False, True), (0, False, False), (0, True, True), (-1, True, False)],
)
def test_positive(value, zero, good):
    if good:
        errors.positive("x", value, zero=zero)
        return
    with pytest.raises(
        UserError,
        match=f"x is {value}; it must be a finite number "
        f"{'at least 0' if zero else 'greater than 0'}",
    ):
        errors.positive("x", value, zero=zero)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "3"])
def test_positive_takes_finite_numbers_only(value):
    with pytest.raises(UserError, match="x is "):
        errors.positive("x", value)


def test_configs_survive_json():
    value = Outer(Inner(3, ("p", "q")), LoRAConfig(rank=4, targets="q,v"), "there", "b", (1, 2))
    as_dict = json_values.to_dict(value)
    assert (
        as_dict["inner"] == {"size": 3, "names": ["p", "q"]} and as_dict["lora"]["targets"] == "q,v"
    )
    assert json_values.from_dict(Outer, as_dict) == value
    assert json_values.from_dict(Outer, json_values.to_dict(Outer(Inner()))) == Outer(Inner())
    assert json_values.to_dict(Outer(Inner(), path=pathlib.Path("a/b")))["path"] == "a/b"
    assert json_values.from_dict(
        OptimizerConfig, json_values.to_dict(OptimizerConfig(clip_norm=None))
    ) == OptimizerConfig(clip_norm=None)


@pytest.mark.parametrize("values", [{"inner": {}, "speed": 1}, {"inner": {"speed": 1}}])
def test_unknown_fields_are_refused_wherever_they_are(values):
    with pytest.raises(
        UserError,
        match=r"(Outer has no field speed; it has inner, lora, path|Outer\.inner has no field "
        r"speed; it has size, names)",
    ):
        json_values.from_dict(Outer, values)


def test_fields_that_are_missing_are_named():
    with pytest.raises(UserError, match="Outer needs the field inner, which is not there"):
        json_values.from_dict(Outer, {"path": "a"})


def test_values_are_checked_when_restored():
    with pytest.raises(UserError, match=r"lora\.rank is -1"):
        json_values.from_dict(Outer, {"inner": {}, "lora": {"rank": -1}})


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert files.read_json(path) == {"b": [1, 2.5, None], "a": "é"}
    files.write_json(path, [2])
    assert files.read_json(path) == [2] and os.listdir(tmp_path) == ["a.json"]

    # Interrupted before the rename: the old content, whole.
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, [3])
    assert files.read_json(path) == [2]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match=f"There is no file {tmp_path}/none.json"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=f"{tmp_path}/bad.json is not valid JSON: line 2"):
        files.read_json(tmp_path / "bad.json")
    for text in ("[" * 100_000, "1" * 10_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=f"{tmp_path}/bad.json is not valid JSON"):
            files.read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; it must be a file"):
        files.read_json(tmp_path)


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is a named pipe; it must be a file"):
        files.read_json(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="/dev/zero is a device; it must be a file"):
        files.read_json(pathlib.Path("/dev/zero"))
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(UserError, match=r"loop\.json cannot be read: its symbolic links"):
        files.read_json(tmp_path / "loop.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"large\.json has 1099511627776 bytes; a file of this"):
        files.read_json(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "x.json is []; it must be an object."),
        ({"inner": None}, "x.json.inner is None; it must be an object."),
        ({"inner": {"size": "3"}}, "x.json.inner.size is '3'; it must be a whole number."),
        ({"inner": {"size": True}}, "x.json.inner.size is True; it must be a whole number."),
        ({"inner": {"names": [1]}}, "x.json.inner.names is [1]; it must be a list of texts."),
        (
            {"inner": {}, "lora": {"alpha": "a"}},
            "x.json.lora.alpha is 'a'; it must be a number.",
        ),
        ({"inner": {}, "path": 3}, "x.json.path is 3; it must be a text or null."),
    ],
)
def test_values_of_another_type_are_named(values, message):
    with pytest.raises(UserError) as error:
        json_values.from_dict(Outer, values, "x.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd'; it must be one of adafactor, adamw."),
        (
            {"schedule": "step"},
            "optimizer.schedule is 'step'; it must be one of constant, linear, cosine.",
        ),
        ({"learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        ({"head_learning_rate": -1.0}, "optimizer.head_learning_rate is -1.0"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm is 0.0"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps is -1"),
        ({"weight_decay": float("inf")}, "optimizer.weight_decay is inf"),
        ({"epsilon": 0.0}, "optimizer.epsilon is 0.0"),
        ({"b1": 1.0}, "optimizer.b1 is 1.0; it must lie in [0, 1)."),
        ({"b2": -0.1}, "optimizer.b2 is -0.1"),
        # Adafactor has none of Adam's three.
        (
            {"b1": 0.8},
            "optimizer.b1 is 0.8, which adafactor does not read; leave it out (adamw reads it).",
        ),
        (
            {"b2": 0.98},
            "optimizer.b2 is 0.98, which adafactor does not read; leave it out (adamw reads it).",
        ),
        (
            {"epsilon": 1e-8},
            "optimizer.epsilon is 1e-08, which adafactor does not read; leave it out (adamw reads "
            "it).",
        ),
    ],
)
def test_optimizer_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        OptimizerConfig(**fields)
    assert message in str(error.value)


def test_what_was_chosen_must_read_an_option_that_is_set():
    errors.read_by("x.y", 1, 1, "a", ("b", "c"))
    errors.read_by("x.y", 2, 1, "b", ("b", "c"))
    with pytest.raises(UserError) as error:
        errors.read_by("x.y", 2, 1, "a", ("b", "c"))
    assert str(error.value) == "x.y is 2, which a does not read; leave it out (b, c read it)."
