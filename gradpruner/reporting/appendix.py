"""Runs of the paper's methods with settings that its tables do not vary, by model and kind of fine-tuning.

Training rows, settings of the importance run, adapters and densities make rows and columns here, so that they need none
in the paper's tables.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from gradpruner.record import RunRecord
from gradpruner.reporting.cells import value_of
from gradpruner.reporting.comparing import SPREAD_NOTE
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.differing import differences
from gradpruner.reporting.labels import METRIC_LABELS, describe_origins, engine_in_title, engine_of
from gradpruner.reporting.measures import paper_metrics
from gradpruner.reporting.paper_rows import full_setting
from gradpruner.reporting.paper_tables import other_runs
from gradpruner.reporting.plain_names import DATASETS, MODES
from gradpruner.reporting.published import Published
from gradpruner.reporting.tables import Table, depth_settings, row_labels, row_order, tell_apart


def appendix_tables(published: Sequence[Published], records: Sequence[RunRecord]) -> list[Table]:
    """Returns tables of the runs that would stand in one of these tables but for their settings.

    Args:
        published: the paper's tables that are shown.
        records: the runs that they were made from.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in other_runs(published, records):
        groups.setdefault(_shared(record), []).append(record)
    tables = []
    for key in sorted(groups):
        known = [record for record in records if record.status == "finished" and _shared(record) == key]
        tables += [(table, json.loads(key)) for table in _tables(groups[key], known)]
    return tell_apart(tables)


def _shared(record: RunRecord) -> str:
    shared = {"model": record.config["model"], "mode": record.config["finetune"]["mode"], **engine_of(record)}
    return json.dumps(shared, sort_keys=True)


def _tables(runs: list[RunRecord], known: list[RunRecord]) -> list[Table]:
    """Returns tables of score and answer NLL.

    Args:
        runs: runs to show.
        known: all runs of the model and kind of fine-tuning, for the names of settings.
    """
    ordered = sorted(runs, key=row_order)
    rows: dict[str, list[RunRecord]] = {}
    for record in ordered:
        key = json.dumps([record.pruning["method"], depth_settings(record)], sort_keys=True)
        rows.setdefault(key, []).append(record)
    firsts = [group[0] for group in rows.values()]
    # Named is in what they differ from the runs in the paper's tables, too.
    labels = row_labels([*firsts, *known])[: len(firsts)]
    columns: dict[tuple[str, str], list[RunRecord]] = {}
    for record in ordered:
        columns.setdefault(_column(record), []).append(record)
    order = list(DATASETS)
    places = sorted(columns, key=lambda own: (order.index(own[0]) if own[0] in order else len(order), own))
    headers = [_header(name, key, known) for name, key in places]
    scores = [
        next((each for each in paper_metrics(name) if each in columns[name, key][0].metrics), "accuracy")
        for name, key in places
    ]
    first = ordered[0]
    tables = []
    for metrics, measured in ((scores, ""), (["answer_nll"] * len(places), ", answer NLL")):
        cells = []
        for label, group in zip(labels, rows.values(), strict=True):
            values = []
            for place, metric in zip(places, metrics, strict=True):
                by_seed = {record.seed: record for record in group if _column(record) == place}
                values.append(value_of([by_seed[seed] for seed in sorted(by_seed)], metric, None, False).text(False))
            cells.append([label, *values])
        if all(value == "-" for row in cells for value in row[1:]):
            continue
        notes = ["runs that are in no table above, because the paper does not vary their settings there", SPREAD_NOTE]
        if not measured:
            notes += [f"{header}: {METRIC_LABELS[metric]}" for header, metric in zip(headers, metrics, strict=True)]
            notes += describe_origins([record.metrics for record in ordered])
        engine = engine_in_title(first)
        mode = first.config["finetune"]["mode"]
        title = f"Other settings: {first.model['name']}, {mode}{engine}{measured}"
        heading = f"{first.model['name']}, {MODES.get(mode, mode)}{engine}"
        table = Table(title, ["method", *headers], cells, notes, list(rows.values()), "Other settings", heading)
        tables.append(replace(table, aspect=measured.removeprefix(", ")))
    return tables


def _column(record: RunRecord) -> tuple[str, str]:
    """Returns dataset and setting of a run: each pair is a column."""
    return str(coordinates(record)["dataset"]), json.dumps(full_setting(record), sort_keys=True)


def _header(name: str, key: str, known: list[RunRecord]) -> str:
    """Returns a column's name: the dataset, and the settings in which our runs on it differ."""
    settings = [
        json.loads(other) for dataset, other in sorted({_column(record) for record in known}) if dataset == name
    ]
    return ", ".join([DATASETS.get(name, name), *differences(json.loads(key), settings)])
