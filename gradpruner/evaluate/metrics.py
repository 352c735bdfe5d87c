"""Metrics of predictions, each with its standard error.

Metrics of generated text are `evaluate` modules, each in a file next to this one. Metrics of likelihoods are functions
in this file.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import evaluate
import numpy as np

NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 0
ACCURACIES = ("accuracy", "accuracy_raw", "accuracy_lenient")  # fractions of right answers


def likelihood_metrics(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Computes the metrics of log-likelihoods.

    - `accuracy`: fraction of questions whose option with the highest summed log-likelihood is right.
    - `accuracy_norm`: the same with the sum divided by the option's length in characters, as in lm-evaluation-harness.
    - `majority_accuracy` and `chance_accuracy`: see `baselines`.
    - `answer_nll`: see `answer_nll`.

    Args:
        predictions: dicts from `likelihood.Likelihood`.

    Returns:
        JSON-ready dict; accuracies only if the examples have options. Standard errors end in `_stderr`.
    """
    count = len(predictions)
    metrics: dict[str, Any] = {"num_examples": count, **answer_nll(predictions)}
    if all(row["prediction"] is not None for row in predictions):
        right = sum(row["prediction"] == row["label"] for row in predictions) / count
        right_norm = sum(row["prediction_norm"] == row["label"] for row in predictions) / count
        metrics |= {
            "accuracy": right,
            "accuracy_stderr": _binomial_stderr(right, count),
            "accuracy_norm": right_norm,
            "accuracy_norm_stderr": _binomial_stderr(right_norm, count),
            "accuracy_mode": "likelihood",
            **baselines([row["label"] for row in predictions], [len(row["log_likelihoods"]) for row in predictions]),
        }
    return metrics


def text_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    arguments: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Computes the metrics of generated answers.

    - `accuracy_raw`, `accuracy_lenient`: fraction that equals the reference exactly, and once both are normalised.
    - `accuracy`: the one that `accuracy_match` names; `accuracy_mode` is `generate`.
    - `rouge_l`, `bertscore_f1`: means over the answers; `rouge_tokenizer` and `rouge_stemming` say what the words of
      `rouge_l` are.
    - `similarity`: mean of `rouge_l` and `bertscore_f1`, if both are computed (the paper's Section 4.1).

    Args:
        names: which of `accuracy`, `rouge_l`, `bertscore_f1`.
        predictions: generated answers.
        references: reference answers.
        arguments: arguments of the metrics' modules, by metric; `bertscore_f1` needs an encoder.

    Returns:
        The metrics, with standard errors that end in `_stderr` (binomial for accuracy, bootstrap over the answers for
        the other metrics); and the score of each answer, by metric.
    """
    modules = [load_metric(name, **arguments.get(name, {})) for name in names]
    computed = evaluate.combine(modules).compute(predictions=list(predictions), references=list(references))
    rows: dict[str, list[float]] = {
        key.removesuffix("_rows"): values for key, values in computed.items() if key.endswith("_rows")
    }
    if "rouge_l" in rows and "bertscore_f1" in rows:
        rows["similarity"] = [(a + b) / 2 for a, b in zip(rows["rouge_l"], rows["bertscore_f1"], strict=True)]
    metrics: dict[str, Any] = {}
    for name, values in rows.items():
        mean = sum(values) / len(values)
        stderr = _binomial_stderr(mean, len(values)) if name in ACCURACIES else _bootstrap_stderr(values)
        metrics |= {name: mean, f"{name}_stderr": stderr}
    if "accuracy" in rows:
        metrics |= {"accuracy_mode": "generate", "accuracy_match": computed["accuracy_match"]}
    if "rouge_l" in rows:
        metrics |= {name: computed[name] for name in ("rouge_tokenizer", "rouge_stemming")}
    return metrics, rows


def load_metric(name: str, **arguments: Any) -> Any:
    """Loads the `evaluate` module in the file of that name next to this one; needs no network."""
    from gradpruner.evaluate import accuracy, bertscore_f1, rouge_l  # late: bert-score takes seconds to import

    files = {"accuracy": accuracy.__file__, "bertscore_f1": bertscore_f1.__file__, "rouge_l": rouge_l.__file__}
    return evaluate.load(files[name], keep_in_memory=True, **arguments)


def answer_nll(predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the negative log-likelihood of the reference answers per token, over all tokens, in nats.

    The most sensitive metric at small scale. The standard error is that of a ratio of sums over examples.
    """
    tokens = sum(row["answer_tokens"] for row in predictions)
    nll = sum(row["answer_nll"] for row in predictions) / tokens
    residuals = [row["answer_nll"] - nll * row["answer_tokens"] for row in predictions]
    return {"answer_nll": nll, "answer_nll_stderr": math.sqrt(sum(r * r for r in residuals)) / tokens}


def baselines(labels: Sequence[int], num_choices: Sequence[int]) -> dict[str, float]:
    """Returns the scores that any model must exceed.

    - `majority_accuracy`: score of always giving the most frequent label.
    - `chance_accuracy`: expected score of guessing.
    """
    return {
        "majority_accuracy": Counter(labels).most_common(1)[0][1] / len(labels),
        "chance_accuracy": sum(1 / count for count in num_choices) / len(labels),
    }


def _bootstrap_stderr(values: Sequence[float]) -> float:
    """Returns the standard deviation of the mean over resamples with replacement; seeded, so records do not change."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    array = np.asarray(values, dtype=np.float64)
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(NUM_RESAMPLES)]
    return float(np.std(means, ddof=1))


def _binomial_stderr(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
