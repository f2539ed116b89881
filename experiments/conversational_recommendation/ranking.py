"""Ranks of right answers, and what is made of them: recall, MRR, NDCG, with intervals over
dialogues.

Ranks count from 1; a movie that cannot be recommended at all has the rank infinity, and counts as
a miss in every measure. All arithmetic is float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from perl_jax.evaluation.resampling import SAMPLES, bootstrap_mean

CUTS = (1, 10, 50)
MEASURES = ("recall@1", "recall@10", "recall@50", "mrr", "ndcg@10", "ndcg@50")


def tie_order(n: int, seed: int = 0) -> np.ndarray:
    """A fixed random order of n items: equal scores are ranked by it, so that no order of a file
    helps.
    """
    return np.random.default_rng(seed).permutation(n)


def ranks_of(
    scores: np.ndarray, items: Sequence[int], order: np.ndarray, left_out: Sequence[int] = ()
) -> np.ndarray:
    """The rank of each of `items` by falling score, ties in `order`; items left out take no rank.

    rank(i) = 1 + #{j : s_j > s_i} + #{j : s_j = s_i, order_j < order_i}. float64.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if len(left_out):
        scores = scores.copy()
        scores[list(left_out)] = -np.inf
    own = scores[list(items), None]
    before = (scores[None] > own) | (
        (scores[None] == own) & (order[None] < order[list(items), None])
    )
    return 1.0 + before.sum(axis=1)


def top(scores: np.ndarray, k: int, order: np.ndarray, left_out: Sequence[int] = ()) -> np.ndarray:
    """The first k items of the same ranking."""
    scores = np.asarray(scores, np.float64).copy()
    scores[list(left_out)] = -np.inf
    if k < len(scores):
        near = np.flatnonzero(
            scores >= np.partition(scores, -k)[-k]
        )  # the first k, and ties with the last of them
    else:
        near = np.arange(len(scores))
    return near[np.lexsort((order[near], -scores[near]))[:k]]


def recall(ranks: Sequence[float], k: int, relevant: int | None = None) -> float:
    """Share of the relevant items with a rank of at most k. ranks: theirs; relevant: how many,
    where more.
    """
    return float(np.sum(np.asarray(ranks, np.float64) <= k) / (relevant or len(ranks)))


def reciprocal_rank(ranks: Sequence[float]) -> float:
    """1 / the best rank of a relevant item (Voorhees 1999)."""
    return float(1.0 / np.min(np.asarray(ranks, np.float64)))


def ndcg(ranks: Sequence[float], k: int, relevant: int | None = None) -> float:
    """sum_{r <= k} 1 / log2(1 + r), over its value where the relevant items come first.

    Jarvelin & Kekalainen 2002, relevance 0 or 1; one relevant item: 1 / log2(1 + r).
    """
    ranks = np.asarray(ranks, np.float64)
    ideal = np.sum(1.0 / np.log2(1.0 + np.arange(1, min(k, relevant or len(ranks)) + 1)))
    return float(np.sum(1.0 / np.log2(1.0 + ranks[ranks <= k])) / ideal)


def measures(ranks: Sequence[float]) -> np.ndarray:
    """MEASURES of one ranking, from the ranks of its relevant items."""
    return np.array(
        [
            *(recall(ranks, k) for k in CUTS),
            reciprocal_rank(ranks),
            ndcg(ranks, 10),
            ndcg(ranks, 50),
        ]
    )


def single_measures(ranks: np.ndarray) -> np.ndarray:
    """MEASURES of rankings with one relevant item each, [rankings, measures]; the same as
    `measures` of each.
    """
    ranks = np.asarray(ranks, np.float64)
    discounted = 1.0 / np.log2(1.0 + ranks)
    hits = [ranks <= k for k in CUTS]
    return np.stack(
        [
            *hits,
            1.0 / ranks,
            np.where(ranks <= 10, discounted, 0.0),
            np.where(ranks <= 50, discounted, 0.0),
        ],
        axis=1,
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """MEASURES as means over rankings, with 95 % intervals over dialogues. n: rankings; dialogues:
    theirs.
    """

    values: dict[str, float]
    low: dict[str, float | None]
    high: dict[str, float | None]
    n: int
    dialogues: int


def summarise(values: np.ndarray, dialogues: Sequence[Hashable], draws: int = SAMPLES) -> Summary:
    """Means of rows of MEASURES. The bootstrap draws whole dialogues: rankings of one are not
    independent.

    With a single dialogue there is no interval: its ends are None.
    """
    if len(values) == 0:
        raise ValueError("there is nothing to summarise")
    found = [bootstrap_mean(column, dialogues, draws) for column in values.T]
    named = lambda field: {
        measure: getattr(estimate, field) for measure, estimate in zip(MEASURES, found, strict=True)
    }
    return Summary(named("value"), named("low"), named("high"), len(values), found[0].groups)


def gain(
    values: np.ndarray, others: np.ndarray, dialogues: Sequence[Hashable], draws: int = SAMPLES
) -> Summary:
    """The mean difference of two systems' rows on the same rankings, resampled together."""
    if values.shape != others.shape:
        raise ValueError(f"{values.shape} and {others.shape} rows cannot be compared")
    return summarise(values - others, dialogues, draws)
