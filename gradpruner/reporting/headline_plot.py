"""Draws the headline chart: one panel per axis for pages, and all panels with legend and caption as one picture."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradpruner.finetune.spec import ANSWERS_LOSS
from gradpruner.messages import parameters
from gradpruner.record import RunRecord
from gradpruner.reporting.figures import KEPT, MERGED, ON_DARK, ON_LIGHT, SMALL, Picture, canvas, save_figure
from gradpruner.reporting.headline import DROPS, ENDS_DENSE, MEMORY, NARROWS, OURS, PARAMETERS, TIME, Headline, Point
from gradpruner.reporting.plain_names import MODES, dataset_title, plain_setting
from gradpruner.reporting.tables import dataset_name

COLORS = {OURS: KEPT, DROPS: MERGED, NARROWS: "#009E73", ENDS_DENSE: "#CC79A7"}
COLOR_NAMES = {OURS: "blue", DROPS: "orange", NARROWS: "green", ENDS_DENSE: "pink"}
KIND_NAMES = {
    OURS: "GradPruner and its variants",
    DROPS: "other methods that drop layers",
    NARROWS: "methods that narrow layers",
    ENDS_DENSE: "methods that end dense",
}
LETTERS = {OURS: ON_DARK, DROPS: ON_LIGHT, NARROWS: ON_DARK, ENDS_DENSE: ON_LIGHT}
PAPER = "#888888"
NUM_MARKS_WIDE = 18  # marks side by side that fill a panel
PANEL_HEIGHT = 2.5  # inches
LEGEND_COLUMNS = 3
ORDER_NOTE = (
    " Marks that would hide each other stand side by side, in the order of their places, equal ones best first; a"
    " bracket says where they belong."
)


def draw_panels(chart: Headline, folder: Path, suffix: str = ".svg") -> list[Picture]:
    """Draws a file for each axis that was measured."""
    pictures = []
    for axis in _axes_of(chart):
        path = folder / f"headline-{axis}{suffix}"
        with canvas(path, PANEL_HEIGHT) as figure:
            _draw(figure.subplots(), chart, axis)
        name = _axis_name(chart, axis)
        said = "; ".join(
            f"{point.label} {point.quality.value:.3f} at {point.places[axis]:.0f} %"
            for point in chart.points
            if axis in point.places
        )
        dense = f" Dense: {chart.dense.value:.3f}." if chart.dense else ""
        alt = f"Chart of {chart.metric} against {name}. {said}.{dense}"
        pictures.append(Picture(path, chart.axis_notes.get(axis, ""), alt, f"{chart.metric} against {name}"))
    return pictures


def write_headline(chart: Headline, path: Path) -> Picture:
    """Writes all panels with a legend and the caption as one picture, `.svg` or `.png`."""
    axes_names = _axes_of(chart)
    caption = caption_of(chart)
    text = textwrap.fill(caption, 150)
    heights = [2.6, 0.05 + 0.17 * -(-len(chart.points) // LEGEND_COLUMNS), 0.05 + 0.15 * (1 + text.count("\n"))]
    style = SMALL | {"font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, sum(heights)), layout="constrained", facecolor=ON_DARK)
        charts, legend, below = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, axis in zip(charts.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
            _draw(axes, chart, axis)
        legend.legend(*_legend(chart), loc="center left", ncols=LEGEND_COLUMNS, fontsize=7.5, columnspacing=2.0)
        below.text(0.01, 0.95, text, ha="left", va="top", fontsize=7, color="#555555")
        save_figure(figure, path, dpi=200)
    return Picture(path, caption, f"{len(axes_names)} charts of {chart.metric}. {caption}")


def caption_of(chart: Headline) -> str:
    """Returns what the chart shows: model, data, seeds, intervals, and how time and memory were measured."""
    by_note: dict[str, list[str]] = {}
    for note in chart.axis_notes.values():
        name, _, how = note.partition(": ")
        by_note.setdefault(how, []).append(name)
    named = {how: " and ".join(names) for how, names in by_note.items()}
    notes = "".join(f" {names[0].upper()}{names[1:]}: {how}." for how, names in named.items())
    colors = [kind for kind in COLORS if any(point.kind == kind for point in chart.points)]
    meaning = ", ".join(f"{COLOR_NAMES[kind]}: {KIND_NAMES[kind]}" for kind in colors)
    crowded = len(chart.points) > 1
    left_out = f" Left out, for lack of a dataset: {', '.join(chart.left_out)}." if chart.left_out else ""
    without = [axis for axis in (TIME, MEMORY) if any(axis not in point.places for point in chart.points)]
    missing = sorted({point.letter for point in chart.points for axis in without if axis not in point.places})
    lacks = ""
    if missing and chart.axis_notes:
        lacks = f" Without a measured {' and '.join(without)}: {', '.join(missing)}."
    paper = " Grey: the paper's values, of its own models." if any(point.paper for point in chart.points) else ""
    return (
        f"{scale_of(chart.records)}. Bars: 95 % interval over test rows and seeds. "
        f"{meaning[0].upper() + meaning[1:]}."
        f"{ORDER_NOTE * crowded}"
        f"{notes}{lacks}{left_out}{paper}"
    )


def scale_of(records: Sequence[RunRecord]) -> str:
    """Returns the scale of runs: model, datasets with their rows, kind of fine-tuning and number of seeds."""
    first = records[0]
    mode = first.config["finetune"]["mode"]
    train = _span(run.config["dataset"].get("max_train_samples") or 0 for run in records)
    test = _span(run.metrics["num_examples"] for run in records)
    steps = _span(run.finetune["steps"] for run in records)
    datasets = sorted({name for run in records for name in [_dataset(run)]})
    rows = f"{train} training rows" if train != "0" else "all training rows"
    by_point: dict[tuple[str, str], set[int]] = {}
    for run in records:
        by_point.setdefault((run.pruning["method"], _dataset(run)), set()).add(run.seed)
    seeds = _span(len(own) for own in by_point.values())
    return (
        f"{first.model['name']} ({parameters(first.model['num_parameters'])} parameters) on {_listed(datasets)}, "
        f"{rows} and {test} test rows each, {MODES.get(mode, mode)}{_loss(first)}, {steps} steps, {seeds} "
        f"seed{'' if seeds == '1' else 's'} per method"
    )


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _loss(run: RunRecord) -> str:
    """Returns what all runs of the chart learn from, behind a comma; nothing if it is answers alone."""
    settings = run.config["finetune"]
    if settings.get("loss", ANSWERS_LOSS) == ANSWERS_LOSS:
        return ""
    keys = ["loss", *(["tuned_teacher"] if settings.get("tuned_teacher") else [])]
    return "".join(f", {plain_setting(key, settings[key])}" for key in keys)


def _dataset(run: RunRecord) -> str:
    return dataset_title(dataset_name(run))


def _span(values: Any) -> str:
    known = sorted(set(values))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _axes_of(chart: Headline) -> list[str]:
    return [axis for axis in (PARAMETERS, TIME, MEMORY) if any(axis in point.places for point in chart.points)]


def _axis_name(chart: Headline, axis: str) -> str:
    return chart.axis_notes.get(axis, axis).partition(":")[0]


def _draw(axes: Axes, chart: Headline, axis: str) -> None:
    known = [point for point in chart.points if axis in point.places]
    printed = [(point.letter, *point.paper) for point in known if point.paper]
    paper = [(letter, places[axis], quality) for letter, quality, places in printed if axis in places]
    xs = [point.places[axis] for point in known] + [x for _, x, _ in paper] + [100.0]
    low, high = min(xs), max(xs)
    gap = max(high - low, 20.0) / NUM_MARKS_WIDE
    places = side_by_side([point.places[axis] for point in known], gap)
    if chart.dense is not None:
        axes.axhspan(chart.dense.low, chart.dense.high, color=PAPER, alpha=0.18, linewidth=0)
        axes.axhline(chart.dense.value, color=PAPER, linewidth=1.2)
        _say(axes, chart.dense.value, "dense")
    if chart.guessing is not None and "accuracy" in chart.metric:
        axes.axhline(chart.guessing, color=PAPER, linewidth=0.8, linestyle=":")
        _say(axes, chart.guessing, "guessing")
    for point, x in zip(known, places, strict=True):
        color = COLORS[point.kind]
        axes.plot([x, x], [point.quality.low, point.quality.high], color=color, linewidth=1.1, zorder=2)
        axes.plot([x], [point.quality.value], "o", color=color, markersize=8, markeredgewidth=0, zorder=3)
        style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6.5, "zorder": 4}
        axes.text(x, point.quality.value, point.letter, color=LETTERS[point.kind], fontweight="bold", **style)
    for letter, x, value in paper:
        axes.plot([x], [value], "D", color=PAPER, markersize=7, zorder=1.5)
        axes.text(x, value, letter, color=ON_DARK, ha="center", va="center_baseline", fontsize=5, zorder=1.6)
    _bracket_equal(axes, [point.places[axis] for point in known], places, gap)
    margin = 1.2 * gap
    axes.set_xlim(min(low, *places, 100) - margin, max(high, *places, 100) + margin)
    axes.set(xlabel=f"{_axis_name(chart, axis)} (% of dense)", ylabel=chart.metric)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.1 * (top - bottom), top)  # room for the brackets
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _bracket_equal(axes: Axes, given: Sequence[float], places: Sequence[float], gap: float) -> None:
    """Marks points that were moved apart with a bracket at the bottom that says where they belong."""
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        if groups and places[index] - places[groups[-1][-1]] < 1.01 * gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        if max(abs(places[index] - given[index]) for index in group) < gap:
            continue  # hardly moved
        low, high = (f"{end(given[index] for index in group):.0f}" for end in (min, max))
        ends = [places[group[0]] - 0.4 * gap, places[group[-1]] + 0.4 * gap]
        bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": "#666666"}
        axes.plot(ends, [0.06, 0.06], linewidth=0.8, **bottom)
        text = f"all {low} %" if low == high else f"{low} to {high} %"
        is_right = places[group[-1]] == max(places) and len(group) < len(places)
        at, side = (ends[1], "right") if is_right else (ends[0], "left")
        axes.text(at, 0.05, text, ha=side, va="top", fontsize=6.5, **bottom)


def _say(axes: Axes, value: float, text: str) -> None:
    """Writes the name of a horizontal line above its left end."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "bottom"}
    axes.annotate(text, (0.0, value), xytext=(3, 1), fontsize=6.5, color="#666666", **place)


def side_by_side(places: Sequence[float], gap: float) -> list[float]:
    """Returns places that are at least `gap` apart, in the same order, as near to the given ones as possible.

    Of equal places the first one stays left. Least squares under these constraints is the mean of each run of places
    that touch: pool adjacent violators.
    """
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    blocks: list[tuple[float, int]] = []  # mean of place - rank * gap, and how many
    for rank, index in enumerate(order):
        blocks.append((places[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, num_first), (second, num_second) = blocks[-2:]
            total = num_first + num_second
            blocks[-2:] = [((first * num_first + second * num_second) / total, total)]
    shifted = [mean for mean, count in blocks for _ in range(count)]
    found = dict(zip(order, (mean + rank * gap for rank, mean in enumerate(shifted)), strict=True))
    return [found[index] for index in range(len(places))]


def _legend(chart: Headline) -> tuple[list[Line2D], list[str]]:
    handles, labels = [], []
    for point in chart.points:
        mark: Mapping[str, Any] = {"marker": "o", "color": COLORS[point.kind], "linestyle": "", "markersize": 6}
        handles.append(Line2D([], [], **mark))
        labels.append(legend_line(point))
    return handles, labels


def legend_line(point: Point) -> str:
    """Returns the legend of a point: letter, method and value with its interval."""
    return "  ".join(_parts(point))


def legend_parts(chart: Headline) -> list[tuple[str, str, str, str]]:
    """Returns letter, method, value and the name of the color of each point, for a legend in a page."""
    return [(*_parts(point), COLOR_NAMES[point.kind]) for point in chart.points]


def _parts(point: Point) -> tuple[str, str, str]:
    quality = point.quality
    return point.letter, point.label, f"{quality.value:.2f} ({quality.low:.2f} to {quality.high:.2f})"
