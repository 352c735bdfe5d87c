"""The paper's tables with our values: the same rows and columns, the paper's value in square brackets beside ours."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METRIC_LABELS, caveats, describe_origins
from gradpruner.reporting.paper_rows import PlacedColumn, PlacedRow, coordinates, place_runs, shared_setting
from gradpruner.reporting.published import Coordinate, Published, PublishedRow
from gradpruner.reporting.tables import Table, tell_apart

# Datasets that the paper measures by similarity (Section 4.1); the others by accuracy. Runs that did not generate text
# have accuracy on these, too.
BY_SIMILARITY = ("pubmedqa", "medmcqa", "billsum", "fingpt")
SMALLER_IS_BETTER = ("answer_nll",)
DASH = "-"


def paper_table(published: Published, records: Sequence[RunRecord]) -> list[Table]:
    """Tables like a published one, for every model and setting of ours that has runs for it.

    Runs with another dataset or kind of fine-tuning than the paper's get tables of their own, without the paper's
    values. Each setting gets a table of accuracy or similarity, and one of answer NLL, which shows small differences
    earlier. A table over values of a setting is made only if runs of a pruning method have two or more of them.

    Args:
        published: a table or figure with rows.
        records: any runs; failed ones are ignored.

    Returns:
        An empty list if no run fits.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished" and published.rows and published.axis != "quantity":
            groups.setdefault(json.dumps(shared_setting(record, published.axis), sort_keys=True), []).append(record)
    made = [table for key in sorted(groups) for table in _tables(published, groups[key], json.loads(key))]
    return tell_apart(made)


def _tables(
    published: Published, records: list[RunRecord], shared: dict[str, Any]
) -> list[tuple[Table, dict[str, Any]]]:
    """Returns the tables of one setting, each with the settings that tell it apart from other tables of one title."""
    columns, rows, num_others = place_runs(published, records)
    pruned = [row for row in rows if _competes(row)]
    # Dense runs stand in every column of a sweep, so only pruned ones show that a column has a result.
    filled = [at for at in range(len(columns)) if any(row.cells[at] for row in pruned)]
    # One dataset or test set is a result; one value of a swept setting is only a repetition of another table.
    least = 1 if published.axis in ("dataset", "test") else 2
    if len(filled) < least:
        return []
    tables = []
    scores = [_score(column, rows, at) for at, column in enumerate(columns)]
    for metrics in (scores, ["answer_nll"] * len(columns)):
        if any(_values(row.cells[at], metrics[at]) for row in pruned for at in filled):
            tables.append((_table(published, columns, rows, metrics, num_others), shared))
    return tables


def _score(column: PlacedColumn, rows: list[PlacedRow], at: int) -> str:
    """Returns the paper's metric for the dataset of column number `at`, or the other metric if no run has that one."""
    runs = [record for row in rows for record in row.cells[at]]
    tested = column.value
    if runs:
        # The metric belongs to the test rows, which may be of another dataset than the training rows.
        own = coordinates(runs[0])
        tested = own["test"] or own["dataset"]
    names = ("similarity", "accuracy") if tested in BY_SIMILARITY else ("accuracy", "similarity")
    return next((name for name in names if any(name in record.metrics for record in runs)), names[0])


def _values(cell: list[RunRecord], metric: str) -> dict[int, float]:
    """Returns the values of a cell's runs by seed."""
    return {record.seed: value for record in cell if (value := record.metric(metric)) is not None}


def _spread(cell: list[RunRecord], metric: str) -> float:
    """Returns the standard deviation over the seeds; with one seed, its standard error over test rows."""
    measured = [record for record in cell if metric in record.metrics]
    if len(measured) > 1:
        return statistics.stdev(_values(measured, metric).values())
    return measured[0].stderr(metric)


@dataclass(frozen=True)
class _Value:
    """Content of a cell.

    Attributes:
        mean: our mean over seeds; None without runs.
        spread: standard deviation over seeds, or standard error of one seed.
        num_seeds: number of seeds.
        paper: the paper's value; None if there is none, or if it is not comparable.
    """

    mean: float | None = None
    spread: float = 0.0
    num_seeds: int = 0
    paper: Decimal | None = None

    def text(self, best: float | None) -> str:
        ours = DASH
        if self.mean is not None:
            seeds = f" (n={self.num_seeds})" if self.num_seeds > 1 else ""
            ours = f"{self.mean:.3f} ±{self.spread:.3f}{seeds}"
            ours = f"**{ours}**" if self.mean == best else ours
        return ours if self.paper is None else f"{ours} [{self.paper}]"


def _table(
    published: Published, columns: list[PlacedColumn], rows: list[PlacedRow], metrics: list[str], num_others: int
) -> Table:
    """Returns a table; `metrics` has one metric per column."""
    runs = [record for row in rows for cell in row.cells for record in cell]
    own = coordinates(runs[0])
    is_score = not set(metrics) <= set(SMALLER_IS_BETTER)
    # The paper has no likelihoods, and its values hold for its own dataset and kind of fine-tuning only.
    first = rows[0].published
    differing = [key for key in ("finetune", "dataset") if first.coordinates.get(key, own[key]) != own[key]]
    has_paper = is_score and not differing
    values = [
        [_value(row, at, column.index if has_paper else None, metrics[at]) for at, column in enumerate(columns)]
        for row in rows
    ]
    headers = [f"{column.header} {_arrow(metric)}" for column, metric in zip(columns, metrics, strict=True)]
    common = _common(columns, values) if published.axis == "dataset" else []
    if len(common) > 1:
        for row, own_values in zip(rows, values, strict=True):
            own_values.append(_average(row, own_values, common, columns, metrics, has_paper))
        headers.append(f"average of {len(common)} {_arrow(metrics[common[0]])}")
    bests = [_best(rows, [row_values[at] for row_values in values], header) for at, header in enumerate(headers)]
    texts = [_texts(row, row_values, bests) for row, row_values in zip(rows, values, strict=True)]
    notes = [
        *_scale(columns, rows, metrics),
        "± is the standard deviation over the seeds where their number n is given, else the standard error over "
        "test rows; ** marks the best of ours but dense",
    ]
    if len(common) > 1:
        notes.append(f"average over {', '.join(columns[at].header for at in common)}")
    if is_score:
        notes += describe_origins([record.metrics for record in runs])
    notes += caveats(runs)
    if num_others:
        notes.append(f"left out: {num_others} runs of these methods with other settings")
    if is_score:
        notes += _about_paper(published, first, differing)
    measured = "" if is_score else ", answer NLL"
    place = "" if published.axis == "dataset" else f" on {own['dataset']}"
    parameters = f"{runs[0].model['num_parameters'] / 1e6:.1f} M parameters"
    name = f"{runs[0].model['name']} with {parameters}{place}, {own['finetune']}"
    return Table(f"{published.label}: {published.title}; {name}{measured}", ["method", *headers], texts, notes)


def _texts(row: PlacedRow, values: list[_Value], bests: list[float | None]) -> list[str]:
    marked = bests if _competes(row) else [None] * len(bests)
    return [row.label, *(value.text(best) for value, best in zip(values, marked, strict=True))]


def _value(row: PlacedRow, at: int, index: int | None, metric: str) -> _Value:
    """Returns the content of a row's cell `at`; `index` is its position among the published values, if it has one."""
    paper = row.published.values[index] if index is not None and row.published.values else None
    values = _values(row.cells[at], metric)
    if not values:
        return _Value(paper=paper)
    return _Value(statistics.mean(values.values()), _spread(row.cells[at], metric), len(values), paper)


def _common(columns: list[PlacedColumn], values: list[list[_Value]]) -> list[int]:
    """Returns the columns to average over: those in which every row with runs has a value, one per dataset.

    Averages of different rows are then over the same datasets, and no dataset counts twice.
    """
    ran = [row for row in values if any(value.mean is not None for value in row)]
    full = [at for at in range(len(columns)) if all(row[at].mean is not None for row in ran)]
    first_by_dataset: dict[Coordinate, int] = {}
    for at in full:
        first_by_dataset.setdefault(columns[at].value, at)
    return list(first_by_dataset.values())


def _average(
    row: PlacedRow,
    values: list[_Value],
    common: list[int],
    columns: list[PlacedColumn],
    metrics: list[str],
    has_paper: bool,
) -> _Value:
    """Returns the average of a row over the common columns."""
    paper = _paper_average(row.published, [columns[at].index for at in common]) if has_paper else None
    means = [mean for at in common if (mean := values[at].mean) is not None]
    if not means:
        return _Value(paper=paper)
    by_seed = [_values(row.cells[at], metrics[at]) for at in common]
    seeds = sorted(set.intersection(*(set(each) for each in by_seed)))
    if len(seeds) > 1:
        # Average seed by seed: values of one seed may move together, and the deviation of the averages shows that.
        averages = [statistics.mean(each[seed] for each in by_seed) for seed in seeds]
        return _Value(statistics.mean(averages), statistics.stdev(averages), len(averages), paper)
    # No two seeds have all columns. Take the columns as independent: the spread of their mean is the root of the sum of
    # their squared spreads, over their number.
    spread = math.hypot(*(values[at].spread for at in common)) / len(common)
    return _Value(statistics.mean(means), spread, 1, paper)


def _paper_average(published: PublishedRow, indices: list[int | None]) -> Decimal | None:
    """Returns the paper's average over these of its columns; None if one of ours is not in the paper.

    An average over all columns is the printed one, even if it does not follow from the printed values.
    """
    known = [index for index in indices if index is not None]
    if not published.values or len(known) < len(indices):
        return None
    if len(known) == len(published.values) and published.average is not None:
        return published.average
    return round(sum((published.values[index] for index in known), Decimal()) / len(known), 3)


def _competes(row: PlacedRow) -> bool:
    """Returns whether a row may hold the best value of a column: dense is the reference, not a competitor."""
    return row.published.coordinates["method"] != "dense"


def _best(rows: list[PlacedRow], values: list[_Value], header: str) -> float | None:
    """Returns the best mean of a column's competing rows; None if fewer than two have one."""
    known = [value.mean for row, value in zip(rows, values, strict=True) if _competes(row) and value.mean is not None]
    if len(known) < 2:
        return None
    return min(known) if header.endswith("↓") else max(known)


def _arrow(metric: str) -> str:
    return "↓" if metric in SMALLER_IS_BETTER else "↑"


def _scale(columns: list[PlacedColumn], rows: list[PlacedRow], metrics: list[str]) -> list[str]:
    """Returns notes on what our runs were made with: one per column, or one for all if they are the same."""
    notes = {}
    for at, column in enumerate(columns):
        runs = [record for row in rows for record in row.cells[at]]
        if not runs:
            continue
        own = coordinates(runs[0])
        samples = runs[0].config["dataset"].get("max_train_samples")
        steps = sorted({record.finetune["steps"] for record in runs})
        notes[column.header] = (
            f"{METRIC_LABELS[metrics[at]]}, {own['dataset']}, {samples or 'all'} training rows, "
            f"{' or '.join(map(str, steps))} steps of fine-tuning, {runs[0].metrics['num_examples']} test rows"
        )
    if len(set(notes.values())) == 1:
        notes = {"ours": next(iter(notes.values()))}
    sparsity = rows[0].published.shared.get("sparsity")
    num_layers = next(record for row in rows for cell in row.cells for record in cell).model["num_hidden_layers"]
    if isinstance(sparsity, float):
        pruned = f"{round(sparsity * num_layers)} of {num_layers} layers"
        notes["sparsity"] = f"{sparsity:g}, which is {pruned} pruned, or as many parameters in narrower ones"
    return [f"{name}: {note}" for name, note in notes.items()]


def _about_paper(published: Published, row: PublishedRow, differing: list[str]) -> list[str]:
    """Returns notes on whose values are in brackets, or why there are none, and the notes of the published table."""
    model = str(row.coordinates.get("model", "")).rsplit("/", 1)[-1]
    where = ", ".join([model, *(str(row.coordinates[key]) for key in differing)])
    if not row.values:
        values = "the paper has this as a picture, without values"
    elif differing:
        values = f"the paper has this for {where}, so its values are not beside ours"
    else:
        values = f"[]: the paper's, with {model}"
    return [values, *(f"the paper: {note}" for note in published.notes)]
