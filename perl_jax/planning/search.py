"""Searches layouts of a job that fit a slice: meshes, microbatches and rematerialisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from perl_jax.errors import require
from perl_jax.planning import command, topology
from perl_jax.planning.command import Plan
from perl_jax.planning.config import PlanConfig

# The most devices along the tensor axis; with more, communication in every layer is too slow.
MOST_TENSOR = 8
MOST_MICROBATCHES = 16
# From the least recomputation to the most.
REMAT = ("none", "dots", "full")


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Yields mesh sizes (data, fsdp, tensor), each a power of two, those that split the weights
    least first.

    Their product is `devices`; tensor is at most MOST_TENSOR.

    Args:
        devices: The number of devices, a power of two.
    """
    powers = lambda most: [2**n for n in range(most.bit_length()) if most % 2**n == 0]
    for tensor in powers(min(devices, MOST_TENSOR)):
        for fsdp in powers(devices // tensor):
            yield devices // tensor // fsdp, fsdp, tensor


def search(config: PlanConfig, say: Callable[[str], None] = lambda _: None) -> list[Plan]:
    """Returns the plans of layouts that fit, ordered by their lower bound of seconds
    (`Plan.seconds`), fastest first.

    For each mesh the search finds the fewest microbatches that fit with full rematerialisation,
    then the least rematerialisation that fits with these. Cheap checks come first: what stays on a
    device (no compiling), then the update (the largest program), then all programs.

    Args:
        config: The job and the slice; `mesh`, `microbatches` and `remat` are ignored.
        say: Called with one line of text for each layout tried.

    Raises:
        UserError: As `command.prepare` does, or if the job has no update.
    """
    found = []
    for sizes in meshes(len(topology.topology(config.topology))):
        layout = dataclasses.replace(
            config, search=False, mesh="data={},fsdp={},tensor={}".format(*sizes)
        )
        whole = _fewest_microbatches(layout, say)
        if whole is None:
            continue
        for remat in REMAT:
            tried = dataclasses.replace(whole, remat=remat)
            if _update_fits(tried, say):
                plan = command.plan(tried)
                if plan.fits:
                    found.append(plan)
                    break
    return sorted(found, key=lambda plan: plan.seconds)


def _fewest_microbatches(layout: PlanConfig, say: Callable[[str], None]) -> PlanConfig | None:
    """Returns the layout with full rematerialisation and the fewest microbatches whose update fits;
    None if there is none.

    Tries 1, 2, 4, ... up to MOST_MICROBATCHES. Stops with None at the first number for which the
    batch does not divide evenly over microbatches and mesh, or if the arrays that stay on a device
    do not fit.

    Args:
        layout: The job on one mesh.
        say: Called with one line of text for each layout tried.
    """
    microbatches = 1
    while microbatches <= MOST_MICROBATCHES:
        tried = dataclasses.replace(layout, microbatches=microbatches, remat="full")
        if not _divides(tried):
            return None
        if not _resident_fits(tried):
            say(f"{tried.mesh}: what stays on a device is too large")
            return None
        if _update_fits(tried, say):
            return tried
        microbatches *= 2
    return None


def _divides(config: PlanConfig) -> bool:
    """Returns whether the batch divides evenly over microbatches and the mesh's data and fsdp
    axes.
    """
    mesh = config.mesh_config(1)
    return config.batch % (config.microbatches * mesh.data * mesh.fsdp) == 0


def _resident_fits(config: PlanConfig) -> bool:
    """Returns whether the arrays that stay on a device during the job fit into its memory; compiles
    nothing.
    """
    planned, _ = command.prepare(config)
    return sum(planned.resident_bytes().values()) <= topology.chip(config.topology).usable


def _update_fits(config: PlanConfig, say: Callable[[str], None]) -> bool:
    """Returns whether the update fits into device memory, by compiling it.

    Args:
        config: The layout.
        say: Called with one line of text: the layout, the peak and whether it fits.

    Raises:
        UserError: The job has no update.
    """
    plan = command.plan(config, only="learn")
    require(bool(plan.programs), "The job has no update to search for.")
    peak = "?" if plan.peak is None else f"{plan.peak / 2**30:.1f}"
    say(
        f"{config.mesh}, {config.microbatches} part(s), remat {config.remat}: update {peak} GiB, "
        f"{'fits' if plan.fits else 'does not fit'}"
    )
    return plan.fits
