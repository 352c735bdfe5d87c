"""The record of a finished run."""

from omegaconf import DictConfig

from experiments.config import identity, resolve
from gradpruner.files import content_hash
from gradpruner.finetune.run import TrainingAccount
from gradpruner.models.shape import config_shape
from gradpruner.pipeline.run import Outcome, Pipeline
from gradpruner.record import RunRecord
from gradpruner.record_sections import TrainingSection, empty_section
from gradpruner.runtime import environment

HISTORY_FILE = "history.json"  # loss and learning rate per optimizer step, beside the record


def finished_record(cfg: DictConfig, pipeline: Pipeline, outcome: Outcome, own_memory: int) -> RunRecord:
    """Assembles the record of a finished run.

    Args:
        cfg: the run's config.
        pipeline: the pipeline built from `cfg`, which has run.
        outcome: what the pipeline found.
        own_memory: bytes that the process held before the run.
    """
    plan = outcome.plan
    num_dense_layers, num_dense_parameters = pipeline.dense_config.num_hidden_layers, pipeline.num_dense_parameters
    return RunRecord(
        status="finished",
        config=resolve(cfg),
        identity=content_hash(identity(cfg)),
        seed=cfg.seed,
        model={
            "name": pipeline.model.name,
            "num_hidden_layers": num_dense_layers,
            "num_parameters": num_dense_parameters,
            "shape": config_shape(pipeline.dense_config).to_dict(),
        },
        pruning={
            "method": plan.method,
            "pruned_layers": list(plan.pruned_layers),
            "absorbed_by": {str(layer): absorber for layer, absorber in plan.absorbed_by.items()},
            "layer_importance": list(plan.layer_importance),
            "num_hidden_layers": len(plan.kept_layers),
            "num_parameters": outcome.num_parameters,
            "shape": outcome.shape.to_dict(),
            "report": outcome.report,
            "recovery": _training_section(outcome.recovery) if outcome.recovery else empty_section(),
        },
        finetune=_training_section(outcome.training),
        metrics=outcome.metrics,
        metrics_before=outcome.metrics_before,
        efficiency={
            "layer_ratio": len(plan.kept_layers) / num_dense_layers,
            "parameter_ratio": outcome.num_parameters / num_dense_parameters,
            "train_tokens_per_second": outcome.training["tokens"] / outcome.training["train_seconds"],
            "compression_seconds": outcome.compression["seconds"],
            "compression_peak_memory_bytes": outcome.compression["peak_memory_bytes"],
            "speed": outcome.speed or empty_section(),
            "process_memory_bytes": own_memory,
            "recovery_seconds": outcome.recovery["train_seconds"] if outcome.recovery else 0.0,
            "stage_seconds": outcome.seconds,
        },
        environment=environment(),
    )


def _training_section(training: TrainingAccount) -> TrainingSection:
    """Returns the account of a training run without its history, which has a file of its own."""
    return {
        "steps": training["steps"],
        "tokens": training["tokens"],
        "train_seconds": training["train_seconds"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "loss": training["loss"],
    }
