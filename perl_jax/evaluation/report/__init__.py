"""One self-contained HTML page from a run's folder, and from nothing else.

Two kinds of folder are understood:

  * a job's run: `config.json` and `metrics.jsonl`, and as far as they exist `evaluation.json`,
    `cost.json` and `samples.jsonl`;
  * an experiment: `experiment.json` with `title`, `summary`, `command`, `hardware`, `seconds`,
    `task` and `runs`, a list of {"name", "job", "tuning", "folder"} whose folders, inside this
    one, are like the above. job: base, sft, reward, rl or dpo; tuning: lora, full or any other
    name.

`cost.json`: `parameters_total`, `parameters_trainable`, `checkpoint_bytes`, `base_bytes`,
`seconds_per_step` (median), `peak_bytes_compiled`, `peak_bytes_measured` (null where the device
does not say), `phases` ({name: seconds of a step}), `compilations`.

`evaluation.json` of a reward run: `n`, `groups`, `pairwise_accuracy`, `noise_ceiling`, `auc`,
`balanced_accuracy`, `accuracy`, `correlation`, `ece`, `reliability` (bins of
`perl_jax.evaluation.statistics.reliability`), `baselines` ({name: {"auc", "balanced_accuracy"}}).
Of an RL or DPO run: `policies` ({"sft": .., "rl": ..} of `gold_reward`, `proxy_reward`,
`judge_reward`, `kl`, `length`, `eos_rate`, `distinct_1`, `distinct_2`; "rl" is the run's policy, of
DPO too), `win_rate` (`perl_jax.evaluation.statistics.WinRate` with a `judge`: gold, judge or
proxy), `gold_gain`, `config` (`EvaluateConfig`); of a DPO run also `pairwise_accuracy`. A measure
is a number or {"value", "low", "high", "n", "groups"} (`perl_jax.evaluation.intervals.Estimate`),
in files of older versions without `groups`.

`samples.jsonl`: {"prompt", "sft": {"text", "gold", "proxy"}, "rl": {..}} a line, of both.

The first row of metrics, and `data` and `prompts` of `evaluation.json`, may hold numbers of rows
under `data/SPLIT/NAME`: all, and those that were cut to fit
(`perl_jax.data.tokenise.TokenRows.facts`).

An RL run's metrics may hold parts of its reward: `reward/model_0` .. and `reward/disagreement` of
an ensemble, `reward/term/NAME` of a term.

What is missing is left out or said to be not measured. The page has no script and asks nothing
of the network.
"""

from __future__ import annotations

from pathlib import Path

from perl_jax.evaluation.report import curves, sections
from perl_jax.evaluation.report.headline import headline_table, summary_paragraph
from perl_jax.evaluation.report.load import Experiment, read_experiment
from perl_jax.evaluation.report.markup import Html, join, section, tag
from perl_jax.evaluation.report.style import CSS
from perl_jax.runs.metrics import duration
from perl_jax.runtime.files import write_atomically

__all__ = ["write_report"]

# No script, no fetch, no frame: the page shows what models wrote, and must not run any of it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS = (
    curves.learning_curves,
    curves.gold_against_proxy,
    curves.calibration,
    sections.baseline_table,
    sections.policies,
    sections.samples,
    curves.rl_health,
    sections.rows_used,
    sections.time_spent,
    sections.reproduce,
)


def header(experiment: Experiment) -> Html:
    """Title, a line of facts and the summary."""
    facts = [experiment.task, experiment.hardware]
    if experiment.seconds is not None:
        facts.append(f"{duration(experiment.seconds)} in all")
    line = " \u00b7 ".join(fact for fact in facts if fact)
    return tag(
        "header",
        tag("h1", experiment.title),
        tag("p", line, class_="facts") if line else None,
        summary_paragraph(experiment),
    )


def page(experiment: Experiment) -> str:
    """The whole document."""
    comparison = set(experiment.tunings) == {"lora", "full"}
    title = "LoRA against full tuning" if comparison else "Results"
    parts = [header(experiment), section("headline", title, headline_table(experiment))]
    parts += [make(experiment) for make in SECTIONS]
    if experiment.notes:
        items = [tag("li", note) for note in experiment.notes]
        parts.append(section("notes", "What is missing", tag("ul", *items)))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", experiment.title),
        tag("style", Html(CSS)),
    )
    body = tag("body", tag("main", join(parts, "\n")))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` from the files in the folder and return its path.

    The same files give the same bytes. Raises UserError when the folder is missing or is neither a
    run's nor an experiment's.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_atomically(path, page(read_experiment(run_dir)))
    return path
