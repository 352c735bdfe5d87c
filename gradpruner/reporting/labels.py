"""Display names of methods and metrics, the paper's order of methods, and which metric values may share a column."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.caveats import CAVEATS
from gradpruner.record import RunRecord
from gradpruner.record_sections import Metrics, metric_stderr, metric_value

METRIC_LABELS = {
    "accuracy": "accuracy",
    "accuracy_raw": "acc. raw",
    "accuracy_lenient": "acc. lenient",
    "accuracy_norm": "acc. norm",
    "similarity": "similarity",
    "rouge_l": "ROUGE-L",
    "bertscore_f1": "BERTScore",
    "answer_nll": "answer NLL",
}
# The order is that of rows in tables: the paper's Table 1, with methods that the paper does not have in between.
REPAIRING = ("gradpruner_plus",)  # methods that repair unless told otherwise
METHOD_LABELS = {
    "dense": "Dense",
    "llm_pruner": "LLM-Pruner",
    "laco": "LaCo",
    "minitron": "MINITRON",
    "sat": "SAT (ends dense)",
    "sat_constant": "SAT (no dense tail)",
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
# Variants of a method of the paper that are shown beside its published values, as rows of their own.
VARIANT_OF = {"sat_constant": "sat"}
# Dense in the end, or beyond the paper: these do not compete with the paper's pruning methods for the best value.
NOT_COMPETING = ("dense", "sat", "gradpruner_plus")
SMALLER_IS_BETTER = ("answer_nll",)
WITH_ENCODER = ("similarity", "bertscore_f1")
WITH_ROUGE = ("similarity", "rouge_l")
ACCURACY_MODES = {
    "likelihood": "likeliest option",
    "generate": "exact match of the generated answer",  # of older records, which do not say how
    "generate, raw": "the generated answer equals the reference exactly",
    "generate, lenient": "the generated answer equals the reference but for a capital, quotes or a full stop around it",
}

# Engines besides transformers that generate answers.
ENGINES = {"vllm": "vLLM"}


def method_place(name: str) -> tuple[int, str]:
    """Returns the sorting key of a method: its place in `METHOD_LABELS`; methods without a label come last, by name."""
    order = list(METHOD_LABELS)
    return order.index(name) if name in order else len(order), name


def arrow(metric: str) -> str:
    """Returns the arrow that says whether smaller or larger values of a metric are better."""
    return "↓" if metric in SMALLER_IS_BETTER else "↑"


def caveats(records: Sequence[RunRecord]) -> list[str]:
    """Returns what must be said beside any number of the methods of these runs, each once."""
    return list(dict.fromkeys(CAVEATS[name] for record in records if (name := record.pruning["method"]) in CAVEATS))


def engine_of(record: RunRecord) -> dict[str, str]:
    """Returns `{"engine": name}` if another engine than transformers generated a run's answers, else an empty dict."""
    name = record.config["evaluation"].get("engine")
    return {"engine": name} if name in ENGINES else {}


def engine_in_title(record: RunRecord) -> str:
    """Returns what a title says of the engine: nothing of transformers."""
    return "".join(f", answers by {ENGINES[name]}" for name in engine_of(record).values())


@dataclass(frozen=True)
class MetricColumn:
    """A table column of comparable metric values.

    Attributes:
        metric: key of the value in a record's metrics.
        origin: how all values of the column were measured: the encoder and layer of BERTScore, stemming of ROUGE-L, or
            the accuracy mode; None for metrics that can always be compared.
        label: display name; includes the origin if the table has several for this metric.
    """

    metric: str
    origin: str | None
    label: str

    def cell(self, metrics: Metrics) -> str:
        """Returns the value with its standard error, or a dash if it was not measured or has another origin."""
        value = metric_value(metrics, self.metric)
        if value is None or _origin(self.metric, metrics) != self.origin:
            return "-"
        return f"{value:.3f} ±{metric_stderr(metrics, self.metric):.3f}"


def metric_columns(measured: Sequence[Metrics]) -> list[MetricColumn]:
    """Returns the columns of a table over these metrics, in the order of `METRIC_LABELS`.

    Accuracy by likelihood and by generation get separate columns, and so does BERTScore with different encoders, and
    ROUGE-L with and without stemming. A kind of accuracy that is `accuracy` in all of them gets no second column.
    """
    columns = []
    for metric, label in METRIC_LABELS.items():
        own = [metrics for metrics in measured if metric in metrics]
        if own and all(metric == f"accuracy_{metrics.get('accuracy_match')}" for metrics in own):
            continue
        origins = list(dict.fromkeys(_origin(metric, metrics) for metrics in own))
        for origin in origins:
            is_plain = len(origins) == 1 or origin is None
            columns.append(MetricColumn(metric, origin, label if is_plain else f"{label} ({origin})"))
    return columns


def describe_origins(measured: Sequence[Metrics]) -> list[str]:
    """Returns one sentence for each way in which the values of a table were measured."""
    encoders = dict.fromkeys(_origin("bertscore_f1", metrics) for metrics in measured if "bertscore_encoder" in metrics)
    modes = dict.fromkeys(_origin("accuracy", metrics) for metrics in measured if "accuracy_mode" in metrics)
    sentences = [f"accuracy: {ACCURACY_MODES[mode]}" for mode in modes if mode is not None]
    sentences += [f"BERTScore F1 with {encoder}, not rescaled" for encoder in encoders]
    engines = dict.fromkeys(_engine(metrics) for metrics in measured if "engine" in metrics)
    sentences += [f"answers generated by {engine}" for engine in engines]
    if any(metrics.get("rouge_stemming") for metrics in measured):
        sentences.append("stemmed ROUGE-L: of the stems of words")
    if any("similarity" in metrics for metrics in measured):
        sentences.append("similarity: mean of BERTScore F1 and ROUGE-L")
    return sentences


def _engine(metrics: Metrics) -> str:
    return f"{ENGINES[metrics['engine']]} ({metrics['engine_versions']}) in {metrics['engine_dtype']}"


def _origin(metric: str, metrics: Metrics) -> str | None:
    parts: list[str] = []
    if metric in WITH_ENCODER:
        parts.append(f"{metrics['bertscore_encoder']}, layer {metrics['bertscore_layer']}")
    if metric in WITH_ROUGE and metrics.get("rouge_stemming"):
        parts.append("stemmed")
    if metric == "accuracy":
        parts += [metrics[key] for key in ("accuracy_mode", "accuracy_match") if key in metrics]
    return ", ".join(parts) or None
