"""The main table of a page: one row per method and setting, over all runs, in numbers that can be sorted."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.messages import parameters
from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import QUANTILE, complete_error, difference
from gradpruner.reporting.differing import plain_differences
from gradpruner.reporting.efficiency import seed_and_machine, training_costs
from gradpruner.reporting.labels import METHOD_LABELS, METRIC_LABELS, REPAIRING, engine_in_title
from gradpruner.reporting.means import DENSE, main_metric, mean_of_known
from gradpruner.reporting.plain_names import dataset_title, plain_label
from gradpruner.reporting.tables import dataset_name, row_labels, row_order, rows_of_seeds, setting

DASH = "-"
NLL = "answer_nll"
# Older records lack these settings, so rows would differ in them by age alone.
NOT_NAMED = ("repair_rows=", "repair=none")
SHORT_MODES = {"lora": "LoRA"}


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what it says first.
        number: number that it is sorted by; None for text, and for a missing number.
        detail: what it says below in small letters, such as an interval.
    """

    text: str
    number: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its header.
        about: a sentence about it.
        is_number: whether it holds numbers.
        is_less_better: whether a reader looks for the least of them.
    """

    name: str
    about: str = ""
    is_number: bool = True
    is_less_better: bool = False


@dataclass(frozen=True)
class MainTable:
    """The main table.

    Attributes:
        shared: what all rows have in common, by name.
        columns: columns in which rows differ.
        rows: cells.
        sources: runs of each row.
        filters: columns that a reader may choose values of, by position, with the values.
    """

    shared: dict[str, str]
    columns: list[Column]
    rows: list[list[Cell]]
    sources: list[list[RunRecord]]
    filters: dict[int, list[str]]


FILTERED = ("Method", "Model", "Data", "Fine-tuning")
COLUMNS = {
    "Method": Column("Method", "below it the settings in which rows of a method differ", False),
    "Model": Column("Model", "", False),
    "Data": Column("Data", "below it the settings in which the row differs from most on these data", False),
    "Fine-tuning": Column("Fine-tuning", "", False),
    "Layers": Column("Layers", "decoder layers that are kept"),
    "Parameters": Column("Parameters", "after pruning; below it the percentage of the dense model's"),
    "Quality": Column(
        "Quality", "mean over seeds, higher is better; below it the 95 % interval over test rows and seeds"
    ),
    "Against dense": Column(
        "Against dense",
        "quality minus the dense model's in the same setting; below it the 95 % interval; ≠: can be told from 0 at 5 %",
    ),
    "Answer NLL": Column(
        "Answer NLL", "negative log-likelihood of the right answer per token, in nats; lower is better", True, True
    ),
    "Training time": Column(
        "Training time",
        "percent of the dense model's with the same seed and machine: measuring, pruning and fine-tune, wall clock",
        is_less_better=True,
    ),
    "Training memory": Column(
        "Training memory", "percent of the dense model's: highest memory of the same", True, True
    ),
    "Seeds": Column("Seeds", "seeds of the row; each links to what is known of its run"),
}


def main_table(records: Sequence[RunRecord]) -> MainTable:
    """Returns one row for runs that differ only in the seed, in the paper's order of methods."""
    groups = sorted(rows_of_seeds(records), key=lambda group: (*row_order(group[0])[:2], _where(group[0])))
    firsts = [group[0] for group in groups]
    variants = _variants(firsts)
    conditions = _conditions(firsts)
    dense = {
        (json.dumps(setting(run), sort_keys=True), seed_and_machine(run)): run
        for run in records
        if run.pruning["method"] == DENSE
    }
    metrics = {METRIC_LABELS[main_metric(run)] for run in firsts}
    rows = []
    for group, variant, condition in zip(groups, variants, conditions, strict=True):
        first = group[0]
        name, mode = first.pruning["method"], first.config["finetune"]["mode"]
        base = [run for run in dense.values() if setting(run) == setting(first)]
        kept, parameter = first.pruning["num_hidden_layers"], first.pruning["num_parameters"]
        share = 100 * parameter / first.model["num_parameters"]
        time, memory = _costs(group, dense)
        cells = {
            "Method": Cell(METHOD_LABELS.get(name, name), detail=variant),
            "Model": Cell(first.model["name"]),
            "Data": Cell(dataset_title(dataset_name(first)), detail=condition),
            "Fine-tuning": Cell(SHORT_MODES.get(mode, mode) + engine_in_title(first)),
            "Layers": Cell(f"{kept} of {first.model['num_hidden_layers']}", kept),
            "Parameters": Cell(parameters(parameter), parameter, f"{share:.0f} %"),
            "Quality": _quality(group, named=len(metrics) > 1),
            "Against dense": _against(group, base),
            "Answer NLL": _nll(group),
            "Training time": _percent(time),
            "Training memory": _percent(memory),
            "Seeds": Cell(", ".join(str(run.seed) for run in group), len(group)),
        }
        rows.append(cells)
    shared = {
        name: next(iter(texts))
        for name in ("Model", "Data", "Fine-tuning", "Layers", "Parameters")
        if len(rows) > 1
        and len(texts := {row[name].text for row in rows}) == 1
        and (name == "Parameters" or not any(row[name].detail for row in rows))
    }
    empty = {name for name in COLUMNS if all(row[name].text in ("", DASH) for row in rows)}
    shown = [name for name in COLUMNS if name not in empty and name not in shared]
    columns = [COLUMNS[name] for name in shown]
    if len(metrics) == 1:
        label = next(iter(metrics))
        columns = [_renamed(column, label) for column in columns]
    cells_of = [[row[name] for name in shown] for row in rows]
    filters = {
        at: sorted({row[name].text for row in rows})
        for at, name in enumerate(shown)
        if name in FILTERED and len({row[name].text for row in rows}) > 1
    }
    return MainTable(shared, columns, cells_of, groups, filters)


def _renamed(column: Column, label: str) -> Column:
    renamed = label[0].upper() + label[1:]
    return Column(renamed, column.about) if column.name == "Quality" else column


def _where(record: RunRecord) -> tuple[str, str, str]:
    return record.model["name"], dataset_name(record), record.config["finetune"]["mode"]


def _variants(firsts: Sequence[RunRecord]) -> list[str]:
    """Returns the settings of each row's method that other rows of it do not have, in words."""
    labels = []
    for record, label in zip(firsts, row_labels(firsts), strict=True):
        name, repair = record.pruning["method"], record.config["method"].get("repair", "none")
        own = label.removeprefix(METHOD_LABELS.get(name, name)).removeprefix(", ")
        parts = [part for part in own.split(", ") if not part.startswith(NOT_NAMED) and not part.endswith("=None")]
        if repair != "none" and name not in REPAIRING and not any(part.startswith("repair=") for part in parts):
            parts.insert(0, f"repair={repair}")
        labels.append(plain_label(", ".join(parts)))
    return labels


def _conditions(firsts: Sequence[RunRecord]) -> list[str]:
    """Returns in which settings a row differs from most rows of its model, dataset and kind of fine-tuning."""
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in firsts:
        alike.setdefault(_where(record), []).append(setting(record))
    usual = {}
    for key, settings in alike.items():
        counts = Counter(json.dumps(each, sort_keys=True) for each in settings)
        usual[key] = json.loads(counts.most_common(1)[0][0])
    return [
        ", ".join(plain_differences(own, [usual[_where(record)], own]))
        for record in firsts
        for own in [json.loads(json.dumps(setting(record)))]
    ]


def _quality(group: Sequence[RunRecord], named: bool) -> Cell:
    metric = main_metric(group[0])
    if any(run.metric(metric) is None for run in group):
        return Cell(DASH)
    mean = statistics.mean(run.metric(metric) or 0.0 for run in group)
    reach = QUANTILE * complete_error(group, metric)
    label = f" {METRIC_LABELS[metric]}" if named else ""
    return Cell(f"{mean:.3f}{label}", mean, f"{mean - reach:.3f} to {mean + reach:.3f}")


def _against(group: Sequence[RunRecord], dense: Sequence[RunRecord]) -> Cell:
    metric = main_metric(group[0])
    known = [run for run in [*group, *dense] if run.metric(metric) is not None]
    if not dense or group[0].pruning["method"] == DENSE or len(known) < len(group) + len(dense):
        return Cell(DASH)
    found = difference(group, dense, metric)
    mark = " ≠" if found.is_clear else ""
    return Cell(f"{found.value:+.3f}{mark}", found.value, f"{found.low:+.3f} to {found.high:+.3f}")


def _nll(group: Sequence[RunRecord]) -> Cell:
    values = [value for run in group if (value := run.metric(NLL)) is not None]
    if len(values) < len(group):
        return Cell(DASH)
    mean, reach = statistics.mean(values), QUANTILE * complete_error(group, NLL)
    return Cell(f"{mean:.2f}", mean, f"{mean - reach:.2f} to {mean + reach:.2f}")


def _costs(
    group: Sequence[RunRecord], dense: Mapping[tuple[str, tuple[int, str, int]], RunRecord]
) -> tuple[float | None, float | None]:
    """Returns mean time and memory of training in percent of the dense model's; None without a dense run."""
    if group[0].pruning["method"] == DENSE:
        return None, None
    pairs = [(run, dense.get((json.dumps(setting(run), sort_keys=True), seed_and_machine(run)))) for run in group]
    costs = [training_costs(run, base, None) for run, base in pairs if base is not None]
    times, memories = ([cost[at] for cost in costs] for at in (0, 1))
    return mean_of_known(times), mean_of_known(memories)


def _percent(value: float | None) -> Cell:
    return Cell(DASH) if value is None else Cell(f"{value:.0f} %", value)
