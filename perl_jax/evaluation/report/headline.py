"""The table at the top of the report, which compares LoRA with full tuning."""

from __future__ import annotations

from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.headline_rows import COST_ROWS, JOB_ROWS
from perl_jax.evaluation.report.load import (
    JOB_NAMES,
    Experiment,
    entry,
    tuning_name,
)
from perl_jax.evaluation.report.markup import Html, table, with_interval

DASH = "\u2013"


def compared(kind: str, value: float | None, full: float | None) -> str:
    """Returns the text of LoRA's value compared with full tuning's; a dash if a value is missing.

    Args:
        kind: How to compare (`Row.compare`): share, speed, points (difference of percentages),
            difference or none.
        value: LoRA's value; None if missing.
        full: Full tuning's value; None if missing.
    """
    if kind == "none" or value is None or full is None:
        return DASH
    if kind == "share":
        return f"{formats.share_of(value, full)} of full" if full else DASH
    if kind == "speed":
        return formats.speed(value, full) if value > 0 and full > 0 else DASH
    difference = value - full
    if kind == "points":
        return f"{formats.signed(f'{abs(100 * difference):.1f}', difference)} points"
    return formats.signed(formats.significant(abs(difference), 2), difference)


def shown_cell(cell: str | None) -> str:
    """Returns a cell with its interval in a lighter colour; "not measured" for None or ""."""
    return with_interval(cell) if cell else formats.NOT_MEASURED


def headline_table(experiment: Experiment) -> Html:
    """Returns the table with a group of lines for each job and a column for each tuning; empty Html
    if there are no runs.
    """
    tunings = experiment.tunings
    both = "lora" in tunings and "full" in tunings
    lines: list[list[object]] = []
    for job in JOB_ROWS:
        runs = [experiment.run(job, tuning) for tuning in tunings]
        if not any(runs):
            continue
        lines.append([JOB_NAMES[job]])
        for row in JOB_ROWS[job] + (() if job == "evaluate" else COST_ROWS):
            cells = [None if run is None else row.shown(run) for run in runs]
            if not row.always and not any(cells):
                continue
            line: list[object] = [row.label, *(shown_cell(cell) for cell in cells)]
            if both:
                lora, full = experiment.run(job, "lora"), experiment.run(job, "full")
                values = (None if run is None else row.value(run) for run in (lora, full))
                line.append(compared(row.compare, *values))
            lines.append(line)
    if not lines:
        return Html("")
    header = ["", *map(tuning_name, tunings)] + (["LoRA against full"] if both else [])
    grouped = any(
        entry(run.evaluation, key, "groups") is not None
        for run in experiment.runs
        for key in ("pairwise_accuracy", "auc", "correlation", "win_rate")
    )
    over = (
        ", over groups of rows: those of one prompt, or of one dialogue or topic where rows name it"
        if grouped
        else ""
    )
    costs = any(run.job != "evaluate" for run in experiment.runs)
    memory = (
        " Compiled memory is the compiler's own account of the step's peak on one device; measured "
        "is what the device reported."
    )
    caption = f"In brackets: 95 % confidence intervals{over}.{memory if costs else ''}"
    return table(caption, header, lines)
