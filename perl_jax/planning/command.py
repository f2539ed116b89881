"""`perl-jax plan`: compiles a job's programs for a slice in one layout and adds up the memory and
traffic that they need.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from perl_jax.errors import require
from perl_jax.hub.attention_path import for_devices
from perl_jax.hub.presets import model_config
from perl_jax.models.language_model import LanguageModel
from perl_jax.planning import topology
from perl_jax.planning.config import JOBS, PlanConfig
from perl_jax.planning.jobs import plan_job, planned_model
from perl_jax.planning.measure import Measured, measure
from perl_jax.planning.pieces import Phase, Planned
from perl_jax.planning.reading import Role, plan_command
from perl_jax.runtime import json_values, sharding
from perl_jax.training.commands import TrainingCommand

# Printed wherever the compiler's estimate is shown.
CAVEAT = (
    "The compiler's own estimate for its instructions, without collectives, Pallas kernels "
    "(attention) and copies that run beside "
    "the arithmetic: a lower bound, to compare layouts with, and no measurement."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job needs on a slice in one layout.

    Attributes:
        config: The planned job.
        mesh: {mesh axis: number of devices along it}.
        usable: Bytes of a device that programs can use.
        programs: The measured programs.
    """

    config: PlanConfig
    mesh: dict[str, int]
    usable: int
    programs: tuple[Measured, ...]

    @property
    def peak(self) -> int | None:
        """The largest peak of all programs, in bytes per device; None if the compiler refused one
        without naming a size.
        """
        peaks = [program.peak for program in self.programs if program.peak is not None]
        return max(peaks) if len(peaks) == len(self.programs) else None

    @property
    def fits(self) -> bool:
        """Whether every program compiled, and none needs more memory than `usable`."""
        return (
            self.peak is not None
            and self.peak <= self.usable
            and not any(program.refused for program in self.programs)
        )

    @property
    def largest(self) -> Measured | None:
        """The program with the largest peak; None if there is no program or if any program's peak
        is unknown.
        """
        return (
            max(self.programs, key=lambda program: program.peak or 0)
            if self.programs and self.peak is not None
            else None
        )

    def of(self, *phases: Phase) -> list[Measured]:
        """Returns the programs of the given phases (start, step, measure), in the order of the
        plan.
        """
        return [program for program in self.programs if program.phase in phases]

    @property
    def link_bytes(self) -> int:
        """Bytes that one device sends to other chips in a step, over all programs of the step."""
        return sum(program.account.link_bytes for program in self.of("step") if program.account)

    @property
    def seconds(self) -> float:
        """A lower bound of the seconds of a step, for comparing layouts.

        For each program of the step it is the longest of three times at the chip's peak rates
        (operations, HBM traffic, link traffic); these are summed over the programs. Refused
        programs count as 0.
        """
        chip, devices = topology.chip(self.config.topology), math.prod(self.mesh.values())
        parts = [
            (
                p.flops / devices / chip.flops,
                p.account.hbm_bytes / chip.hbm_bandwidth,
                p.account.link_bytes / chip.ici_bandwidth,
            )
            for p in self.of("step")
            if p.account
        ]
        return sum(map(max, parts))


def plan(config: PlanConfig, only: str | None = None) -> Plan:
    """Returns the plan of a job: compiles and measures its programs.

    Raises UserError as `prepare` does.

    Args:
        config: The job, the slice and the layout.
        only: The name of the one program to compile, such as `learn`; None compiles all.
    """
    planned, mesh = prepare(config)
    pieces = [piece for piece in planned.pieces if only in (None, piece.name)]
    programs = tuple(measure(planned, piece, config.effort) for piece in pieces)
    return Plan(config, dict(mesh.shape), topology.chip(config.topology).usable, programs)


def prepare(config: PlanConfig) -> tuple[Planned, Mesh]:
    """Returns (the job's programs with abstract arguments, the slice's mesh); compiles nothing.

    Raises UserError if libtpu is missing, the slice or the model is unknown, sequences exceed the
    model's positions, or rows do not divide over the mesh.
    """
    devices = topology.topology(config.topology)
    mesh = sharding.make_mesh(config.mesh_config(len(devices)), devices)
    shape = model_config(
        config.model,
        dtype=config.dtype,
        param_dtype=config.dtype,
        remat=config.remat if config.job in JOBS else "none",
    )
    length = config.prompt_length + config.response_length
    require(
        length <= shape.max_positions,
        f"prompt_length + response_length is {length}; {config.model} has {shape.max_positions} "
        "positions.",
    )
    rows, parts = config.batch // config.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    split = config.job not in ("generate", "export")
    require(
        not split or rows % parts == 0,
        f"batch / microbatches is {rows} rows; it must be a multiple of the mesh's data x fsdp = "
        f"{parts}.",
    )
    lm = LanguageModel(for_devices(shape, mesh, config.attention), mesh)
    model = planned_model(lm, config.model, config.quantise, config.adapters == "sharded")
    job = config.job_config()
    if isinstance(job, TrainingCommand):
        return plan_job(model, job), mesh
    return plan_command(model, job, Role(config.lora if config.tuning == "lora" else None)), mesh


def as_json(found: Plan) -> dict[str, Any]:
    """Returns the plan as plain JSON types.

    The keys are `config`, `mesh`, `chip`, `peak_bytes_per_chip`, `fits`, `link_bytes`,
    `bound_seconds`, `programs` (one dictionary per program), `caveat` and `jax` (its version).
    Bytes are those of one chip.
    """
    chip = topology.chip(found.config.topology)

    def program(p: Measured) -> dict[str, Any]:
        """Returns one program's measures; `refused` is there only if the compiler refused the
        program, and traffic and cycles only if they were counted.
        """
        out: dict[str, Any] = {
            "name": p.name,
            "phase": p.phase,
            "of": p.of,
            "memory": p.memory,
            "peak_bytes": p.peak,
            "flops": p.flops,
            "seconds_to_compile": p.seconds_to_compile,
        }
        if p.account is not None:
            cycles = p.account.cycles
            out |= {
                "hbm_bytes": p.account.hbm_bytes,
                "link_bytes": p.account.link_bytes,
                "collectives": [dataclasses.asdict(c) for c in p.account.collectives],
                "estimated_cycles": cycles,
                "estimated_seconds": cycles / chip.clock
                if chip.clock and cycles and found.config.effort == "full"
                else None,
            }
        if p.refused is not None:
            out["refused"] = dataclasses.asdict(p.refused)
        return out

    return {
        "config": json_values.to_dict(found.config),
        "mesh": found.mesh,
        "chip": {
            "usable_bytes": found.usable,
            "flops": chip.flops,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "ici_bandwidth": chip.ici_bandwidth,
        },
        "peak_bytes_per_chip": found.peak,
        "fits": found.fits,
        "link_bytes": found.link_bytes,
        "bound_seconds": found.seconds,
        "programs": [program(p) for p in found.programs],
        "caveat": CAVEAT,
        "jax": jax.__version__,
    }
