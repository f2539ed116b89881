"""The summary at the top of the report: sentences made from the numbers.

A sentence about something that was not measured is "".
"""

from __future__ import annotations

from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.headline_rows import (
    judge_text,
    policy_measure,
    reward_measure,
    win_estimate,
)
from perl_jax.evaluation.report.load import (
    JOB_NAMES,
    POLICY_JOBS,
    PREFERENCES,
    Experiment,
    Run,
    estimate,
    number,
)
from perl_jax.evaluation.report.markup import Html, tag


def lora_share_sentence(experiment: Experiment) -> str:
    """Returns a sentence on how few parameters LoRA trained; "" if no run says.

    It is about the first job of RL, DPO, reward and SFT whose LoRA run has the numbers.
    """
    for job in ("rl", *PREFERENCES, "reward", "sft"):
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
    """Returns a sentence with each reward model's accuracy on pairs, or its AUC on labels, and with
    the best accuracy that the noise in the labels allows, where that is known; "" if nothing was
    measured.
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
    """Returns the name of a run's tuning as it is written within a sentence: `LoRA`, `full
    tuning`.
    """
    return {"lora": "LoRA", "full": "full tuning", "": "this run"}.get(run.tuning, run.tuning)


def gold_sentence(experiment: Experiment, job: str) -> str:
    """Returns a sentence on how the policies of a job changed the true reward; "" if nothing was
    measured.

    Args:
        experiment: The experiment.
        job: `rl`, `dpo` or `evaluate`.
    """
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
            + (change.rstrip(",") if job == "evaluate" else f"{change} with {trained_with(run)}")
        )
    if not parts:
        return ""
    if job == "evaluate":
        return f"From the baseline to the policy the gold reward goes {'; '.join(parts)}."
    return f"{JOB_NAMES[job]} moved the gold reward {'; '.join(parts)}."


def win_sentence(experiment: Experiment, job: str) -> str:
    """Returns a sentence on how often a job's responses won, and who judged; "" if nothing was
    measured.

    Args:
        experiment: The experiment.
        job: `rl`, `dpo` or `evaluate`.
    """
    parts = []
    for run in experiment.runs_of(job):
        found = win_estimate(run)
        if found is not None:
            whose = "" if job == "evaluate" else f" ({trained_with(run)})"
            parts.append(formats.percent_interval(found) + whose)
    if not parts:
        return ""
    judge = next((j for run in experiment.runs_of(job) if (j := judge_text(run))), "")
    by = f", judged by {judge}" if judge else ""
    ours, theirs = ("The policy", "the baseline") if job == "evaluate" else (JOB_NAMES[job], "SFT")
    return f"{ours}'s responses beat {theirs}'s in {' and '.join(parts)} of all prompts{by}."


def cost_sentence(experiment: Experiment) -> str:
    """Returns a sentence with time and memory of LoRA's step relative to full tuning's; "" if
    neither was measured.

    It is about the first job of RL, DPO and the reward model that has a run of each tuning with
    numbers.
    """
    steps = {"rl": "an RL step"} | {
        loss: f"{'a' if loss in ('dpo', 'kto') else 'an'} {name} step"
        for loss, name in PREFERENCES.items()
    }
    steps["reward"] = "a reward-model step"
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
    """Returns (the first run's cost, the second run's cost) of a key of cost.json; None if either
    is missing or 0.

    Args:
        one: The first run.
        other: The second run.
        key: The cost, such as `seconds_per_step`.
    """
    first, second = number(one.cost, key), number(other.cost, key)
    return (first, second) if first and second else None


def summary_paragraph(experiment: Experiment) -> Html:
    """Returns one paragraph: the author's summary, then sentences made from the numbers.

    If there is nothing to say, the paragraph says that the run has no evaluation yet.
    """
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
