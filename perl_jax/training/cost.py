"""Measures what a run costs: seconds per step, memory, sizes."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
from collections.abc import Mapping

import jax
import numpy as np

from perl_jax.adapters.lora import trainable
from perl_jax.hub.attention_path import attention_paths
from perl_jax.hub.model import Model
from perl_jax.runs import checkpoints
from perl_jax.runs.folder import write_results
from perl_jax.runtime import files, hosts, trees
from perl_jax.runtime.programs import Program
from perl_jax.training.state import TrainState


@dataclasses.dataclass
class Timings:
    """The seconds of each phase of each step.

    Attributes:
        phases: The seconds of all steps so far, by the name of the phase.
    """

    phases: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, **seconds: float) -> dict[str, float]:
        """Records the seconds of a step's phases, by name; returns them as `time/PHASE` metrics."""
        for name, value in seconds.items():
            self.phases.setdefault(name, []).append(value)
        return {f"time/{name}": value for name, value in seconds.items()}

    def medians(self) -> dict[str, float]:
        """Returns the median seconds of each phase, by name.

        The first steps, which compile, hardly change a median.
        """
        return {name: statistics.median(values) for name, values in self.phases.items()}


def peak_measured() -> int | None:
    """Returns the peak bytes in use so far on this process's first device.

    A CPU device does not report them: there the peak memory of the whole process is returned.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_compiled(
    model: Model, state: TrainState, programs: Mapping[str, Program]
) -> dict[str, int]:
    """Returns the peak bytes of each program, by name.

    A peak is the bytes of base and state, plus the bytes that the compiler says the program needs
    beyond its arguments. Base and state are counted whole, the program's temporaries on one device,
    so the sum is the peak of a job on one device. The base is left out if no role reads it, as in
    full tuning. Programs that have not been compiled are missing.

    Args:
        model: Has the base.
        state: The train state.
        programs: The job's programs, by name.
    """
    tuned = any(role.weights is not None for role in state.roles.values())
    readers = [*state.roles.values(), *state.frozen.values()]
    needs_base = not tuned or any(role.weights is None for role in readers)
    resident = trees.size_bytes(state) + (trees.size_bytes(model.base) if needs_base else 0)
    accounts = {name: program.memory() for name, program in programs.items()}
    return {
        name: resident + max(account.beyond_arguments, 0)
        for name, account in accounts.items()
        if account is not None
    }


def write_cost(
    folder: files.Path,
    model: Model,
    state: TrainState,
    programs: Mapping[str, Program],
    timings: Timings,
) -> None:
    """Writes `cost.json` into the run's folder: sizes, seconds per step, memory, attention paths.

    The report compares tunings by these numbers. Sizes and memory are in bytes.
    `peak_bytes_measured_by_process` has `peak_measured` of each process, and `peak_bytes_measured`
    the largest. Seconds are medians of the process that writes. All processes must call this
    function.

    Args:
        folder: The run's folder.
        model: Has the base.
        state: The train state at the end.
        programs: The job's programs, by name.
        timings: The seconds of the run's steps.
    """
    peaks = peak_compiled(model, state, programs)
    medians = timings.medians()
    trained = sum(trees.count(trainable(role)) for role in state.roles.values())
    tuned = any(role.weights is not None for role in state.roles.values())
    measured = hosts.all_gather(np.asarray(peak_measured(), np.int64)).reshape(-1).tolist()
    cost = {
        "parameters_total": trained + (0 if tuned else trees.count(model.lm.abstract_base())),
        "parameters_trainable": trained,
        "checkpoint_bytes": checkpoints.newest_bytes(folder / "checkpoints"),
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
