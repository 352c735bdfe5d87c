"""Run one experiment, or a sweep with -m.

    python -m experiments.run experiment=quickstart
    python -m experiments.run -m sparsity=0.2,0.3,0.4 merge_count=0,1,3

Thin: it builds what the config names, hands it to `gradpruner.pipeline`, and writes down what came out.
"""

import dataclasses
import difflib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import schema
from experiments.dry_run import show_dry_run
from experiments.preview import show_example
from experiments.summary import show_summary
from experiments.sweep import is_left_out, note_failure
from experiments.tracker import Tracker
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checks import guess
from gradpruner.cost import process_memory_bytes
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import content_hash, write_json, write_text
from gradpruner.finetune.run import PLAN_FILE
from gradpruner.finetune.trainer import DivergedError
from gradpruner.models import offline_configs
from gradpruner.models.shape import config_shape
from gradpruner.pipeline.run import Outcome, Pipeline
from gradpruner.record import NOT_IDENTITY, RunRecord
from gradpruner.reporting.figures import plot_importance, plot_loss
from gradpruner.runtime import environment, quiet_libraries
from gradpruner.tasks import Task

logger = logging.getLogger(__name__)

HISTORY_FILE = "history.json"  # loss and learning rate by optimizer step
CONF = Path(__file__).resolve().parents[1] / "conf"
# Where the settings of a second dataset are, by where its name is.
SETTINGS_OF = {"dataset.test": "dataset.test_settings", "method.recover_on": "method.recover_settings"}

schema.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    """Entry point: one job of hydra's."""
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if is_sweep and is_left_out(cfg):
            logger.info("Left out of the sweep: %s", " ".join(HydraConfig.get().overrides.task))
        else:
            run_job(cfg)
    except Exception as error:
        is_expected = isinstance(error, (ValueError, DivergedError, OSError))
        if is_sweep:
            note_failure(error, is_expected)
        elif is_expected:
            logger.debug("", exc_info=True)
            print(f"\nError: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        else:
            raise


def run_job(cfg: DictConfig) -> RunRecord | None:
    """Runs what `cfg` describes, with its reference method beside it, and prints the summary.

    Returns:
        The record, or None for a dry run.

    Raises:
        ValueError: on anything that is wrong with config or data; no weight has been loaded by then.
    """
    quiet_libraries()
    pipeline, tracker = build_pipeline(cfg), schema.build(cfg.tracker, "tracker")
    run_dir = run_directory(cfg, pipeline)
    _check_writable(run_dir, pipeline.cache_dir)
    if cfg.dry_run:
        model = offline_configs.for_dry_run(pipeline.model, pipeline.cache_dir / "assets")
        pipeline = dataclasses.replace(pipeline, model=model)
    pipeline.check(disk=not cfg.dry_run)
    _check_prunes(pipeline)
    show_example(pipeline)
    if cfg.dry_run:
        show_dry_run(pipeline, run_dir)
        return None
    records = []
    if cfg.reference is not None and cfg.reference != pipeline.method.name:
        reference = _reference_config(cfg)
        records.append(_run_arm(reference, build_pipeline(reference), tracker))
    records.append(_run_arm(cfg, pipeline, tracker))
    show_summary(records, run_dir, f"{pipeline.model.name} on {pipeline.dataset_name}")
    return records[-1]


def build_pipeline(cfg: DictConfig) -> Pipeline:
    """Builds every node of the config; cheap, so that a typo costs a second."""
    task, test_task = build_tasks(cfg)
    recover_on, recover_settings = (cfg.method.get(key) for key in ("recover_on", "recover_settings"))
    return Pipeline(
        model=schema.build(cfg.model, "model"),
        task=task,
        test_task=test_task,
        method=schema.build(cfg.method, "method"),
        training=schema.build(cfg.finetune, "finetune"),
        evaluation=schema.build(cfg.evaluation, "evaluation"),
        seed=cfg.seed,
        cache_dir=Path(cfg.cache_dir),
        evaluate_before=cfg.evaluate_before,
        measure_speed=cfg.measure_speed,
        recovery_task=_other_task(cfg, "method.recover_on", recover_on, recover_settings),
    )


def build_tasks(cfg: DictConfig) -> tuple[Task, Task | None]:
    """The dataset to train on and, if `dataset.test` names another one, the dataset to test on.

    Raises:
        ConfigError: if there is no such dataset, there are settings for one and no name, or validation rows take the
            place of the test split already.
    """
    node = cfg.dataset.copy()
    with open_dict(node):
        name, settings = node.pop("test", None), node.pop("test_settings", None)
    task: Task = schema.build(node, "dataset")
    if name is not None and task.validation_fraction is not None:
        raise schema.ConfigError(
            f"Test rows are either those of another dataset or validation rows, got dataset.test={name} and "
            f"dataset.validation_fraction={task.validation_fraction}. Set one of them to null."
        )
    return task, _other_task(cfg, "dataset.test", name, settings)


def _other_task(cfg: DictConfig, key: str, name: str | None, settings: DictConfig | None) -> Task | None:
    """The dataset that `key` names, with the settings next to it.

    Raises:
        ConfigError: if there is no such dataset, or there are settings for one and no name.
    """
    if name is None:
        if settings:
            raise schema.ConfigError(
                f"{SETTINGS_OF[key]} belongs to {key}, got {settings} and {key}=null. Name the dataset."
            )
        return None
    options = _options("dataset")
    if name not in options:
        raise schema.ConfigError(
            f"{key} must name a dataset, got {name!r}{guess(str(name), options)}. Known: {', '.join(options)}, or null."
        )
    other = OmegaConf.merge(_load_option("dataset", name), settings or {})
    assert isinstance(other, DictConfig)
    other.pop("test"), other.pop("test_settings")
    root = cfg.copy()
    with open_dict(root):
        root.dataset = other  # so that what it takes from the root, such as show_options, resolves
    task: Task = schema.build(root.dataset, "dataset")
    return task


def _check_writable(*folders: Path) -> None:
    """Raises ValueError if a folder cannot be made or written to."""
    for folder in folders:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(
                f"Cannot write to {folder.absolute()}: {existing} is not a folder that this user may write to. "
                "Set output_dir, results_dir or cache_dir to another one."
            )


def _check_prunes(pipeline: Pipeline) -> None:
    """Raises ValueError if a method that prunes is asked to prune nothing."""
    if hasattr(pipeline.method, "sparsity") and pipeline.shape == config_shape(pipeline.config):
        raise ValueError(
            f"{pipeline.method.name} would prune nothing of the {pipeline.config.num_hidden_layers} decoder layers. "
            "Raise sparsity, or use method=dense."
        )


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of the config that results depend on."""
    resolved = _resolved(cfg)
    return {key: value for key, value in resolved.items() if key not in NOT_IDENTITY}


def run_directory(cfg: DictConfig, pipeline: Pipeline) -> Path:
    """`<results_dir>/<model>/<dataset>/<finetune>/<method>/<variant>-<hash>-seed<k>`, or `output_dir`.

    The variant is there for people; the hash, over everything that results depend on, keeps runs apart.
    """
    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    variant = "-".join(part for part in (pipeline.method.variant(), content_hash(identity(cfg))[:8]) if part)
    folder = Path(cfg.results_dir) / pipeline.model.name / pipeline.dataset_name / pipeline.training.mode
    return folder / pipeline.method.name / f"{variant}-seed{cfg.seed}"


def _run_arm(cfg: DictConfig, pipeline: Pipeline, tracker: Tracker) -> RunRecord:
    """Runs one method and writes its folder; a finished folder of the same config is left as it is."""
    run_dir, key = run_directory(cfg, pipeline), content_hash(identity(cfg))
    record = RunRecord.load(run_dir)
    if record is not None and record.identity != key:
        raise ValueError(
            f"{run_dir} holds a run with another config (identity {record.identity}, this one is {key}). "
            "Give output_dir another folder, or delete that one."
        )
    has_checkpoint = (run_dir / "checkpoint").is_dir() or not cfg.save_checkpoint
    has_speed = (record is not None and bool(record.efficiency.get("speed"))) or not cfg.measure_speed
    if record is not None and record.status == "finished" and has_checkpoint and has_speed:
        logger.info("Already finished: %s", run_dir)
        return record
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    handler = logging.FileHandler(run_dir / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        return _run_into(run_dir, cfg, pipeline, key, tracker)
    except Exception as error:
        failed = RunRecord("failed", _resolved(cfg), key, cfg.seed, error=f"{type(error).__name__}: {error}")
        failed.save(run_dir)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _run_into(run_dir: Path, cfg: DictConfig, pipeline: Pipeline, key: str, tracker: Tracker) -> RunRecord:
    logger.info("%s on %s: %s", pipeline.method.name, pipeline.task.name, run_dir)
    own_memory = process_memory_bytes()
    outcome = pipeline.run()
    outcome.plan.save(run_dir / PLAN_FILE)
    shutil.copyfile(outcome.predictions, run_dir / PREDICTIONS_FILE)
    write_json(run_dir / HISTORY_FILE, outcome.training["history"])
    plot_loss(outcome.training["history"], run_dir / "loss.png")
    if outcome.plan.layer_importance:
        plot_importance(outcome.plan, outcome.report, run_dir / "importance.png")
    if cfg.save_checkpoint:
        folder = run_dir / "checkpoint"
        model, name = pipeline.load_result(), pipeline.base_model.name
        save_checkpoint(model, pipeline.tokenizer, outcome.plan, folder, name, _resolved(cfg))
    record = _record(cfg, pipeline, key, outcome, own_memory)
    record.save(run_dir)  # before the tracker: it may fail
    tracker.log(record, outcome.training["history"], run_dir)
    return record


def _record(cfg: DictConfig, pipeline: Pipeline, key: str, outcome: Outcome, own_memory: int) -> RunRecord:
    plan, report = outcome.plan, dict(outcome.report)
    dense, pruned = pipeline.num_dense_parameters, report.pop("num_parameters")
    num_dense_layers = pipeline.dense_config.num_hidden_layers
    return RunRecord(
        status="finished",
        config=_resolved(cfg),
        identity=key,
        seed=cfg.seed,
        model={
            "name": pipeline.model.name,
            "num_hidden_layers": num_dense_layers,
            "num_parameters": dense,
            "shape": config_shape(pipeline.dense_config).to_dict(),
        },
        pruning={
            "method": plan.method,
            "pruned_layers": list(plan.pruned_layers),
            "absorbed_by": {str(layer): absorber for layer, absorber in plan.absorbed_by.items()},
            "layer_importance": list(plan.layer_importance),
            "num_hidden_layers": len(plan.kept_layers),
            "num_parameters": pruned,
            "shape": report.pop("shape"),
            "report": report,
            "recovery": _without_history(outcome.recovery),
        },
        finetune=_without_history(outcome.training),
        metrics=outcome.metrics,
        metrics_before=outcome.metrics_before,
        efficiency={
            "layer_ratio": len(plan.kept_layers) / num_dense_layers,
            "parameter_ratio": pruned / dense,
            "train_tokens_per_second": outcome.training["tokens"] / outcome.training["train_seconds"],
            "compression_seconds": outcome.compression["seconds"],
            "compression_peak_memory_bytes": outcome.compression["peak_memory_bytes"],
            "speed": outcome.speed or {},
            "process_memory_bytes": own_memory,
            "recovery_seconds": outcome.recovery["train_seconds"] if outcome.recovery else 0.0,
            "stage_seconds": outcome.seconds,
        },
        environment=environment(),
    )


def _without_history(training: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (training or {}).items() if name != "history"}


def _reference_config(cfg: DictConfig) -> DictConfig:
    """The same run with the reference method, which takes none of this method's settings."""
    known = _options("method")
    if cfg.reference not in known:
        raise schema.ConfigError(
            f"reference must name a method, got {cfg.reference!r}. Known: {', '.join(known)}, or null."
        )
    reference = cfg.copy()
    OmegaConf.set_struct(reference, False)
    reference.method = _load_option("method", cfg.reference)
    reference.save_checkpoint = False
    if cfg.output_dir is not None:
        reference.output_dir = str(Path(cfg.output_dir) / "reference")
    return reference


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def check_options(arguments: list[str]) -> None:
    """Exits with a suggestion if an argument names an option that its group does not have; hydra only lists them."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for argument in arguments:
        group, separator, value = argument.partition("=")
        if not separator or group not in groups or not value.isidentifier() or value == "null":
            continue
        options = _options(group)
        if value not in options:
            close = difflib.get_close_matches(value, options, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise SystemExit(f"Error: there is no {group} {value!r}.{hint} Options of {group}: {', '.join(options)}.")


def _load_option(group: str, name: str) -> DictConfig:
    """The YAML of an option with what it inherits; its interpolations are not resolved yet."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    bases = [_load_option(group, base) for base in node.pop("defaults", []) if base != "_self_"]
    merged = OmegaConf.merge(*bases, node)
    assert isinstance(merged, DictConfig)
    return merged


def _options(group: str) -> list[str]:
    """The options of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


if __name__ == "__main__":
    check_options(sys.argv[1:])
    main()
