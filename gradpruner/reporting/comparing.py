"""Errors of means over seeds, and differences between two methods with their intervals.

Two methods that were tested on the same rows are compared row by row: a question that is hard for one is hard for the
other, so the difference is known far better than either value.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradpruner.record import RunRecord
from gradpruner.reporting.row_scores import read_row_scores

SPREAD_NOTE = (
    "± is the standard error of the mean: where n is given, the standard deviation over n seeds / √n, "
    "else the error over test rows"
)
LEVEL = 0.05
QUANTILE = statistics.NormalDist().inv_cdf(1 - LEVEL / 2)
NUM_RESAMPLES = 2000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Difference:
    """Difference of a metric between two methods, or its mean over datasets.

    Attributes:
        value: first minus second.
        low: lower end of the 95 % interval.
        high: upper end.
        is_paired: whether the values were compared row by row.
        p_value: of McNemar's exact test; None where the interval decides.
    """

    value: float
    low: float
    high: float
    is_paired: bool
    p_value: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the two can be told apart at a level of 5 %."""
        return self.p_value < LEVEL if self.p_value is not None else not self.low <= 0 <= self.high


def seeds_error(runs: Sequence[RunRecord], metric: str) -> float:
    """Returns the standard error of the mean over seeds; 0 for a single run, whose seeds' deviation is not known."""
    values = [value for run in runs if (value := run.metric(metric)) is not None]
    return error_of_mean(values) if len(values) > 1 else 0.0


def error_of_mean(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of two or more values: their deviation over the root of their number."""
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_error(runs: Sequence[RunRecord], metric: str) -> float:
    """Returns the standard error of a mean over seeds; for a single run, its standard error over test rows."""
    return seeds_error(runs, metric) if len(runs) > 1 else runs[0].stderr(metric)


def complete_error(runs: Sequence[RunRecord], metric: str) -> float:
    """Returns the standard error of a mean over seeds for other test rows and other seeds.

    Seeds share their test rows, so more seeds make the error over rows no smaller.
    """
    return math.hypot(seeds_error(runs, metric), statistics.mean(run.stderr(metric) for run in runs))


def difference(first: Sequence[RunRecord], second: Sequence[RunRecord], metric: str) -> Difference:
    """Returns the difference between the means of two methods.

    With scores of the same test rows it is paired: McNemar's exact test for single runs and right or wrong answers, and
    for the interval a bootstrap over the rows, in which each row has its mean over the seeds. Where each seed drew test
    rows of its own, runs of the same seed are paired. Without, the errors over test rows count as independent, which
    makes the interval too wide. The error over seeds is added to all of them.

    Args:
        first: runs of one method on one dataset, which differ in the seed; all have measured `metric`.
        second: runs of the other on that dataset.
        metric: key in the records' metrics.
    """
    value = _mean(first, metric) - _mean(second, metric)
    of_seeds = math.hypot(seeds_error(first, metric), seeds_error(second, metric))
    scores = _paired_scores([*first, *second], metric)
    if scores is None and (by_seed := _paired_by_seed(first, second, metric)) is not None:
        low, high = _interval_of_seeds(by_seed)
        return Difference(value, low, high, is_paired=True)
    if scores is None:
        of_rows = [statistics.mean(run.stderr(metric) for run in runs) for runs in (first, second)]
        reach = QUANTILE * math.hypot(of_seeds, *of_rows)
        return Difference(value, value - reach, value + reach, is_paired=False)
    sums, weights = scores
    gains = sums[: len(first)].mean(0) - sums[len(first) :].mean(0)  # (N,)
    low, high = _interval(_resampled(gains, weights), of_seeds)
    p_value = None
    if len(first) == len(second) == 1 and bool(np.isin(sums, (0.0, 1.0)).all()):
        p_value = mcnemar(int((gains > 0).sum()), int((gains < 0).sum()))
    return Difference(value, low, high, is_paired=True, p_value=p_value)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """Returns the mean of differences on several datasets, which are independent of each other."""
    value = statistics.mean(each.value for each in differences)
    reach = math.hypot(*((each.high - each.low) / 2 for each in differences)) / len(differences)
    return Difference(value, value - reach, value + reach, all(each.is_paired for each in differences))


def interval_note(are_paired: Sequence[bool]) -> str:
    """Returns the note on the intervals of differences, by whether each is paired."""
    if all(are_paired):
        how = "paired on the same test rows: bootstrap over the rows, ≠ by McNemar's exact test for single runs"
    else:
        how = "unpaired where runs have no scores of the same rows" + ("" if any(are_paired) else ", as all of these")
    return f"in brackets: the 95 % interval, {how}"


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided: a binomial test of the rows on which two runs differ.

    Args:
        only_first: rows that only the first run got right.
        only_second: rows that only the second run got right.
    """
    count = only_first + only_second
    ways = tail = 1  # binomial coefficients, one from the other: thousands of rows may differ
    for right in range(min(only_first, only_second)):
        ways = ways * (count - right) // (right + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**count))


def _mean(runs: Sequence[RunRecord], metric: str) -> float:
    return statistics.mean(value for run in runs if (value := run.metric(metric)) is not None)


def _paired_scores(runs: Sequence[RunRecord], metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Returns the runs' scores (runs, N) and the rows' weights (N,); None unless all have those of the same rows."""
    known = [read_row_scores(run, metric) for run in runs]
    rows = {run.content.get("test_rows") for run in runs}
    if len(rows) > 1 or None in rows:
        return None
    scores = [each for each in known if each is not None]
    if len(scores) < len(runs) or any(not np.array_equal(weights, scores[0][1]) for _, weights in scores):
        return None
    return np.stack([sums for sums, _ in scores]), scores[0][1]


def _paired_by_seed(
    first: Sequence[RunRecord], second: Sequence[RunRecord], metric: str
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]] | None:
    """Returns gains and weights of the rows of each seed; None unless both have the same seeds, on the same rows."""
    own, others = ({run.seed: run for run in runs} for runs in (first, second))
    if own.keys() != others.keys() or len(own) < len(first) or len(others) < len(second):
        return None
    pairs = [_paired_scores([own[seed], others[seed]], metric) for seed in sorted(own)]
    known = [(sums[0] - sums[1], weights) for sums, weights in (pair for pair in pairs if pair is not None)]
    return known if len(known) == len(pairs) else None


def _interval_of_seeds(by_seed: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over seeds of their differences, each on rows of its own.

    Differences of seeds vary by their rows, too, so only what they vary beyond that is added as the error over seeds.
    """
    resampled = np.mean([_resampled(gains, weights, seed) for seed, (gains, weights) in enumerate(by_seed)], axis=0)
    of_both = error_of_mean([float(gains.sum() / weights.sum()) for gains, weights in by_seed])
    return _interval(resampled, math.sqrt(max(0.0, of_both**2 - float(resampled.var()))))


def _resampled(gains: NDArray[np.float64], weights: NDArray[np.float64], stream: int = 0) -> NDArray[np.float64]:
    """Returns sum(gains) / sum(weights) over resampled rows, (resamples,)."""
    generator = np.random.default_rng(BOOTSTRAP_SEED + stream)
    # Equal rows are drawn together: right and wrong answers are three kinds of row.
    kinds, counts = np.unique(np.stack([gains, weights]), axis=1, return_counts=True)
    drawn = generator.multinomial(len(gains), counts / len(gains), size=NUM_RESAMPLES)  # (resamples, kinds)
    means: NDArray[np.float64] = drawn @ kinds[0] / (drawn @ kinds[1])
    return means


def _interval(means: NDArray[np.float64], of_seeds: float) -> tuple[float, float]:
    """Returns the 95 % interval of resampled means, with the error over seeds added."""
    if of_seeds:
        means = means + np.random.default_rng(BOOTSTRAP_SEED + NUM_RESAMPLES).normal(0, of_seeds, len(means))
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)
