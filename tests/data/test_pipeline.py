"""Tokenising, bucketing, batching: hand-computed batches, masks, plans, sharding, resuming."""

from __future__ import annotations

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from perl_jax.data import bucketing, counts, tokenise
from perl_jax.data.config import DataConfig
from perl_jax.data.pipeline import make_batches
from perl_jax.errors import UserError
from perl_jax.models import passes
from perl_jax.runtime.hosts import Share
from perl_jax.types import Labelled, Pairs, Prompts, Tokens

PAD, BOS, EOS = 2, 1, 2  # padding is eos on purpose: nothing may be inferred from ids


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Texts are numbers separated by spaces, and stand for those ids."""

    pad_id: int = PAD
    bos_id: int | None = BOS
    tail_ids: tuple[int, ...] = ()
    stop_part: tuple[int, ...] = (EOS,)

    def is_rendered(self, text):
        return False

    def shortened_prompt(self, text, limit):
        return None

    def prompt_ids(self, text):
        return [*([] if self.bos_id is None else [self.bos_id]), *map(int, text.split())]

    def response_ids(self, text):
        return [*map(int, text.split()), EOS]

    def text_ids(self, text):
        return [*self.prompt_ids(text), EOS]


def words(count, value=7):
    return " ".join([str(value)] * count)


def labels_of_lengths(lengths, response=1):
    """Label rows whose total length (bos, prompt, response, eos) is as wanted; the label is the
    row's number / 100.
    """
    return [
        {
            "prompt": words(n - 2 - response, 10 + i),
            "response": words(response, 5),
            "label": i / 100,
        }
        for i, n in enumerate(lengths)
    ]


def spec(batch_size=2, seed=0, max_prompt_length=64, max_response_length=64, bucket_count=4, **how):
    """Arguments of `make_batches` behind the encoder."""
    config = DataConfig(
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
        bucket_count=bucket_count,
    )
    return {"config": config, "batch_size": batch_size, "seed": seed, **how}


EVALUATE = {"seed": None, "epochs": 1}


def rows_seen(batches, epochs=1):
    return np.concatenate(
        [batches.rows_of(step) for step in range(batches.steps_per_epoch * epochs)]
    )


def check(batch, expected):
    """Every leaf equal, with dtypes."""
    assert type(batch) is type(expected)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert [x.dtype for x in jax.tree.leaves(batch)] == [x.dtype for x in jax.tree.leaves(expected)]


def tokens(ids, valid, response):
    return Tokens(np.array(ids, np.int32), np.array(valid, bool), np.array(response, bool))


# ------------------------------------------------------------------------------ truncation


def test_prompts_keep_bos_and_their_last_tokens():
    assert tokenise.clip_prompt([BOS, 3, 4, 5, 6], 3, BOS) == [BOS, 5, 6]
    assert tokenise.clip_prompt([BOS, 3, 4, 5, 6], 1, BOS) == [BOS]
    assert tokenise.clip_prompt([3, 4, 5, 6], 3, BOS) == [4, 5, 6]
    assert tokenise.clip_prompt([3, 4, 5, 6], 3, None) == [4, 5, 6]
    assert tokenise.clip_prompt([BOS, 3, 4], 3, BOS) == [BOS, 3, 4]


def test_long_responses_lose_their_eos_and_are_counted():
    rows = [{"prompt": "3 4 5 6", "response": "7 8 9"}, {"prompt": "3", "response": "7 8"}]
    encoded = tokenise.tokenise(rows, "demonstrations", Numbers(), 3, 3)
    assert [encoded.prompts[i].tolist() for i in range(2)] == [[BOS, 5, 6], [BOS, 3]]
    assert [encoded.responses[0][i].tolist() for i in range(2)] == [[7, 8, 9], [7, 8, EOS]]
    assert encoded.truncated == {"prompts": 1, "response": 1}
    np.testing.assert_array_equal(encoded.lengths, [6, 5])
    assert encoded.prompts.values.dtype == np.int32


def test_long_texts_keep_their_first_tokens():
    encoded = tokenise.tokenise([{"text": "3 4 5 6"}, {"text": "3"}], "corpus", Numbers(), 2, 2)
    assert [encoded.responses[0][i].tolist() for i in range(2)] == [[3, 4, 5], [3, EOS]]
    assert encoded.truncated == {"texts": 1}


def test_equal_responses_are_counted_before_and_after_cutting():
    # Equal; equal in the first 3 tokens; one that the other begins with, whole and cut; the other
    # way round; apart.
    pairs = [
        ("5 6", "5 6"),
        ("5 6 7 8", "5 6 7 9"),
        ("5 6 7", "5 6 7 8"),
        ("5 6", "5 6 2"),
        ("5", "6"),
    ]
    rows = [{"prompt": "3", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    encoded = tokenise.tokenise(rows, "comparisons", Numbers(), 4, 3)
    np.testing.assert_array_equal(encoded.equal, [True, True, True, True, False])
    assert encoded.facts == {
        "rows": 5,
        "cut": 3,
        "cut_prompts": 0,
        "cut_chosen": 2,
        "cut_rejected": 3,
        "cut_prompts_template_whole": 0,
        "rendered": 0,
        "equal_pairs": 1,
        "equal_after_cutting": 3,
    }
    assert counts.said_of(encoded.facts, 4, 3) == [
        "3 of 5 rows were cut to fit: 2 chosen responses lost their end (max_response_length 3), "
        "3 rejected responses lost their end (max_response_length 3).",
        "1 of 5 pairs have equal responses, 3 more are equal after cutting: they count in no "
        "accuracy.",
    ]
    # As a batch says, row by row.
    (batch,) = make_batches(
        rows, "comparisons", Numbers(), **spec(batch_size=8, max_response_length=3, **EVALUATE)
    )
    np.testing.assert_array_equal(
        passes.responses_differ(batch), [False, False, False, False, True, False, False, False]
    )


# ------------------------------------------------------------------------------ layouts


def test_demonstrations_by_hand_with_filler():
    rows = [{"prompt": "3 4", "response": "5"}]
    batches = make_batches(rows, "demonstrations", Numbers(), **spec(**EVALUATE))
    check(
        next(iter(batches)),
        tokens(
            [[BOS, 3, 4, 5, EOS, PAD, PAD, PAD], [PAD] * 8],
            [[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8],
            [[0, 0, 0, 1, 1, 0, 0, 0], [0] * 8],
        ),
    )


@pytest.mark.parametrize(("bos", "ids"), [(BOS, [BOS, 3, 4, EOS]), (None, [3, 4, 9, EOS])])
def test_corpus_by_hand_learns_all_but_the_first_token(bos, ids):
    text = "3 4" if bos else "3 4 9"
    batches = make_batches(
        [{"text": text}], "corpus", Numbers(bos_id=bos), **spec(batch_size=1, **EVALUATE)
    )
    check(
        next(iter(batches)),
        tokens(
            [[*ids, PAD, PAD, PAD, PAD]], [[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 1, 1, 1, 0, 0, 0, 0]]
        ),
    )


def test_pairs_by_hand_share_the_longer_sides_bucket():
    rows = [
        {
            "prompt": "3",
            "chosen": "4 5",
            "rejected": words(7, 6),
            "probability": 0.75,
            "margin": 0.5,
            "weight": 0.25,
        }
    ]
    batch = next(
        iter(
            make_batches(
                rows, "comparisons", Numbers(), **spec(batch_size=1, lengths=(8, 16), **EVALUATE)
            )
        )
    )
    pad = [PAD] * 6
    check(
        batch,
        Pairs(
            tokens(
                [[BOS, 3, 4, 5, EOS, *[PAD] * 11]],
                [[1] * 5 + [0] * 11],
                [[0, 0, 1, 1, 1] + [0] * 11],
            ),
            tokens(
                [[BOS, 3, *[6] * 7, EOS, *pad]], [[1] * 10 + [0] * 6], [[0, 0] + [1] * 8 + [0] * 6]
            ),
            *(np.array([number], np.float32) for number in (0.25, 0.75, 0.5)),
        ),
    )


def test_a_filler_pair_weighs_nothing():
    rows = [
        {
            "prompt": "3",
            "chosen": "4",
            "rejected": "5",
            "probability": 0.75,
            "margin": 0.5,
            "weight": 0.25,
        }
    ]
    batch = next(
        iter(make_batches(rows, "comparisons", Numbers(), **spec(batch_size=2, **EVALUATE)))
    )
    assert not batch.chosen.valid_BT[1].any() and not batch.rejected.valid_BT[1].any()
    for numbers_B, number in (
        (batch.weight_B, 0.25),
        (batch.probability_B, 0.75),
        (batch.margin_B, 0.5),
    ):
        np.testing.assert_array_equal(numbers_B, [number, 0.0])


def test_labels_by_hand_with_filler():
    rows = [{"prompt": "3", "response": "4", "label": 0.25}]
    batch = next(iter(make_batches(rows, "labels", Numbers(), **spec(**EVALUATE))))
    assert isinstance(batch, Labelled)
    check(
        batch,
        Labelled(
            tokens(
                [[BOS, 3, 4, EOS, *[PAD] * 4], [PAD] * 8],
                [[1] * 4 + [0] * 4, [0] * 8],
                [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8],
            ),
            np.array([0.25, 0], np.float32),
            np.array([1, 0], np.float32),
        ),
    )


def test_prompts_by_hand_are_left_padded_and_know_their_row():
    rows = [{"prompt": "3 4"}, {"prompt": "5"}, {"prompt": "6"}]
    batches = list(make_batches(rows, "prompts", Numbers(), **spec(**EVALUATE)))
    assert len(batches) == 2
    check(
        batches[0],
        Prompts(
            np.array([[PAD] * 5 + [BOS, 3, 4], [PAD] * 6 + [BOS, 5]], np.int32),
            np.array([[0] * 5 + [1] * 3, [0] * 6 + [1] * 2], bool),
            np.array([0, 1], np.int32),
        ),
    )
    np.testing.assert_array_equal(batches[1].row_B, [2, -1])
    assert not batches[1].valid_BP[1].any()


# ------------------------------------------------------------------------------ plans


def test_bucket_edges_by_hand():
    # Quantiles 1/4 .. 4/4 of 1..100 (the next higher row): 26, 51, 76, 100 -> multiples of 8.
    assert bucketing.bucket_edges(np.arange(1, 101), 4, 1000) == (32, 56, 80, 104)
    assert bucketing.bucket_edges(np.arange(1, 101), 4, 100) == (32, 56, 80, 100)
    assert bucketing.bucket_edges([5, 5, 6], 4, 1000) == (8,)
    assert bucketing.bucket_edges([5, 60], 1, 1000) == (64,)


def test_training_plan_promotes_leftovers_and_drops_only_the_last_remainder():
    lengths = np.array([3] * 5 + [12] * 4 + [20] * 2)  # 11 rows, batches of 4: 2 batches
    seen = collections.Counter()
    for epoch in range(200):
        plan = bucketing.training_plan(lengths, (8, 16, 24), 4, seed=0, epoch=epoch)
        # 4 of 5 short rows; the fifth joins the 4 middle ones: 4 of 5; then 1 + 2 long are too few.
        assert sorted(plan.lengths) == [8, 16]
        for rows, padded in zip(plan.rows, plan.lengths, strict=True):
            assert lengths[rows].max() <= padded
        assert len(set(plan.rows.ravel())) == 8
        seen.update(plan.rows.ravel().tolist())
    assert seen[0] > 150
    # The last short row of an epoch is in the middle batch unless it comes after all four middle
    # ones: 4 times of 9.
    assert abs(sum(seen[row] for row in range(5)) - 200 * (4 + 4 / 9)) < 4 * (200 * 20 / 81) ** 0.5
    assert seen[9] == 0  # the two longest never fill a batch of their own here


def test_training_plan_keeps_the_epoch_whole_when_it_divides():
    lengths = np.random.default_rng(0).integers(1, 60, 64)
    edges = bucketing.bucket_edges(lengths, 4, 64)
    for epoch in range(5):
        plan = bucketing.training_plan(lengths, edges, 16, seed=3, epoch=epoch)
        np.testing.assert_array_equal(np.sort(plan.rows.ravel()), np.arange(64))


def test_a_row_as_long_as_a_bucket_is_in_it():
    lengths = np.array([8] * 4 + [16] * 4)
    plan = bucketing.training_plan(lengths, (8, 16), 4, seed=0, epoch=0)
    assert {
        int(padded): sorted(rows.tolist())
        for rows, padded in zip(plan.rows, plan.lengths, strict=True)
    } == {8: [0, 1, 2, 3], 16: [4, 5, 6, 7]}
    np.testing.assert_array_equal(bucketing.evaluation_plan(lengths, (8, 16), 4).lengths, [8, 16])


def test_evaluation_plan_by_hand():
    plan = bucketing.evaluation_plan(np.array([20, 3, 12, 4, 5]), (8, 16, 24), 2)
    np.testing.assert_array_equal(plan.rows, [[1, 3], [4, 2], [0, -1]])
    np.testing.assert_array_equal(plan.lengths, [8, 16, 24])


def test_shapes_are_bounded_by_the_buckets_and_rows_fit():
    rng = np.random.default_rng(1)
    rows = labels_of_lengths(rng.integers(3, 90, 150))
    batches = make_batches(
        rows, "labels", Numbers(), **spec(batch_size=8, max_prompt_length=100, epochs=3)
    )
    shapes = collections.Counter(batch.tokens.tokens_BT.shape for batch in batches)
    assert 2 <= len(shapes) <= 4
    assert {shape[1] for shape in shapes} <= set(batches.lengths)
    assert sum(shapes.values()) == 3 * batches.steps_per_epoch == 3 * (150 // 8)
    one = make_batches(
        rows,
        "labels",
        Numbers(),
        **spec(batch_size=8, max_prompt_length=100, bucket_count=1, epochs=1),
    )
    assert len({batch.tokens.tokens_BT.shape for batch in one}) == 1


def test_evaluation_covers_every_row_once_with_weights():
    rows = labels_of_lengths([3 + i % 20 for i in range(37)])
    batches = make_batches(rows, "labels", Numbers(), **spec(batch_size=8, **EVALUATE))
    seen = list(batches)
    assert len(seen) == batches.steps_per_epoch == 5
    weight = np.concatenate([batch.weight_B for batch in seen])
    label = np.concatenate([batch.label_B for batch in seen])
    assert weight.sum() == 37
    np.testing.assert_allclose(np.sort(label[weight == 1]), np.arange(37) / 100, rtol=1e-6)
    np.testing.assert_array_equal(weight, rows_seen(batches) >= 0)
    np.testing.assert_allclose(
        label[weight == 1] * 100, rows_seen(batches)[rows_seen(batches) >= 0], rtol=1e-5
    )


# --------------------------------------------------------------- order, processes, resuming


def test_epochs_are_shuffled_differently_and_reproducibly():
    rows = labels_of_lengths([9] * 40)
    one, same, other = (
        make_batches(rows, "labels", Numbers(), **spec(seed=seed)) for seed in (1, 1, 2)
    )
    first, second = np.split(rows_seen(one, epochs=2), 2)
    assert sorted(first) == sorted(second) == list(range(40))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(rows_seen(same, epochs=2), np.concatenate([first, second]))
    assert not np.array_equal(rows_seen(other), first)


@pytest.mark.parametrize("fields", [{"seed": 3, "epochs": 2}, EVALUATE])
def test_processes_slices_make_up_the_whole_batch(fields):
    rows = labels_of_lengths(np.random.default_rng(2).integers(3, 60, 43))
    whole = list(make_batches(rows, "labels", Numbers(), **spec(batch_size=8, **fields)))
    parts = [
        list(
            make_batches(
                rows,
                "labels",
                Numbers(),
                **spec(batch_size=8, share=Share(i, 4, (0,) * 4), **fields),
            )
        )
        for i in range(4)
    ]
    assert len(whole) == len(parts[0]) > 4
    for step, batch in enumerate(whole):
        slices = [part[step] for part in parts]
        assert slices[0].label_B.shape == (2,)
        check(jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices), batch)


def assert_same_batches(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        check(x, y)


@pytest.mark.parametrize(
    "stop", [0, 3, 5, 7, 10, 12]
)  # an epoch is 5 steps: within, at an end, beyond
def test_resuming_yields_the_batches_that_would_have_come(stop):
    rows = labels_of_lengths(np.random.default_rng(3).integers(3, 60, 21))
    whole = list(make_batches(rows, "labels", Numbers(), **spec(batch_size=4, epochs=3)))
    assert len(whole) == 15
    iterator = iter(make_batches(rows, "labels", Numbers(), **spec(batch_size=4, epochs=3)))
    assert iterator.steps_per_epoch == 5
    assert_same_batches([next(iterator) for _ in range(stop)], whole[:stop])
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(make_batches(rows, "labels", Numbers(), **spec(batch_size=4, epochs=3)))
    next(resumed)  # a used iterator can be set as well as a fresh one
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same_batches(list(resumed), whole[stop:])
    assert_same_batches(list(iterator), whole[stop:])


def test_endless_without_epochs():
    rows = labels_of_lengths([9] * 6)
    iterator = iter(make_batches(rows, "labels", Numbers(), **spec()))
    seen = np.concatenate([next(iterator).label_B for _ in range(12)])
    assert collections.Counter(np.round(seen * 100).astype(int).tolist()) == dict.fromkeys(
        range(6), 4
    )


def test_a_cursor_of_other_rows_or_settings_is_refused():
    rows = labels_of_lengths([9] * 20)
    state = iter(make_batches(rows, "labels", Numbers(), **spec())).get_state()
    for changed in (
        make_batches(rows[:-1], "labels", Numbers(), **spec()),
        make_batches(rows, "labels", Numbers(), **spec(batch_size=4)),
        make_batches(rows, "labels", Numbers(), **spec(seed=1)),
    ):
        with pytest.raises(
            UserError, match="data cursor was saved with other rows or batch settings"
        ):
            iter(changed).set_state(state)
    # How many processes share a batch may change between runs.
    iter(make_batches(rows, "labels", Numbers(), **spec(share=Share(0, 2, (0, 0))))).set_state(
        state
    )


def test_a_cursor_of_rows_with_other_content_is_refused():
    """Lengths alone are the same in all of these."""
    pair = lambda i, chosen, rejected, **more: {
        "prompt": words(4, 10 + i),
        "chosen": words(2, chosen),
        "rejected": words(2, rejected),
        **more,
    }
    pairs, labels = [pair(i, 5, 6) for i in range(6)], labels_of_lengths([9] * 6)
    prompts = [{"prompt": words(4, 10 + i), "answer": i} for i in range(6)]
    for kind, rows, other in (
        ("comparisons", pairs, [pair(0, 6, 5), *pairs[1:]]),
        ("comparisons", pairs, [pair(0, 5, 6, weight=0.5), *pairs[1:]]),
        ("labels", labels, [labels[0] | {"label": 1.0}, *labels[1:]]),
        ("labels", labels, [labels[1], labels[0], *labels[2:]]),
        ("prompts", prompts, [prompts[0] | {"answer": 7}, *prompts[1:]]),
        ("prompts", prompts, [prompts[0] | {"prompt": words(4, 99)}, *prompts[1:]]),
    ):
        state = json.loads(
            json.dumps(iter(make_batches(rows, kind, Numbers(), **spec())).get_state())
        )
        iter(make_batches(list(map(dict, rows)), kind, Numbers(), **spec())).set_state(state)
        changed = iter(make_batches(other, kind, Numbers(), **spec()))
        with pytest.raises(
            UserError,
            match="The rows of --data are others than those that the data cursor was saved with",
        ):
            changed.set_state(state)
        # An older version noted the lengths only.
        changed.set_state({name: value for name, value in state.items() if name != "content"})


# ------------------------------------------------------------------------------ user errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 6, "share": Share(0, 4, (0,) * 4)},
            r"batch_size is 6; it must be a multiple of the 4 processes",
        ),
        ({"batch_size": 0}, r"batch_size is 0; it must be"),
        (
            {"share": Share(2, 2, (0, 0))},
            r"share\.index is 2; it must lie in \[0, 2\)",
        ),
        ({"epochs": 0}, r"epochs is 0"),
        ({"lengths": (8, 8)}, r"lengths is \(8, 8\); it must increase"),
        ({"lengths": (8,)}, r"lengths ends at 8, but the longest row has 9 tokens"),
        ({"batch_size": 16}, r"There are 5 labels rows, fewer than batch_size, which is 16"),
    ],
)
def test_user_errors(fields, message):
    with pytest.raises(UserError, match=message):
        make_batches(labels_of_lengths([9] * 5), "labels", Numbers(), **spec(**fields))


def test_no_rows_and_unknown_kind():
    with pytest.raises(UserError, match="There are no labels rows"):
        make_batches([], "labels", Numbers(), **spec(**EVALUATE))
    with pytest.raises(UserError, match="kind is 'pairs'; it must be one of demonstrations"):
        make_batches([], "pairs", Numbers(), **spec())


@pytest.mark.parametrize(
    ("batch_size", "rows", "multiple", "expected"),
    [(128, 5, 1, 5), (128, 5, 8, 8), (128, 128, 8, 128), (128, 500, 8, 128), (6, 5, 4, 6)],
)
def test_a_batch_has_no_more_rows_than_all_rows_need(batch_size, rows, multiple, expected):
    assert bucketing.fitting_batch(batch_size, rows, multiple) == expected


def test_no_end_follows_a_response_that_is_not_finished():
    encoder = Numbers(tail_ids=(99,))
    rows = [
        {"prompt": "5", "response": "7 7", "finished": False},
        {"prompt": "5", "response": "8 8"},
        {"prompt": "5", "response": "9 9 9 9", "finished": False},
    ]
    found = tokenise.tokenise(rows, "demonstrations", encoder, 8, 3)
    assert [ids.tolist() for ids in map(found.responses[0].__getitem__, range(3))] == [
        [7, 7],
        [8, 8, EOS, 99],
        [9, 9, 9],
    ]
    assert found.tails[0].tolist() == [0, 1, 0] and found.numbers == {}
    # The last response was cut by the limit too; to be unfinished alone is not to be cut.
    assert found.facts["cut_response"] == 1 and found.facts["unfinished"] == 2
    said = counts.said_of(found.facts, 8, 3)
    assert said[-1] == (
        "2 of 3 responses are not finished: no token that ends a turn follows them."
    )
    assert "unfinished" not in tokenise.tokenise(rows[1:2], "demonstrations", encoder, 8, 3).facts
