"""Which runs a figure of many runs shows together: in what order, under what names, and on how many pages."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gradpruner.files import slug
from gradpruner.record import RunRecord
from gradpruner.reporting.labels import engine_in_title, method_place
from gradpruner.reporting.tables import data_settings, dataset_name, row_labels, setting


def in_order(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns every run once, in the paper's order of methods, then by dataset and seed."""

    def place(record: RunRecord) -> tuple[tuple[int, str], str, int]:
        return method_place(record.pruning["method"]), dataset_name(record), record.seed

    return sorted({record.identity: record for record in records}.values(), key=place)


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """Returns distinct labels: the method, and of dataset, model, fine-tuning and seed those in which runs differ."""
    columns = [
        row_labels(list(records)),
        [dataset_name(record) for record in records],
        [record.model["name"] for record in records],
        [record.config["finetune"]["mode"] for record in records],
        [f"seed {record.seed}" for record in records],
    ]
    shown = [column for index, column in enumerate(columns) if index == 0 or len(set(column)) > 1]
    labels = [" / ".join(parts) for parts in zip(*shown, strict=True)]
    return [
        # The start of the identity is also in the name of the run's folder.
        f"{label} / {record.identity[:8]}" if labels.count(label) > 1 else label
        for label, record in zip(labels, records, strict=True)
    ]


def distinct_runs(records: Sequence[RunRecord], shown: Callable[[RunRecord], object]) -> list[list[RunRecord]]:
    """Groups runs that look alike: of one dataset and model, with equal `shown`. Drops runs for which that is None."""
    alike: dict[str, list[RunRecord]] = {}
    for record in records:
        if (what := shown(record)) is not None:
            key = json.dumps([dataset_name(record), record.model["name"], what], sort_keys=True)
            alike.setdefault(key, []).append(record)
    return list(alike.values())


def pages(groups: list[list[RunRecord]], most: int, path: Path) -> dict[Path, dict[str, list[RunRecord]]]:
    """Returns groups of runs by page and label: one page for up to `most` groups, else separate pages per dataset."""
    if len(groups) <= most:
        return {path: labelled(groups)} if groups else {}
    found: dict[Path, dict[str, list[RunRecord]]] = {}
    for name in dict.fromkeys(dataset_name(group[0]) for group in groups):
        own = list(labelled([group for group in groups if dataset_name(group[0]) == name]).items())
        for first in range(0, len(own), most):
            number = f"-{1 + first // most}" if first else ""
            found[path.with_stem(f"{path.stem}-{slug(name)}{number}")] = dict(own[first : first + most])
    return found


def labelled(groups: list[list[RunRecord]]) -> dict[str, list[RunRecord]]:
    """Returns groups of runs by the label of their first run."""
    return dict(zip(run_labels([runs[0] for runs in groups]), groups, strict=True))


def comparable_groups(records: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Returns runs that may share a picture, each group with a title that others may have, too.

    A group is a model, a kind of fine-tuning and an evaluation, on any datasets: figures show means over datasets. A
    dataset that was run with several choices of rows (such as two numbers of training rows) has one choice per group,
    so no mean mixes them. Choices are numbered per dataset, first the one with the most runs, and group n has choice n
    of each.
    """
    choices: dict[str, Counter[str]] = {}
    for record in records:
        choices.setdefault(dataset_name(record), Counter())[_data_key(record)] += 1
    ranked = {name: sorted(counts, key=lambda key: (-counts[key], key)) for name, counts in choices.items()}
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for record in records:
        shared = {key: value for key, value in setting(record).items() if key != "dataset"}
        shared["validation_fraction"] = record.config["dataset"].get("validation_fraction")
        choice = ranked[dataset_name(record)].index(_data_key(record))
        groups.setdefault((json.dumps(shared, sort_keys=True), choice), []).append(record)
    return [
        (f"{group[0].model['name']}, {group[0].config['finetune']['mode']}{engine_in_title(group[0])}", group)
        for _, group in sorted(groups.items(), key=lambda item: item[0][1])
    ]


def numbered(title: str, num_same: int) -> str:
    """Returns a title that is distinct from `num_same` others."""
    return f"{title} ({num_same + 1})" if num_same else title


def _data_key(record: RunRecord) -> str:
    return json.dumps(data_settings(record), sort_keys=True)
