"""Measures of reward models and policies: numpy in, numbers with their uncertainty out.

All arithmetic is float64. Inputs are one-dimensional; a NaN or infinity among them, arrays of
different lengths, or a measure that the data do not define (an AUC without both classes) raise
ValueError: a comparison with NaN is False and would quietly count as a loss.

Every interval is two-sided with 95 % confidence, and over whole groups of rows (`intervals`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from perl_jax.evaluation.intervals import (
    SAMPLES,
    Estimate,
    Groups,
    bootstrap,
    group_numbers,
    paired,
    proportion,
    vector,
)
from perl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin [low, high) of a reliability table: means of prediction and label over its n rows.

    observed_low, observed_high: the interval of `observed`; None where the bin's rows are of one
    group.
    """

    low: float
    high: float
    predicted: float
    observed: float
    n: int
    observed_low: float | None
    observed_high: float | None
    groups: int


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Counts of A against B; `rate` = (wins + ties / 2) / n with the interval of
    `intervals.proportion`.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float | None
    high: float | None
    groups: int


def scored(
    scores: Array | Sequence[float], labels: Array | Sequence[float], both_classes: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float64) and labels (bool), refused unless labels are 0 and 1 with both present."""
    scores_B, labels_B = paired(("scores", scores), ("labels", labels))
    if not np.isin(labels_B, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if both_classes and labels_B.min() == labels_B.max():
        raise ValueError(f"all {labels_B.size} labels are {labels_B[0]:.0f}; both classes needed")
    return scores_B, labels_B.astype(bool)


def probable(
    probabilities: Array | Sequence[float], labels: Array | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and (possibly soft) labels, both in [0, 1]."""
    p_B, y_B = paired(("probabilities", probabilities), ("labels", labels))
    for name, values in (("probabilities", p_B), ("labels", y_B)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name} must lie in [0, 1], not [{values.min()}, {values.max()}]")
    return p_B, y_B


# ---------------------------------------------------------------- reward models


def compare(
    score_a: Array | Sequence[float], score_b: Array | Sequence[float], tie_margin: float = 0.0
) -> np.ndarray:
    """Row by row, float64: 1 where a beats b by more than the margin, 0 where b does, else 0.5.

    compare([3, 1, 2], [1, 3, 2]) == [1, 0, 0.5]
    """
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin must be at least 0, not {tie_margin}")
    a_B, b_B = paired(("score_a", score_a), ("score_b", score_b))
    return np.where(a_B > b_B + tie_margin, 1.0, np.where(b_B > a_B + tie_margin, 0.0, 0.5))


def pairwise_accuracy(
    chosen: Array | Sequence[float],
    rejected: Array | Sequence[float],
    weights: Array | Sequence[float] | None = None,
    groups: Groups = None,
) -> Estimate:
    """Share of pairs whose chosen response scores higher, ties as half; the interval of
    `proportion`.

    A model that gives every response one score gets 0.5, not 0 or 1. With weights the share is
    sum w o / sum w. The pairs of one ranking are of one group.
    """
    return proportion(compare(chosen, rejected), groups, weights)


def auc(scores: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    U = sum of the positives' ranks - n1 (n1 + 1) / 2;  auc = U / (n1 n0), tied scores sharing
    their mean rank (Mann & Whitney 1947).
    """
    scores_B, labels_B = scored(scores, labels)
    _, inverse_B, counts = np.unique(scores_B, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks_B = (last_rank - (counts - 1) / 2)[inverse_B]
    positives = int(labels_B.sum())
    negatives = labels_B.size - positives
    u = ranks_B[labels_B].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def correlation(scores: Array | Sequence[float], truth: Array | Sequence[float]) -> float:
    """Pearson's: cov / (std std), float64; 0 where either does not vary."""
    x_B, y_B = paired(("scores", scores), ("truth", truth))
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    spread = float(np.sqrt(np.sum(x_B**2) * np.sum(y_B**2)))
    return float(np.sum(x_B * y_B)) / spread if spread > 0 else 0.0


def balanced_accuracy(
    scores: Array | Sequence[float], labels: Array | Sequence[float], threshold: float
) -> float:
    """Mean of the shares of positives and of negatives called right; score >= threshold is yes.

    A constant answer gets 0.5 however lopsided the labels are.
    """
    scores_B, labels_B = scored(scores, labels)
    called_B = scores_B >= threshold
    return float((called_B[labels_B].mean() + (~called_B[~labels_B]).mean()) / 2)


def auc_estimate(
    scores: Array | Sequence[float],
    labels: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """`auc` with its interval, by `intervals.bootstrap`.

    Without an interval where positives or negatives are of too few groups, and at 0 and 1, where
    every sample agrees.
    """
    scores_B, labels_B = scored(scores, labels)
    areas = _weighted_auc(scores_B, labels_B)
    return _inside(bootstrap(areas, labels_B.size, groups, samples))


def auc_difference(
    scores: Array | Sequence[float],
    others: Array | Sequence[float],
    labels: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """auc(scores) - auc(others) of the same rows, with its interval: the same groups are drawn for
    both.
    """
    (scores_B, labels_B), (others_B, _) = scored(scores, labels), scored(others, labels)
    one, other = _weighted_auc(scores_B, labels_B), _weighted_auc(others_B, labels_B)
    return bootstrap(
        lambda weights_BS: one(weights_BS) - other(weights_BS), labels_B.size, groups, samples
    )


def balanced_accuracy_estimate(
    scores: Array | Sequence[float],
    labels: Array | Sequence[float],
    threshold: float,
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """`balanced_accuracy` with its interval for this threshold, by `intervals.bootstrap`; like
    `auc_estimate`'s.
    """
    scores_B, labels_B = scored(scores, labels)
    right_B = ((scores_B >= threshold) == labels_B).astype(np.float64)

    def shares(weights_BS: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a sample without a class is NaN
            return (
                sum(
                    right_B[side_B] @ weights_BS[side_B] / weights_BS[side_B].sum(axis=0)
                    for side_B in (labels_B, ~labels_B)
                )
                / 2
            )

    return _inside(bootstrap(shares, labels_B.size, groups, samples))


def correlation_estimate(
    scores: Array | Sequence[float],
    truth: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """`correlation` with its interval, by `intervals.bootstrap`; like `auc_estimate`'s."""
    x_B, y_B = paired(("scores", scores), ("truth", truth))
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()

    moments_BK = np.stack([x_B, y_B, x_B**2, y_B**2, x_B * y_B], axis=1)

    def pearson(weights_BS: np.ndarray) -> np.ndarray:
        x_S, y_S, xx_S, yy_S, xy_S = moments_BK.T @ weights_BS / weights_BS.sum(axis=0)
        spread_S = np.sqrt(np.maximum(0, xx_S - x_S**2) * np.maximum(0, yy_S - y_S**2))
        return np.divide(xy_S - x_S * y_S, spread_S, out=np.zeros_like(x_S), where=spread_S > 0)

    return _inside(bootstrap(pearson, x_B.size, groups, samples), lowest=-1.0)


def _weighted_auc(scores_B: np.ndarray, labels_B: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """(weights [B, S]) -> [S]: `auc` with each row counted by its weight; NaN without both
    classes.
    """
    up_U, down_D = np.flatnonzero(labels_B), np.flatnonzero(~labels_B)
    down_D = down_D[np.argsort(scores_B[down_D], kind="stable")]
    # How many negatives a positive is above, and how many it is not below: those beside it count
    # half.
    above_U, upto_U = (
        np.searchsorted(scores_B[down_D], scores_B[up_U], side) for side in ("left", "right")
    )

    def areas(weights_BS: np.ndarray) -> np.ndarray:
        up_US = weights_BS[up_U]
        below_DS = np.concatenate([np.zeros_like(up_US[:1]), np.cumsum(weights_BS[down_D], axis=0)])
        won_S = np.sum(up_US * (below_DS[above_U] + below_DS[upto_U]), axis=0) / 2
        with np.errstate(invalid="ignore"):
            return won_S / (up_US.sum(axis=0) * below_DS[-1])

    return areas


def _inside(found: Estimate, lowest: float = 0.0) -> Estimate:
    """Without its interval at the ends of the measure's range, where samples of the rows cannot
    differ.
    """
    return found if lowest < found.value < 1 else dataclasses.replace(found, low=None, high=None)


def best_threshold(scores: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """The threshold with the best balanced accuracy: choose it on validation rows, not on test.

    Candidates lie midway between neighbouring distinct scores; the lowest of equally good ones is
    taken. When no candidate beats a constant answer, the lowest score (everything is yes).
    """
    scores_B, labels_B = scored(scores, labels)
    values, inverse_B = np.unique(scores_B, return_inverse=True)
    positives = np.bincount(inverse_B, weights=labels_B)
    negatives = np.bincount(inverse_B, weights=~labels_B)
    # Threshold i says yes to values[i:] and no to values[:i]; i = 0 is the constant yes.
    true_rate = 1 - (np.cumsum(positives) - positives) / positives.sum()
    false_rate = 1 - (np.cumsum(negatives) - negatives) / negatives.sum()
    best = int(np.argmax(np.round(true_rate - false_rate, 12)))
    if best == 0:
        return float(values[0])
    middle = values[best - 1] + (values[best] - values[best - 1]) / 2
    # Between neighbouring floats the middle rounds to one of them; the lower one would be wrong.
    return float(middle if middle > values[best - 1] else values[best])


def sigmoid(x: Array | Sequence[float]) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64 without overflow."""
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def preference_probabilities(
    chosen: Array | Sequence[float], rejected: Array | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Bradley-Terry probabilities and labels of each pair asked in both orders, [2 B] each.

    P(first is preferred) = sigmoid(r_first - r_second). Asked in one order alone the label would
    always be 1 and calibration could not be seen.
    """
    chosen_B, rejected_B = paired(("chosen", chosen), ("rejected", rejected))
    p_B = sigmoid(chosen_B - rejected_B)
    return np.concatenate([p_B, 1 - p_B]), np.concatenate([np.ones_like(p_B), np.zeros_like(p_B)])


def brier(probabilities: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """Mean of (p - y)^2 over rows (Brier 1950)."""
    p_B, y_B = probable(probabilities, labels)
    return float(np.mean((p_B - y_B) ** 2))


def log_loss(
    probabilities: Array | Sequence[float],
    labels: Array | Sequence[float],
    epsilon: float = 1e-12,
) -> float:
    """Mean over rows of -(y log p + (1 - y) log(1 - p)), in nats, p clipped to [eps, 1 - eps]."""
    p_B, y_B = probable(probabilities, labels)
    p_B = np.clip(p_B, epsilon, 1 - epsilon)
    return float(-np.mean(y_B * np.log(p_B) + (1 - y_B) * np.log1p(-p_B)))


def reliability(
    probabilities: Array | Sequence[float],
    labels: Array | Sequence[float],
    bins: int = 10,
    groups: Groups = None,
) -> list[Bin]:
    """Mean prediction against mean label in equal-width bins of [0, 1]; empty bins are left out.

    Bin i is [i / bins, (i + 1) / bins), the last one closed. Mean labels have the interval of
    `proportion`.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    p_B, y_B = probable(probabilities, labels)
    edges = np.linspace(0, 1, bins + 1)
    index_B = np.clip(np.searchsorted(edges, p_B, side="right") - 1, 0, bins - 1)
    group_B, _ = group_numbers(groups, p_B.size)
    table = []
    for i in range(bins):
        inside_B = index_B == i
        if inside_B.any():
            observed = proportion(y_B[inside_B], group_B[inside_B])
            ends = float(edges[i]), float(edges[i + 1])
            table.append(
                Bin(
                    *ends,
                    float(p_B[inside_B].mean()),
                    observed.value,
                    observed.n,
                    observed.low,
                    observed.high,
                    observed.groups,
                )
            )
    return table


def expected_calibration_error(table: Sequence[Bin]) -> float:
    """sum_bins n / N |predicted - observed| (Naeini et al. 2015), of a reliability table.

    It has no interval: noise in the bins only ever adds to it, and more so in samples of the rows,
    so that their percentiles are not around it. The bins have intervals.
    """
    total = sum(row.n for row in table)
    if not total:
        raise ValueError("the reliability table is empty")
    return sum(row.n * abs(row.predicted - row.observed) for row in table) / total


# ---------------------------------------------------------------- policies


def distinct_n(token_lists: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses together (Li et al. 2016); 0 if none.

    N-grams do not cross responses. The ratio falls with the amount of text: compare only sets with
    the same number of responses of about the same length.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    counts = Counter(
        tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)
    )
    total = counts.total()
    return len(counts) / total if total else 0.0


def tally(outcomes: Array | Sequence[float], groups: Groups = None) -> WinRate:
    """Counts and rate of outcomes that are 1 (win), 0.5 (tie) or 0 (loss)."""
    outcomes_B = vector("outcomes", outcomes)
    if not np.isin(outcomes_B, (0.0, 0.5, 1.0)).all():
        raise ValueError("outcomes must be 0, 0.5 or 1")
    wins, ties, losses = (int((outcomes_B == value).sum()) for value in (1.0, 0.5, 0.0))
    rate = proportion(outcomes_B, groups)
    return WinRate(wins, ties, losses, rate.value, rate.low, rate.high, rate.groups)


def win_rate(
    score_a: Array | Sequence[float],
    score_b: Array | Sequence[float],
    tie_margin: float = 0.0,
    groups: Groups = None,
) -> WinRate:
    """How often A's response to a prompt scores higher than B's; within the margin is a tie."""
    return tally(compare(score_a, score_b, tie_margin), groups)


def both_orders(
    first_ab: Array | Sequence[bool], first_ba: Array | Sequence[bool], groups: Groups = None
) -> WinRate:
    """Win rate of A by a judge asked in both orders (PE-RLHF, arXiv 2403.10704, evaluation).

    first_ab: the judge, shown (A, B), preferred the first, A. first_ba: shown (B, A), it preferred
    the first, B. A wins when both answers say A, loses when both say B; a judge that goes by the
    position answers one way each time, and that is a tie.
    """
    ab_B, ba_B = paired(("first_ab", first_ab), ("first_ba", first_ba))
    if not (np.isin(ab_B, (0.0, 1.0)).all() and np.isin(ba_B, (0.0, 1.0)).all()):
        raise ValueError("first_ab and first_ba must hold booleans")
    return tally((ab_B + (1 - ba_B)) / 2, groups)
