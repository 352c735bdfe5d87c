"""Which of our runs stand in which row and column of a published table.

A row or column says by which settings it is defined (`published.py`). A run belongs there if it has the same; a setting
that its method does not have cannot tell it apart, so a dense run stands in every column of a sweep.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METHODS
from gradpruner.reporting.published import Coordinate, Published, PublishedRow
from gradpruner.reporting.tables import differences, row_labels, setting

DATASETS = {
    "pubmedqa": "PubMedQA",
    "medmcqa": "MedMCQA",
    "billsum": "BillSum",
    "fingpt": "FinGPT",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-Easy",
    "piqa": "PIQA",
}
# What the paper does wherever a table does not vary it, and how it leaves the merge rule open (Eq. 5 or 6).
USUAL = {
    "test": None,
    "density": 0.2,
    "merge_rule": ("sign_sum", "sign_average"),
    "adapter": "lora",
    "repair": "none",
}
# Ours may differ from the paper's here; then its values are not shown. Layers are counted in proportion.
NOT_MATCHED = ("model", "finetune", "dataset", "num_hidden_layers")
# By which settings of a method a run gets its value on an axis, where they are not just of that name.
SETTINGS_OF_AXIS = {
    "fraction": ("steps",),
    "num_pruned_layers": ("sparsity",),
    "sparsity": ("num_pruned_layers", "omission_rate"),
}


@dataclass(frozen=True)
class Column:
    """A column: its runs share `key`; `index` is its place in the published table, None if it is ours alone."""

    value: Coordinate
    key: str
    index: int | None
    header: str


@dataclass(frozen=True)
class Row:
    """A row: the runs of each column, one a seed."""

    label: str
    published: PublishedRow
    cells: list[list[RunRecord]]


def place_runs(published: Published, records: Sequence[RunRecord]) -> tuple[list[Column], list[Row], int]:
    """Places runs that may share a table in its rows and columns.

    Args:
        published: a table or figure with rows.
        records: finished runs with the same `shared_setting`.

    Returns:
        Columns, rows, and how many runs of the table's methods have settings for which it has no row.
    """
    own = coordinates(records[0])
    block = _block(published.rows, own)
    matched = [[record for record in records if _belongs(record, row, published.axis)] for row in block]
    columns = _columns(published, block, matched)
    rows = [
        placed
        for row, runs in zip(block, matched, strict=True)
        for placed in _rows(row, runs, columns, published.axis, own["num_hidden_layers"])
    ]
    methods = {row.coordinates["method"] for row in block}
    fitting = {id(record) for runs in matched for record in runs}
    others = [one for one in records if one.pruning["method"] in methods and id(one) not in fitting]
    return columns, rows, len(others)


def shared_setting(record: RunRecord, axis: str) -> dict[str, Any]:
    """What the runs of one table share."""
    if axis == "dataset":
        return {"model": record.config["model"], "mode": record.config["finetune"]["mode"]}
    shared = _full_setting(record)
    return shared | {"dataset": {key: value for key, value in shared["dataset"].items() if key != axis}}


def _full_setting(record: RunRecord) -> dict[str, Any]:
    """The setting, and what can differ in how similarity was measured though the setting is the same."""
    return setting(record) | {key: record.metrics.get(key) for key in ("bertscore_encoder", "bertscore_layer")}


def coordinates(record: RunRecord) -> dict[str, Any]:
    """Where a run stands, under the names of the published coordinates; only settings that its method has."""
    config, method = record.config, record.config["method"]
    own = {key: method[key] for key in ("merge_count", "density", "merge_rule", "adapter", "repair") if key in method}
    if method.get("merged_layers"):
        own["merge_count"] = len(method["merged_layers"])
    num_layers = record.model["num_hidden_layers"]
    if "sparsity" in method or "omission_rate" in method:
        given = method.get("sparsity", method.get("omission_rate"))
        own["num_pruned_layers"] = num_layers - record.pruning["num_hidden_layers"]
        own["sparsity"] = given if isinstance(given, float) else own["num_pruned_layers"] / num_layers
    if "fraction" in method:
        steps = own["steps"] = method["steps"]
        own["fraction"] = method["fraction"] or (steps / record.finetune["steps"] if isinstance(steps, int) else None)
    return own | {
        "model": config["model"]["path"],
        "finetune": config["finetune"]["mode"],
        "dataset": config["dataset"]["_target_"].rsplit(".", 2)[-2],
        "test": config["dataset"].get("test"),
        "train_fraction": config["dataset"].get("train_fraction") or 1.0,
        "method": record.pruning["method"],
        "num_hidden_layers": num_layers,
    }


def _block(rows: Sequence[PublishedRow], own: dict[str, Any]) -> list[PublishedRow]:
    """The published rows that are nearest to ours: our model and kind of fine-tuning, or else the first ones."""
    chosen = list(rows)
    for key in ("model", "finetune"):
        known = [row.coordinates.get(key) for row in chosen]
        wanted = own[key] if own[key] in known else known[0]
        chosen = [row for row, value in zip(chosen, known, strict=True) if value == wanted]
    return chosen


def _belongs(record: RunRecord, row: PublishedRow, axis: str) -> bool:
    """Whether a run has the settings of a row, and a place on the axis."""
    own = coordinates(record)
    if axis in own and own[axis] is None:  # steps=auto, or not tested on other data
        return False
    wanted = {key: value for key, value in (USUAL | row.coordinates).items() if key not in (axis, *NOT_MATCHED)}
    return all(_same(key, value, own, row) for key, value in wanted.items() if key in own)


def _same(key: str, wanted: Any, own: dict[str, Any], row: PublishedRow) -> bool:
    if isinstance(wanted, tuple):
        return bool(own[key] in wanted)
    num_layers = own["num_hidden_layers"]
    if key == "sparsity":
        return bool(round(wanted * num_layers) == round(own[key] * num_layers))
    if key == "num_pruned_layers":
        return _scaled(wanted, row, num_layers) == int(own[key])
    return math.isclose(wanted, own[key]) if isinstance(wanted, float) else bool(wanted == own[key])


def _scaled(num_pruned: Any, row: PublishedRow, num_layers: int) -> int:
    """As many layers of our model as the paper prunes of its own, where it prunes one of its own."""
    theirs = int(row.coordinates.get("num_hidden_layers", num_layers))
    return round(int(num_pruned) / theirs * num_layers)


def _columns(published: Published, block: list[PublishedRow], matched: list[list[RunRecord]]) -> list[Column]:
    """The published columns, and further ones for values that ours alone have; a dataset has one for each setting."""
    axis = published.axis
    runs = [(record, coordinates(record)) for records in matched for record in records]
    known = list(published.columns)
    headers = [f"{axis} {value}" for value in known]
    for _, own in runs:
        is_ours = axis == "dataset" or (axis in own and not isinstance(own[axis], str))
        if is_ours and not any(_same(axis, value, own, block[0]) for value in known):
            known.append(own[axis])
            value = f"{own[axis]:.3g}" if isinstance(own[axis], float) else own[axis]
            headers.append(f"{axis} {value}" + (f", {own['steps']} steps" if axis == "fraction" else ""))
    indices = [index if index < len(published.columns) else None for index in range(len(known))]
    if axis == "dataset":
        return [column for pair in zip(known, indices, strict=True) for column in _dataset_columns(*pair, runs)]
    columns = [Column(known[at], "", indices[at], headers[at]) for at in range(len(known))]
    if any(isinstance(value, str) for value in known):
        return columns
    falls = len(published.columns) > 1 and known[0] > known[1]  # type: ignore[operator]
    return sorted(columns, key=lambda column: column.value, reverse=falls)


def _dataset_columns(name: Coordinate, index: int | None, runs: list[tuple[RunRecord, dict[str, Any]]]) -> list[Column]:
    """One for each setting in which there are runs on a dataset, or one that is empty."""
    keys = sorted({json.dumps(_full_setting(record), sort_keys=True) for record, own in runs if own["dataset"] == name})
    settings = [json.loads(key) for key in keys]
    return [
        Column(name, key, index, ", ".join([DATASETS.get(str(name), str(name)), *differences(each, settings)]))
        for key, each in zip(keys or [""], settings or [{}], strict=True)
    ]


def _rows(row: PublishedRow, records: list[RunRecord], columns: list[Column], axis: str, num_layers: int) -> list[Row]:
    """A row for each choice of the settings that the table leaves open; one without runs if there are none."""
    variants: dict[str, list[RunRecord]] = {}
    for record in records:
        variants.setdefault(json.dumps(_open_settings(record, axis), sort_keys=True), []).append(record)
    keys = sorted(variants)
    settings = [json.loads(key) for key in keys]
    # As records, because `row_labels` says in what records differ.
    alone = [
        replace(
            variants[key][0],
            config=variants[key][0].config | {"method": {one: own.get(one) for each in settings for one in each}},
        )
        for key, own in zip(keys, settings, strict=True)
    ]
    name = str(row.coordinates["method"])
    defined = [_defined(key, value, row, num_layers) for key, value in row.own.items() if key != "method"]
    labels = row_labels(alone) if alone else [METHODS.get(name, name)]
    return [
        Row(", ".join([label, *defined]), row, [_cell(variants.get(key, []), row, column, axis) for column in columns])
        for key, label in zip(keys or [""], labels, strict=True)
    ]


def _open_settings(record: RunRecord, axis: str) -> dict[str, Any]:
    left_out = ("seed", "repair", "repair_rows", axis, *SETTINGS_OF_AXIS.get(axis, ()))
    return {key: value for key, value in record.config["method"].items() if key not in left_out and value is not None}


def _defined(key: str, value: Any, row: PublishedRow, num_layers: int) -> str:
    if key != "num_pruned_layers":
        return f"{key}={value}"
    return f"{_scaled(value, row, num_layers)} of {num_layers} layers pruned"


def _cell(records: list[RunRecord], row: PublishedRow, column: Column, axis: str) -> list[RunRecord]:
    """The runs of a row that stand in a column, one a seed."""
    by_seed = {}
    for record in records:
        own = coordinates(record)
        if column.key and json.dumps(_full_setting(record), sort_keys=True) != column.key:
            continue
        if axis not in own or _same(axis, column.value, own, row):
            by_seed[record.seed] = record
    return [by_seed[seed] for seed in sorted(by_seed)]
