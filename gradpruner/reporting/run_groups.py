"""Which runs a figure of many runs shows together: in what order, under what names, and on how many pages."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradpruner.files import slug
from gradpruner.messages import first_few
from gradpruner.record import RunRecord
from gradpruner.reporting.differing import plain_differences
from gradpruner.reporting.labels import engine_in_title, method_place
from gradpruner.reporting.plain_names import MODES, dataset_title, plain_label
from gradpruner.reporting.tables import data_settings, dataset_name, row_labels, setting

# Settings of the data that tell groups apart.
OF_DATA = ("max_train_samples", "train_fraction", "max_test_samples", "validation_fraction")


def in_order(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns every run once, in the paper's order of methods, then by dataset and seed."""

    def place(record: RunRecord) -> tuple[tuple[int, str], str, int]:
        return method_place(record.pruning["method"]), dataset_name(record), record.seed

    return sorted({record.identity: record for record in records}.values(), key=place)


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """Returns distinct labels: the method, and of dataset, model, fine-tuning and seed those in which runs differ."""
    columns = [
        [plain_label(label) for label in row_labels(list(records))],
        [dataset_title(dataset_name(record)) for record in records],
        [record.model["name"] for record in records],
        [MODES.get(mode := record.config["finetune"]["mode"], mode) for record in records],
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
    """Returns runs that may share a picture, each group with a title of its own.

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
    ordered = [group for _, group in sorted(groups.items(), key=lambda item: item[0][1])]
    titles = [_group_title(group[0]) for group in ordered]
    titles = _told_apart(titles, [_shared(group) for group in ordered])
    titles = _told_apart(titles, [{"datasets": _dataset_titles(group)} for group in ordered])
    return list(zip(titles, ordered, strict=True))


def _told_apart(titles: list[str], shared: Sequence[dict[str, Any]]) -> list[str]:
    """Appends to each title in what its group differs from groups of the same title."""
    told = []
    for title, own in zip(titles, shared, strict=True):
        alike = [other for name, other in zip(titles, shared, strict=True) if name == title]
        told.append(", ".join([title, *plain_differences(own, alike)]))
    return told


def _dataset_titles(group: list[RunRecord]) -> str:
    return first_few(sorted({dataset_title(dataset_name(record)) for record in group}))


def _group_title(record: RunRecord) -> str:
    mode = record.config["finetune"]["mode"]
    return f"{record.model['name']}, {MODES.get(mode, mode)}{engine_in_title(record)}"


def _shared(group: list[RunRecord]) -> dict[str, Any]:
    """Returns what all runs of a group share: settings, and those of the data that do not depend on the dataset."""
    settings = [{key: value for key, value in setting(record).items() if key != "dataset"} for record in group]
    data = [data_settings(record) for record in group]
    same = {key: value for key, value in data[0].items() if all(other.get(key) == value for other in data)}
    return settings[0] | {"dataset": {key: same.get(key) for key in OF_DATA}}


def _data_key(record: RunRecord) -> str:
    return json.dumps(data_settings(record), sort_keys=True)
