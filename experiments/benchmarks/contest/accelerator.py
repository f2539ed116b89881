"""perl_jax alone on an accelerator, at a size beside which no other contender fits: how near it
comes to the device's own rates.

Claim     On one GPU, a Llama of 8B in bfloat16: a reward step runs at more than 45 % of the rate of
          large products, and decoding reads weights and caches at more than 60 % of a copy's
          bandwidth.
Command   CONTEST_SIZE=8b python experiments/benchmarks/contest/accelerator.py --jobs
          generate,reward-equal,reward-ragged,rl-function
Hardware  one NVIDIA H200 (141 GB; 32 GiB are used)
Time      2 minutes
Numbers   reward steps 0.172 s (60 %) and 0.186 s ragged (56 %); a decode step of 32 rows 6.0 ms,
          2,557 of 4,104 GB/s (62 %); a GRPO step 1.20 s (62 %)

The work is the contest's (`work.py`), its weights drawn on the device. By job:

    reward-equal, reward-ragged   an update of a reward model on 8 pairs
    generate                      32 samples of 128 tokens; the seconds of a decode step are the
difference between those of
                                  responses of 128 and of 8 tokens, divided by the 120 steps
    rl-model, rl-function         a whole step

Shares are of a large bfloat16 product's operations a second and of a large copy's bytes, read
and written (`ceiling_gpu.py`).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import ceiling
import ceiling_gpu
import contender
import contender_perl_jax
import jax
import work

from perl_jax.hub.model import Model, described
from perl_jax.runtime import trees
from perl_jax.training.commands import TrainingCommand

# New tokens of the sampling that the longer one is compared with.
SHORT = 8


def config_of(job: str, folder: pathlib.Path, options: argparse.Namespace) -> TrainingCommand:
    """The contest's, with what the command line says."""
    config = contender_perl_jax.config_of(job, folder, "lora")
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, packing=options.packing), remat=options.remat
    )


def drawn_model(config: TrainingCommand) -> Model:
    """The model that a job's config names, with weights that are drawn where they live."""
    lm, tokenizer = described(config, pathlib.Path(config.model))
    places = trees.map_named(lambda name, _: lm.base_shardings()[name], lm.abstract_base())
    base = jax.jit(lm.init_base, out_shardings=places)(jax.random.key(work.SEED))
    return contender_perl_jax.endless(Model("drawn", lm, base, tokenizer, "-"))


def median_seconds(step: Callable[[int], object], times: int) -> float:
    """After two steps that do not count."""
    seconds = []
    for number in range(times + 2):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    print(
        f"  first {seconds[0]:.1f} s, then {', '.join(f'{second:.4f}' for second in seconds[1:])}",
        flush=True,
    )
    return statistics.median(seconds[2:])


def kernels(step: Callable[[int], object], folder: pathlib.Path, most: int = 40) -> str:
    """One traced step: seconds and calls of each kernel, by what takes longest."""
    with jax.profiler.trace(folder):
        step(0)
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    seconds, calls = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9
                    calls[event.name] += 1
    total = sum(seconds.values())
    rows = [
        f"{taken * 1e3:9.2f} ms {calls[name]:6} {name[:110]}"
        for name, taken in seconds.most_common(most)
    ]
    return "\n".join((f"{total * 1e3:9.2f} ms in all kernels of all streams", *rows))


def measured(
    job: str,
    model: Model,
    config: TrainingCommand,
    folder: pathlib.Path,
    options: argparse.Namespace,
    rates: ceiling.Rates,
) -> dict[str, float]:
    """Prints a job's seconds and shares; returns them."""
    rows = contender.read_rows(folder, job)
    batches = contender_perl_jax.batches_of(model, rows, job, config)
    print(
        f"\n{job}: packed {batches.packer is not None}, attention {model.lm.config.attention}, "
        f"remat {model.lm.config.remat}",
        flush=True,
    )
    found: dict[str, float] = {}
    parts = contender.Parts()
    if job == "generate":
        taken, _ = contender_perl_jax.generate_step(model, config, batches)
        brief, _ = contender_perl_jax.generate_step(model, config, batches, SHORT)
        short = median_seconds(lambda number: brief(number, parts), options.steps)
    elif job.startswith("reward"):
        taken, _ = contender_perl_jax.reward_step(model, config, batches)
    else:
        taken, _ = contender_perl_jax.rl_step(model, config, batches, rows)
    step = lambda number: taken(number, parts)
    found["seconds"] = median_seconds(step, options.steps)
    if parts.seconds:
        print(
            "  the last step's parts: "
            + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.take().items())
        )
    medians = {"perl_jax": found["seconds"]}
    least, alone = (ceiling.phases(job, "lora", shared) for shared in (True, False))
    print(ceiling.text(least, alone, rates, medians))
    if job == "generate":
        (decoding,) = (phase for phase in least if phase.name == "decoding")
        each = (found["seconds"] - short) / (work.NEW_TOKENS - SHORT)
        read = decoding.bytes / (work.NEW_TOKENS - 1)
        found |= {"decode_seconds": each, "decode_share": read / each / rates.bytes}
        print(
            f"A decode step {each * 1e3:.2f} ms, {read / 1e9:.2f} GB: {read / each / 1e9:,.0f} "
            f"GB/s, {found['decode_share']:.0%} of a copy's."
        )
    memory = jax.local_devices()[0].memory_stats()
    if memory:
        found["peak_gib"] = memory["peak_bytes_in_use"] / 2**30
        print(f"Peak so far {found['peak_gib']:.1f} GiB.", flush=True)
    if options.profile:
        print(kernels(step, options.profile / job), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", default="reward-equal,generate", help="comma-separated")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--packing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument(
        "--profile",
        type=pathlib.Path,
        help="trace a step of each job into this folder, and print its kernels",
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
    options = parser.parse_args()
    jobs = options.jobs.split(",")
    unknown = sorted(set(jobs) - set(work.JOBS))
    if unknown:
        raise SystemExit(f"There is no job {', '.join(unknown)}; there are {', '.join(work.JOBS)}.")
    rates, device = ceiling_gpu.rates(), jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {work.NAME}; {ceiling.described_rates(rates)}",
        flush=True,
    )
    numbers: dict[str, object] = {
        "device": device,
        "size": work.NAME,
        "rates": dataclasses.asdict(rates),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "work"
        work.write(folder, weights=False)
        configs = {job: config_of(job, folder, options) for job in jobs}
        # They differ in what is done with it.
        model = drawn_model(configs[jobs[0]])
        for job in jobs:
            numbers[job] = measured(job, model, configs[job], folder, options, rates)
            if options.json is not None:
                options.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
