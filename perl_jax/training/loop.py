"""The training loop: steps, validations, checkpoints, metrics; with a run's folder or without."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from perl_jax.data.pipeline import BatchIterator
from perl_jax.errors import Stopped, TrainingError, require
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.metrics import (
    FILE_NAME,
    MetricsWriter,
    NoMetrics,
    SamplesWriter,
    encode_row,
    read_metrics,
)
from perl_jax.runs.profile import Profile
from perl_jax.runs.progress import Progress
from perl_jax.runs.run import Run
from perl_jax.runtime import hosts
from perl_jax.runtime.hosts import Termination
from perl_jax.training.configs import TrainingConfig
from perl_jax.training.cost import Timings
from perl_jax.training.state import TrainState

# Is called with each step's number and metrics.
OnStep = Callable[[dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Loop:
    """What distinguishes the loops of SFT, reward models, DPO and RL.

    Attributes:
        job: The name that messages and the progress line begin with.
        advance: (state, batch) -> (state, metrics, seconds of each phase): one step. The metrics
            have the key `finite`.
        batches: The batches; a checkpoint holds their cursor.
        validate: state -> (metrics, rows for `runs.metrics.SamplesWriter`); None: no validation.
        best: The validation metric whose best step is returned; None: the last step is.
        shown: Names of the metrics on the progress line.
        facts: Constant numbers, written with the first step's metrics.
    """

    job: str
    advance: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any], dict[str, float]]]
    batches: BatchIterator
    validate: Callable[[TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None
    best: str | None
    shown: tuple[str, ...]
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Keeper(Protocol):
    """What the loop needs of `Checkpoints`, or of `Memory` in a run without a folder."""

    def latest_step(self) -> int | None:
        """Returns the step to resume from; None: there is none."""
        ...

    def best_step(self) -> int | None:
        """Returns the step with the best metric."""
        ...

    def save(
        self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Saves a state, with its validation metrics where there are any."""
        ...

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns (state, host state) of a step."""
        ...

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns (state, host state) of the newest step that can be read."""
        ...

    def close(self) -> None:
        """Releases what is held."""
        ...


class Memory:
    """Stands in for `Checkpoints` in a run without a folder: holds a copy of the best state."""

    def __init__(self, best: str | None) -> None:
        self._best = best
        self._value = -float("inf")
        self._state: TrainState | None = None

    def latest_step(self) -> None:
        """Returns None: there is nothing to resume from."""

    def best_step(self) -> int:
        """Returns the step of the best state."""
        return int(self._held().step)

    def save(
        self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Copies the state when its metric is the best one yet."""
        if self._best is not None and metrics is not None and metrics[self._best] > self._value:
            self._value = metrics[self._best]
            # The arrays of `state` are donated to the next step.
            self._state = jax.tree.map(jnp.copy, state)

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the best state, the only one that is held."""
        return self._held(), {}

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the best state, the only one that is held."""
        return self._held(), {}

    def _held(self) -> TrainState:
        """Returns the copy; raises ValueError before a step has been validated."""
        if self._state is None:
            raise ValueError("no validated step has been saved")
        return self._state

    def close(self) -> None:
        """Has nothing to release."""


def train(
    config: TrainingConfig,
    state: TrainState,
    loop: Loop,
    run: Run | None = None,
    on_step: OnStep | None = None,
) -> tuple[TrainState, Timings, list[dict[str, Any]]]:
    """Runs the loop to `config.steps`; returns the best or last state, timings, rows of metrics.

    With a folder the loop begins at the newest checkpoint there. A checkpoint is written after the
    step's metrics, and after the step was found to be finite. A resumed run cuts off the metrics
    that were written after its checkpoint and makes them again, bit for bit.

    Without a folder nothing is written, and the best state is a copy on the devices.

    Args:
        config: How long to train, how often to validate and to save.
        state: Its arrays are used up.
        loop: The job.
        run: The opened run; None: a run without a folder.
        on_step: Is called after each step with the row {"step": step, metric: number, ...}, on the
            process that writes.

    Raises:
        TrainingError: For NaN or infinity; the last good checkpoint stays.
        Stopped: After SIGTERM to any process of a run with a folder, at the end of the step, which
            is saved.
    """
    folder = None if run is None else run.folder
    if folder is None:
        _require_no_files(config)
    timings, rows = Timings(), []
    keeper: Keeper = (
        Memory(loop.best)
        if folder is None
        else Checkpoints(folder / "checkpoints", keep=config.keep, best=loop.best)
    )
    with contextlib.closing(keeper) as checkpoints:
        start = checkpoints.latest_step()
        if start is not None:
            state, saved = checkpoints.restore_newest(_given_up(state))
            start = int(state.step)
            loop.batches.set_state(saved["cursor"])
        begin, writes = int(state.step), hosts.is_writer()
        writer = samples = progress = NoMetrics()
        if writes:
            progress = Progress(loop.job, config.steps, begin)
        if folder is not None and writes:
            writer = MetricsWriter(folder, start, config.tensorboard, config.wandb)
            samples = SamplesWriter(folder, start)
        # Without a folder there is nothing to save, and SIGTERM stays what it was.
        termination = None if folder is None else Termination()
        profile = Profile(pathlib.Path(folder or ".") / "profile", config.profiled)
        with writer, progress, termination or contextlib.nullcontext(), profile:
            for step in range(begin + 1, config.steps + 1):
                clock = time.perf_counter()
                with profile.step(step):
                    state, metrics, phases = loop.advance(state, next(loop.batches))
                check_finite(folder, step, metrics)
                row = metrics | timings.add(step=time.perf_counter() - clock, **phases)
                row |= loop.facts if step == 1 else {}
                validated, last = None, step == config.steps
                if loop.validate is not None and (step % config.evaluate_every == 0 or last):
                    clock = time.perf_counter()
                    validated, shown = loop.validate(state)
                    row |= validated | {"time/validate": time.perf_counter() - clock}
                    samples.write(step, shown)
                writer.write(step, row)
                stop = termination is not None and termination.asked()
                due = stop or last or step % config.checkpoint_every == 0
                if due or (validated and loop.best):
                    writer.sync()
                    cursor = {"cursor": loop.batches.get_state()}
                    checkpoints.save(state, cursor, validated if loop.best else None)
                progress.update(
                    step, **{name.split("/")[-1]: row[name] for name in loop.shown if name in row}
                )
                if writes and (folder is None or on_step is not None):
                    encoded = encode_row(step, row)
                    if folder is None:
                        rows.append(encoded)
                    if on_step is not None:
                        on_step(encoded)
                if stop:
                    raise Stopped(
                        f"stopped by SIGTERM after step {step}, which is saved; the same command "
                        "resumes from there."
                    )
        if loop.best is not None:
            state, _ = checkpoints.restore(_given_up(state), checkpoints.best_step())
    if folder is not None and writes:
        rows = read_metrics(folder / FILE_NAME)
    return state, timings, rows


def _require_no_files(config: TrainingConfig) -> None:
    """Raises UserError for settings that write into a run's folder."""
    for name in ("tensorboard", "wandb", "profile"):
        value = vars(config)[name]
        require(not value, f"{name} is {value!r}, which is written into a run's folder; give run.")


def check_finite(folder: pathlib.Path | None, step: int, metrics: dict[str, Any]) -> None:
    """Removes `finite` from the metrics; raises TrainingError if it is False.

    It is False if a loss, a gradient, an updated weight or a log-probability is NaN or infinite.
    """
    if not bool(metrics.pop("finite")):
        bad = [
            name for name, value in metrics.items() if value != value or abs(value) == float("inf")
        ]
        where = f" ({', '.join(bad)})" if bad else ""
        kept = (
            "the run stopped"
            if folder is None
            else f"the run stopped, its last good checkpoint is in {folder / 'checkpoints'}"
        )
        raise TrainingError(
            f"Step {step} gave NaN or infinity{where}; {kept}. "
            "A lower learning rate or a smaller clip_norm may help."
        )


def _given_up(state: TrainState) -> TrainState:
    """Deletes the arrays of a state; returns their shapes and shardings.

    Another state is then read into their place: the devices may not have room for two.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return abstract
