"""Display names of methods and metrics, the paper's order, and which values may share a column of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = {
    "accuracy": "accuracy",
    "accuracy_norm": "acc. norm",
    "similarity": "similarity",
    "rouge_l": "ROUGE-L",
    "bertscore_f1": "BERTScore",
    "answer_nll": "answer NLL",
}
# In the order of the paper's Table 1, with what the paper does not have in between.
METHODS = {
    "dense": "Dense",
    "llm_pruner": "LLM-Pruner",
    "laco": "LaCo",
    "minitron": "MINITRON",
    "sat": "SAT (ends dense)",
    "apt": "APT",
    "apt_fast": "APT, fast",
    "small_dense": "FT(smaller model)",
    "shortgpt": "ShortGPT",
    "angular": "Angular distance",
    "perplexity": "Perplexity",
    "taylor_depth": "Taylor (full gradient)",
    "magnitude": "Magnitude",
    "last": "Last but the final one",
    "random": "Random",
    "kernel_igia": "Kernel pruning by IGIA",
    "igia_only": "GradPruner w/o merging",
    "gradpruner": "GradPruner",
    "gradpruner_plus": "GradPruner+",
}
WITH_ENCODER = ("similarity", "bertscore_f1")
ACCURACY_MODES = {"likelihood": "likeliest option", "generate": "exact match of the generated answer"}


def method_place(name: str) -> tuple[int, str]:
    """Sorting key of methods: the paper's order, then those that it has no place for, by name."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS), name


@dataclass(frozen=True)
class Column:
    """Values that can be compared.

    Attributes:
        metric: key of the value in a record's metrics.
        origin: what a value must share with its column: the encoder and layer of BERTScore, or how accuracy was
            measured; None where all values of the metric can be compared.
        label: display name; says the origin where the table has several.
    """

    metric: str
    origin: str | None
    label: str

    def cell(self, metrics: dict[str, Any]) -> str:
        """The value with its standard error, or a dash."""
        if self.metric not in metrics or _origin(self.metric, metrics) != self.origin:
            return "-"
        return f"{metrics[self.metric]:.3f} ±{metrics[self.metric + '_stderr']:.3f}"


def metric_columns(records: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns of a table over the metrics of these records, in a fixed order.

    Accuracies by likelihood and by generation, and values of different encoders, come into columns of their own.
    """
    columns = []
    for metric, label in METRICS.items():
        origins = list(dict.fromkeys(_origin(metric, metrics) for metrics in records if metric in metrics))
        for origin in origins:
            columns.append(Column(metric, origin, label if len(origins) == 1 else f"{label} ({origin})"))
    return columns


def describe_origins(records: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each way in which values of a table were measured."""
    encoders = dict.fromkeys(_origin("similarity", metrics) for metrics in records if "bertscore_encoder" in metrics)
    modes = dict.fromkeys(metrics["accuracy_mode"] for metrics in records if "accuracy_mode" in metrics)
    return [
        *(f"accuracy: {ACCURACY_MODES[mode]}" for mode in modes),
        *(f"BERTScore F1 with {encoder}, not rescaled" for encoder in encoders),
        *(["similarity: mean of BERTScore F1 and ROUGE-L"] if any("similarity" in m for m in records) else []),
    ]


def _origin(metric: str, metrics: dict[str, Any]) -> str | None:
    if metric in WITH_ENCODER:
        return f"{metrics['bertscore_encoder']}, layer {metrics['bertscore_layer']}"
    return metrics.get("accuracy_mode") if metric == "accuracy" else None
