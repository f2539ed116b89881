"""Reads what scores are compared with: labels, ratings, weights of pairs.

Each function raises UserError for rows on which no measure is defined. Its arguments `task` and
`split` name the rows in messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perl_jax import errors
from perl_jax.data.pipeline import Batches


def both_classes(rows: Any, task: str, split: str) -> np.ndarray:
    """Returns the rows' labels [n], each in [0, 1].

    Args:
        rows: Rows of the kind labels.
        task: The task's name, for messages.
        split: The rows' split, for messages.

    Raises:
        UserError: All labels are above 0.5, or none is: AUC and balanced accuracy need both
            classes.
    """
    labels = np.asarray([row["label"] for row in rows])
    errors.require(
        bool((labels > 0.5).any() and (labels <= 0.5).any()),
        f"The {split} split of {task} has labels of one class only; it needs rows with label 0 "
        "and rows with label 1.",
    )
    return labels


def pair_weights(rows: Any, task: str, split: str) -> np.ndarray:
    """Returns the weights of comparisons, float64 [n].

    The weights of one ranking's pairs add up to the weight of its line.

    Args:
        rows: Rows of the kind comparisons.
        task: The task's name, for messages.
        split: The rows' split, for messages.

    Raises:
        UserError: No pair with different responses has a weight above 0.
    """
    weights = np.asarray([row["weight"] for row in rows], np.float64)
    counts = any(row["weight"] > 0 and row["chosen"] != row["rejected"] for row in rows)
    errors.require(
        counts,
        f"Every comparison of the {split} split of {task} has weight 0 or two equal responses; "
        "some must count.",
    )
    return weights


def differing_weights(rows: Any, task: str, split: str, batches: Batches) -> np.ndarray:
    """Returns the weights of comparisons, float64 [n], with 0 for pairs whose responses are equal
    after cutting.

    Such a pair has no right order.

    Args:
        rows: Rows of the kind comparisons.
        task: The task's name, for messages.
        split: The rows' split, for messages.
        batches: The batches of the same rows; gives the responses after cutting.

    Raises:
        UserError: No weight is above 0.
    """
    weights = pair_weights(rows, task, split) * batches.rows.different
    errors.require(
        bool(weights.any()),
        f"Every comparison of the {split} split of {task} has weight 0, or two responses that are "
        "equal as they were cut; some must count.",
    )
    return weights


def check_pairs(soft: str | None, rows: Any, task: str, split: str) -> None:
    """Raises UserError if no comparison has a weight above 0, or if a split for soft labels has no
    probability.

    Args:
        soft: The split whose probabilities are used as soft labels, of which at least one must be
            known; None: no split's.
        rows: Rows of the kind comparisons.
        task: The task's name, for messages.
        split: The split of the rows.
    """
    pair_weights(rows, task, split)
    known = split != soft or bool(np.isfinite([row["probability"] for row in rows]).any())
    errors.require(
        known,
        f"soft_labels is for comparisons with a probability; none of the {split} split of {task} "
        "has one: leave it out.",
    )


def ratings(rows: Any, task: str, split: str) -> np.ndarray:
    """Returns the rows' ratings [n].

    Args:
        rows: Rows of the kind ratings.
        task: The task's name, for messages.
        split: The rows' split, for messages.

    Raises:
        UserError: All ratings are equal: a correlation needs different ones.
    """
    found = np.asarray([row["rating"] for row in rows])
    errors.require(
        len(np.unique(found)) > 1,
        f"The {split} split of {task} has one rating only, {found[0]}; it needs different ones.",
    )
    return found
