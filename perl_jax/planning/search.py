"""Layouts of a job on a slice that fit: meshes, microbatches and rematerialisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from perl_jax.errors import require
from perl_jax.planning import command, topology
from perl_jax.planning.command import Plan
from perl_jax.planning.config import PlanConfig

# Heads and feed-forward layers are not split further: beyond it all layers wait for each other too
# often.
MOST_TENSOR = 8
MOST_MICROBATCHES = 16
# From the least recomputed to the most.
REMAT = ("none", "dots", "full")


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) in powers of two, the least splitting first."""
    powers = lambda most: [2**n for n in range(most.bit_length()) if most % 2**n == 0]
    for tensor in powers(min(devices, MOST_TENSOR)):
        for fsdp in powers(devices // tensor):
            yield devices // tensor // fsdp, fsdp, tensor


def search(config: PlanConfig, say: Callable[[str], None] = lambda _: None) -> list[Plan]:
    """The layouts that fit, by the seconds that the chip's figures allow (`Plan.seconds`), best
    first.

    For each mesh: as few microbatches as fit with everything recomputed, then as little recomputed
    as fits with those. What stays on a device decides first, and costs no compiling; then the
    update, the largest program; the others are compiled for layouts that fit so far. say: gets a
    line for each layout.
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
            if _fits(tried, say):
                plan = command.plan(tried)
                if plan.fits:
                    found.append(plan)
                    break
    return sorted(found, key=lambda plan: plan.seconds)


def _fewest_microbatches(layout: PlanConfig, say: Callable[[str], None]) -> PlanConfig | None:
    """The layout with everything recomputed, in as few parts as fit; None: it cannot be."""
    microbatches = 1
    while microbatches <= MOST_MICROBATCHES:
        tried = dataclasses.replace(layout, microbatches=microbatches, remat="full")
        if not _divides(tried):
            return None
        if not _stays(tried):
            say(f"{tried.mesh}: what stays on a device is too large")
            return None
        if _fits(tried, say):
            return tried
        microbatches *= 2
    return None


def _divides(config: PlanConfig) -> bool:
    mesh = config.mesh_config(1)
    return config.batch % (config.microbatches * mesh.data * mesh.fsdp) == 0


def _stays(config: PlanConfig) -> bool:
    planned, _ = command.prepare(config)
    return sum(planned.resident_bytes().values()) <= topology.chip(config.topology).usable


def _fits(config: PlanConfig, say: Callable[[str], None]) -> bool:
    plan = command.plan(config, only="learn")
    require(bool(plan.programs), "The job has no update to search for.")
    peak = "?" if plan.peak is None else f"{plan.peak / 2**30:.1f}"
    say(
        f"{config.mesh}, {config.microbatches} part(s), remat {config.remat}: update {peak} GiB, "
        f"{'fits' if plan.fits else 'does not fit'}"
    )
    return plan.fits
