"""The sections of a record and their keys, from the stage that writes a value to the table that shows it.

Counts start with `num_`; times end in `_seconds`, memory in `_bytes`; layers are 0-based positions in the dense model.
"""

from typing import Any, NotRequired, TypedDict


class ShapeSection(TypedDict):
    """Sizes of a decoder, as `ModelShape.to_dict` writes them; lists have one entry per layer."""

    hidden_size: int
    num_attention_heads: list[int]
    num_key_value_heads: list[int]
    intermediate_size: list[int]


class ModelSection(TypedDict):
    """The dense model.

    Attributes:
        name: short name, such as `smollm2_135m`.
        num_hidden_layers: decoder layers.
        num_parameters: all parameters.
        num_parameters_without_embedding: all but the input embedding, as in Table 11; older records lack it.
        num_macs: multiply-accumulates of a forward pass over one row of `counting.ROW_LENGTH` tokens, attention and
            output head included; older records lack it.
        shape: its sizes.
        commit: of a model from the Hub; older records lack it.
        chat_template_date: the date that its chat template prints, if one is used.
    """

    name: str
    num_hidden_layers: int
    num_parameters: int
    num_parameters_without_embedding: NotRequired[int]
    num_macs: NotRequired[int]
    shape: ShapeSection
    commit: NotRequired[str]
    chat_template_date: NotRequired[str]


class TrainingSection(TypedDict):
    """One training run: the fine-tune, or the recovery between pruning and the fine-tune.

    Attributes:
        steps: optimizer steps.
        tokens: training tokens, without padding.
        train_seconds: wall time.
        peak_memory_bytes: highest memory of the process.
        loss: mean over the last tenth of the steps.
        losses: loss of each optimizer step, numbers with spaces between them; older records lack it.
        precision: how weights were held and updated, see `finetune.precision`; older records lack it.
        micro_batch_size: rows per forward pass, the number chosen where the setting is `auto`; older records lack it.
        num_processes: number of processes, if there were several; times and memory are those of rank 0.
        update_survival: fraction of a LoRA update that a merged checkpoint keeps, see `finetune.result`.
    """

    steps: int
    tokens: int
    train_seconds: float
    peak_memory_bytes: int
    loss: float
    losses: NotRequired[str]
    precision: NotRequired[str]
    micro_batch_size: NotRequired[int]
    num_processes: NotRequired[int]
    update_survival: NotRequired[float]


class SearchReport(TypedDict):
    """Search for the number of layers to prune (`sparsity=auto`), in answer NLL (nats per token).

    Attributes:
        num_pruned_layers: the number found.
        dense: NLL of the dense model.
        limit: highest NLL allowed.
        curve: NLL by number of layers pruned, for the numbers tried.
    """

    num_pruned_layers: int
    dense: float
    limit: float
    curve: dict[str, float]


class MethodReport(TypedDict, total=False):
    """What a method reports besides its plan. Every key is optional: each method reports what it has.

    Attributes:
        losses: training loss of each importance step.
        train_seconds: wall time of the importance run.
        peak_memory_bytes: highest memory of the importance run.
        step_importance: importance per step and layer, (t, L).
        prefix_overlap: per step, the fraction of the final pruned set that the steps so far choose; None without
            gradient.
        halves_overlap: fraction of pruned layers on which both halves of the steps agree; None without gradient.
        top_step_share: fraction of gradient energy in the strongest tenth of the steps.
        pruned_probability: per layer, how often resampled steps prune it.
        undecided_layers: layers that resampled steps prune in some draws only.
        warnings: sentences for the user.
        notes: sentences about how to read the result.
        search: how `sparsity=auto` found the number of layers.
        candidates: sets of layers that competed, the chosen one first; see `candidates.Choice`.
        kept_part: APT: fraction of `groups`, `channels` and `hidden` kept.
        cuts: APT: one dict per pruning step.
        evaluations: APT: `step`, `answer_nll` and `is_teacher` for every state of the model that could be the teacher.
    """

    losses: list[float]
    train_seconds: float
    peak_memory_bytes: int
    step_importance: list[list[float]]
    prefix_overlap: list[float | None]
    halves_overlap: float | None
    top_step_share: float
    pruned_probability: list[float]
    undecided_layers: list[int]
    warnings: list[str]
    notes: list[str]
    search: SearchReport
    candidates: dict[str, Any]
    kept_part: dict[str, float]
    cuts: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class PruningSection(TypedDict):
    """The pruned model, and how it came about.

    Attributes:
        method: name of the method, as in `conf/method/`.
        pruned_layers: pruned layers, ascending.
        absorbed_by: for each layer chosen to merge, the kept layer that absorbs it, or None if it was dropped unmerged.
        layer_importance: one score per dense layer; empty for methods without scores.
        num_hidden_layers: decoder layers kept.
        num_parameters: parameters after pruning.
        num_parameters_without_embedding: as in `ModelSection`; older records lack it.
        num_macs: as in `ModelSection`; older records lack it.
        shape: sizes after pruning.
        report: what the method reported.
        recovery: training on other data between pruning and the fine-tune; `{}` if there was none.
    """

    method: str
    pruned_layers: list[int]
    absorbed_by: dict[str, int | None]
    layer_importance: list[float]
    num_hidden_layers: int
    num_parameters: int
    num_parameters_without_embedding: NotRequired[int]
    num_macs: NotRequired[int]
    shape: ShapeSection
    report: MethodReport
    recovery: TrainingSection


class Metrics(TypedDict):
    """Metrics of one evaluation; see `gradpruner.evaluate.metrics`. Each `*_stderr` is a standard error over test rows.

    Attributes:
        num_examples: test rows.
        answer_nll: negative log-likelihood of the reference answers, in nats per token.
        accuracy: fraction of right answers.
        accuracy_mode: how accuracy was measured: `likelihood` or `generate`.
        accuracy_match: which of the next two `accuracy` is, `raw` or `lenient`, where answers are generated. Older
            records lack it and the two: their accuracy ignored case, and signs and symbols at both ends.
        accuracy_raw: fraction of generated answers that equal the reference exactly.
        accuracy_lenient: fraction that equals it once both are normalised (`evaluate.accuracy`).
        accuracy_norm: accuracy by log-likelihood per character of the option.
        majority_accuracy: accuracy of always giving the most frequent label.
        chance_accuracy: accuracy of guessing.
        rouge_l: mean ROUGE-L of generated answers.
        rouge_tokenizer: name of the rules that split the text into words (`evaluate.rouge_l`); older records lack it.
        rouge_stemming: whether stems were compared; older records lack it, theirs were not.
        bertscore_f1: mean BERTScore F1 of generated answers.
        bertscore_encoder: name of the encoder of BERTScore.
        bertscore_layer: layer of that encoder.
        similarity: mean of BERTScore F1 and ROUGE-L (the paper's Section 4.1).
        finished: fraction of generated answers that the model ended by itself.
        engine: what generated the answers, `vllm`; transformers' own generation is not named.
        engine_versions: of that engine and what it computes with.
        engine_dtype: dtype that it computes in.
    """

    num_examples: int
    answer_nll: NotRequired[float]
    answer_nll_stderr: NotRequired[float]
    accuracy: NotRequired[float]
    accuracy_stderr: NotRequired[float]
    accuracy_mode: NotRequired[str]
    accuracy_match: NotRequired[str]
    accuracy_raw: NotRequired[float]
    accuracy_raw_stderr: NotRequired[float]
    accuracy_lenient: NotRequired[float]
    accuracy_lenient_stderr: NotRequired[float]
    accuracy_norm: NotRequired[float]
    accuracy_norm_stderr: NotRequired[float]
    majority_accuracy: NotRequired[float]
    chance_accuracy: NotRequired[float]
    rouge_l: NotRequired[float]
    rouge_l_stderr: NotRequired[float]
    rouge_tokenizer: NotRequired[str]
    rouge_stemming: NotRequired[bool]
    bertscore_f1: NotRequired[float]
    bertscore_f1_stderr: NotRequired[float]
    bertscore_encoder: NotRequired[str]
    bertscore_layer: NotRequired[int]
    similarity: NotRequired[float]
    similarity_stderr: NotRequired[float]
    finished: NotRequired[float]
    engine: NotRequired[str]
    engine_versions: NotRequired[str]
    engine_dtype: NotRequired[str]


class PhaseSection(TypedDict):
    """Timing of one phase of one model, as `pipeline.speed.Phase.to_dict` writes it.

    Attributes:
        median_seconds: median over the repeats.
        quartile_seconds: first and third quartile.
        tokens_per_second: tokens of one repeat over `median_seconds`.
        peak_memory_bytes: highest memory above what the process had before the model was built.
        repeats: timed repeats.
    """

    median_seconds: float
    quartile_seconds: list[float]
    tokens_per_second: float
    peak_memory_bytes: int
    repeats: int


class RatioSection(TypedDict):
    """Time and memory of one phase as fractions of the dense model's."""

    time: float
    memory: float


class SpeedSection(TypedDict):
    """The dense model and this one, timed in turns in separate processes.

    Attributes:
        workload: rows, tokens and settings that were timed.
        dense: the dense model, by phase: `prefill`, `decode` and, unless the method prunes while it trains, `train`.
        own: the compressed model, by phase.
        ratios: `own` over `dense`, by phase.
    """

    workload: dict[str, Any]
    dense: dict[str, PhaseSection]
    own: dict[str, PhaseSection]
    ratios: dict[str, RatioSection]


class EfficiencySection(TypedDict):
    """What compression saves and costs.

    Attributes:
        layer_ratio: layers kept over dense layers.
        parameter_ratio: parameters after pruning over dense parameters.
        compression_seconds: wall time of measuring, pruning and repair, without loading the model.
        compression_peak_memory_bytes: highest memory in these stages.
        recovery_seconds: wall time of the recovery; 0 if there was none.
        stage_seconds: wall time of each stage that the run has, when it was computed, loading models included; older
            records lack those of pruning, repair and recovery.
        train_tokens_per_second: throughput of the fine-tune; older records lack it.
        process_memory_bytes: memory of the process before the run; older records lack it.
        speed: timing; `{}` if it was not asked for. Older records lack it.
    """

    layer_ratio: float
    parameter_ratio: float
    compression_seconds: float
    compression_peak_memory_bytes: int
    recovery_seconds: float
    stage_seconds: dict[str, float]
    train_tokens_per_second: NotRequired[float]
    process_memory_bytes: NotRequired[int]
    speed: NotRequired[SpeedSection]


class ContentSection(TypedDict):
    """Weights and data that a run was made from, as hashes: what may change under the same paths.

    Attributes:
        model: weights and tokenizer of the model that the method starts from, see `ModelSpec.fingerprint`.
        train_rows: tokenized training rows.
        test_rows: rendered test examples.
        recovery_rows: tokenized rows of the recovery; missing if there was none.
        encoder: weights of BERTScore's encoder; missing if there was none.
    """

    model: str
    train_rows: str
    test_rows: str
    recovery_rows: NotRequired[str]
    encoder: NotRequired[str]


class EnvironmentSection(TypedDict):
    """Versions, hardware and commit, as `runtime.environment` finds them.

    Attributes:
        python: version of Python.
        platform: operating system.
        packages: versions by package.
        device: name of the GPU, or `cpu` with the architecture.
        num_threads: threads of torch.
        git_commit: commit of the code; None where there is no repository.
        git_dirty: whether there were uncommitted changes.
    """

    python: str
    platform: str
    packages: dict[str, str]
    device: str
    num_threads: int
    git_commit: str | None
    git_dirty: bool


def empty_section() -> Any:
    """Returns `{}` as a section of any type, for a section without content (see `RunRecord`)."""
    return {}


def metric_value(metrics: Metrics, name: str) -> float | None:
    """Returns the metric `name`, or None if it was not measured."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) else None


def metric_stderr(metrics: Metrics, name: str) -> float:
    """Returns the standard error of the metric `name`.

    Raises:
        KeyError: if `name` was not measured, or has no standard error.
    """
    error = metric_value(metrics, f"{name}_stderr")
    if error is None:
        raise KeyError(f"{name}_stderr")
    return error
