"""What adapters save on TPU slices, by the TPU compiler's own account.

Claim     For reward and RL on Gemma 2 2B, 9B, 27B and Llama 3.1 8B, 70B at a batch of 128, on v5e,
          v5p and v6e: the peak memory a chip with adapters and with full tuning on the smallest
          slice where full tuning fits, and the smallest slice on which adapters fit. And: at
          constant work a chip, the bytes a chip sends do not grow from 8 to 256 chips.
Command   python experiments/planning.py --table memory     (and --table scaling); resumes, a file a
          plan
Hardware  2 CPU cores, no TPU; libtpu (pip install -c constraints.txt -e '.[plan]')
Time      the memory table about an hour, the scaling table 3 minutes
Numbers   docs/planning.md has the memory table: adapters need 20 to 55 % of full tuning's memory
          for reward, 16 to 39 % for RL. Sent a chip: 7.149 GB on 8 chips, 7.173 on 256

Both sides: bfloat16 frozen weights and activations, Adafactor, float32 trained weights, every
layer recomputed in the backward
pass, weights split over all chips (fsdp), four rows a chip at a time, or one where four do not
fit. Full tuning's frozen
reference and reward model are bfloat16 copies. 512 + 128 tokens a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from perl_jax.planning import command, topology
from perl_jax.planning.config import PlanConfig
from perl_jax.runtime import files

JOBS = ("reward", "rl")
MODELS = ("gemma2-2b", "gemma2-9b", "gemma2-27b", "llama3.1-8b", "llama3.1-70b")
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# Comparisons or episodes that a chip has at a time: fewer where these do not fit.
ROWS = (4, 1)


class Plans:
    """Plans by their settings, each program's kept in a file: a table that was interrupted goes
    on.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, config: PlanConfig, only: str | None = None) -> dict[str, Any]:
        """The plan of all programs together, or of those of one name: config, programs,
        peak_bytes_per_chip, link_bytes, fits.
        """
        planned, _ = command.prepare(config)
        names = dict.fromkeys(piece.name for piece in planned.pieces if only in (None, piece.name))
        parts = [self._program(config, name) for name in names]
        return {
            "config": parts[0]["config"],
            "programs": [program for part in parts for program in part["programs"]],
            "peak_bytes_per_chip": max(part["peak_bytes_per_chip"] or math.inf for part in parts),
            "link_bytes": sum(part["link_bytes"] for part in parts),
            "fits": all(part["fits"] for part in parts),
        }

    def _program(self, config: PlanConfig, name: str) -> dict[str, Any]:
        parts = (
            config.job,
            config.model,
            config.topology,
            config.mesh,
            config.tuning,
            config.microbatches,
            config.batch,
            name,
        )
        path = self.folder / ("_".join(map(str, parts)).replace(":", "-") + ".json")
        if not path.exists():
            print(*parts, "...", file=sys.stderr)
            files.write_json(path, command.as_json(command.plan(config, only=name)))
        return files.read_json(path)


def layout(config: PlanConfig, rows: int) -> PlanConfig:
    """Split over all chips along fsdp, `rows` of a batch on a chip at a time; chips beyond the
    batch along tensor.
    """
    chips = len(topology.topology(config.topology))
    microbatches = max(1, config.batch // (chips * rows))
    fsdp = math.gcd(chips, config.batch // microbatches)
    return dataclasses.replace(
        config, mesh=f"fsdp={fsdp},tensor={chips // fsdp}", microbatches=microbatches
    )


def fitting(plans: Plans, config: PlanConfig) -> dict[str, Any] | None:
    """The plan with as many rows at a time as fit; None: not even one does.

    The update, the largest program, is compiled first: where it does not fit the others are not
    needed.
    """
    layouts = dict.fromkeys(layout(config, rows) for rows in ROWS)
    planned, _ = command.prepare(next(iter(layouts)))
    resident = planned.resident_bytes()
    # Gradients are all there before the first weight moves: the update is clipped by their common
    # norm.
    if sum(resident.values()) + resident["trained roles"] > topology.chip(config.topology).usable:
        return None
    for tried in layouts:
        if plans(tried, only="learn")["fits"]:
            whole = plans(tried)
            if whole["fits"]:
                return whole
    return None


def smallest(plans: Plans, config: PlanConfig, generation: str) -> dict[str, Any] | None:
    """The plan on the smallest slice of a generation that fits."""
    for shape in SLICES[generation]:
        found = fitting(plans, dataclasses.replace(config, topology=f"{generation}:{shape}"))
        if found is not None:
            return found
    return None


def memory_rows(
    plans: Plans, models: tuple[str, ...], jobs: tuple[str, ...]
) -> Iterator[list[str]]:
    yield ["", *SLICES]
    for job in jobs:
        for model in models:
            start = PlanConfig(job=job, model=model, topology="v5e:1x1")
            yield [
                f"{job}, {model}",
                *(memory_cell(plans, start, generation) for generation in SLICES),
            ]


def memory_cell(plans: Plans, start: PlanConfig, generation: str) -> str:
    """Slice and parts of a batch; GiB a chip, full tuning's and adapters'; GB sent likewise; where
    adapters fit.
    """
    full = smallest(plans, dataclasses.replace(start, tuning="full"), generation)
    least = smallest(plans, start, generation)
    fits = "none" if least is None else slice_of(least)
    if full is None:
        return f"full tuning: none; adapters: {fits}"
    there = plans(
        dataclasses.replace(
            start,
            **{field: full["config"][field] for field in ("topology", "mesh", "microbatches")},
        )
    )
    most, there_bytes = full["peak_bytes_per_chip"], there["peak_bytes_per_chip"]
    ratio = f"{there_bytes / most:.0%}".replace("%", " %")
    peaks = f"{most / 2**30:.1f}, {there_bytes / 2**30:.1f} ({ratio})"
    sent = f"{full['link_bytes'] / 1e9:.0f}, {there['link_bytes'] / 1e9:.0f}"
    return f"{slice_of(full)} / {full['config']['microbatches']}: {peaks}; {sent}; {fits}"


def slice_of(plan: dict[str, Any]) -> str:
    """2x4 of v5e:2x4."""
    return plan["config"]["topology"].partition(":")[2]


def scaling_rows(plans: Plans, model: str, job: str) -> Iterator[list[str]]:
    yield [
        "chips",
        "mesh",
        "batch",
        "update: sent a chip, GB",
        "whole step: sent a chip, GB",
        "peak GiB",
    ]
    for shape in SLICES["v5e"][2:]:
        chips = math.prod(map(int, shape.split("x")))
        config = PlanConfig(
            job=job,
            model=model,
            topology=f"v5e:{shape}",
            batch=8 * chips,
            mesh=f"data={chips // 8},fsdp=8",
        )
        found = plans(config)
        learn = next(program for program in found["programs"] if program["name"] == "learn")
        numbers = [
            f"{learn['link_bytes'] / 1e9:.3f}",
            f"{found['link_bytes'] / 1e9:.3f}",
            f"{found['peak_bytes_per_chip'] / 2**30:.2f}",
        ]
        yield [str(chips), config.mesh or "", str(config.batch), *numbers]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=("memory", "scaling"), required=True)
    parser.add_argument(
        "--model", choices=MODELS, help="one model only; of the scaling table gemma2-2b without it"
    )
    parser.add_argument(
        "--job", choices=JOBS, help="one job only; of the scaling table reward without it"
    )
    parser.add_argument("--run", default="runs/planning", help="folder of the plans")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    plans = Plans(pathlib.Path(arguments.run))
    if arguments.table == "memory":
        rows = memory_rows(
            plans,
            (arguments.model,) if arguments.model else MODELS,
            (arguments.job,) if arguments.job else JOBS,
        )
    else:
        rows = scaling_rows(plans, arguments.model or "gemma2-2b", arguments.job or "reward")
    for index, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if index == 0:
            print("|" + "---|" * len(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
