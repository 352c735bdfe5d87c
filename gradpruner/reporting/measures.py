"""How the paper measured each dataset, and whether a value of ours was measured in the same way.

The paper's value stands beside ours only then.
"""

from collections.abc import Mapping
from typing import Any

from gradpruner import tasks

# Datasets that the paper measures by similarity (Section 4.1); the others by accuracy. Runs that did not generate text
# have accuracy on these, too.
BY_SIMILARITY = ("pubmedqa", "medmcqa", "billsum", "fingpt")
PAPER_ENCODER = "roberta-large"  # of bert-score for English


def paper_metrics(dataset: str) -> tuple[str, ...]:
    """Returns the metrics of a dataset in the order in which a column of a table shows one: the paper's first."""
    return ("similarity", "accuracy") if dataset in BY_SIMILARITY else ("accuracy", "similarity")


def why_not_comparable(dataset: str, metric: str, metrics: Mapping[str, Any]) -> str | None:
    """Returns why the paper's value must not stand beside one of ours, or None if it may.

    The paper's measures are those of its public evaluation: similarity of BERTScore with roberta-large and of ROUGE-L
    with stemming, accuracy as equality of the generated answer and the reference.

    Args:
        dataset: name of the dataset that the run was tested on, as in `conf/dataset/`.
        metric: key of our value in `metrics`.
        metrics: all metrics of the run, `record_sections.Metrics`.
    """
    if not _is_papers_task(dataset):
        return f"the paper's task on {dataset} was another one"
    if dataset in BY_SIMILARITY:
        if metric != "similarity":
            return "ours is the accuracy of the chosen option, the paper's the mean of BERTScore and ROUGE-L"
        if metrics.get("bertscore_encoder") != PAPER_ENCODER:
            return f"our BERTScore is of {metrics.get('bertscore_encoder')}, the paper's of {PAPER_ENCODER}"
        return None if metrics.get("rouge_stemming") else "our ROUGE-L is of words, the paper's of their stems"
    if metric != "accuracy":
        return f"ours is {metric}, the paper's accuracy"
    if metrics.get("accuracy_mode") != "generate":
        return "ours is the likeliest option, the paper's the exact match of a generated answer"
    return None if metrics.get("accuracy_match") == "raw" else "our match of answers is lenient, the paper's exact"


def _is_papers_task(dataset: str) -> bool:
    """Returns whether the paper's prompt and reference can have been ours; True for datasets that it does not have."""
    own = [
        value
        for value in vars(tasks).values()
        if isinstance(value, type) and value.__module__ == f"{tasks.__name__}.{dataset}"
    ]
    return all(getattr(task, "paper_comparable", True) for task in own)
