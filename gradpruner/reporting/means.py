"""The numbers in figures: means over datasets of means over seeds.

All numbers of a figure are over the same data: lines or bars that lack a dataset which the others have are left out.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import error_of_mean
from gradpruner.reporting.measures import BY_SIMILARITY
from gradpruner.reporting.tables import data_settings, dataset_name

MAIN = "main"  # see main_metric
DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """One number of a figure.

    Attributes:
        value: mean over datasets of the mean over seeds.
        error: standard error of `value`, propagated from one per dataset: over seeds or, with a single seed, over test
            rows.
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


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def measure(
    points: Sequence[tuple[str, float, RunRecord]], metric: str
) -> tuple[dict[str, dict[float, Measured]], list[str], list[str]]:
    """Averages a metric over datasets and seeds.

    Args:
        points: label of the line, place on the x axis, and run.
        metric: key in a record's metrics, or `MAIN`. Runs that did not measure it are skipped.

    Returns:
        The lines by label; the names of the datasets that every line has: the means are over these, and a line has no
        value at places where it lacks one; and the labels of lines that lack one everywhere. Datasets and lines are
        chosen so that there are as many numbers as possible.
    """
    # By label, place on the x axis, data and seed: the value and its standard error.
    found: dict[str, dict[float, dict[str, dict[int, tuple[float, float]]]]] = {}
    names = {}
    for label, x, record in points:
        name = main_metric(record) if metric == MAIN else metric
        value = record.metric(name)
        if value is None:
            continue
        key = _data_key(record, name)
        names[key] = dataset_name(record)
        cell = found.setdefault(label, {}).setdefault(x, {}).setdefault(key, {})
        cell[record.seed] = (value, record.stderr(name))
    if not found:
        return {}, [], []
    points_of = [(label, set(cells)) for label, places in found.items() for cells in places.values()]
    choices: list[set[str]] = [data for _, data in points_of]
    choices.append(set[str].intersection(*choices))

    def extent(choice: set[str]) -> tuple[int, int, list[str]]:
        complete = [label for label, data in points_of if choice <= data]
        return len(choice) * len(complete), len(set(complete)), sorted(choice)

    widest = max(choices, key=extent)
    shared = sorted(widest)
    lines = {}
    for label, places in found.items():
        complete = {x: cells for x, cells in sorted(places.items()) if all(each in cells for each in shared)}
        if complete and shared:
            lines[label] = {x: _mean([cells[each] for each in shared]) for x, cells in complete.items()}
    return lines, sorted(names[each] for each in shared), [label for label in found if label not in lines]


def _data_key(record: RunRecord, metric: str) -> str:
    """Returns a key that is equal for runs whose values of `metric` may be averaged or compared."""
    settings = json.dumps(data_settings(record), sort_keys=True)
    if metric != "similarity":
        return settings
    # Similarities of different encoders are on different scales.
    return f"{settings} {record.metrics.get('bertscore_encoder')} {record.metrics.get('bertscore_layer')}"


def _mean(datasets: list[dict[int, tuple[float, float]]]) -> Measured:
    """Averages over datasets; each maps seeds to a value and its standard error."""
    means, errors = [], []
    for seeds in datasets:
        values = [value for value, _ in seeds.values()]
        means.append(statistics.mean(values))
        errors.append(error_of_mean(values) if len(values) > 1 else next(iter(seeds.values()))[1])
    # The error of a mean of independent values: the root of the sum of squares, over their number.
    error = math.hypot(*errors) / len(errors)
    return Measured(statistics.mean(means), error, len(datasets), min(map(len, datasets)))
