"""Continuous batching: the static sampler's tokens through fewer slots, in less decoding, with few
programs.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.generation import sampling
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import sharding
from perl_jax.runtime.sharding import MeshConfig, make_mesh
from perl_jax.types import Prompts
from tests import small

BASE, ADAPTER = small.make_base(), small.make_adapter()
S, C, PAD = 5, 24, 60
# Several stops: responses of very different lengths.
CONFIG = SamplingConfig(C, stop_ids=(3, 11, 29), pad_id=PAD)
# The raw data of jax.random.key(4).
KEY = np.array([0, 4], np.uint32)


def prompts(number: int, filler: int | None = None) -> Prompts:
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, S + 1, number)
    valid_PS = np.arange(S)[None, :] >= S - lengths[:, None]
    if filler is not None:
        valid_PS[filler] = False
    return Prompts(
        rng.integers(1, 61, (number, S), dtype=np.int32),
        valid_PS,
        np.arange(number, dtype=np.int32),
    )


def static(given: Prompts, samples: int, config: SamplingConfig = CONFIG) -> sampling.Rollout:
    return sampling.sample_prompts(small.LM, config, samples, BASE, ADAPTER, given, KEY)


@pytest.mark.parametrize(
    ("samples", "slots", "chunk"), [(1, 4, 3), (2, 4, 16), (2, 8, 1), (4, 4, 5)]
)
def test_the_same_rollout_through_fewer_slots(samples, slots, chunk):
    given = prompts(9, filler=3)
    sampler = ContinuousSampler(small.LM, CONFIG, samples, slots, chunk)
    expected, made = static(given, samples), sampler(BASE, ADAPTER, given, KEY)
    lengths = np.array(expected.sequences.response_BT).sum(axis=1)
    assert lengths.max() > 5 * lengths[lengths > 0].min() and (lengths == 0).sum() == samples
    small.assert_same(expected.sequences, made.sequences)
    np.testing.assert_allclose(made.logp_BT, expected.logp_BT, atol=2e-5)
    np.testing.assert_array_equal(made.finished_B, expected.finished_B)


@pytest.mark.parametrize(("number", "samples", "slots", "chunk"), [(45, 1, 16, 3), (41, 2, 32, 16)])
def test_prompts_are_let_in_together(number, samples, slots, chunk, monkeypatch):
    given, calls = prompts(number), []
    sampler = ContinuousSampler(small.LM, CONFIG, samples, slots, chunk)
    admissions = sampler._admissions
    monkeypatch.setattr(
        sampler, "_admissions", lambda *a: calls.extend(found := admissions(*a)) or found
    )
    expected, made = static(given, samples), sampler(BASE, ADAPTER, given, KEY)
    small.assert_same(expected.sequences, made.sequences)
    # First as many as there are slots for, then two at a time; one is alone only at the end.
    sizes = [int((call.slot_AG >= 0).all(axis=1).sum()) for call in calls]
    first = slots // samples
    assert sizes == [first] + [2] * ((number - first) // 2) + [1] * ((number - first) % 2)
    assert sampler.admit.compilations == 2


@pytest.mark.parametrize(
    "more",
    [{"temperature": 0.0}, {"cache": "int8"}, {"adapters": "applied"}, {"top_k": 5, "top_p": 0.8}],
)
def test_settings_are_the_static_samplers(more):
    given, config = prompts(6), dataclasses.replace(CONFIG, **more)
    made = ContinuousSampler(small.LM, config, 1, 2)(BASE, ADAPTER, given, KEY)
    small.assert_same(static(given, 1, config).sequences, made.sequences)


def test_it_takes_about_as_many_steps_as_there_are_tokens_for_the_slots():
    # 48 rows in 8 slots; a loop that waits takes the sum of the longest of each 8.
    given = prompts(48)
    sampler = ContinuousSampler(small.LM, CONFIG, 1, 8, chunk=4)
    made = sampler(BASE, ADAPTER, given, KEY)
    length_B = np.array(made.sequences.response_BT).sum(axis=1)
    # The first tokens come from the prompts' pass.
    decoded_B = length_B - 1
    waiting = decoded_B.reshape(-1, 8).max(axis=1).sum()
    assert decoded_B.sum() / 8 <= int(made.steps) < 0.75 * waiting


@pytest.mark.parametrize("room", [1, 5])
def test_no_token_is_decoded_that_none_follows(room):
    # Six rows that nothing ends, two at a time.
    config = SamplingConfig(room, temperature=0.0)
    made = ContinuousSampler(small.LM, config, 1, 2)(BASE, ADAPTER, prompts(6), KEY)
    assert int(made.steps) == 3 * (room - 1) and made.sequences.response_BT.sum() == 6 * room
    small.assert_same(static(prompts(6), 1, config).sequences, made.sequences)


def test_the_number_of_programs_does_not_grow():
    sampler = ContinuousSampler(small.LM, CONFIG, 2, 8)
    counts = []
    for number in (5, 9, 16, 7, 12):
        sampler(BASE, ADAPTER, prompts(number), jax.random.key_data(jax.random.key(number)))
        counts.append(sampler.compilations)
    # A merged copy, empty slots, prompts let in by all slots and by an eighth, decoding in 8, 4, 2
    # and 1 slots, three moves between those.
    assert counts[-1] == 1 + 1 + 2 + 4 + 3 and counts[-1] == counts[-2]


@pytest.mark.slow
def test_many_slots_have_a_program_for_each_of_five_sizes_and_no_more():
    sampler = ContinuousSampler(small.LM, CONFIG, 1, 32, chunk=4)
    for number in range(20, 50):
        given = prompts(number)
        if number % 2:
            widen = lambda x_PS: np.pad(x_PS, ((0, 0), (3, 0)))
            given = given.replace(tokens_BP=widen(given.tokens_BP), valid_BP=widen(given.valid_BP))
        sampler(BASE, ADAPTER, given, jax.random.key_data(jax.random.key(number)))
    # Two lengths of prompts; 32, 16, 8, 4 and 2 slots.
    assert sampler.decode.compilations == 2 * 5 and sampler.fewer.compilations == 2 * 4


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_on_a_mesh_it_samples_the_same(axes):
    mesh = make_mesh(MeshConfig(**axes))
    lm = LanguageModel(small.LM.config, mesh)
    base = jax.device_put(BASE, sharding.state_shardings(BASE, lm.base_shardings(), mesh))
    given = prompts(16)
    made = ContinuousSampler(lm, CONFIG, 1, 8)(base, ADAPTER, sharding.put_batch(given, mesh), KEY)
    expected = static(given, 1)
    assert made.sequences.tokens_BT.sharding == sharding.batch_sharding(mesh)
    small.assert_same(expected.sequences, made.sequences)


@pytest.mark.parametrize(
    ("samples", "slots", "message"),
    [(4, 6, "slots is 6; it must be a multiple of the 4 samples"), (1, 0, "slots is 0")],
)
def test_impossible_slots_are_refused(samples, slots, message):
    with pytest.raises(UserError, match=message):
        ContinuousSampler(small.LM, CONFIG, samples, slots)
