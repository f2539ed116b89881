"""A run's folder: its config, its cost, and the training loop that resumes from its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import resource
import statistics
import sys
import time
from typing import Any, Callable, Iterator, Mapping

import jax
import numpy as np

from perl_jax import checkpoint, config as config_lib, hosts, trees
from perl_jax.checkpoint import Checkpoints
from perl_jax.config import Stopped, TrainingError
from perl_jax.hosts import Termination
from perl_jax.lora import trainable
from perl_jax.loops import stands
from perl_jax.loops.jobs import JobConfig
from perl_jax.loops.model import Model, attention_paths
from perl_jax.loops.profile import Profile
from perl_jax.metrics import MetricsWriter, NoMetrics, Progress, SamplesWriter, environment
from perl_jax.programs import Program
from perl_jax.state import TrainState

# What a run stands on, beside its config.json.
STANDS = "stands.json"
# What may differ between the command that began a run and the one that resumes it.
_FREE = ("checkpoint_every", "keep", "tensorboard", "wandb", "mesh", "profile", "compile_cache")


def open_run(job: str, config: Any) -> pathlib.Path:
    """Makes the run's folder, or checks that the one there belongs to the same command.

    Raises UserError naming every setting that differs: a resumed run with another learning rate
    would be neither the old run nor a new one. So are processes with different settings refused, and
    a folder that is not the same one on all of them. Refused in the same way is a run, finished or not,
    of which anything that it stands on has changed since it began (`stands`, noted in stands.json).
    """
    folder = pathlib.Path(config.run)
    path = folder / "config.json"
    values = {"job": job, **config_lib.to_dict(config)}
    now = stands.prints(job, config)
    if hosts.is_writer() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Before the config, whose presence says that the run has begun.
        config_lib.write_json(folder / STANDS, now)
        config_lib.write_json(path, {"config": values, "environment": environment(), "command": sys.argv})
    hosts.barrier("run opened")
    config_lib.require(path.exists(), f"There is no {path} on process {jax.process_index()}; --run must be a folder that all hosts share.")
    found = config_lib.read_json(path)
    whole = isinstance(found, dict) and isinstance(found.get("config"), dict)
    config_lib.require(whole, f"{path} does not say which settings the run began with; use another --run.")
    differing = _differences(found["config"], values)
    config_lib.require(
        not differing, f"{folder} holds a run with other settings ({'; '.join(differing)}); use the same ones, or another --run."
    )
    _check_stands(folder, now)
    return folder


def _check_stands(folder: pathlib.Path, now: stands.Prints) -> None:
    """UserError naming what a run stands on that is not what it was."""
    if not hosts.agreed((folder / STANDS).exists()):
        if hosts.is_writer():
            print(f"{folder} was begun by an earlier version, which did not note what it stands on: whether that has changed is not known.", flush=True)
        return
    before = config_lib.read_json(folder / STANDS)
    config_lib.require(isinstance(before, dict), f"{folder / STANDS} does not hold a JSON object; use another --run.")
    other = stands.changed(before, now)
    config_lib.require(
        not other, f"{folder} holds a run that began with something else: changed since {'has' if len(other) == 1 else 'have'} {', '.join(other)}; put back what was there, or use another --run."
    )


def finished(*paths: pathlib.Path) -> bool:
    """Whether all of these are there; on several hosts as the first one sees it."""
    return hosts.agreed(all(path.exists() for path in paths))


def write_results(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """JSON files by their names, written once, in this order."""
    if hosts.is_writer():
        for name, value in results.items():
            config_lib.write_json(folder / name, value)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    out = []
    for name in sorted({*found, *wanted} - {"run", *_FREE}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            out.append(f"{prefix}{name} was {a!r}, is now {b!r}")
    return out


@dataclasses.dataclass
class Timings:
    """Seconds of each phase of each step; medians leave the compiling first steps out."""

    phases: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, **seconds: float) -> dict[str, float]:
        """Records one step's phases; returns them as metrics."""
        for name, value in seconds.items():
            self.phases.setdefault(name, []).append(value)
        return {f"time/{name}": value for name, value in seconds.items()}

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.phases.items()}


def peak_measured() -> int | None:
    """Peak bytes on this process's first device, or of the process where the device (a CPU) keeps no account."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_compiled(model: Model, state: TrainState, programs: Mapping[str, Program]) -> dict[str, int]:
    """For each program: what stays resident (base, state) plus what the compiler says it adds.

    Global bytes of base and state, and one device's temporaries: on one device the peak of a job.
    Full tuning reads no base, so none is counted for it.
    """
    tuned = any(role.weights is not None for role in state.roles.values())
    readers = [*state.roles.values(), *state.frozen.values()]
    needs_base = not tuned or any(role.weights is None for role in readers)
    resident = trees.size_bytes(state) + (trees.size_bytes(model.base) if needs_base else 0)
    accounts = {name: program.memory() for name, program in programs.items()}
    return {name: resident + max(account.beyond_arguments, 0) for name, account in accounts.items() if account is not None}


def write_cost(folder: pathlib.Path, model: Model, state: TrainState, programs: Mapping[str, Program], timings: Timings) -> None:
    """`cost.json`: sizes, seconds a step, memory, attention paths; what the report compares tunings by.

    peak_bytes_measured: of the process (`peak_measured`) where it is largest; those of each are beside
    it. Seconds are of the process that writes.
    """
    peaks = peak_compiled(model, state, programs)
    medians = timings.medians()
    trained = sum(trees.count(trainable(role)) for role in state.roles.values())
    tuned = any(role.weights is not None for role in state.roles.values())
    measured = hosts.every(np.asarray(peak_measured(), np.int64)).reshape(-1).tolist()
    cost = {
        "parameters_total": trained + (0 if tuned else trees.count(model.lm.abstract_base())),
        "parameters_trainable": trained,
        "checkpoint_bytes": checkpoint.newest_bytes(folder / "checkpoints"),
        "state_bytes": trees.size_bytes(state),
        "base_bytes": trees.size_bytes(model.base),
        "seconds_per_step": medians.get("step"),
        "phases": {name: value for name, value in medians.items() if name != "step"},
        "peak_bytes_compiled": max(peaks.values(), default=None),
        "peak_bytes_by_program": peaks,
        "peak_bytes_measured": max(measured),
        "peak_bytes_measured_by_process": measured,
        "compilations": sum(program.compilations for program in programs.values()),
        "attention": attention_paths(model.lm),
    }
    write_results(folder, {"cost.json": cost})


@dataclasses.dataclass(frozen=True)
class Loop:
    """One job's training loop: what differs between SFT, reward and RL.

    advance(state, batch) -> (state, metrics, seconds by phase): one update; metrics hold `finite`.
    batches: an iterator with get_state and set_state. validate(state) -> (metrics, samples for
    `metrics.SamplesWriter`), or None.
    best: the validation metric whose best step is kept besides the last ones.
    shown: metric names for the progress line. facts: numbers that stay as they are, written with the
    first step's metrics.
    """

    job: str
    advance: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any], dict[str, float]]]
    batches: Iterator
    validate: Callable[[TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None
    best: str | None
    shown: tuple[str, ...]
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def train(folder: pathlib.Path, config: JobConfig, state: TrainState, loop: Loop) -> tuple[TrainState, Timings]:
    """Runs the loop from the newest checkpoint (or step 0) to `config.steps`.

    A checkpoint is written after the step's metrics and after its finiteness was seen: NaN or
    infinity raises TrainingError and leaves the last good one in place. On resume the metrics
    written after the checkpoint are cut off and made again, bit for bit. SIGTERM (to any process)
    ends the run with Stopped, after the step that is being done and a checkpoint of it.
    """
    timings = Timings()
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=config.keep, best=loop.best)) as checkpoints:
        state = _train(folder, config, state, loop, checkpoints, timings)
    return state, timings


def _train(folder: pathlib.Path, config: JobConfig, state: TrainState, loop: Loop, checkpoints: Checkpoints, timings: Timings) -> TrainState:
    """The steps from the newest checkpoint on; the best validated state where the loop has one."""
    start = checkpoints.latest_step()
    if start is not None:
        state, saved = checkpoints.restore_newest(_given_up(state))
        start = int(state.step)
        loop.batches.set_state(saved["cursor"])
    begin = int(state.step)
    writes = hosts.is_writer()
    writer = MetricsWriter(folder, start, config.tensorboard, config.wandb) if writes else NoMetrics()
    samples = SamplesWriter(folder, start) if writes else NoMetrics()
    progress = Progress(loop.job, config.steps, begin) if writes else NoMetrics()
    with writer, progress, Termination() as termination, Profile(folder / "profile", config.profiled) as profile:
        for step in range(begin + 1, config.steps + 1):
            clock = time.perf_counter()
            with profile.step(step):
                state, metrics, phases = loop.advance(state, next(loop.batches))
            check_finite(folder, step, metrics)
            row = metrics | timings.add(step=time.perf_counter() - clock, **phases)
            row |= loop.facts if step == 1 else {}
            validated = None
            if loop.validate is not None and (step % config.evaluate_every == 0 or step == config.steps):
                clock = time.perf_counter()
                validated, shown = loop.validate(state)
                row |= validated | {"time/validate": time.perf_counter() - clock}
                samples.write(step, shown)
            writer.write(step, row)
            stop = termination.asked()
            if stop or step % config.checkpoint_every == 0 or step == config.steps or (validated and loop.best):
                writer.sync()
                checkpoints.save(state, {"cursor": loop.batches.get_state()}, validated if loop.best else None)
            progress.update(step, **{name.split("/")[-1]: row[name] for name in loop.shown if name in row})
            if stop:
                raise Stopped(f"stopped by SIGTERM after step {step}, which is saved; the same command resumes from there.")
    if loop.best is not None:
        state, _ = checkpoints.restore(_given_up(state), checkpoints.best_step())
    return state


def check_finite(folder: pathlib.Path, step: int, metrics: dict[str, Any]) -> None:
    """Stops the run on NaN or infinity in a loss, gradient, updated weight or log-probability."""
    if not bool(metrics.pop("finite")):
        bad = [name for name, value in metrics.items() if value != value or abs(value) == float("inf")]
        where = f" ({', '.join(bad)})" if bad else ""
        raise TrainingError(
            f"Step {step} gave NaN or infinity{where}; the run stopped, its last good checkpoint is in {folder / 'checkpoints'}. "
            "A lower learning rate or a smaller clip_norm may help."
        )


def _given_up(state: TrainState) -> TrainState:
    """Shapes and places of a state, whose arrays are gone afterwards: another one is read into their place, where not both may fit."""
    abstract = _abstract(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return abstract


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
