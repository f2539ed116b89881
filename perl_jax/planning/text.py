"""Formats a plan as text for a terminal."""

from __future__ import annotations

import math

from perl_jax.planning import topology
from perl_jax.planning.command import CAVEAT, Plan
from perl_jax.planning.measure import Measured

_BUFFERS = 5


def gib(size: int | None) -> str:
    """Returns a number of bytes in GiB with two decimals and without the unit, `12.30`; `?` for
    None.
    """
    return "?" if size is None else f"{size / 2**30:.2f}"


def table(rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table; the first column is aligned left, the others right.

    Args:
        rows: The cells of each row, as many in each.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def describe(found: Plan) -> str:
    """Returns the plan as text: memory by component and program, operations and traffic, and
    whether it fits.
    """
    config = found.config
    mesh = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    how = (
        f"{config.tuning} tuning, {config.dtype}, remat {config.remat}, batch {config.batch} in "
        f"{config.microbatches} part(s)"
    )
    lengths = f"{config.prompt_length} + {config.response_length} tokens"
    lines = [f"{config.job} of {config.model} on {config.topology} ({mesh}): {how}, {lengths}.", ""]
    lines += ["Memory a device, GiB, while each program runs"]
    running = found.of("step", "measure")
    lines += table(_memory(running))
    if found.of("start"):
        lines += [
            "",
            "Loading, first values and checkpoints, GiB a device; of each program the leaf with "
            "the largest peak",
        ]
        lines += table(_starts(found.of("start")))
    lines += ["", "A step, and what measures it", *table(_work(found, running))]
    lines += [f"  {line}" for program in running for line in _collectives(program)]
    for program in found.programs:
        lines += _refusal(program)
    verdict = "fits" if found.fits else "does not fit"
    largest = f" ({_named(found.largest)})" if found.largest is not None else ""
    lines += [
        "",
        f"Peak {gib(found.peak)} GiB a device{largest} of {gib(found.usable)} usable: it "
        f"{verdict}.",
    ]
    seconds = sum(program.seconds_to_compile for program in found.programs)
    lines += [
        f"The chip's operations, HBM and links allow a step in {found.seconds:.2f} s at the least."
    ]
    if config.effort == "full":
        lines += [f"Estimated seconds: {CAVEAT}"]
    lines += [f"Compiled in {seconds:.0f} s with effort {config.effort}."]
    return "\n".join(lines)


def _named(program: Measured) -> str:
    """Returns a program's name, with the name of its leaf if the program works on one leaf."""
    return f"{program.name} of {program.of}" if program.of else program.name


def _starts(programs: list[Measured]) -> list[list[str]]:
    """Returns the table of programs of the start, with a row per name.

    Its columns are the number of shapes, and for the program with the largest peak: its leaf, its
    memory besides what stays on the devices, and its peak.
    """
    rows = [["", "shapes", "leaf", "beside", "peak"]]
    for name in dict.fromkeys(program.name for program in programs):
        same = [program for program in programs if program.name == name]
        # A peak of None was refused without a size: it is above what is available.
        worst = max(
            same, key=lambda program: float("inf") if program.peak is None else program.peak
        )
        beside = sum(
            size
            for part, size in worst.memory.items()
            if part in ("batch", "padding", "cache", "temporaries", "code")
        )
        rows.append([name, str(len(same)), worst.of or "all", gib(beside), gib(worst.peak)])
    return rows


def _memory(programs: list[Measured]) -> list[list[str]]:
    """Returns the table of memory: a row per component, a column per program, and a last row of
    peaks, in GiB a device.
    """
    components = list(dict.fromkeys(name for program in programs for name in program.memory))
    rows = [["", *(program.name for program in programs)]]
    rows += [
        [
            name,
            *(gib(program.memory[name]) if name in program.memory else "-" for program in programs),
        ]
        for name in components
    ]
    return [*rows, ["peak", *(gib(program.peak) for program in programs)]]


def _work(found: Plan, programs: list[Measured]) -> list[list[str]]:
    """Returns the table of work, one column per program; the first row has the programs' names.

    The other rows are, per device, TFLOP, GB of HBM traffic and GB sent over links, then the
    estimated seconds. Unknown numbers are "-". Seconds are known only with effort full and if the
    chip's clock rate is known.

    Args:
        found: The plan.
        programs: The programs to show.
    """
    clock = topology.chip(found.config.topology).clock
    # Programs compiled with effort quick are slower than the ones that run.
    known = clock is not None and found.config.effort == "full"
    seconds = lambda account: (
        f"{account.cycles / clock:.3f}" if known and account and account.cycles else "-"
    )
    devices = math.prod(found.mesh.values())
    return [
        ["", *(program.name for program in programs)],
        ["TFLOP a device", *(f"{program.flops / devices / 1e12:.2f}" for program in programs)],
        [
            "HBM GB a device",
            *(
                f"{program.account.hbm_bytes / 1e9:.2f}" if program.account else "-"
                for program in programs
            ),
        ],
        [
            "links GB a device",
            *(
                f"{program.account.link_bytes / 1e9:.3f}" if program.account else "-"
                for program in programs
            ),
        ],
        ["estimated seconds", *(seconds(program.account) for program in programs)],
    ]


def _collectives(program: Measured) -> list[str]:
    """Returns [the line that names a program's collectives], or [] if they were not counted."""
    if program.account is None:
        return []
    each = [
        f"{c.runs} {c.kind} over {c.group} ({c.link_bytes / 1e9:.3f} GB)"
        for c in program.account.collectives
    ]
    return [f"{program.name}: {', '.join(each) or 'no collectives'}"]


def _refusal(program: Measured) -> list[str]:
    """Returns the lines that say why the compiler refused a program; [] if it did not."""
    refused = program.refused
    if refused is None:
        return []
    asked = (
        f"asked for {gib(refused.asked)} GiB"
        if refused.asked is not None
        else "did not say how much it needs"
    )
    lines = [
        "",
        f"The compiler refused {program.name}: it {asked} where {gib(refused.available)} GiB are "
        "usable. Known without compiling, by size:",
    ]
    largest = sorted(program.memory.items(), key=lambda item: -item[1])[:_BUFFERS]
    lines += [f"  {gib(size)} GiB  {name}" for name, size in largest if size]
    lines += [
        (
            f"  {gib(buffer.bytes)} GiB  {buffer.kind} {buffer.shape or ''} "
            f"{buffer.operation or ''}"
        ).rstrip()
        for buffer in refused.buffers[:_BUFFERS]
    ]
    return lines


def describe_search(plans: list[Plan]) -> str:
    """Returns the layouts that fit as a table, in the order of `plans`; without plans, a
    sentence.
    """
    if not plans:
        return "No layout fits. A larger slice, a quantised base or a smaller batch may."
    rows = [["", "mesh", "parts", "remat", "peak GiB", "of", "links GB", "bound, s"]]
    for order, found in enumerate(plans, 1):
        config = found.config
        numbers = [
            gib(found.peak),
            gib(found.usable),
            f"{found.link_bytes / 1e9:.2f}",
            f"{found.seconds:.2f}",
        ]
        rows.append(
            [str(order), config.mesh or "", str(config.microbatches), config.remat, *numbers]
        )
    note = (
        "Bound: seconds of a step that the chip's operations, HBM and links allow at the "
        "least; no measurement."
    )
    return "\n".join([*table(rows), note])
