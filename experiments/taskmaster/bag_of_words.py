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
    """Returns the lower-case words of a text, followed by the pairs of neighbouring words."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


class TfIdf:
    """Turns texts into tf-idf features.

    Attributes:
        columns: The column of each term of the training texts.
        weights: The inverse document frequency of each column, log((1 + n) / (1 + df)) + 1.
    """

    def __init__(self, texts: Sequence[str]):
        frequency = collections.Counter(term for text in texts for term in set(terms(text)))
        self.columns = {term: i for i, term in enumerate(sorted(frequency))}
        counts = np.asarray([frequency[term] for term in self.columns], np.float64)
        self.weights = np.log((1 + len(texts)) / (1 + counts)) + 1

    def matrix(self, texts: Iterable[str]) -> scipy.sparse.csr_matrix:
        """Returns the features of texts, [texts, terms]; each row has length 1.

        Terms that are not in the training texts are left out. The row of a text that has only such
        terms is 0.
        """
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
    """Returns the weights of a logistic regression, [terms + 1]; the last one is the intercept.

    Minimises mean cross-entropy + |w|^2 / (2 n C) with L-BFGS-B; the intercept is not penalised.

    Args:
        features: The features, [n, terms].
        labels: The labels, each 0 or 1, [n].
        strength: C, the inverse strength of the penalty.
    """
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
    """Returns (results, the scores of the test rows) of a logistic regression on words and word
    pairs.

    The results are `auc` and `balanced_accuracy` on the test rows, and `strength`, the C that is
    used. C is the one of `STRENGTHS` with the best AUC on the validation rows, which also decide
    the threshold of the balanced accuracy.

    Args:
        train: The training texts.
        train_labels: Their labels, 0 or 1.
        validation: The validation texts.
        validation_labels: Their labels.
        test: The test texts.
        test_labels: Their labels.
    """
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
