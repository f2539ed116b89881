"""A Python function as a reward, called in the process that trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from perl_jax.rewards import checks
from perl_jax.rewards.worker import checked_values, wants_rows


@dataclasses.dataclass(frozen=True)
class CallableReward:
    """function(prompts, responses) -> numbers, one a response, each batch in one call.

    A function with a third parameter (one without a default, or called rows) gets the rows, too. An
    exception of the function ends the training. `rewards.function.FunctionReward` runs a function
    in a process of its own instead, with a time limit.
    """

    function: Callable[..., Sequence[float]]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @functools.cached_property
    def takes_rows(self) -> bool:
        """Whether the function takes (prompts, responses, rows). Raises UserError for neither."""
        return wants_rows(self.name, self.function)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Returns float64 [n]. Raises UserError unless the function gives n finite numbers."""
        checks.sequences(prompts, responses, rows)
        if not len(responses):
            return np.zeros(0, np.float64)
        arguments = (prompts, responses, rows) if self.takes_rows else (prompts, responses)
        found = self.function(*arguments)
        # An array, a generator, any sequence will do; anything else is refused by its type.
        apart = isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable)
        values = found if apart else list(found)
        return np.asarray(checked_values(self.name, values, responses), np.float64)
