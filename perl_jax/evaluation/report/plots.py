"""The report's plots, as SVG in bytes. All functions take arrays, not folders.

The colours are from Okabe and Ito's set, which stays distinguishable with common colour blindness.
The line style repeats the information for grey prints.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from perl_jax.evaluation.intervals import Estimate
from perl_jax.evaluation.report.formats import label as printed

STYLES = {
    "lora": ("#0072B2", "-"),
    "full": ("#D55E00", "--"),
    "": ("#0072B2", "-"),
    "base": ("#374151", "-"),
}
OTHER_STYLES = (("#009E73", "-."), ("#CC79A7", ":"), ("#56B4E9", "-"), ("#E69F00", "--"))
PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
PART_LINES = ("-", "--", "-.", ":")
LARGEST_RAW = 1500
# A legend with more curves, or with longer names, is placed below the plot.
MOST_INSIDE, LONGEST_INSIDE = 4, 32
SETTINGS = {
    "svg.fonttype": "path",
    "svg.hashsalt": "perl_jax",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlecolor": "#111827",
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Curve:
    """A named line.

    Attributes:
        label: The name in the legend.
        tuning: Sets colour and line style (`style_of`), unless `style` is given.
        x: The x values.
        y: The y values, as many as x.
        faint_raw: Whether the line is smoothed and its measured values are drawn faintly behind it.
        style: (colour, line style) of the line; None takes that of the tuning.
    """

    label: str
    tuning: str
    x: np.ndarray
    y: np.ndarray
    faint_raw: bool = True
    style: tuple[str, str] | None = None


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred running mean of a vector, as long as the vector.

        smooth([0, 3, 6, 0], 3) == [1.5, 3, 3, 3]

    Args:
        values: The vector.
        window: The odd number of values in a mean; at both ends the window is cut off.
    """
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(values.size)
    low = np.maximum(0, index - window // 2)
    high = np.minimum(values.size, index + window // 2 + 1)
    return (total[high] - total[low]) / (high - low)


def smoothing_window(n: int) -> int:
    """Returns the window of the running mean for n points: odd, about a twelfth of n; 1 (no
    smoothing) for fewer than 12.
    """
    return 1 if n < 12 else 2 * (n // 24) + 1


def thin(x: np.ndarray, y: np.ndarray, largest: int = LARGEST_RAW) -> tuple[np.ndarray, np.ndarray]:
    """Returns every k-th point, including the last, for the smallest k that leaves at most
    `largest` points.

    Args:
        x: The x values.
        y: The y values.
        largest: The largest number of points.
    """
    step = -(-x.size // largest) if x.size else 1
    keep = np.arange(x.size - 1, -1, -step)[::-1]
    return x[keep], y[keep]


def binned_means(x: np.ndarray, y: np.ndarray, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Returns (means of x, means of y) in bins of about equally many points, sorted by x.

    Args:
        x: The x values.
        y: The y values, as many as x.
        bins: The number of bins; fewer if there are fewer points.
    """
    order = np.argsort(x, kind="stable")
    groups = np.array_split(order, min(bins, max(1, x.size)))
    return (
        np.array([x[g].mean() for g in groups if g.size]),
        np.array([y[g].mean() for g in groups if g.size]),
    )


def style_of(tuning: str) -> tuple[str, str]:
    """Returns (colour, line style) of a tuning.

    A name that is not in `STYLES` gets one of `OTHER_STYLES`, which its letters decide: always the
    same.
    """
    if tuning in STYLES:
        return STYLES[tuning]
    return OTHER_STYLES[sum(map(ord, tuning)) % len(OTHER_STYLES)]


def part_style(index: int) -> tuple[str, str]:
    """Returns (colour, line style) of the index-th part of a reward; the first 28 indices give
    different pairs.
    """
    return PHASE_COLOURS[index % len(PHASE_COLOURS)], PART_LINES[index % len(PART_LINES)]


def render(figure: Figure) -> bytes:
    """Returns the figure as SVG without the XML prologue; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names may hold characters that the font lacks; the plot shows a box for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data = buffer.getvalue()
    return data[data.index(b"<svg") :]


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draws each curve into the axes: the smoothed line over its faint measured values, or the
    unsmoothed line alone if `faint_raw` is False.
    """
    for curve in curves:
        colour, line = curve.style or style_of(curve.tuning)
        smoothed = curve.y
        if curve.faint_raw:
            axes.plot(*thin(curve.x, curve.y), color=colour, alpha=0.22, linewidth=0.9)
            smoothed = smooth(curve.y, smoothing_window(curve.y.size))
        marker = "o" if curve.x.size <= 12 else None
        axes.plot(
            *thin(curve.x, smoothed),
            color=colour,
            linestyle=line,
            linewidth=1.9,
            marker=marker,
            markersize=3.5,
            label=printed(curve.label),
        )


def finish(axes: Axes, xlabel: str, ylabel: str, legend: bool = True) -> None:
    """Sets axis labels and ticks, and a legend if there are several lines.

    Args:
        axes: The axes, updated in place.
        xlabel: The label of the x axis; `step` has ticks at whole numbers.
        ylabel: The label of the y axis.
        legend: Whether a legend is wanted.
    """
    axes.set_xlabel(xlabel)
    if xlabel == "step":
        low, high = axes.dataLim.intervalx
        if low == high:
            # Around a single step, matplotlib would show fractions of steps.
            axes.set_xlim(low - 1, high + 1)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    handles, _ = axes.get_legend_handles_labels()
    if legend and len(handles) > 1:
        axes.legend(loc="best", fontsize=9, handlelength=2.6)


def curves_plot(title: str, curves: Sequence[Curve], xlabel: str, ylabel: str) -> bytes:
    """Returns a plot of curves as SVG; a large legend is placed below the plot.

    Args:
        title: The title above the plot.
        curves: The curves.
        xlabel: The label of the x axis; `step` has ticks at whole numbers.
        ylabel: The label of the y axis.
    """
    long = any(len(printed(curve.label)) > LONGEST_INSIDE for curve in curves)
    below = len(curves) > 1 and (long or len(curves) > MOST_INSIDE)
    columns = 1 if long else 2
    lines = -(-len(curves) // columns) if below else 0
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.4, 3.5 + 0.2 * lines), layout="constrained")
        axes = figure.subplots()
        draw_curves(axes, curves)
        axes.set_title(title)
        finish(axes, xlabel, ylabel, legend=not below)
        if below:
            figure.legend(loc="outside lower left", ncols=columns, fontsize=9, handlelength=2.6)
        return render(figure)


def stacked_plot(title: str, panels: Sequence[tuple[str, Sequence[Curve]]], xlabel: str) -> bytes:
    """Returns plots stacked on a shared x axis, each with its own y scale, as SVG.

    Args:
        title: The title above the first plot.
        panels: (label of the y axis, curves) of each plot, from top to bottom.
        xlabel: The label of the shared x axis.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.4, 2.3 * len(panels) + 0.6), layout="constrained")
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for i, (axes, (ylabel, curves)) in enumerate(zip(every, panels, strict=True)):
            draw_curves(axes, curves)
            last = i == len(panels) - 1
            finish(axes, xlabel if last else "", ylabel, legend=i == 0)
        every[0].set_title(title)
        return render(figure)


def calibration_plot(
    tables: Sequence[tuple[str, str, Sequence[tuple[float, Estimate]]]],
) -> bytes:
    """Returns a reliability diagram as SVG: observed over predicted share, with bars for intervals.

    The diagonal is perfect calibration.

    Args:
        tables: (label, tuning, [(predicted, observed), ...]) for each model.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.0, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#6b7280", linewidth=1, linestyle=":", label="perfect")
        for label, tuning, rows in tables:
            colour, line = style_of(tuning)
            predicted = np.array([row[0] for row in rows])
            observed = np.array([row[1].value for row in rows])
            # Without an interval the ends are NaN, which draws no bar.
            below = observed - np.array([row[1].low for row in rows], dtype=np.float64)
            above = np.array([row[1].high for row in rows], dtype=np.float64) - observed
            axes.errorbar(
                predicted,
                observed,
                yerr=np.maximum(0, [below, above]),
                color=colour,
                linestyle=line,
                linewidth=1.7,
                marker="o",
                markersize=4,
                elinewidth=0.9,
                capsize=2,
                label=printed(label),
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_aspect("equal")
        axes.set_title("Is a stated 70 % right 70 % of the time?")
        finish(axes, "predicted probability", "observed share")
        return render(figure)


def phases_plot(bars: Mapping[str, Mapping[str, float]]) -> bytes:
    """Returns one stacked bar per run, seconds of a step by phase, as SVG.

    Args:
        bars: {run's name: {phase: seconds}}.
    """
    phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8.6, 0.55 * len(bars) + 1.5), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(bars))
        for i, phase in enumerate(phases):
            widths = np.array([bar.get(phase, 0.0) for bar in bars.values()])
            axes.barh(
                list(range(len(bars))),
                widths,
                left=left,
                height=0.6,
                label=printed(phase),
                color=PHASE_COLOURS[i % len(PHASE_COLOURS)],
                edgecolor="white",
                hatch="///" if i >= len(PHASE_COLOURS) else None,
            )
            left += widths
        axes.set_yticks(range(len(bars)), [printed(name) for name in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        figure.legend(
            loc="outside upper left", ncols=min(6, len(phases)), fontsize=9, handlelength=1.2
        )
        return render(figure)
