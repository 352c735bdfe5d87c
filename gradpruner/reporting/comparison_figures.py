"""Figures by their number in the paper: which runs belong in each, and what is compared."""

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradpruner.files import slug
from gradpruner.record import RunRecord
from gradpruner.reporting.comparison_plots import plot_bars, plot_lines, plot_losses
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.labels import METHOD_LABELS, METRIC_LABELS
from gradpruner.reporting.layer_figures import plot_importance_map, plot_plans, plot_sensitivity, sensitivity_curve
from gradpruner.reporting.means import DENSE, MAIN, Measured, main_metric, measure
from gradpruner.reporting.paper_rows import main_runs
from gradpruner.reporting.plain_names import dataset_title, plain_label
from gradpruner.reporting.published import PublishedRow
from gradpruner.reporting.run_groups import comparable_groups, distinct_runs, in_order, pages, run_labels
from gradpruner.reporting.tables import dataset_name, row_labels, rows_of_seeds

PAPER_FIGURES = ("1", "2", "5", "6", "7", "8", "9")
NAMES = {"importance": "Layer importance", "plans": "Pruned layers"}  # of the figures that the paper does not have
FIGURES = (*PAPER_FIGURES, *NAMES)
MOST_ROWS, MOST_CURVES = 24, 8  # in one picture


def draw(
    figure: str,
    records: Sequence[RunRecord],
    folder: Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    methods: Sequence[str] | None = None,
    suffix: str = ".png",
) -> list[Picture]:
    """Draws a figure of the paper, or one of layers, into `folder`.

    Args:
        figure: one of `FIGURES`. 5 and 8 show accuracy against layers pruned, for the paper's two models; other models
            are in both. In 5, 6 and 8 each model and kind of fine-tuning gets a picture, in 7 and 9 a row of bars.
        records: finished runs. Layer figures and Figure 2 show identical runs once; if they do not fit on one page,
            each dataset gets its own pages.
        folder: folder for the pictures; made if it is missing.
        histories: losses by the identity of the run, for Figure 1; see `plot_losses`. Each dataset gets a picture, and
            the seeds of one setting are averaged to one line.
        methods: methods of the lines of 1, 5 and 8, besides dense; by default those of the paper: GradPruner without
            merging in 5 and 8, and in 1 all if a picture can hold them, else dense alone.
        suffix: kind of file, `.png` or `.svg`.

    Raises:
        ValueError: if there is no such figure, or no run that belongs in it.
    """
    if figure not in FIGURES:
        raise ValueError(f"There is no figure {figure!r}. Set figure to one of {', '.join(FIGURES)}.")
    ordered = in_order(records)
    path = folder / f"{'figure' if figure in PAPER_FIGURES else ''}{figure}{suffix}"
    if figure == "1":
        known = histories or {}
        pictures = _losses([record for record in ordered if record.identity in known], known, path, methods)
    elif figure == "2":
        pictures = _sensitivity(ordered, path)
    elif figure in BARS:
        pictures = _bars(ordered, BARS[figure], path)
    elif figure in AXES:
        chosen = ordered
        if figure in MODELS:
            wanted = (DENSE, *(("igia_only",) if methods is None else methods))
            others = {model for number, model in MODELS.items() if number != figure}
            chosen = [
                record
                for record in ordered
                if record.pruning["method"] in wanted and record.config["model"]["path"] not in others
            ]
        pictures = _lines(chosen, AXES[figure], path)
    else:
        plot, shown = (plot_importance_map, _scores) if figure == "importance" else (plot_plans, _plan)
        pictures = _layers([record for record in ordered if record.pruning["method"] != DENSE], plot, shown, path)
    if not pictures:
        raise ValueError(
            f"Figure {figure} shows {NEEDED[figure]}, got none among {len(records)} records. "
            "Run such an experiment, or set runs_dir."
        )
    return [dataclasses.replace(picture, name=NAMES.get(figure, f"Figure {figure}")) for picture in pictures]


@dataclass(frozen=True)
class _Axis:
    """The x axis of a line figure.

    Attributes:
        label: name of the axis.
        place: returns a run's place on the axis, or None if the run does not belong in the figure.
        settings: settings of a method that the axis replaces; they do not split a method into several lines.
        spread: see `plot_lines`.
        least: number of different places that a line needs.
    """

    label: str
    place: Callable[[RunRecord], float | None]
    settings: tuple[str, ...]
    spread: float = 0.0
    least: int = 1


@dataclass(frozen=True)
class _Bars:
    """A bar figure.

    Attributes:
        title: what it shows.
        methods: methods that have bars beside dense, each with the number of bars that it must have.
        free: settings that differ from bar to bar; in all others the runs have the paper's.
    """

    title: str
    methods: Mapping[str, int]
    free: tuple[str, ...] = ()


def _num_pruned(record: RunRecord) -> float | None:
    return len(record.pruning["pruned_layers"]) or None  # methods that only narrow layers prune none


def _density(record: RunRecord) -> float | None:
    # Without a merge the density has no effect.
    merges = any(absorber is not None for absorber in record.pruning["absorbed_by"].values())
    density = record.config["method"].get("density")
    return 100 * density if merges and density is not None else None


_DEPTH = _Axis("decoder layers pruned", _num_pruned, ("sparsity", "num_pruned_layers"), spread=0.5, least=2)
AXES = {"5": _DEPTH, "6": _Axis("merge density (%)", _density, ("density",), least=2), "8": _DEPTH}
BARS = {
    "7": _Bars("GradPruner by merge rule.", {"igia_only": 0, "gradpruner": 2}, ("merge_rule",)),
    "9": _Bars("Pruning of layers and of kernels.", {"gradpruner": 1, "kernel_igia": 1}),
}
MODELS = {"5": "meta-llama/Llama-3.1-8B", "8": "mistralai/Mistral-7B-v0.3"}
# The runs that each figure needs, for the error message.
NEEDED = {
    "1": "loss histories",
    "2": "runs with importance of every step",
    "5": "runs of GradPruner without merging (method=igia_only), or of methods=[...] that drop layers",
    "6": "runs that merge layers at two or more densities",
    "7": "runs of GradPruner with two or more merge rules in one setting",
    "8": "runs of GradPruner without merging (method=igia_only), or of methods=[...] that drop layers",
    "9": "runs of method=gradpruner and method=kernel_igia in one setting",
    "importance": "runs with a score for every layer",
    "plans": "runs of methods that prune",
}


def _panels(
    points: Sequence[tuple[str, float, RunRecord]],
) -> tuple[dict[str, dict[str, dict[float, Measured]]], str]:
    """Returns lines by name of the metric, and sentences about their datasets and error bars.

    Args:
        points: label of the line, place on the x axis, and run.
    """
    panels: dict[str, dict[str, dict[float, Measured]]] = {}
    datasets: list[str] = []
    left_out: list[str] = []
    for metric in (MAIN, "answer_nll"):
        lines, names, incomplete = measure(points, metric)
        if lines:
            kinds = {main_metric(record) if metric == MAIN else metric for _, _, record in points}
            panels[" or ".join(METRIC_LABELS[kind] for kind in sorted(kinds))] = lines
            datasets = datasets or names
            left_out += incomplete
    missing = f" Left out, for lack of a dataset: {'; '.join(dict.fromkeys(left_out))}." if left_out else ""
    mean = f"Mean over {len(datasets)} datasets: " if len(datasets) > 1 else "Dataset: "
    errors = "Error bars: standard error of the mean, over seeds where there are several, else over test rows."
    return panels, f"{mean}{', '.join(map(dataset_title, datasets))}. {errors}{missing}"


def _losses(
    records: Sequence[RunRecord],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: Path,
    methods: Sequence[str] | None,
) -> list[Picture]:
    pictures = []
    for name in dict.fromkeys(dataset_name(record) for record in records):
        own = [record for record in records if dataset_name(record) == name]
        rows = rows_of_seeds([run for run in own if methods is None or run.pruning["method"] in (DENSE, *methods)])
        if methods is None and len(rows) > MOST_CURVES:
            dense = [runs for runs in rows if runs[0].pruning["method"] == DENSE]
            rows = dense or rows
        losses = {}
        for label, runs in zip(run_labels([runs[0] for runs in rows]), rows, strict=True):
            losses[_with_num_seeds(label, runs)] = _mean_history([histories[run.identity] for run in runs])
        picture = plot_losses(losses, path.with_stem(f"{path.stem}-{slug(name)}"))
        pictures.append(dataclasses.replace(picture, caption=f"{dataset_title(name)}: {picture.caption}"))
    return pictures


def _with_num_seeds(label: str, runs: Sequence[RunRecord]) -> str:
    return f"{label} (mean of {len(runs)} seeds)" if len(runs) > 1 else label


def _mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Returns the mean loss of each step that all histories have."""
    by_step = [{entry["step"]: entry["loss"] for entry in history} for history in histories]
    shared = sorted(set.intersection(*map(set, by_step)))
    return [{"step": step, "loss": statistics.mean(losses[step] for losses in by_step)} for step in shared]


def _lines(records: Sequence[RunRecord], axis: _Axis, path: Path) -> list[Picture]:
    pictures: list[Picture] = []
    for title, group in comparable_groups(records):
        placed = [(axis.place(record), record) for record in group if record.pruning["method"] != DENSE]
        chosen = [(x, record) for x, record in placed if x is not None]
        # A label names the settings in which rows of a method differ; those on the axis must not be among them.
        names = row_labels([_without_settings(record, axis.settings) for _, record in chosen])
        places: dict[str, set[float]] = {}
        for name, (x, _) in zip(names, chosen, strict=True):
            places.setdefault(name, set()).add(x)
        kept = zip(names, chosen, strict=True)
        chosen = [point for name, point in kept if len(places[name]) >= axis.least]
        labels = row_labels([_without_settings(record, axis.settings) for _, record in chosen])
        points = [(label, x, record) for label, (x, record) in zip(labels, chosen, strict=True)]
        dense = [(METHOD_LABELS[DENSE], 0.0, record) for record in group if record.pruning["method"] == DENSE]
        if len({x for _, x, _ in points}) >= axis.least:
            panels, caption = _panels(points + dense)
            name = f"{path.stem}-{slug(group[0].model['name'])}-{group[0].config['finetune']['mode']}"
            num_same = sum(picture.path.stem.startswith(name) for picture in pictures)
            own = path.with_stem(f"{name}-{num_same + 1}" if num_same else name)
            what = f"{' and '.join(panels)} against {axis.label}"
            pictures.append(plot_lines(panels, axis.label, own, f"{title}: {what}. {caption}", axis.spread))
    return pictures


def _without_settings(record: RunRecord, names: Sequence[str]) -> RunRecord:
    """Returns a copy of a record without these settings of its method."""
    method = {key: value for key, value in record.config["method"].items() if key not in names}
    return dataclasses.replace(record, config={**record.config, "method": method})


def _bars(records: Sequence[RunRecord], bars: _Bars, path: Path) -> list[Picture]:
    groups: dict[str, dict[str, dict[str, Measured]]] = {}
    captions: list[str] = []
    for title, runs in comparable_groups(records):
        group = [run for method in (DENSE, *bars.methods) for run in _of_paper(runs, method, bars.free)]
        labels = [plain_label(label) for label in row_labels(group)]
        # Bars are lines with the one place 0.
        panels, caption = _panels([(label, 0.0, record) for label, record in zip(labels, group, strict=True)])
        methods = dict(zip(labels, (record.pruning["method"] for record in group), strict=True))
        shown = Counter(methods[label] for lines in panels.values() for label in lines)
        if not panels or any(shown[method] < number * len(panels) for method, number in bars.methods.items()):
            continue  # nothing to compare
        groups[title] = {
            metric: {label: line[0.0] for label, line in lines.items()} for metric, lines in panels.items()
        }
        captions.append(f"{title}: {caption[0].lower()}{caption[1:]}")
    return [plot_bars(groups, path, " ".join([bars.title, *captions]))] if groups else []


def _of_paper(records: Sequence[RunRecord], method: str, free: Sequence[str]) -> list[RunRecord]:
    """Returns a method's runs with the paper's settings, for each value of the settings `free`."""
    runs = [record for record in records if record.pruning["method"] == method]
    values = {json.dumps({key: own[key] for key in free if key in own}) for own in map(coordinates, runs)}
    rows = [PublishedRow({}, {"method": method, **json.loads(each)}, (), None) for each in sorted(values)]
    return [record for row in rows for record in main_runs(runs, row, "dataset")]


def _layers(
    records: Sequence[RunRecord],
    plot: Callable[[Mapping[str, RunRecord], Path], Picture],
    shown: Callable[[RunRecord], object],
    path: Path,
) -> list[Picture]:
    """Draws the runs with `plot`, and those for which `shown` returns the same as one row."""
    pictures = []
    for page, group in pages(distinct_runs(records, shown), MOST_ROWS, path).items():
        rows = {}
        for label, runs in group.items():
            rows[f"{label} (+{len(runs) - 1} alike)" if len(runs) > 1 else label] = runs[0]
        picture = plot(rows, page)
        if any(len(runs) > 1 for runs in group.values()):
            picture = dataclasses.replace(
                picture, caption=f"{picture.caption} +1 alike: so many more runs look the same."
            )
        pictures.append(picture)
    return pictures


def _scores(record: RunRecord) -> object:
    """Returns what the heat map of importance shows of a run; None if the run has no scores."""
    scores = record.pruning["layer_importance"]
    return [scores, record.pruning["pruned_layers"]] if scores else None


def _plan(record: RunRecord) -> object:
    """Returns what the drawing of plans shows of a run."""
    pruning = record.pruning
    return [pruning["method"], pruning["pruned_layers"], pruning["absorbed_by"], pruning["shape"]]


def _series(record: RunRecord) -> object:
    """Returns what a sensitivity curve is computed from; None if the run has no importance per step."""
    series = record.pruning["report"].get("step_importance")
    return [series, record.pruning["num_hidden_layers"]] if series else None


def _num_steps(record: RunRecord) -> int:
    return len(record.pruning["report"]["step_importance"])


def _sensitivity(records: Sequence[RunRecord], path: Path) -> list[Picture]:
    # Methods that share an importance run have the same series, so one of them is enough.
    distinct = [runs[0] for runs in distinct_runs(records, _series)]
    lines = []
    for runs in rows_of_seeds(distinct):
        # With steps=auto, seeds may stop at different steps; only series of one length can be averaged.
        for length in sorted({_num_steps(run) for run in runs}):
            lines.append([run for run in runs if _num_steps(run) == length])
    pictures = []
    for page, group in pages(lines, MOST_CURVES, path).items():
        # k, the number of most important layers, is the number of layers that the run kept.
        tops = [runs[0].pruning["num_hidden_layers"] for runs in group.values()]
        curves = {}
        for (label, runs), top in zip(group.items(), tops, strict=True):
            if len(set(tops)) > 1:
                label = f"{label}, k={top}"
            series = [run.pruning["report"]["step_importance"] for run in runs]
            curves[_with_num_seeds(label, runs)] = np.mean([sensitivity_curve(each, top) for each in series], axis=0)
        pictures.append(plot_sensitivity(curves, str(tops[0]) if len(set(tops)) == 1 else "k", page))
    return pictures
