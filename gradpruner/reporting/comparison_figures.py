"""Figures that compare runs, by their number in the paper: loss, and accuracy against what was chosen.

A number is a mean over datasets of means over seeds. Datasets count only where every line or bar has them, so that no
two numbers of a figure are of different data.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from gradpruner.files import slug
from gradpruner.record import RunRecord
from gradpruner.reporting.figures import COLORS, LINE_STYLES, PRUNED, Picture, canvas, legend_below, wrap_rows
from gradpruner.reporting.labels import METHODS, METRICS
from gradpruner.reporting.layer_figures import plot_importance_map, plot_plans, plot_sensitivity, sensitivity_curve
from gradpruner.reporting.paper_tables import BY_SIMILARITY
from gradpruner.reporting.tables import dataset_name, row_labels, setting

PAPER_FIGURES = ("1", "2", "5", "6", "7", "8", "9")
FIGURES = (*PAPER_FIGURES, "importance", "plans")
MAIN = "main"  # see main_metric
DENSE = "dense"
NUM_SMOOTHED = 8  # steps of a loss curve


@dataclass(frozen=True)
class Measured:
    """One number of a figure.

    Attributes:
        value: mean over datasets of the mean over seeds.
        error: of that mean: over datasets, in quadrature, of the standard deviation over seeds or, of one seed, of the
            standard error over test rows.
        num_datasets: how many.
        num_seeds: of the dataset with the fewest.
    """

    value: float
    error: float
    num_datasets: int = 1
    num_seeds: int = 1


Line = Mapping[float, Measured]


def draw(
    figure: str,
    records: Sequence[RunRecord],
    folder: Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> list[Picture]:
    """Draws a figure of the paper, or one of layers, into `folder`.

    Args:
        figure: one of `FIGURES`. 5 and 8 (accuracy against layers pruned) are one figure of two models. In 5, 6 and 8
            every model and kind of fine-tuning has a picture of its own, in 7 and 9 a row of bars.
        records: finished runs.
        folder: made if it is missing.
        histories: loss of runs by their identity, for figure 1; see `plot_losses`. Every dataset has a picture.

    Raises:
        ValueError: if there is no such figure, no run that belongs into it, or no dataset that all its runs share.
    """
    if figure not in FIGURES:
        raise ValueError(f"There is no figure {figure!r}. Set figure to one of {', '.join(FIGURES)}.")
    ordered = in_order(records)
    path = folder / (f"figure{figure}.png" if figure in PAPER_FIGURES else f"{figure}.png")
    if figure == "1":
        known = histories or {}
        pictures = _losses([record for record in ordered if record.identity in known], known, path)
    elif figure == "2":
        pictures = _sensitivity(ordered, path)
    elif figure in BARS:
        pictures = _bars(ordered, BARS[figure], path)
    elif figure in AXES:
        pictures = _lines(ordered, AXES[figure], path)
    else:
        plot, key = (plot_importance_map, "layer_importance") if figure == "importance" else (plot_plans, "method")
        chosen = [record for record in ordered if record.pruning[key] and record.pruning["method"] != DENSE]
        pictures = [plot(dict(zip(run_labels(chosen), chosen, strict=True)), path)] if chosen else []
    if not pictures:
        raise ValueError(
            f"Figure {figure} shows {NEEDED[figure]}, got none among {len(records)} records. "
            "Run such an experiment, or set runs_dir."
        )
    return pictures


def in_order(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Every run once, in the paper's order of methods, then by dataset and seed."""
    order = list(METHODS)

    def place(record: RunRecord) -> tuple[int, str, str, int]:
        name = record.pruning["method"]
        return order.index(name) if name in order else len(order), name, dataset_name(record), record.seed

    return sorted({record.identity: record for record in records}.values(), key=place)


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """One name a run, no two alike: the method, and of dataset, model, fine-tuning and seed those that differ."""
    columns = [
        row_labels(list(records)),
        [dataset_name(record) for record in records],
        [record.model["name"] for record in records],
        [record.config["finetune"]["mode"] for record in records],
        [f"seed {record.seed}" for record in records],
    ]
    shown = [column for index, column in enumerate(columns) if index == 0 or len(set(column)) > 1]
    labels = [" / ".join(parts) for parts in zip(*shown, strict=True)]
    hashes = [f" / {record.identity[:8]}" for record in records]  # as in the name of the run's folder
    return [label + hashes[i] * (labels.count(label) > 1) for i, label in enumerate(labels)]


def main_metric(record: RunRecord) -> str:
    """What the paper's averages take from a dataset: similarity on some (Section 4.1), accuracy on the others."""
    by_similarity = dataset_name(record) in BY_SIMILARITY or "accuracy" not in record.metrics
    return "similarity" if by_similarity and "similarity" in record.metrics else "accuracy"


def measure(
    points: Sequence[tuple[str, float, RunRecord]], metric: str
) -> tuple[dict[str, dict[float, Measured]], list[str]]:
    """Means over datasets and seeds.

    Args:
        points: label of the line, place on the x axis, and run.
        metric: key in a record's metrics, or `MAIN`. Runs without it are left out.

    Returns:
        The lines, and the names of the datasets that they are means of: those that every line has. A place where a line
        lacks one of them is left out.

    Raises:
        ValueError: if no dataset has all lines.
    """
    found: dict[str, dict[float, dict[str, dict[int, tuple[float, float]]]]] = {}
    names = {}
    for label, x, record in points:
        name = main_metric(record) if metric == MAIN else metric
        if name in record.metrics:
            # Values of other encoders are no values of the same data.
            encoder = [record.metrics.get(f"bertscore_{key}") for key in ("encoder", "layer")] * (name == "similarity")
            data = f"{_data(record)} {encoder}"
            names[data] = dataset_name(record)
            cell = found.setdefault(label, {}).setdefault(x, {}).setdefault(data, {})
            cell[record.seed] = (record.metrics[name], record.metrics[f"{name}_stderr"])
    if not found:
        return {}, []
    shared = set.intersection(*({data for cells in line.values() for data in cells} for line in found.values()))
    if not shared:
        raise ValueError(
            f"A figure compares on datasets that every method ran on, got none for {', '.join(found)}. "
            "Run what is missing, or set runs_dir to a folder with fewer methods."
        )
    lines = {
        label: {x: _mean([cells[data] for data in sorted(shared)]) for x, cells in line.items() if shared <= set(cells)}
        for label, line in found.items()
    }
    return {label: dict(sorted(line.items())) for label, line in lines.items() if line}, sorted(
        names[data] for data in shared
    )


def _mean(datasets: list[dict[int, tuple[float, float]]]) -> Measured:
    means, errors = [], []
    for seeds in datasets:
        values = [value for value, _ in seeds.values()]
        means.append(statistics.mean(values))
        errors.append(statistics.stdev(values) if len(values) > 1 else next(iter(seeds.values()))[1])
    error = math.hypot(*errors) / len(errors)
    return Measured(statistics.mean(means), error, len(datasets), min(map(len, datasets)))


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Picture:
    """Training loss of several runs, the paper's Figure 1: each step pale, and the mean of the last ones.

    Args:
        histories: by label, entries with `step` (optimizer step, from 1) and `loss` (nats per answer token).
        path: of the picture.
    """
    alt = []
    with canvas(path, 2.3 + 0.12 * ((len(histories) + 1) // 2)) as figure:
        axes = figure.subplots()
        for index, (label, history) in enumerate(histories.items()):
            style = LINE_STYLES[index % len(LINE_STYLES)]
            steps, losses = [entry["step"] for entry in history], [entry["loss"] for entry in history]
            axes.plot(steps, losses, color=style["color"], linewidth=0.5, alpha=0.3)
            # Only of steps before: a centred mean would smooth away the fall of the first steps, which is the point.
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
    """One panel a metric, one line a method; the line named as the dense model is its value, drawn from side to side.

    Args:
        panels: by name of the metric, by label, by place on the x axis.
        x_label: of the x axis.
        path: of the picture.
        caption: of the picture.
        spread: width, in units of x, over which lines are moved apart so that their error bars can be told apart.
    """
    dense = METHODS[DENSE]
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines if label != dense))
    with canvas(path, 2.1 + 0.12 * ((len(labels) + 2) // 2)) as figure:
        for axes, (metric, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for index, label in enumerate(labels):
                line = lines.get(label, {})
                shift = spread * (index / (len(labels) - 1) - 0.5) if len(labels) > 1 else 0.0
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
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, (left + right) / 2 - 1), max(right, (left + right) / 2 + 1))
            axes.grid(alpha=0.3)
        legend_below(figure)
    return Picture(path, caption, "Line chart. " + " ".join(_said(metric, lines) for metric, lines in panels.items()))


def plot_bars(groups: Mapping[str, Mapping[str, Mapping[str, Measured]]], path: Path, caption: str) -> Picture:
    """A row of panels for each group, a panel a metric, a bar a label.

    Args:
        groups: by title, by name of the metric, by label.
        path: of the picture.
        caption: of the picture.
    """
    metrics = list(dict.fromkeys(metric for panels in groups.values() for metric in panels))
    labels = [list(dict.fromkeys(label for bars in panels.values() for label in bars)) for panels in groups.values()]
    wrapped, heights = zip(*(wrap_rows(own, 0.2) for own in labels), strict=True)
    with canvas(path, 0.35 + sum(heights) + 0.35 * len(groups)) as figure:
        grid = figure.subplots(
            len(groups), len(metrics), squeeze=False, sharey="row", sharex="col", height_ratios=heights
        )
        for row, own, texts, (title, panels) in zip(grid, labels, wrapped, groups.items(), strict=True):
            row[0].set_title(title, loc="left")
            row[0].set(yticks=range(len(own)), yticklabels=texts, ylim=(len(own) - 0.5, -0.5))
            for axes, metric in zip(row, metrics, strict=True):
                for place, label in enumerate(own):
                    if label in panels.get(metric, {}):
                        _draw_bar(axes, place, panels[metric][label], is_dense=label == METHODS[DENSE])
        for axes, metric in zip(grid[-1], metrics, strict=True):
            ends = [bar.value + bar.error for panels in groups.values() for bar in panels.get(metric, {}).values()]
            axes.set(xlabel=metric, xlim=(0, 1.5 * max(ends)))  # room for the numbers
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
    """The numbers as text; a line with no place on the axis is at 0."""
    values = [
        f"{label} " + ", ".join(f"{point.value:.3f}" + (f" at {x:g}" if x else "") for x, point in line.items())
        for label, line in lines.items()
    ]
    return f"{metric}: {'; '.join(values)}."


@dataclass(frozen=True)
class _Axis:
    """What lines run along: name of the axis, place of a run on it or None, settings that it stands for, see spread."""

    label: str
    place: Callable[[RunRecord], float | None]
    settings: tuple[str, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class _Bars:
    """What bars compare, and the methods that have one."""

    title: str
    methods: tuple[str, ...]


def _num_pruned(record: RunRecord) -> float | None:
    return len(record.pruning["pruned_layers"]) or None


def _density(record: RunRecord) -> float | None:
    merges = any(into is not None for into in record.pruning.get("absorbed_by", {}).values())
    density = record.config["method"].get("density")
    return 100 * density if merges and density is not None else None


_DEPTH = _Axis("decoder layers pruned", _num_pruned, ("sparsity", "num_pruned_layers"), spread=0.5)
AXES = {"5": _DEPTH, "6": _Axis("merge density (%)", _density, ("density",)), "8": _DEPTH}
BARS = {
    "7": _Bars("GradPruner by merge rule.", ("igia_only", "gradpruner")),
    "9": _Bars("Pruning of layers and of kernels.", ("gradpruner", "kernel_igia")),
}
HATCHES = ("", "////", "....", "xxxx", "----", "||||")
NEEDED = {
    "1": "loss histories",
    "2": "runs with importance of every step",
    "5": "runs of methods that drop layers",
    "6": "runs that merge layers",
    "7": "runs of GradPruner with two or more merge rules, none among them",
    "8": "runs of methods that drop layers",
    "9": "runs of method=gradpruner and method=kernel_igia in one setting",
    "importance": "runs with a score for every layer",
    "plans": "runs of methods that prune",
}


def _groups(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ in the method and in the data alone, by a title; of each dataset with one choice of rows."""
    choices: dict[str, set[str]] = {}
    for record in records:
        choices.setdefault(dataset_name(record), set()).add(_data(record))
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for record in records:
        alike = {key: value for key, value in setting(record).items() if key != "dataset"}
        choice = sorted(choices[dataset_name(record)]).index(_data(record))
        groups.setdefault((json.dumps(alike, sort_keys=True), choice), []).append(record)
    titled: dict[str, list[RunRecord]] = {}
    for group in groups.values():
        name = f"{group[0].model['name']}, {group[0].config['finetune']['mode']}"
        same = sum(title.startswith(name) for title in titled)
        titled[name + (f" ({same + 1})" if same else "")] = group
    return titled


def _data(record: RunRecord) -> str:
    return json.dumps(record.config["dataset"], sort_keys=True)


def _panels(
    points: Sequence[tuple[str, float, RunRecord]],
) -> tuple[dict[str, dict[str, dict[float, Measured]]], str]:
    """Lines by name of the metric, and a sentence about their numbers."""
    panels: dict[str, dict[str, dict[float, Measured]]] = {}
    datasets: list[str] = []
    for metric in (MAIN, "answer_nll"):
        lines, names = measure(points, metric)
        if lines:
            kinds = {main_metric(record) if metric == MAIN else metric for _, _, record in points}
            panels[" or ".join(METRICS[kind] for kind in sorted(kinds))] = lines
            datasets = datasets or names
    seeds = {point.num_seeds for lines in panels.values() for line in lines.values() for point in line.values()}
    spread = (
        "standard error over test rows" if seeds == {1} else "standard deviation over seeds, where there are several"
    )
    mean = f"Mean over {len(datasets)} datasets: " if len(datasets) > 1 else "Dataset: "
    return panels, f"{mean}{', '.join(datasets)}. Error bars: {spread}."


def _losses(
    records: Sequence[RunRecord], histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path
) -> list[Picture]:
    pictures = []
    for name in dict.fromkeys(dataset_name(record) for record in records):
        group = [record for record in records if dataset_name(record) == name]
        losses = {label: histories[run.identity] for label, run in zip(run_labels(group), group, strict=True)}
        picture = plot_losses(losses, path.with_stem(f"{path.stem}-{slug(name)}"))
        pictures.append(dataclasses.replace(picture, caption=f"{name}: {picture.caption}"))
    return pictures


def _lines(records: Sequence[RunRecord], axis: _Axis, path: Path) -> list[Picture]:
    pictures = []
    for title, group in _groups(records).items():
        placed = [(axis.place(record), record) for record in group if record.pruning["method"] != DENSE]
        chosen = [(x, record) for x, record in placed if x is not None]
        # Lines of a method differ in what the axis does not say.
        bare = [
            {key: value for key, value in record.config["method"].items() if key not in axis.settings}
            for _, record in chosen
        ]
        labels = row_labels(
            [
                dataclasses.replace(record, config={**record.config, "method": method})
                for (_, record), method in zip(chosen, bare, strict=True)
            ]
        )
        points = [(label, x, record) for label, (x, record) in zip(labels, chosen, strict=True)]
        dense = [(METHODS[DENSE], 0.0, record) for record in group if record.pruning["method"] == DENSE]
        if points:
            panels, caption = _panels(points + dense)
            own = path.with_stem(f"{path.stem}-{slug(title)}")
            what = f"{' and '.join(panels)} against {axis.label}"
            pictures.append(plot_lines(panels, axis.label, own, f"{title}: {what}. {caption}", axis.spread))
    return pictures


def _bars(records: Sequence[RunRecord], bars: _Bars, path: Path) -> list[Picture]:
    chosen = [record for record in records if record.pruning["method"] in (DENSE, *bars.methods)]
    groups, captions = {}, []
    for title, group in _groups(chosen).items():
        labels = row_labels(group)
        if len(set(labels) - {METHODS[DENSE]}) < 2:
            continue  # nothing to compare
        panels, caption = _panels([(label, 0.0, record) for label, record in zip(labels, group, strict=True)])
        groups[title] = {
            metric: {label: line[0.0] for label, line in lines.items()} for metric, lines in panels.items()
        }
        captions.append(f"{title}: {caption[0].lower()}{caption[1:]}")
    return [plot_bars(groups, path, " ".join([bars.title, *captions]))] if groups else []


def _sensitivity(records: Sequence[RunRecord], path: Path) -> list[Picture]:
    # Methods that share an importance run have the same series.
    runs: dict[str, RunRecord] = {}
    for record in records:
        series = record.pruning.get("report", {}).get("step_importance")
        if series:
            runs.setdefault(json.dumps([series, record.pruning["num_hidden_layers"]]), record)
    chosen = list(runs.values())
    if not chosen:
        return []
    tops = [record.pruning["num_hidden_layers"] for record in chosen]
    labels = run_labels(chosen)
    if len(set(tops)) > 1:
        labels = [f"{label}, k = {top}" for label, top in zip(labels, tops, strict=True)]
    curves = {
        label: sensitivity_curve(record.pruning["report"]["step_importance"], top)
        for label, record, top in zip(labels, chosen, tops, strict=True)
    }
    return [plot_sensitivity(curves, str(tops[0]) if len(set(tops)) == 1 else "k", path)]
