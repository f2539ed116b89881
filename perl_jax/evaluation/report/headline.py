"""The top of the report: the main results in words, and the table that compares LoRA with full
tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perl_jax.evaluation.intervals import Estimate
from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.load import (
    JOB_NAMES,
    POLICY_JOBS,
    Experiment,
    Run,
    entry,
    estimate,
    number,
    text,
    tuning_name,
)
from perl_jax.evaluation.report.markup import Html, table, tag, with_interval

DASH = "\u2013"


@dataclass(frozen=True)
class Row:
    """One line of the headline table.

    Attributes:
        label: The text in the first column.
        value: Reads a run's value as a number, for the comparison; None if missing.
        shown: Formats a run's value; None if missing.
        compare: How LoRA's value is compared with full tuning's: share, speed, points, difference
            or none.
        always: Whether the line is kept, with "not measured", if no run has the value.
    """

    label: str
    value: Callable[[Run], float | None]
    shown: Callable[[Run], str | None]
    compare: str
    always: bool = False


def reward_measure(run: Run, name: str) -> Estimate | None:
    """Returns a measure from a reward run's evaluation, or None."""
    return estimate(run.evaluation, name)


def trainable_text(run: Run) -> str | None:
    """Returns trained parameters and their share of all: `40.2 k (0.31 %)`."""
    trainable = number(run.cost, "parameters_trainable")
    total = number(run.cost, "parameters_total")
    if trainable is None:
        return None
    share = f" ({formats.percent(trainable / total, 2)})" if total else ""
    return formats.count(trainable) + share


def checkpoint_text(run: Run) -> str | None:
    """Returns the size of a checkpoint and of the base it leaves out: `4.74 MB (base 113 MB)`."""
    size, base = number(run.cost, "checkpoint_bytes"), number(run.cost, "base_bytes")
    if size is None:
        return None
    return formats.size_of(size) + (f" (base {formats.size_of(base)})" if base else "")


def seconds_text(run: Run) -> str | None:
    """Returns the median time of a step."""
    value = number(run.cost, "seconds_per_step")
    return None if value is None else formats.seconds(value)


def bytes_text(run: Run, key: str) -> str | None:
    """Returns a size from the run's costs, in decimal units."""
    value = number(run.cost, key)
    return None if value is None else formats.size_of(value)


def share_text(found: Estimate | None) -> str | None:
    """Returns a share in percent with its interval."""
    return None if found is None else formats.percent_interval(found)


def policy_measure(run: Run, policy: str, name: str) -> Estimate | None:
    """Returns a measure of one policy of a run's evaluation: `rl` is the run's own, `sft` its
    start.
    """
    return estimate(run.evaluation, "policies", policy, name)


def gain_text(run: Run) -> str | None:
    """Returns the gain in gold reward, paired by prompt, with its sign and interval."""
    found = estimate(run.evaluation, "gold_gain")
    return None if found is None else formats.interval(found, with_sign=True)


def win_estimate(run: Run) -> Estimate | None:
    """Returns the win rate with its interval, or None."""
    rate = number(run.evaluation, "win_rate", "rate")
    if rate is None:
        return None
    block = run.evaluation["win_rate"]
    n, groups = (
        sum(number(block, key) or 0 for key in ("wins", "ties", "losses")),
        number(block, "groups"),
    )
    return Estimate(
        rate,
        number(block, "low"),
        number(block, "high"),
        int(n),
        None if groups is None else int(groups),
    )


def rows_text(*measures: Estimate | None) -> str | None:
    """Returns rows and groups, `2,048 (512)`, of the first measure that has rows; without groups if
    unknown.
    """
    found = next((measure for measure in measures if measure is not None and measure.n), None)
    if found is None:
        return None
    return f"{found.n:,}" if found.groups is None else f"{found.n:,} ({found.groups:,})"


def judge_text(run: Run) -> str:
    """Returns who decided the wins, in words."""
    judge = text(run.evaluation, "win_rate", "judge")
    artefacts = entry(run.evaluation, "config", "judge")
    several = len(artefacts) if isinstance(artefacts, list) else 1
    model = f"the mean of {several} judges" if several > 1 else "a judge's reward model"
    names = {"gold": "the gold reward", "judge": model, "proxy": "the proxy reward"}
    return names.get(judge, judge)


def value_of(found: Estimate | None) -> float | None:
    """Returns the estimate's value without its interval, or None."""
    return None if found is None else found.value


COST_ROWS = (
    Row("Trained parameters (share of all)", lambda r: number(r.cost, "parameters_trainable"),
        trainable_text, "share", always=True),
    Row("Checkpoint", lambda r: number(r.cost, "checkpoint_bytes"), checkpoint_text, "share"),
    Row("Time a step, median", lambda r: number(r.cost, "seconds_per_step"), seconds_text, "speed",
        always=True),
    Row("Peak memory, compiled", lambda r: number(r.cost, "peak_bytes_compiled"),
        lambda r: bytes_text(r, "peak_bytes_compiled"), "share", always=True),
    Row("Peak memory, measured", lambda r: number(r.cost, "peak_bytes_measured"),
        lambda r: bytes_text(r, "peak_bytes_measured"), "share", always=True),
)  # fmt: skip
REWARD_ROWS = (
    Row(
        "Held-out rows (groups)",
        lambda r: None,
        lambda r: rows_text(
            *(reward_measure(r, name) for name in ("pairwise_accuracy", "auc", "correlation"))
        ),
        "none",
    ),
    Row(
        "Pairwise accuracy",
        lambda r: value_of(reward_measure(r, "pairwise_accuracy")),
        lambda r: share_text(reward_measure(r, "pairwise_accuracy")),
        "points",
    ),
    Row(
        "Noise ceiling of the labels",
        lambda r: number(r.evaluation, "noise_ceiling"),
        lambda r: share_text(reward_measure(r, "noise_ceiling")),
        "none",
    ),
    Row(
        "AUC",
        lambda r: value_of(reward_measure(r, "auc")),
        lambda r: interval_text(reward_measure(r, "auc")),
        "difference",
    ),
    Row(
        "Correlation with ratings",
        lambda r: value_of(reward_measure(r, "correlation")),
        lambda r: interval_text(reward_measure(r, "correlation")),
        "difference",
    ),
    Row(
        "Balanced accuracy",
        lambda r: value_of(reward_measure(r, "balanced_accuracy")),
        lambda r: share_text(reward_measure(r, "balanced_accuracy")),
        "points",
    ),
    Row(
        "Calibration error (ECE)",
        lambda r: value_of(reward_measure(r, "ece")),
        lambda r: share_text(reward_measure(r, "ece")),
        "points",
    ),
)
DPO_ROWS = (
    Row("Held-out pairs (groups)", lambda r: None,
        lambda r: rows_text(estimate(r.evaluation, "pairwise_accuracy")), "none"),
    Row("Pairs in order of the implicit reward",
        lambda r: value_of(estimate(r.evaluation, "pairwise_accuracy")),
        lambda r: share_text(estimate(r.evaluation, "pairwise_accuracy")), "points"),
)  # fmt: skip


def policy_rows(name: str) -> tuple[Row, ...]:
    """Returns the lines for a job that trains policies; `name` is the job's name on the page."""
    return (
        Row(
            "Prompts (groups)",
            lambda r: None,
            lambda r: rows_text(win_estimate(r), policy_measure(r, "rl", "kl")),
            "none",
        ),
        Row(
            "Gold reward, SFT",
            lambda r: value_of(policy_measure(r, "sft", "gold_reward")),
            lambda r: interval_text(policy_measure(r, "sft", "gold_reward")),
            "difference",
        ),
        Row(
            f"Gold reward, after {name}",
            lambda r: value_of(policy_measure(r, "rl", "gold_reward")),
            lambda r: interval_text(policy_measure(r, "rl", "gold_reward")),
            "difference",
        ),
        Row(
            "Gain in gold reward",
            lambda r: value_of(estimate(r.evaluation, "gold_gain")),
            gain_text,
            "difference",
        ),
        Row(
            f"Win rate of {name} over SFT, ties half",
            lambda r: value_of(win_estimate(r)),
            lambda r: share_text(win_estimate(r)),
            "points",
        ),
        Row(
            "KL from the SFT policy (nats)",
            lambda r: value_of(policy_measure(r, "rl", "kl")),
            lambda r: interval_text(policy_measure(r, "rl", "kl")),
            "difference",
        ),
    )


JOB_ROWS = {"reward": REWARD_ROWS, "rl": policy_rows(JOB_NAMES["rl"]),
            "dpo": DPO_ROWS + policy_rows(JOB_NAMES["dpo"]), "sft": ()}  # fmt: skip


def interval_text(found: Estimate | None) -> str | None:
    """Returns a value with its interval."""
    return None if found is None else formats.interval(found)


def compared(kind: str, value: float | None, full: float | None) -> str:
    """Returns LoRA's value compared with full tuning's, in the way that `kind` names
    (`Row.compare`).
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
    """Returns a cell with its interval set apart, or "not measured"."""
    return with_interval(cell) if cell else formats.NOT_MEASURED


def headline_table(experiment: Experiment) -> Html:
    """Returns the table with a group of lines for each job, or nothing if there are no runs."""
    tunings = experiment.tunings
    both = "lora" in tunings and "full" in tunings
    lines: list[list[object]] = []
    for job in JOB_ROWS:
        runs = [experiment.run(job, tuning) for tuning in tunings]
        if not any(runs):
            continue
        lines.append([JOB_NAMES[job]])
        for row in JOB_ROWS[job] + COST_ROWS:
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
    caption = (
        f"In brackets: 95 % confidence intervals{over}. Compiled memory is the compiler's own "
        "account of "
        "the step's peak on one device; measured is what the device reported."
    )
    return table(caption, header, lines)


def lora_share_sentence(experiment: Experiment) -> str:
    """Returns how few parameters LoRA trained, of the first job (RL, DPO, reward, SFT) that says;
    or "".
    """
    for job in ("rl", "dpo", "reward", "sft"):
        run = experiment.run(job, "lora")
        if run is None:
            continue
        trainable = number(run.cost, "parameters_trainable")
        total = number(run.cost, "parameters_total")
        if trainable and total:
            return (
                f"LoRA trained {formats.percent(trainable / total, 2)} of the parameters "
                f"({formats.count(trainable)} of {formats.count(total)})."
            )
    return ""


def reward_sentence(experiment: Experiment) -> str:
    """Returns each reward model's accuracy on pairs, or its AUC on labels, and the labels' noise
    ceiling.
    """
    parts, ceiling = [], None
    for run in experiment.runs_of("reward"):
        found = reward_measure(run, "pairwise_accuracy")
        ceiling = number(run.evaluation, "noise_ceiling") or ceiling
        if found is not None:
            parts.append(f"{formats.percent_interval(found)} with {trained_with(run)}")
        elif (area := reward_measure(run, "auc")) is not None:
            parts.append(f"an AUC of {formats.interval(area)} with {trained_with(run)}")
    if not parts:
        return ""
    pairs = any(reward_measure(r, "pairwise_accuracy") for r in experiment.runs_of("reward"))
    start = "The reward model puts held-out pairs in the right order: " if pairs else "Reward: "
    limit = f"; the labels themselves allow {formats.percent(ceiling)}" if ceiling else ""
    return f"{start}{' and '.join(parts)}{limit}."


def trained_with(run: Run) -> str:
    """Returns the name of a run's tuning within a sentence."""
    return {"lora": "LoRA", "full": "full tuning", "": "this run"}.get(run.tuning, run.tuning)


def gold_sentence(experiment: Experiment, job: str) -> str:
    """Returns how the policies of a job changed the gold reward."""
    parts = []
    for run in experiment.runs_of(job):
        before, after = (policy_measure(run, p, "gold_reward") for p in ("sft", "rl"))
        if before is None or after is None:
            continue
        gain = estimate(run.evaluation, "gold_gain")
        change = ""
        if gain is not None:
            change = f", a gain of {formats.interval(gain, with_sign=True)},"
        parts.append(
            f"from {formats.significant(before.value)} to {formats.significant(after.value)}"
            f"{change} with {trained_with(run)}"
        )
    return f"{JOB_NAMES[job]} moved the gold reward {'; '.join(parts)}." if parts else ""


def win_sentence(experiment: Experiment, job: str) -> str:
    """Returns how often a job's responses won, and who judged."""
    parts = []
    for run in experiment.runs_of(job):
        found = win_estimate(run)
        if found is not None:
            parts.append(f"{formats.percent_interval(found)} ({trained_with(run)})")
    if not parts:
        return ""
    judge = next((j for run in experiment.runs_of(job) if (j := judge_text(run))), "")
    by = f", judged by {judge}" if judge else ""
    return f"{JOB_NAMES[job]}'s responses beat SFT's in {' and '.join(parts)} of all prompts{by}."


def cost_sentence(experiment: Experiment) -> str:
    """Returns time and memory of LoRA's step relative to full tuning's, for RL or else DPO or the
    reward model.
    """
    steps = {"rl": "an RL step", "dpo": "a DPO step", "reward": "a reward-model step"}
    for job, name in steps.items():
        lora, full = experiment.run(job, "lora"), experiment.run(job, "full")
        if lora is None or full is None:
            continue
        parts = []
        if times := both_numbers(lora, full, "seconds_per_step"):
            pace = formats.speed(*times)
            parts.append(f"took the {pace}" if pace == "same time" else f"was {pace}")
        for key in ("peak_bytes_measured", "peak_bytes_compiled"):
            if peaks := both_numbers(lora, full, key):
                parts.append(f"peaked at {formats.share_of(*peaks)} of its memory")
                break
        if parts:
            return f"Against full tuning, {name} with LoRA {' and '.join(parts)}."
    return ""


def both_numbers(one: Run, other: Run, key: str) -> tuple[float, float] | None:
    """Returns a cost of two runs; None if one of them is missing or 0."""
    first, second = number(one.cost, key), number(other.cost, key)
    return (first, second) if first and second else None


def summary_paragraph(experiment: Experiment) -> Html:
    """Returns one paragraph: the author's summary, then sentences made from the numbers."""
    sentences = [
        experiment.summary.strip(),
        lora_share_sentence(experiment),
        reward_sentence(experiment),
        *(make(experiment, job) for job in POLICY_JOBS for make in (gold_sentence, win_sentence)),
        cost_sentence(experiment),
    ]
    found = [sentence for sentence in sentences if sentence]
    if not found:
        found = ["This run has no evaluation yet; what it logged is below."]
    return tag("p", " ".join(found), class_="lead")
