"""Intervals: by hand, against SciPy, and how often they cover the truth where rows come in
groups.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from perl_jax.evaluation import calibration, intervals, resampling
from perl_jax.evaluation import statistics as statistics_lib
from perl_jax.evaluation.intervals import Estimate

NOISE = np.random.default_rng(7)
PHI = statistics.NormalDist().cdf


class TestRowsOfTheirOwn:
    def test_wilson_by_hand(self):
        # Published worked example: 5 of 10 at 95 %.
        found = intervals.wilson(5, 10)
        assert (found.low, found.high) == pytest.approx((0.236593, 0.763407), abs=1e-6)

    def test_wilson_formula_at_the_edge(self):
        z2 = 1.959963984540054**2
        found = intervals.wilson(0, 20)
        assert (found.low, found.high) == (0.0, pytest.approx(z2 / (20 + z2)))
        assert intervals.wilson(20, 20).high == 1.0

    def test_wilson_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        expected = stats.binomtest(37, 120).proportion_ci(0.9, method="wilson")
        found = intervals.wilson(37, 120, confidence=0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)

    def test_t_quantile_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for freedom in (1, 2, 3, 4, 5, 9, 29, 300):
            expected = stats.t.ppf(0.975, freedom)
            assert intervals.t_quantile(0.95, freedom) == pytest.approx(expected, rel=3e-3)

    def test_mean_ci_by_hand(self):
        # mean 3, s = sqrt(2.5), n = 5, t(4) = 2.776445
        found = intervals.mean_ci([1, 2, 3, 4, 5])
        half = 2.776445 * math.sqrt(2.5 / 5)
        assert (found.value, found.n, found.groups) == (3.0, 5, 5)
        assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=2e-3)

    def test_one_value_has_no_interval(self):
        assert intervals.mean_ci([2.0]) == Estimate(2.0, None, None, 1, 1)
        assert resampling.paired_bootstrap([2.0], [1.0]).low is None

    def test_bootstrap_is_paired_and_seeded(self):
        prompt = NOISE.normal(0, 100, 400)  # shared by both, far larger than the difference
        a, b = prompt + 1 + NOISE.normal(0, 0.5, 400), prompt
        found = resampling.paired_bootstrap(a, b, seed=3)
        assert found == resampling.paired_bootstrap(a, b, seed=3)
        assert found != resampling.paired_bootstrap(a, b, seed=4)
        normal = intervals.mean_ci(a - b)
        assert found.value == pytest.approx(np.mean(a - b))
        assert (found.low, found.high) == pytest.approx((normal.low, normal.high), abs=0.01)

    def test_bootstrap_of_equal_rows_is_exact(self):
        found = resampling.paired_bootstrap(np.full(7, 2.0), np.full(7, 0.5))
        assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)

    def test_the_bootstrap_of_a_mean_is_that_of_any_statistic(self):
        """By group totals, and by rows' weights, which the statistic itself adds up: the same
        samples.
        """
        x_B, groups = NOISE.normal(size=60), NOISE.integers(0, 12, 60)
        general = resampling.bootstrap(
            lambda weights_BS: x_B @ weights_BS / weights_BS.sum(axis=0), 60, groups
        )
        assert dataclasses.astuple(resampling.bootstrap_mean(x_B, groups)) == pytest.approx(
            dataclasses.astuple(general)
        )

    def test_percentiles_by_hand(self):
        # Four rows: t(3) = 3.182446 times sqrt(4 / 3) is 3.674772, and Phi(-3.674772) = 0.000119.
        low, high = resampling.percentiles(np.arange(100_001) / 100_000, 3, 0.95)
        assert (low, high) == (pytest.approx(0.000119, abs=3e-6), pytest.approx(1 - low, abs=1e-9))

    @pytest.mark.parametrize("confidence", [0, 1, 95])
    def test_confidence_is_checked(self, confidence):
        for estimate in (intervals.mean_ci, intervals.proportion, resampling.bootstrap_mean):
            with pytest.raises(ValueError, match="confidence"):
                estimate([0.5, 1], confidence=confidence)


class TestGroups:
    def test_the_mean_of_groups_by_hand(self):
        # Groups (1, 2), (6): mean 3; totals of deviations -3 and 3; V = 2 (9 + 9) / 9 = 4; t(1) =
        # 12.7062.
        found = intervals.mean_ci([1, 6, 2], ["a", "b", "a"])
        assert (found.value, found.n, found.groups) == (3.0, 3, 2)
        assert (found.low, found.high) == pytest.approx((3 - 25.4124, 3 + 25.4124), rel=1e-5)

    def test_a_share_of_groups_by_hand(self):
        # Rights 2 of 2, 1 of 2, 0 of 2: p = 1/2, totals of deviations 1, 0, -1, V = (3 / 2) 2 / 36
        # = 1/12. p (1 - p) / V = 3 rows, times (z / t)^2 with t(2) = 4.302653.
        rows = 3 * (1.959964 / 4.302653) ** 2
        found, by_hand = (
            intervals.proportion([1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 3, 3]),
            intervals.wilson(rows / 2, rows),
        )
        assert (found.value, found.n, found.groups) == (0.5, 6, 3)
        assert (found.low, found.high) == (pytest.approx(by_hand.low), pytest.approx(by_hand.high))
        # All right: as sure as (sum W)^2 / sum W^2 = 36 / (16 + 1 + 1) rows.
        found, by_hand = (
            intervals.proportion(np.ones(6), [1, 1, 1, 1, 2, 3]),
            intervals.wilson(2, 2),
        )
        assert (found.low, found.high) == (by_hand.low, 1.0)
        # Groups that differ less than chance would have it are worth no more than their rows.
        found, by_hand = (
            intervals.proportion([1, 0, 1, 0, 1, 0], [1, 1, 2, 2, 3, 3]),
            intervals.wilson(3, 6),
        )
        assert (found.low, found.high) == (by_hand.low, by_hand.high)

    def test_weights_are_of_groups(self):
        """Rankings of 6, 1 and 3 pairs that count as one line each: the interval is that of the
        lines' own means where groups do not differ inside.
        """
        outcomes, groups = np.repeat([1.0, 0.0, 1.0], [6, 1, 3]), np.repeat([0, 1, 2], [6, 1, 3])
        weights = np.repeat([1 / 6, 1.0, 1 / 3], [6, 1, 3])
        found = intervals.proportion(outcomes, groups, weights)
        lines = intervals.proportion([1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2])
        assert found.value == pytest.approx(2 / 3)
        assert (found.low, found.high) == (pytest.approx(lines.low), pytest.approx(lines.high))

    @pytest.mark.parametrize(
        "estimate",
        [
            intervals.mean_ci,
            intervals.proportion,
            resampling.bootstrap_mean,
            lambda x, groups: statistics_lib.auc_estimate(x, LABELS[: len(x)], groups),
            lambda x, groups: statistics_lib.balanced_accuracy_estimate(
                x, LABELS[: len(x)], 0.5, groups
            ),
            lambda x, groups: statistics_lib.correlation_estimate(x, LABELS[: len(x)], groups),
            lambda x, groups: calibration.reliability(x, LABELS[: len(x)], 1, groups)[0],
            lambda x, groups: statistics_lib.both_orders(x > 0.5, x < 0.3, groups),
        ],
    )
    def test_every_row_its_own_group_is_no_group(self, estimate):
        x_B = np.round(NOISE.random(30), 2)
        assert (
            estimate(x_B, None)
            == estimate(x_B, np.arange(30))
            == estimate(x_B, [f"row {i}" for i in range(30)])
        )
        one = dataclasses.asdict(estimate(x_B, ["one"] * 30))
        assert one["groups"] == 1 and None in one.values()

    def test_rows_said_several_times_are_no_more_evidence(self):
        """Every row eight times over, as one group: the interval of mean, AUC and differences
        stays.
        """
        x_B, labels_B = NOISE.normal(size=40), np.arange(40) % 3 == 0
        often = lambda values: np.repeat(values, 8)
        for estimate in (
            intervals.mean_ci,
            resampling.bootstrap_mean,
            lambda x, groups: statistics_lib.auc_estimate(
                x, labels_B if len(x) == 40 else often(labels_B), groups
            ),
        ):
            once, repeated = (
                estimate(x_B, np.arange(40)),
                estimate(often(x_B), often(np.arange(40))),
            )
            assert (repeated.n, repeated.groups) == (320, 40)
            assert (repeated.value, repeated.low, repeated.high) == pytest.approx(
                (once.value, once.low, once.high)
            )

    def test_a_few_large_groups_decide(self):
        """Two groups of 50 rows and ten of one: (110)^2 / (2 2500 + 10) = 2.4 groups of one size,
        so one degree of freedom.
        """
        groups = np.concatenate([np.repeat([0, 1], 50), np.arange(2, 12)])
        assert intervals.freedom(groups) == 1 and intervals.freedom(np.arange(12)) == 11
        # As a ranking's weights do: 30 of 1/3 each, three a group.
        assert intervals.freedom(np.repeat(np.arange(10), 3), np.full(30, 1 / 3)) == 9
        x_B = NOISE.normal(size=110)
        found = intervals.mean_ci(x_B, groups)
        totals = np.bincount(groups, x_B - x_B.mean())
        assert found.high - found.value == pytest.approx(
            12.7062 * math.sqrt(12 / 11 * np.sum(totals**2)) / 110, rel=1e-5
        )

    def test_samples_without_a_class(self):
        """Positives in one group of five: a third of the samples has none. In four of five it is
        left out.
        """
        labels, groups = np.repeat([1, 0, 0, 0, 0], 4), np.repeat(np.arange(5), 4)
        scores = NOISE.normal(size=20)
        found = statistics_lib.auc_estimate(scores, labels, groups)
        assert (
            found.value == statistics_lib.auc(scores, labels)
            and found.low is None
            and (found.n, found.groups) == (20, 5)
        )
        found = statistics_lib.auc_estimate(scores, np.tile([1, 0, 0, 0], 5), groups)
        assert found.low < found.value < found.high

    def test_no_interval_where_every_sample_agrees(self):
        found = statistics_lib.auc_estimate([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
        assert (found.value, found.low, found.high) == (1.0, None, None)

    def test_groups_are_of_the_rows(self):
        with pytest.raises(ValueError, match="groups has 2 values but there are 3 rows"):
            intervals.mean_ci([1, 2, 3], [0, 1])


LABELS = np.arange(60) % 3 == 0


# ------------------------------------------------------------------------------ coverage


@dataclasses.dataclass(frozen=True)
class Study:
    """Grouped data with a known truth.

    make(random, groups) -> (arguments, the group of each row); measure(*arguments, groups=...) ->
    the interval. most_by_row: what the interval that takes rows for independent covers at most.
    """

    make: Callable
    measure: Callable
    truth: float
    most_by_row: float


def dialogues(random: np.random.Generator, count: int) -> np.ndarray:
    """The dialogue of each turn: 1 to 12 turns in each."""
    return np.repeat(np.arange(count), random.integers(1, 13, count))


def rankings(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """Scores of the better and the worse response of every pair of rankings of 2 to 6; some prompts
    are hard.

    Quality and score of a response correlate by rho; P(a pair is in order) = 1/2 + asin(rho) / pi
    (Sheppard 1899).
    """
    prompt, size = np.arange(count), random.integers(2, 7, count)
    rho = np.where(random.random(count) < 0.5, 0.95, 0.1)[:, None]
    quality, noise = random.normal(size=(2, count, 6))
    score = rho * quality + np.sqrt(1 - rho**2) * noise
    first, second = np.triu_indices(6, 1)
    better = np.where(quality[:, first] > quality[:, second], first, second)
    chosen, rejected = (
        np.take_along_axis(score, side, axis=1) for side in (better, first + second - better)
    )
    there = second < size[:, None]
    weights = np.broadcast_to(2 / (size * (size - 1))[:, None], there.shape)
    return (chosen[there], rejected[there], weights[there]), np.broadcast_to(
        prompt[:, None], there.shape
    )[there]


def turns(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """(scores, labels): good and bad dialogues, of which some get high scores."""
    group = dialogues(random, count)
    mood, level = random.normal(size=(2, count))
    labels = mood[group] + random.normal(size=len(group)) > 0.3
    return (labels + 0.8 * level[group] + 0.8 * random.normal(size=len(group)), labels), group


def two_scorers(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """(scores, others, labels): the others are as good, and as much the dialogue's."""
    (scores, labels), group = turns(random, count)
    return (
        scores,
        labels + 0.8 * random.normal(size=count)[group] + 0.8 * random.normal(size=len(group)),
        labels,
    ), group


def rated(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """(scores, ratings) that correlate by 0.5 because of their dialogues and of their turns."""
    group = dialogues(random, count)
    mood, level = random.normal(size=(2, count))
    ratings = mood[group] + 0.5 * random.normal(size=len(group))
    return (
        ratings + math.sqrt(3) * (level[group] + 0.5 * random.normal(size=len(group))),
        ratings,
    ), group


def outcomes(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """(policy, baseline): scores of 1 to 12 responses to each prompt, better by 0.3 on average; 2
    variances of the prompt, 1 of the response.
    """
    group = dialogues(random, count)
    prompt, gain = random.normal(size=(2, count))
    return (
        5 * prompt[group] + 0.3 + math.sqrt(2) * gain[group] + random.normal(size=len(group)),
        5 * prompt[group],
    ), group


def stated(random: np.random.Generator, count: int) -> tuple[tuple, np.ndarray]:
    """(probabilities, labels): right on average, but not in every dialogue. p = Phi(x) = P(z + e >
    -sqrt(2) x).
    """
    group = dialogues(random, count)
    p = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    lean = math.sqrt(2) * np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    which = random.integers(0, 5, len(group))
    return (
        p[which],
        (
            lean[which] + random.normal(size=count)[group] + random.normal(size=len(group)) > 0
        ).astype(float),
    ), group


def upper_bin(p, labels, groups):
    """The interval of the labels' mean where 0.6 <= p < 0.8."""
    found = calibration.reliability(p, labels, 5, groups)[3]
    return Estimate(found.observed, found.observed_low, found.observed_high, found.n)


def win_rate(a, b, groups):
    """Of A over B, less than 0.5 apart a tie."""
    found = statistics_lib.win_rate(a, b, 0.5, groups)
    return Estimate(found.rate, found.low, found.high, found.groups)


# Bootstrap samples of one interval: the coverage has the noise of as few repetitions anyway.
SAMPLES = 300
IN_ORDER = 0.5 + (math.asin(0.95) + math.asin(0.1)) / (2 * math.pi)
STUDIES = {
    "pairs of rankings": Study(
        rankings,
        lambda a, b, w, groups: statistics_lib.pairwise_accuracy(a, b, groups=groups),
        IN_ORDER,
        0.85,
    ),
    # Weights that add up to 1 a ranking are worth fewer rows by themselves.
    "weighted pairs": Study(rankings, statistics_lib.pairwise_accuracy, IN_ORDER, 0.93),
    "win rate": Study(
        outcomes, win_rate, (PHI(-0.2 / math.sqrt(3)) + PHI(0.8 / math.sqrt(3))) / 2, 0.75
    ),
    "gain": Study(
        outcomes, lambda a, b, groups: resampling.paired_bootstrap(a, b, groups, SAMPLES), 0.3, 0.75
    ),
    "mean": Study(outcomes, lambda a, b, groups: intervals.mean_ci(a, groups), 0.3, 0.6),
    "reliability bin": Study(stated, upper_bin, 0.7, 0.93),
    "AUC": Study(
        turns,
        lambda s, y, groups: statistics_lib.auc_estimate(s, y, groups, SAMPLES),
        PHI(1 / math.sqrt(2 * 1.28)),
        0.88,
    ),
    "AUC difference": Study(
        two_scorers,
        lambda s, o, y, groups: statistics_lib.auc_difference(s, o, y, groups, SAMPLES),
        0.0,
        0.88,
    ),
    "balanced accuracy": Study(
        turns,
        lambda s, y, groups: statistics_lib.balanced_accuracy_estimate(s, y, 0.5, groups, SAMPLES),
        PHI(0.5 / math.sqrt(1.28)),
        0.9,
    ),
    "correlation": Study(
        rated,
        lambda s, y, groups: statistics_lib.correlation_estimate(s, y, groups, SAMPLES),
        0.5,
        0.75,
    ),
}


def coverage(study: Study, groups: int, repetitions: int, seed: int) -> tuple[float, float]:
    """How often the interval over groups holds the truth, and, in every fourth repetition, the one
    over rows.
    """
    random = np.random.default_rng(seed)
    covered = np.zeros(2)
    for repetition in range(repetitions):
        arguments, group_B = study.make(random, groups)
        for place, given in enumerate((group_B, None) if repetition % 4 == 0 else (group_B,)):
            found = study.measure(*arguments, groups=given)
            covered[place] += found.low is not None and found.low <= study.truth <= found.high
    by_groups, by_rows = covered / (repetitions, -(-repetitions // 4))
    return float(by_groups), float(by_rows)


def error(repetitions: int) -> float:
    """Three standard errors of a coverage of 0.95."""
    return 3 * math.sqrt(0.95 * 0.05 / repetitions)


@pytest.mark.parametrize(
    "name", ["pairs of rankings", "win rate", "gain", "mean", "reliability bin", "AUC"]
)
def test_95_per_cent_of_intervals_over_groups_hold_the_truth(name):
    by_groups, by_rows = coverage(STUDIES[name], groups=20, repetitions=400, seed=1)
    assert abs(by_groups - 0.95) <= 0.01 + error(400), (by_groups, by_rows)
    assert by_rows <= STUDIES[name].most_by_row < by_groups, (by_groups, by_rows)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [8, 40])
@pytest.mark.parametrize("name", STUDIES)
def test_coverage_with_few_groups_and_with_many(name, groups):
    by_groups, by_rows = coverage(STUDIES[name], groups, repetitions=1000, seed=2)
    assert abs(by_groups - 0.95) <= (0.02 if groups == 8 else 0.01) + error(1000), (
        by_groups,
        by_rows,
    )
    assert by_rows <= STUDIES[name].most_by_row < by_groups, (by_groups, by_rows)
