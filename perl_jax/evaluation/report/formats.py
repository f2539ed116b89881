"""Formats numbers as text with a precision that suits their size or their uncertainty."""

from __future__ import annotations

import math
import re

from perl_jax.evaluation.intervals import Estimate
from perl_jax.runtime.progress import duration
from perl_jax.runtime.quantities import (  # noqa: F401  the report takes all formats from here
    MINUS,
    count,
    plain,
    signed,
    significant,
    size_of,
)

NOT_MEASURED = "not measured"
SPACE = "\u00a0"  # between a number and its unit, where no line may break

# Characters that HTML and fonts cannot show: control characters other than tab and newline, and
# lone surrogates, which JSON allows and UTF-8 does not.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
LONGEST_LABEL = 48


def printable(text: str) -> str:
    """Returns the text with CRLF replaced by LF and unprintable characters by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def label(text: str) -> str:
    """Returns a name for a plot: printable, on one line, cut to `LONGEST_LABEL` characters with an
    ellipsis.
    """
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "\u2026"


def seconds(value: float) -> str:
    """Returns a time, given in seconds: `0.8 ms`, `12.3 ms`, `0.412 s`, `41.2 s`, and from two
    minutes on `6 min 20 s`.
    """
    if value >= 120:
        return duration(value)
    return f"{significant(value * 1e3)} ms" if value < 0.1 else f"{significant(value)} s"


def percent(share: float, decimals: int = 1) -> str:
    """Returns a share in percent, `78.1 %`.

    A share below 10^(1 - decimals) percent keeps two significant digits: `0.042 %`.

    Args:
        share: The share, 1 for all.
        decimals: The number of decimals.
    """
    value = 100 * share
    if value and abs(value) < 10 ** (1 - decimals):
        return f"{significant(value, 2)}{SPACE}%"
    return f"{plain(value, decimals)}{SPACE}%"


def decimals_for(estimate: Estimate, scale: float = 1.0) -> int | None:
    """Returns the number of decimals, at most 4, that show the interval's half width with two
    digits.

    None if the estimate has no interval or one of width 0.

    Args:
        estimate: The estimate.
        scale: What the estimate is multiplied by before it is shown; 100 for percent.
    """
    if estimate.low is None or estimate.high is None:
        return None
    half = scale * (estimate.high - estimate.low) / 2
    if not half > 0:
        return None
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def interval(estimate: Estimate, with_sign: bool = False) -> str:
    """Returns a value with its interval, `0.834 (0.801 to 0.867)`, or the value alone without one.

    Args:
        estimate: The estimate.
        with_sign: Whether a positive value gets a plus sign.
    """
    decimals = decimals_for(estimate)
    if decimals is None or estimate.low is None or estimate.high is None:
        text = significant(abs(estimate.value))
        return signed(text, estimate.value) if with_sign else significant(estimate.value)
    value = (
        signed(f"{abs(estimate.value):.{decimals}f}", estimate.value)
        if with_sign
        else plain(estimate.value, decimals)
    )
    return f"{value} ({plain(estimate.low, decimals)} to {plain(estimate.high, decimals)})"


def percent_interval(estimate: Estimate) -> str:
    """Returns a share with its interval in percent, `78.1 % (76.2 to 79.9)`, or the share alone
    without an interval.
    """
    if estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    decimals = min(2, decimals_for(estimate, 100.0) or 0)
    decimals = max(1, decimals)
    ends = f"{plain(100 * estimate.low, decimals)} to {plain(100 * estimate.high, decimals)}"
    return f"{plain(100 * estimate.value, decimals)}{SPACE}% ({ends})"


def share_of(value: float, whole: float) -> str:
    """Returns value / whole in percent: `62 %`, `0.31 %`. `whole` must not be 0."""
    ratio = value / whole
    return percent(ratio, 0 if ratio >= 0.1 else 1)


def speed(value: float, other: float) -> str:
    """Returns how a time compares with another: `1.60× faster`, `1.20× slower`, or `same time`
    within 0.5 %.

    Args:
        value: The time that is described, above 0.
        other: The time that it is compared with, above 0, in the same unit.
    """
    ratio = other / value
    if 0.995 < ratio < 1.005:
        return "same time"
    times = ratio if ratio > 1 else 1 / ratio
    return f"{times:.2f}\u00d7 {'faster' if ratio > 1 else 'slower'}"
