"""The sections of the page that are pictures; each is empty when its data are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from perl_jax.evaluation.intervals import Estimate, wilson
from perl_jax.evaluation.report import formats, plots
from perl_jax.evaluation.report.load import Experiment, Run, entry, number, series, tuning_name
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
    ("dpo", "train/loss", "DPO: training loss", "loss"),
    ("dpo", "validation/accuracy", "DPO: validation accuracy", "share of pairs"),
    ("dpo", "dpo/chosen_reward", "DPO: implicit reward of the chosen", "nats"),
    ("dpo", "dpo/rejected_reward", "DPO: implicit reward of the rejected", "nats"),
)
# Of a reward: the members of an ensemble, and terms; each is logged before it is weighed.
MODEL_PREFIX, TERM_PREFIX = "reward/model_", "reward/term/"
PARTS = {MODEL_PREFIX: "reward model", TERM_PREFIX: "term"}
# Left out of the page where it stays as it was at the first step.
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
    """A metric of a run over its steps, None where it was not logged."""
    x, y = series(run.rows, key)
    # Validation is logged seldom and is no noisy copy of a smoother truth: drawn as it is.
    style = "base" if run.job == "base" else run.tuning
    return Curve(label, style, x, y, not key.startswith("validation/")) if x.size else None


def curves_of(runs: Sequence[Run], key: str) -> list[Curve]:
    """One curve a run that logged the metric."""
    found = (curve(run, key, tuning_name(run.tuning)) for run in runs)
    return [one for one in found if one is not None]


def describe(title: str, curves: Sequence[Curve]) -> str:
    """Words for those who cannot see the picture: where each curve starts and ends."""
    parts = [
        f"{c.label} goes from {formats.significant(c.y[0])} to {formats.significant(c.y[-1])}"
        for c in curves
    ]
    return f"{title}. {'; '.join(parts)}."


def panel(title: str, curves: Sequence[Curve], unit: str) -> Html:
    """A figure of one metric over steps; empty without curves."""
    if not curves:
        return Html("")
    picture = plots.curves_plot(title, curves, "step", unit)
    return figure(picture, "", describe(title, curves))


def grid(panels: Sequence[Html]) -> Html:
    """Figures beside each other as far as the screen allows; empty without any."""
    shown = [one for one in panels if one]
    return tag("div", *shown, class_="grid") if shown else Html("")


def job_runs(experiment: Experiment, job: str) -> list[Run]:
    """The runs of a job; the base model's have no tuning to choose by."""
    if job == "base":
        return [run for run in experiment.runs if run.job == "base"][:1]
    return experiment.runs_of(job)


def part_keys(run: Run) -> list[str]:
    """The metrics of a run that are parts of its reward, reward models first."""
    logged = dict.fromkeys(key for row in run.rows for key in row)
    return [key for prefix in PARTS for key in logged if key.startswith(prefix)]


def part_name(key: str) -> str:
    """`reward/term/length` is `term length`."""
    prefix = next(prefix for prefix in PARTS if key.startswith(prefix))
    return f"{PARTS[prefix]} {key.removeprefix(prefix)}"


def model_count(run: Run) -> int:
    """How many reward models paid the policy: from the settings, or else from what was logged."""
    if "reward" in run.settings:
        artefacts = run.settings["reward"]
        return len(artefacts) if isinstance(artefacts, list) else int(bool(artefacts))
    keys = part_keys(run)
    members = sum(key.startswith(MODEL_PREFIX) for key in keys)
    # A single reward model is the score itself and is not logged apart.
    return members or int(not keys)


def paid_by(runs: Sequence[Run]) -> str:
    """What gave the score: `reward model`, `reward models`, `terms`, `reward models and terms`."""
    models = max((model_count(run) for run in runs), default=1)
    terms = any(key.startswith(TERM_PREFIX) for run in runs for key in part_keys(run))
    named = ["reward models" if models > 1 else "reward model"] if models or not terms else []
    return " and ".join(named + ["terms"] * terms)


def part_curves(run: Run) -> list[Curve]:
    """A curve a part of the reward; none where a single part is the whole."""
    keys = part_keys(run)
    if len(keys) + (model_count(run) == 1) < 2:
        return []
    found = []
    for i, key in enumerate(keys):
        if (one := curve(run, key, part_name(key))) is not None:
            found.append(replace(one, style=plots.part_style(i)))
    return found


def reward_panels(runs: Sequence[Run]) -> list[Html]:
    """What RL is paid: the score, the return that is left of it, the gold, the parts run by run."""
    paid = paid_by(runs)
    unit = "score" if "terms" in paid else "normalised score"
    whose = lambda run: f" ({tuning_name(run.tuning)})" if len(runs) > 1 else ""
    parts = [
        panel(f"RL: reward, by part{whose(run)}", part_curves(run), "mean, before its weight")
        for run in runs
    ]
    return [
        panel(f"RL: score by {paid}", curves_of(runs, "reward/score"), unit),
        panel("RL: return that it learns from", curves_of(runs, "reward/return"), "return"),
        panel("RL: gold reward", curves_of(runs, "reward/gold"), "gold reward"),
        *parts,
    ]


def learning_curves(experiment: Experiment) -> Html:
    """Losses and validation of every job, and what RL is paid."""
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
    """Which step of an RL run its policy is of, and what was validated there; empty where that is
    not known.
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
    """A metric against sqrt(KL), averaged over steps of like KL; None without both."""
    kl = dict(zip(*series(run.rows, "kl/sequence"), strict=True))
    steps, values = series(run.rows, key)
    both = [(kl[s], v) for s, v in zip(steps, values, strict=True) if s in kl]
    if len(both) < 2:
        return None
    x, y = np.array(both).T
    # A Monte Carlo estimate of a small KL can be below zero.
    means = plots.binned_means(np.sqrt(np.maximum(x, 0)), y)
    return Curve(tuning_name(run.tuning), run.tuning, *means, faint_raw=False)


def optimisation_sentence(run: Run) -> str:
    """Whether the gold reward turned while the proxy rose, from the smoothed curves."""
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
    """The over-optimisation plot: gold and proxy on one x axis, sqrt(KL) and steps."""
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
    """(predicted, observed with its interval) of the bins that are whole and within [0, 1].

    Evaluations without intervals are of versions that took every row for independent.
    """
    rows = []
    bins = entry(run.evaluation, "reliability")
    for item in bins if isinstance(bins, list) else []:
        predicted, observed, n = (number(item, key) for key in ("predicted", "observed", "n"))
        if None in (predicted, observed, n) or n < 1:
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
