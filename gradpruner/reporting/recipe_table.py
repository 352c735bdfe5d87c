"""GradPruner+ beside other methods: means on each dataset, and its difference from each, on the same test rows."""

from collections import Counter
from collections.abc import Mapping, Sequence

from gradpruner.record import RunRecord
from gradpruner.reporting.cells import difference_text, value_of
from gradpruner.reporting.comparing import SPREAD_NOTE, difference, interval_note, mean_difference
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.labels import METRIC_LABELS, caveats
from gradpruner.reporting.means import DENSE, main_metric
from gradpruner.reporting.plain_names import dataset_title
from gradpruner.reporting.run_groups import comparable_groups
from gradpruner.reporting.tables import Table, dataset_name, row_labels, row_order

RECIPE = "gradpruner_plus"
NLL = "answer_nll"
SECTION = "GradPruner+ beside other methods"

_Rows = Mapping[str, Mapping[str, list[RunRecord]]]  # runs by label and dataset, in the order of seeds


def recipe_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Returns tables of every setting and number of pruned layers in which GradPruner+ and another method were run.

    Each has two of answer NLL and two of accuracy or similarity: one of means, and one of GradPruner+ minus the other
    method, for which the variant of GradPruner+ with the most runs is taken. The dense model stands in all of them.

    Args:
        records: any runs; failed ones are ignored.

    Returns:
        An empty list if there is nothing to compare.
    """
    tables = []
    for title, group in comparable_groups([record for record in records if record.status == "finished"]):
        for sparsity in sorted({_sparsity(run) for run in group if run.pruning["method"] == RECIPE}):
            runs = [run for run in group if run.pruning["method"] == DENSE or _sparsity(run) == sparsity]
            rows = _rows(runs)
            if any(_method(by_dataset) not in (RECIPE, DENSE) for by_dataset in rows.values()):
                setting = f"{title}, {100 * sparsity:.0f} % of the layers"
                for metric in (NLL, None):
                    tables += _tables(setting, rows, metric)
    return tables


def _sparsity(run: RunRecord) -> float:
    """Returns the fraction of layers, or of as many parameters, that a run prunes; 0 where a method has none."""
    return round(float(coordinates(run).get("sparsity", 0.0)), 2)


def _method(by_dataset: Mapping[str, list[RunRecord]]) -> str:
    return str(next(iter(by_dataset.values()))[0].pruning["method"])


def _rows(runs: Sequence[RunRecord]) -> _Rows:
    """Returns the runs in the order of rows; of equal runs the last one."""
    ordered = sorted(runs, key=lambda run: (row_order(run), run.seed))
    found: dict[str, dict[str, dict[int, RunRecord]]] = {}
    for label, run in zip(row_labels(ordered), ordered, strict=True):
        found.setdefault(label, {}).setdefault(dataset_name(run), {})[run.seed] = run
    return {
        label: {name: list(by_seed.values()) for name, by_seed in by_dataset.items()}
        for label, by_dataset in found.items()
    }


def _tables(setting: str, rows: _Rows, metric: str | None) -> list[Table]:
    """Returns the tables of means and of differences.

    Args:
        setting: what all runs share.
        rows: the runs.
        metric: key in the records' metrics; None for accuracy or similarity, whichever a dataset has.
    """
    first: dict[str, RunRecord] = {}
    for by_dataset in rows.values():
        for name, runs in by_dataset.items():
            first.setdefault(name, runs[0])
    metrics = {name: metric or main_metric(run) for name, run in sorted(first.items())}
    shown = _with_values(rows, metrics)
    recipes = Counter({label: sum(map(len, row.values())) for label, row in shown.items() if _method(row) == RECIPE})
    if not recipes or len(shown) < 2:
        return []
    ours, _ = recipes.most_common(1)[0]
    headers = [
        f"{dataset_title(name)}, {METRIC_LABELS[each]} {'↓' if each == NLL else '↑'}" for name, each in metrics.items()
    ]
    sources = [[run for runs in row.values() for run in runs] for row in shown.values()]
    values = [
        [label, *(value_of(row.get(name, []), each, None, False).text(False) for name, each in metrics.items())]
        for label, row in shown.items()
    ]
    others = {label: row for label, row in shown.items() if label != ours}
    differences, found = [], []
    for label, row in others.items():
        own = {
            name: difference(shown[ours][name], row[name], each)
            for name, each in metrics.items()
            if name in row and name in shown[ours]
        }
        found += list(own.values())
        differences.append([label, *(difference_text(own.get(name)) for name in metrics)])
        if len(metrics) > 1:
            full = len(own) == len(metrics)
            differences[-1].append(difference_text(mean_difference(list(own.values())) if full else None))
    what = " or ".join(dict.fromkeys(METRIC_LABELS[each] for each in metrics.values()))
    shared = [
        f"{', '.join(sorted({str(run.metrics['num_examples']) for run in first.values()}))} test rows, "
        f"{', '.join(sorted({str(run.finetune['steps']) for run in first.values()}))} steps of fine-tuning",
        *caveats([run for runs in sources for run in runs]),
    ]
    mean = [f"mean of {len(metrics)}"] if len(metrics) > 1 else []
    return [
        Table(
            f"{SECTION}: {setting}, {what}",
            ["method", *headers],
            values,
            [*shared, SPREAD_NOTE],
            sources,
            section=SECTION,
            heading=f"{setting}, {what}",
        ),
        Table(
            f"{SECTION}: {setting}, {ours} minus each, {what}",
            ["method", *headers, *mean],
            differences,
            [*shared, interval_note([each.is_paired for each in found]), f"≠: can be told from {ours} at 5 %"],
            [[run for runs in row.values() for run in runs] for row in others.values()],
            section=SECTION,
            heading=f"{setting}, {ours} minus each, {what}",
        ),
    ]


def _with_values(rows: _Rows, metrics: Mapping[str, str]) -> _Rows:
    """Returns the rows without runs that lack their dataset's metric."""
    kept = {
        label: {
            name: measured
            for name, runs in by_dataset.items()
            if (measured := [run for run in runs if run.metric(metrics[name]) is not None])
        }
        for label, by_dataset in rows.items()
    }
    return {label: by_dataset for label, by_dataset in kept.items() if by_dataset}
