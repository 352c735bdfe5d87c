"""Pictures that compare runs: loss over steps, lines along an axis, bars."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from gradpruner.reporting.figures import COLORS, LINE_STYLES, PRUNED, Picture, canvas, legend_below, wrap_rows
from gradpruner.reporting.labels import METHOD_LABELS
from gradpruner.reporting.means import DENSE, Line, Measured

TITLE_WIDTH = 44  # letters of a line above a panel
NUM_SMOOTHED = 8  # steps in the moving mean of a loss curve
HATCHES = ("", "////", "....", "xxxx", "----", "||||")


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Picture:
    """Draws the training loss of several runs, the paper's Figure 1: every step pale, and a moving mean.

    Args:
        histories: by label, entries with `step` (optimizer step, from 1) and `loss` (nats per answer token).
        path: file of the picture.
    """
    alt = []
    with canvas(path, 2.1) as figure:
        axes = figure.subplots()
        for index, (label, history) in enumerate(histories.items()):
            style = LINE_STYLES[index % len(LINE_STYLES)]
            steps, losses = [entry["step"] for entry in history], [entry["loss"] for entry in history]
            axes.plot(steps, losses, color=style["color"], linewidth=0.5, alpha=0.3)
            # Over earlier steps only: a centred mean would smooth away the fall in the first steps, which is the point.
            window = max(NUM_SMOOTHED, len(losses) // 40)
            smooth = [float(np.mean(losses[max(0, i + 1 - window) : i + 1])) for i in range(len(losses))]
            axes.plot(steps, smooth, label=label, markevery=max(1, len(losses) // 8), **style)
            alt.append(f"{label}: {smooth[0]:.2f} at step {steps[0]}, {smooth[-1]:.2f} at step {steps[-1]}")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", ylim=(0, None))
        axes.grid(alpha=0.3)
        legend_below(figure)
    caption = f"Training loss; pale: every step, strong: mean of the last {NUM_SMOOTHED}, or fortieth, of the steps."
    return Picture(path, caption, f"Line chart of training loss. {'; '.join(alt)}.")


def plot_lines(
    panels: Mapping[str, Mapping[str, Line]], x_label: str, path: Path, caption: str, spread: float = 0.0
) -> Picture:
    """Draws one panel per metric and one line per method; the dense model is a horizontal line across the panel.

    Args:
        panels: lines by name of the metric and by label.
        x_label: label of the x axis.
        path: file of the picture.
        caption: caption of the picture.
        spread: width, in units of x, over which lines are shifted so that their error bars do not overlap.
    """
    dense = METHOD_LABELS[DENSE]
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines if label != dense))
    with canvas(path, 1.9) as figure:
        for axes, (metric, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for index, label in enumerate(labels):
                line = lines.get(label, {})
                shift = spread * (index / (len(labels) - 1) - 0.5) if len(labels) > 1 else 0.0  # -spread/2 to spread/2
                axes.errorbar(
                    [x + shift for x in line],
                    [point.value for point in line.values()],
                    [point.error for point in line.values()],
                    label=label,
                    elinewidth=0.6,
                    capsize=1.5,
                    capthick=0.6,
                    **LINE_STYLES[index % len(LINE_STYLES)],
                )
            for point in lines.get(dense, {}).values():
                axes.axhline(point.value, color="#666666", linewidth=1.2, label=dense, zorder=0)
            axes.set(xlabel=x_label, ylabel=metric)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6, steps=[1, 2, 5, 10]))
            left, right = axes.get_xlim()  # at least 2 units wide, also around a single point
            axes.set_xlim(min(left, (left + right) / 2 - 1), max(right, (left + right) / 2 + 1))
            axes.grid(alpha=0.3)
        legend_below(figure)
    return Picture(path, caption, "Line chart. " + " ".join(_said(metric, lines) for metric, lines in panels.items()))


def plot_bars(groups: Mapping[str, Mapping[str, Mapping[str, Measured]]], path: Path, caption: str) -> Picture:
    """Draws one row of panels per group, one panel per metric, and one bar per label.

    Args:
        groups: bars by title of the group, by name of the metric and by label.
        path: file of the picture.
        caption: caption of the picture.
    """
    metrics = list(dict.fromkeys(metric for panels in groups.values() for metric in panels))
    labels = [list(dict.fromkeys(label for bars in panels.values() for label in bars)) for panels in groups.values()]
    wrapped, heights = zip(*(wrap_rows(own, 0.2) for own in labels), strict=True)
    titles = [textwrap.fill(title, TITLE_WIDTH) for title in groups]
    num_lines = sum(1 + title.count("\n") for title in titles)
    with canvas(path, 0.35 + sum(heights) + 0.23 * len(groups) + 0.12 * num_lines) as figure:
        grid = figure.subplots(
            len(groups), len(metrics), squeeze=False, sharey="row", sharex="col", height_ratios=heights
        )
        for row, own, texts, title, panels in zip(grid, labels, wrapped, titles, groups.values(), strict=True):
            row[0].set_title(title, loc="left")
            row[0].set(yticks=range(len(own)), yticklabels=texts, ylim=(len(own) - 0.5, -0.5))
            for axes, metric in zip(row, metrics, strict=True):
                for place, label in enumerate(own):
                    if label in panels.get(metric, {}):
                        _draw_bar(axes, place, panels[metric][label], is_dense=label == METHOD_LABELS[DENSE])
        for axes, metric in zip(grid[-1], metrics, strict=True):
            ends = [bar.value + bar.error for panels in groups.values() for bar in panels.get(metric, {}).values()]
            axes.set(xlabel=metric, xlim=(0, 1.65 * max(ends)))  # room for the numbers
    said = [
        f"{title}, {_said(metric, {label: {0.0: bar} for label, bar in bars.items()})}"
        for title, panels in groups.items()
        for metric, bars in panels.items()
    ]
    return Picture(path, caption, f"Bar chart. {' '.join(said)}")


def _draw_bar(axes: Any, place: int, bar: Measured, is_dense: bool) -> None:
    style = {"color": PRUNED} if is_dense else {"color": COLORS[place % 7], "hatch": HATCHES[place % 6]}
    axes.barh(place, bar.value, 0.7, edgecolor="black", linewidth=0.4, **style)
    axes.errorbar(bar.value, place, xerr=bar.error, color="black", elinewidth=0.7, capsize=1.5)
    beside: dict[str, Any] = {"xytext": (2, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{bar.value:.3f}", (bar.value + bar.error, place), **beside)


def _said(metric: str, lines: Mapping[str, Line]) -> str:
    """Returns the numbers of a panel as text; places at x = 0, which dense and bars have, are not named."""
    values = [
        f"{label} " + ", ".join(f"{point.value:.3f}" + (f" at {x:g}" if x else "") for x, point in line.items())
        for label, line in lines.items()
    ]
    return f"{metric}: {'; '.join(values)}."
