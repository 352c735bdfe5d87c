"""The numbers of the headline chart: quality of each method against its size, time and memory.

Of the runs of a report one group is shown: the model, fine-tuning and training rows with the most methods. Each method
has one point, the mean over the datasets that all methods of the chart have.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import QUANTILE, complete_error
from gradpruner.reporting.coordinates import coordinates, dataset_module
from gradpruner.reporting.efficiency import seed_and_machine, timed, training_costs
from gradpruner.reporting.labels import METHOD_LABELS, METRIC_LABELS, REPAIRING, method_place
from gradpruner.reporting.means import DENSE, main_metric, mean_of_known
from gradpruner.reporting.measures import why_not_comparable
from gradpruner.reporting.plain_names import dataset_title, plain_label
from gradpruner.reporting.published import Published
from gradpruner.reporting.run_groups import comparable_groups
from gradpruner.reporting.tables import dataset_name, depth_settings, row_labels, setting

MOST_POINTS = 24
USUAL_SPARSITY = 0.4  # the paper's; of equally frequent sparsities the nearest one is shown
PARAMETERS, TIME, MEMORY = "parameters", "time", "memory"
AXES = {PARAMETERS: "parameters", TIME: "time", MEMORY: "memory"}
# What a model does to its layers.
DROPS, NARROWS, ENDS_DENSE, OURS = "drops layers", "narrows layers", "ends dense", "GradPruner"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over test rows and seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Point:
    """A method in the chart.

    Attributes:
        letter: its mark in the chart, A for the best.
        label: name of the method and, among several of one method, its settings.
        kind: what it does to layers: `DROPS`, `NARROWS`, `ENDS_DENSE`, or `OURS` for GradPruner and its variants.
        quality: mean over datasets of the mean over seeds.
        num_seeds: least and largest number of seeds per dataset.
        places: percent of the dense model by axis (`AXES`); an axis without a measurement is missing.
        paper: the paper's quality and places, of its own model; None unless it was measured in the same way.
    """

    letter: str
    label: str
    kind: str
    quality: Interval
    num_seeds: tuple[int, int]
    places: Mapping[str, float]
    paper: tuple[float, Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Headline:
    """The headline chart as numbers.

    Attributes:
        metric: what quality is: `accuracy`, `similarity` or `accuracy or similarity`.
        records: the runs of the chart, with dense ones.
        points: methods, best first.
        dense: quality of the dense model, or None if it was not run.
        guessing: accuracy of guessing, or None where the metric has none.
        axis_notes: how time and memory were measured, by axis.
        left_out: labels of methods that lack a dataset of the chart.
        others: titles of the report's other groups, which are not in the chart.
    """

    metric: str
    records: list[RunRecord]
    points: list[Point]
    dense: Interval | None
    guessing: float | None
    axis_notes: Mapping[str, str]
    left_out: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Display names of the datasets."""
        return sorted({dataset_title(dataset_name(record)) for record in self.records})


def headline(records: Sequence[RunRecord], published: Sequence[Published] = ()) -> Headline | None:
    """Returns the headline chart of these runs; None if none of them pruned.

    Args:
        records: finished runs. Timings of those of one setting serve all models of the same shapes.
        published: the paper's tables: 1 for quality, 2 for time and memory, 11 for parameters.
    """
    groups = [(title, group) for title, group in comparable_groups(records) if _methods(group)]
    if not groups:
        return None
    title, group = max(groups, key=lambda each: (len(_methods(each[1])), len(each[1]), each[0]))
    cells, left_out = _complete(_rows(group))
    dense = cells.pop(METHOD_LABELS[DENSE], {})
    places, notes = _places(cells, group, records)
    metric = " or ".join(sorted({METRIC_LABELS[main_metric(run)] for run in _runs(cells)}))
    ordered = sorted(cells, key=lambda label: -_interval(cells[label]).value)
    points = [
        Point(
            _letter(number),
            label,
            _kind(_runs({label: cells[label]})[0]),
            _interval(cells[label]),
            (min(map(len, cells[label].values())), max(map(len, cells[label].values()))),
            {axis: values[label] for axis, values in places.items() if label in values},
            _paper(cells[label], published, TIME in notes and "fine-tune" in notes[TIME]),
        )
        for number, label in enumerate(ordered)
    ]
    guesses = [run.metrics.get("chance_accuracy") for run in _runs(cells) if main_metric(run) == "accuracy"]
    known = [guess for guess in guesses if guess is not None]
    return Headline(
        metric,
        [*_runs(cells), *_runs({"": dense})],
        points,
        _interval(dense) if dense else None,
        statistics.mean(known) if known and len(known) == len(_runs(cells)) else None,
        notes,
        left_out,
        [other for other, _ in groups if other != title],
    )


_Cells = dict[str, dict[str, list[RunRecord]]]  # by label and dataset


def _methods(group: Sequence[RunRecord]) -> set[str]:
    return {run.pruning["method"] for run in group} - {DENSE}


def _runs(cells: Mapping[str, Mapping[str, list[RunRecord]]]) -> list[RunRecord]:
    return [run for row in cells.values() for runs in row.values() for run in runs]


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _rows(group: Sequence[RunRecord]) -> _Cells:
    """Returns one row per method at the sparsity that most methods have; of a single method a row for each setting."""
    names = _methods(group)
    if len(names) < 2:
        shown = [run for run in group if run.pruning["method"] in (DENSE, *names)]
        labels = [plain_label(label) for label in row_labels(shown)]
        return _cells(zip(labels, shown, strict=True))
    counts = Counter(
        sparsity for name in names for sparsity in {_sparsity(run) for run in group if run.pruning["method"] == name}
    )
    counts.pop(None, None)
    usual = max(counts, key=lambda each: (counts[each], -abs((each or 0.0) - USUAL_SPARSITY)), default=None)
    chosen = []
    for name in sorted({*names, DENSE} & {run.pruning["method"] for run in group}, key=method_place):
        own = [run for run in group if run.pruning["method"] == name]
        at_usual = [run for run in own if _sparsity(run) in (None, usual)]
        chosen += [(_label(run), run) for run in _main_variant(at_usual or own)]
    return _cells(chosen)


def _label(run: RunRecord) -> str:
    """Returns the name of a run's method, and that it was repaired unless the method always is."""
    name = run.pruning["method"]
    return METHOD_LABELS.get(name, name) + (", repaired" if _is_repaired(run) and name not in REPAIRING else "")


def _is_repaired(run: RunRecord) -> bool:
    settings = run.config["method"]
    return bool(settings.get("repair", "none") != "none" or settings.get("merge_rule") == "least_squares")


def _sparsity(run: RunRecord) -> float | None:
    sparsity = coordinates(run).get("sparsity")
    return round(float(sparsity), 2) if isinstance(sparsity, int | float) else None


def _main_variant(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs of one choice of a method's settings, by dataset: the choice with the most datasets and runs.

    Of equal ones the method without repair is shown.
    """
    variants: dict[str, list[RunRecord]] = {}
    for run in runs:
        settings = {key: value for key, value in depth_settings(run).items() if key != "repair_rows"}
        variants.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    found: dict[str, list[RunRecord]] = {}

    def weight(own: list[RunRecord]) -> tuple[int, int, bool]:
        return len({dataset_name(run) for run in own}), len(own), not _is_repaired(own[0])

    for own in sorted(variants.values(), key=weight):
        by_dataset: dict[str, list[RunRecord]] = {}
        for run in own:
            by_dataset.setdefault(dataset_name(run), []).append(run)
        found |= by_dataset
    return [run for own in found.values() for run in own]


def _cells(labelled: Iterable[tuple[str, RunRecord]]) -> _Cells:
    cells: _Cells = {}
    for label, run in labelled:
        if run.metric(main_metric(run)) is not None:
            cells.setdefault(label, {}).setdefault(dataset_name(run), []).append(run)
    return {
        label: {data: list({run.seed: run for run in runs}.values()) for data, runs in row.items()}
        for label, row in cells.items()
    }


def _complete(cells: _Cells) -> tuple[_Cells, list[str]]:
    """Returns the rows on the datasets that make the most cells, and the labels of rows that lack one of them."""
    choices = [frozenset(row) for row in cells.values()]

    def size(choice: frozenset[str]) -> tuple[int, int, list[str]]:
        complete = sum(choice <= own for own in choices)
        return len(choice) * complete, complete, sorted(choice)

    widest = max(choices, key=size)
    kept = {label: {data: row[data] for data in sorted(widest)} for label, row in cells.items() if widest <= set(row)}
    kept = dict(list(kept.items())[: MOST_POINTS + 1])
    return kept, [label for label in cells if label not in kept]


def _interval(row: Mapping[str, list[RunRecord]]) -> Interval:
    """Returns the mean over datasets with its 95 % interval."""
    means, errors = [], []
    for runs in row.values():
        metric = main_metric(runs[0])
        means.append(statistics.mean(run.metric(metric) or 0.0 for run in runs))
        errors.append(complete_error(runs, metric))
    value, reach = statistics.mean(means), QUANTILE * math.hypot(*errors) / len(errors)
    return Interval(value, value - reach, value + reach)


def _kind(run: RunRecord) -> str:
    if run.pruning["method"].startswith(("gradpruner", "igia_only")):
        return OURS
    if run.pruning["pruned_layers"] or run.pruning["num_hidden_layers"] < run.model["num_hidden_layers"]:
        return DROPS
    return NARROWS if run.pruning["num_parameters"] < run.model["num_parameters"] else ENDS_DENSE


def _places(
    cells: _Cells, group: Sequence[RunRecord], records: Sequence[RunRecord]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Returns percent of the dense model by axis and label, and how it was measured by axis.

    Time and memory are those of inference where models of these shapes were timed, else those of the whole training.
    """
    sizes = {
        label: statistics.mean(
            100 * run.pruning["num_parameters"] / run.model["num_parameters"] for run in _runs({"": row})
        )
        for label, row in cells.items()
    }
    places = {PARAMETERS: sizes}
    speeds = _timed_together(cells, records)
    measured = {}
    for label, row in cells.items():
        found = [timed(speeds[_shapes(run)]) for run in _runs({"": row}) if _shapes(run) in speeds]
        if found:
            measured[label] = [
                mean_of_known([each[index] for each in found]) for index in (2, 4)
            ]  # prefill, peak memory
    if 2 * len(measured) >= len(cells):
        machines = {run.environment["device"] for run in speeds.values()}
        notes = f"inference, timed in turns with the dense model on {', '.join(sorted(machines))}"
        how = {TIME: f"time per prompt: {notes}", MEMORY: f"peak memory: {notes}"}
    else:
        dense = {(dataset_name(run), seed_and_machine(run)): run for run in group if run.pruning["method"] == DENSE}
        measured = {}
        for label, row in cells.items():
            own = [(run, dense.get((dataset_name(run), seed_and_machine(run)))) for run in _runs({"": row})]
            costs = [training_costs(run, base, None) for run, base in own if base is not None]
            if costs:
                measured[label] = [mean_of_known([each[index] for each in costs]) for index in (0, 1)]
        how = {
            TIME: "training time: measuring, pruning and fine-tune, wall clock; other work on the machine lengthens it",
            MEMORY: "training memory: highest memory of pruning and fine-tune",
        }
    for index, axis in enumerate((TIME, MEMORY)):
        places[axis] = {label: value for label, own in measured.items() if (value := own[index]) is not None}
    return places, {axis: note for axis, note in how.items() if places[axis]}


def _timed_together(cells: _Cells, records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Returns the timed runs by shapes, all of the setting that times the most rows: others may be of other days."""
    settings: dict[str, dict[str, RunRecord]] = {}
    for run in records:
        if run.efficiency.get("speed"):
            settings.setdefault(json.dumps(setting(run), sort_keys=True), {})[_shapes(run)] = run

    def num_rows(own: Mapping[str, RunRecord]) -> int:
        return sum(any(_shapes(run) in own for run in _runs({"": row})) for row in cells.values())

    return max(settings.values(), key=num_rows, default={})


def _shapes(run: RunRecord) -> str:
    return json.dumps([run.model["shape"], run.pruning["shape"]], sort_keys=True)


def _paper(
    row: Mapping[str, list[RunRecord]], published: Sequence[Published], is_training: bool
) -> tuple[float, dict[str, float]] | None:
    """Returns the paper's mean and its places, if every dataset was measured as the paper measures it."""
    tables = {each.label: each for each in published}
    runs = _runs({"": row})
    first = runs[0]
    if "Table 1" not in tables or any(why_not_comparable(_tested(run), main_metric(run), run.metrics) for run in runs):
        return None
    names = [_tested(run) for run, *_ in row.values()]
    wanted = {"method": first.pruning["method"], "finetune": first.config["finetune"]["mode"]}
    rows = tables["Table 1"].select(**wanted)
    rows = [each for each in rows if each.coordinates.get("model") == first.config["model"]["path"]] or rows
    columns = tables["Table 1"].columns
    if not rows or any(name not in columns for name in names):
        return None
    quality = statistics.mean(float(rows[0].values[columns.index(name)]) for name in names)
    places: dict[str, float] = {}
    if "Table 2" in tables and (costs := tables["Table 2"].select(**wanted)):
        offset = 0 if is_training else 2
        places |= {TIME: float(costs[0].values[offset]), MEMORY: float(costs[0].values[offset + 1])}
    if "Table 11" in tables and (sizes := tables["Table 11"].select(method=first.pruning["method"])):
        whole = tables["Table 11"].select(method=DENSE)[0]
        places[PARAMETERS] = 100 * float(sizes[0].values[2] / whole.values[2])
    return (quality, places) if places else None


def _tested(run: RunRecord) -> str:
    return str(run.config["dataset"].get("test") or dataset_module(run))
