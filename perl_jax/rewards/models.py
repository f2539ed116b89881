"""The total reward of a response: reward models on the devices, and terms on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import require
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.rewards import checks
from perl_jax.rewards.callables import CallableReward
from perl_jax.rewards.compose import Term
from perl_jax.rewards.scoring import role_name
from perl_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A trained reward model; its reward is weight * (score - mean) / standard deviation.

    Attributes:
        adapter: The adapter (or all weights) with its scalar head.
        record: The record of its artefact, with the mean and the standard deviation of its scores.
        weight: The factor of the normalised score in the total.
    """

    adapter: Adapter
    record: Record
    weight: float = 1.0

    def __post_init__(self) -> None:
        checks.require_number("weight", self.weight)
        require(
            self.record.role == "reward",
            f"A {self.record.role} cannot score responses; a reward model is needed here.",
        )


def reward(
    function: Callable[..., Sequence[float]],
    *,
    weight: float = 1.0,
    name: str | None = None,
    special_tokens: bool = False,
) -> Term:
    """Returns a Python function as a reward term, called in this process.

    Args:
        function: (prompts, responses) or (prompts, responses, rows) -> one number per response.
            `rows` are the prompts' rows with all their columns.
        weight: The factor of the numbers in the total.
        name: The term's name in the metrics `reward/term/NAME`; None takes the function's own name.
        special_tokens: Whether the responses have their special tokens.
    """
    require(callable(function), f"reward is given {function!r}; it must be a function.")
    given = name or getattr(function, "__name__", type(function).__name__)
    return Term(given, weight, CallableReward(function), special_tokens)


@dataclasses.dataclass(frozen=True)
class RewardTotal:
    """How responses are rewarded: weight * (combined score of the models) + (weighted sum of
    terms).

    Attributes:
        models: Reward models on the devices, or folders of reward artefacts.
        combine: How the models' normalised scores are combined: `mean`, `min`, or one weight per
            model for a weighted sum.
        weight: The factor of the combined score.
        terms: Rewards computed on the host.
    """

    models: tuple[RewardModel | files.PathLike, ...] = ()
    combine: str | tuple[float, ...] = "mean"
    weight: float = 1.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        require(
            bool(self.models) or bool(self.terms),
            "There is no reward: give rewards=[...], of reward models, their folders, or terms.",
        )

    def loaded(self, model: Model) -> RewardTotal:
        """Returns the total with every folder of a reward artefact loaded as a `RewardModel`.

        Args:
            model: The base model that the artefacts belong to.

        Raises:
            UserError: A folder is no reward artefact of this base and tokenizer.
        """
        read = lambda one: (
            one if isinstance(one, RewardModel) else RewardModel(*model.load_role(one, "reward"))
        )
        return dataclasses.replace(self, models=tuple(map(read, self.models)))

    @property
    def loaded_models(self) -> tuple[RewardModel, ...]:
        """The reward models; raises ValueError if one of them is still a folder (see `loaded`)."""
        found = tuple(one for one in self.models if isinstance(one, RewardModel))
        if len(found) < len(self.models):
            raise ValueError("the reward models are folders that have not been loaded")
        return found

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of the loaded reward models."""
        return tuple(model.record for model in self.loaded_models)

    @property
    def roles(self) -> dict[str, Adapter]:
        """The adapters of the loaded reward models, by their names among the frozen roles
        (`role_name`).
        """
        return {role_name(index): one.adapter for index, one in enumerate(self.loaded_models)}

    @property
    def first_weight(self) -> float:
        """The factor of the first model's normalised score in the total; only meaningful for a
        single model.
        """
        return self.weight if isinstance(self.combine, str) else self.weight * self.combine[0]


def total_of(rewards: Iterable[Any] | RewardTotal) -> RewardTotal:
    """Returns the sum of rewards, each with its own weight, as a `RewardTotal`.

    Args:
        rewards: Reward models, folders of reward artefacts (weight 1), terms, and functions (weight
            1, see `reward`); or a total, which is returned unchanged.

    Raises:
        UserError: An item is anything else, or there is none.
    """
    if isinstance(rewards, RewardTotal):
        return rewards
    models, terms = [], []
    for item in rewards:
        if isinstance(item, (RewardModel, str, os.PathLike)):
            models.append(item)
        elif isinstance(item, Term):
            terms.append(item)
        else:
            terms.append(reward(item))
    weights = tuple(getattr(model, "weight", 1.0) for model in models)
    return RewardTotal(tuple(models), weights, 1.0, tuple(terms))
