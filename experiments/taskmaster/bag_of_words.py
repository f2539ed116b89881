"""The baseline a reward model has to beat: logistic regression on words and word pairs.
`run.py` imports it.

Features: tf-idf of unigrams and bigrams, (1 + log tf) (log((1 + n) / (1 + df)) + 1), rows scaled to
length 1. Loss: mean cross-entropy + |w|^2 / (2 n C), C chosen by AUC on validation rows.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from perl_jax.evaluation import calibration, statistics

STRENGTHS = (0.1, 1.0, 10.0, 100.0)


def terms(text: str) -> list[str]:
    """Lower-case words and pairs of neighbouring words."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


class TfIdf:
    """The vocabulary and document frequencies of the training texts."""

    def __init__(self, texts: Sequence[str]):
        frequency = collections.Counter(term for text in texts for term in set(terms(text)))
        self.columns = {term: i for i, term in enumerate(sorted(frequency))}
        counts = np.asarray([frequency[term] for term in self.columns], np.float64)
        self.weights = np.log((1 + len(texts)) / (1 + counts)) + 1

    def matrix(self, texts: Iterable[str]) -> scipy.sparse.csr_matrix:
        """One row a text; terms not seen in training are left out."""
        data, columns, starts = [], [], [0]
        for text in texts:
            counts = collections.Counter(
                self.columns[term] for term in terms(text) if term in self.columns
            )
            values = np.asarray([(1 + math.log(n)) * self.weights[c] for c, n in counts.items()])
            norm = float(np.linalg.norm(values)) or 1.0
            data.append(values / norm)
            columns.append(np.fromiter(counts, np.int64, len(counts)))
            starts.append(starts[-1] + len(counts))
        flat = lambda parts: np.concatenate(parts) if parts else np.zeros(0)
        return scipy.sparse.csr_matrix(
            (flat(data), flat(columns), starts), shape=(len(starts) - 1, len(self.columns))
        )


def fit(features: scipy.sparse.csr_matrix, labels: np.ndarray, strength: float) -> np.ndarray:
    """Weights, the intercept last (it is not penalised)."""
    rows, size = features.shape

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ weights[:-1] + weights[-1]
        probabilities = calibration.sigmoid(logits)
        loss = np.mean(np.logaddexp(0, logits) - labels * logits) + weights[:-1] @ weights[:-1] / (
            2 * rows * strength
        )
        error = (probabilities - labels) / rows
        return loss, np.append(features.T @ error + weights[:-1] / (rows * strength), error.sum())

    return scipy.optimize.minimize(objective, np.zeros(size + 1), jac=True, method="L-BFGS-B").x


def baseline(
    train: Sequence[str],
    train_labels: Sequence[float],
    validation: Sequence[str],
    validation_labels: Sequence[float],
    test: Sequence[str],
    test_labels: Sequence[float],
) -> tuple[dict[str, float], np.ndarray]:
    """AUC and balanced accuracy on test rows, and the rows' scores; C and the threshold are chosen
    on validation rows."""
    vectors = TfIdf(train)
    sides = [vectors.matrix(texts) for texts in (train, validation, test)]
    best: tuple[float, float, np.ndarray] | None = None
    for strength in STRENGTHS:
        weights = fit(sides[0], np.asarray(train_labels), strength)
        area = statistics.auc(sides[1] @ weights[:-1] + weights[-1], validation_labels)
        if best is None or area > best[0]:
            best = (area, strength, weights)
    _, strength, weights = best
    scores = [side @ weights[:-1] + weights[-1] for side in sides]
    threshold = statistics.best_threshold(scores[1], validation_labels)
    results = {
        "auc": statistics.auc(scores[2], test_labels),
        "balanced_accuracy": statistics.balanced_accuracy(scores[2], test_labels, threshold),
        "strength": strength,
    }
    return results, scores[2]
