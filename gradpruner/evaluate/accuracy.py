"""Accuracy of generated answers: the fraction that equals the reference once both are normalised.

An `evaluate` metric, loaded from this file: `evaluate.load("gradpruner/evaluate/accuracy.py")`.
"""

import re
import unicodedata
from typing import Any

import datasets
import evaluate

_EDGES = re.compile(r"^\W+|\W+$")


def normalise(text: str) -> str:
    """Returns the text to compare: Unicode-normalised, case-folded, single spaces, no punctuation at the ends.

    A model is not penalised for an added full stop or capital. Articles and inner punctuation are kept, because options
    may differ in just these. Text without a letter or digit keeps its punctuation.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _EDGES.sub("", folded) or folded


class Accuracy(evaluate.Metric):
    """Exact match of normalised texts, see `normalise`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of generated answers that equal their reference once both are normalised.",
            citation="",
            inputs_description="predictions and references: lists of strings, of equal length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Returns `accuracy` in [0, 1], and `accuracy_rows`, 0.0 or 1.0 per pair."""
        rows = [
            float(normalise(prediction) == normalise(reference))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"accuracy": sum(rows) / len(rows), "accuracy_rows": rows}
