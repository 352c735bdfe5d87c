"""Tables over the records of many runs: one table per setting, one row per method, in the paper's order."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradpruner.messages import parameters
from gradpruner.models.counting import ROW_LENGTH
from gradpruner.record import NOT_IDENTITY, RunRecord, evaluation_settings
from gradpruner.reporting.comparing import SPREAD_NOTE, mean_error
from gradpruner.reporting.coordinates import dataset_module
from gradpruner.reporting.differing import differences, plain_differences
from gradpruner.reporting.labels import (
    METHOD_LABELS,
    MetricColumn,
    caveats,
    describe_origins,
    engine_in_title,
    method_place,
    metric_columns,
)
from gradpruner.reporting.plain_names import MODES, dataset_title

# Settings of the fine-tune that older records lack, with the value that those runs had.
LATER_SETTINGS = {
    "precision": "auto",
    "merge_dtype": "auto",
    "loss": "answers",
    "prompt_weight": 1.0,
    "tuned_teacher": 0.0,
}
LATER_METHOD_SETTINGS = {"repair_refit": False, "halving": []}  # the same for methods
# Settings of a method that do nothing while another one is off; older records lack these, too.
DEPENDENT = {"halving_learning_rate": "halving", "halving_batch_size": "halving"}
# Columns that older records lack: parameters without the input embedding, and the work of one row.
COUNTS = ("w/o embedding", "GMACs")
DEPTH = ("sparsity", "num_pruned_layers")
# Settings of the fine-tune that change its speed and memory, not its result but for rounding: methods differ in them.
OF_SPEED = ("micro_batch_size", "gradient_checkpointing", "save_steps", "parallel")
# Settings of the fine-tune that say what a method compresses: rows of one table may differ in them.
OF_METHOD = ("tune_dense_first",)
STATED_IF_UNUSUAL = (*LATER_METHOD_SETTINGS, *OF_METHOD)
# Config keys that may differ between the rows of one table; a difference in any other key makes another table.
NOT_SETTING = (*NOT_IDENTITY, "method", "seed", "evaluate_before")


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: what all rows share.
        headers: names of the columns; the first column holds the labels of the rows.
        rows: cells.
        notes: sentences below the table.
        sources: the runs behind each row; empty if nothing was run for the table.
        section: part of an HTML report that the table belongs to: `Table 1`, `Importance runs`; empty for a setting.
        heading: the title within its section, in plain words; empty where the title serves.
        aspect: what is measured if a table beside it has the section's main measure: `answer NLL`.
    """

    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]
    sources: Sequence[Sequence[RunRecord]] = ()
    section: str = ""
    heading: str = ""
    aspect: str = ""

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [self.headers, ["---", *("---:" for _ in self.headers[1:])], *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"## {self.title}\n\n{table}\n{notes}\n"


def comparisons(records: Sequence[RunRecord]) -> list[Table]:
    """Returns one table per setting (model, data, fine-tuning, evaluation) over the finished records."""
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished":
            settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    return tell_apart([(_comparison(settings[key]), json.loads(key)) for key in sorted(settings)])


def dataset_name(record: RunRecord) -> str:
    """Returns the name of a run's dataset and, if it was tested on another dataset, the name of that one."""
    dataset = record.config["dataset"]
    if not dataset:  # timings alone
        return "random rows"
    tested = f", tested on {dataset['test']}" if dataset.get("test") else ""
    if dataset.get("validation_fraction"):
        tested += ", validation rows"
    return f"{dataset_module(record)}{tested}"


def setting(record: RunRecord) -> dict[str, Any]:
    """Returns the part of a config that comparable runs share: model, data, fine-tuning, evaluation.

    Settings that older records lack are left out where they have the value that those runs had, and so are those of
    speed.
    """
    shared = {key: value for key, value in record.config.items() if key not in NOT_SETTING}
    finetune = {
        key: value
        for key, value in record.config["finetune"].items()
        if (key, value) not in LATER_SETTINGS.items() and key not in (*OF_SPEED, *OF_METHOD)
    }
    evaluation = {key: value for key, value in evaluation_settings(record.config).items() if key != "batch_size"}
    return shared | {"dataset": data_settings(record), "finetune": finetune, "evaluation": evaluation}


def data_settings(record: RunRecord) -> dict[str, Any]:
    """Returns the dataset settings of a run without those that are null; older records lack some of these.

    All of the training rows are a fraction of 1, given or not.
    """
    settings = _given(record.config["dataset"])
    return {key: value for key, value in settings.items() if (key, value) != ("train_fraction", 1.0)}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def tell_apart(tables: Sequence[tuple[Table, Mapping[str, Any]]]) -> list[Table]:
    """Makes titles distinct: tables with one title get the settings in which they differ appended.

    Args:
        tables: each with the settings that its runs share.
    """
    settings_by_title: dict[str, list[Mapping[str, Any]]] = {}
    for table, shared in tables:
        settings_by_title.setdefault(table.title, []).append(shared)
    told = []
    for table, shared in tables:
        others = settings_by_title[table.title]
        title = ", ".join([table.title, *differences(shared, others)])
        heading = ", ".join([table.heading or table.title, *plain_differences(shared, others)])
        told.append(replace(table, title=title, heading=heading))
    return told


def _comparison(records: list[RunRecord]) -> Table:
    columns = metric_columns([record.metrics for record in records])
    rows = sorted(rows_of_seeds(records), key=lambda group: row_order(group[0]))
    labels = row_labels([group[0] for group in rows])
    has_before = any(record.metrics_before for record in records)
    has_counts = any("num_macs" in record.pruning for record in records)
    headers = ["method", "layers", "params", *(COUNTS if has_counts else ()), *(column.label for column in columns)]
    if has_before:
        headers.append("NLL before")
    headers += ["compress s", "compress GiB", "train s", "train GiB"]
    first = records[0]
    return Table(
        f"{setting_name(first)}{engine_in_title(first)}",
        headers,
        [[label, *_cells(group, columns, has_counts, has_before)] for label, group in zip(labels, rows, strict=True)],
        _notes(records),
        rows,
        heading=plain_setting_name(first),
    )


def setting_name(record: RunRecord) -> str:
    """Returns model, dataset and kind of fine-tuning of a run, by the names of the config."""
    return f"{record.model['name']} on {dataset_name(record)}, {record.config['finetune']['mode']}"


def plain_setting_name(record: RunRecord) -> str:
    """Returns the same in plain words, with the engine if it is not transformers."""
    mode, data = record.config["finetune"]["mode"], dataset_title(dataset_name(record))
    return f"{record.model['name']} on {data}, {MODES.get(mode, mode)}{engine_in_title(record)}"


def _notes(records: list[RunRecord]) -> list[str]:
    first = records[0]
    num_layers = sorted({record.pruning["num_hidden_layers"] for record in records})
    notes = [
        f"{first.metrics['num_examples']} test rows, {first.finetune['steps']} steps of fine-tuning",
        SPREAD_NOTE,
        f"{', '.join(map(str, num_layers))} of {first.model['num_hidden_layers']} layers; times and memory are of this "
        f"machine: {first.environment['device']}, {first.environment['num_threads']} threads",
        *describe_origins([record.metrics for record in records]),
        *caveats(records),
    ]
    if any("num_macs" in record.pruning for record in records):
        notes.append(f"w/o embedding: parameters without the input embedding; GMACs: of a row of {ROW_LENGTH} tokens")
    if "majority_accuracy" in first.metrics:
        notes.append(
            f"always the most frequent label: {first.metrics['majority_accuracy']:.3f}, "
            f"guessing: {first.metrics['chance_accuracy']:.3f}"
        )
    return notes


def rows_of_seeds(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups records that differ only in the seed; each group is in the order of seeds."""
    rows: dict[str, dict[int, RunRecord]] = {}
    for record in records:
        key = [setting(record), record.pruning["method"], _row_key(record)]
        rows.setdefault(json.dumps(key, sort_keys=True), {})[record.seed] = record
    return [[group[seed] for seed in sorted(group)] for group in rows.values()]


def _settings(record: RunRecord) -> dict[str, Any]:
    method = record.config["method"]
    own = {
        key: value
        for key, value in method.items()
        if key not in ("_target_", "seed")
        and (key, value) not in LATER_METHOD_SETTINGS.items()
        and (key not in DEPENDENT or method.get(DEPENDENT[key]))
    }
    return own | {key: True for key in OF_METHOD if record.config["finetune"].get(key)}


def row_labels(records: Sequence[RunRecord]) -> list[str]:
    """Returns one label per record: its method, and the settings in which rows of that method differ.

    A value that more than half of a method's rows share is not named. Two kinds of setting are named only where the
    others do not tell rows apart: those that contain settings themselves, which are long, and those that older records
    lack, unless they say what is unusual in a row.
    """
    # By method and row; runs of several seeds are one row.
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(record.pruning["method"], {}).setdefault(_row_key(record), _settings(record))
    labels = []
    for record in records:
        method = record.pruning["method"]
        own = rows[method][_row_key(record)]
        shown = _distinctive(own, list(rows[method].values()))
        labels.append(", ".join([METHOD_LABELS.get(method, method), *(f"{key}={_text(own[key])}" for key in shown)]))
    return labels


def _distinctive(own: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys of the settings to name for the row `own` among the `rows` of its method."""
    short = [key for key in own if all(key in row and not isinstance(row[key], dict | list) for row in rows)]
    others = [row for row in rows if row != own]
    if all(any(other[key] != own[key] for key in short) for other in others):
        named = [key for key in short if 2 * sum(row[key] == own[key] for row in rows) <= len(rows)]
        # These stand in a row only where they are not what they are without a word.
        return named + [key for key in own if key in STATED_IF_UNUSUAL and any(key not in row for row in rows)]
    return [key for key in own if any(other.get(key) != own[key] for other in others)]


def depth_settings(record: RunRecord) -> dict[str, Any]:
    """Returns a method's settings with one name for how much it prunes, if it says that as a number.

    A sparsity of 0.4, one of 13/32, and 13 layers are the same for 32 layers.
    """
    settings = _given(_settings(record))
    given = settings.get("sparsity", settings.get("num_pruned_layers"))
    if isinstance(given, str) or given is None or settings.get("match", "layers") != "layers":
        return settings
    num_layers = record.model["num_hidden_layers"]
    count = round(given * num_layers) if "sparsity" in settings else given
    return {key: value for key, value in settings.items() if key not in DEPTH} | {"num_pruned_layers": count}


def _row_key(record: RunRecord) -> str:
    return json.dumps(depth_settings(record), sort_keys=True)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def row_order(record: RunRecord) -> tuple[tuple[int, str], int, str]:
    """Returns the sorting key of a row: the paper's order of methods, then larger models first, then settings."""
    return method_place(record.pruning["method"]), -record.pruning["num_hidden_layers"], _row_key(record)


def _cells(group: list[RunRecord], columns: list[MetricColumn], has_counts: bool, has_before: bool) -> list[str]:
    first = group[0]
    cells = [str(first.pruning["num_hidden_layers"]), parameters(first.pruning["num_parameters"])]
    if has_counts:
        cells += _counts(first)
    cells += cells_of_seeds(group, columns)
    if has_before:
        cells.append(mean_or_dash([record.metrics_before.get("answer_nll") for record in group], 2))
    gib = 2**30
    cells.append(mean_or_dash([record.efficiency["compression_seconds"] for record in group], 1))
    cells.append(mean_or_dash([record.efficiency["compression_peak_memory_bytes"] / gib for record in group], 2))
    cells.append(mean_or_dash([record.finetune["train_seconds"] for record in group], 0))
    cells.append(mean_or_dash([record.finetune["peak_memory_bytes"] / gib for record in group], 2))
    return cells


def _counts(record: RunRecord) -> list[str]:
    """Returns the cells of `COUNTS`; dashes for an older record."""
    pruning = record.pruning
    if "num_macs" not in pruning:
        return ["-"] * len(COUNTS)
    return [parameters(pruning["num_parameters_without_embedding"]), f"{pruning['num_macs'] / 1e9:.2f}"]


def cells_of_seeds(group: list[RunRecord], columns: list[MetricColumn]) -> list[str]:
    """Returns one cell per column: the mean over seeds and its standard error; with one seed, that over test rows."""
    cells = []
    for column in columns:
        shown = [record for record in group if column.cell(record.metrics) != "-"]
        values = [value for record in shown if (value := record.metric(column.metric)) is not None]
        if len(values) < 2:
            cells.append(column.cell(shown[0].metrics) if shown else "-")
        else:
            error = mean_error(shown, column.metric)
            cells.append(f"{statistics.mean(values):.3f} ±{error:.3f} (n={len(values)})")
    return cells


def mean_or_dash(values: Sequence[float | None], digits: int) -> str:
    """Returns the mean of the values that are not None, or a dash if all are None."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "-"
