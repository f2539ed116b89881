"""Rows of a reward model's test split: which are kept, and which are mistakes."""

from __future__ import annotations

import numpy as np

from perl_jax.evaluation.examples import MOST, mistakes, reward_examples


def test_the_worst_pairs_are_those_whose_rejected_response_scores_most_above():
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(12)]
    chosen = [1.0] * 12
    # Rows 10 and 4 are in the wrong order; row 3 is a tie, which is no mistake.
    rejected = [1.0 if i == 3 else 3.0 if i == 10 else 2.0 if i == 4 else 0.0 for i in range(12)]
    found = reward_examples(
        "comparisons", rows, {"chosen": chosen, "rejected": rejected}, lambda score: score / 2
    )
    assert [(row["why"], row["row"]) for row in found] == [
        *(("first", i) for i in range(MOST)),
        ("mistake", 10),
        ("mistake", 4),
    ]
    assert found[-2] == {
        "why": "mistake",
        "row": 10,
        "prompt": "p10",
        "chosen": {"text": "c10", "score": 0.5},
        "rejected": {"text": "r10", "score": 1.5},
    }


def test_mistakes_on_labels_and_ratings():
    labels = [{"label": label} for label in (1.0, 1.0, 0.0, 0.0)]
    found = mistakes("labels", labels, {"score": [2.0, -1.5, -2.0, 3.0]})
    np.testing.assert_allclose(found, [-2.0, 1.5, -2.0, 3.0])
    # Standardised: scores -1, 1, -1, 1 and ratings -1, 1, 1, -1.
    ratings = [{"rating": rating} for rating in (10.0, 30.0, 30.0, 10.0)]
    found = mistakes("ratings", ratings, {"score": [1.0, 2.0, 1.0, 2.0]})
    np.testing.assert_allclose(found, [-1.0, -1.0, 1.0, 1.0])


def test_a_label_stands_beside_its_response():
    row = {"prompt": "p", "response": "r", "label": 1.0}
    (found, wrong) = reward_examples("labels", [row], {"score": [-3.0]}, lambda score: score + 1)
    expected = {"prompt": "p", "row": 0, "response": {"text": "r", "score": -2.0}, "label": 1.0}
    assert found == {"why": "first", **expected} and wrong == {"why": "mistake", **expected}
