"""Measures of reward models and policies: numpy in, numbers with their uncertainty out.

All arithmetic is float64. Inputs are one-dimensional; a NaN or infinity among them, arrays of
different lengths, or a measure that the data do not define (an AUC without both classes) raise
ValueError: a comparison with NaN is False and would quietly count as a loss.

Every interval is two-sided with 95 % confidence unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from perl_jax.types import Array

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; `low` and `high` are None when n is too small."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin of a reliability table: means of prediction and label over its n rows."""

    low: float
    high: float
    predicted: float
    observed: float
    n: int


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Counts of A against B; `rate` = (wins + ties / 2) / n with its Wilson interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def vector(name: str, values: Array | Sequence[float]) -> np.ndarray:
    """`values` as a float64 vector, refused when empty, of another rank, or not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, not of shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} holds {bad} NaN or infinite of {array.size} values")
    return array


def paired(
    first: tuple[str, Array | Sequence[float]], second: tuple[str, Array | Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Two named vectors of one length."""
    a, b = vector(*first), vector(*second)
    if a.shape != b.shape:
        raise ValueError(f"{first[0]} has {a.size} values but {second[0]} has {b.size}")
    return a, b


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
) -> Estimate:
    """Share of pairs whose chosen response scores higher, ties as half; Wilson interval.

    A model that gives every response one score gets 0.5, not 0 or 1. With weights the share is
    sum w o / sum w, and its interval that of (sum w)^2 / sum w^2 pairs (Kish 1965).
    """
    outcomes_B = compare(chosen, rejected)
    if weights is None:
        return proportion(outcomes_B)
    outcomes_B, w_B = paired(("outcomes", outcomes_B), ("weights", weights))
    if w_B.min() < 0 or not w_B.sum() > 0:
        raise ValueError("weights must be at least 0, and not all 0")
    share = float(np.sum(w_B * outcomes_B) / np.sum(w_B))
    effective = float(np.sum(w_B) ** 2 / np.sum(np.square(w_B)))
    return dataclasses.replace(wilson(share * effective, effective), n=outcomes_B.size)


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
    probabilities: Array | Sequence[float], labels: Array | Sequence[float], bins: int = 10
) -> list[Bin]:
    """Mean prediction against mean label in equal-width bins of [0, 1]; empty bins are left out.

    Bin i is [i / bins, (i + 1) / bins), the last one closed.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    p_B, y_B = probable(probabilities, labels)
    edges = np.linspace(0, 1, bins + 1)
    index_B = np.clip(np.searchsorted(edges, p_B, side="right") - 1, 0, bins - 1)
    table = []
    for i in range(bins):
        inside_B = index_B == i
        n = int(inside_B.sum())
        if n:
            means = float(p_B[inside_B].mean()), float(y_B[inside_B].mean())
            table.append(Bin(float(edges[i]), float(edges[i + 1]), *means, n))
    return table


def expected_calibration_error(table: Sequence[Bin]) -> float:
    """sum_bins n / N |predicted - observed| (Naeini et al. 2015), of a reliability table."""
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


def tally(outcomes: Array | Sequence[float]) -> WinRate:
    """Counts and rate of outcomes that are 1 (win), 0.5 (tie) or 0 (loss)."""
    outcomes_B = vector("outcomes", outcomes)
    if not np.isin(outcomes_B, (0.0, 0.5, 1.0)).all():
        raise ValueError("outcomes must be 0, 0.5 or 1")
    wins, ties, losses = (int((outcomes_B == value).sum()) for value in (1.0, 0.5, 0.0))
    rate = proportion(outcomes_B)
    return WinRate(wins, ties, losses, rate.value, float(rate.low), float(rate.high))


def win_rate(
    score_a: Array | Sequence[float], score_b: Array | Sequence[float], tie_margin: float = 0.0
) -> WinRate:
    """How often A's response to a prompt scores higher than B's; within the margin is a tie."""
    return tally(compare(score_a, score_b, tie_margin))


def both_orders(first_ab: Array | Sequence[bool], first_ba: Array | Sequence[bool]) -> WinRate:
    """Win rate of A by a judge asked in both orders (PE-RLHF, arXiv 2403.10704, evaluation).

    first_ab: the judge, shown (A, B), preferred the first, A. first_ba: shown (B, A), it preferred
    the first, B. A wins when both answers say A, loses when both say B; a judge that goes by the
    position answers one way each time, and that is a tie.
    """
    ab_B, ba_B = paired(("first_ab", first_ab), ("first_ba", first_ba))
    if not (np.isin(ab_B, (0.0, 1.0)).all() and np.isin(ba_B, (0.0, 1.0)).all()):
        raise ValueError("first_ab and first_ba must hold booleans")
    return tally((ab_B + (1 - ba_B)) / 2)


# ---------------------------------------------------------------- uncertainty


def normal_quantile(confidence: float) -> float:
    """z with P(|Z| <= z) = confidence."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), not {confidence}")
    return statistics.NormalDist().inv_cdf(0.5 + confidence / 2)


def t_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence for Student's t; within 0.3 % at 95 % from 3 degrees up.

    Exact for one and two degrees of freedom, else the Cornish-Fisher expansion in 1 / freedom
    (Abramowitz & Stegun 26.7.5).
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, not {freedom}")
    z = normal_quantile(confidence)
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    if freedom == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    v = freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n);
    half = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2).
    `successes` may hold halves (ties): their variance is below a coin's, so the interval is then
    wider than it need be, never narrower.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a proportion")
    z, p = normal_quantile(confidence), successes / n
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 the ends are exactly 0 and 1; rounding would put them just beside.
    low, high = (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)
    return Estimate(p, low, high, int(n))


def proportion(outcomes: Array | Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of outcomes in [0, 1] (1 yes, 0 no, 0.5 tie) with Wilson's interval."""
    outcomes_B = vector("outcomes", outcomes)
    if outcomes_B.min() < 0 or outcomes_B.max() > 1:
        raise ValueError("outcomes must lie in [0, 1]")
    return wilson(float(outcomes_B.sum()), outcomes_B.size, confidence)


def mean_ci(x: Array | Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """mean +- t s / sqrt(n), s with n - 1, Student's t; no interval for n = 1."""
    x_B = vector("x", x)
    mean, n = float(x_B.mean()), x_B.size
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(confidence, n - 1) * float(x_B.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_bootstrap(
    a: Array | Sequence[float],
    b: Array | Sequence[float],
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean of a - b with a percentile interval over resampled rows (Efron 1979).

    Rows are drawn together, so what a and b share (the prompt) cancels. One seed gives one answer.
    With outcomes in {0, 0.5, 1} ties count half. No interval for one row.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    normal_quantile(confidence)  # for its check
    a_B, b_B = paired(("a", a), ("b", b))
    difference_B = a_B - b_B
    n, mean = difference_B.size, float(difference_B.mean())
    if n == 1:
        return Estimate(mean, None, None, 1)
    generator = np.random.default_rng(seed)
    block = max(1, 2**20 // n)  # bounds memory, which samples * n indices would not
    means = np.concatenate([
        difference_B[generator.integers(0, n, (min(block, samples - done), n))].mean(axis=1)
        for done in range(0, samples, block)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean, float(low), float(high), n)
