"""Calibration of reward models: reliability tables, calibration error, Brier score, log loss.

All arithmetic is float64. Labels may be soft (probabilities). Probabilities and labels outside [0,
1], not finite or of different lengths raise ValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from perl_jax.evaluation.intervals import (
    Groups,
    group_numbers,
    paired,
    proportion,
)
from perl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin [low, high) of a reliability table.

    Attributes:
        low: The bin's lower edge.
        high: The bin's upper edge.
        predicted: The mean predicted probability of the bin's rows.
        observed: The mean label of the bin's rows.
        n: The number of rows.
        observed_low: The lower end of the interval of `observed`; None if all rows are of one
            group.
        observed_high: The upper end, or None.
        groups: The number of groups of rows.
    """

    low: float
    high: float
    predicted: float
    observed: float
    n: int
    observed_low: float | None
    observed_high: float | None
    groups: int


def checked_probabilities(
    probabilities: Array | Sequence[float], labels: Array | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (probabilities, labels) as float64 vectors.

    Labels may be soft. Raises ValueError unless all values lie in [0, 1] and the lengths are equal.
    """
    p_B, y_B = paired(("probabilities", probabilities), ("labels", labels))
    for name, values in (("probabilities", p_B), ("labels", y_B)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name} must lie in [0, 1], not [{values.min()}, {values.max()}]")
    return p_B, y_B


def sigmoid(x: Array | Sequence[float]) -> np.ndarray:
    """Returns 1 / (1 + exp(-x)) in float64, without overflow."""
    values = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def preference_probabilities(
    chosen: Array | Sequence[float], rejected: Array | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (probabilities, labels), each [2 n]: first every pair as (chosen, rejected) with
    label 1, then every pair as (rejected, chosen) with label 0.

    The probability is Bradley-Terry's, P(first is preferred) = sigmoid(r_first - r_second). With
    one order alone all labels would be 1, and calibration could not be measured.

    Args:
        chosen: The scores [n] of the chosen responses.
        rejected: The scores [n] of the rejected responses.
    """
    chosen_B, rejected_B = paired(("chosen", chosen), ("rejected", rejected))
    p_B = sigmoid(chosen_B - rejected_B)
    return np.concatenate([p_B, 1 - p_B]), np.concatenate([np.ones_like(p_B), np.zeros_like(p_B)])


def brier(probabilities: Array | Sequence[float], labels: Array | Sequence[float]) -> float:
    """Returns the Brier score, the mean of (p - y)^2 over rows (Brier 1950).

    Args:
        probabilities: p, one per row.
        labels: y, one per row; may be soft.
    """
    p_B, y_B = checked_probabilities(probabilities, labels)
    return float(np.mean((p_B - y_B) ** 2))


def log_loss(
    probabilities: Array | Sequence[float],
    labels: Array | Sequence[float],
    epsilon: float = 1e-12,
) -> float:
    """Returns the mean over rows of -(y log p + (1 - y) log(1 - p)), in nats.

    Args:
        probabilities: p, one per row.
        labels: y, one per row; may be soft.
        epsilon: p is clipped to [epsilon, 1 - epsilon].
    """
    p_B, y_B = checked_probabilities(probabilities, labels)
    p_B = np.clip(p_B, epsilon, 1 - epsilon)
    return float(-np.mean(y_B * np.log(p_B) + (1 - y_B) * np.log1p(-p_B)))


def reliability(
    probabilities: Array | Sequence[float],
    labels: Array | Sequence[float],
    bins: int = 10,
    groups: Groups = None,
) -> list[Bin]:
    """Returns the reliability table: mean prediction and mean label in equal-width bins of [0, 1].

    Bin i is [i / bins, (i + 1) / bins); the last bin includes 1. Empty bins are left out. The
    interval of a mean label is that of `intervals.proportion`. Raises ValueError if `bins` is below
    1.

    Args:
        probabilities: The predicted probability of each row.
        labels: The label of each row; may be soft.
        bins: The number of bins.
        groups: The group of each row; None if all rows are independent.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    p_B, y_B = checked_probabilities(probabilities, labels)
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
                    len(set(group_B[inside_B].tolist())),
                )
            )
    return table


def expected_calibration_error(table: Sequence[Bin]) -> float:
    """Returns the sum over bins of n / N |predicted - observed| (Naeini et al. 2015), where N is
    the number of all rows.

    The error has no interval: noise in the bins only increases it, and increases it more in
    bootstrap samples, so their percentiles would not lie around the error. The bins themselves have
    intervals.

    Raises ValueError if the table is empty.

    Args:
        table: The bins of `reliability`.
    """
    total = sum(row.n for row in table)
    if not total:
        raise ValueError("the reliability table is empty")
    return sum(row.n * abs(row.predicted - row.observed) for row in table) / total
