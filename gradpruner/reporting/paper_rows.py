"""Places our runs in the rows and columns of a published table.

Settings define each published row and column (`published.py`), and a run belongs where its settings are the same. Rows
and columns are those of the paper, whatever else was run: of the settings that a row or a dataset leaves open, the
table has the one with the most runs, and the runs with others go into an appendix.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.coordinates import coordinates, fits, is_usual, same, scaled
from gradpruner.reporting.labels import METHOD_LABELS, VARIANT_OF, engine_of
from gradpruner.reporting.plain_names import DATASETS
from gradpruner.reporting.published import Coordinate, Published, PublishedRow
from gradpruner.reporting.tables import depth_settings, setting

# Settings that the paper has (Appendix C.2, Eq. 5) where it names none: of settings with equally many runs these win.
PREFERRED = {"merge_rule": "sign_sum", "fraction": 0.01, "merge_count": 3}
# Settings that decide a run's value on an axis besides the one of its name: they differ from column to column.
SETTINGS_OF_AXIS = {"fraction": ("steps",), "sparsity": ("num_pruned_layers", "omission_rate")}


@dataclass(frozen=True)
class PlacedColumn:
    """A column of our table.

    Attributes:
        value: coordinate on the published table's axis: a dataset, a number, an adapter.
        key: setting that all runs of the column share, as JSON; "" where the runs of the whole table share it. Only
            columns of datasets have keys: values of two settings of a dataset are never mixed.
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
        published: the published row that defines it.
        cells: for each column its runs, which differ only in the seed.
        chosen: settings that the published row leaves open and in which other runs of it differ, as `key=value`, with
            the datasets if there are several choices.
    """

    label: str
    published: PublishedRow
    cells: list[list[RunRecord]]
    chosen: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Our runs of one model and kind of fine-tuning in a published table.

    Attributes:
        shared: settings that all runs share.
        columns: columns of the table.
        rows: rows of the table.
        covered: runs of these rows, with those that repeat a run under another name of its setting.
        others: runs that fit a row but for settings that the row does not name, or have no column.
        num_left_out: number of further runs of the table's methods.
        differing: those of `finetune` and `dataset` in which the runs differ from the paper's.
    """

    shared: dict[str, Any]
    columns: list[PlacedColumn]
    rows: list[PlacedRow]
    covered: list[RunRecord]
    others: list[RunRecord]
    num_left_out: int
    differing: tuple[str, ...]

    @property
    def runs(self) -> list[RunRecord]:
        """All runs in the table."""
        return [record for row in self.rows for cell in row.cells for record in cell]

    @property
    def filled(self) -> list[int]:
        """Columns with runs of a pruning method; dense runs stand in every column of a sweep."""
        pruned = [row for row in self.rows if row.published.coordinates["method"] != "dense"]
        return [at for at in range(len(self.columns)) if any(row.cells[at] for row in pruned)]

    @property
    def is_whole(self) -> bool:
        """Whether every row of a pruning method has a run."""
        return all(any(row.cells) for row in self.rows if row.published.coordinates["method"] != "dense")


def placements(published: Published, records: Sequence[RunRecord]) -> list[Placement]:
    """Places runs in a published table, once for every model and setting of ours that has runs for it.

    Models of the paper stand in the tables in which the paper has them. If a model has runs with the paper's kind of
    fine-tuning and dataset, its runs with others stay out.

    Args:
        published: a table or figure.
        records: any runs; failed ones are ignored.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        known = published.rows and published.axis != "quantity"
        if known and record.status == "finished" and record.config["model"]["path"] not in published.elsewhere:
            groups.setdefault(json.dumps(_shared_setting(record, published.axis), sort_keys=True), []).append(record)
    placed = [_place(published, groups[key], json.loads(key)) for key in sorted(groups)]
    # One dataset or test set is a result; one value of a swept setting is only a repetition of another table.
    least = 1 if published.axis in ("dataset", "test") else 2
    # A figure over datasets compares its few rows; without one of them it is only a repetition of another table.
    is_comparison = published.axis == "dataset" and not any(row.values for row in published.rows)
    enough = [each for each in placed if len(each.filled) >= least and (not is_comparison or each.is_whole)]
    like_paper = [_model(each) for each in enough if not each.differing]
    return [each for each in enough if not each.differing or _model(each) not in like_paper]


def _model(placement: Placement) -> str:
    return json.dumps(placement.shared["model"], sort_keys=True)


def _place(published: Published, records: list[RunRecord], shared: dict[str, Any]) -> Placement:
    own = coordinates(records[0])
    axis, block = published.axis, _block(published.rows, own)
    named = [(row, name) for row in block for name in _names(row, records)]
    variants = [
        _variants([each for each in records if each.pruning["method"] == name and is_usual(each, row, axis)], axis)
        for row, name in named
    ]
    picked = [_picked(kinds, axis) for kinds in variants]
    chosen = [[record for runs in own.values() for record in runs] for own in picked]
    columns = _columns(published, block, chosen, may_extend=own["model"] not in published.models)
    rows: list[PlacedRow] = []
    covered: list[RunRecord] = []
    for (row, name), runs, kinds, own_picked in zip(named, chosen, variants, picked, strict=True):
        cells = [_cell(runs, row, column, axis) for column in columns]
        if name != row.coordinates["method"] and not any(cells):
            continue  # a variant of ours, with no run here
        # Two names for one setting, such as a sparsity of 0.4 and 13/32, may have made a run twice.
        covered += [record for cell in cells for record in cell]
        by_seed = [{record.seed: record for record in reversed(cell)} for cell in cells]
        kept = [[seeds[seed] for seed in sorted(seeds)] for seeds in by_seed]
        rows.append(PlacedRow(_label(row, name, own["num_hidden_layers"]), row, kept, _chosen(kinds, own_picked, axis)))
    shown = {id(record) for record in covered}
    fitting = [record for record in records if any(fits(record, row, axis) for row in block)]
    methods = {row.coordinates["method"] for row in block}
    return Placement(
        shared,
        columns,
        rows,
        covered,
        [record for record in fitting if id(record) not in shown],
        sum(coordinates(record)["method"] in methods for record in records) - len(fitting),
        tuple(key for key in ("finetune", "dataset") if block[0].coordinates.get(key, own[key]) != own[key]),
    )


def _names(row: PublishedRow, records: list[RunRecord]) -> list[str]:
    """Returns the method of a published row, and its variants that were run, which get rows of their own beside it."""
    method, ran = str(row.coordinates["method"]), {record.pruning["method"] for record in records}
    return [method, *(name for name, base in VARIANT_OF.items() if base == method and name in ran)]


def _shared_setting(record: RunRecord, axis: str) -> dict[str, Any]:
    """Returns the settings that all runs of one table with this axis share."""
    if axis == "dataset":
        # Each dataset has training settings of its own.
        return {"model": record.config["model"], "mode": record.config["finetune"]["mode"], **engine_of(record)}
    shared = full_setting(record)
    # The axis may be a setting of the dataset, such as `train_fraction`, which then varies within the table.
    return shared | {"dataset": {key: value for key, value in shared["dataset"].items() if key != axis}}


def full_setting(record: RunRecord) -> dict[str, Any]:
    """Returns the setting with the encoder of BERTScore, which may differ between runs of one setting."""
    return setting(record) | {key: record.metrics.get(key) for key in ("bertscore_encoder", "bertscore_layer")}


def _full_key(record: RunRecord) -> str:
    return json.dumps(full_setting(record), sort_keys=True)


def _block(rows: Sequence[PublishedRow], own: dict[str, Any]) -> list[PublishedRow]:
    """Returns the published rows for our model and kind of fine-tuning, or the first ones if the paper has neither."""
    chosen = list(rows)
    for key in ("model", "finetune"):
        known = [row.coordinates.get(key) for row in chosen]
        wanted = own[key] if own[key] in known else known[0]
        chosen = [row for row, value in zip(chosen, known, strict=True) if value == wanted]
    return chosen


def main_runs(records: Sequence[RunRecord], row: PublishedRow, axis: str) -> list[RunRecord]:
    """Returns the runs of a published row that a table shows: one choice of the settings that the row leaves open."""
    name = row.coordinates["method"]
    usual = [each for each in records if each.pruning["method"] == name and is_usual(each, row, axis)]
    variants = _variants(usual, axis)
    return [record for runs in _picked(variants, axis).values() for record in runs]


def _variants(records: list[RunRecord], axis: str) -> list[list[RunRecord]]:
    """Returns the runs of a row by the settings that it leaves open; first those that cover the most of the axis.

    Of settings that cover as much, those with more runs come first, then those that are `PREFERRED`.
    """
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(json.dumps(_open_settings(record, axis), sort_keys=True), []).append(record)

    def rank(key: str) -> tuple[int, int, int, str]:
        own = coordinates(found[key][0])
        covered = {coordinates(record).get(axis) for record in found[key]}
        preferred = sum(own.get(name) == value for name, value in PREFERRED.items())
        return -len(covered), -len(found[key]), -preferred, key

    return [found[key] for key in sorted(found, key=rank)]


def _open_settings(record: RunRecord, axis: str) -> dict[str, Any]:
    """Returns the method's settings that may differ between two runs of one published row and column.

    The repair is left out because `USUAL` fixes it and older records do not have it.
    """
    left_out = ("seed", "repair", "repair_rows", "_target_", axis, *SETTINGS_OF_AXIS.get(axis, ()))
    return {key: value for key, value in depth_settings(record).items() if key not in left_out}


def _picked(variants: list[list[RunRecord]], axis: str) -> dict[str, list[RunRecord]]:
    """Returns the runs of a row that a table shows, by dataset.

    A row has one choice of settings, but for datasets on which that one did not run: methods may have settings that
    depend on the dataset. The columns of a sweep must not differ in anything else, so there nothing takes its place.
    """
    found: dict[str, list[RunRecord]] = {}
    for runs in variants if axis == "dataset" else variants[:1]:
        own: dict[str, list[RunRecord]] = {}
        for record in runs:
            own.setdefault(coordinates(record)["dataset"], []).append(record)
        found = own | found
    return found


def _chosen(variants: list[list[RunRecord]], picked: dict[str, list[RunRecord]], axis: str) -> tuple[str, ...]:
    """Returns in what the settings of a row differ from those of its other variants, by dataset if it has several."""
    settings = [_open_settings(runs[0], axis) for runs in variants]
    differing = {key for own in settings for key in own if any(other.get(key) != own[key] for other in settings)}
    datasets: dict[str, list[str]] = {}
    for name in sorted(picked):
        own = _open_settings(picked[name][0], axis)
        datasets.setdefault(", ".join(f"{key}={own[key]}" for key in own if key in differing), []).append(name)
    if len(datasets) < 2:
        return tuple(each for each in datasets if each)
    return tuple(f"{own} on {', '.join(names)}" for own, names in datasets.items())


def _columns(
    published: Published, block: list[PublishedRow], runs: list[list[RunRecord]], may_extend: bool
) -> list[PlacedColumn]:
    """Returns the published columns; for models that the paper does not have, also the values that only ours have.

    A figure of which the paper prints no values has no published columns, so ours are shown for every model.
    """
    axis = published.axis
    known = list(published.columns)
    may_extend = may_extend or not known
    headers = [f"{axis} {value}" for value in known]
    for own in [coordinates(record) for records in runs for record in records]:
        # Datasets and numbers that only we ran get columns; other names, such as adapters or test sets, do not.
        is_ours = axis == "dataset" or (axis in own and not isinstance(own[axis], str))
        if is_ours and may_extend and not any(same(axis, value, own, block[0]) for value in known):
            known.append(own[axis])
            value = f"{own[axis]:.3g}" if isinstance(own[axis], float) else own[axis]
            steps = own.get("steps") if axis == "fraction" else None
            headers.append(f"{axis} {value}" + (f", {steps} steps" if steps else ""))
    indices = [index if index < len(published.columns) else None for index in range(len(known))]
    if axis == "dataset":
        return [
            PlacedColumn(name, _main_key(str(name), runs), index, DATASETS.get(str(name), str(name)))
            for name, index in zip(known, indices, strict=True)
        ]
    columns = [
        PlacedColumn(value, "", index, header) for value, index, header in zip(known, indices, headers, strict=True)
    ]
    if any(isinstance(value, str) for value in known):
        return columns
    # Our numbers go between the published ones, in the direction in which the paper sorts these.
    falls = len(published.columns) > 1 and known[0] > known[1]  # type: ignore[operator]
    return sorted(columns, key=lambda column: column.value, reverse=falls)


def _main_key(dataset: str, runs: list[list[RunRecord]]) -> str:
    """Returns the setting of a dataset that the most rows have, of these that of the most runs; "" without runs."""
    rows: dict[str, set[int]] = {}
    num_runs: dict[str, int] = {}
    for number, records in enumerate(runs):
        for record in records:
            if coordinates(record)["dataset"] == dataset:
                key = _full_key(record)
                rows.setdefault(key, set()).add(number)
                num_runs[key] = num_runs.get(key, 0) + 1
    return min(rows, key=lambda key: (-len(rows[key]), -num_runs[key], key), default="")


def _label(row: PublishedRow, name: str, num_layers: int) -> str:
    """Returns the display name of a row's method, with the settings that define the row."""
    defined = [
        f"{scaled(value, row, num_layers)} of {num_layers} layers pruned"
        if key == "num_pruned_layers"
        else f"{key}={value}"
        for key, value in row.own.items()
        if key != "method"
    ]
    return ", ".join([METHOD_LABELS.get(name, name), *defined])


def _cell(records: list[RunRecord], row: PublishedRow, column: PlacedColumn, axis: str) -> list[RunRecord]:
    """Returns the runs of a row that stand in a column."""
    found = []
    for record in records:
        own = coordinates(record)
        in_column = not column.key or _full_key(record) == column.key
        # A method without the setting on the axis, such as dense, is the same in every column.
        if in_column and (axis not in own or same(axis, column.value, own, row)):
            found.append(record)
    return found
