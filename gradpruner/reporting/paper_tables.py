"""The paper's tables with our values: the same rows and columns, the published value in square brackets beside ours."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METRICS, describe_origins
from gradpruner.reporting.paper_rows import Column, Row, coordinates, place_runs, shared_setting
from gradpruner.reporting.published import Published, PublishedRow
from gradpruner.reporting.tables import Table, tell_apart

BY_SIMILARITY = ("pubmedqa", "medmcqa", "billsum", "fingpt")  # Section 4.1; where a record has it
SMALLER_IS_BETTER = ("answer_nll",)
DASH = "-"


def paper_table(published: Published, records: Sequence[RunRecord]) -> list[Table]:
    """Tables like a published one, for every model and setting of ours that has runs for it.

    Runs with other data or another kind of fine-tuning than the paper's have tables of their own, without its values.
    There is a table for accuracy or similarity, and one for the likelihood of the answer, which moves earlier. A table
    over values of a setting needs a pruning method's runs with two of them.

    Args:
        published: a table or figure with rows.
        records: of any runs; those that did not finish are not looked at.

    Returns:
        No tables if no run fits.
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
    columns, rows, num_others = place_runs(published, records)
    pruned = [row for row in rows if _competes(row)]
    filled = [at for at in range(len(columns)) if any(row.cells[at] for row in pruned)]
    if len(filled) < (1 if published.axis in ("dataset", "test") else 2):
        return []
    tables = []
    for metric in ("", "answer_nll"):
        names = [metric or _score(column, rows, at) for at, column in enumerate(columns)]
        if any(_values(row.cells[at], names[at]) for row in pruned for at in filled):
            tables.append((_table(published, columns, rows, names, num_others), shared))
    return tables


def _score(column: Column, rows: list[Row], at: int) -> str:
    """The paper's measure of a column's dataset, or the other one if no run has it."""
    runs = [record for row in rows for record in row.cells[at]]
    tested = [own["test"] or own["dataset"] for own in map(coordinates, runs)] or [column.value]
    names = ("similarity", "accuracy") if tested[0] in BY_SIMILARITY else ("accuracy", "similarity")
    return next((name for name in names if any(name in record.metrics for record in runs)), names[0])


def _values(cell: list[RunRecord], metric: str) -> dict[int, float]:
    """By seed."""
    return {record.seed: record.metrics[metric] for record in cell if metric in record.metrics}


def _spread(cell: list[RunRecord], metric: str) -> float:
    values = list(_values(cell, metric).values())
    errors = [record.metrics[f"{metric}_stderr"] for record in cell if metric in record.metrics]
    return statistics.stdev(values) if len(values) > 1 else float(errors[0])


@dataclass(frozen=True)
class _Value:
    """What is in a cell: ours with its spread over `num_seeds`, and the paper's."""

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


def _table(published: Published, columns: list[Column], rows: list[Row], metrics: list[str], num_others: int) -> Table:
    runs = [record for row in rows for cell in row.cells for record in cell]
    own = coordinates(runs[0])
    # The paper has no likelihoods, and its values belong to its own data and kind of fine-tuning.
    differing = [key for key in ("finetune", "dataset") if rows[0].published.coordinates.get(key, own[key]) != own[key]]
    is_score = not set(metrics) <= set(SMALLER_IS_BETTER)
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
    bests = [
        _best([row[at].mean for row, of in zip(values, rows, strict=True) if _competes(of)], header)
        for at, header in enumerate(headers)
    ]
    cells = [
        [value.text(best if _competes(of) else None) for value, best in zip(row, bests, strict=True)]
        for row, of in zip(values, rows, strict=True)
    ]
    measured = "" if is_score else ", answer NLL"
    place = "" if published.axis == "dataset" else f" on {own['dataset']}"
    parameters = f"{runs[0].model['num_parameters'] / 1e6:.1f} M parameters"
    name = f"{runs[0].model['name']} with {parameters}{place}, {own['finetune']}"
    return Table(
        f"{published.label}: {published.title}; {name}{measured}",
        ["method", *headers],
        [[row.label, *texts] for row, texts in zip(rows, cells, strict=True)],
        [
            *_scale(columns, rows, metrics),
            "± is the standard deviation over the seeds where their number n is given, else the standard error over "
            "test rows; ** marks the best of ours but dense",
            *([f"average over {', '.join(columns[at].header for at in common)}"] if len(common) > 1 else []),
            *(describe_origins([record.metrics for record in runs]) if is_score else []),
            *([f"left out: {num_others} runs of these methods with other settings"] if num_others else []),
            *(_about_paper(published, rows[0].published, differing) if is_score else []),
        ],
    )


def _value(row: Row, at: int, index: int | None, metric: str) -> _Value:
    paper = row.published.values[index] if index is not None and row.published.values else None
    values = _values(row.cells[at], metric)
    if not values:
        return _Value(paper=paper)
    return _Value(statistics.mean(values.values()), _spread(row.cells[at], metric), len(values), paper)


def _common(columns: list[Column], values: list[list[_Value]]) -> list[int]:
    """The columns that all rows with runs have, one a dataset."""
    ran = [row for row in values if any(value.mean is not None for value in row)]
    full = [at for at in range(len(columns)) if all(row[at].mean is not None for row in ran)]
    return list({columns[at].value: at for at in reversed(full)}.values())[::-1]


def _average(
    row: Row, values: list[_Value], common: list[int], columns: list[Column], metrics: list[str], has_paper: bool
) -> _Value:
    """Over the common columns; the spread is that of the averages of seeds that all have, or else propagated."""
    paper = None
    if has_paper and row.published.values:
        theirs = [row.published.values[index] for at in common if (index := columns[at].index) is not None]
        if len(theirs) == len(common):  # all of ours are the paper's
            is_printed = len(theirs) == len(row.published.values) and row.published.average is not None
            paper = row.published.average if is_printed else round(sum(theirs, Decimal()) / len(theirs), 3)
    means = [mean for at in common if (mean := values[at].mean) is not None]
    if not means:
        return _Value(paper=paper)
    seeded = [_values(row.cells[at], metrics[at]) for at in common]
    seeds = set.intersection(*(set(each) for each in seeded))
    if len(seeds) > 1:
        averages = [statistics.mean(each[seed] for each in seeded) for seed in sorted(seeds)]
        return _Value(statistics.mean(averages), statistics.stdev(averages), len(averages), paper)
    return _Value(statistics.mean(means), math.hypot(*(values[at].spread for at in common)) / len(common), 1, paper)


def _competes(row: Row) -> bool:
    return row.published.coordinates["method"] != "dense"


def _best(means: list[float | None], header: str) -> float | None:
    """The best of several; one alone is not called the best."""
    known = [mean for mean in means if mean is not None]
    if len(known) < 2:
        return None
    return min(known) if header.endswith("↓") else max(known)


def _arrow(metric: str) -> str:
    return "↓" if metric in SMALLER_IS_BETTER else "↑"


def _scale(columns: list[Column], rows: list[Row], metrics: list[str]) -> list[str]:
    """What ours were made with."""
    notes = {}
    for at, column in enumerate(columns):
        runs = [record for row in rows for record in row.cells[at]]
        if not runs:
            continue
        own = coordinates(runs[0])
        samples = runs[0].config["dataset"].get("max_train_samples")
        steps = sorted({record.finetune["steps"] for record in runs})
        notes[column.header] = (
            f"{METRICS[metrics[at]]}, {own['dataset']}, {samples or 'all'} training rows, "
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
    """Whose values are in brackets, or why there are none, and what is to know about them."""
    model = str(row.coordinates.get("model", "")).rsplit("/", 1)[-1]
    where = ", ".join([model, *(str(row.coordinates[key]) for key in differing)])
    if not row.values:
        values = "the paper has this as a picture, without values"
    elif differing:
        values = f"the paper has this for {where}, so its values are not beside ours"
    else:
        values = f"[]: the paper's, with {model}"
    return [values, *(f"the paper: {note}" for note in published.notes)]
