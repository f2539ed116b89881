"""Config of how responses are decoded."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import errors
from perl_jax.generation.sampling import ADAPTERS
from perl_jax.models.cache import CACHES, CacheKind


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


# For `errors.unread`: the choice that ignores the options of random sampling, and the one that
# reads them.
GREEDY = ("temperature 0 (greedy)", ("a temperature above 0",))
