"""A policy small enough to enumerate: every sequence with its probability, none sampled.

The policy is a table of logits for each prefix, over 3 tokens and 3 steps. Token 2 ends a sequence:
what follows it is padding, and is enumerated too (weighted by the policy that would go on), so
padding that leaked into a loss would show. All in NumPy, float64: expectations by walking the tree
of prefixes, gradients by central differences.
"""

from __future__ import annotations

import itertools

import numpy as np

STEPS, VOCABULARY, EOS = 3, 3, 2
TEMPERATURE = 0.7
PREFIXES = [p for n in range(STEPS) for p in itertools.product(range(VOCABULARY), repeat=n)]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
SEQUENCES = list(itertools.product(range(VOCABULARY), repeat=STEPS))
BETA = 0.3


def response_of(sequence: tuple[int, ...], stops: bool) -> tuple[int, ...]:
    """The tokens up to and including the first eos."""
    if stops and EOS in sequence:
        return sequence[: sequence.index(EOS) + 1]
    return sequence


def score_of(response: tuple[int, ...]) -> float:
    """Any function of the response that no policy could be indifferent to."""
    return float(np.sin(1 + sum((i + 2) ** 2 * (token + 1) for i, token in enumerate(response))))


def softmax(logits_V: np.ndarray) -> np.ndarray:
    weights_V = np.exp((logits_V - logits_V.max()) / TEMPERATURE)
    return weights_V / weights_V.sum()


def walk(theta, stops, visit, prefix=(), probability=1.0):
    """Sum of `visit(response, probability)` over the responses of the tree below `prefix`."""
    if len(prefix) == STEPS or (stops and prefix and prefix[-1] == EOS):
        return visit(prefix, probability)
    p_V = softmax(theta[ROW[prefix]])
    return sum(
        walk(theta, stops, visit, (*prefix, v), probability * p_V[v]) for v in range(VOCABULARY)
    )


def log_probability(theta, response) -> float:
    return sum(np.log(softmax(theta[ROW[response[:t]]])[v]) for t, v in enumerate(response))


def objective(theta, reference, stops, beta=BETA) -> float:
    """E[(1 - beta) r - beta (log pi - log pi_ref)] over whole responses."""

    def visit(response, probability):
        ratio = log_probability(theta, response) - log_probability(reference, response)
        return probability * ((1 - beta) * score_of(response) - beta * ratio)

    return walk(theta, stops, visit)


def divergence_along(theta, reference, stops, visits, direction) -> float:
    """sum over states of (visits to the state, held fixed) times the KL there."""
    total = 0.0
    for prefix in PREFIXES:
        if stops and EOS in prefix:
            continue
        p_V, q_V = softmax(theta[ROW[prefix]]), softmax(reference[ROW[prefix]])
        if direction == "forward":
            p_V, q_V = q_V, p_V
        total += np.exp(log_probability(visits, prefix)) * np.sum(p_V * np.log(p_V / q_V))
    return total


def slopes(function, theta) -> np.ndarray:
    """Central differences by each entry of `theta`."""
    out = np.zeros_like(theta)
    for index in np.ndindex(*theta.shape):
        step = np.zeros_like(theta)
        step[index] = 1e-5
        out[index] = (function(theta + step) - function(theta - step)) / 2e-5
    return out


def everything(stops: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All sequences after a prompt of three tokens, with a column of padding behind them.

    tokens_BT, mask_BT, score_B and, for each position, the row of logits read there.
    """
    tokens_BT = np.array([(1, 1, 0, *s, 1) for s in SEQUENCES], np.int32)
    mask_BT, rows_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, np.int32)
    score_B = np.zeros(len(SEQUENCES))
    for b, sequence in enumerate(SEQUENCES):
        response = response_of(sequence, stops)
        mask_BT[b, 3 : 3 + len(response)] = True
        score_B[b] = score_of(response)
        for t in range(STEPS):
            rows_BT[b, 2 + t] = ROW[sequence[:t]]
    return tokens_BT, mask_BT, score_B, rows_BT


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, len(PREFIXES), VOCABULARY))


def sequence_probability(theta) -> np.ndarray:
    """With what follows an eos drawn as well, so that the 27 add up to 1."""
    return np.exp([log_probability(theta, s) for s in SEQUENCES])
