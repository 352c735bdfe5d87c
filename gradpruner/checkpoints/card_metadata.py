"""The metadata at the top of a model card, as the Hugging Face Hub reads it: base model, licence, tags, results."""

from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from gradpruner.models.origin import Origin
from gradpruner.plan import PruningPlan
from gradpruner.record_sections import Metrics, metric_stderr, metric_value

# Metric of a record -> the Hub's name for its kind, and its name in tables.
METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "accuracy_norm": ("accuracy", "Accuracy, by log-likelihood per character"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "bertscore_f1": ("bertscore", "BERTScore F1"),
    "similarity": ("similarity", "Mean of ROUGE-L and BERTScore F1"),
    "answer_nll": ("nll", "NLL of the reference answers, nats per token"),
}
TASK = ("text-generation", "Text generation")


@dataclass(frozen=True)
class Results:
    """Results of a saved model on one dataset.

    Attributes:
        dataset: name of the dataset.
        dataset_id: its id on the Hub, or None.
        metrics: metrics on its test rows.
    """

    dataset: str
    dataset_id: str | None
    metrics: Metrics

    def rows(self) -> list[tuple[str, str, float, float]]:
        """Returns the Hub's kind, the name, the value and the standard error of every metric that there is."""
        found = []
        for key, (kind, name) in METRICS.items():
            value = metric_value(self.metrics, key)
            if value is not None:
                found.append((kind, name, value, metric_stderr(self.metrics, key)))
        return found


def card_metadata(plan: PruningPlan, name: str, origin: Origin, results: Results | None, is_stock: bool) -> str:
    """Returns the YAML block that a card begins with, dashes included.

    Args:
        plan: which layers were pruned and merged.
        name: name of the saved model.
        origin: of the dense model.
        results: results of the saved model, if it was evaluated.
        is_stock: whether plain transformers loads the checkpoint.
    """
    evaluated = _eval_results(results) if results else []
    data = ModelCardData(
        base_model=origin.hub_id,
        datasets=[results.dataset_id] if results and results.dataset_id else None,
        eval_results=evaluated or None,
        library_name="transformers" if is_stock else "gradpruner",
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        model_name=name,
        pipeline_tag=TASK[0],
        tags=["gradpruner", "pruning", plan.method.replace("_", "-")],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _eval_results(results: Results) -> list[EvalResult]:
    """Returns the results as entries of the metadata's `model-index`."""
    return [
        EvalResult(
            task_type=TASK[0],
            task_name=TASK[1],
            dataset_type=results.dataset_id or results.dataset,
            dataset_name=results.dataset,
            dataset_split="test",
            metric_type=kind,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for kind, metric, value, _ in results.rows()
    ]
