"""The paper's tables with our values: the same rows and columns, the paper's value in square brackets beside ours."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradpruner.messages import parameters
from gradpruner.record import RunRecord
from gradpruner.reporting.cells import DASH, FEWER, Value, average, difference_text, paper_average, value_of
from gradpruner.reporting.comparing import SPREAD_NOTE, Difference, difference, interval_note, mean_difference
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.labels import (
    METRIC_LABELS,
    NOT_COMPETING,
    SMALLER_IS_BETTER,
    arrow,
    caveats,
    describe_origins,
    engine_in_title,
)
from gradpruner.reporting.measures import paper_metrics, why_not_comparable
from gradpruner.reporting.paper_rows import PlacedColumn, PlacedRow, Placement, placements
from gradpruner.reporting.plain_names import MODES, dataset_title
from gradpruner.reporting.published import Published, PublishedRow
from gradpruner.reporting.tables import Table, tell_apart


def paper_table(published: Published, records: Sequence[RunRecord]) -> list[Table]:
    """Tables like a published one, for every model and setting of ours that has runs for it.

    Runs with another dataset or kind of fine-tuning than the paper's get tables of their own, without the paper's
    values. Each setting gets a table of accuracy or similarity, one of the differences from the dense model in it, and
    one of answer NLL, which shows small differences earlier. A table over values of a setting is made only if runs of a
    pruning method have two or more of them.

    Args:
        published: a table or figure with rows.
        records: any runs; failed ones are ignored.

    Returns:
        An empty list if no run fits.
    """
    return tell_apart(
        [
            (table, placement.shared)
            for placement in placements(published, records)
            for table in _tables(published, placement)
        ]
    )


def other_runs(published: Sequence[Published], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs that fit these tables but for settings that the paper does not vary there, and are in none."""
    placed = [placement for each in published for placement in placements(each, records)]
    shown = {id(record) for placement in placed for record in placement.covered}
    others = {id(record): record for placement in placed for record in placement.others}
    return [record for key, record in others.items() if key not in shown]


def _tables(published: Published, placement: Placement) -> list[Table]:
    columns, rows = placement.columns, placement.rows
    tables = []
    scores = [_score(rows, at, column) for at, column in enumerate(columns)]
    for metrics in (scores, ["answer_nll"] * len(columns)):
        pruned = [row for row in rows if row.published.coordinates["method"] != "dense"]
        if any(value_of(row.cells[at], metrics[at], None, False).seeds for row in pruned for at in placement.filled):
            tables.append(_table(published, placement, metrics))
            if metrics is scores and (differences := _differences(published, placement, metrics)):
                tables.append(differences)
    return tables


def _score(rows: list[PlacedRow], at: int, column: PlacedColumn) -> str:
    """Returns the paper's metric for the dataset of column number `at`, or the other metric if no run has that one."""
    runs = [record for row in rows for record in row.cells[at]]
    names = paper_metrics(_tested(runs[0]) if runs else str(column.value))
    return next((name for name in names if any(name in record.metrics for record in runs)), names[0])


def _tested(record: RunRecord) -> str:
    """Returns the dataset of a run's test rows, which may be another than that of its training rows."""
    own = coordinates(record)
    return str(own["test"] or own["dataset"])


def _table(published: Published, placement: Placement, metrics: list[str]) -> Table:
    """Returns a table; `metrics` has one metric per column."""
    columns, rows = placement.columns, placement.rows
    is_score = not set(metrics) <= set(SMALLER_IS_BETTER)
    # The paper has no likelihoods, and its values hold for its own dataset and kind of fine-tuning only.
    has_paper = is_score and not placement.differing
    reasons = [_why_not(rows, at, metric) if has_paper else None for at, metric in enumerate(metrics)]
    values = [
        [
            value_of(
                row.cells[at], metrics[at], _published(row, column) if has_paper else None, reasons[at] is not None
            )
            for at, column in enumerate(columns)
        ]
        for row in rows
    ]
    headers = [f"{column.header} {arrow(metric)}" for column, metric in zip(columns, metrics, strict=True)]
    bold = [[False] * len(columns) for _ in rows]
    is_paired = True
    for at, metric in enumerate(metrics):
        best, all_paired = _best([row.cells[at] for row in rows], rows, metric)
        is_paired = is_paired and all_paired
        for number in best:
            bold[number][at] = True
    averaged = _averaged(placement, values) if published.axis == "dataset" else []
    if len(averaged) > 1:
        for row, own, marks in zip(rows, values, bold, strict=True):
            mean = average(row.cells, own, metrics, averaged)
            used = [at for at in averaged if own[at].mean is not None] or averaged
            paper = paper_average(row.published, [columns[at].index for at in used]) if has_paper else None
            is_withheld = paper is not None and any(reasons[at] for at in used)
            own.append(replace(mean, paper=None if is_withheld else paper, is_withheld=is_withheld))
            marks.append(False)
        for number in _best_averages(rows, values, metrics, averaged):
            bold[number][-1] = True
        headers.append(f"average of {len(averaged)} {arrow(metrics[averaged[0]])}")
    texts = [
        [row.label, *(value.text(mark) for value, mark in zip(own, marks, strict=True))]
        for row, own, marks in zip(rows, values, bold, strict=True)
    ]
    notes = [*_scale(columns, rows, metrics), SPREAD_NOTE]
    if any(map(any, bold)):
        test = "a test on the same rows"
        test += "" if is_paired else " (unpaired where runs have no scores of the same rows)"
        notes.append(f"bold: the best pruned model of a column, and those that {test} cannot tell from it at 5 %")
    if len(averaged) > 1:
        notes.append(f"average over {', '.join(columns[at].header for at in averaged)}")
        notes += _fewer(rows, values, averaged, columns)
    if is_score:
        notes += describe_origins([record.metrics for record in placement.runs])
    notes += caveats(placement.runs)
    notes += _about_others(placement)
    if is_score:
        notes += _about_paper(published, placement, [reason for reason in reasons if reason])
    sources = [list(itertools.chain(*row.cells)) for row in rows]
    return _named(published, placement, "" if is_score else "answer NLL", ["method", *headers], texts, notes, sources)


def _named(
    published: Published,
    placement: Placement,
    aspect: str,
    headers: list[str],
    rows: list[list[str]],
    notes: list[str],
    sources: list[list[RunRecord]],
) -> Table:
    """Returns a table with title, section and heading; `aspect` says what is measured besides the score."""
    first = placement.runs[0]
    own = coordinates(first)
    size = parameters(first.model["num_parameters"])
    engine, by_dataset = engine_in_title(first), published.axis == "dataset"
    place, plain = ("", "") if by_dataset else (f" on {own['dataset']}", f" on {dataset_title(str(own['dataset']))}")
    name = f"{first.model['name']} with {size} parameters{place}, {own['finetune']}{engine}"
    title = f"{published.label}: {published.title}; {name}" + (f", {aspect}" if aspect else "")
    heading = f"{first.model['name']}{plain}, {MODES.get(own['finetune'], own['finetune'])}{engine}"
    return Table(title, headers, rows, notes, sources, published.label, heading, aspect)


def _published(row: PlacedRow, column: PlacedColumn) -> Any:
    has_value = column.index is not None and row.published.values
    return row.published.values[column.index] if has_value and column.index is not None else None


def _why_not(rows: list[PlacedRow], at: int, metric: str) -> str | None:
    """Returns why the paper's values must not stand beside ours in a column; None if they may, or ours has no runs."""
    runs = [record for row in rows for record in row.cells[at]]
    reasons = (why_not_comparable(_tested(record), metric, record.metrics) for record in runs)
    return next((reason for reason in reasons if reason), None)


def _competes(row: PlacedRow) -> bool:
    """Returns whether a row may be the best: models that are dense in the end are references, not competitors."""
    return row.published.coordinates["method"] not in NOT_COMPETING


def _best(cells: list[list[RunRecord]], rows: list[PlacedRow], metric: str) -> tuple[list[int], bool]:
    """Returns the rows with the best value of a column and with those that cannot be told from it.

    Returns:
        No row if fewer than two compete; and whether every comparison was paired.
    """
    runs = {
        number: measured
        for number, (row, cell) in enumerate(zip(rows, cells, strict=True))
        if _competes(row) and (measured := [record for record in cell if record.metric(metric) is not None])
    }
    if len(runs) < 2:
        return [], True
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    best = max(runs, key=lambda number: sign * (value_of(runs[number], metric, None, False).mean or 0.0))
    compared = {number: difference(runs[number], runs[best], metric) for number in runs if number != best}
    level = [number for number, each in compared.items() if not each.is_clear]
    return [best, *level], all(each.is_paired for each in compared.values())


def _best_averages(
    rows: list[PlacedRow], values: list[list[Value]], metrics: list[str], averaged: list[int]
) -> list[int]:
    """Returns what `_best` does for the averages, of the rows that have all columns."""
    known = {
        number: mean
        for number, (row, own) in enumerate(zip(rows, values, strict=True))
        if _competes(row) and (mean := own[-1].mean) is not None and not own[-1].has_fewer
    }
    if len(known) < 2:
        return []
    sign = -1 if metrics[averaged[0]] in SMALLER_IS_BETTER else 1
    best = max(known, key=lambda number: sign * known[number])
    level = [
        number
        for number in known
        if number != best and not _mean_difference(rows[number], rows[best], metrics, averaged).is_clear
    ]
    return [best, *level]


def _mean_difference(first: PlacedRow, second: PlacedRow, metrics: list[str], columns: list[int]) -> Difference:
    return mean_difference([difference(first.cells[at], second.cells[at], metrics[at]) for at in columns])


def _differences(published: Published, placement: Placement, metrics: list[str]) -> Table | None:
    """Returns the table of what each method loses against dense, with 95 % intervals; None without dense runs."""
    dense, *others = placement.rows  # every published table starts with the dense model
    columns = [at for at in range(len(placement.columns)) if _has(dense, at, metrics[at])]
    rows, sources = [], []
    is_paired = []
    for row in others:
        known = [at for at in columns if _has(row, at, metrics[at])]
        found = {at: difference(row.cells[at], dense.cells[at], metrics[at]) for at in known}
        is_paired += [each.is_paired for each in found.values()]
        cells = [difference_text(found.get(at)) for at in columns]
        if published.axis == "dataset" and len(columns) > 1:
            full = len(known) == len(columns)
            cells.append(difference_text(mean_difference(list(found.values())) if full else None))
        if known:
            rows.append([row.label, *cells])
            sources.append(list(itertools.chain(*row.cells)))
    if not rows:
        return None
    headers = [placement.columns[at].header for at in columns]
    if published.axis == "dataset" and len(columns) > 1:
        headers.append(f"average of {len(columns)}")
    notes = [interval_note(is_paired), "≠: can be told from dense at 5 %"]
    return _named(published, placement, "difference from dense", ["method", *headers], rows, notes, sources)


def _has(row: PlacedRow, at: int, metric: str) -> bool:
    return bool(row.cells[at]) and all(record.metric(metric) is not None for record in row.cells[at])


def _averaged(placement: Placement, values: list[list[Value]]) -> list[int]:
    """Returns the columns of the fullest row, over which rows are averaged."""
    columns = [[at for at in range(len(placement.columns)) if row[at].mean is not None] for row in values]
    return max(columns, key=len)


def _fewer(
    rows: list[PlacedRow], values: list[list[Value]], averaged: list[int], columns: list[PlacedColumn]
) -> list[str]:
    """Returns a note on the rows that are averaged over fewer columns."""
    own = [
        f"{row.label} ({', '.join(columns[at].header for at in averaged if cells[at].mean is not None)})"
        for row, cells in zip(rows, values, strict=True)
        if cells[-1].has_fewer
    ]
    return [f"{FEWER} over fewer, so not comparable with the others: {'; '.join(own)}"] if own else []


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
        count = round(sparsity * num_layers)
        pruned = f"{count} of {num_layers} layers ({100 * count / num_layers:.3g} %)"
        notes["pruned"] = f"{pruned}, or as many parameters in narrower ones"
    return [f"{name}: {note}" for name, note in notes.items()]


def _about_others(placement: Placement) -> list[str]:
    """Returns notes on runs of the same methods that are not in the table."""
    elsewhere = {coordinates(record)["method"] for record in placement.others}
    notes = []
    for row in placement.rows:
        has_others = row.published.coordinates["method"] in elsewhere
        if row.chosen:
            notes.append(f"{row.label}: {'; '.join(row.chosen)}" + ("; it has runs with others" if has_others else ""))
    if placement.others:
        notes.append(f"not in this table: {len(placement.others)} runs with settings that the paper does not vary here")
    if placement.num_left_out:
        notes.append(f"left out: {placement.num_left_out} runs of these methods with other settings")
    return notes


def _about_paper(published: Published, placement: Placement, reasons: list[str]) -> list[str]:
    """Returns notes on whose values are in brackets, or why there are none, and the notes of the published table."""
    row: PublishedRow = placement.rows[0].published
    model = str(row.coordinates.get("model", "")).rsplit("/", 1)[-1]
    where = ", ".join([model, *(str(row.coordinates[key]) for key in placement.differing)])
    if not row.values:
        values = ["the paper has this as a picture, without values"]
    elif placement.differing:
        values = [f"the paper has this for {where}, so its values are not beside ours"]
    else:
        values = [f"[]: the paper's, with {model}"]
        values += [f"[{DASH}]: not the same measure: {reason}" for reason in dict.fromkeys(reasons)]
    return [*values, *(f"the paper: {note}" for note in published.notes)]
