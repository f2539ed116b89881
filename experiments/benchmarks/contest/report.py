"""A contest's numbers as text: the machine, the contenders side by side, the share of the machine's
ceiling.
"""

from __future__ import annotations

import os
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import ceiling
import work

ORDER = ("generate", "score", "reference", "learn")


def machine() -> dict[str, Any]:
    """What the numbers were taken on, and how busy it was before."""
    cpu = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.partition(":")[2].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    found = {
        "cpu": cpu,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }
    found["cores"] = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    found["memory_gib"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return found


def machine_text(found: dict[str, Any]) -> str:
    gpu = f"{found['gpu']}; " if found["gpu"] else ""
    return (
        f"{gpu}{found['cpu']}, {found['cores']} cores, {found['memory_gib']:.0f} GiB; Python "
        f"{found['python']}, {found['system']}; "
        f"load average before the run {found['load']:.1f}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def comparison(contenders: dict[str, Any], tokens: int) -> str:
    """A row a contender; the first is what the others' medians are divided by."""
    rows = [
        (
            "",
            "median s",
            "quartiles",
            f"x {next(iter(contenders))}",
            "tokens/s",
            "processor s",
            "peak MiB",
        )
    ]
    first = None
    for name, said in contenders.items():
        steps = said["steps"]
        low, median, high = quartiles([step["seconds"] for step in steps])
        first = median if first is None else first
        processor = [step["processor_seconds"] for step in steps if "processor_seconds" in step]
        busy = f"{statistics.median(processor):.2f}" if processor else "-"
        peak = f"{max(step['peak_mib'] for step in steps):,.0f}"
        rows.append(
            (
                name,
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{median / first:.2f}",
                f"{tokens / median:,.0f}",
                busy,
                peak,
            )
        )
    return table(rows)


def parts(contenders: dict[str, Any]) -> str:
    """Median seconds by part, or nothing where no contender has parts."""
    medians = {}
    for name, said in contenders.items():
        found = dict.fromkeys(part for step in said["steps"] for part in step["parts"])
        medians[name] = {
            part: statistics.median(step["parts"].get(part, 0.0) for step in said["steps"])
            for part in found
        }
    every = {part for found in medians.values() for part in found}
    names = [*(part for part in ORDER if part in every), *sorted(every - set(ORDER))]
    if not names:
        return ""
    rows = [
        (name, *(f"{found[part]:.2f}" if part in found else "-" for part in names))
        for name, found in medians.items()
    ]
    return "\n\n" + table([("median s of", *names), *rows])


def compiled(contenders: dict[str, Any]) -> str:
    """Memory by program by the compiler's account, or nothing where no contender has one."""
    known = {
        name: said["ready"]["compiled_mib"]
        for name, said in contenders.items()
        if said["ready"].get("compiled_mib")
    }
    names = list(dict.fromkeys(program for found in known.values() for program in found))
    if not names:
        return ""
    rows = [
        (name, *(f"{found[program]:,.0f}" if program in found else "-" for program in names))
        for name, found in known.items()
    ]
    return "\n\n" + table([("MiB by the compiler's account, without libraries", *names), *rows])


def text(contest: dict[str, Any]) -> str:
    contenders = contest["contenders"]
    rounds = len(next(iter(contenders.values()))["steps"])
    said = []
    for name, one in contenders.items():
        ready = one["ready"]
        versions = ", ".join(
            f"{package} {version}" for package, version in ready["versions"].items()
        )
        said.append(f"{name}: {versions}; {ready['settings']}")
    medians = {
        name: statistics.median(step["seconds"] for step in one["steps"])
        for name, one in contenders.items()
    }
    tops = []
    for tuning in dict.fromkeys(one["tuning"] for one in contenders.values()):
        least, alone = (
            [ceiling.Phase(**phase) for phase in contest[rows][tuning]]
            for rows in ("phases", "phases_rows_alone")
        )
        alike = {
            name: median for name, median in medians.items() if contenders[name]["tuning"] == tuning
        }
        tops.append(ceiling.text(least, alone, ceiling.Rates(**contest["rates"]), alike))
    top = "\n".join(tops)
    title = f"\n{contest['job']}, {rounds} rounds\n"
    tables = (
        comparison(contenders, work.TOKENS[contest["job"]])
        + parts(contenders)
        + compiled(contenders)
    )
    return "\n".join((title, tables, "", *said, "", top))
