"""What a step of the contest asks of the machine, and how fast this machine can be at it.

Counted are the floating point operations of matrix products, 2 for each multiplication with
addition:

    a forward pass        2 (W + A) a token, 4 H K L for each pair of a query and a key before or at
    it, 2 V D for each
                          position whose logits are needed
    a backward pass       the gradients of activations cost what the forward pass did, attention
    twice that. Of the
                          frozen weights nothing more is needed, nor anything below the first
                          layer's q, k and v; adapters' own gradients cost 4 A a token, full
                          tuning's 4 W in the place of 2 W

W weights of all layers' matrices, A of the adapters, H K width of queries, L layers, V vocabulary,
D width. It is the least that the result needs: a prompt that the sides of a pair or several samples
share is computed once, adapters are merged for sampling, and of the last layer only keys and values
are computed where nothing is read. What a trainer computes beyond that (padding, a second pass for
the log-probabilities of what was just sampled, activations computed again) is not counted.
`phases(..., shared=False)` is the same for a trainer to which every row stands alone, with a prompt
of its own.

In decoding, all weights and the keys and values so far must come from memory once for every new
token of a batch; those of a shared prompt once for all its samples.

The least time of a step is, part by part, the larger of operations and bytes each divided by the
best rate seen here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import work

LAYERS, WIDTH = work.MODEL["num_hidden_layers"], work.MODEL["hidden_size"]
QUERIES, KEYS = (
    work.MODEL[name] * work.MODEL["head_dim"]
    for name in ("num_attention_heads", "num_key_value_heads")
)
FLOAT_BYTES = {"float32": 4, "bfloat16": 2}[work.SIZE.dtype]
# Weights of a layer's matrices, of the adapters of q, k, v and o, and of the head: k and v apart
# from all others.
KV = 2 * KEYS * WIDTH
OTHERS = sum(rows * columns for rows, columns in work.layer_shapes().values()) - KV
KV_ADAPTERS, OTHER_ADAPTERS = 2 * work.RANK * (KEYS + WIDTH), 2 * work.RANK * (QUERIES + WIDTH)
HEAD = work.MODEL["vocab_size"] * WIDTH

Groups = Sequence[tuple[int, Sequence[int]]]  # tokens of a prompt, and of each response to it


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
        return sum(
            max(phase.operations / self.operations, phase.bytes / self.bytes) for phase in phases
        )


@dataclasses.dataclass(frozen=True)
class Extent:
    """Positions, and pairs of one of them as the query with a key before or at it."""

    tokens: int
    pairs: int


def alone(groups: Groups) -> Groups:
    """The same rows, each with a prompt of its own."""
    return [(prompt, (response,)) for prompt, responses in groups for response in responses]


def extent(groups: Groups, last: float = math.inf) -> Extent:
    """Of prompts and responses, or only of the last so many positions of each row; what lies in a
    prompt once.
    """
    tokens = pairs = 0
    for prompt, responses in groups:
        starts = [max(0, prompt + response - last) for response in responses]
        spans = [
            (max(start, prompt), prompt + response)
            for start, response in zip(starts, responses, strict=True)
        ]
        for start, end in (*spans, (min(prompt, *starts), prompt)):
            tokens += end - start
            pairs += (end * (end + 1) - start * (start + 1)) // 2
    return Extent(tokens, pairs)


def layers(groups: Groups, last: float, weight: int, adapter: int, pair: int) -> float:
    """Operations of all layers for each weight of their matrices and of their adapters a token, and
    for each number of a pair's product.

    last: of how many positions at a row's end something is read; of the others the last layer has
    only keys and values.
    """
    whole, read = extent(groups), extent(groups, last)
    kv, others = weight * KV + adapter * KV_ADAPTERS, weight * OTHERS + adapter * OTHER_ADAPTERS
    each = ((LAYERS - 1, whole), (1, read))
    return sum(
        number * (kv * whole.tokens + others * there.tokens + pair * QUERIES * there.pairs)
        for number, there in each
    )


def forward(groups: Groups, last: float, head: int = 0, adapters: bool = False) -> float:
    """head: its weights, where logits are needed of all that is read."""
    return layers(groups, last, 2, 2 * adapters, 4) + 2 * head * extent(groups, last).tokens


def backward(groups: Groups, last: float, head: int, tuning: str) -> float:
    logits = head * extent(groups, last).tokens
    if tuning == "full":
        return layers(groups, last, 4, 0, 8) + 4 * logits
    lowest = 2 * (QUERIES * WIDTH + KV) * extent(groups).tokens
    return layers(groups, last, 2, 4, 8) - lowest + 2 * logits


def sampling(groups: Groups, at_once: int) -> list[Phase]:
    """Responses of the given lengths, as many of them at a time as said, all the time."""
    before = [(prompt, (0,) * len(responses)) for prompt, responses in groups]
    # The first token comes from the prompt's pass, and nothing is computed with the last.
    made = [(prompt, [response - 1 for response in responses]) for prompt, responses in groups]
    whole, start = extent(made), extent(before)
    tokens, pairs = whole.tokens - start.tokens, whole.pairs - start.pairs
    weights = LAYERS * (KV + OTHERS) + HEAD
    slots = sum(
        prompt * max(responses) + extent([(0, responses)]).pairs for prompt, responses in made
    )
    moved = FLOAT_BYTES * (weights * math.ceil(tokens / at_once) + 2 * KEYS * LAYERS * slots)
    return [
        Phase("prompts", forward(before, 1, HEAD)),
        Phase("decoding", 2 * weights * tokens + 4 * QUERIES * LAYERS * pairs, moved),
    ]


def phases(job: str, tuning: str, shared: bool = True) -> list[Phase]:
    """The parts of one step of a job. shared: prompts are computed once for what follows them."""
    arranged = list if shared else alone
    if job.startswith("reward"):
        pairs = {"reward-equal": work.EQUAL, "reward-ragged": work.RAGGED}[job]
        sides = arranged(
            [
                (work.prompt_tokens(pair), [side - work.prompt_tokens(pair) for side in pair])
                for pair in pairs
            ]
        )
        return [
            Phase("forward", forward(sides, 1, 0, tuning == "lora")),
            Phase("backward", backward(sides, 1, 0, tuning)),
        ]
    responses = arranged([(work.PROMPT_TOKENS, (work.NEW_TOKENS,) * work.SAMPLES)] * work.PROMPTS)
    generation = sampling(responses, work.PROMPTS * work.SAMPLES)
    if job == "generate":
        return generation
    # A response's last token is predicted, and nothing after it.
    read = (
        arranged([(work.PROMPT_TOKENS, (work.NEW_TOKENS - 1,) * work.SAMPLES)] * work.PROMPTS),
        work.NEW_TOKENS,
        HEAD,
    )
    score = [Phase("score", forward(responses, 1))] if job == "rl-model" else []
    reference = Phase("reference", forward(*read))
    learn = Phase("learn", forward(*read, tuning == "lora") + backward(*read, tuning))
    return [*generation, *score, reference, learn]


def best_rate(amount: float, action: Callable[[], object], times: int = 3) -> float:
    """amount a second in the fastest of several runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return amount / min(seconds)


def measure(size: int = 2048, long: int = 8192) -> Rates:
    """Of a CPU, by numpy on all cores: float32 products of square matrices, and of a matrix of 256
    MiB with a vector.
    """
    square, matrix, vector = (
        np.ones((size, size), np.float32),
        np.ones((long, long), np.float32),
        np.ones(long, np.float32),
    )
    return Rates(
        best_rate(2 * size**3, lambda: square @ square),
        best_rate(matrix.nbytes, lambda: matrix @ vector),
    )


def best(rates: Sequence[Rates]) -> Rates:
    """The highest of each: whatever else the machine did, it can do that."""
    return Rates(max(rate.operations for rate in rates), max(rate.bytes for rate in rates))


def text(
    least: Sequence[Phase], alone: Sequence[Phase], rates: Rates, medians: dict[str, float]
) -> str:
    """A step's work, the rates, and what share of the least time's speed each contender reaches;
    the same with every row alone.
    """
    lines = [
        f"A step is {described(least)}; {described_rates(rates)}.",
        f"At least {shares(least, rates, medians)}.",
    ]
    return "\n".join(
        (
            *lines,
            f"Rows alone, each with a prompt of its own: {described(alone)}; "
            f"{shares(alone, rates, medians)}.",
        )
    )


def described(phases: Sequence[Phase]) -> str:
    """Operations, part by part, and what comes from memory."""
    parts = ", ".join(f"{phase.name} {phase.operations / 1e9:,.0f}" for phase in phases)
    read = sum(phase.bytes for phase in phases)
    memory = f" with {read / 1e9:,.1f} GB from memory in decoding" if read else ""
    return f"{sum(phase.operations for phase in phases) / 1e9:,.0f} GFLOP ({parts}){memory}"


def described_rates(rates: Rates) -> str:
    return (
        f"products of large square matrices here make {rates.operations / 1e9:,.1f} GFLOP/s, "
        f"memory {rates.bytes / 1e9:,.1f} GB/s"
    )


def shares(phases: Sequence[Phase], rates: Rates, medians: dict[str, float]) -> str:
    seconds = rates.least_seconds(phases)
    return f"{seconds:.2f} s, of that speed " + ", ".join(
        f"{name} {seconds / median:.0%}" for name, median in medians.items()
    )
