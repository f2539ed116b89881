"""How responses are decoded."""

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
        slots: Responses that are decoded at a time; a finished one makes room for the next prompt's
            (continuous batching). None: the whole batch at once, until its longest response ends.
        cache: What keys and values are kept in; auto: the activations' dtype.
        adapters: Applied to every token, merged into a copy of the base, or auto: merged where that
            is
            fewer operations and the base is float32.
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


# What does not read the options of a draw, and what does, for `errors.unread`.
GREEDY = ("temperature 0 (greedy)", ("a temperature above 0",))
