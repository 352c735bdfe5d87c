"""Scores of single test rows in a record, as short text, so that runs on the same rows can be compared row by row.

Right and wrong answers are one character per row, `1` and `0`; other scores are numbers of four digits with spaces
between them. The answer NLL has two series: the sum over each row's tokens, and the number of these tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpruner.record import RunRecord
from gradpruner.record_sections import Metrics

ANSWER_NLL, ANSWER_TOKENS = "answer_nll", "answer_tokens"
# Parts of a similarity: tables compare the similarity.
NOT_KEPT = ("rouge_l", "bertscore_f1")
# Metrics of likelihoods -> what a prediction chose by it; the row's score is whether that is the label.
CHOICES = {"accuracy": "prediction", "accuracy_norm": "prediction_norm"}


def row_scores(predictions: Sequence[dict[str, Any]], metrics: Metrics) -> dict[str, str]:
    """Returns the scores of a run's test rows by metric.

    Args:
        predictions: rows of `predictions.jsonl`, in the order of the test rows.
        metrics: metrics of the run; those without a standard error are not means over rows, and are left out.
    """
    found = {}
    for name in sorted(key.removesuffix("_stderr") for key in metrics if key.endswith("_stderr")):
        if name in NOT_KEPT:
            continue
        if name == ANSWER_NLL:
            found[name] = write_numbers(row[name] for row in predictions)
            found[ANSWER_TOKENS] = write_numbers(row[ANSWER_TOKENS] for row in predictions)
        elif all(name in row for row in predictions):
            found[name] = write_numbers(row[name] for row in predictions)
        elif name in CHOICES and all(CHOICES[name] in row for row in predictions):
            found[name] = write_numbers(row[CHOICES[name]] == row["label"] for row in predictions)
    return found


def read_row_scores(record: RunRecord, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Returns sums and weights of a metric: it is the sum of the first over the sum of the second.

    Returns:
        One number per test row in both; None if the record does not have them.
    """
    if metric not in record.row_scores:
        return None
    sums = np.array(read_numbers(record.row_scores[metric]))
    if metric == ANSWER_NLL:
        return sums, np.array(read_numbers(record.row_scores[ANSWER_TOKENS]))
    return sums, np.ones_like(sums)


def write_numbers(values: Iterable[float]) -> str:
    """Returns numbers as text: `0` and `1` alone without spaces, others with four digits and spaces between them."""
    numbers = [float(value) for value in values]
    if set(numbers) <= {0.0, 1.0}:
        return "".join(f"{number:.0f}" for number in numbers)
    text = " ".join(f"{number:.4g}" for number in numbers)
    return f"{text}.0" if set(text) <= {"0", "1"} else text  # a single 100 is not three rows


def read_numbers(text: str) -> list[float]:
    """Returns the numbers that `write_numbers` wrote."""
    if set(text) <= {"0", "1"}:
        return [float(character) for character in text]
    return [float(number) for number in text.split()]
