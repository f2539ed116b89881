"""Numbers that cannot be are refused in a sentence, in every field of every command's settings."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from perl_jax import errors
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.cli import main
from perl_jax.errors import UserError
from perl_jax.generation.config import SamplingConfig
from perl_jax.models.config import Rope
from perl_jax.rewards.judge import Judge
from perl_jax.runtime.seeds import numpy_generator, random_key
from tests.small import CONFIG

# Values of the fields without which a config cannot be made.
NEEDED: dict[str, object] = {"max_new_tokens": 4}


def alternatives(annotation: object) -> tuple[object, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def configs_of(cls: type) -> Iterator[type]:
    """A config class and those of its fields."""
    yield cls
    for annotation in typing.get_type_hints(cls).values():
        for one in alternatives(annotation):
            if dataclasses.is_dataclass(one):
                yield from configs_of(typing.cast(type, one))


CLASSES = {found for name in main.COMMANDS for found in configs_of(main._command(name)[0])}
CLASSES |= {SamplingConfig, Rope, type(CONFIG)}
FIELDS = [
    (cls, field.name, kind)
    for cls in sorted(CLASSES, key=lambda cls: cls.__name__)
    for field in dataclasses.fields(cls)
    for kind in alternatives(typing.get_type_hints(cls)[field.name])
    if kind in (int, float)
]
WHOLE = (2**63, 10**12, 10**30, -(10**12), 10**400, 1.5, math.nan, math.inf, "3", True)
REAL = (math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, 1e-40, "3", True)


def made(cls: type, **fields: object) -> object:
    """A config with these fields, and what else must be given; of a model, the tiny one."""
    if cls is type(CONFIG):
        return dataclasses.replace(CONFIG, **fields)
    needed = {
        field.name: NEEDED.get(field.name, "x")
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    return cls(**{**needed, **fields})


def test_every_command_has_numbers():
    assert len(CLASSES) > 20 and len(FIELDS) > 120
    assert {"LoRAConfig", "OptimizerConfig", "RLCommand", "DataConfig", "PlanConfig"} <= {
        cls.__name__ for cls, _, _ in FIELDS
    }


@pytest.mark.parametrize(
    ("cls", "field", "kind"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name, _ in FIELDS]
)
def test_what_no_device_computes_with_is_refused_by_the_fields_name(cls, field, kind):
    for value in WHOLE if kind is int else REAL:
        if field in ("seed", "data_seed") and value in (10**12, True):
            continue
        with pytest.raises(UserError, match=rf"\b{field} is ") as error:
            made(cls, **{field: value})
        assert str(error.value).count("\n") == 0 and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "field",
    [
        *("timeout_seconds", "backoff_seconds", "retries", "concurrency", "max_tokens"),
        *("top_logprobs", "temperature"),
    ],
)
@pytest.mark.parametrize("value", [1e39, 10**400, math.nan, -math.inf, "3", True])
def test_a_judge_has_numbers_that_a_clock_can_count(field, value):
    with pytest.raises(UserError, match=rf"judge\.{field} is "):
        Judge(url="http://127.0.0.1:1/v1", model="m", **{field: value})


def test_lists_of_numbers_are_short_before_they_are_made():
    for text in ("0-99999999999", "0-2147483647", "1,0-10000", "9" * 5000, "5-3", "a", "0-", "-1"):
        with pytest.raises(UserError, match=r"lora\.layers is"):
            LoRAConfig(layers=text)
    assert errors.numbers("x", "0-9999", "1") == tuple(range(10_000))
    for text in ("q=1e9", "q=1e400", "q=nan", "q=-1", "q=2.5"):
        with pytest.raises(UserError, match=r"lora\.ranks"):
            LoRAConfig(ranks=text)


def test_messages_of_huge_values_are_short():
    with pytest.raises(UserError) as error:
        errors.one_of("x", "y" * 10**6, ("a", "b"))
    assert len(str(error.value)) < 200
    assert errors.listed(map(str, range(20)), most=3) == "0, 1, 2 and 17 more"


def test_seeds_below_2_to_the_31_give_the_keys_of_jax():
    for seed in (0, 1, 7, 2**31 - 1):
        key = random_key(seed)
        assert np.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))
        assert jax.random.key_data(key).tolist() == [0, seed]


def test_seeds_differ_up_to_2_to_the_63():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1]
    drawn = {float(jax.random.uniform(random_key(seed))) for seed in seeds}
    assert len(drawn) == len(seeds)
    with jax.enable_x64(True):
        for seed in seeds:
            wide = jax.random.key_data(jax.random.key(seed))
            assert np.array_equal(jax.random.key_data(random_key(seed)), wide)
    for seed in (-1, 2**63, 1.5):
        with pytest.raises(UserError, match="seed is"):
            random_key(seed)


def test_orders_of_rows_differ_for_all_seeds_and_epochs():
    orders = {
        json.dumps(numpy_generator(seed, epoch).permutation(50).tolist())
        for seed in (0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63 - 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 21
    same = np.random.default_rng([3, 2]).permutation(50)
    assert np.array_equal(numpy_generator(3, 2).permutation(50), same)
