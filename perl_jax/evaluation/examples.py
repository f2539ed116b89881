"""Rows of a reward model's test split to read: some rows, and its worst mistakes, with scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# How many rows of each sort are kept.
MOST = 8


def mistakes(kind: str, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> np.ndarray:
    """Returns how wrong the score of each row is, float64 [rows]; above 0 is a mistake.

    Of comparisons it is the score of `rejected` minus that of `chosen`. Of labels it is the
    distance of the score from 0 on the wrong side: the score of a row labelled 0, minus the score
    of a row labelled 1. Of ratings it is the distance between the standardised score and the
    standardised rating, minus 1: a mistake is off by more than a standard deviation.

    Args:
        kind: `comparisons`, `labels` or `ratings`.
        rows: The rows.
        scores: Scores [rows], not normalised: `chosen` and `rejected`, or `score`. Of labels, a
            score above 0 says that the label is more likely 1.
    """
    if kind == "comparisons":
        return np.asarray(scores["rejected"], np.float64) - np.asarray(scores["chosen"], np.float64)
    score = np.asarray(scores["score"], np.float64)
    if kind == "labels":
        return np.where(np.asarray([row["label"] for row in rows]) > 0.5, -score, score)
    standard = lambda values: (values - values.mean()) / (values.std() or 1.0)
    rating = np.asarray([row["rating"] for row in rows], np.float64)
    return np.abs(standard(score) - standard(rating)) - 1.0


def reward_examples(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Sequence[float]],
    normalise: Callable[[float], float],
) -> list[dict[str, Any]]:
    """Returns the rows of evaluation_samples.jsonl: the first rows, then the worst mistakes.

    A row has `why` (`first` or `mistake`), `row` (its index in the split) and `prompt`. A
    comparison has `chosen` and `rejected`, each {"text", "score"}; other rows have `response`,
    {"text", "score"}, and `label` or `rating`. Scores are normalised.

    Args:
        kind: `comparisons`, `labels` or `ratings`.
        rows: The rows of the test split.
        scores: Scores [rows], not normalised: `chosen` and `rejected`, or `score`.
        normalise: Gives the normalised score.
    """
    normalised = {
        name: [float(normalise(value)) for value in side] for name, side in scores.items()
    }
    wrong = mistakes(kind, rows, scores)
    worst = [int(row) for row in np.argsort(-wrong, kind="stable")[:MOST] if wrong[row] > 0]

    def example(why: str, index: int) -> dict[str, Any]:
        """Returns the row of the file for one row of the split."""
        row = rows[index]
        found: dict[str, Any] = {"why": why, "row": index, "prompt": row["prompt"]}
        if kind == "comparisons":
            return found | {
                name: {"text": row[name], "score": normalised[name][index]}
                for name in ("chosen", "rejected")
            }
        truth = "label" if kind == "labels" else "rating"
        response = {"text": row["response"], "score": normalised["score"][index]}
        return found | {"response": response, truth: row[truth]}

    first = [example("first", index) for index in range(min(MOST, len(rows)))]
    return first + [example("mistake", index) for index in worst]
