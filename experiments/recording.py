"""The record of a finished run, and whether an earlier one still holds."""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from experiments.config import identity, resolve
from gradpruner.checkpoints.card_metadata import Results
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import content_hash, read_jsonl
from gradpruner.finetune.result import PLAN_FILE, TrainingAccount
from gradpruner.models.chat_template import CHAT_TEMPLATE_DATE
from gradpruner.models.counting import ROW_LENGTH, count_model
from gradpruner.models.shape import config_shape
from gradpruner.pipeline.run import Outcome, Pipeline
from gradpruner.pipeline.runner import LIBRARIES
from gradpruner.record import RECORD_FILE, RunRecord, portable
from gradpruner.record_sections import Metrics, ModelSection, TrainingSection, empty_section
from gradpruner.reporting.changed_answers import QUESTIONS_FILE
from gradpruner.reporting.row_scores import row_scores, write_numbers
from gradpruner.runtime import environment

HISTORY_FILE = "history.json"  # loss and learning rate per optimizer step, beside the record
LOSS_PICTURE = "loss.png"
IMPORTANCE_PICTURE = "importance.png"
CHECKPOINT = "checkpoint"  # folder
PUSHED_FILE = "pushed.json"  # there once the checkpoint is on the Hub
TRACKED_FILE = "tracker.json"  # there once a tracker has the run
TENSORBOARD_FOLDER = "tensorboard"
RUNNING_FILE = "running.lease"  # there while a process runs into the folder, see gradpruner.lease
RESULTS = (
    *(RECORD_FILE, PLAN_FILE, PREDICTIONS_FILE, QUESTIONS_FILE, HISTORY_FILE, LOSS_PICTURE, IMPORTANCE_PICTURE),
    *(CHECKPOINT, TRACKED_FILE, PUSHED_FILE, TENSORBOARD_FOLDER),
)
# Key of a record's content -> name in messages.
CONTENT_NAMES = {
    "model": "the model",
    "train_rows": "the training rows",
    "test_rows": "the test rows",
    "recovery_rows": "the rows of the recovery",
    "encoder": "BERTScore's encoder",
}


def finished_record(cfg: DictConfig, pipeline: Pipeline, outcome: Outcome, own_memory: int) -> RunRecord:
    """Assembles the record of a finished run.

    Args:
        cfg: the run's config.
        pipeline: the pipeline built from `cfg`, which has run.
        outcome: what the pipeline found.
        own_memory: bytes that the process held before the run.
    """
    plan = outcome.plan
    counts = count_model(pipeline.config, outcome.shape)
    num_dense_layers, num_dense_parameters = pipeline.dense_config.num_hidden_layers, pipeline.num_dense_parameters
    return RunRecord(
        status="finished",
        config=portable(resolve(cfg)),
        identity=content_hash(identity(cfg)),
        seed=cfg.seed,
        model=_model_section(pipeline),
        pruning={
            "method": plan.method,
            "pruned_layers": list(plan.pruned_layers),
            "absorbed_by": {str(layer): absorber for layer, absorber in plan.absorbed_by.items()},
            "layer_importance": list(plan.layer_importance),
            "num_hidden_layers": len(plan.kept_layers),
            "num_parameters": outcome.num_parameters,
            "num_parameters_without_embedding": counts.num_parameters_without_embedding,
            "num_macs": counts.macs(1, ROW_LENGTH),
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
        content=pipeline.content,
        stage_ids=pipeline.stage_ids(),
        row_scores=row_scores(read_jsonl(outcome.predictions), outcome.metrics),
    )


def card_results(pipeline: Pipeline, metrics: Metrics) -> Results:
    """Returns the results for the card of a checkpoint."""
    task = pipeline.tested_task
    dataset_id = getattr(task, "hub_id", None) if task.source in ("hub", "packaged") else None
    return Results(task.name, dataset_id, metrics)


def changed_content(record: RunRecord, pipeline: Pipeline) -> list[str]:
    """Returns names of what changed under the same paths since a run finished; none for a record without content."""
    if record.status != "finished" or not record.content:
        return []
    before, now = dict(record.content), dict(pipeline.content)
    return [name for key, name in CONTENT_NAMES.items() if before.get(key) != now.get(key)]


def changed_stages(record: RunRecord, pipeline: Pipeline) -> list[str]:
    """Returns the stages whose key changed since a run finished; none for a record without stage ids."""
    if not record.stage_ids:
        return []
    return [name for name, id_ in pipeline.stage_ids().items() if record.stage_ids.get(name) != id_]


def describe_other_environment(record: RunRecord) -> str:
    """Returns in what a run with other stage keys differs from this process: libraries, device, or else the code."""
    before, now = record.environment, environment()
    names = [
        f"{name} {before['packages'].get(name)} (now {now['packages'].get(name)})"
        for name in LIBRARIES
        if before["packages"].get(name) != now["packages"].get(name)
    ]
    if before["device"].startswith("cpu") != now["device"].startswith("cpu"):
        names.append(f"{before['device']} (now {now['device']})")
    old, new = (str(each["git_commit"])[:7] + "+" * each["git_dirty"] for each in (before, now))
    return ", ".join(names) or "other code" + (f" (commit {old}, now {new})" if old != new else "")


def is_complete(record: RunRecord, run_dir: Path, cfg: DictConfig) -> bool:
    """Returns whether a run has finished and has the checkpoint and the speed that `cfg` asks for."""
    if cfg.save_checkpoint and not (run_dir / CHECKPOINT).is_dir():
        return False
    if cfg.measure_speed and not record.efficiency.get("speed"):
        return False
    return record.status == "finished"


def remove_results(run_dir: Path) -> None:
    """Deletes what a finished run wrote into its folder, except its log; other files of the folder are unchanged."""
    for path in (run_dir / name for name in RESULTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _model_section(pipeline: Pipeline) -> ModelSection:
    """Returns the dense model, with what pins it down: the commit on the Hub and the date in its chat template."""
    counts = count_model(pipeline.dense_config)
    section: ModelSection = {
        "name": pipeline.model.name,
        "num_hidden_layers": pipeline.dense_config.num_hidden_layers,
        "num_parameters": pipeline.num_dense_parameters,
        "num_parameters_without_embedding": counts.num_parameters_without_embedding,
        "num_macs": counts.macs(1, ROW_LENGTH),
        "shape": config_shape(pipeline.dense_config).to_dict(),
    }
    if commit := pipeline.model.commit(pipeline.assets_dir):
        section["commit"] = commit
    if pipeline.model.chat_template:
        section["chat_template_date"] = CHAT_TEMPLATE_DATE
    return section


def _training_section(training: TrainingAccount) -> TrainingSection:
    """Returns the account of a training run; of its history, which has a file of its own, the losses alone."""
    section: TrainingSection = {
        "steps": training["steps"],
        "tokens": training["tokens"],
        "train_seconds": training["train_seconds"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "loss": training["loss"],
        "losses": write_numbers([entry["loss"] for entry in training["history"]]),
        "precision": training["precision"],
        "micro_batch_size": training["micro_batch_size"],
    }
    if "num_processes" in training:
        section["num_processes"] = training["num_processes"]
    if "update_survival" in training:
        section["update_survival"] = training["update_survival"]
    return section
