"""Cells of the paper's tables: our mean with its error, the paper's value beside it, and averages over a row."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import Difference, error_of_mean, mean_error
from gradpruner.reporting.published import PublishedRow

DASH = "-"
FEWER = "†"  # marks an average over fewer columns than the fullest row has


@dataclass(frozen=True)
class Value:
    """Content of a cell.

    Attributes:
        mean: our mean over seeds, or over columns of these; None without runs.
        error: standard error of the mean.
        seeds: seeds of the mean; empty for an average of cells with different seeds.
        num_seeds: numbers of seeds of the cells, ascending.
        paper: the paper's value; None if there is none.
        is_withheld: whether the paper has a value but measured something else.
        has_fewer: whether this is an average over fewer columns than other rows have.
    """

    mean: float | None = None
    error: float = 0.0
    seeds: tuple[int, ...] = ()
    num_seeds: tuple[int, ...] = ()
    paper: Decimal | None = None
    is_withheld: bool = False
    has_fewer: bool = False

    def text(self, is_bold: bool) -> str:
        """Returns the cell's text."""
        ours = DASH
        if self.mean is not None:
            ours = f"{self.mean:.3f} ±{self.error:.3f}"
            if self.num_seeds[-1] > 1:
                ours += f" (n={' to '.join(map(str, dict.fromkeys((self.num_seeds[0], self.num_seeds[-1]))))})"
            ours = f"**{ours}**" if is_bold else ours
            ours += f" {FEWER}" if self.has_fewer else ""
        if self.is_withheld:
            return f"{ours} [{DASH}]"
        return ours if self.paper is None else f"{ours} [{self.paper}]"


def value_of(cell: Sequence[RunRecord], metric: str, paper: Decimal | None, is_withheld: bool) -> Value:
    """Returns the content of the cell of these runs, which differ in the seed."""
    paper, is_withheld = (None, paper is not None) if is_withheld else (paper, False)
    runs = [record for record in cell if record.metric(metric) is not None]
    if not runs:
        return Value(paper=paper, is_withheld=is_withheld)
    mean = statistics.mean(value for record in runs if (value := record.metric(metric)) is not None)
    seeds = tuple(record.seed for record in runs)
    return Value(mean, mean_error(runs, metric), seeds, (len(seeds),), paper, is_withheld)


def difference_text(found: Difference | None) -> str:
    """Returns a difference with its 95 % interval, marked if it is clear; a dash for None."""
    if found is None:
        return DASH
    mark = " ≠" if found.is_clear else ""
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}){mark}"


def average(
    cells: Sequence[Sequence[RunRecord]], values: Sequence[Value], metrics: Sequence[str], columns: Sequence[int]
) -> Value:
    """Returns the average of a row over those of `columns` in which it has a value.

    Args:
        cells: the row's runs.
        values: the row's values.
        metrics: one metric per column.
        columns: columns of the fullest row.
    """
    own = [at for at in columns if values[at].mean is not None]
    means = [mean for at in own if (mean := values[at].mean) is not None]
    if not means:
        return Value()
    seeds = {values[at].seeds for at in own}
    has_fewer = len(own) < len(columns)
    if len(seeds) == 1 and len(next(iter(seeds))) > 1:
        # Average seed by seed: values of one seed may move together, and the deviation of the averages shows that.
        by_seed = []
        for seed in next(iter(seeds)):
            runs = [next(record for record in cells[at] if record.seed == seed) for at in own]
            by_seed.append([run.metric(metrics[at]) or 0.0 for run, at in zip(runs, own, strict=True)])
        averages = [statistics.mean(each) for each in by_seed]
        error = error_of_mean(averages)
        num_seeds: tuple[int, ...] = (len(averages),)
    else:
        # The cells count as independent: the error of their mean is the root of the sum of squares, over their number.
        error = math.hypot(*(values[at].error for at in own)) / len(own)
        num_seeds = tuple(sorted(values[at].num_seeds[0] for at in own))
    return Value(statistics.mean(means), error, (), num_seeds, has_fewer=has_fewer)


def paper_average(published: PublishedRow, indices: Sequence[int | None]) -> Decimal | None:
    """Returns the paper's average over these of its columns; None if one of ours is not in the paper.

    An average over all columns is the printed one, even if it does not follow from the printed values.
    """
    known = [index for index in indices if index is not None]
    if not published.values or not known or len(known) < len(indices):
        return None
    if len(known) == len(published.values) and published.average is not None:
        return published.average
    return round(sum((published.values[index] for index in known), Decimal()) / len(known), 3)
