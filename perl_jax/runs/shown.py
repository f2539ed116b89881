"""How a run's numbers and samples are shown to a person: the names of metrics, and texts that fit
a terminal.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.text

from perl_jax.runtime.progress import duration

# The words for the last part of a metric's key, where they are not that part.
WORDS = {
    "sequence": "KL",
    "kl": "KL",
    "auc": "AUC",
    "score": "reward",
    "eos_rate": "ended",
}
# The splits that a metric's key may begin with; others begin with what the metric is about.
_HELD_OUT = ("validation", "test")
# Zero-width joiners, which belong to the letters of some scripts.
_JOINERS = "\u200c\u200d"
# The largest number of characters of a text on the console.
LONGEST = 400


def label(key: str) -> str:
    """Returns the name of a metric for people: `KL` for `kl/sequence`, `validation reward` for
    `validation/reward`.

    A metric of training has no word for its split; others begin with their split.

    Args:
        key: The metric's key in metrics.jsonl.
    """
    first, _, rest = key.partition("/")
    name = rest.split("/")[-1] if rest else first
    word = WORDS.get(name, name.replace("_", " "))
    return f"{first} {word}" if first in _HELD_OUT else word


def visible(text: str) -> str:
    """Returns the text with control and other invisible characters as escapes, `\\x1b`; line breaks
    stay.

    A terminal would obey them: a model's text must not move the cursor or change its colours.
    """
    return "".join(
        char
        if char in "\n" or char in _JOINERS or unicodedata.category(char)[0] not in "C"
        else char.encode("unicode_escape").decode("ascii")
        for char in text.replace("\u2028", "\n").replace("\u2029", "\n")
    )


def shortened(text: str, longest: int) -> str:
    """Returns the text; a longer one is cut and says how many characters are left out.

    Args:
        text: The text.
        longest: The largest number of characters.
    """
    left_out = len(text) - longest
    return text if left_out <= 0 else f"{text[:longest]}\u2026 ({left_out:,} characters more)"


def number(value: float | None) -> str:
    """Returns a number with four digits, or `not finite` for None."""
    return "not finite" if value is None else f"{value:.4g}"


def measures_of(sample: Mapping[str, Any]) -> str:
    """Returns the numbers of a sample in words: `reward 0.31 (model 0.2, length -0.1), gold 1,
    ended`.

    Args:
        sample: A row of samples.jsonl.
    """
    shown = f"reward {number(sample.get('reward'))}"
    if parts := sample.get("parts"):
        each = (f"{name.removeprefix('term/')} {number(part)}" for name, part in parts.items())
        shown += f" ({', '.join(each)})"
    for name in ("gold", "kl"):
        if name in sample:
            shown += f", {WORDS.get(name, name)} {number(sample[name])}"
    if "finished" in sample:
        shown += ", ended" if sample["finished"] else ", cut at the maximum length"
    return shown


def estimate_text(found: Mapping[str, Any] | float, percent: bool = False) -> str:
    """Returns a value with its 95 % interval, `0.834 (0.801 to 0.867)`, or the value alone.

    Args:
        found: A number, or the fields of an `intervals.Estimate`.
        percent: Whether the value is a share, shown as `78.1 % (76.2 % to 79.9 %)`.
    """
    shown = lambda value: f"{100 * value:.1f} %" if percent else f"{value:.3g}"
    if not isinstance(found, Mapping):
        return shown(found)
    text = shown(found["value"])
    if found.get("low") is None or found.get("high") is None:
        return text
    return f"{text} ({shown(found['low'])} to {shown(found['high'])})"


# The measures of a test split in the order in which they are said: key, name, whether a share.
_TEST_MEASURES = (
    ("pairwise_accuracy", "pairs in the right order", True),
    ("auc", "AUC", False),
    ("balanced_accuracy", "balanced accuracy", True),
    ("correlation", "correlation", False),
    ("ece", "calibration error", True),
)


def test_text(job: str, results: Mapping[str, Any]) -> str:
    """Returns a sentence with the measures of a job's test rows, with their intervals.

    Args:
        job: The job's name, with which the sentence begins.
        results: The content of evaluation.json.
    """
    said = [
        f"{name} {estimate_text(results[key], percent)}"
        for key, name, percent in _TEST_MEASURES
        if key in results
    ]
    rows = next(
        (
            results[key]["n"]
            for key in ("pairwise_accuracy", "auc", "correlation")
            if key in results
        ),
        None,
    )
    many = "" if rows is None else f" of {rows:,} rows"
    return f"{job}: test{many}: {', '.join(said)}."


# The metrics of training that the end of a job says.
_TRAINING = ("train/loss", "reward/score", "reward/gold", "kl/sequence")


def training_text(job: str, rows: Sequence[Mapping[str, Any]], step: int, best: bool) -> str:
    """Returns a sentence with the numbers of the step that a training keeps, and the time of all
    steps.

    Args:
        job: The job's name, with which the sentence begins.
        rows: The rows of metrics, one per step, as in metrics.jsonl.
        step: The step that is kept.
        best: Whether it is kept because it was the best validated one.
    """
    names = ("time/step", "time/validate")
    seconds = sum(row.get(name) or 0.0 for row in rows for name in names)
    kept = next((row for row in rows if row["step"] == step), {})
    parts = []
    for where, keys in (
        ("validation", [key for key in kept if key.startswith("validation/")]),
        ("training", [key for key in _TRAINING if key in kept]),
    ):
        said = ", ".join(
            f"{label(key).removeprefix('validation ')} {number(kept[key])}" for key in keys
        )
        parts += [f"{where} {said}"] if said else []
    why = "the best one" if best else "the last one"
    steps = f"{len(rows)} steps in {duration(seconds)}"
    return f"{job}: {steps}; step {step}, {why}: {'; '.join(parts)}."


def sample_text(
    job: str, step: int, samples: Sequence[Mapping[str, Any]], width: int | None = None
) -> str:
    """Returns samples as text for a terminal, a few lines each.

    Texts are wrapped, and long ones are cut with a count of what is left out.

    Args:
        job: The job's name, with which each sample begins.
        step: The step.
        samples: Rows of samples.jsonl.
        width: Columns of the terminal; None: those of this one.
    """
    columns = shutil.get_terminal_size((100, 24)).columns if width is None else width
    parts = []
    for sample in samples:
        split = sample.get("split", "")
        heading = f"{job} step {step}, a {split} prompt: " if split else f"{job} step {step}: "
        parts.append(_wrapped(heading, measures_of(sample), columns, indent=2))
        for name in ("prompt", "response"):
            words = shortened(visible(str(sample.get(name, ""))), LONGEST)
            parts.append(_wrapped(f"  {name:<8}  ", words or "(empty)", columns, indent=12))
    return "\n".join(parts)


def _wrapped(start: str, text: str, columns: int, indent: int) -> str:
    """Returns a text in lines of at most so many columns.

    Args:
        start: What comes before the first line.
        text: The text; its line breaks stay.
        columns: Columns of the terminal; wide characters take two.
        indent: Spaces before every line but the first.
    """
    console = rich.console.Console(width=max(columns, 40), color_system=None, legacy_windows=False)
    lines = rich.text.Text(start + text).wrap(console, max(columns, 40) - indent)
    first, *others = [line.plain.rstrip() for line in lines]
    return "\n".join([first, *(" " * indent + line for line in others)])
