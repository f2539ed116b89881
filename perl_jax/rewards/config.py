"""The flags that say how responses are rewarded: reward models and reward terms."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from perl_jax import errors
from perl_jax.hub.model import ModelOptions
from perl_jax.rewards import compose


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions(ModelOptions):
    """How responses are rewarded: reward_weight * (reward models' score) + (weighted sum of terms).

    Attributes:
        reward: Folders of reward artefacts trained on this base model; several form an ensemble.
        combine: How an ensemble's normalised scores are combined: their mean or their minimum.
        reward_weight: The factor of the reward models' score when `terms` are added to it.
        terms: Further rewards (rules, Python functions, judges): a JSON object or a list of them,
            or the path of a file that holds one.
    """

    reward: tuple[str, ...] = ()
    combine: Literal["mean", "min"] = "mean"
    reward_weight: float = 1.0
    terms: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.require(
            bool(self.reward) or self.terms is not None,
            "There is no reward: give --reward FOLDER or --terms JSON.",
        )
        if self.terms is not None and compose.is_inline(self.terms):
            # Before the text is written into a run's folder: it may hold a key in a wrong place.
            compose.read_terms(self.terms)
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
