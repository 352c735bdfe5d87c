"""Tables over the records of many runs: one for each setting, one row for each method, in the paper's order."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradpruner.record import NOT_IDENTITY, RunRecord
from gradpruner.reporting.labels import METHODS, Column, describe_origins, method_place, metric_columns

# What may differ between the rows of one table; everything else in a config makes another table.
NOT_SETTING = (*NOT_IDENTITY, "method", "seed", "evaluate_before")


@dataclass(frozen=True)
class Table:
    """Text, ready to be shown.

    Attributes:
        title: what all rows share.
        headers: names of the columns; the first is that of the rows.
        rows: cells.
        notes: sentences below the table.
    """

    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headers, ["---", *("---:" for _ in self.headers[1:])], *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"## {self.title}\n\n{table}\n{notes}\n"


def comparisons(records: Sequence[RunRecord]) -> list[Table]:
    """One table a setting (model, data, fine-tuning, evaluation) over the finished records."""
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished":
            settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    return tell_apart([(_comparison(settings[key]), json.loads(key)) for key in sorted(settings)])


def dataset_name(record: RunRecord) -> str:
    """Name of the dataset of a run, with the one that it was tested on."""
    dataset = record.config["dataset"]
    tested = f", tested on {dataset['test']}" if dataset["test"] else ""
    if dataset.get("validation_fraction"):
        tested += ", validation rows"
    return f"{dataset['_target_'].rsplit('.', 2)[-2]}{tested}"


def setting(record: RunRecord) -> dict[str, Any]:
    """What a run shares with those that it may be compared with: model, data, fine-tuning, evaluation."""
    shared = {key: value for key, value in record.config.items() if key not in NOT_SETTING}
    return shared | {"dataset": data_settings(record)}


def data_settings(record: RunRecord) -> dict[str, Any]:
    """The settings of the dataset of a run, without those that are null: older records lack some of these."""
    return _given(record.config["dataset"])


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def tell_apart(tables: Sequence[tuple[Table, Mapping[str, Any]]]) -> list[Table]:
    """Adds to titles that occur more than once in which settings their tables differ.

    Args:
        tables: each with what its runs share.
    """
    return [
        replace(table, title=", ".join([table.title, *differences(shared, alike)]))
        for table, shared in tables
        for alike in [[other for another, other in tables if another.title == table.title]]
    ]


def differences(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what a setting differs from others, as `key=value`."""
    flat, *rest = (dict(_leaves(each)) for each in [own, *others])
    return [
        f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in flat.items()
        if any(other.get(key) != value for other in rest)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _comparison(records: list[RunRecord]) -> Table:
    columns = metric_columns([record.metrics for record in records])
    rows = rows_of_seeds(records)
    first = records[0]
    labels = row_labels([group[0] for group in rows])
    before = any(record.metrics_before for record in records)
    headers = ["method", "layers", "params", *(column.label for column in columns)]
    headers += ["NLL before"] * before + ["compress s", "compress GiB", "train s", "train GiB"]
    num_seeds = {len(group) for group in rows}
    spread = (
        "standard error over test rows"
        if num_seeds == {1}
        else "standard deviation over seeds, where there are several"
    )
    num_layers = sorted({str(record.pruning["num_hidden_layers"]) for record in records}, key=int)
    notes = [
        f"{first.metrics['num_examples']} test rows, {first.finetune['steps']} steps of fine-tuning; ± is the {spread}",
        f"{', '.join(num_layers)} of {first.model['num_hidden_layers']} layers; times and memory are of this machine: "
        f"{first.environment['device']}, {first.environment['num_threads']} threads",
        *describe_origins([record.metrics for record in records]),
    ]
    if "majority_accuracy" in first.metrics:
        notes.append(
            f"always the most frequent label: {first.metrics['majority_accuracy']:.3f}, "
            f"guessing: {first.metrics['chance_accuracy']:.3f}"
        )
    return Table(
        f"{first.model['name']} on {dataset_name(first)}, {first.config['finetune']['mode']}",
        headers,
        [
            [label, *_cells(group, columns, before)]
            for label, group in sorted(zip(labels, rows, strict=True), key=lambda pair: row_order(pair[1][0]))
        ],
        notes,
    )


def rows_of_seeds(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Records that differ in the seed alone, together."""
    rows: dict[str, dict[int, RunRecord]] = {}
    for record in records:
        key = [setting(record), record.pruning["method"], _row_key(record)]
        rows.setdefault(json.dumps(key, sort_keys=True), {})[record.seed] = record
    return [[group[seed] for seed in sorted(group)] for group in rows.values()]


def _settings(record: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in record.config["method"].items() if key not in ("_target_", "seed")}


def row_labels(records: list[RunRecord]) -> list[str]:
    """Names of the methods, with the settings in which rows of the same method differ.

    A value that more than half of these rows share goes without saying. Settings that are themselves made of settings
    are long, and older records lack some: both are only named where the others do not tell rows apart.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}  # by method, those of other seeds once
    for record in records:
        rows.setdefault(record.pruning["method"], {}).setdefault(_row_key(record), _settings(record))
    labels = []
    for record in records:
        of_method = rows[record.pruning["method"]]
        own, alike = of_method[_row_key(record)], list(of_method.values())
        short = [key for key in own if all(key in each and not _is_nested(each[key]) for each in alike)]
        if all(any(other[key] != own[key] for key in short) for other in alike if other != own):
            shown = [key for key in short if 2 * sum(other[key] == own[key] for other in alike) <= len(alike)]
        else:
            shown = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        name = METHODS.get(record.pruning["method"], record.pruning["method"])
        labels.append(", ".join([name, *(f"{key}={_four_digits(own[key])}" for key in shown)]))
    return labels


def _row_key(record: RunRecord) -> str:
    return json.dumps(_given(_settings(record)), sort_keys=True)


def _four_digits(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def row_order(record: RunRecord) -> tuple[tuple[int, str], int, str]:
    """Sorting key of rows: the paper's order of methods, then the larger models, then by settings."""
    settings = _row_key(record)
    return method_place(record.pruning["method"]), -record.pruning["num_hidden_layers"], settings


def _cells(group: list[RunRecord], columns: list[Column], before: bool) -> list[str]:
    first = group[0]
    cells = [str(first.pruning["num_hidden_layers"]), f"{first.pruning['num_parameters'] / 1e6:.1f} M"]
    cells += cells_of_seeds(group, columns)
    if before:
        cells.append(mean_or_dash([record.metrics_before.get("answer_nll") for record in group], 2))
    gib = 2**30
    cells.append(mean_or_dash([record.efficiency["compression_seconds"] for record in group], 1))
    cells.append(mean_or_dash([record.efficiency["compression_peak_memory_bytes"] / gib for record in group], 2))
    cells.append(mean_or_dash([record.finetune["train_seconds"] for record in group], 0))
    cells.append(mean_or_dash([record.finetune["peak_memory_bytes"] / gib for record in group], 2))
    return cells


def cells_of_seeds(group: list[RunRecord], columns: list[Column]) -> list[str]:
    """What runs of several seeds were measured at: mean and standard deviation; of one seed, value and error."""
    cells = []
    for column in columns:
        own = [record.metrics for record in group if column.cell(record.metrics) != "-"]
        values = [metrics[column.metric] for metrics in own]
        if len(values) < 2:
            cells.append(column.cell(own[0]) if own else "-")
        else:
            cells.append(f"{statistics.mean(values):.3f} ±{statistics.stdev(values):.3f} (n={len(values)})")
    return cells


def mean_or_dash(values: Sequence[float | None], digits: int) -> str:
    """The mean of the values that are known."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "-"
