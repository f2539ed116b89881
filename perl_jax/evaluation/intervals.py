"""Confidence intervals of measures over rows that come in groups: whole groups are what is drawn.

Rows of one prompt, one dialogue or one topic resemble each other: the pairs of a ranking share its
responses, the turns of a dialogue its user. An interval that takes such rows for independent ones
is too narrow. Every function here takes `groups`, the group of each row (any hashable values);
None makes every row a group of its own, which gives the ordinary interval:

| function | interval | every row its own group |
|---|---|---|
| `mean_ci` | Student's t, of the group totals of deviations | mean +- t s / sqrt(n) |
| `proportion` | Wilson's, of as many rows as the variance between groups is worth | Wilson's |
| `bootstrap`, `bootstrap_mean`, `paired_bootstrap` | percentiles over samples of whole groups |
Efron's bootstrap |

One group tells nothing about how groups differ: the interval's ends are None. With few groups
percentiles are too close (nominal 95 % covers 83 to 87 % with 6 groups, 90 to 93 % with 15), so
they are moved outwards by the ratio of Student's t to the normal quantile (Hesterberg 2015, "What
teachers should know about the bootstrap", 5.3). `tests/evaluation/test_intervals.py` measures the
coverage that is left.

All arithmetic is float64. Every interval is two-sided with 95 % confidence unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Reward functions of experiments import this module in a process of their own, which has no
    # need of JAX.
    from perl_jax.types import Array

CONFIDENCE = 0.95
SAMPLES = 2000
# Weights of one block of bootstrap samples, in numbers: bounds memory, which all samples would not.
_BLOCK = 2**20
# A statistic that more of the samples than this leave undefined has no interval.
_MOST_UNDEFINED = 0.1

Groups = Sequence[Hashable] | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; `low` and `high` are None where there are too few
    groups.

    n: rows. groups: how many independent groups these are; None where that is not known.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    groups: int | None = None


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


def group_numbers(groups: Groups, n: int) -> tuple[np.ndarray, int]:
    """The group of each of n rows as a number from 0, in order of appearance, and how many groups
    there are.
    """
    if groups is None:
        return np.arange(n), n
    keys = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(keys) != n:
        raise ValueError(f"groups has {len(keys)} values but there are {n} rows")
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.asarray([numbers[key] for key in keys], np.int64), len(numbers)


def freedom(group_B: np.ndarray, w_B: np.ndarray | None = None) -> int:
    """Degrees of freedom of a variance between groups: those of as many groups of one size.

    (sum W)^2 / sum W^2 - 1 of the groups' sizes, or weights, W, rounded down; at least 1. A few
    large groups decide a mean, however many small ones are beside them.
    """
    # A little more, because weights such as 1/3 do not add up exactly.
    return max(1, math.floor(_worth(np.bincount(group_B, w_B)) + 1e-6) - 1)


def _worth(w_B: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many equal weights give a mean of the same variance (Kish 1965)."""
    return float(np.sum(w_B)) ** 2 / float(np.sum(np.square(w_B, dtype=np.float64)))


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


# ---------------------------------------------------------------- means and shares


def mean_ci(
    x: Array | Sequence[float], groups: Groups = None, confidence: float = CONFIDENCE
) -> Estimate:
    """The mean of all rows +- t sqrt(V), Student's t with the degrees of `freedom`: G - 1 for
    groups of one size.

    V = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2, the variance of the ratio of the
    groups' sums to their sizes (Cochran 1977, 6.3), which is s^2 / n where every row is its own
    group.
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
    """A proportion of n independent draws with Wilson's score interval (Wilson 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n);
    half = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2).
    `successes` may hold halves (ties): their variance is below a coin's, so the interval is then
    wider than it need be, never narrower.
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a proportion")
    z, p = normal_quantile(confidence), successes / n
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 the ends are exactly 0 and 1; rounding would put them just beside.
    low, high = (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)
    return Estimate(p, low, high, int(n))


def proportion(
    outcomes: Array | Sequence[float],
    groups: Groups = None,
    weights: Array | Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean of outcomes in [0, 1] (1 yes, 0 no, 0.5 tie), by weights if given, with Wilson's
    interval.

    The interval is that of as many independent rows as the rows are worth:

    * every row its own group: (sum w)^2 / sum w^2 (Kish 1965), which is n without weights;
    * otherwise p (1 - p) / V, V as in `mean_ci` (with weights), times (z / t)^2 because V itself is
      estimated (Korn & Graubard 1998), and never more than the former;
    * p is 0 or 1, where no row differs: one row a group, (sum W)^2 / sum W^2 of the groups' weights
      W.
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
    rows = _worth(w_B)
    if count < n:
        rows = min(
            rows,
            _worth_of_groups(outcomes_B - share, w_B, group_B, share * (1 - share), confidence),
        )
    return dataclasses.replace(
        wilson(share * rows, rows, confidence), value=share, n=n, groups=count
    )


def _worth_of_groups(
    deviations_B: np.ndarray, w_B: np.ndarray, group_B: np.ndarray, spread: float, confidence: float
) -> float:
    """How many independent rows of variance `spread` have a mean as uncertain as the groups' is."""
    count = int(group_B.max()) + 1
    if spread == 0:
        return _worth(np.bincount(group_B, w_B, count))
    totals_G = np.bincount(group_B, w_B * deviations_B, count)
    variance = count / (count - 1) * float(np.sum(totals_G**2)) / float(np.sum(w_B)) ** 2
    widening = t_quantile(confidence, freedom(group_B, w_B)) / normal_quantile(confidence)
    return spread / (variance * widening**2) if variance > 0 else math.inf


# ---------------------------------------------------------------- the bootstrap


def draws(count: int, rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [G, S] of how often each of `count` groups is in each of `samples` samples of as many
    (Efron 1979).

    rows: of the data; a block is small enough to give each of them a weight.
    """
    block = max(1, _BLOCK // max(count, rows))
    if (
        samples * count <= _BLOCK
    ):  # what is drawn again and again, such as for every measure of an evaluation
        whole_GS = _counts(count, samples, seed)
        yield from (whole_GS[:, start : start + block] for start in range(0, samples, block))
        return
    generator = np.random.default_rng(seed)
    for done in range(0, samples, block):
        yield _counted(generator, count, min(block, samples - done))


@functools.lru_cache(maxsize=4)
def _counts(count: int, samples: int, seed: int) -> np.ndarray:
    found = _counted(np.random.default_rng(seed), count, samples)
    found.setflags(write=False)
    return found


def _counted(generator: np.random.Generator, count: int, samples: int) -> np.ndarray:
    """[count, samples] float64: how often each of `count` is in each sample of as many."""
    places = samples * generator.integers(0, count, (samples, count)) + np.arange(samples)[:, None]
    return (
        np.bincount(places.ravel(), minlength=samples * count)
        .reshape(count, samples)
        .astype(np.float64)
    )


def percentiles(values: np.ndarray, degrees: int, confidence: float) -> tuple[float, float]:
    """The interval that the bootstrap's values give, with percentiles for so many degrees of
    freedom.

    The lower one is Phi(-t sqrt((v + 1) / v)) with Student's t of v degrees, in the place of
    Phi(-z): for a mean of v + 1 rows that is the t interval's width (Hesterberg 2015, 5.3).
    """
    t = t_quantile(confidence, degrees)
    outside = statistics.NormalDist().cdf(-t * math.sqrt((degrees + 1) / degrees))
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    groups: Groups = None,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic of n rows with a percentile interval over samples of whole groups; one seed, one
    answer.

    Args:
        statistic: (weights [n, S]) -> [S]: the statistic with row i counted weights[i, s] times (0,
            1, 2, ...),
            NaN where it is not defined. Such samples are left out; where they are more than a
            tenth, the interval's ends are None.

    Where every sample gives the same value the interval has no width.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    normal_quantile(confidence)  # for its check
    group_B, count = group_numbers(groups, n)
    value = float(statistic(np.ones((n, 1)))[0])
    if count == 1:
        return Estimate(value, None, None, n, 1)
    values = np.concatenate(
        [statistic(counts_GS[group_B]) for counts_GS in draws(count, n, samples, seed)]
    )
    return _between(value, values, group_B, confidence)


def bootstrap_mean(
    x: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """`bootstrap` of the mean of all rows, from the groups' sums and sizes."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    normal_quantile(confidence)  # for its check
    x_B = vector("x", x)
    n, mean = x_B.size, float(x_B.mean())
    group_B, count = group_numbers(groups, n)
    if count == 1:
        return Estimate(mean, None, None, n, 1)
    # Deviations: a sample in which nothing differs gives the mean exactly.
    sums_G, sizes_G = (
        np.bincount(group_B, x_B - mean, count),
        np.bincount(group_B, minlength=count).astype(np.float64),
    )
    values = np.concatenate(
        [
            mean + sums_G @ counts_GS / (sizes_G @ counts_GS)
            for counts_GS in draws(count, count, samples, seed)
        ]
    )
    return _between(mean, values, group_B, confidence)


def paired_bootstrap(
    a: Array | Sequence[float],
    b: Array | Sequence[float],
    groups: Groups = None,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean of a - b by `bootstrap_mean`: rows are drawn together, so what a and b share (the
    prompt) cancels.

    With outcomes in {0, 0.5, 1} ties count half.
    """
    a_B, b_B = paired(("a", a), ("b", b))
    return bootstrap_mean(a_B - b_B, groups, samples, seed, confidence)


def _between(value: float, values: np.ndarray, group_B: np.ndarray, confidence: float) -> Estimate:
    n, count = len(group_B), int(group_B.max()) + 1
    defined = values[~np.isnan(values)]
    if len(defined) < (1 - _MOST_UNDEFINED) * len(values):
        return Estimate(value, None, None, n, count)
    return Estimate(value, *percentiles(defined, freedom(group_B), confidence), n, count)
