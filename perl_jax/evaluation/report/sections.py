"""The sections of the report that consist of tables and text; a section without data is empty
Html.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

from perl_jax.data.counts import said_of
from perl_jax.evaluation.intervals import Estimate
from perl_jax.evaluation.report import formats, plots
from perl_jax.evaluation.report.headline import DASH
from perl_jax.evaluation.report.headline_rows import judge_text
from perl_jax.evaluation.report.load import (
    JOB_NAMES,
    PREFERENCES,
    Experiment,
    Run,
    entry,
    estimate,
    number,
    series,
    tuning_name,
)
from perl_jax.evaluation.report.markup import Html, figure, join, section, table, tag, with_interval
from perl_jax.evaluation.report.samples import side_label
from perl_jax.runs.metrics import TIMING_PREFIX
from perl_jax.runtime import progress

POLICY_COLUMNS = {
    "gold_reward": "Gold reward",
    "proxy_reward": "Proxy reward",
    "judge_reward": "Judge's reward",
    "kl": "KL (nats)",
    "length": "Length (tokens)",
    "eos_rate": "Ends itself",
    # U+2011 is a hyphen at which no line breaks.
    "distinct_1": "Distinct\u20111",
    "distinct_2": "Distinct\u20112",
}
SHARES = frozenset({"eos_rate", "distinct_1", "distinct_2"})
# `time/` metrics of a whole step rather than of a phase.
WHOLE_STEP = frozenset({"step", "total", "elapsed", "wall", "compile", "validate"})
# Prefix of metrics that are numbers of rows: data/SPLIT/NAME.
FACTS = "data/"


def baseline_table(experiment: Experiment) -> Html:
    """Returns the section that compares reward models with baselines, by AUC and balanced accuracy;
    empty Html if no run has baselines.
    """
    lines: list[list[str]] = []
    baselines: dict[str, object] = {}
    for run in experiment.runs_of("reward"):
        found = entry(run.evaluation, "baselines")
        if isinstance(found, Mapping):
            baselines.update(found)
            lines.append([f"Reward model, {tuning_name(run.tuning)}", *measures(run.evaluation)])
    lines += [[name, *measures(values)] for name, values in baselines.items()]
    if not baselines:
        return Html("")
    shown = table("On the same held-out rows.", ["", "AUC", "Balanced accuracy"], lines)
    return section("baselines", "Reward model against baselines", shown)


def measures(values: object) -> list[str]:
    """Returns the table cells [AUC, balanced accuracy] of a mapping with `auc` and
    `balanced_accuracy`.
    """
    area, balanced = estimate(values, "auc"), estimate(values, "balanced_accuracy")
    return [
        formats.NOT_MEASURED if area is None else formats.interval(area),
        formats.NOT_MEASURED if balanced is None else formats.percent_interval(balanced),
    ]


def policy_cell(key: str, found: Estimate | None) -> str:
    """Returns the table cell of one measure of one policy; a dash if it was not measured.

    Args:
        key: The measure's name, a key of `POLICY_COLUMNS` or another; `SHARES` are shown in
            percent.
        found: The measure; None if it was not measured.
    """
    if found is None:
        return DASH
    if key in SHARES:
        return with_interval(formats.percent_interval(found))
    return with_interval(formats.interval(found))


def policies(experiment: Experiment) -> Html:
    """Returns the section with a table of the measures of all policies of RL and DPO runs, and a
    table of win rates.

    Equal lines, such as those of an SFT policy from which several runs start, are shown once.
    """
    lines: list[list[object]] = []
    columns = dict(POLICY_COLUMNS)
    rows: list[tuple[str, Mapping[str, object]]] = []
    for run in experiment.policy_runs:
        found = entry(run.evaluation, "policies")
        for name, values in found.items() if isinstance(found, Mapping) else ():
            row = (side_label(run, name), values)
            # RL and DPO runs that start from one SFT policy have the same numbers for it.
            if isinstance(values, Mapping) and row not in rows:
                rows.append(row)
                columns.update({k: k for k in values if k not in columns and estimate(values, k)})
    used = [key for key in columns if any(estimate(values, key) for _, values in rows)]
    for label, values in rows:
        lines.append([label, *(policy_cell(key, estimate(values, key)) for key in used)])
    if not used:
        return section("policies", "Policies", win_table(experiment))
    caption = "Means over the evaluation prompts, with 95 % confidence intervals where known."
    header = ["Policy", *(columns[key] for key in used)]
    shown = tag("div", table(caption, header, lines), class_="stacked")
    return section("policies", "Policies", shown, win_table(experiment))


def win_table(experiment: Experiment) -> Html:
    """Returns a table of wins, ties and losses of each policy against SFT's, with the judge; empty
    Html if no run has a win rate.
    """
    lines: list[list[object]] = []
    for run in experiment.policy_runs:
        block = entry(run.evaluation, "win_rate")
        rate = number(block, "rate")
        if rate is None:
            continue
        counts = (number(block, key) for key in ("wins", "ties", "losses"))
        cells = [DASH if c is None else f"{c:.0f}" for c in counts]
        shown = Estimate(rate, number(block, "low"), number(block, "high"), 0)
        name = side_label(run, "rl")
        judge = judge_text(run) or DASH
        lines.append([name, judge, *cells, formats.percent_interval(shown)])
    if not lines:
        return Html("")
    start = (
        "SFT" if any(run.job != "evaluate" for run in experiment.policy_runs) else "the baseline"
    )
    header = [f"Against {start}", "Judge", "Wins", "Ties", "Losses", "Win rate, ties half"]
    return table(f"Win rate of a response over {start}'s to the same prompt.", header, lines, 2)


def split_facts(run: Run) -> dict[str, dict[str, float]]:
    """Returns {split: {name: number of rows}}, from `data/SPLIT/NAME` in a run's first metrics and
    in its evaluation.
    """
    tables = [
        run.rows[0] if run.rows else {},
        entry(run.evaluation, "data"),
        entry(run.evaluation, "prompts"),
    ]
    found: dict[str, dict[str, float]] = {}
    for table_of in tables:
        for key in table_of if isinstance(table_of, Mapping) else ():
            value = number(table_of, key)
            if str(key).startswith(FACTS) and str(key).count("/") == 2 and value is not None:
                _, split, name = str(key).split("/")
                found.setdefault(split, {})[name] = value
    return found


def rows_used(experiment: Experiment) -> Html:
    """Returns the section with each run's numbers of rows: all, those cut to fit, and pairs of
    equal responses; empty Html if no run recorded them.
    """
    items = []
    for run in experiment.runs:
        data = entry(run.settings, "data")
        limits = [
            int(number(data, name) or 0) for name in ("max_prompt_length", "max_response_length")
        ]
        whose = " ".join(
            filter(
                None,
                (JOB_NAMES.get(run.job, run.job), tuning_name(run.tuning) if run.tuning else ""),
            )
        )
        for split, facts in split_facts(run).items():
            rows = int(facts.get("rows", 0))
            said = (
                said_of(facts, *limits)
                if facts.get("cut")
                else [f"none of {rows} rows was cut to fit.", *said_of(facts, *limits)]
            )
            items.append(tag("li", f"{whose}, {split}: {' '.join(said)}"))
    return section("rows", "Rows", tag("ul", *items) if items else "")


def phases_of(run: Run) -> dict[str, float]:
    """Returns {phase: seconds of a step} of a run, from `cost.json` or else the medians of `time/`
    metrics.

    {} if neither exists. Times of the whole step are no phases.
    """
    listed = entry(run.cost, "phases")
    if isinstance(listed, Mapping) and listed:
        found = {str(k): number(listed, k) for k in listed}
    else:
        names = dict.fromkeys(k for row in run.rows for k in row if k.startswith(TIMING_PREFIX))
        found = {}
        for key in names:
            values = series(run.rows, key)[1]
            name = key.removeprefix(TIMING_PREFIX)
            if values.size and name not in WHOLE_STEP:
                found[name] = statistics.median(values.tolist())
    return {k: v for k, v in found.items() if v is not None and v >= 0}


def phase_lines(runs: Sequence[Run | None]) -> list[list[object]]:
    """Returns table lines: one per phase with `0.31 s (60 %)` for each run, and one with the number
    of compiled programs.

    A dash marks a missing value. [] if no run has any.

    Args:
        runs: The runs, one per column; None is a column of dashes.
    """
    found = [{} if run is None else phases_of(run) for run in runs]
    lines: list[list[object]] = []
    for phase in dict.fromkeys(phase for phases in found for phase in phases):
        line: list[object] = [phase]
        for phases in found:
            total = sum(phases.values())
            if phase in phases and total > 0:
                share = formats.percent(phases[phase] / total, 0)
                line.append(with_interval(f"{formats.seconds(phases[phase])} ({share})"))
            else:
                line.append(DASH)
        lines.append(line)
    compiled = [None if run is None else number(run.cost, "compilations") for run in runs]
    if any(c is not None for c in compiled):
        shown = (DASH if c is None else f"{c:.0f}" for c in compiled)
        lines.append(["programs compiled", *shown])
    return lines


def time_spent(experiment: Experiment) -> Html:
    """Returns the section of times: a stacked bar per run, and a table of phases and their shares;
    empty Html if no run has times.
    """
    tunings = experiment.tunings
    bars: dict[str, dict[str, float]] = {}
    lines: list[list[object]] = []
    for job in ("rl", *PREFERENCES, "reward", "sft"):
        for run in experiment.runs_of(job):
            phases = phases_of(run)
            if sum(phases.values()) > 0:
                bars[f"{JOB_NAMES[job]}, {tuning_name(run.tuning)}"] = phases
        added = phase_lines([experiment.run(job, tuning) for tuning in tunings])
        lines += [[JOB_NAMES[job]], *added] if added else []
    if not bars:
        return Html("")
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{p} {formats.seconds(s)}" for p, s in phases.items())
        for name, phases in bars.items()
    )
    picture = figure(plots.phases_plot(bars), "Seconds of one step by phase.", alt)
    header = ["Phase", *map(tuning_name, tunings)]
    shown = table("Time of each phase and its share of the step.", header, lines)
    return section("time", "Where the time goes", picture, tag("div", shown, class_="narrow"))


def reproduce(experiment: Experiment) -> Html:
    """Returns the section with the command, hardware, versions and each run's configuration."""
    parts: list[object] = []
    if experiment.command:
        parts.append(tag("pre", experiment.command, class_="command"))
    facts = [("Hardware", experiment.hardware), ("Task", experiment.task)]
    if experiment.seconds is not None:
        facts.append(("Time in all", progress.duration(experiment.seconds)))
    environment = next(
        (e for r in experiment.runs if isinstance(e := r.config.get("environment"), Mapping)), {}
    )
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if value is not None:
            facts.append((str(key).capitalize(), str(value)))
    listed = [join([tag("dt", name), tag("dd", value)]) for name, value in facts if value]
    if listed:
        parts.append(tag("dl", *listed))
    for run in experiment.runs:
        config = {k: v for k, v in run.config.items() if k != "environment"}
        if config:
            written = json.dumps(config, indent=2, ensure_ascii=False)
            title = f"Configuration of {run.name}"
            parts.append(tag("details", tag("summary", title), tag("pre", written)))
    return section("reproduce", "Reproduce", *parts)
