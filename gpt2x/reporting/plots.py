"""Draws what a run recorded: one PNG per quantity, over optimizer steps."""

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, PercentFormatter, ScalarFormatter
from numpy.typing import NDArray

from gpt2x.files import make_directory, write_file
from gpt2x.reporting.metrics import column, read_metrics
from gpt2x.runs.layout import RunLayout

BLUE, ORANGE, GREY = "#2f6db3", "#d9662b", "#5f6b76"
# Of the sources of a mixture: told apart also by those who see no red and green (Okabe & Ito's palette).
SOURCE_COLORS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a6d3b")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot."""

    key: str
    """The key in metrics.jsonl."""
    label: str
    """Its name in the legend."""
    color: str = BLUE
    """Color of the line."""
    smoothed: bool = False
    """Whether a moving average is drawn over the light raw curve."""
    linewidth: float = 1.8
    """Width of the line in points."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One PNG."""

    name: str
    """File name without the suffix."""
    title: str
    """Headline."""
    y_label: str
    """What the y axis shows, with its unit."""
    y_format: Literal["plain", "percent", "thousands"] = "plain"
    """How its numbers are written."""
    curves: tuple[Curve, ...]
    """The lines, back to front."""
    starts_at_zero: bool = False
    """Whether the y axis includes zero, where the ratio of two values is what is read off."""


PLOTS = (
    Plot(
        name="loss",
        title="Loss",
        y_label="cross-entropy (nats per token)",
        curves=(
            Curve(key="train/loss", label="training", smoothed=True),
            Curve(key="val/loss", label="validation", color=ORANGE),
        ),
    ),
    Plot(
        name="token_accuracy",
        title="Validation token accuracy",
        y_label="next tokens predicted exactly",
        y_format="percent",
        curves=(Curve(key="val/token_accuracy", label="validation", color=ORANGE),),
    ),
    Plot(
        name="bits_per_byte",
        title="Validation bits per byte",
        y_label="bits per UTF-8 byte",
        curves=(Curve(key="val/bits_per_byte", label="validation", color=ORANGE),),
    ),
    Plot(
        name="learning_rate",
        title="Learning rate",
        y_label="learning rate",
        curves=(Curve(key="learning_rate", label="learning rate"),),
        starts_at_zero=True,
    ),
    Plot(
        name="grad_norm",
        title="Gradient norm before clipping",
        y_label="L2 norm (nats per token)",
        curves=(Curve(key="grad_norm", label="gradient norm", smoothed=True),),
        starts_at_zero=True,
    ),
    Plot(
        name="tokens_per_s",
        title="Throughput",
        y_label="tokens per second",
        y_format="thousands",
        curves=(Curve(key="tokens_per_s", label="throughput", smoothed=True),),
        starts_at_zero=True,
    ),
)


def write_plots(run_dir: Path) -> list[Path]:
    """Draws every plot that the run has records for into `run_dir/plots/` and returns the files.

    Raises:
        UserError: where the run has no readable metrics.jsonl, or the plots cannot be written.
    """
    metrics = read_metrics(run_dir)
    plots_dir = RunLayout(run_dir).plots_dir
    make_directory(plots_dir)
    drawn = [plot for plot in PLOTS if any(len(column(metrics, curve.key)[0]) for curve in plot.curves)]
    return [_write(draw(plot, metrics, run_dir.resolve().name), plots_dir / f"{plot.name}.png") for plot in drawn]


def draw(plot: Plot, metrics: Sequence[dict[str, Any]], run_name: str) -> Figure:
    """The figure of one plot; curves without records are left out."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve in [*plot.curves, *_curves_of_sources(plot, metrics)]:
        steps, values = column(metrics, curve.key)
        if len(steps):
            _draw_curve(axes, curve, steps, values, y_format=plot.y_format)
    axes.set_title(plot.title, loc="left", fontsize=13, fontweight="bold", pad=10)
    axes.set_title(run_name, loc="right", fontsize=10, color=GREY, pad=10)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.y_label)
    axes.yaxis.set_major_formatter(_formatter(plot.y_format))
    _dress(axes)
    if plot.starts_at_zero:
        axes.set_ylim(bottom=0)
    return figure


def _curves_of_sources(plot: Plot, metrics: Sequence[dict[str, Any]]) -> list[Curve]:
    """The validation curve once for each source of a mixture: `val/web/loss` beside `val/loss`."""
    found = []
    for curve in (curve for curve in plot.curves if curve.key.startswith("val/")):
        of_source = re.compile("val/.+" + re.escape(curve.key.removeprefix("val")))
        keys = dict.fromkeys(key for record in metrics for key in record if of_source.fullmatch(key))
        for key, color in zip(keys, itertools.cycle(SOURCE_COLORS)):
            name = key.removeprefix("val/").removesuffix(curve.key.removeprefix("val"))
            found.append(replace(curve, key=key, label=name, color=color, linewidth=1.0))
    return found


def _draw_curve(
    axes: Axes, curve: Curve, steps: NDArray[np.int64], values: NDArray[np.float64], *, y_format: str
) -> None:
    label = curve.label
    if curve.smoothed:
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3)
        values, label = smooth(values), f"{label}, smoothed"
    marker = "o" if len(steps) <= 40 else None  # a single record is a dot, since a line of one point is invisible
    label = f"{label} (last {_number(values[-1], y_format)})"
    axes.plot(steps, values, color=curve.color, marker=marker, markersize=4, linewidth=curve.linewidth, label=label)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average whose window is a twentieth of the curve so far.

    A window that grows has no lag where a curve falls steeply, at its start. A value that is not finite is
    passed over: one such record must not blank the rest of the curve.
    """
    smoothed, average = np.empty_like(values), np.nan
    for index, value in enumerate(values):
        if np.isfinite(value):
            average = value if np.isnan(average) else average + (value - average) / (1 + index / 20)
        smoothed[index] = average
    return smoothed


def _formatter(y_format: str) -> Formatter:
    if y_format == "percent":
        return PercentFormatter(xmax=1, decimals=None)
    if y_format == "thousands":
        return EngFormatter(sep="")
    formatter = ScalarFormatter(useMathText=True, useOffset=False)
    formatter.set_powerlimits((-3, 6))
    return formatter


def _number(value: float, y_format: str) -> str:
    if y_format == "percent":
        return f"{value:.1%}"
    return f"{value:,.0f}" if y_format == "thousands" else f"{value:.4g}"


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=GREY, labelcolor="#2b3036")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _write(figure: Figure, plot_file: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(plot_file, picture.getvalue())
    return plot_file
