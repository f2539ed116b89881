"""The total reward of a response: reward models of one base, and terms computed on the host."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import require
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.rewards import checks
from perl_jax.rewards.callables import CallableReward
from perl_jax.rewards.compose import Term


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A trained reward model: weight * (raw score - mean) / deviation.

    Attributes:
        adapter: LoRA leaves (or all weights) and the scalar head.
        record: Holds the mean and the deviation of raw scores.
        weight: How much the score counts in the total.
    """

    adapter: Adapter
    record: Record
    weight: float = 1.0

    def __post_init__(self) -> None:
        checks.number("weight", self.weight)
        require(
            self.record.role == "reward",
            f"A {self.record.role} cannot score responses; a reward model is needed here.",
        )


def reward(
    function: Callable[..., Sequence[float]], *, weight: float = 1.0, name: str | None = None
) -> Term:
    """Returns a Python function as a term of the reward, called in this process.

    Args:
        function: (prompts, responses) or (prompts, responses, rows) -> numbers, one a response.
            `rows` are the prompts' rows with all their columns.
        weight: How much the numbers count in the total.
        name: In the metrics `reward/term/NAME`; None: the function's own name.
    """
    require(callable(function), f"reward is given {function!r}; it must be a function.")
    given = name or getattr(function, "__name__", type(function).__name__)
    return Term(given, weight, CallableReward(function))


@dataclasses.dataclass(frozen=True)
class RewardTotal:
    """What responses are paid: weight * combined score of the models + sum of weighted terms.

    Attributes:
        models: Reward models on the devices.
        combine: How their normalised scores become one: `mean`, `min`, or a weight for each.
        weight: Of the combined score.
        terms: Rewards computed on the host.
    """

    models: tuple[RewardModel, ...] = ()
    combine: str | tuple[float, ...] = "mean"
    weight: float = 1.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        require(
            bool(self.models) or bool(self.terms),
            "There is no reward: give reward models, or terms.",
        )

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(model.record for model in self.models)

    @property
    def first_weight(self) -> float:
        """How much the first model's score counts where it is the only one."""
        return self.weight if isinstance(self.combine, str) else self.weight * self.combine[0]


def total_of(rewards: Iterable[Any] | RewardTotal) -> RewardTotal:
    """Returns the sum of rewards: reward models, terms and functions, each by its own weight.

    Raises UserError for anything else.
    """
    if isinstance(rewards, RewardTotal):
        return rewards
    models, terms = [], []
    for item in rewards:
        if isinstance(item, RewardModel):
            models.append(item)
        elif isinstance(item, Term):
            terms.append(item)
        else:
            terms.append(reward(item))
    return RewardTotal(tuple(models), tuple(model.weight for model in models), 1.0, tuple(terms))


def load_total(
    model: Model,
    folders: Sequence[str | pathlib.Path],
    combine: str,
    weight: float,
    terms: Sequence[Term],
) -> RewardTotal:
    """Reads reward artefacts; returns weight * mean (or min) of their scores + the terms."""
    models = tuple(RewardModel(*model.load_role(folder, "reward")) for folder in folders)
    return RewardTotal(models, combine, weight, tuple(terms))
