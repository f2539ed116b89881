"""Ranks and measures: by hand, and against trec_eval's own code on random rankings; intervals over
dialogues.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
import ranking

ORDER = np.array([3, 0, 2, 1])


def test_ranks_with_ties_and_items_left_out_by_hand():
    scores = np.array([1.0, 5.0, 1.0, 1.0])
    # Item 1 first; of the equal ones 3 (order 1), 2 (order 2), 0 (order 3).
    np.testing.assert_array_equal(ranking.ranks_of(scores, [0, 1, 2, 3], ORDER), [4, 1, 3, 2])
    np.testing.assert_array_equal(ranking.ranks_of(scores, [0, 2], ORDER, left_out=[1, 3]), [2, 1])
    np.testing.assert_array_equal(scores, [1, 5, 1, 1])
    with pytest.raises(ValueError, match="finite"):
        ranking.ranks_of(np.array([1.0, np.nan]), [0], np.arange(2))


@pytest.mark.parametrize("k", [1, 3, 40, 100])
def test_top_is_the_same_ranking(k):
    random = np.random.default_rng(k)
    scores, order = random.integers(0, 8, 40).astype(float), ranking.tie_order(40, seed=3)
    ranks = ranking.ranks_of(scores, range(40), order)
    np.testing.assert_array_equal(ranking.top(scores, k, order), np.argsort(ranks)[:k])
    assert not set(ranking.top(scores, 5, order, left_out=[int(np.argmin(ranks))])) & {
        int(np.argmin(ranks))
    }


def test_measures_by_hand():
    # Relevant items at 2 and 12.
    values = dict(zip(ranking.MEASURES, ranking.measures([2, 12]), strict=True))
    ideal = 1 + 1 / math.log2(3)
    assert values == pytest.approx(
        {
            "recall@1": 0.0,
            "recall@10": 0.5,
            "recall@50": 1.0,
            "mrr": 0.5,
            "ndcg@10": (1 / math.log2(3)) / ideal,
            "ndcg@50": (1 / math.log2(3) + 1 / math.log2(13)) / ideal,
        }
    )
    assert list(ranking.measures([np.inf])) == [0] * 6  # what cannot be recommended is a miss
    assert ranking.ndcg([1], 10) == 1.0 and ranking.ndcg([3], 10) == pytest.approx(0.5)


def test_agreement_with_trec_eval_on_random_rankings():
    random = np.random.default_rng(0)
    items, queries = 200, 60
    truth, runs, ours = {}, {}, {}
    order = ranking.tie_order(items)
    for q in range(queries):
        # Whole numbers: trec_eval keeps scores in single precision and breaks ties by name.
        scores = random.permutation(items).astype(float)
        relevant = random.choice(items, size=int(random.integers(1, 8)), replace=False)
        truth[f"q{q}"] = {f"d{i}": 1 for i in relevant}
        runs[f"q{q}"] = {f"d{i}": float(s) for i, s in enumerate(scores)}
        ours[f"q{q}"] = ranking.measures(ranking.ranks_of(scores, relevant, order))
    names = {
        "recall@1": "recall_1",
        "recall@10": "recall_10",
        "recall@50": "recall_50",
        "mrr": "recip_rank",
        "ndcg@10": "ndcg_cut_10",
        "ndcg@50": "ndcg_cut_50",
    }
    wanted = {"recall.1,10,50", "recip_rank", "ndcg_cut.10,50"}
    theirs = pytrec_eval.RelevanceEvaluator(truth, wanted).evaluate(runs)
    for query, values in ours.items():
        np.testing.assert_allclose(
            values,
            [theirs[query][names[measure]] for measure in ranking.MEASURES],
            atol=1e-9,
            err_msg=query,
        )


def test_single_measures_are_the_same_as_measures_of_each():
    ranks = np.array([1.0, 2, 10, 11, 50, 51, 6000, np.inf])
    np.testing.assert_allclose(
        ranking.single_measures(ranks), [ranking.measures([rank]) for rank in ranks]
    )


def test_the_bootstrap_draws_whole_dialogues():
    random = np.random.default_rng(1)
    each = random.random((40, 6))
    alone = ranking.summarise(each, range(40))
    # Every dialogue's ranking eight times over is no more evidence: the interval must not shrink.
    repeated = ranking.summarise(np.repeat(each, 8, axis=0), np.repeat(np.arange(40), 8))
    assert repeated.n == 320 and repeated.dialogues == 40
    for measure in ranking.MEASURES:
        assert repeated.values[measure] == pytest.approx(alone.values[measure])
        assert repeated.low[measure] == pytest.approx(alone.low[measure]) and repeated.high[
            measure
        ] == pytest.approx(alone.high[measure])
    as_if_independent = ranking.summarise(np.repeat(each, 8, axis=0), range(320))
    width = lambda one: one.high["mrr"] - one.low["mrr"]
    assert width(as_if_independent) < 0.5 * width(repeated)


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(2).random((400, 6))
    found = ranking.summarise(values, range(400), draws=4000)
    error = values[:, 0].std() / math.sqrt(400)
    assert found.low["recall@1"] == pytest.approx(
        found.values["recall@1"] - 1.96 * error, abs=0.15 * error
    )
    assert found.high["recall@1"] == pytest.approx(
        found.values["recall@1"] + 1.96 * error, abs=0.15 * error
    )


def test_dialogues_of_different_sizes_weigh_by_their_rankings():
    values = np.concatenate([np.zeros((9, 6)), np.ones((1, 6))])
    assert ranking.summarise(values, ["a"] * 9 + ["b"]).values["mrr"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="nothing to summarise"):
        ranking.summarise(np.zeros((0, 6)), [])


def test_one_dialogue_has_no_interval():
    found = ranking.summarise(np.random.default_rng(4).random((8, 6)), ["a"] * 8)
    assert (found.n, found.dialogues, set(found.low.values()), set(found.high.values())) == (
        8,
        1,
        {None},
        {None},
    )


def test_gain_is_paired():
    random = np.random.default_rng(3)
    others = random.random((200, 6))
    found = ranking.gain(others + 0.01, others, range(200))
    assert found.values["mrr"] == pytest.approx(0.01) and found.low["mrr"] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="cannot be compared"):
        ranking.gain(others, others[:3], range(200))
