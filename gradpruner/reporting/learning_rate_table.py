"""Learning rates of the fine-tune side by side: the best one for each method, and the best one for all of them."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import SPREAD_NOTE
from gradpruner.reporting.labels import METRIC_LABELS, MetricColumn, caveats
from gradpruner.reporting.tables import (
    Table,
    cells_of_seeds,
    plain_setting_name,
    row_labels,
    row_order,
    rows_of_seeds,
    setting,
    setting_name,
    tell_apart,
)

METRIC = "answer_nll"
COLUMN = MetricColumn(METRIC, None, METRIC_LABELS[METRIC])


def learning_rate_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Returns one table per setting with two or more rates: one row per method, one column per rate, answer NLL in it.

    Args:
        records: any runs; those that failed or did not measure answer NLL are ignored.

    Returns:
        An empty list if no setting has two rates.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished" and METRIC in record.metrics:
            groups.setdefault(json.dumps(_shared(record), sort_keys=True), []).append(record)
    several = [groups[key] for key in sorted(groups) if len({_rate(record) for record in groups[key]}) > 1]
    return tell_apart([(_table(group), _shared(group[0])) for group in several])


def _rate(record: RunRecord) -> float:
    return float(record.config["finetune"]["learning_rate"])


def _shared(record: RunRecord) -> dict[str, Any]:
    shared = setting(record)
    finetune = {key: value for key, value in shared["finetune"].items() if key != "learning_rate"}
    return shared | {"finetune": finetune}


def _table(records: list[RunRecord]) -> Table:
    groups = rows_of_seeds(sorted(records, key=row_order))
    rates = sorted({_rate(record) for record in records})
    rows: dict[str, dict[float, list[RunRecord]]] = {}
    for label, runs in zip(row_labels([runs[0] for runs in groups]), groups, strict=True):
        rows.setdefault(label, {})[_rate(runs[0])] = runs
    cells = []
    means: dict[float, list[float]] = {rate: [] for rate in rates}
    for label, by_rate in rows.items():
        values = {rate: _mean_nll(runs) for rate, runs in by_rate.items()}
        texts = [cells_of_seeds(by_rate.get(rate, []), [COLUMN])[0] for rate in rates]
        cells.append([label, *_best_in_bold(texts, [values.get(rate, math.inf) for rate in rates])])
        for rate, value in values.items():
            means[rate].append(value)
    sources = [[run for runs in by_rate.values() for run in runs] for by_rate in rows.values()]
    # Infinity stands for "no mean": only a rate that every method has can be the best for all of them.
    of_all = [statistics.mean(values) if len(values) == len(rows) else math.inf for values in means.values()]
    if len(rows) > 1 and sum(mean < math.inf for mean in of_all) > 1:
        texts = [f"{mean:.3f}" if mean < math.inf else "-" for mean in of_all]
        cells.append(["mean of all", *_best_in_bold(texts, of_all)])
        sources.append([])
    first = records[0]
    return Table(
        f"Learning rates: {setting_name(first)}, {COLUMN.label} ↓",
        ["method", *(f"{rate:g}" for rate in rates)],
        cells,
        [
            f"{first.metrics['num_examples']} rows scored, {first.finetune['steps']} steps of fine-tuning",
            SPREAD_NOTE,
            "bold: the least of a row",
            *caveats(records),
        ],
        sources,
        section="Learning rates",
        heading=f"{plain_setting_name(first)}, {COLUMN.label} ↓",
    )


def _mean_nll(runs: Sequence[RunRecord]) -> float:
    return statistics.mean(value for run in runs if (value := run.metric(METRIC)) is not None)


def _best_in_bold(texts: Sequence[str], values: Sequence[float]) -> list[str]:
    """Marks the smallest value; marks nothing if fewer than two values are finite."""
    if sum(value < math.inf for value in values) < 2:
        return list(texts)
    return [f"**{text}**" if value == min(values) else text for text, value in zip(texts, values, strict=True)]
