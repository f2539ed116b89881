"""A Python function as a reward, called in the process that trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.rewards import checks
from perl_jax.rewards.worker import checked_values, listed, wants_rows


@dataclasses.dataclass(frozen=True)
class CallableReward:
    """A reward computed by a Python function in this process: function(prompts, responses) -> one
    number per response.

    Each batch is one call. The function also gets the rows if it has a third parameter that is
    called `rows` or has no default. An exception in the function ends the training.
    `rewards.function.FunctionReward` runs a function in a process of its own instead, with a time
    limit.

    Attributes:
        function: The function.
    """

    function: Callable[..., Sequence[float]]

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @functools.cached_property
    def takes_rows(self) -> bool:
        """Whether the function takes (prompts, responses, rows) rather than (prompts, responses).

        Raises UserError if the function takes neither.
        """
        return wants_rows(self.name, self.function)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Returns the function's rewards, float64 [n]. An empty batch does not call the function.

        Args:
            prompts: The n prompts as text.
            responses: The n responses as text.
            rows: The rows of the prompts with all their columns; ignored unless the function takes
                rows.

        Raises:
            UserError: The function does not return n finite numbers.
        """
        checks.require_equal_lengths(prompts, responses, rows)
        if not len(responses):
            return np.zeros(0, np.float64)
        # Copies, because other terms get the same lists.
        texts = (list(prompts), list(responses))
        values = listed(self.function(*texts, *([list(rows)] if self.takes_rows else [])))
        return np.asarray(checked_values(self.name, values, responses), np.float64)
