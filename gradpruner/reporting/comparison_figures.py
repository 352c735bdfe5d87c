"""Figures by their number in the paper: which runs belong into each, and what is compared."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradpruner.files import slug
from gradpruner.record import RunRecord
from gradpruner.reporting.comparison_plots import plot_bars, plot_lines, plot_losses
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.labels import METHODS, METRICS, method_place
from gradpruner.reporting.layer_figures import plot_importance_map, plot_plans, plot_sensitivity, sensitivity_curve
from gradpruner.reporting.means import DENSE, MAIN, Measured, main_metric, measure
from gradpruner.reporting.tables import data_settings, dataset_name, row_labels, rows_of_seeds, setting

PAPER_FIGURES = ("1", "2", "5", "6", "7", "8", "9")
FIGURES = (*PAPER_FIGURES, "importance", "plans")
MOST_ROWS, MOST_CURVES = 24, 8  # of one picture


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
        records: finished runs. In figures of layers and 2, those that would look alike are there once, and if they are
            too many for a picture, every dataset has one or more.
        folder: made if it is missing.
        histories: loss of runs by their identity, for figure 1; see `plot_losses`. Every dataset has a picture, and
            seeds are one line.

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
        plot, shown = (plot_importance_map, _scores) if figure == "importance" else (plot_plans, _plan)
        pictures = _layers([record for record in ordered if record.pruning["method"] != DENSE], plot, shown, path)
    if not pictures:
        raise ValueError(
            f"Figure {figure} shows {NEEDED[figure]}, got none among {len(records)} records. "
            "Run such an experiment, or set runs_dir."
        )
    return pictures


def in_order(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Every run once, in the paper's order of methods, then by dataset and seed."""

    def place(record: RunRecord) -> tuple[tuple[int, str], str, int]:
        return method_place(record.pruning["method"]), dataset_name(record), record.seed

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


@dataclass(frozen=True)
class _Axis:
    """What lines run along.

    Attributes:
        label: name of the axis.
        place: of a run on it, or None.
        settings: that it stands for.
        spread: see `plot_lines`.
        least: how many places make a picture.
    """

    label: str
    place: Callable[[RunRecord], float | None]
    settings: tuple[str, ...]
    spread: float = 0.0
    least: int = 1


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
AXES = {"5": _DEPTH, "6": _Axis("merge density (%)", _density, ("density",), least=2), "8": _DEPTH}
BARS = {
    "7": _Bars("GradPruner by merge rule.", ("igia_only", "gradpruner")),
    "9": _Bars("Pruning of layers and of kernels.", ("gradpruner", "kernel_igia")),
}
NEEDED = {
    "1": "loss histories",
    "2": "runs with importance of every step",
    "5": "runs of methods that drop layers",
    "6": "runs that merge layers at two or more densities",
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
        choices.setdefault(dataset_name(record), set()).add(json.dumps(data_settings(record), sort_keys=True))
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for record in records:
        alike = {key: value for key, value in setting(record).items() if key != "dataset"}
        choice = sorted(choices[dataset_name(record)]).index(json.dumps(data_settings(record), sort_keys=True))
        groups.setdefault((json.dumps(alike, sort_keys=True), choice), []).append(record)
    titled: dict[str, list[RunRecord]] = {}
    for group in groups.values():
        name = f"{group[0].model['name']}, {group[0].config['finetune']['mode']}"
        same = sum(title.startswith(name) for title in titled)
        titled[name + (f" ({same + 1})" if same else "")] = group
    return titled


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
        rows = rows_of_seeds([record for record in records if dataset_name(record) == name])
        losses = {
            label + (f" (mean of {len(runs)} seeds)" if len(runs) > 1 else ""): _mean_history(
                [histories[run.identity] for run in runs]
            )
            for label, runs in zip(run_labels([runs[0] for runs in rows]), rows, strict=True)
        }
        picture = plot_losses(losses, path.with_stem(f"{path.stem}-{slug(name)}"))
        pictures.append(dataclasses.replace(picture, caption=f"{name}: {picture.caption}"))
    return pictures


def _mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Loss by step, over the steps that all have."""
    by_step = [{entry["step"]: entry["loss"] for entry in history} for history in histories]
    shared = sorted(set.intersection(*map(set, by_step)))
    return [{"step": step, "loss": statistics.mean(losses[step] for losses in by_step)} for step in shared]


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
        if len({x for _, x, _ in points}) >= axis.least:
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


def _layers(
    records: Sequence[RunRecord],
    plot: Callable[[Mapping[str, RunRecord], Path], Picture],
    shown: Callable[[RunRecord], object],
    path: Path,
) -> list[Picture]:
    pictures = []
    for own, group in _pages(_distinct(records, shown), MOST_ROWS, path).items():
        rows = {
            f"{label} (+{len(runs) - 1} alike)" if len(runs) > 1 else label: runs[0] for label, runs in group.items()
        }
        picture = plot(rows, own)
        if len(rows) < sum(map(len, group.values())):
            picture = dataclasses.replace(
                picture, caption=f"{picture.caption} +1 alike: so many more runs look the same."
            )
        pictures.append(picture)
    return pictures


def _distinct(records: Sequence[RunRecord], shown: Callable[[RunRecord], object]) -> list[list[RunRecord]]:
    """Runs of a dataset and model that a figure shows alike, together; those of which it shows None are left out."""
    alike: dict[str, list[RunRecord]] = {}
    for record in records:
        if (what := shown(record)) is not None:
            key = json.dumps([dataset_name(record), record.model["name"], what], sort_keys=True)
            alike.setdefault(key, []).append(record)
    return list(alike.values())


def _pages(groups: list[list[RunRecord]], most: int, path: Path) -> dict[Path, dict[str, list[RunRecord]]]:
    """Groups of runs by label and by the picture that they go to: one, or of too many one or more a dataset."""
    if len(groups) <= most:
        return {path: _labelled(groups)} if groups else {}
    pages: dict[Path, dict[str, list[RunRecord]]] = {}
    for name in dict.fromkeys(dataset_name(group[0]) for group in groups):
        own = list(_labelled([group for group in groups if dataset_name(group[0]) == name]).items())
        for first in range(0, len(own), most):
            number = f"-{1 + first // most}" if first else ""
            pages[path.with_stem(f"{path.stem}-{slug(name)}{number}")] = dict(own[first : first + most])
    return pages


def _labelled(groups: list[list[RunRecord]]) -> dict[str, list[RunRecord]]:
    return dict(zip(run_labels([runs[0] for runs in groups]), groups, strict=True))


def _scores(record: RunRecord) -> object:
    """What the heat map of importance shows of a run; None if it has no scores."""
    scores = record.pruning["layer_importance"]
    return [scores, record.pruning["pruned_layers"]] if scores else None


def _plan(record: RunRecord) -> object:
    """What the drawing of plans shows of a run."""
    return [record.pruning.get(key) for key in ("method", "pruned_layers", "absorbed_by", "shape")]


def _series(record: RunRecord) -> object:
    """What a curve of sensitivity is made of; None if there is no importance of every step."""
    series = record.pruning.get("report", {}).get("step_importance")
    return [series, record.pruning["num_hidden_layers"]] if series else None


def _num_steps(record: RunRecord) -> int:
    return len(record.pruning["report"]["step_importance"])


def _sensitivity(records: Sequence[RunRecord], path: Path) -> list[Picture]:
    # Methods that share an importance run have the same series.
    distinct = [runs[0] for runs in _distinct(records, _series)]
    pictures = []
    lines = [
        [run for run in runs if _num_steps(run) == length]
        for runs in rows_of_seeds(distinct)
        for length in sorted({_num_steps(run) for run in runs})  # steps=auto
    ]
    for own, group in _pages(lines, MOST_CURVES, path).items():
        tops = [runs[0].pruning["num_hidden_layers"] for runs in group.values()]
        curves = {}
        for (label, runs), top in zip(group.items(), tops, strict=True):
            if len(set(tops)) > 1:
                label = f"{label}, k={top}"
            if len(runs) > 1:
                label = f"{label} (mean of {len(runs)} seeds)"
            series = [run.pruning["report"]["step_importance"] for run in runs]
            curves[label] = np.mean([sensitivity_curve(each, top) for each in series], axis=0)
        pictures.append(plot_sensitivity(curves, str(tops[0]) if len(set(tops)) == 1 else "k", own))
    return pictures
