"""What keeps a run's states: checkpoints in its folder, or the devices' memory without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runtime import files
from perl_jax.training.state import TrainState


class Keeper(Protocol):
    """What the loop needs of `Checkpoints`, or of `Memory` in a run without a folder."""

    def latest_step(self) -> int | None:
        """Returns the step to resume from; None: there is none."""
        ...

    def save(
        self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Saves a state under its step.

        Args:
            state: The state to save.
            host: The host state, a JSON object: the data cursor.
            metrics: The validation metrics, if they were measured at this step; else None.
        """
        ...

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns (state, host state) of the newest step that can be read, placed as `abstract`
        says.
        """
        ...

    def restore_best(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns (state, host state) of the step with the highest metric that can be read, placed
        as `abstract` says.
        """
        ...

    def close(self) -> None:
        """Releases threads and files."""
        ...


class Memory:
    """Replaces `Checkpoints` in a run without a folder: keeps a copy of the best state on the
    devices.

    Args:
        best: The metric whose highest value marks the best state; None: no state is kept.
    """

    def __init__(self, best: str | None) -> None:
        self._best = best
        self._value = -float("inf")
        self._state: TrainState | None = None

    def latest_step(self) -> None:
        """Returns None: there is nothing to resume from."""

    def save(
        self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Copies the state if its metric `best` is higher than that of every state before.

        Does nothing without metrics, or if `best` is None.

        Args:
            state: The state. Its arrays are copied, because the next step reuses their buffers.
            host: Not read.
            metrics: The validation metrics of this step; None: it was not validated.
        """
        if self._best is not None and metrics is not None and metrics[self._best] > self._value:
            self._value = metrics[self._best]
            # The arrays of `state` are donated to the next step.
            self._state = jax.tree.map(jnp.copy, state)

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the best state, the only one that is kept, and an empty host state, {}.

        The argument is not read. Raises ValueError if no state has been kept.
        """
        return self._held(), {}

    def restore_best(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the best state and an empty host state, {}.

        The argument is not read. Raises ValueError if no state has been kept.
        """
        return self._held(), {}

    def _held(self) -> TrainState:
        """Returns the kept copy. Raises ValueError if no state has been kept."""
        if self._state is None:
            raise ValueError("no validated step has been saved")
        return self._state

    def close(self) -> None:
        """Does nothing: there are no threads or files."""


def open_keeper(folder: files.Path | None, keep: int, best: str | None) -> Keeper:
    """Returns the checkpoints of a run's folder, or a `Memory` for a run without a folder.

    Args:
        folder: The run's folder; None: there is none.
        keep: How many of the newest checkpoints are kept.
        best: The metric whose highest value marks the best state; None: there is no best one.
    """
    if folder is None:
        return Memory(best)
    return Checkpoints(folder / "checkpoints", keep=keep, best=best)
