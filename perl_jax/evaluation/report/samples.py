"""The sections of the report with texts that models wrote: responses side by side, what RL wrote
over time, and rows that a reward model scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perl_jax.evaluation.report import formats
from perl_jax.evaluation.report.load import JOB_NAMES, Experiment, Run, entry, number, tuning_name
from perl_jax.evaluation.report.markup import Html, section, tag
from perl_jax.runs.shown import shortened

POLICY_NAMES = {"sft": "SFT", "base": "Base"}
MOST_PROMPTS = 12
# Prompts for which the responses of several steps are shown, and the largest number of steps.
MOST_WRITTEN, MOST_STEPS = 6, 3
LONGEST_TEXT = 1500


def side_label(run: Run, side: str) -> str:
    """Returns the displayed name of a policy of a run's evaluation, with the run's tuning.

    Args:
        run: The run.
        side: The policy's key in evaluation.json; `rl` is the policy that the run trained, also in
            a DPO run, and is displayed with the name of the run's job.
    """
    names = POLICY_NAMES | {"rl": JOB_NAMES[run.job]}
    if run.job == "evaluate":
        names = {"rl": "The policy", "sft": "The baseline"}
    name = names.get(side, side)
    return f"{name}, {tuning_name(run.tuning)}" if run.tuning else name


def answer(label: str, words: object, facts: Sequence[str]) -> Html:
    """Returns one response with its name and its numbers, as Html.

    Args:
        label: The name above the response.
        words: The response; anything but a string is shown as not measured.
        facts: The numbers beside the name, as texts.
    """
    shown = words if isinstance(words, str) else formats.NOT_MEASURED
    return tag(
        "div",
        tag("p", tag("strong", label), " ", tag("span", " \u00b7 ".join(facts)), class_="who"),
        tag("pre", shortened(shown, LONGEST_TEXT) if shown else "(empty)", dir="auto"),
        class_="answer",
    )


def card(prompt: str, answers: Sequence[Html], columns: int = 2) -> Html:
    """Returns a prompt with responses to it below, as Html.

    Args:
        prompt: The prompt.
        answers: The responses.
        columns: How many responses stand side by side on a wide screen: 2 or 3.
    """
    names = "answers" if columns == 2 else "answers three"
    head = tag("pre", shortened(prompt, LONGEST_TEXT), dir="auto", class_="prompt")
    return tag("article", head, tag("div", *answers, class_=names), class_="sample")


def measured(row: object, *keys: str) -> list[str]:
    """Returns the numbers of a sample that are known, as texts: `gold 0.9`.

    Args:
        row: The sample.
        keys: The names of the numbers.
    """
    words = {"kl": "KL"}
    found = [(key, number(row, key)) for key in keys]
    return [
        f"{words.get(key, key)} {formats.significant(value)}"
        for key, value in found
        if value is not None
    ]


def ending(row: object) -> list[str]:
    """Returns [`cut`] for a response that reached the largest length, else []."""
    return ["cut"] if entry(row, "finished") is False else []


def compared(experiment: Experiment) -> Html:
    """Returns the section with sample responses of the policies that were compared, to the first
    `MOST_PROMPTS` prompts; empty Html without samples.

    Prompts that all runs answered come first, because their responses can be compared.
    """
    runs = experiment.policy_runs
    # The first answer of each run to each prompt.
    by_prompt: dict[str, dict[int, Mapping[str, object]]] = {}
    for i, run in enumerate(runs):
        for row in run.samples:
            by_prompt.setdefault(str(row.get("prompt", "")), {}).setdefault(i, row)
    most = max(map(len, by_prompt.values()), default=0)
    order = sorted(by_prompt, key=lambda p: len(by_prompt[p]) < most)
    cards = []
    for prompt in order[:MOST_PROMPTS]:
        answers = [
            answer(
                side_label(runs[i], side),
                entry(row, side, "text"),
                measured(entry(row, side), "gold", "proxy") + ending(entry(row, side)),
            )
            for i, row in by_prompt[prompt].items()
            for side in ("sft", "rl")
        ]
        # RL and DPO runs that start from one SFT policy show its response once.
        cards.append(card(prompt, list(dict.fromkeys(answers))))
    note = f"The first {len(cards)} of {len(by_prompt)} prompts of the evaluation's samples."
    return section("samples", "Samples", cards and tag("p", note, class_="note"), *cards)


def spread(steps: Sequence[int]) -> list[int]:
    """Returns at most `MOST_STEPS` of the steps: the first, the middle and the last."""
    known = sorted(set(steps))
    if len(known) <= MOST_STEPS:
        return known
    return [known[0], known[len(known) // 2], known[-1]]


def written(experiment: Experiment) -> Html:
    """Returns the section with what RL wrote at the start, in the middle and at the end, side by
    side; empty Html without such samples.
    """
    parts: list[Html] = []
    for run in experiment.runs_of("rl"):
        rows = [row for row in run.written if number(row, "step") is not None]
        by_prompt: dict[str, dict[int, Mapping[str, object]]] = {}
        for row in rows:
            by_step = by_prompt.setdefault(str(row.get("prompt", "")), {})
            by_step.setdefault(int(number(row, "step") or 0), row)
        steps = spread([step for by_step in by_prompt.values() for step in by_step])
        cards = []
        for prompt, by_step in list(by_prompt.items())[:MOST_WRITTEN]:
            answers = [
                answer(
                    "Before training" if step == 0 else f"Step {step}",
                    entry(by_step[step], "response"),
                    measured(by_step[step], "reward", "gold", "kl") + ending(by_step[step]),
                )
                for step in steps
                if step in by_step
            ]
            cards.append(card(prompt, answers, columns=3 if len(steps) > 2 else 2))
        if not cards:
            continue
        if len(experiment.runs_of("rl")) > 1:
            parts.append(tag("h3", f"RL, {tuning_name(run.tuning)}"))
        splits = sorted({str(row.get("split", "validation")) for row in rows})
        which = " and ".join(split for split in splits)
        many = len(by_prompt)
        note = (
            f"Responses to the first {len(cards)} of {many} {which} prompts that were sampled "
            "with the same random keys at each step."
        )
        parts += [tag("p", note, class_="note"), *cards]
    return section("written", "What RL wrote, step by step", *parts)


def example_card(row: Mapping[str, object]) -> Html:
    """Returns a row that a reward model scored, as Html.

    Args:
        row: A row of a reward run's evaluation_samples.jsonl.
    """
    prompt = str(row.get("prompt", ""))
    if "chosen" in row:
        answers = [
            answer(name.capitalize(), entry(row, name, "text"), measured(entry(row, name), "score"))
            for name in ("chosen", "rejected")
        ]
        return card(prompt, answers)
    facts = measured(entry(row, "response"), "score") + measured(row, "label", "rating")
    return card(prompt, [answer("Response", entry(row, "response", "text"), facts)])


def reward_examples(experiment: Experiment) -> Html:
    """Returns the section with test rows and their scores by each reward model, its worst mistakes
    first; empty Html without such rows.
    """
    parts: list[Html] = []
    titles = {"mistake": "Worst mistakes", "first": "First rows"}
    runs = experiment.runs_of("reward")
    for run in runs:
        for why, title in titles.items():
            rows = [row for row in run.samples if row.get("why") == why]
            if not rows:
                continue
            whose = f", {tuning_name(run.tuning)}" if len(runs) > 1 else ""
            parts.append(tag("h3", f"{title}{whose}"))
            parts += [example_card(row) for row in rows[:MOST_WRITTEN]]
    note = "Rows of the test split with their normalised scores: 0 is the mean of training rows."
    return section("examples", "Scored rows", parts and tag("p", note, class_="note"), *parts)
