"""The training loop that resumes from its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from perl_jax.errors import Stopped, TrainingError
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.metrics import MetricsWriter, NoMetrics, Progress, SamplesWriter
from perl_jax.runs.profile import Profile
from perl_jax.runtime import hosts
from perl_jax.runtime.hosts import Termination
from perl_jax.training.configs import JobConfig
from perl_jax.training.cost import Timings
from perl_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Loop:
    """One job's training loop: what differs between SFT, reward and RL.

    advance(state, batch) -> (state, metrics, seconds by phase): one update; metrics hold `finite`.
    batches: an iterator with get_state and set_state. validate(state) -> (metrics, samples for
    `metrics.SamplesWriter`), or None.
    best: the validation metric whose best step is kept besides the last ones.
    shown: metric names for the progress line. facts: numbers that stay as they are, written with
    the first step's metrics.
    """

    job: str
    advance: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any], dict[str, float]]]
    batches: Iterator
    validate: Callable[[TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None
    best: str | None
    shown: tuple[str, ...]
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def train(
    folder: pathlib.Path, config: JobConfig, state: TrainState, loop: Loop
) -> tuple[TrainState, Timings]:
    """Runs the loop from the newest checkpoint (or step 0) to `config.steps`.

    A checkpoint is written after the step's metrics and after its finiteness was seen: NaN or
    infinity raises TrainingError and leaves the last good one in place. On resume the metrics
    written after the checkpoint are cut off and made again, bit for bit. SIGTERM (to any process)
    ends the run with Stopped, after the step that is being done and a checkpoint of it.
    """
    timings = Timings()
    with contextlib.closing(
        Checkpoints(folder / "checkpoints", keep=config.keep, best=loop.best)
    ) as checkpoints:
        state = _train(folder, config, state, loop, checkpoints, timings)
    return state, timings


def _train(
    folder: pathlib.Path,
    config: JobConfig,
    state: TrainState,
    loop: Loop,
    checkpoints: Checkpoints,
    timings: Timings,
) -> TrainState:
    """The steps from the newest checkpoint on; the best validated state where the loop has one."""
    start = checkpoints.latest_step()
    if start is not None:
        state, saved = checkpoints.restore_newest(_given_up(state))
        start = int(state.step)
        loop.batches.set_state(saved["cursor"])
    begin = int(state.step)
    writes = hosts.is_writer()
    writer = (
        MetricsWriter(folder, start, config.tensorboard, config.wandb) if writes else NoMetrics()
    )
    samples = SamplesWriter(folder, start) if writes else NoMetrics()
    progress = Progress(loop.job, config.steps, begin) if writes else NoMetrics()
    with (
        writer,
        progress,
        Termination() as termination,
        Profile(folder / "profile", config.profiled) as profile,
    ):
        for step in range(begin + 1, config.steps + 1):
            clock = time.perf_counter()
            with profile.step(step):
                state, metrics, phases = loop.advance(state, next(loop.batches))
            check_finite(folder, step, metrics)
            row = metrics | timings.add(step=time.perf_counter() - clock, **phases)
            row |= loop.facts if step == 1 else {}
            validated = None
            if loop.validate is not None and (
                step % config.evaluate_every == 0 or step == config.steps
            ):
                clock = time.perf_counter()
                validated, shown = loop.validate(state)
                row |= validated | {"time/validate": time.perf_counter() - clock}
                samples.write(step, shown)
            writer.write(step, row)
            stop = termination.asked()
            if (
                stop
                or step % config.checkpoint_every == 0
                or step == config.steps
                or (validated and loop.best)
            ):
                writer.sync()
                checkpoints.save(
                    state, {"cursor": loop.batches.get_state()}, validated if loop.best else None
                )
            progress.update(
                step, **{name.split("/")[-1]: row[name] for name in loop.shown if name in row}
            )
            if stop:
                raise Stopped(
                    f"stopped by SIGTERM after step {step}, which is saved; the same command "
                    "resumes from there."
                )
    if loop.best is not None:
        state, _ = checkpoints.restore(_given_up(state), checkpoints.best_step())
    return state


def check_finite(folder: pathlib.Path, step: int, metrics: dict[str, Any]) -> None:
    """Stops the run on NaN or infinity in a loss, gradient, updated weight or log-probability."""
    if not bool(metrics.pop("finite")):
        bad = [
            name for name, value in metrics.items() if value != value or abs(value) == float("inf")
        ]
        where = f" ({', '.join(bad)})" if bad else ""
        raise TrainingError(
            f"Step {step} gave NaN or infinity{where}; the run stopped, its last good checkpoint "
            f"is in {folder / 'checkpoints'}. "
            "A lower learning rate or a smaller clip_norm may help."
        )


def _given_up(state: TrainState) -> TrainState:
    """Shapes and places of a state, whose arrays are gone afterwards: another one is read into
    their place, where not both may fit.
    """
    abstract = _abstract(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return abstract


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
