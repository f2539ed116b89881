"""Configs of how tokens are sampled and decoded."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import errors
from perl_jax.generation.cache import CACHES, CacheKind

ADAPTERS = ("auto", "applied", "merged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are decoded.

    Attributes:
        slots: Number of responses that are decoded at the same time with continuous batching: a
            finished response leaves its slot to the next prompt's. None: decode the whole batch at
            once, until its longest response ends.
        cache: Dtype of the cached keys and values; auto: the activations' dtype.
        adapters: applied: compute the adapter for every token; merged: merge it into a copy of the
            base first; auto: merged where that takes fewer operations and the base is float32.
        top_k: Sample from the k most likely tokens only; None: off. Not in RL.
        top_p: Sample from the fewest tokens with this probability in total; None: off. Not in RL.
    """

    slots: int | None = None
    cache: CacheKind = "auto"
    adapters: Literal["auto", "applied", "merged"] = "auto"
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        errors.in_range(self, "rollout")
        if self.slots is not None:
            errors.whole("rollout.slots", self.slots)
        errors.one_of("rollout.cache", self.cache, CACHES)
        errors.one_of("rollout.adapters", self.adapters, ADAPTERS)
        if self.top_k is not None:
            errors.whole("rollout.top_k", self.top_k)
        if self.top_p is not None:
            errors.require(
                0 < self.top_p <= 1, f"rollout.top_p is {self.top_p!r}; it must lie in (0, 1]."
            )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled, and how decoding is computed.

    Attributes:
        max_new_tokens: C, the largest number of response tokens, the stop token included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens, and ties with the k-th; None: off.
        top_p: Keep the smallest set of most likely tokens with at least this probability; None:
            off.
        stop_ids: Tokens that end a row; the stop token is part of the response.
        pad_id: Token in the columns after the end.
        cache: Dtype of the cached keys and values; auto: the activations' dtype.
        stages: Number of steps in which the cache grows. A token then reads fewer empty columns,
            but the cache exists twice for a moment when it grows.
        adapters: applied: compute the adapter for every token; merged: merge it into a copy of the
            base; auto: what costs less (`prepare_for_decoding`).
        fused: Compute attention's projections and their adapters as few large products, from a copy
            of their weights (`generation.fused`), where possible.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    cache: CacheKind = "auto"
    stages: int = 1
    adapters: Literal["auto", "applied", "merged"] = "auto"
    fused: bool = False

    def __post_init__(self) -> None:
        errors.in_range(self, "sampling")
        errors.whole("sampling.max_new_tokens", self.max_new_tokens)
        errors.positive("sampling.temperature", self.temperature, zero=True)
        errors.whole("sampling.stages", self.stages)
        errors.one_of("sampling.cache", self.cache, CACHES)
        errors.one_of("sampling.adapters", self.adapters, ADAPTERS)
        if self.top_k is not None:
            errors.whole("sampling.top_k", self.top_k)
        if self.top_p is not None:
            errors.require(
                0 < self.top_p <= 1, f"sampling.top_p is {self.top_p!r}; it must lie in (0, 1]."
            )


# For `errors.unread`: the choice that ignores the options of random sampling, and the one that
# reads them.
GREEDY = ("temperature 0 (greedy)", ("a temperature above 0",))
