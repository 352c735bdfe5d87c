"""Importance runs side by side: the layers that each prunes, how stable that choice is, and the accuracy after it."""

import json
from collections.abc import Sequence

from gradpruner.plan import number_runs
from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import SPREAD_NOTE
from gradpruner.reporting.labels import metric_columns
from gradpruner.reporting.tables import (
    Table,
    cells_of_seeds,
    mean_or_dash,
    plain_setting_name,
    row_labels,
    rows_of_seeds,
    setting,
    setting_name,
    tell_apart,
)

HEADERS = ["importance run", "layers pruned", "halves", "half-way", "near the cut", "top steps"]


def importance_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Returns one table per setting and number of layers kept, one row per way to find the importance.

    Args:
        records: any runs; those that failed or did not rank layers by gradients are ignored.

    Returns:
        An empty list if no run fits.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished" and record.pruning["report"].get("step_importance"):
            key = [setting(record), record.pruning["num_hidden_layers"]]
            groups.setdefault(json.dumps(key, sort_keys=True), []).append(record)
    return tell_apart([(_table(groups[key]), setting(groups[key][0])) for key in sorted(groups)])


def _table(records: list[RunRecord]) -> Table:
    columns = metric_columns([record.metrics for record in records])
    rows = rows_of_seeds(records)
    labels = row_labels([runs[0] for runs in rows])
    first = records[0]
    layers = f"{first.pruning['num_hidden_layers']} of {first.model['num_hidden_layers']} layers kept"
    return Table(
        f"Importance runs: {setting_name(first)}, {layers}",
        [*HEADERS, *(column.label for column in columns), "NLL before"],
        [
            [
                label,
                *_found(group),
                *cells_of_seeds(group, columns),
                mean_or_dash([record.metrics_before.get("answer_nll") for record in group], 2),
            ]
            for label, group in zip(labels, rows, strict=True)
        ],
        [
            "halves: share of pruned layers that the first and the second half of the steps have in common; half-way: "
            "that of the first half and all; near the cut: layers that resampled steps prune sometimes; top steps: "
            "share of gradient energy in the strongest tenth of the steps; means over seeds, but layers of the first",
            SPREAD_NOTE,
        ],
        rows,
        section="Importance runs",
        heading=f"{plain_setting_name(first)}, {layers}",
    )


def _found(group: list[RunRecord]) -> list[str]:
    reports = [record.pruning["report"] for record in group]
    prefixes = [report["prefix_overlap"] for report in reports]
    halfway = [overlaps[(len(overlaps) - 1) // 2] for overlaps in prefixes]
    return [
        number_runs(group[0].pruning["pruned_layers"]),
        mean_or_dash([report["halves_overlap"] for report in reports], 2),
        mean_or_dash(halfway, 2),
        # Older records lack `undecided_layers`.
        mean_or_dash([len(report["undecided_layers"]) for report in reports if "undecided_layers" in report], 1),
        mean_or_dash([report["top_step_share"] for report in reports], 2),
    ]
