"""What scores are held against: weights of pairs, labels, ratings; refused where nothing can be
measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perl_jax import errors
from perl_jax.data.pipeline import Batches


def both_classes(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' labels, in [0, 1]; AUC and balanced accuracy need some above 0.5 and some below."""
    labels = np.asarray([row["label"] for row in rows])
    errors.require(
        bool((labels > 0.5).any() and (labels <= 0.5).any()),
        f"The {split} split of {task} has labels of one class only; it needs rows with label 0 "
        "and rows with label 1.",
    )
    return labels


def pair_weights(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' weights: the pairs of one ranking count as much as its line says together."""
    weights = np.asarray([row["weight"] for row in rows], np.float64)
    counts = any(row["weight"] > 0 and row["chosen"] != row["rejected"] for row in rows)
    errors.require(
        counts,
        f"Every comparison of the {split} split of {task} has weight 0 or two equal responses; "
        "some must count.",
    )
    return weights


def differing_weights(rows: Any, task: str, split: str, batches: Batches) -> np.ndarray:
    """`pair_weights`, 0 where the two responses are equal as they were cut: those are in no order,
    right or wrong.
    """
    weights = pair_weights(rows, task, split) * ~batches.rows.equal
    errors.require(
        bool(weights.any()),
        f"Every comparison of the {split} split of {task} has weight 0, or two responses that are "
        "equal as they were cut; some must count.",
    )
    return weights


def check_pairs(soft: str | None, rows: Any, task: str, split: str) -> None:
    """UserError for comparisons that weigh nothing, and where in the split `soft`, whose labels are
    to be probabilities, none is known.
    """
    pair_weights(rows, task, split)
    known = split != soft or bool(np.isfinite([row["probability"] for row in rows]).any())
    errors.require(
        known,
        f"soft_labels is for comparisons with a probability; none of the {split} split of {task} "
        "has one: leave it out.",
    )


def ratings(rows: Any, task: str, split: str) -> np.ndarray:
    """The rows' ratings; a correlation needs two different ones."""
    found = np.asarray([row["rating"] for row in rows])
    errors.require(
        len(np.unique(found)) > 1,
        f"The {split} split of {task} has one rating only, {found[0]}; it needs different ones.",
    )
    return found
