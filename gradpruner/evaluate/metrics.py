"""From scored examples to metrics, each with its standard error."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any


def likelihood_metrics(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of `likelihood.score_examples`.

    - `accuracy`: share of questions whose option with the highest summed log-likelihood is right.
    - `accuracy_norm`: the same with the sum divided by the option's length in characters, as in lm-evaluation-harness.
    - `majority_accuracy`: what always giving the most frequent label would score, and `chance_accuracy` what guessing
      would: the bars that any model must clear.
    - `answer_nll`: negative log-likelihood of the reference answers per token, over all tokens: the sensitive number at
      small scale. Its standard error is that of a ratio of sums over examples.

    Args:
        predictions: dicts of `score_examples`.

    Returns:
        JSON-ready dict; accuracies only if the examples have options. Standard errors end in `_stderr`.
    """
    count = len(predictions)
    tokens = sum(row["answer_tokens"] for row in predictions)
    nll = sum(row["answer_nll"] for row in predictions) / tokens
    residuals = [row["answer_nll"] - nll * row["answer_tokens"] for row in predictions]
    metrics: dict[str, Any] = {
        "num_examples": count,
        "answer_nll": nll,
        "answer_nll_stderr": math.sqrt(sum(r * r for r in residuals)) / tokens,
    }
    if all(row["prediction"] is not None for row in predictions):
        right = sum(row["prediction"] == row["label"] for row in predictions) / count
        right_norm = sum(row["prediction_norm"] == row["label"] for row in predictions) / count
        labels = Counter(row["label"] for row in predictions)
        metrics |= {
            "accuracy": right,
            "accuracy_stderr": _binomial_stderr(right, count),
            "accuracy_norm": right_norm,
            "accuracy_norm_stderr": _binomial_stderr(right_norm, count),
            "accuracy_mode": "likelihood",
            "majority_accuracy": labels.most_common(1)[0][1] / count,
            "chance_accuracy": sum(1 / len(row["log_likelihoods"]) for row in predictions) / count,
        }
    return metrics


def _binomial_stderr(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
