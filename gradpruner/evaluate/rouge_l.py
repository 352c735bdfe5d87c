"""ROUGE-L of generated answers: F1 of the longest common subsequence of words (Lin, 2004), from rouge-score.

An `evaluate` metric, loaded from this file: `evaluate.load("rouge")` would need the Hub. Like that metric, this one
uses no stemming. The library's words are runs of the letters a to z and digits, so text in another script scores 0.
"""

from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer


class RougeL(evaluate.Metric):
    """Mean ROUGE-L F1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of the longest common subsequence of words, averaged over the pairs.",
            citation="Lin, ROUGE: A package for automatic evaluation of summaries, 2004.",
            inputs_description="predictions and references: lists of strings, of equal length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Returns `rouge_l` in [0, 1], and `rouge_l_rows`, one score per pair."""
        scorer = RougeScorer(["rougeL"], use_stemmer=False)
        rows = [
            float(scorer.score(reference, prediction)["rougeL"].fmeasure)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(rows) / len(rows), "rouge_l_rows": rows}
