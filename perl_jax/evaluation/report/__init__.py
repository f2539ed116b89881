"""Writes one self-contained HTML page from the files in a run's folder.

Three kinds of folder are understood:

- A job's run: `config.json` and `metrics.jsonl`, and if they exist `evaluation.json`, `cost.json`,
  `evaluation_samples.jsonl` and `samples.jsonl`.
- An evaluation by itself: `evaluation.json` and `evaluation_samples.jsonl`, which
  `perl-jax evaluate` wrote into a folder of its own.
- An experiment: `experiment.json` with `title`, `summary`, `command`, `hardware`, `seconds`, `task`
  and `runs`, a list of {"name", "job", "tuning", "folder"}. Each folder lies inside the
  experiment's and is a job's run. `job` is base, sft, reward, rl or dpo (which the page calls by
  its loss: DPO, IPO, KTO, ORPO); `tuning` is lora, full or any other name.

`cost.json` holds `parameters_total`, `parameters_trainable`, `checkpoint_bytes`, `base_bytes`,
`seconds_per_step` (median), `peak_bytes_compiled`, `peak_bytes_measured` (null if the device does
not report it), `phases` ({name: seconds of a step}) and `compilations`.

`evaluation.json` of a reward run holds `n`, `groups`, `pairwise_accuracy`, `noise_ceiling`, `auc`,
`balanced_accuracy`, `accuracy`, `correlation`, `ece`, `reliability` (the bins of
`perl_jax.evaluation.calibration.reliability`) and `baselines` ({name: {"auc",
"balanced_accuracy"}}).

`evaluation.json` of an RL or DPO run holds `policies`, `win_rate`
(`perl_jax.evaluation.statistics.WinRate` with a `judge`: gold, judge or proxy), `gold_gain` and
`config` (`EvaluateConfig`); that of a DPO run also `pairwise_accuracy`. `policies` is {"sft": ...,
"rl": ...} with `gold_reward`, `proxy_reward`, `judge_reward`, `kl`, `length`, `eos_rate`,
`distinct_1` and `distinct_2`. "rl" is the run's policy, also in a DPO run.

A measure is a number or {"value", "low", "high", "n", "groups"}
(`perl_jax.evaluation.intervals.Estimate`). Files of earlier versions have no `groups`.

`evaluation_samples.jsonl` of a policy holds {"prompt", "sft": {"text", "gold", "proxy",
"finished"}, "rl": {...}} on each line, that of a reward model the rows of
`perl_jax.evaluation.examples.reward_examples`. `samples.jsonl` holds what RL wrote while it
trained: {"step", "split", "prompt", "response", "reward", "gold", "kl", "finished"}. Earlier
versions wrote the first to `samples.jsonl` and the second to `validation_samples.jsonl`; both are
read.

The first row of metrics, and `data` and `prompts` of `evaluation.json`, may hold numbers of rows
under `data/SPLIT/NAME`: of all rows, and of rows that were cut to fit
(`perl_jax.data.tokenise.TokenRows.facts`).

The metrics of an RL run may hold parts of the reward: `reward/model_0` and so on with
`reward/disagreement` for an ensemble, and `reward/term/NAME` for each term.

Missing data are left out or reported as not measured. The page has no script and loads nothing from
the network.
"""

from __future__ import annotations

from perl_jax.evaluation.report import curves, samples, sections
from perl_jax.evaluation.report.headline import headline_table
from perl_jax.evaluation.report.load import Experiment, read_experiment
from perl_jax.evaluation.report.markup import Html, join, section, tag
from perl_jax.evaluation.report.style import CSS
from perl_jax.evaluation.report.summary import summary_paragraph
from perl_jax.runtime import files
from perl_jax.runtime.files import PathLike, path_of, write_atomically
from perl_jax.runtime.outputs import check_writable
from perl_jax.runtime.progress import duration

__all__ = ["write_report"]

# No scripts, requests or frames: the page shows text from models and must never execute it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS = (
    curves.learning_curves,
    curves.gold_against_proxy,
    curves.calibration,
    sections.baseline_table,
    samples.reward_examples,
    sections.policies,
    samples.compared,
    samples.written,
    curves.rl_health,
    sections.rows_used,
    sections.time_spent,
    sections.reproduce,
)


def header(experiment: Experiment) -> Html:
    """Returns the page's header: the title, a line with task, hardware and time, and the
    summary.
    """
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
    """Returns the whole HTML document as text: the headline table, then the `SECTIONS` that have
    data, then what is missing.
    """
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


def write_report(run_dir: PathLike) -> files.Path:
    """Writes the file `report.html` into a run's or an experiment's folder and returns its path.

    An existing file is replaced. The same files in the folder give the same bytes. Raises UserError
    if the folder is missing or holds neither a run nor an experiment.
    """
    folder = path_of(run_dir)
    path = folder / "report.html"
    experiment = read_experiment(folder)
    check_writable(path)
    write_atomically(path, page(experiment))
    return path
