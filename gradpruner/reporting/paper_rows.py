"""Places our runs in the rows and columns of a published table.

Settings define each published row and column (`published.py`), and a run belongs where its settings are the same.
Settings that the run's method does not have are not compared, so a dense run stands in every column of a sweep.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METHOD_LABELS, VARIANT_OF
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
# The paper's settings wherever a table does not vary them. The paper does not say which merge rule it uses,
# that of Eq. 5 or of Eq. 6, so runs with either belong.
USUAL = {
    "test": None,
    "density": 0.2,
    "merge_rule": ("sign_sum", "sign_average"),
    "adapter": "lora",
    "repair": "none",
}
# Runs belong even if they differ from the paper's in these. With another fine-tuning or dataset the paper's values are
# not shown (`paper_tables`); for a model of another depth, counts of pruned layers are scaled (`_scaled`).
NOT_MATCHED = ("model", "finetune", "dataset", "num_hidden_layers")
# Further settings that decide a run's value on an axis. They differ from column to column by design, so they must not
# split rows (`_open_settings`).
SETTINGS_OF_AXIS = {
    "fraction": ("steps",),
    "num_pruned_layers": ("sparsity",),
    "sparsity": ("num_pruned_layers", "omission_rate"),
}


@dataclass(frozen=True)
class PlacedColumn:
    """A column of our table.

    Attributes:
        value: coordinate on the published table's axis: a dataset, a number, an adapter.
        key: setting that all runs of the column share, as JSON; "" where the runs of the whole table share it. Only
            columns of datasets have keys: a dataset that we ran in two settings, such as two numbers of training rows,
            has two columns, and their values are never mixed.
        index: position of the column in the published table; None if only our runs have the value.
        header: text above the column.
    """

    value: Coordinate
    key: str
    index: int | None
    header: str


@dataclass(frozen=True)
class PlacedRow:
    """A row of our table.

    Attributes:
        label: text before the row.
        published: the published row that defines it. Several of our rows may share one.
        cells: for each column its runs, which differ only in the seed.
    """

    label: str
    published: PublishedRow
    cells: list[list[RunRecord]]


def place_runs(published: Published, records: Sequence[RunRecord]) -> tuple[list[PlacedColumn], list[PlacedRow], int]:
    """Places runs that may share a table in its rows and columns.

    Args:
        published: a table or figure with rows.
        records: finished runs with the same `shared_setting`.

    Returns:
        Columns, rows, and the number of runs that fit no row although the table has their method.
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
    # By `id`: records hold dicts, so they are not hashable.
    fitting = {id(record) for runs in matched for record in runs}
    num_others = sum(coordinates(record)["method"] in methods and id(record) not in fitting for record in records)
    return columns, rows, num_others


def shared_setting(record: RunRecord, axis: str) -> dict[str, Any]:
    """Returns the settings that all runs of one table with this axis share."""
    if axis == "dataset":
        # Each dataset has training settings of its own; runs that differ in them get columns of their own.
        return {"model": record.config["model"], "mode": record.config["finetune"]["mode"]}
    shared = _full_setting(record)
    # The axis may be a setting of the dataset, such as `train_fraction`, which then varies within the table.
    return shared | {"dataset": {key: value for key, value in shared["dataset"].items() if key != axis}}


def _full_setting(record: RunRecord) -> dict[str, Any]:
    """Returns the setting with the encoder of BERTScore, which may differ between runs of one setting."""
    return setting(record) | {key: record.metrics.get(key) for key in ("bertscore_encoder", "bertscore_layer")}


def _full_key(record: RunRecord) -> str:
    return json.dumps(_full_setting(record), sort_keys=True)


def coordinates(record: RunRecord) -> dict[str, Any]:
    """Returns the settings of a run under the names of the published coordinates, without those its method lacks."""
    config, method = record.config, record.config["method"]
    own = {key: method[key] for key in ("merge_count", "density", "merge_rule", "adapter", "repair") if key in method}
    if method.get("merged_layers"):  # the layers to merge were given one by one instead of by their number
        own["merge_count"] = len(method["merged_layers"])
    num_layers = record.model["num_hidden_layers"]
    if "sparsity" in method or "omission_rate" in method:
        given = method.get("sparsity", method.get("omission_rate"))
        # Counted in the pruned model: the config may have `sparsity=auto`, or a number of layers instead.
        own["num_pruned_layers"] = num_layers - record.pruning["num_hidden_layers"]
        own["sparsity"] = given if isinstance(given, float) else own["num_pruned_layers"] / num_layers
    if "fraction" in method:
        steps = own["steps"] = method["steps"]
        own["fraction"] = method["fraction"]
        if not own["fraction"] and isinstance(steps, int):
            own["fraction"] = steps / record.finetune["steps"]
    return own | {
        "model": config["model"]["path"],
        "finetune": config["finetune"]["mode"],
        "dataset": config["dataset"]["_target_"].rsplit(".", 2)[-2],
        "test": config["dataset"].get("test"),
        "train_fraction": config["dataset"].get("train_fraction") or 1.0,
        "method": VARIANT_OF.get(record.pruning["method"], record.pruning["method"]),
        "num_hidden_layers": num_layers,
    }


def _block(rows: Sequence[PublishedRow], own: dict[str, Any]) -> list[PublishedRow]:
    """Returns the published rows for our model and kind of fine-tuning, or the first ones if the paper has neither."""
    chosen = list(rows)
    for key in ("model", "finetune"):
        known = [row.coordinates.get(key) for row in chosen]
        wanted = own[key] if own[key] in known else known[0]
        chosen = [row for row, value in zip(chosen, known, strict=True) if value == wanted]
    return chosen


def _belongs(record: RunRecord, row: PublishedRow, axis: str) -> bool:
    """Returns whether a run has the settings of a row, and a place on the axis."""
    own = coordinates(record)
    if axis in own and own[axis] is None:  # steps=auto, or not tested on other data
        return False
    wanted = USUAL | row.coordinates
    compared = [key for key in wanted if key in own and key != axis and key not in NOT_MATCHED]
    return all(_same(key, wanted[key], own, row) for key in compared)


def _same(key: str, wanted: Any, own: dict[str, Any], row: PublishedRow) -> bool:
    """Returns whether a run with the coordinates `own` has the value `wanted` of the coordinate `key`."""
    if isinstance(wanted, tuple):
        return bool(own[key] in wanted)
    num_layers = own["num_hidden_layers"]
    if key == "sparsity":
        # Two sparsities that prune the same number of our layers are the same.
        return bool(round(wanted * num_layers) == round(own[key] * num_layers))
    if key == "num_pruned_layers":
        return _scaled(wanted, row, num_layers) == int(own[key])
    return math.isclose(wanted, own[key]) if isinstance(wanted, float) else bool(wanted == own[key])


def _scaled(num_pruned: Any, row: PublishedRow, num_layers: int) -> int:
    """Scales the paper's pruned-layer count to our model's depth, if the row gives the depth of the paper's model."""
    theirs = int(row.coordinates.get("num_hidden_layers", num_layers))
    return round(int(num_pruned) / theirs * num_layers)


def _columns(published: Published, block: list[PublishedRow], matched: list[list[RunRecord]]) -> list[PlacedColumn]:
    """Returns the published columns, and more for values on the axis that only our runs have."""
    axis = published.axis
    runs = [(record, coordinates(record)) for records in matched for record in records]
    known = list(published.columns)
    headers = [f"{axis} {value}" for value in known]
    for _, own in runs:
        # Datasets and numbers that only we ran get columns; other names, such as adapters or test sets, do not.
        may_extend = axis == "dataset" or (axis in own and not isinstance(own[axis], str))
        if may_extend and not any(_same(axis, value, own, block[0]) for value in known):
            known.append(own[axis])
            value = f"{own[axis]:.3g}" if isinstance(own[axis], float) else own[axis]
            headers.append(f"{axis} {value}" + (f", {own['steps']} steps" if axis == "fraction" else ""))
    indices = [index if index < len(published.columns) else None for index in range(len(known))]
    if axis == "dataset":
        columns = []
        for name, index in zip(known, indices, strict=True):
            columns += _dataset_columns(name, index, [record for record, own in runs if own["dataset"] == name])
        return columns
    columns = [
        PlacedColumn(value, "", index, header) for value, index, header in zip(known, indices, headers, strict=True)
    ]
    if any(isinstance(value, str) for value in known):
        return columns
    # Our numbers go between the published ones, in the direction in which the paper sorts these.
    falls = len(published.columns) > 1 and known[0] > known[1]  # type: ignore[operator]
    return sorted(columns, key=lambda column: column.value, reverse=falls)


def _dataset_columns(name: Coordinate, index: int | None, records: list[RunRecord]) -> list[PlacedColumn]:
    """Returns one column per setting of these runs on a dataset, or one without a key if there are none."""
    label = DATASETS.get(str(name), str(name))
    if not records:
        return [PlacedColumn(name, "", index, label)]
    keys = sorted({_full_key(record) for record in records})
    settings = [json.loads(key) for key in keys]
    return [
        PlacedColumn(name, key, index, ", ".join([label, *differences(own, settings)]))
        for key, own in zip(keys, settings, strict=True)
    ]


def _rows(
    row: PublishedRow, records: list[RunRecord], columns: list[PlacedColumn], axis: str, num_layers: int
) -> list[PlacedRow]:
    """Returns one row per choice of the settings that the published row leaves open, or one empty row without runs.

    Runs in one of these rows differ only in the column and the seed, so a cell never averages different settings.
    """
    variants: dict[str, list[RunRecord]] = {}
    for record in records:
        variants.setdefault(json.dumps(_open_settings(record, axis), sort_keys=True), []).append(record)
    keys = sorted(variants)
    if keys:
        labels = _variant_labels([variants[key][0] for key in keys], [json.loads(key) for key in keys])
        runs_by_row = [variants[key] for key in keys]
    else:
        name = str(row.coordinates["method"])
        labels, runs_by_row = [METHOD_LABELS.get(name, name)], [[]]
    defined = [_defined(key, value, row, num_layers) for key, value in row.own.items() if key != "method"]
    return [
        PlacedRow(", ".join([label, *defined]), row, [_cell(runs, row, column, axis) for column in columns])
        for label, runs in zip(labels, runs_by_row, strict=True)
    ]


def _variant_labels(records: list[RunRecord], settings: list[dict[str, Any]]) -> list[str]:
    """Returns one label per record that names only its open settings.

    `row_labels` names the settings in which records differ. It gets copies without the settings on the axis, which the
    headers name. All copies have the same keys, so that no setting counts as one that older records lack.
    """
    names = dict.fromkeys(name for own in settings for name in own)
    methods = [{name: own.get(name) for name in names} for own in settings]
    copies = [
        replace(record, config=record.config | {"method": method})
        for record, method in zip(records, methods, strict=True)
    ]
    return row_labels(copies)


def _open_settings(record: RunRecord, axis: str) -> dict[str, Any]:
    """Returns the method's settings that may differ between two runs of one published row and column.

    The repair is left out because `USUAL` fixes it and older records do not have it. Null values are left out because
    older records lack some of these keys.
    """
    left_out = ("seed", "repair", "repair_rows", axis, *SETTINGS_OF_AXIS.get(axis, ()))
    return {key: value for key, value in record.config["method"].items() if key not in left_out and value is not None}


def _defined(key: str, value: Any, row: PublishedRow, num_layers: int) -> str:
    """Returns a setting that defines a published row as text for the label of our row."""
    if key != "num_pruned_layers":
        return f"{key}={value}"
    return f"{_scaled(value, row, num_layers)} of {num_layers} layers pruned"


def _cell(records: list[RunRecord], row: PublishedRow, column: PlacedColumn, axis: str) -> list[RunRecord]:
    """Returns the runs of a row that stand in a column, one per seed, in the order of seeds."""
    by_seed = {}
    for record in records:
        own = coordinates(record)
        if column.key and _full_key(record) != column.key:
            continue
        # A method without the setting on the axis, such as dense, is the same in every column.
        if axis not in own or _same(axis, column.value, own, row):
            by_seed[record.seed] = record
    return [by_seed[seed] for seed in sorted(by_seed)]
