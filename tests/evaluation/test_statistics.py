"""Measures against numbers worked out by hand, and scikit-learn and SciPy where installed."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest

from perl_jax.evaluation import calibration, intervals, resampling, statistics
from perl_jax.evaluation.calibration import Bin
from perl_jax.evaluation.statistics import WinRate

NOISE = np.random.default_rng(7)
SCORES = np.round(NOISE.normal(size=301), 1)  # rounded: many ties
LABELS = (SCORES + NOISE.normal(size=301) > 0.6).astype(int)
PROBABILITIES = calibration.sigmoid(SCORES)


class TestPairwise:
    def test_ties_count_half(self):
        found = statistics.pairwise_accuracy([1, 2, 3, 4], [0, 2, 4, 1])
        assert found.value == 2.5 / 4
        assert found.n == 4

    def test_constant_model_gets_a_half(self):
        assert statistics.pairwise_accuracy(np.zeros(9), np.zeros(9)).value == 0.5

    def test_margin(self):
        outcomes = statistics.compare([1.0, 1.2, 1.0], [1.1, 1.0, 2.0], tie_margin=0.15)
        np.testing.assert_array_equal(outcomes, [0.5, 1, 0])

    def test_float32_scores_are_compared_as_they_are(self):
        close = np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)
        np.testing.assert_array_equal(statistics.compare(close, close[::-1]), [0, 1])

    @pytest.mark.parametrize("bad", [[math.nan, 1], [math.inf, 1], [1], [], [[1, 2]]])
    def test_bad_input_is_refused(self, bad):
        with pytest.raises(ValueError, match="score_"):
            statistics.pairwise_accuracy(bad, [0, 0])


class TestClassifier:
    def test_auc_by_hand(self):
        # Pairs (positive, negative): 3>1, 3>2, 2>1 win and 2=2 ties: 3.5 of 4.
        assert statistics.auc([1, 2, 2, 3], [0, 0, 1, 1]) == 3.5 / 4

    def test_auc_is_the_share_of_pairs(self):
        up, down = SCORES[LABELS == 1], SCORES[LABELS == 0]
        difference = up[:, None] - down[None, :]
        slow = ((difference > 0) + 0.5 * (difference == 0)).mean()
        assert statistics.auc(SCORES, LABELS) == pytest.approx(slow, abs=1e-12)

    @pytest.mark.parametrize("labels", [[1, 1], [0, 0], [0, 0.5]])
    def test_labels_without_two_classes_are_refused(self, labels):
        with pytest.raises(ValueError, match="labels"):
            statistics.auc([1, 2], labels)

    def test_balanced_accuracy_by_hand(self):
        # Of 3 positives 2 are called, of 1 negative 0: (2/3 + 1) / 2. At the threshold is a yes.
        assert statistics.balanced_accuracy([1, 2, 0, 0], [1, 1, 1, 0], 1) == pytest.approx(5 / 6)

    def test_balanced_accuracy_of_a_constant_answer(self):
        assert statistics.balanced_accuracy(np.ones(10), [1] * 9 + [0], 0.0) == 0.5

    def test_best_threshold_lies_midway(self):
        assert statistics.best_threshold([0.0, 1.0, 3.0, 4.0], [0, 0, 1, 1]) == 2.0

    def test_best_threshold_of_neighbouring_floats(self):
        low = 1.0
        high = math.nextafter(low, 2)
        threshold = statistics.best_threshold([low, high], [0, 1])
        assert statistics.balanced_accuracy([low, high], [0, 1], threshold) == 1.0

    def test_best_threshold_of_a_useless_score(self):
        threshold = statistics.best_threshold([1, 1, 2, 2], [0, 1, 0, 1])
        assert threshold == 1.0

    def test_best_threshold_beats_every_other(self):
        best = statistics.best_threshold(SCORES, LABELS)
        tried = [statistics.balanced_accuracy(SCORES, LABELS, t) for t in np.arange(-4, 4, 0.05)]
        assert statistics.balanced_accuracy(SCORES, LABELS, best) >= max(tried) - 1e-12

    def test_against_sklearn(self):
        sklearn = pytest.importorskip("sklearn.metrics")
        assert statistics.auc(SCORES, LABELS) == pytest.approx(
            sklearn.roc_auc_score(LABELS, SCORES), abs=1e-12
        )
        assert statistics.balanced_accuracy(SCORES, LABELS, 0.3) == pytest.approx(
            sklearn.balanced_accuracy_score(LABELS, SCORES >= 0.3), abs=1e-12
        )
        assert calibration.brier(PROBABILITIES, LABELS) == pytest.approx(
            sklearn.brier_score_loss(LABELS, PROBABILITIES), abs=1e-12
        )
        assert calibration.log_loss(PROBABILITIES, LABELS) == pytest.approx(
            sklearn.log_loss(LABELS, PROBABILITIES), abs=1e-12
        )


class TestEstimates:
    """Values are those of the measures without an interval, with ties among the scores, and samples
    are what the measures make of drawn rows.
    """

    GROUPS = np.arange(301) // 7
    MEASURES: ClassVar = {
        "auc": (statistics.auc, statistics.auc_estimate),
        "balanced accuracy": (
            lambda s, y: statistics.balanced_accuracy(s, y, 0.3),
            lambda s, y, *more: statistics.balanced_accuracy_estimate(s, y, 0.3, *more),
        ),
        "correlation": (statistics.correlation, statistics.correlation_estimate),
    }

    @pytest.mark.parametrize("name", ["auc", "balanced accuracy", "correlation"])
    def test_samples_are_drawn_groups(self, name):
        plain, estimate = self.MEASURES[name]
        found = estimate(SCORES, LABELS, self.GROUPS, 50)
        counts_GS = np.concatenate(list(resampling.draws(43, 301, 50, 0)), axis=1)
        rows = [
            np.repeat(np.arange(301), counts.astype(int)[self.GROUPS]) for counts in counts_GS.T
        ]
        slow = [plain(SCORES[drawn], LABELS[drawn]) for drawn in rows]
        expected = resampling.percentiles(np.asarray(slow), 42, 0.95)
        assert found.value == pytest.approx(plain(SCORES, LABELS), abs=1e-12)
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-12) and (
            found.n,
            found.groups,
        ) == (301, 43)

    def test_a_difference_draws_the_same_groups_for_both(self):
        others = SCORES + np.random.default_rng(1).normal(size=301)
        found = statistics.auc_difference(SCORES, others, LABELS, self.GROUPS)
        assert found.value == pytest.approx(
            statistics.auc(SCORES, LABELS) - statistics.auc(others, LABELS), abs=1e-12
        )
        assert found.low < found.value < found.high
        same = statistics.auc_difference(SCORES, 2 * SCORES, LABELS, self.GROUPS)
        assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


class TestCalibration:
    def test_sigmoid_does_not_overflow(self):
        np.testing.assert_allclose(calibration.sigmoid([-800, 0, 800]), [0, 0.5, 1])
        np.testing.assert_allclose(calibration.sigmoid([math.log(3)]), [0.75])

    def test_brier_and_log_loss_by_hand(self):
        assert calibration.brier([0.75, 0.5], [1, 0]) == (0.0625 + 0.25) / 2
        expected = -(math.log(0.75) + math.log(0.5)) / 2
        assert calibration.log_loss([0.75, 0.5], [1, 0]) == pytest.approx(expected)
        assert calibration.log_loss([0.0], [1], epsilon=1e-3) == pytest.approx(-math.log(1e-3))

    def test_reliability_by_hand(self):
        table = calibration.reliability([0.0, 0.1, 0.5, 0.9, 1.0], [0, 1, 1, 1, 1], bins=2)
        half, all_right = intervals.wilson(1, 2), intervals.wilson(3, 3)
        assert table == [
            Bin(0.0, 0.5, 0.05, 0.5, 2, half.low, half.high, 2),
            Bin(0.5, 1.0, pytest.approx(0.8), 1.0, 3, all_right.low, 1.0, 3),
        ]
        # (2 |0.05 - 0.5| + 3 |0.8 - 1|) / 5
        assert calibration.expected_calibration_error(table) == pytest.approx(0.3)

    def test_empty_bins_are_left_out(self):
        table = calibration.reliability([0.05, 0.95], [0, 1])
        assert [row.n for row in table] == [1, 1]

    def test_preferences_are_asked_in_both_orders(self):
        p, labels = calibration.preference_probabilities([math.log(3)], [0.0])
        np.testing.assert_allclose(p, [0.75, 0.25])
        np.testing.assert_array_equal(labels, [1, 0])

    @pytest.mark.parametrize("p", [[-0.1], [1.1]])
    def test_probabilities_are_checked(self, p):
        with pytest.raises(ValueError, match="probabilities"):
            calibration.brier(p, [1])


class TestPolicies:
    def test_distinct(self):
        responses = [[1, 2, 1, 2], [1, 2]]
        assert statistics.distinct_n(responses, 1) == 2 / 6
        # (1,2) (2,1) (1,2) and (1,2): two of four; no pair crosses the responses.
        assert statistics.distinct_n(responses, 2) == 2 / 4
        assert statistics.distinct_n([[1], []], 2) == 0.0

    def test_win_rate(self):
        found = statistics.win_rate([2, 1, 1, 0], [1, 1, 0, 3])
        assert (found.wins, found.ties, found.losses, found.rate) == (2, 1, 1, 2.5 / 4)

    def test_both_orders(self):
        # Says A twice; B twice; the first both times; the second both times.
        found = statistics.both_orders([True, False, True, False], [False, True, True, False])
        assert isinstance(found, WinRate)
        assert (found.wins, found.ties, found.losses, found.rate) == (1, 2, 1, 0.5)

    def test_weighted_pairs_by_hand(self):
        # Right, wrong, tied with weights 1, 2, 1: 1.5 / 4, as sure as 16 / 6 pairs.
        found = statistics.pairwise_accuracy([2, 0, 1], [1, 1, 1], [1, 2, 1])
        by_hand = intervals.wilson(0.375 * 16 / 6, 16 / 6)
        assert (found.value, found.low, found.high, found.n) == (
            pytest.approx(0.375),
            pytest.approx(by_hand.low),
            pytest.approx(by_hand.high),
            3,
        )
        assert statistics.pairwise_accuracy([2, 0, 1], [1, 1, 1], [5, 5, 5]).low == pytest.approx(
            statistics.pairwise_accuracy([2, 0, 1], [1, 1, 1]).low
        )
        for weights in ([0, 0, 0], [1, -1, 1]):
            with pytest.raises(ValueError, match="weights must be at least 0, and not all 0"):
                statistics.pairwise_accuracy([2, 0, 1], [1, 1, 1], weights)

    def test_a_judge_of_positions_only_ties(self):
        always = np.ones(50, bool)
        assert statistics.both_orders(always, always).ties == 50
