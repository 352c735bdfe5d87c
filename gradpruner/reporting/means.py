"""What figures show: means over datasets of means over seeds.

Datasets count only where every line or bar has them, so that no two numbers of a figure are of different data.
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
        error: of that mean: over datasets, in quadrature, of the standard deviation over seeds or, of one seed, of the
            standard error over test rows.
        num_datasets: how many.
        num_seeds: of the dataset with the fewest.
    """

    value: float
    error: float
    num_datasets: int = 1
    num_seeds: int = 1


Line = Mapping[float, Measured]


def main_metric(record: RunRecord) -> str:
    """What the paper's averages take from a dataset: similarity on some (Section 4.1), accuracy on the others."""
    by_similarity = dataset_name(record) in BY_SIMILARITY or "accuracy" not in record.metrics
    return "similarity" if by_similarity and "similarity" in record.metrics else "accuracy"


def measure(
    points: Sequence[tuple[str, float, RunRecord]], metric: str
) -> tuple[dict[str, dict[float, Measured]], list[str]]:
    """Means over datasets and seeds.

    Args:
        points: label of the line, place on the x axis, and run.
        metric: key in a record's metrics, or `MAIN`. Runs without it are left out.

    Returns:
        The lines, and the names of the datasets that they are means of: those that every line has. A place where a line
        lacks one of them is left out.

    Raises:
        ValueError: if no dataset has all lines.
    """
    found: dict[str, dict[float, dict[str, dict[int, tuple[float, float]]]]] = {}
    names = {}
    for label, x, record in points:
        name = main_metric(record) if metric == MAIN else metric
        if name in record.metrics:
            # Values of other encoders are no values of the same data.
            encoder = [record.metrics.get(f"bertscore_{key}") for key in ("encoder", "layer")] * (name == "similarity")
            data = f"{json.dumps(data_settings(record), sort_keys=True)} {encoder}"
            names[data] = dataset_name(record)
            cell = found.setdefault(label, {}).setdefault(x, {}).setdefault(data, {})
            cell[record.seed] = (record.metrics[name], record.metrics[f"{name}_stderr"])
    if not found:
        return {}, []
    shared = set.intersection(*({data for cells in line.values() for data in cells} for line in found.values()))
    if not shared:
        raise ValueError(
            f"A figure compares on datasets that every method ran on, got none for {', '.join(found)}. "
            "Run what is missing, or set runs_dir to a folder with fewer methods."
        )
    lines = {
        label: {x: _mean([cells[data] for data in sorted(shared)]) for x, cells in line.items() if shared <= set(cells)}
        for label, line in found.items()
    }
    return {label: dict(sorted(line.items())) for label, line in lines.items() if line}, sorted(
        names[data] for data in shared
    )


def _mean(datasets: list[dict[int, tuple[float, float]]]) -> Measured:
    means, errors = [], []
    for seeds in datasets:
        values = [value for value, _ in seeds.values()]
        means.append(statistics.mean(values))
        errors.append(statistics.stdev(values) if len(values) > 1 else next(iter(seeds.values()))[1])
    error = math.hypot(*errors) / len(errors)
    return Measured(statistics.mean(means), error, len(datasets), min(map(len, datasets)))
