"""What a step of the contest asks of the machine, and how fast this machine can be at it.

Counted are the floating point operations of matrix products, 2 for each multiplication with addition:

    a forward pass        2 (W + A) a token, 4 H K L for each pair of a query and a key before or at it, 2 V D for each
                          position whose logits are needed
    a backward pass       the gradients of activations cost what the forward pass did, attention twice that. Of the
                          frozen weights nothing more is needed, nor anything below the first layer's q, k and v;
                          adapters' own gradients cost 4 A a token, full tuning's 4 W in the place of 2 W

W weights of all layers' matrices, A of the adapters, H K width of queries, L layers, V vocabulary, D width. Every row is
counted as if it stood alone, each token once: two responses to a prompt have it counted twice, and a contender that computes
it once does less than was counted. What a trainer computes beyond that (padding, a second pass for the log-probabilities of
what was just sampled, activations computed again) is not counted: it is not needed for the result.

In decoding, all weights and the keys and values so far must come from memory once for every new token of a batch.

The least time of a step is, part by part, the larger of operations and bytes each divided by the best rate seen here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

import work

LAYERS, VOCABULARY, WIDTH = work.MODEL["num_hidden_layers"], work.MODEL["vocab_size"], work.MODEL["hidden_size"]
QUERIES, KEYS = (work.MODEL[name] * work.MODEL["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
FLOAT_BYTES = {"float32": 4, "bfloat16": 2}[work.SIZE.dtype]
TARGETS = tuple(f"self_attn.{name}" for name in work.TARGETS)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step: operations, and bytes from memory (0 where they are too few to matter)."""

    name: str
    operations: float
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    operations: float
    bytes: float

    def least_seconds(self, phases: Sequence[Phase]) -> float:
        return sum(max(phase.operations / self.operations, phase.bytes / self.bytes) for phase in phases)


def body_weights() -> int:
    return LAYERS * sum(rows * columns for rows, columns in work.layer_shapes().values())


def adapter_weights() -> int:
    shapes = work.layer_shapes()
    return LAYERS * sum(work.RANK * sum(shapes[name]) for name in TARGETS)


def attention(lengths: Sequence[int], start: int = 0) -> float:
    """Operations of queries from position start on, in rows of the given lengths."""
    pairs = sum(length * (length + 1) // 2 - start * (start + 1) // 2 for length in lengths)
    return 4 * QUERIES * LAYERS * pairs


def forward(lengths: Sequence[int], logits: int = 0, adapters: int = 0, start: int = 0) -> float:
    """lengths: tokens of each row, of which those before start have been computed. logits: how many positions' are needed."""
    tokens = sum(lengths) - start * len(lengths)
    return 2 * (body_weights() + adapters) * tokens + attention(lengths, start) + 2 * VOCABULARY * WIDTH * logits


def backward(lengths: Sequence[int], logits: int, tuning: str) -> float:
    lowest = (QUERIES + 2 * KEYS) * WIDTH
    weights = {"lora": 2 * (body_weights() - lowest) + 4 * adapter_weights(), "full": 4 * body_weights()}
    head = {"lora": 2, "full": 4}
    return weights[tuning] * sum(lengths) + 2 * attention(lengths) + head[tuning] * VOCABULARY * WIDTH * logits


def generation(adapters: int) -> list[Phase]:
    rows, first, last = work.PROMPTS * work.SAMPLES, work.PROMPT_TOKENS, work.PROMPT_TOKENS + work.NEW_TOKENS - 1
    steps = last - first  # the last token that is sampled is not computed with, the first comes from the prompt's pass
    cache = 2 * KEYS * LAYERS * rows * sum(range(first + 1, last + 1))
    weights = (body_weights() + adapters + VOCABULARY * WIDTH) * steps
    decoding = forward([last] * rows, steps * rows, adapters, first)
    return [Phase("prompts", forward([first] * rows, rows, adapters)), Phase("decoding", decoding, FLOAT_BYTES * (weights + cache))]


def phases(job: str, tuning: str) -> list[Phase]:
    """The parts of one step of a job; adapters are merged in the job generate."""
    adapters = adapter_weights() if tuning == "lora" else 0
    if job == "generate":
        return generation(adapters=0)
    if job.startswith("reward"):
        lengths = [length for pair in {"reward-equal": work.EQUAL, "reward-ragged": work.RAGGED}[job] for length in pair]
        return [Phase("forward", forward(lengths, 0, adapters)), Phase("backward", backward(lengths, 0, tuning))]
    lengths = [work.PROMPT_TOKENS + work.NEW_TOKENS] * work.PROMPTS * work.SAMPLES
    logits = work.NEW_TOKENS * len(lengths)
    score = [Phase("score", forward(lengths))] if job == "rl-model" else []
    reference = Phase("reference", forward(lengths, logits))
    learn = Phase("learn", forward(lengths, logits, adapters) + backward(lengths, logits, tuning))
    return [*generation(adapters), *score, reference, learn]


def best_rate(amount: float, action: Callable[[], object], times: int = 3) -> float:
    """amount a second in the fastest of several runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return amount / min(seconds)


def measure(size: int = 2048, long: int = 8192) -> Rates:
    """Of a CPU, by numpy on all cores: float32 products of square matrices, and of a matrix of 256 MiB with a vector."""
    square, matrix, vector = np.ones((size, size), np.float32), np.ones((long, long), np.float32), np.ones(long, np.float32)
    return Rates(best_rate(2 * size**3, lambda: square @ square), best_rate(matrix.nbytes, lambda: matrix @ vector))


def best(rates: Sequence[Rates]) -> Rates:
    """The highest of each: whatever else the machine did, it can do that."""
    return Rates(max(rate.operations for rate in rates), max(rate.bytes for rate in rates))


def text(phases: Sequence[Phase], rates: Rates, medians: dict[str, float]) -> str:
    """A step's work, the rates, and what share of the least time's speed each contender reaches."""
    total, least = sum(phase.operations for phase in phases), rates.least_seconds(phases)
    parts = ", ".join(f"{phase.name} {phase.operations / 1e9:,.0f}" for phase in phases)
    read = sum(phase.bytes for phase in phases)
    memory = f" {read / 1e9:,.1f} GB from memory in decoding at {rates.bytes / 1e9:.1f} GB/s." if read else ""
    shares = ", ".join(f"{name} {least / median:.0%}" for name, median in medians.items())
    return (
        f"A step is {total / 1e9:,.0f} GFLOP ({parts}); products of large square matrices here make {rates.operations / 1e9:,.1f} GFLOP/s."
        f"{memory}\nAt least {least:.2f} s; of that speed {shares}."
    )
