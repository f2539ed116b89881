"""What responses are paid: reward artefacts and other terms."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from perl_jax import errors
from perl_jax.hub.model import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions(ModelOptions):
    """What responses are paid.

    Attributes:
        reward: Reward artefacts of this base; several are an ensemble.
        combine: An ensemble's score: the mean of its members', or the least.
        reward_weight: What the reward models' score counts beside `terms`.
        terms: More rewards, as a JSON list or a file of one: rules, a Python function, a judge.
    """

    reward: tuple[str, ...] = ()
    combine: Literal["mean", "min"] = "mean"
    reward_weight: float = 1.0
    terms: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.require(
            bool(self.reward) or self.terms is not None,
            "There is no reward: give reward artefacts, or terms.",
        )
        errors.one_of("combine", self.combine, ("mean", "min"))
        errors.require(
            math.isfinite(self.reward_weight),
            f"reward_weight is {self.reward_weight!r}; it must be a finite number.",
        )
        several = len(self.reward) > 1 or self.combine == "mean"
        errors.require(
            several,
            f"combine is {self.combine!r} over {len(self.reward)} reward artefacts; leave it out, "
            "or give two or more.",
        )
        weighed = bool(self.reward) or self.reward_weight == 1.0
        errors.require(
            weighed,
            f"reward_weight is {self.reward_weight!r} without a reward artefact; leave it out, or "
            "give reward (weights of terms are in terms).",
        )
