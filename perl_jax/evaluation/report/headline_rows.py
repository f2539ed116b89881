"""The rows of the headline table: what is measured of a run, and its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perl_jax.evaluation.intervals import Estimate
from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.load import (
    JOB_NAMES,
    PREFERENCES,
    Run,
    entry,
    estimate,
    number,
    text,
)


@dataclass(frozen=True)
class Row:
    """One line of the headline table.

    Attributes:
        label: The text in the first column.
        value: Returns a run's value as a number, for the comparison; None if missing.
        shown: Returns a run's value as text; None if missing.
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
    """Returns the measure `name` (such as `auc`) of a reward run's evaluation, or None if it is
    missing.
    """
    return estimate(run.evaluation, name)


def trainable_text(run: Run) -> str | None:
    """Returns trained parameters and their share of all, `40.2 k (0.31 %)`; None if not
    measured.
    """
    trainable = number(run.cost, "parameters_trainable")
    total = number(run.cost, "parameters_total")
    if trainable is None:
        return None
    share = f" ({formats.percent(trainable / total, 2)})" if total else ""
    return formats.count(trainable) + share


def checkpoint_text(run: Run) -> str | None:
    """Returns the size of a checkpoint and of the base that it does not contain, `4.74 MB (base 113
    MB)`; None if not measured.
    """
    size, base = number(run.cost, "checkpoint_bytes"), number(run.cost, "base_bytes")
    if size is None:
        return None
    return formats.size_of(size) + (f" (base {formats.size_of(base)})" if base else "")


def seconds_text(run: Run) -> str | None:
    """Returns the median time of a step as text, with the unit; None if not measured."""
    value = number(run.cost, "seconds_per_step")
    return None if value is None else formats.seconds(value)


def bytes_text(run: Run, key: str) -> str | None:
    """Returns the size `key` (such as `peak_bytes_compiled`) of a run's cost.json as text in
    decimal units; None if not measured.
    """
    value = number(run.cost, key)
    return None if value is None else formats.size_of(value)


def share_text(found: Estimate | None) -> str | None:
    """Returns a share as text in percent with its interval, `78.1 % (76.2 to 79.9)`; None for
    None.
    """
    return None if found is None else formats.percent_interval(found)


def policy_measure(run: Run, policy: str, name: str) -> Estimate | None:
    """Returns a measure of one policy of a run's evaluation, or None if it is missing.

    Args:
        run: The run.
        policy: `rl`, the policy that the run trained, or `sft`, the policy that it started from.
        name: The measure, such as `gold_reward`.
    """
    return estimate(run.evaluation, "policies", policy, name)


def gain_text(run: Run) -> str | None:
    """Returns the gain in true reward, paired by prompt, with its sign and interval; None if not
    measured.
    """
    found = estimate(run.evaluation, "gold_gain")
    return None if found is None else formats.interval(found, with_sign=True)


def win_estimate(run: Run) -> Estimate | None:
    """Returns the win rate of a run's policy over the baseline, with its interval; None if not
    measured.
    """
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
    """Returns the numbers of rows and groups, `2,048 (512)`, of the first measure that has rows.

    The groups are left out if their number is unknown. None if no measure has rows.
    """
    found = next((measure for measure in measures if measure is not None and measure.n), None)
    if found is None:
        return None
    return f"{found.n:,}" if found.groups is None else f"{found.n:,} ({found.groups:,})"


def judge_text(run: Run) -> str:
    """Returns who decided the wins of a run's evaluation, such as `the gold reward`; "" if
    unknown.
    """
    judge = text(run.evaluation, "win_rate", "judge")
    artefacts = entry(run.evaluation, "config", "judge")
    several = len(artefacts) if isinstance(artefacts, list) else 1
    model = f"the mean of {several} judges" if several > 1 else "a judge's reward model"
    names = {"gold": "the gold reward", "judge": model, "proxy": "the proxy reward"}
    return names.get(judge, judge)


def value_of(found: Estimate | None) -> float | None:
    """Returns the estimate's value without its interval; None for None."""
    return None if found is None else found.value


def interval_text(found: Estimate | None) -> str | None:
    """Returns a value with its interval as text, `0.834 (0.801 to 0.867)`; None for None."""
    return None if found is None else formats.interval(found)


def estimate_row(
    title: str,
    measure: Callable[[Run], Estimate | None],
    shown: Callable[[Estimate | None], str | None],
    against: str,
) -> Row:
    """Returns the table's line of an estimate.

    Args:
        title: The line's title.
        measure: Returns a run's estimate; None: not measured.
        shown: Returns an estimate as text.
        against: How the columns are compared (`Row`).
    """
    return Row(title, lambda r: value_of(measure(r)), lambda r: shown(measure(r)), against)


COST_ROWS = (
    Row(
        "Trained parameters (share of all)",
        lambda r: number(r.cost, "parameters_trainable"),
        trainable_text,
        "share",
        always=True,
    ),
    Row("Checkpoint", lambda r: number(r.cost, "checkpoint_bytes"), checkpoint_text, "share"),
    Row(
        "Time a step, median",
        lambda r: number(r.cost, "seconds_per_step"),
        seconds_text,
        "speed",
        always=True,
    ),
    Row(
        "Peak memory, compiled",
        lambda r: number(r.cost, "peak_bytes_compiled"),
        lambda r: bytes_text(r, "peak_bytes_compiled"),
        "share",
        always=True,
    ),
    Row(
        "Peak memory, measured",
        lambda r: number(r.cost, "peak_bytes_measured"),
        lambda r: bytes_text(r, "peak_bytes_measured"),
        "share",
        always=True,
    ),
)


REWARD_ROWS = (
    Row(
        "Held-out rows (groups)",
        lambda r: None,
        lambda r: rows_text(
            *(reward_measure(r, name) for name in ("pairwise_accuracy", "auc", "correlation"))
        ),
        "none",
    ),
    estimate_row(
        "Pairwise accuracy",
        lambda r: reward_measure(r, "pairwise_accuracy"),
        share_text,
        "points",
    ),
    Row(
        "Noise ceiling of the labels",
        lambda r: number(r.evaluation, "noise_ceiling"),
        lambda r: share_text(reward_measure(r, "noise_ceiling")),
        "none",
    ),
    estimate_row(
        "AUC",
        lambda r: reward_measure(r, "auc"),
        interval_text,
        "difference",
    ),
    estimate_row(
        "Correlation with ratings",
        lambda r: reward_measure(r, "correlation"),
        interval_text,
        "difference",
    ),
    estimate_row(
        "Balanced accuracy",
        lambda r: reward_measure(r, "balanced_accuracy"),
        share_text,
        "points",
    ),
    estimate_row(
        "Calibration error (ECE)",
        lambda r: reward_measure(r, "ece"),
        share_text,
        "points",
    ),
)


DPO_ROWS = (
    Row(
        "Held-out pairs (groups)",
        lambda r: None,
        lambda r: rows_text(estimate(r.evaluation, "pairwise_accuracy")),
        "none",
    ),
    estimate_row(
        "Pairs in order of the implicit reward",
        lambda r: estimate(r.evaluation, "pairwise_accuracy"),
        share_text,
        "points",
    ),
    estimate_row(
        "Labels in order of the implicit reward (AUC)",
        lambda r: estimate(r.evaluation, "auc"),
        interval_text,
        "difference",
    ),
)


def policy_rows(name: str, start: str = "SFT", after: str = "after ") -> tuple[Row, ...]:
    """Returns the table's lines for a job that trains or compares policies.

    Args:
        name: The name of the policy on the page, such as `RL`.
        start: The name of the policy that it is compared with.
        after: What comes before the policy's name in the line of its gold reward.
    """
    return (
        Row(
            "Prompts (groups)",
            lambda r: None,
            lambda r: rows_text(win_estimate(r), policy_measure(r, "rl", "kl")),
            "none",
        ),
        estimate_row(
            f"Gold reward, {start}",
            lambda r: policy_measure(r, "sft", "gold_reward"),
            interval_text,
            "difference",
        ),
        estimate_row(
            f"Gold reward, {after}{name}",
            lambda r: policy_measure(r, "rl", "gold_reward"),
            interval_text,
            "difference",
        ),
        Row(
            "Gain in gold reward",
            lambda r: value_of(estimate(r.evaluation, "gold_gain")),
            gain_text,
            "difference",
        ),
        estimate_row(
            f"Win rate of {name} over {start}, ties half",
            win_estimate,
            share_text,
            "points",
        ),
        estimate_row(
            "KL from the SFT policy (nats)" if start == "SFT" else f"KL from {start} (nats)",
            lambda r: policy_measure(r, "rl", "kl"),
            interval_text,
            "difference",
        ),
    )


JOB_ROWS = {
    "reward": REWARD_ROWS,
    "rl": policy_rows(JOB_NAMES["rl"]),
    **{loss: DPO_ROWS + policy_rows(name) for loss, name in PREFERENCES.items()},
    "evaluate": policy_rows("the policy", "the baseline", after=""),
    "sft": (),
}
