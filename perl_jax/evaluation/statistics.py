"""Measures of reward models and policies: NumPy arrays in, numbers with confidence intervals out.

All arithmetic is float64. Inputs are one-dimensional: one value per row. A NaN or infinity, arrays
of different lengths, or a measure that the data do not define (an AUC with one class) raise
ValueError. (A comparison with NaN is False and would silently count as a loss.)

Every interval is two-sided with 95 % confidence, over whole groups of rows (`intervals`). The
argument `groups` holds the group of each row; None makes every row a group of its own. The argument
`samples` is the number of bootstrap samples.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from perl_jax.evaluation.intervals import (
    Estimate,
    Groups,
    group_numbers,
    paired,
    proportion,
    vector,
)
from perl_jax.evaluation.resampling import SAMPLES, bootstrap
from perl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Wins, ties and losses of A against B.

    Attributes:
        wins: The number of rows that A wins.
        ties: The number of ties.
        losses: The number of rows that A loses.
        rate: (wins + ties / 2) / n.
        low: The lower end of the interval of `rate` (`intervals.proportion`); None with one group.
        high: The upper end; None with one group.
        groups: The number of groups of rows.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float | None
    high: float | None
    groups: int


def checked_scores(
    scores: Array | Sequence[float], labels: Array | Sequence[float], both_classes: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scores as float64, labels as bool).

    Args:
        scores: One score per row.
        labels: One label per row, 0 or 1.
        both_classes: Whether both labels must occur.

    Raises:
        ValueError: A label is neither 0 nor 1, or both must occur and one does not.
    """
    scores_B, labels_B = paired(("scores", scores), ("labels", labels))
    if not np.isin(labels_B, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if both_classes and labels_B.min() == labels_B.max():
        raise ValueError(f"all {labels_B.size} labels are {labels_B[0]:.0f}; both classes needed")
    return scores_B, labels_B.astype(bool)


# ---------------------------------------------------------------- reward models
def compare(
    score_a: Array | Sequence[float], score_b: Array | Sequence[float], tie_margin: float = 0.0
) -> np.ndarray:
    """Returns, for each row, 1 if a is above b by more than the margin, 0 if b is above a by more
    than the margin, else 0.5: float64 [n].

        compare([3, 1, 2], [1, 3, 2]) == [1, 0, 0.5]

    Raises ValueError if `tie_margin` is negative.
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
    """Returns the share of pairs whose chosen response scores higher, with the interval of
    `intervals.proportion`.

    Ties count half, so a model that scores every response alike gets 0.5. With weights w and
    outcomes o the share is sum w o / sum w.

    Args:
        chosen: The score of each pair's chosen response.
        rejected: The score of each pair's rejected response.
        weights: The weight of each pair; None weighs all pairs alike.
        groups: The group of each pair; the pairs of one ranking belong to one group.
    """
    return proportion(compare(chosen, rejected), groups, weights)


def auc(scores: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """Returns the area under the ROC curve, P(a positive scores higher than a negative) + P(equal
    scores) / 2.

    auc = U / (n1 n0), U = (sum of the positives' ranks) - n1 (n1 + 1) / 2, for n1 positives and n0
    negatives, where tied scores share their mean rank (Mann & Whitney 1947).

    Args:
        scores: One score per row.
        labels: One label per row, 1 for a positive and 0 for a negative; both must occur.
    """
    scores_B, labels_B = checked_scores(scores, labels)
    _, inverse_B, counts = np.unique(scores_B, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks_B = (last_rank - (counts - 1) / 2)[inverse_B]
    positives = int(labels_B.sum())
    negatives = labels_B.size - positives
    u = ranks_B[labels_B].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def correlation(scores: Array | Sequence[float], truth: Array | Sequence[float]) -> float:
    """Returns Pearson's correlation of the two vectors, cov / (std std); 0 if either vector is
    constant.
    """
    x_B, y_B = paired(("scores", scores), ("truth", truth))
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    spread = float(np.sqrt(np.sum(x_B**2) * np.sum(y_B**2)))
    return float(np.sum(x_B * y_B)) / spread if spread > 0 else 0.0


def balanced_accuracy(
    scores: Array | Sequence[float], labels: Array | Sequence[float], threshold: float
) -> float:
    """Returns the mean of the accuracy on positives and the accuracy on negatives.

    A constant prediction gets 0.5, however unbalanced the labels are.

    Args:
        scores: One score per row.
        labels: One label per row, 0 or 1; both must occur.
        threshold: A score of at least this value predicts a positive.
    """
    scores_B, labels_B = checked_scores(scores, labels)
    called_B = scores_B >= threshold
    return float((called_B[labels_B].mean() + (~called_B[~labels_B]).mean()) / 2)


def auc_estimate(
    scores: Array | Sequence[float],
    labels: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """Returns `auc` with the interval of `resampling.bootstrap`.

    The ends are None at 0 and 1, where all samples agree, and if more than a tenth of the samples
    lack a class.

    Args:
        scores: One score per row.
        labels: One label per row, 0 or 1; both must occur.
        groups: The group of each row; None if all rows are independent.
        samples: The number of bootstrap samples.
    """
    scores_B, labels_B = checked_scores(scores, labels)
    areas = _weighted_auc(scores_B, labels_B)
    return _without_interval_at_ends(bootstrap(areas, labels_B.size, groups, samples))


def auc_difference(
    scores: Array | Sequence[float],
    others: Array | Sequence[float],
    labels: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """Returns auc(scores) - auc(others) on the same rows, with an interval of paired bootstrap
    samples.

    Args:
        scores: One score per row.
        others: Another score per row.
        labels: One label per row, 0 or 1; both must occur.
        groups: The group of each row; None if all rows are independent.
        samples: The number of bootstrap samples.
    """
    (scores_B, labels_B), (others_B, _) = (
        checked_scores(scores, labels),
        checked_scores(others, labels),
    )
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
    """Returns `balanced_accuracy` at a threshold with the interval of `resampling.bootstrap`.

    The interval does not cover the choice of the threshold. The ends are None at 0 and 1, where all
    samples agree, and if more than a tenth of the samples lack a class.

    Args:
        scores: One score per row.
        labels: One label per row, 0 or 1; both must occur.
        threshold: A score of at least this value predicts a positive.
        groups: The group of each row; None if all rows are independent.
        samples: The number of bootstrap samples.
    """
    scores_B, labels_B = checked_scores(scores, labels)
    right_B = ((scores_B >= threshold) == labels_B).astype(np.float64)

    def shares(weights_BS: np.ndarray) -> np.ndarray:
        """Returns the balanced accuracy [S] of rows weighted by [B, S]; NaN if a class has no
        weight.
        """
        with np.errstate(invalid="ignore"):  # a sample without one of the classes gives NaN
            return (
                sum(
                    right_B[side_B] @ weights_BS[side_B] / weights_BS[side_B].sum(axis=0)
                    for side_B in (labels_B, ~labels_B)
                )
                / 2
            )

    return _without_interval_at_ends(bootstrap(shares, labels_B.size, groups, samples))


def correlation_estimate(
    scores: Array | Sequence[float],
    truth: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """Returns `correlation` (Pearson's) with the interval of `resampling.bootstrap`.

    The ends are None at -1 and 1, where all samples agree.

    Args:
        scores: One score per row.
        truth: The true value of each row.
        groups: The group of each row; None if all rows are independent.
        samples: The number of bootstrap samples.
    """
    x_B, y_B = paired(("scores", scores), ("truth", truth))
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()

    moments_BK = np.stack([x_B, y_B, x_B**2, y_B**2, x_B * y_B], axis=1)

    def pearson(weights_BS: np.ndarray) -> np.ndarray:
        """Returns the correlation [S] of rows weighted by [B, S]; 0 where a vector is constant."""
        x_S, y_S, xx_S, yy_S, xy_S = moments_BK.T @ weights_BS / weights_BS.sum(axis=0)
        spread_S = np.sqrt(np.maximum(0, xx_S - x_S**2) * np.maximum(0, yy_S - y_S**2))
        return np.divide(xy_S - x_S * y_S, spread_S, out=np.zeros_like(x_S), where=spread_S > 0)

    return _without_interval_at_ends(bootstrap(pearson, x_B.size, groups, samples), lowest=-1.0)


def _weighted_auc(scores_B: np.ndarray, labels_B: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from weights [B, S] to AUCs [S], where row i counts weights[i, s] times.

    The AUC is NaN if a class has no weight.

    Args:
        scores_B: One score per row.
        labels_B: Whether the row is a positive.
    """
    up_U, down_D = np.flatnonzero(labels_B), np.flatnonzero(~labels_B)
    down_D = down_D[np.argsort(scores_B[down_D], kind="stable")]
    # For each positive: how many negatives score lower, and how many score lower or equal. The
    # mean of the two counts ties as half.
    above_U, upto_U = (
        np.searchsorted(scores_B[down_D], scores_B[up_U], side) for side in ("left", "right")
    )

    def areas(weights_BS: np.ndarray) -> np.ndarray:
        """Returns the AUC [S] of rows weighted by [B, S]; NaN where a class has no weight."""
        up_US = weights_BS[up_U]
        below_DS = np.concatenate([np.zeros_like(up_US[:1]), np.cumsum(weights_BS[down_D], axis=0)])
        won_S = np.sum(up_US * (below_DS[above_U] + below_DS[upto_U]), axis=0) / 2
        with np.errstate(invalid="ignore"):
            return won_S / (up_US.sum(axis=0) * below_DS[-1])

    return areas


def _without_interval_at_ends(found: Estimate, lowest: float = 0.0) -> Estimate:
    """Returns the estimate; the interval's ends are None if the value is at an end of the measure's
    range.

    There all bootstrap samples agree, so the bootstrap shows no uncertainty.

    Args:
        found: The estimate.
        lowest: The lower end of the range; the upper end is 1.
    """
    return found if lowest < found.value < 1 else dataclasses.replace(found, low=None, high=None)


def best_threshold(scores: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """Returns the threshold with the best balanced accuracy; select it on validation rows, not on
    test rows.

    A row is predicted positive if its score >= threshold. Candidates lie midway between
    neighbouring distinct scores. Of equally good candidates the lowest is returned. If no candidate
    beats a constant prediction, returns the lowest score, with which all rows are predicted
    positive.

    Args:
        scores: One score per row.
        labels: One label per row, 0 or 1.

    Raises:
        ValueError: A label is neither 0 nor 1, or only one of them occurs.
    """
    scores_B, labels_B = checked_scores(scores, labels)
    values, inverse_B = np.unique(scores_B, return_inverse=True)
    positives = np.bincount(inverse_B, weights=labels_B)
    negatives = np.bincount(inverse_B, weights=~labels_B)
    # Threshold i predicts positive for values[i:]; i = 0 predicts positive for all rows.
    true_rate = 1 - (np.cumsum(positives) - positives) / positives.sum()
    false_rate = 1 - (np.cumsum(negatives) - negatives) / negatives.sum()
    best = int(np.argmax(np.round(true_rate - false_rate, 12)))
    if best == 0:
        return float(values[0])
    middle = values[best - 1] + (values[best] - values[best - 1]) / 2
    # Between adjacent floats the middle rounds to one of them; the lower one would be wrong.
    return float(middle if middle > values[best - 1] else values[best])


# ---------------------------------------------------------------- policies
def distinct_n(token_lists: Sequence[Sequence[Hashable]], n: int) -> float:
    """Returns the number of distinct n-grams divided by the number of all n-grams (Li et al. 2016);
    0 if there is no n-gram.

    N-grams do not cross responses. The ratio falls with the amount of text, so compare only sets
    with the same number of responses of similar lengths. Raises ValueError if `n` is below 1.

    Args:
        token_lists: The tokens of each response.
        n: The length of the n-grams.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    counts = Counter(
        tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)
    )
    total = counts.total()
    return len(counts) / total if total else 0.0


def tally(outcomes: Array | Sequence[float], groups: Groups = None) -> WinRate:
    """Returns counts and rate of wins, ties and losses.

    Args:
        outcomes: The outcome of each row: 1 (win), 0.5 (tie) or 0 (loss).
        groups: The group of each row; None if all rows are independent.

    Raises:
        ValueError: There is any other outcome.
    """
    outcomes_B = vector("outcomes", outcomes)
    if not np.isin(outcomes_B, (0.0, 0.5, 1.0)).all():
        raise ValueError("outcomes must be 0, 0.5 or 1")
    wins, ties, losses = (int((outcomes_B == value).sum()) for value in (1.0, 0.5, 0.0))
    rate = proportion(outcomes_B, groups)
    _, count = group_numbers(groups, outcomes_B.size)
    return WinRate(wins, ties, losses, rate.value, rate.low, rate.high, count)


def win_rate(
    score_a: Array | Sequence[float],
    score_b: Array | Sequence[float],
    tie_margin: float = 0.0,
    groups: Groups = None,
) -> WinRate:
    """Returns how often A's response to a prompt scores higher than B's.

    Args:
        score_a: The score of A's response to each prompt.
        score_b: The score of B's response to each prompt.
        tie_margin: A difference of at most this value is a tie.
        groups: The group of each prompt; None if all prompts are independent.
    """
    return tally(compare(score_a, score_b, tie_margin), groups)


def both_orders(
    first_ab: Array | Sequence[bool], first_ba: Array | Sequence[bool], groups: Groups = None
) -> WinRate:
    """Returns the win rate of A by a judge that is shown each pair in both orders (PE-RLHF, arXiv
    2403.10704, evaluation).

    A wins if both answers prefer A and loses if both prefer B. A judge that decides by position
    gives contradicting answers, which is a tie.

    Args:
        first_ab: Whether the judge, shown (A, B), preferred the first, A.
        first_ba: Whether the judge, shown (B, A), preferred the first, B.
        groups: The group of each row; None if all rows are independent.

    Raises:
        ValueError: A value is neither 0 nor 1.
    """
    ab_B, ba_B = paired(("first_ab", first_ab), ("first_ba", first_ba))
    if not (np.isin(ab_B, (0.0, 1.0)).all() and np.isin(ba_B, (0.0, 1.0)).all()):
        raise ValueError("first_ab and first_ba must hold booleans")
    return tally((ab_B + (1 - ba_B)) / 2, groups)
