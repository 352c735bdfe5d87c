"""Figures of one run, and the style that all figures share.

Colour-blind readers can tell the colours apart, and so can readers of a grey print. On a `canvas`, text has its printed
size, so that it is legible in a column of 8 cm.
"""

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gradpruner.plan import PruningPlan
from gradpruner.record_sections import MethodReport

KEPT, MERGED, PRUNED = "#0072B2", "#E69F00", "#CCCCCC"  # Okabe and Ito's palette
# Marks on a coloured ground: a page exchanges black and white for its own text and ground, and must not exchange these.
ON_LIGHT, ON_DARK = "#010101", "#fefefe"
COLORS = (KEPT, MERGED, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Colour, marker and dashes repeat after 7, 9 and 4 lines, so no two of the 36 lines look alike, even without colour.
LINE_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": COLORS[i % 7], "marker": "os^DvPX<>"[i % 9], "linestyle": ("-", "--", "-.", ":")[i % 4]}
    for i in range(36)
)
WIDTH = 3.5  # inches
SMALL: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.7,
    "legend.handletextpad": 0.5,
}


@dataclass(frozen=True)
class Picture:
    """A picture in a report.

    Attributes:
        path: file of the picture.
        caption: sentences below the picture.
        alt: what it shows, with its numbers, for readers who cannot see it.
        name: what the picture is called: the paper's number for a figure of the paper.
    """

    path: Path
    caption: str
    alt: str
    name: str = ""


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Draws training loss and learning rate over optimizer steps."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["loss"] for entry in history], color=KEPT, label="loss")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per answer token)", ylim=(0, None))
    rate = axes.twinx()
    rate.plot(steps, [entry["learning_rate"] for entry in history], color="#888888", linestyle="--", linewidth=1)
    rate.set_ylabel("learning rate (dashed)")
    rate.set_ylim(0, None)
    save_figure(figure, path)


def plot_importance(plan: PruningPlan, report: MethodReport, path: Path) -> None:
    """Draws layer importance with each layer's fate and, for a per-step series, how soon the pruned set settled."""
    overlap = report.get("prefix_overlap")
    figure = Figure(figsize=(8, 5.2 if overlap else 3.2), layout="constrained")
    axes = figure.subplots(2 if overlap else 1, 1, squeeze=False)[:, 0]
    layers = range(plan.num_hidden_layers)
    merged = [layer for layers_in in plan.merges.values() for layer in layers_in]
    colors = [MERGED if i in merged else PRUNED if i in plan.pruned_layers else KEPT for i in layers]
    axes[0].bar(layers, plan.layer_importance, color=colors, edgecolor="black", linewidth=0.4)
    axes[0].set_yscale("log")
    axes[0].set(xlabel="decoder layer", ylabel="layer importance", xlim=(-0.7, plan.num_hidden_layers - 0.3))
    axes[0].set_xticks(range(0, plan.num_hidden_layers, max(1, plan.num_hidden_layers // 15)))
    fates = [("kept", KEPT), ("pruned, merged", MERGED), ("pruned", PRUNED)]
    axes[0].legend(
        handles=[Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=name) for name, color in fates],
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.18),
        frameon=False,
    )
    if overlap:
        points = [(step, value) for step, value in enumerate(overlap, start=1) if value is not None]
        axes[1].plot(*zip(*points, strict=True), color=KEPT, marker="o", markersize=3)
        axes[1].set(
            xlabel="importance steps used",
            ylabel="share of final pruned set",
            ylim=(0, 1.05),
            xlim=(0.5, len(overlap) + 0.5),
        )
    save_figure(figure, path)


def wrap_rows(labels: Iterable[str], least: float) -> tuple[list[str], float]:
    """Returns row labels wrapped to several lines, and the height in inches of all rows, each at least `least` high."""
    wrapped = [textwrap.fill(label, 28) for label in labels]
    return wrapped, len(wrapped) * max(least, 0.03 + 0.11 * max(label.count("\n") + 1 for label in wrapped))


def legend_below(figure: Figure) -> None:
    """Adds one legend for all axes below them, in two columns if these fit, and makes the figure higher by its size."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    layouts = ((2, 28), (1, 60)) if len(found) > 1 else ((1, 60),)  # columns, letters per line
    for num_columns, width in layouts:
        labels = [textwrap.fill(label, width) for label in found]
        handles = list(found.values())
        legend = figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=num_columns)
        size = legend.get_window_extent()
        if num_columns == 1 or size.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        legend.remove()


@contextmanager
def canvas(path: Path, height: float) -> Iterator[Figure]:
    """Yields a figure as wide as a column and `height` inches high, and writes it to `path` at the end."""
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        save_figure(figure, path, dpi=300)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure; the same data gives the same file."""
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text in SVG: a page can search it, and its colour follows the page's.
    with matplotlib.rc_context({"svg.hashsalt": "gradpruner", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=dpi, metadata=undated)
