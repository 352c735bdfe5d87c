"""GradPruner+ beside other methods: means on each dataset, and its difference from each, on the same test rows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gradpruner.finetune.spec import ANSWERS_LOSS
from gradpruner.record import RunRecord
from gradpruner.reporting.cells import difference_text, value_of
from gradpruner.reporting.comparing import SPREAD_NOTE, Difference, difference, interval_note, mean_difference
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.labels import METRIC_LABELS, arrow, caveats
from gradpruner.reporting.means import DENSE, main_metric
from gradpruner.reporting.plain_names import dataset_title
from gradpruner.reporting.run_groups import comparable_groups
from gradpruner.reporting.tables import Table, dataset_name, row_labels, row_order, rows_of_seeds

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
    groups = rows_of_seeds(sorted(runs, key=row_order))
    found: dict[str, dict[str, list[RunRecord]]] = {}
    for label, of_seeds in zip(row_labels([group[0] for group in groups]), groups, strict=True):
        found.setdefault(label, {})[dataset_name(of_seeds[0])] = of_seeds
    return found


def _tables(setting: str, rows: _Rows, metric: str | None) -> list[Table]:
    """Returns the tables of means and of differences.

    Args:
        setting: what all runs share.
        rows: the runs.
        metric: key in the records' metrics; None for accuracy or similarity, whichever a dataset has.
    """
    first = {name: runs[0] for by_dataset in rows.values() for name, runs in by_dataset.items()}
    metrics = {name: metric or main_metric(run) for name, run in sorted(first.items())}
    shown = _with_values(rows, metrics)
    recipes = Counter({label: len(_runs(row)) for label, row in shown.items() if _method(row) == RECIPE})
    if not recipes or len(shown) < 2:
        return []
    ours, _ = recipes.most_common(1)[0]
    what = " or ".join(dict.fromkeys(METRIC_LABELS[each] for each in metrics.values()))
    headers = [
        "method",
        *(f"{dataset_title(name)}, {METRIC_LABELS[each]} {arrow(each)}" for name, each in metrics.items()),
    ]
    notes = [
        f"{_all_of(run.metrics['num_examples'] for run in first.values())} test rows, "
        f"{_all_of(run.finetune['steps'] for run in first.values())} steps of fine-tuning"
        f"{_learns_from(next(iter(first.values())))}",
        *caveats([run for row in shown.values() for run in _runs(row)]),
    ]
    means = Table(
        f"{SECTION}: {setting}, {what}",
        headers,
        [
            [label, *(value_of(row.get(name, []), each, None, False).text(False) for name, each in metrics.items())]
            for label, row in shown.items()
        ],
        [*notes, SPREAD_NOTE],
        [_runs(row) for row in shown.values()],
        section=SECTION,
        heading=f"{setting}, {what}",
    )
    others = {label: row for label, row in shown.items() if label != ours}
    differences = [_differences(shown[ours], row, metrics) for row in others.values()]
    is_paired = [each.is_paired for row in differences for each in row if each is not None]
    return [
        means,
        Table(
            f"{SECTION}: {setting}, {ours} minus each, {what}",
            [*headers, *([f"mean of {len(metrics)}"] if len(metrics) > 1 else [])],
            [[label, *map(difference_text, row)] for label, row in zip(others, differences, strict=True)],
            [*notes, "over the seeds that both have", interval_note(is_paired), f"≠: can be told from {ours} at 5 %"],
            [_runs(row) for row in others.values()],
            section=SECTION,
            heading=f"{setting}, {ours} minus each, {what}",
        ),
    ]


def _differences(
    ours: Mapping[str, list[RunRecord]], other: Mapping[str, list[RunRecord]], metrics: Mapping[str, str]
) -> list[Difference | None]:
    """Returns ours minus the other on each dataset and, of several their mean; None where one has no runs."""
    found = [
        difference(*_of_common_seeds(ours[name], other[name]), metric) if name in ours and name in other else None
        for name, metric in metrics.items()
    ]
    known = [each for each in found if each is not None]
    if len(found) > 1:
        found.append(mean_difference(known) if len(known) == len(found) else None)
    return found


def _of_common_seeds(first: list[RunRecord], second: list[RunRecord]) -> tuple[list[RunRecord], list[RunRecord]]:
    """Returns the runs whose seed both have, so that they can be paired; all of them if there is none."""
    common = {run.seed for run in first} & {run.seed for run in second}
    own, others = ([run for run in runs if run.seed in common] for runs in (first, second))
    return (own, others) if common else (first, second)


def _runs(by_dataset: Mapping[str, list[RunRecord]]) -> list[RunRecord]:
    return [run for runs in by_dataset.values() for run in runs]


def _learns_from(run: RunRecord) -> str:
    """Says by which loss a run learns, unless it is the answers' own: a title names only what tells it apart."""
    finetune = run.config["finetune"]
    if (loss := finetune.get("loss", ANSWERS_LOSS)) == ANSWERS_LOSS:
        return ""
    teacher = f", tuned_teacher={finetune['tuned_teacher']}" if finetune.get("tuned_teacher") else ""
    return f", loss={loss}{teacher}"


def _all_of(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


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
