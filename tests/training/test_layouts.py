"""How rollouts are packed: the sizes a hand would choose, and never one that does not hold them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.packing import (
    ROLLOUT_LEVELS,
    balanced,
    fullest,
    packed_length,
    packed_sizes,
)
from perl_jax.data.pipeline import Batches
from perl_jax.data.tokenise import Ragged, TokenRows
from perl_jax.hub.model import Model
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.training import step as step_lib
from perl_jax.training.layouts import rollout_layout, updates_rows
from perl_jax.types import Layout
from tests import small
from tests.rollouts import placed_model, rl_config


@functools.cache
def model() -> Model:
    return placed_model(small.LM, small.make_base())


@pytest.mark.parametrize(
    ("parts", "microbatches"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (1, 16)]
)
def test_ragged_rows_are_dealt_out_evenly(parts, microbatches):
    counts = np.random.default_rng(0).integers(20, 400, 64)
    order = balanced(counts, parts, microbatches)
    assert sorted(order) == list(range(64))
    even = counts.sum() / (parts * microbatches)
    assert fullest(counts[order], parts, microbatches) <= 1.06 * even
    if parts * microbatches > 1:
        assert fullest(counts, parts, microbatches) > fullest(counts[order], parts, microbatches)


def test_rows_that_do_not_divide_keep_their_order():
    assert list(balanced(np.array([5, 1, 9]), 1, 2)) == [0, 1, 2]


def test_the_fullest_part_of_a_dealt_batch():
    counts = np.array([5, 1, 1, 1, 9, 1, 2, 2])
    assert fullest(counts, parts=1) == 22 and fullest(counts, parts=2) == 14
    # Rows 0, 2, 4, 6 and 1, 3, 5, 7; then by groups of two: rows 0, 1, 4, 5 and 2, 3, 6, 7.
    assert (
        fullest(counts, 1, microbatches=2) == 17
        and fullest(counts, 1, microbatches=2, group=2) == 16
    )
    assert fullest(counts, 2, microbatches=2) == 11


def test_packing_that_saves_little_or_does_not_divide_is_left():
    assert (
        packed_length(np.full(8, 100), 1, 1, 200) == 800
        and packed_length(np.full(8, 101), 1, 1, 200) == 816
    )
    assert packed_length(np.full(8, 100), 1, 1, 104) is None
    assert packed_length(np.full(6, 10), 4, 1, 200) is None


def test_a_length_has_the_size_that_is_planned_and_levels_above():
    # Eighths of 800 from five on, in whole sixteens, none beyond 95 %; what is planned below them.
    assert packed_sizes(300, 800) == [300, 512, 608, 704]
    assert packed_sizes(608, 800) == [608, 704] and packed_sizes(704, 800) == [704]
    assert packed_sizes(0, 800) == [512, 608, 704]


@pytest.mark.parametrize(("rows", "microbatches"), [(64, 1), (256, 1), (640, 4)])
def test_later_epochs_are_packed_as_the_first_is(rows, microbatches):
    lengths = np.random.default_rng(rows).integers(8, 120, rows)
    config = DataConfig(max_prompt_length=64, max_response_length=64)
    ragged = lambda lengths: Ragged.of([np.ones(n, np.int32) for n in lengths])
    batches = Batches(
        TokenRows(
            "demonstrations", ragged(lengths // 2), (ragged(lengths - lengths // 2),), {}, {}
        ),
        config,
        16,
        0,
        seed=0,
        packed=True,
        microbatches=microbatches,
    )
    padded, shapes = [], set()
    for step in range(6 * batches.steps_per_epoch):
        batch = batches.batch(step)
        count, columns = int(batch.valid_BT.sum()), batch.valid_BT.shape[1]
        shapes.add((columns, batch.layout))
        if batch.layout is None:
            padded.append(count / 16 / columns)
            continue
        assert (
            fullest(batch.valid_BT.sum(axis=1), 1, microbatches)
            <= batch.layout.capacity
            <= 0.95 * 16 / microbatches * columns
        )
        assert batch.layout.microbatches == microbatches
    # Those that packing would shorten by less than what two levels are apart.
    assert all(share > 0.8 for share in padded) and len(padded) < 1.5 * batches.steps_per_epoch
    # Padded and one size, of batches that were looked at beforehand.
    assert len(shapes) <= 2 * len(batches.lengths)


def layout(
    response, max_response=32, prompt=4, columns=8, microbatches=1, **fields
) -> Layout | None:
    config = rl_config(
        max_response=max_response, algorithm=AlgorithmConfig(name="rloo", samples=4), **fields
    )
    response_B = np.broadcast_to(np.asarray(response), 8)
    return rollout_layout(model(), config, np.full(8, prompt), response_B, columns, microbatches)


@pytest.mark.parametrize(
    ("response", "slots"), [(1, 128), (15, 128), (16, 192), (24, 256), (31, 256), (32, 320)]
)
def test_rollouts_go_to_the_smallest_of_a_few_sizes(response, slots):
    # Two prompts of 4 tokens in 8 columns and eight responses; a quarter of the longest responses
    # is 64 tokens, and padded rows have 320.
    assert layout(response) == (Layout(slots, 1, 4) if slots <= 0.95 * 320 else None)
    assert len({layout(n) for n in range(33)}) <= ROLLOUT_LEVELS + 1


def test_groups_that_microbatches_would_part_share_nothing():
    assert layout(4, microbatches=2) == Layout(64, 1, 4, 2)
    assert layout(4, microbatches=4) == Layout(64, 1, 1, 4)


def test_updates_have_the_layout_of_the_fullest():
    # Rows of 4 prompt tokens; the second update gets the two long responses, 74 tokens with what is
    # beside them.
    config = rl_config(
        max_response=32, algorithm=AlgorithmConfig(name="rloo", samples=2, minibatches=2)
    )
    response_B = np.array([1, 1, 32, 32, 1, 1, 1, 1])
    orders = lambda *rows: np.array(rows)
    of = lambda orders_XY: rollout_layout(
        model(), config, np.full(8, 4), response_B, 8, 1, orders_XY
    )
    assert of(orders([0, 1, 4, 5], [2, 3, 6, 7])) == Layout(128, 1, 2)
    assert of(orders([0, 1, 4, 5], [6, 7, 0, 1])) == Layout(64, 1, 2)


@pytest.mark.parametrize(
    ("samples", "minibatches", "whole"), [(1, 2, True), (4, 2, True), (2, 4, True), (4, 4, False)]
)
def test_every_epoch_deals_every_row_to_one_update(samples, minibatches, whole):
    algorithm = AlgorithmConfig(
        name="reinforce", samples=samples, epochs=3, minibatches=minibatches
    )
    of = lambda **fields: updates_rows(rl_config(algorithm=algorithm, **fields), jax.random.key(0))
    orders_XY = of()
    assert orders_XY.shape == (3 * minibatches, 8 // minibatches)
    epochs = orders_XY.reshape(3, 8)
    assert (
        all(sorted(rows) == list(range(8)) for rows in epochs)
        and len(np.unique(epochs, axis=0)) > 1
    )
    # A prompt's samples follow each other, unless minibatches would part them.
    together = orders_XY.reshape(-1, samples) // samples
    assert (together == together[:, :1]).all() == whole
    # Microbatches, which are for memory, change nothing of what is learned.
    np.testing.assert_array_equal(orders_XY, of(microbatches=2))


def test_one_update_takes_the_rows_as_they_are():
    assert updates_rows(rl_config(), jax.random.key(0)) is None


def test_rows_that_do_not_divide_over_minibatches_are_refused():
    with pytest.raises(ValueError, match="6 rows do not split into 4 minibatches"):
        step_lib.dealt(jax.random.key(0), 6, 1, 4)
    with pytest.raises(ValueError, match="8 rows in groups of 4 do not split into 4 minibatches"):
        step_lib.dealt(jax.random.key(0), 8, 1, 4, 4)


def test_packing_can_be_switched_off():
    config = rl_config(max_response=32)
    off = rl_config(
        max_response=32,
        data=type(config.data)(max_prompt_length=8, max_response_length=32, packing="off"),
    )
    assert rollout_layout(model(), off, np.full(8, 4), np.full(8, 1), 8, 1) is None
    assert rollout_layout(model(), config, np.full(8, 4), np.full(8, 1), 8, 1) is not None
