"""The training loop: steps, validations, checkpoints, metrics; with a run's folder or without."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from perl_jax.data.pipeline import BatchIterator
from perl_jax.errors import Interrupted, Stopped, TrainingError, require
from perl_jax.runs import owner, shown
from perl_jax.runs.folder import begin as begin_run
from perl_jax.runs.folder import clear
from perl_jax.runs.metrics import (
    FILE_NAME,
    MetricsWriter,
    NoMetrics,
    SamplesWriter,
    encode_row,
    read_metrics,
)
from perl_jax.runs.profile import Profile
from perl_jax.runs.run import Run
from perl_jax.runtime import files, hosts, progress, stopping
from perl_jax.runtime.hosts import Termination
from perl_jax.runtime.progress import Progress
from perl_jax.training.configs import TrainingConfig
from perl_jax.training.cost import Timings
from perl_jax.training.keepers import Keeper, open_keeper
from perl_jax.training.state import TrainState

# Is called with each step's number and metrics.
OnStep = Callable[[dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Loop:
    """What distinguishes the loops of SFT, reward models, DPO and RL.

    Attributes:
        job: The name that messages and the progress line begin with.
        advance: (state, batch) -> (state, metrics, seconds of each phase by name): one step. The
            metrics have the key `finite`.
        batches: The endless batches of training; a checkpoint holds their cursor.
        validate: state -> (metrics, samples for `runs.metrics.SamplesWriter`); None: no validation.
        best: The validation metric whose best step is returned (higher is better); None: the last
            step is.
        shown: Names of the metrics on the progress line.
        facts: Constant numbers, written with the first step's metrics.
        sample: state -> samples of what the policy writes; called before the first step and, if
            there is no validation, every `evaluate_every` steps and at the end. None: there are
            none.
        show_samples: How many samples at a time are printed, too.
    """

    job: str
    advance: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any], dict[str, float]]]
    batches: BatchIterator
    validate: Callable[[TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None
    best: str | None
    shown: tuple[str, ...]
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sample: Callable[[TrainState], list[dict[str, Any]]] | None = None
    show_samples: int = 0


def train(
    config: TrainingConfig,
    state: TrainState,
    loop: Loop,
    run: Run | None = None,
    on_step: OnStep | None = None,
) -> tuple[TrainState, Timings, list[dict[str, Any]]]:
    """Runs the loop to `config.steps`; returns the best or last state, timings, rows of metrics.

    The state is the best one if `loop.best` is set, otherwise the last. The rows are {"step": step,
    metric: number, ...}, one per step, and are empty on processes that do not write.

    With a folder the loop begins at the newest checkpoint there. A new run's settings are written
    before the first step, so that a command that is refused leaves nothing. A checkpoint is written
    after the step's metrics, and after the step was found to be finite. A resumed run deletes the
    metrics that were written after its checkpoint and computes them again, bit for bit.

    Without a folder nothing is written, and the best state is a copy on the devices.

    Args:
        config: How long to train, how often to validate and to save.
        state: The state of step 0; its arrays are donated.
        loop: The job.
        run: The opened run; None: a run without a folder.
        on_step: Called after each step with the step's row, on the process that writes; None:
            nothing is called.

    Raises:
        UserError: If a run without a folder has a setting that writes into one (`tensorboard`,
            `wandb`, `profile`), or if the checkpoints do not fit.
        TrainingError: For NaN or infinity; the last good checkpoint stays.
        Stopped: After SIGTERM to any process of a run with a folder. The step is made and saved; if
            its rewards wait for a server or another process, the step before is saved. A validation
            that waits ends without a checkpoint.
        Interrupted: Likewise after Ctrl-C; a second Ctrl-C raises KeyboardInterrupt at once.
    """
    folder = None if run is None else run.folder
    if folder is None:
        _require_no_files(config)
    if run is not None:
        clear(run)
    timings, rows, writes = Timings(), [], hosts.is_writer()
    with contextlib.closing(open_keeper(folder, config.keep, loop.best)) as checkpoints:
        state, start = _resumed(checkpoints, state, loop)
        begin = int(state.step)
        if run is not None:
            begin_run(run)
        out = Outputs(config, loop, folder if writes else None, start, begin)
        # Without a folder there is nothing to save, and signals stay what they were.
        termination = None if folder is None else Termination()
        profile = Profile(files.path_of(folder or ".") / "profile", config.profiled)
        # Samples that are neither written nor printed are not made.
        sample = loop.sample if folder is not None or loop.show_samples else None
        with out, termination or contextlib.nullcontext(), profile, waits(termination):
            if sample is not None and start is None:
                out.keep_samples(begin, sample(state))
            for step in range(begin + 1, config.steps + 1):
                clock, cursor = time.perf_counter(), {"cursor": loop.batches.get_state()}
                try:
                    with profile.step(step):
                        state, metrics, phases = loop.advance(state, next(loop.batches))
                except stopping.Abandoned:
                    # A reward was waiting, so nothing has changed since the last step.
                    if step - 1 > (checkpoints.latest_step() or 0):
                        out.writer.sync()
                        checkpoints.save(state, cursor, None)
                    raise
                check_finite(folder, step, metrics)
                if folder is not None:
                    owner.check_held(folder)
                row = metrics | timings.add(step=time.perf_counter() - clock, **phases)
                row |= loop.facts if step == 1 else {}
                validated, last = None, step == config.steps
                if step % config.evaluate_every == 0 or last:
                    validated = _validate(loop, state, step, sample, out, row)
                out.writer.write(step, row)
                stop = 0 if termination is None else termination.asked()
                due = bool(stop) or last or step % config.checkpoint_every == 0
                if due or (validated and loop.best):
                    out.writer.sync()
                    cursor = {"cursor": loop.batches.get_state()}
                    checkpoints.save(state, cursor, validated if loop.best else None)
                out.show(step, row)
                if writes and (folder is None or on_step is not None):
                    encoded = encode_row(step, row)
                    if folder is None:
                        rows.append(encoded)
                    if on_step is not None:
                        on_step(encoded)
                if stop:
                    raise stopped(stop, step)
        if folder is not None:
            owner.check_held(folder)
        if loop.best is not None:
            state, _ = checkpoints.restore_best(_given_up(state))
    if folder is not None and writes:
        rows = read_metrics(folder / FILE_NAME)
    if rows:
        progress.say(shown.training_text(loop.job, rows, int(state.step), loop.best is not None))
    return state, timings, rows


def _resumed(checkpoints: Keeper, state: TrainState, loop: Loop) -> tuple[TrainState, int | None]:
    """Returns (state, step) of the newest checkpoint and sets the batches to its cursor; without
    checkpoints the given state and None.

    Args:
        checkpoints: The run's checkpoints.
        state: The state of step 0; its arrays are deleted if there is a checkpoint.
        loop: Has the batches.
    """
    if checkpoints.latest_step() is None:
        return state, None
    state, saved = checkpoints.restore_newest(_given_up(state))
    loop.batches.set_state(saved["cursor"])
    return state, int(state.step)


def _validate(
    loop: Loop,
    state: TrainState,
    step: int,
    sample: Callable[[TrainState], list[dict[str, Any]]] | None,
    out: Outputs,
    row: dict[str, Any],
) -> dict[str, float] | None:
    """Returns the validation metrics of a step, which are added to its row; None: the loop has no
    validation. Samples are kept in both cases.

    Args:
        loop: The loop.
        state: The state to measure.
        step: The step.
        sample: Makes samples where there is no validation; None: none are made.
        out: Keeps the samples.
        row: The step's metrics; changed in place.
    """
    if loop.validate is None:
        if sample is not None:
            out.keep_samples(step, sample(state))
        return None
    clock = time.perf_counter()
    validated, made = loop.validate(state)
    row |= validated | {"time/validate": time.perf_counter() - clock}
    out.keep_samples(step, made)
    return validated


class Outputs(contextlib.ExitStack):
    """What a run writes and prints: metrics, samples, the progress line. A context manager.

    Args:
        config: Settings of the job.
        loop: The loop.
        folder: The run's folder; None: nothing is written.
        start: The step that the run resumes from; None: it begins.
        begin: The last step that is done.

    Attributes:
        writer: Writes a row of metrics a step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        loop: Loop,
        folder: files.Path | None,
        start: int | None,
        begin: int,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._numbers = ShownNumbers(loop.shown)
        self.writer = self._samples = self._line = NoMetrics()
        if hosts.is_writer():
            self._line = Progress(loop.job, config.steps, begin)
        if folder is not None:
            dashboards = (config.tensorboard, config.wandb)
            self.writer = MetricsWriter(
                folder, start, *dashboards, config.wandb_project, config.wandb_name
            )
            self._samples = SamplesWriter(folder, start)

    def __enter__(self) -> Outputs:
        super().__enter__()
        for output in (self.writer, self._samples, self._line):
            self.enter_context(output)
        return self

    def keep_samples(self, step: int, made: list[dict[str, Any]]) -> None:
        """Writes samples of a step, and prints the first ones if the loop says so."""
        self._samples.write(step, made)
        if self._loop.show_samples and made:
            first = made[: self._loop.show_samples]
            progress.say(shown.sample_text(self._loop.job, step, first))

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows a step on the progress line, with the metrics that the loop names."""
        self._line.update(step, **self._numbers.after(step, row))


class ShownNumbers:
    """The numbers on a progress line. Those of the last validation stay, with their step.

    Args:
        names: The keys of the metrics, in the order in which they are shown.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._kept: dict[str, str] = {}

    def after(self, step: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the numbers to show after a step, by their names for people (`shown.label`).

        Args:
            step: The step.
            row: The metrics of the step.
        """
        found: dict[str, Any] = {}
        for name in self._names:
            if name.startswith("validation/"):
                if name in row:
                    self._kept[name] = f"{shown.number(row[name])} (step {step})"
                if name in self._kept:
                    found[shown.label(name)] = self._kept[name]
            elif name in row:
                found[shown.label(name)] = row[name]
        return found


def stopped(number: int, step: int | None) -> BaseException:
    """Returns the error that ends a run after a signal.

    Args:
        number: The signal: SIGTERM or SIGINT.
        step: The step, which has been saved; None: the run ended while it waited for rewards.
    """
    error, name = (Interrupted, "Ctrl-C") if number == signal.SIGINT else (Stopped, "SIGTERM")
    if step is None:
        return error(
            f"stopped by {name} while rewards were awaited; the same command resumes from the last "
            "checkpoint."
        )
    return error(
        f"stopped by {name} after step {step}, which is saved; the same command resumes from there."
    )


@contextlib.contextmanager
def waits(termination: Termination | None) -> Iterator[None]:
    """Context manager that turns `stopping.Abandoned` into the error that ends a run (`stopped`).

    Args:
        termination: Knows the signal; None: there is none, and nothing is abandoned.
    """
    try:
        yield
    except stopping.Abandoned:
        if termination is None:
            raise
        raise stopped(termination.asked(), None) from None


def _require_no_files(config: TrainingConfig) -> None:
    """Raises UserError for settings that write into a run's folder."""
    for name in ("tensorboard", "wandb", "profile"):
        value = vars(config)[name]
        require(not value, f"{name} is {value!r}, which is written into a run's folder; give run.")


def check_finite(folder: files.Path | None, step: int, metrics: dict[str, Any]) -> None:
    """Removes `finite` from the metrics; raises TrainingError if it is False.

    It is False if a loss, a gradient, an updated weight, a score or a log-probability is NaN or
    infinite.

    Args:
        folder: The run's folder, named in the message; None: a run without a folder.
        step: The step, named in the message.
        metrics: The step's metrics by name; changed in place.
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
    """Deletes the arrays of a state; returns their shapes, dtypes and shardings as a state.

    The caller then restores another state into the freed memory: the devices may not have room for
    two.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return abstract
