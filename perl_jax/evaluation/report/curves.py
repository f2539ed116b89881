"""The sections of the report that consist of plots; a section without data is empty Html.

In this module `key` is the name of a metric in metrics.jsonl, such as `train/loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from perl_jax.evaluation.intervals import Estimate, wilson
from perl_jax.evaluation.report import formats, plots
from perl_jax.evaluation.report.load import (
    PREFERENCES,
    Experiment,
    Run,
    entry,
    number,
    series,
    tuning_name,
)
from perl_jax.evaluation.report.markup import Html, figure, section, tag
from perl_jax.evaluation.report.plots import Curve

LEARNING_PANELS = (
    ("base", "train/loss", "Base model: training loss", "nats a token"),
    ("sft", "train/loss", "SFT: training loss", "nats a token"),
    ("sft", "validation/loss", "SFT: validation loss", "nats a token"),
    ("reward", "train/loss", "Reward model: training loss", "nats"),
    ("reward", "validation/accuracy", "Reward model: validation accuracy", "share of pairs"),
    ("reward", "validation/auc", "Reward model: validation AUC", "AUC"),
    ("reward", "validation/correlation", "Reward model: validation correlation", "correlation"),
    ("rl", "validation/reward", "RL: validation reward", "reward"),
    ("rl", "validation/gold", "RL: validation gold reward", "reward"),
    ("rl", "validation/kl", "RL: validation KL from the reference", "nats a sequence"),
    ("rl", "validation/length", "RL: validation response length", "tokens"),
    ("rl", "validation/eos_rate", "RL: validation responses that end themselves", "share"),
    *(
        (loss, metric, f"{name}: {title}", unit)
        for loss, name in PREFERENCES.items()
        for metric, title, unit in (
            ("train/loss", "training loss", "loss"),
            ("validation/accuracy", "validation accuracy", "share in the right order"),
            ("dpo/chosen_reward", "implicit reward of the chosen", "nats"),
            ("dpo/rejected_reward", "implicit reward of the rejected", "nats"),
            ("kto/desirable_reward", "implicit reward of the desirable", "nats"),
            ("kto/undesirable_reward", "implicit reward of the undesirable", "nats"),
            ("kto/kl", "estimate of the KL", "nats a sequence"),
            ("orpo/sft_loss", "loss of the chosen", "nats a token"),
            ("orpo/odds_loss", "odds-ratio loss", "loss"),
        )
    ),
)
# Metrics that are parts of a reward: an ensemble's members, and terms, both before weighting.
MODEL_PREFIX, TERM_PREFIX = "reward/model_", "reward/term/"
PARTS = {MODEL_PREFIX: "reward model", TERM_PREFIX: "term"}
# A panel whose metric never changes is left out of the page.
HEALTH_PANELS = (
    ("kl/sequence", "KL from the reference", "nats a sequence"),
    ("kl/token", "KL from the reference, a token", "nats a token"),
    ("kl/beta", "KL coefficient", "beta"),
    ("reward/disagreement", "Disagreement of the reward models", "standard deviation"),
    ("response/length", "Response length", "tokens"),
    ("response/eos_rate", "Responses that end themselves", "share"),
    ("response/entropy", "Policy entropy", "nats a token"),
    ("value/explained_variance", "Value model: variance explained", "share"),
    ("advantage/std", "Spread of advantages", "standard deviation"),
    ("policy/ratio_deviation", "Ratio to the policy that sampled", "mean |ratio - 1|"),
    ("policy/clip_fraction", "Tokens beyond the ratio's bounds", "share"),
    ("policy/gradient_norm", "Policy gradient norm", "norm"),
    ("value/gradient_norm", "Value model's gradient norm", "norm"),
    ("sampler/mismatch", "Sampler against trainer", "mean exp |\u0394 log p|"),
)


def curve(run: Run, key: str, label: str) -> Curve | None:
    """Returns a metric of a run over its steps, or None if it was not logged.

    Args:
        run: The run.
        key: The metric's name; a metric of validation is marked as not to be smoothed.
        label: The name in the legend.
    """
    x, y = series(run.rows, key)
    # Validation is logged rarely and with little noise, so it is not smoothed.
    style = "base" if run.job == "base" else run.tuning
    return Curve(label, style, x, y, not key.startswith("validation/")) if x.size else None


def curves_of(runs: Sequence[Run], key: str) -> list[Curve]:
    """Returns one curve for each run that logged the metric `key`, labelled with the run's
    tuning.
    """
    found = (curve(run, key, tuning_name(run.tuning)) for run in runs)
    return [one for one in found if one is not None]


def describe(title: str, curves: Sequence[Curve]) -> str:
    """Returns a text alternative for a plot: its title, and the first and last value of each
    curve.
    """
    parts = [
        f"{c.label} goes from {formats.significant(c.y[0])} to {formats.significant(c.y[-1])}"
        for c in curves
    ]
    return f"{title}. {'; '.join(parts)}."


def panel(title: str, curves: Sequence[Curve], unit: str) -> Html:
    """Returns a figure of one metric over steps; empty Html without curves.

    Args:
        title: The title of the plot.
        curves: The metric's curves, one per run.
        unit: The label of the y axis.
    """
    if not curves:
        return Html("")
    picture = plots.curves_plot(title, curves, "step", unit)
    return figure(picture, "", describe(title, curves))


def grid(panels: Sequence[Html]) -> Html:
    """Returns the figures in a grid that adapts to the width of the screen; empty Html if all are
    empty.
    """
    shown = [one for one in panels if one]
    return tag("div", *shown, class_="grid") if shown else Html("")


def job_runs(experiment: Experiment, job: str) -> list[Run]:
    """Returns the runs of a job, one per tuning; for the job `base`, whose runs have no tuning,
    only the first run.
    """
    if job == "base":
        return [run for run in experiment.runs if run.job == "base"][:1]
    return experiment.runs_of(job)


def part_keys(run: Run) -> list[str]:
    """Returns the names of a run's metrics that are parts of its reward: reward models first, then
    terms.
    """
    logged = dict.fromkeys(key for row in run.rows for key in row)
    return [key for prefix in PARTS for key in logged if key.startswith(prefix)]


def part_name(key: str) -> str:
    """Returns a readable name of a part of the reward: `reward/term/length` becomes `term
    length`.
    """
    prefix = next(prefix for prefix in PARTS if key.startswith(prefix))
    return f"{PARTS[prefix]} {key.removeprefix(prefix)}"


def model_count(run: Run) -> int:
    """Returns how many reward models scored the policy.

    The number is that of the run's setting `reward`. Without that setting the metrics decide: the
    logged members of an ensemble, or else 1 if no part of the reward was logged.
    """
    if "reward" in run.settings:
        artefacts = run.settings["reward"]
        return len(artefacts) if isinstance(artefacts, list) else int(bool(artefacts))
    keys = part_keys(run)
    members = sum(key.startswith(MODEL_PREFIX) for key in keys)
    # A single reward model is the score itself and is not logged separately.
    return members or int(not keys)


def paid_by(runs: Sequence[Run]) -> str:
    """Returns the name of what gave the score of RL runs: `reward model`, `reward models`, `terms`,
    `reward model and terms` or `reward models and terms`.
    """
    models = max((model_count(run) for run in runs), default=1)
    terms = any(key.startswith(TERM_PREFIX) for run in runs for key in part_keys(run))
    named = ["reward models" if models > 1 else "reward model"] if models or not terms else []
    return " and ".join(named + ["terms"] * terms)


def part_curves(run: Run) -> list[Curve]:
    """Returns one curve per part of a run's reward; [] if the reward has a single part."""
    keys = part_keys(run)
    if len(keys) + (model_count(run) == 1) < 2:
        return []
    found = []
    for i, key in enumerate(keys):
        if (one := curve(run, key, part_name(key))) is not None:
            found.append(replace(one, style=plots.part_style(i)))
    return found


def reward_panels(runs: Sequence[Run]) -> list[Html]:
    """Returns the plots of RL rewards: score, return, true reward, and one plot per run of its
    reward's parts.

    A plot without data is empty Html.
    """
    paid = paid_by(runs)
    unit = "score" if "terms" in paid else "normalised score"
    whose = lambda run: f" ({tuning_name(run.tuning)})" if len(runs) > 1 else ""
    parts = [
        # A single curve has no legend, so the title names it.
        panel(
            f"RL: {'reward, by part' if len(curves) > 1 else curves[0].label}{whose(run)}",
            curves,
            "mean, before its weight",
        )
        for run in runs
        if (curves := part_curves(run))
    ]
    return [
        panel(f"RL: score by {paid}", curves_of(runs, "reward/score"), unit),
        panel("RL: return that it learns from", curves_of(runs, "reward/return"), "return"),
        panel("RL: gold reward", curves_of(runs, "reward/gold"), "gold reward"),
        *parts,
    ]


def learning_curves(experiment: Experiment) -> Html:
    """Returns the section of losses and validation metrics of every job, and of RL rewards; empty
    Html without metrics.
    """
    panels = [
        panel(title, curves_of(job_runs(experiment, job), key), unit)
        for job, key, title, unit in LEARNING_PANELS
    ]
    panels += reward_panels(experiment.runs_of("rl"))
    note = (
        "Strong line: running mean over about a twelfth of the steps. Faint line: every step. "
        "Validation is drawn as measured."
    )
    shown = grid(panels)
    kept = [tag("p", s) for run in experiment.runs_of("rl") if (s := kept_sentence(run))]
    return section(
        "curves",
        "Learning curves",
        shown and tag("p", note, class_="note"),
        shown,
        *(kept if shown else ()),
    )


def kept_sentence(run: Run) -> str:
    """Returns a sentence on the step whose policy an RL run kept and on its validation reward; ""
    if either is unknown.
    """
    step, reward = (
        number(run.artefact, "step"),
        number(run.artefact, "metrics", "validation/reward"),
    )
    if step is None or reward is None or not run.rows:
        return ""
    last = run.rows[-1]["step"]
    which = f"step {step:.0f} of {last}" if step != last else f"the last step, {last}"
    return (
        f"RL, {tuning_name(run.tuning)}: the policy is that of {which}, where the validation "
        f"reward was {formats.significant(reward)}."
    )


def rl_health(experiment: Experiment) -> Html:
    """Returns the section of RL diagnostics over steps (`HEALTH_PANELS`); empty Html without RL
    runs.

    Runs whose metric never changes are left out of the metric's plot.
    """
    runs = experiment.runs_of("rl")
    moving = lambda key: [one for one in curves_of(runs, key) if np.any(one.y != one.y[0])]
    panels = [panel(title, moving(key), unit) for key, title, unit in HEALTH_PANELS]
    note = (
        "KL grows from 0; entropy and length should not collapse; the sampler and the trainer "
        "should agree (1 is perfect)."
    )
    shown = grid(panels)
    return section("health", "RL step by step", shown and tag("p", note, class_="note"), shown)


def against_kl(run: Run, key: str) -> Curve | None:
    """Returns a metric over sqrt(KL), averaged in bins of steps with similar KL; None if fewer than
    two steps have both numbers.

    The KL is `kl/sequence`, in nats; a negative estimate counts as 0. Bins have about equally many
    steps (`plots.binned_means`).

    Args:
        run: The run.
        key: The metric's name.
    """
    kl = dict(zip(*series(run.rows, "kl/sequence"), strict=True))
    steps, values = series(run.rows, key)
    both = [(kl[s], v) for s, v in zip(steps, values, strict=True) if s in kl]
    if len(both) < 2:
        return None
    x, y = np.array(both).T
    # A Monte Carlo estimate of a small KL can be negative.
    means = plots.binned_means(np.sqrt(np.maximum(x, 0)), y)
    return Curve(tuning_name(run.tuning), run.tuning, *means, faint_raw=False)


def optimisation_sentence(run: Run) -> str:
    """Returns a sentence on whether the true reward fell while the proxy rose.

    "" if the true reward was logged at fewer than 12 steps, or not as often as the proxy.

    Both rewards are smoothed. The policy counts as over-optimised if the true reward lost more than
    a tenth of its rise after its peak and the proxy ended above its value at that peak.
    """
    steps, gold = series(run.rows, "reward/gold")
    _, proxy = series(run.rows, "reward/score")
    if gold.size < 12 or proxy.size != gold.size:
        return ""
    window = plots.smoothing_window(gold.size)
    gold, proxy = plots.smooth(gold, window), plots.smooth(proxy, window)
    top = int(np.argmax(gold))
    risen = gold[top] - gold[0]
    lost = gold[top] - gold[-1]
    name = tuning_name(run.tuning)
    if risen > 0 and lost > 0.1 * risen and proxy[-1] > proxy[top]:
        return (
            f"{name}: the gold reward peaks at {formats.significant(gold[top])} near step "
            f"{steps[top]:.0f} and ends at {formats.significant(gold[-1])}, while the proxy "
            f"goes on rising: past the peak the policy exploits the {paid_by([run])}."
        )
    return (
        f"{name}: no over-optimisation to be seen; the smoothed gold reward goes from "
        f"{formats.significant(gold[0])} to {formats.significant(gold[-1])}, its peak being "
        f"{formats.significant(gold[top])}."
    )


def gold_against_proxy(experiment: Experiment) -> Html:
    """Returns the over-optimisation section: true and proxy reward of RL runs over sqrt(KL) and
    over steps.

    Empty Html if no RL run recorded the true reward.
    """
    runs = [run for run in experiment.runs_of("rl") if series(run.rows, "reward/gold")[0].size]
    metrics = (("reward/gold", "gold reward"), ("reward/score", "proxy reward"))
    figures = []
    by_kl = [(label, [against_kl(run, key) for run in runs]) for key, label in metrics]
    if runs and all(c is not None for _, curves in by_kl for c in curves):
        title = "Against distance from the SFT policy"
        kept = [(label, [c for c in curves if c is not None]) for label, curves in by_kl]
        alt = " ".join(describe(label, curves) for label, curves in kept)
        picture = plots.stacked_plot(title, kept, "\u221aKL, KL in nats a sequence")
        figures.append(figure(picture, "Means over steps of like KL.", f"{title}: {alt}"))
    by_step = [(label, curves_of(runs, key)) for key, label in metrics]
    if runs and all(curves for _, curves in by_step):
        alt = " ".join(describe(label, curves) for label, curves in by_step)
        picture = plots.stacked_plot("Against steps", by_step, "step")
        figures.append(figure(picture, "Strong: running mean.", f"Against steps: {alt}"))
    shown = grid(figures)
    sentences = [tag("p", s) for run in runs if (s := optimisation_sentence(run))]
    note = (
        f"The policy is trained on the proxy (the {paid_by(runs)}); the gold reward is what the "
        "proxy stands for. When the proxy rises and the gold reward falls, RL has gone too far."
    )
    return section(
        "gold",
        "Gold reward against its proxy",
        shown and tag("p", note, class_="note"),
        shown,
        *(sentences if shown else ()),
    )


def reliability_rows(run: Run) -> list[tuple[float, Estimate]]:
    """Returns (predicted, observed with its interval) for each complete bin of a run's reliability
    table.

    Bins with missing values, or values outside [0, 1], are left out. Evaluations of earlier
    versions have no intervals; they get Wilson's, which treats all rows as independent.
    """
    rows = []
    bins = entry(run.evaluation, "reliability")
    for item in bins if isinstance(bins, list) else []:
        predicted, observed, n = (number(item, key) for key in ("predicted", "observed", "n"))
        if predicted is None or observed is None or n is None or n < 1:
            continue
        if 0 <= predicted <= 1 and 0 <= observed <= 1:
            shown = wilson(observed * int(n), int(n))
            if "observed_low" in item:
                shown = replace(
                    shown, low=number(item, "observed_low"), high=number(item, "observed_high")
                )
            rows.append((predicted, shown))
    return rows


def calibration(experiment: Experiment) -> Html:
    """Returns the section with the reliability plot of the reward models; empty Html if no run has
    a reliability table.
    """
    tables = []
    for run in experiment.runs_of("reward"):
        rows = reliability_rows(run)
        error = number(run.evaluation, "ece")
        ece = "" if error is None else f", error {formats.percent(error)}"
        if rows:
            tables.append((tuning_name(run.tuning) + ece, run.tuning, rows))
    if not tables:
        return Html("")
    alt = "Observed share against predicted probability. " + "; ".join(
        f"{label}: " + ", ".join(f"{p:.2f} predicted, {o.value:.2f} observed" for p, o in rows)
        for label, _, rows in tables
    )
    caption = (
        "Bars: 95 % intervals of the observed share in each bin. Error: expected calibration error."
    )
    picture = figure(plots.calibration_plot(tables), caption, alt)
    return section(
        "calibration", "Calibration of the reward model", tag("div", picture, class_="narrow")
    )
