"""The opening of a page: what was run, on what, what came out, and how far the numbers carry."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from gradpruner.messages import first_few, parameters
from gradpruner.record import RunRecord
from gradpruner.reporting.headline import ENDS_DENSE, OURS, Headline, Point
from gradpruner.reporting.labels import METHOD_LABELS, method_place
from gradpruner.reporting.plain_names import MODES, dataset_title
from gradpruner.reporting.tables import dataset_name

SMALL_MODEL = 1_000_000_000  # parameters; the paper's models have 7 and 8 billion


def facts(records: Sequence[RunRecord]) -> dict[str, str]:
    """Returns what was run, on what: methods, models, data, fine-tuning, seeds and machine."""
    methods = sorted({record.pruning["method"] for record in records}, key=method_place)
    names = [METHOD_LABELS.get(name, name) for name in methods]
    models = {
        f"{record.model['name']} ({record.model['num_hidden_layers']} layers, "
        f"{parameters(record.model['num_parameters'])} parameters)"
        for record in records
    }
    seeds = sorted({record.seed for record in records})
    machines = {machine_of(record) for record in records}
    modes = {MODES.get(mode, mode) for run in records for mode in [run.config["finetune"]["mode"]]}
    return {
        "Runs": f"{len(records)}, of {len(names)} method{'s' * (len(names) > 1)}: {', '.join(names)}",
        "Model": "; ".join(sorted(models)),
        "Data": "; ".join(_data(records)),
        "Fine-tuning": f"{' and '.join(sorted(modes))}, {_span(run.finetune['steps'] for run in records)} steps",
        "Seeds": f"{', '.join(map(str, seeds))}" + (" (not every row has all)" if len(seeds) > 1 else ""),
        "Machine": first_few(sorted(machines)),
    }


def machine_of(record: RunRecord) -> str:
    """Returns the device and the number of threads of a run."""
    count = record.environment["num_threads"]
    return f"{record.environment['device']}, {count} thread{'s' * (count != 1)}"


def _data(records: Sequence[RunRecord]) -> list[str]:
    """Returns the datasets by their numbers of rows."""
    by_rows: dict[str, list[str]] = {}
    for name in sorted({dataset_name(record) for record in records}):
        own = [record for record in records if dataset_name(record) == name]
        train = {record.config["dataset"].get("max_train_samples") for record in own}
        trained = "all" if train == {None} else _span(each for each in train if each is not None)
        tested = _span(record.metrics["num_examples"] for record in own)
        by_rows.setdefault(f"{trained} training rows, {tested} test rows", []).append(dataset_title(name))
    return [f"{', '.join(names)} ({'each ' * (len(names) > 1)}{rows})" for rows, names in by_rows.items()]


def _span(values: Iterable[Any]) -> str:
    known = sorted(set(values))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def finding(chart: Headline) -> str:
    """Returns the result of the chart in a sentence or two."""
    parts = [f"Dense model: {chart.metric} {chart.dense}."] if chart.dense else []
    pruned = [point for point in chart.points if point.kind != ENDS_DENSE]
    if pruned:
        parts.append(f"Best pruned model: {_said(pruned[0])}.")
        ours = next((point for point in pruned if point.kind == OURS), None)
        if ours is not None and ours is not pruned[0]:
            parts.append(f"Best of GradPruner's variants: {_said(ours)}.")
    return " ".join(parts)


def _said(point: Point) -> str:
    size = f"{point.places['parameters']:.0f} % of the parameters"
    return f"{point.label} with {size}, {point.quality}"


def caution(chart: Headline) -> str:
    """Returns how far the numbers of the chart carry."""
    reach = statistics.median((point.quality.high - point.quality.low) / 2 for point in chart.points)
    rows = _span(run.metrics["num_examples"] for run in chart.records)
    fewest = min(point.num_seeds[0] for point in chart.points)
    seeds = " and a single seed for some methods" if fewest == 1 else f" and {fewest} seeds or more"
    parts = [f"{rows} test rows per dataset{seeds} leave an uncertainty of about ±{reach:.2f} on each value."]
    size = max(run.model["num_parameters"] for run in chart.records)
    if size < SMALL_MODEL:
        parts.append(
            f"A model of {parameters(size)} parameters shows how methods compare at this size; it says little about "
            "models of billions of parameters."
        )
    return " ".join(parts)
