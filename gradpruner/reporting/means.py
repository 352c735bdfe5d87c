"""The numbers in figures: means over datasets of means over seeds.

A dataset counts only if every line or bar has it, so that all numbers of a figure are over the same data.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradpruner.record import RunRecord
from gradpruner.reporting.paper_tables import BY_SIMILARITY
from gradpruner.reporting.tables import data_settings, dataset_name

MAIN = "main"  # see main_metric
DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """One number of a figure.

    Attributes:
        value: mean over datasets of the mean over seeds.
        error: error of `value`, propagated from one error per dataset: the standard deviation over seeds or, with a
            single seed, the standard error over test rows.
        num_datasets: number of datasets in the mean.
        num_seeds: number of seeds of the dataset with the fewest.
    """

    value: float
    error: float
    num_datasets: int = 1
    num_seeds: int = 1


Line = Mapping[float, Measured]


def main_metric(record: RunRecord) -> str:
    """Returns the metric that enters the paper's averages: similarity on some datasets (Section 4.1), else accuracy."""
    by_similarity = dataset_name(record) in BY_SIMILARITY or "accuracy" not in record.metrics
    return "similarity" if by_similarity and "similarity" in record.metrics else "accuracy"


def measure(
    points: Sequence[tuple[str, float, RunRecord]], metric: str
) -> tuple[dict[str, dict[float, Measured]], list[str]]:
    """Averages a metric over datasets and seeds.

    Args:
        points: label of the line, place on the x axis, and run.
        metric: key in a record's metrics, or `MAIN`. Runs that did not measure it are skipped.

    Returns:
        The lines by label, and the names of the datasets that every line has: the means are over these. A line has no
        value at places where it lacks one of these datasets.

    Raises:
        ValueError: if there is no dataset that all lines have.
    """
    # By label, place on the x axis, data and seed: the value and its standard error.
    found: dict[str, dict[float, dict[str, dict[int, tuple[float, float]]]]] = {}
    names = {}
    for label, x, record in points:
        name = main_metric(record) if metric == MAIN else metric
        value = record.metric(name)
        if value is None:
            continue
        data = _data_key(record, name)
        names[data] = dataset_name(record)
        cell = found.setdefault(label, {}).setdefault(x, {}).setdefault(data, {})
        cell[record.seed] = (value, record.stderr(name))
    if not found:
        return {}, []
    shared = sorted(set.intersection(*(_all_data(places) for places in found.values())))
    if not shared:
        raise ValueError(
            f"A figure compares on datasets that every method ran on, got none for {', '.join(found)}. "
            "Run what is missing, or set runs_dir to a folder with fewer methods."
        )
    lines = {}
    for label, places in found.items():
        complete = {x: cells for x, cells in sorted(places.items()) if all(data in cells for data in shared)}
        if complete:
            lines[label] = {x: _mean([cells[data] for data in shared]) for x, cells in complete.items()}
    return lines, sorted(names[data] for data in shared)


def _data_key(record: RunRecord, metric: str) -> str:
    """Returns a key that is equal for runs whose values of `metric` may be averaged or compared."""
    settings = json.dumps(data_settings(record), sort_keys=True)
    if metric != "similarity":
        return settings
    # Similarities of different encoders are on different scales.
    return f"{settings} {record.metrics.get('bertscore_encoder')} {record.metrics.get('bertscore_layer')}"


def _all_data(places: Mapping[float, Mapping[str, object]]) -> set[str]:
    """Returns the data that a line has at any place."""
    return {data for cells in places.values() for data in cells}


def _mean(datasets: list[dict[int, tuple[float, float]]]) -> Measured:
    """Averages over datasets; each maps seeds to a value and its standard error."""
    means, errors = [], []
    for seeds in datasets:
        values = [value for value, _ in seeds.values()]
        means.append(statistics.mean(values))
        errors.append(statistics.stdev(values) if len(values) > 1 else next(iter(seeds.values()))[1])
    # The error of a mean of independent values: the root of the sum of squares, over their number.
    error = math.hypot(*errors) / len(errors)
    return Measured(statistics.mean(means), error, len(datasets), min(map(len, datasets)))
