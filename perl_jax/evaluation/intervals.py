"""Confidence intervals of means and shares, for rows that come in groups.

Rows of one prompt, one dialogue or one topic resemble each other: the pairs of a ranking share
responses, the turns of a dialogue share a user. An interval that treats such rows as independent is
too narrow. Every function here and in `resampling` takes `groups`, the group of each row (any
hashable values). None makes every row a group of its own, which gives the ordinary interval:

- `mean_ci`: Student's t interval of the groups' totals; mean +- t s / sqrt(n) without groups.
- `proportion`: Wilson's interval for the effective number of independent rows, estimated from the
  variance between groups; Wilson's interval for n rows without groups.
- `resampling.bootstrap` and the functions beside it: percentiles over resampled groups; Efron's
  bootstrap without groups.

With a single group nothing is known about how groups differ: the ends of the interval are None.
`tests/evaluation/test_intervals.py` measures the coverage.

All arithmetic is float64. Every interval is two-sided, with 95 % confidence by default.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Reward functions of experiments import this module in a worker process, where importing JAX
    # would cost time and memory.
    from perl_jax.types import Array


CONFIDENCE = 0.95


Groups = Sequence[Hashable] | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: The point estimate.
        low: The lower end of the interval; None if there are too few groups.
        high: The upper end, or None.
        n: The number of rows.
        groups: The number of independent groups; None if not known.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    groups: int | None = None


def vector(name: str, values: Array | Sequence[float]) -> np.ndarray:
    """Returns `values` as a float64 vector.

    Args:
        name: The name of the values in error messages.
        values: The values.

    Raises:
        ValueError: `values` is empty, not one-dimensional, or holds NaN or infinity.
    """
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
    """Returns the two vectors as float64; raises ValueError as `vector` does, or if their lengths
    differ.

    Args:
        first: (name for messages, values).
        second: (name for messages, values).
    """
    a, b = vector(*first), vector(*second)
    if a.shape != b.shape:
        raise ValueError(f"{first[0]} has {a.size} values but {second[0]} has {b.size}")
    return a, b


def group_numbers(groups: Groups, n: int) -> tuple[np.ndarray, int]:
    """Returns (group_B, G): int [n], each row's group as a number from 0 in order of appearance;
    and the number of groups.

    Args:
        groups: The group of each row; None makes every row a group of its own.
        n: The number of rows.

    Raises:
        ValueError: `groups` does not have n values.
    """
    if groups is None:
        return np.arange(n), n
    keys = list(groups)
    if len(keys) != n:
        raise ValueError(f"groups has {len(keys)} values but there are {n} rows")
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.asarray([numbers[key] for key in keys], np.int64), len(numbers)


def freedom(group_B: np.ndarray, w_B: np.ndarray | None = None) -> int:
    """Returns the degrees of freedom of a variance between groups: G_eff - 1, at least 1.

    G_eff = (sum W)^2 / sum W^2, rounded down, is the effective number of groups; W are the groups'
    sums of weights. With G groups of one size it is G. A few large groups decide a mean, however
    many small ones there are.

    Args:
        group_B: The number of each row's group, from 0.
        w_B: The weight of each row; None weighs all rows alike.
    """
    # 1e-6, because rounded weights such as 1/3 may add up to a little less than a whole number.
    return max(1, math.floor(_effective_rows(np.bincount(group_B, w_B)) + 1e-6) - 1)


def _effective_rows(w_B: np.ndarray) -> float:
    """Returns the effective sample size (sum w)^2 / sum w^2 (Kish 1965).

    It is the number of rows with equal weights whose mean has the same variance.

    Args:
        w_B: The weight of each row.
    """
    return float(np.sum(w_B)) ** 2 / float(np.sum(np.square(w_B, dtype=np.float64)))


def normal_quantile(confidence: float) -> float:
    """Returns z with P(|Z| <= z) = confidence for a standard normal Z.

    Raises ValueError unless `confidence` lies in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), not {confidence}")
    return statistics.NormalDist().inv_cdf(0.5 + confidence / 2)


def t_quantile(confidence: float, freedom: int) -> float:
    """Returns t with P(|T| <= t) = confidence for Student's t with `freedom` degrees of freedom.

    Exact for 1 and 2 degrees; above that the Cornish-Fisher expansion in 1 / freedom (Abramowitz &
    Stegun 26.7.5), within 0.3 % at 95 %.

    Raises ValueError unless `confidence` lies in (0, 1) and `freedom` is at least 1.
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


# ---------------------------------------------------------------- means and shares
def mean_ci(
    x: Array | Sequence[float], groups: Groups = None, confidence: float = CONFIDENCE
) -> Estimate:
    """Returns the mean of all rows with the interval mean +- t sqrt(V).

    V = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2 for G groups, the variance of a ratio
    of group sums to group sizes (Cochran 1977, 6.3). Without groups V = s^2 / n. t is Student's,
    with the degrees of `freedom`. With a single group the ends are None.

    Args:
        x: The values [n].
        groups: The group of each row; None if all rows are independent.
        confidence: The confidence of the interval, in (0, 1).
    """
    x_B = vector("x", x)
    mean, n = float(x_B.mean()), x_B.size
    group_B, count = group_numbers(groups, n)
    if count == 1:
        return Estimate(mean, None, None, n, 1)
    totals_G = np.bincount(group_B, x_B - mean, count)
    error = math.sqrt(count / (count - 1) * float(np.sum(totals_G**2))) / n
    half = t_quantile(confidence, freedom(group_B)) * error
    return Estimate(mean, mean - half, mean + half, n, count)


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> Estimate:
    """Returns a proportion of n independent draws with Wilson's score interval (Wilson 1927).

        centre = (p + z^2 / 2n) / (1 + z^2 / n)
        half = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2)

    Raises ValueError unless n > 0 and 0 <= successes <= n.

    Args:
        successes: The number of successes. It may include halves (ties): their variance is below
            that of a binomial, so the interval is then wider than necessary, never too narrow.
        n: The number of draws; an effective number need not be whole.
        confidence: The confidence of the interval, in (0, 1).
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a proportion")
    z, p = normal_quantile(confidence), successes / n
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 the ends are exactly 0 and 1; rounding would miss them slightly.
    low, high = (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)
    return Estimate(p, low, high, int(n))


def proportion(
    outcomes: Array | Sequence[float],
    groups: Groups = None,
    weights: Array | Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Returns the (weighted) mean of outcomes in [0, 1] with Wilson's interval for n_eff
    independent rows.

    n_eff, the effective number of rows, is

    - without groups: (sum w)^2 / sum w^2 (Kish 1965), which is n without weights;
    - with groups: p (1 - p) / V, V as in `mean_ci` (weighted), times (z / t)^2 because V itself is
      estimated (Korn & Graubard 1998), and never more than without groups;
    - with groups and p = 0 or p = 1, where V is 0: (sum W)^2 / sum W^2 of the groups' weights W, as
      if each group were one row.

    With a single group of several rows the ends of the interval are None.

    Args:
        outcomes: The outcome of each row: 1 (yes), 0 (no), 0.5 (tie), or any share between.
        groups: The group of each row; None if all rows are independent.
        weights: w, the weight of each row; None weighs all rows alike.
        confidence: The confidence of the interval, in (0, 1).

    Raises:
        ValueError: An outcome is outside [0, 1], a weight is negative, or all weights are 0.
    """
    outcomes_B = vector("outcomes", outcomes)
    if outcomes_B.min() < 0 or outcomes_B.max() > 1:
        raise ValueError("outcomes must lie in [0, 1]")
    outcomes_B, w_B = paired(
        ("outcomes", outcomes_B),
        ("weights", np.ones_like(outcomes_B) if weights is None else weights),
    )
    if w_B.min() < 0 or not w_B.sum() > 0:
        raise ValueError("weights must be at least 0, and not all 0")
    share = min(1.0, float(np.sum(w_B * outcomes_B) / np.sum(w_B)))
    n = outcomes_B.size
    group_B, count = group_numbers(groups, n)
    if count == 1 < n:
        return Estimate(share, None, None, n, 1)
    rows = _effective_rows(w_B)
    if count < n:
        rows = min(
            rows,
            _effective_rows_of_groups(
                outcomes_B - share, w_B, group_B, share * (1 - share), confidence
            ),
        )
    return dataclasses.replace(
        wilson(share * rows, rows, confidence), value=share, n=n, groups=count
    )


def _effective_rows_of_groups(
    deviations_B: np.ndarray, w_B: np.ndarray, group_B: np.ndarray, spread: float, confidence: float
) -> float:
    """Returns how many independent rows would have a mean as uncertain as that of the grouped rows.

    With a `spread` of 0 each group counts as one row, by its sum of weights. Infinite if the
    groups' totals do not vary.

    Args:
        deviations_B: Each row's outcome minus the weighted mean of all rows.
        w_B: The weight of each row.
        group_B: The number of each row's group, from 0.
        spread: The variance of one row, p (1 - p).
        confidence: The confidence of the interval that the number is for.
    """
    count = int(group_B.max()) + 1
    if spread == 0:
        return _effective_rows(np.bincount(group_B, w_B, count))
    totals_G = np.bincount(group_B, w_B * deviations_B, count)
    variance = count / (count - 1) * float(np.sum(totals_G**2)) / float(np.sum(w_B)) ** 2
    widening = t_quantile(confidence, freedom(group_B, w_B)) / normal_quantile(confidence)
    return spread / (variance * widening**2) if variance > 0 else math.inf
