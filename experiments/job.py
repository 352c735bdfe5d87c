"""What `experiments.run` does with a composed config: builds what it names, runs it, and writes the results.

A failed job of a sweep is noted and the sweep goes on; a failed run ends with a message.
"""

import json
import logging
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import schema
from experiments.arguments import check_texts
from experiments.config import build_pipeline, identity, reference_configs, resolve, run_directory
from experiments.devices import taken_gpu
from experiments.dry_run import cell_costs, prepare_dry_run, show_dry_run
from experiments.launch import config_dir_arguments, run_with_torchrun, starts_torchrun
from experiments.paths import check_writable
from experiments.preview import show_example
from experiments.progress import run_progress
from experiments.recording import (
    CHECKPOINT,
    HISTORY_FILE,
    IMPORTANCE_PICTURE,
    LOSS_PICTURE,
    PUSHED_FILE,
    RUNNING_FILE,
    TRACKED_FILE,
    card_results,
    changed_content,
    changed_stages,
    describe_other_environment,
    finished_record,
    is_complete,
    remove_results,
)
from experiments.summary import show_summary
from experiments.sweep import (
    arguments_of,
    is_left_out,
    is_sweep,
    labelled_output,
    note_costs,
    note_failure,
    note_finished,
    note_runs,
)
from experiments.tracker import Tracker
from gradpruner import processes
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.push import check_push, push_checkpoint
from gradpruner.cost import process_memory_bytes
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import content_hash, write_json, write_jsonl, write_text
from gradpruner.finetune.result import PLAN_FILE
from gradpruner.finetune.trainer import DivergedError
from gradpruner.models.origin import find_origin
from gradpruner.models.shape import config_shape
from gradpruner.pipeline.run import Pipeline
from gradpruner.pipeline.stand_in_rows import has_stand_in_rows
from gradpruner.record import CONFIG_FILE, RunRecord, portable
from gradpruner.reporting.changed_answers import QUESTIONS_FILE, question_rows
from gradpruner.reporting.figures import plot_importance, plot_loss
from gradpruner.runtime import quiet_libraries
from gradpruner.waiting import leased

logger = logging.getLogger(__name__)


def run_hydra_job(cfg: DictConfig) -> None:
    """Runs one job of hydra's, alone or in a sweep, and reports how it failed."""
    with labelled_output():
        _run_hydra_job(cfg)


def _run_hydra_job(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    if (gpu := taken_gpu()) is not None:
        logger.info("Job %s runs on GPU %s", job.job.num, gpu)
    try:
        if not processes.is_main():
            logging.disable(logging.WARNING)  # rank 0 says it
        if is_sweep() and is_left_out(cfg):
            logger.info("Left out of the sweep: %s", " ".join(arguments_of(job.overrides)))
        else:
            _check_launch(cfg)
            if starts_torchrun(cfg):
                options = config_dir_arguments(job.runtime.config_sources)
                run_with_torchrun([*options, *arguments_of(job.overrides)], cfg.num_processes)
                if is_sweep():
                    note_runs(run_directory(*arm) for arm in _arms(cfg, build_pipeline(cfg)))
            else:
                run_job(cfg)
    except Exception as error:
        reason = _explain_memory(processes.cause_of(error))
        if not processes.report(str(reason)):
            raise SystemExit(1) from error  # the process that failed first says why
        expected = (ValueError, DivergedError, OSError, processes.PeerFailedError)
        is_expected = reason is not error or isinstance(error, expected)
        if is_sweep():
            note_failure(reason, is_expected)
        elif is_expected:
            logger.debug("", exc_info=True)
            print(f"\nError: {reason}", file=sys.stderr, flush=True)
            processes.leave()
            raise SystemExit(1) from error
        else:
            traceback.print_exception(error)  # here, because `run_command` takes some classes for mistakes of the user
            processes.leave()
            raise SystemExit(1) from error
    else:
        if is_sweep():
            note_finished()
        return
    clear_device_cache(garbage_collection=True)  # what the failed job held, so that the next one has the memory


def _check_launch(cfg: DictConfig) -> None:
    """Raises ConfigError for arguments that hydra reads as something else, and for settings that move the job."""
    job = HydraConfig.get()
    check_texts(cfg, arguments_of(job.overrides))
    if job.job.chdir:
        raise schema.ConfigError(
            "Paths start at the folder in which the command was started, got hydra.job.chdir=true. Leave that out, and "
            "set results_dir or output_dir instead."
        )


def _explain_memory(error: Exception) -> Exception:
    """Returns an error that says what to lower if memory ran out, else `error` itself."""
    if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
        return error
    return MemoryError(
        f"Memory ran out, got {type(error).__name__}: {error}. Lower finetune.micro_batch_size (or set it to auto) or "
        "dataset.max_length, or set finetune.gradient_checkpointing=true."
    )


def run_job(cfg: DictConfig) -> RunRecord | None:
    """Runs what `cfg` describes, after its reference methods, and prints the summary.

    Returns:
        The record; None for a dry run, and on all processes but rank 0.

    Raises:
        ValueError: if anything is wrong with config or data; raised before any weight is loaded.
    """
    quiet_libraries()
    schema.check_root(cfg)
    resolve(cfg)
    _check_push(cfg)
    pipeline, tracker = build_pipeline(cfg), schema.build(cfg.tracker, "tracker")
    run_dir = run_directory(cfg, pipeline)
    folder = "results_dir" if cfg.output_dir is None else "output_dir"
    check_writable(**{folder: run_dir, "cache_dir": pipeline.cache_dir})
    if not cfg.dry_run:
        tracker.check()
    else:
        pipeline = prepare_dry_run(pipeline)
    pipeline.check(resources=not cfg.dry_run, save_to=run_dir / CHECKPOINT if cfg.save_checkpoint else None)
    check_prunes(pipeline)
    if not processes.is_main():
        _follow(cfg, pipeline)
        return None
    if cfg.dry_run and is_sweep():
        note_costs(cell_costs(pipeline))
        return None
    if not has_stand_in_rows(pipeline):
        show_example(pipeline)
    if cfg.dry_run:
        show_dry_run(pipeline, run_dir)
        processes.wait_for_all()
        return None
    arms = list(_arms(cfg, pipeline))
    progress, records = run_progress([(arm.method.name, arm.planned()) for _, arm in arms]), []
    with progress.shown():
        for number, arm in enumerate(arms):
            progress.begin_arm(number)
            records.append(_run_arm(*arm, tracker))
    if is_sweep():
        note_runs(run_directory(*arm) for arm in arms)
    processes.wait_for_all()
    show_summary(records, run_dir, f"{pipeline.model.name} on {pipeline.dataset_name}")
    if cfg.push_to_hub is not None:
        _push(run_dir, cfg.push_to_hub)
    return records[-1]


def _check_push(cfg: DictConfig) -> None:
    """Checks what the checkpoint is pushed to, if it is, and turns saving on.

    Raises:
        ValueError: if it cannot be pushed.
    """
    cfg.push_to_hub = cfg.push_to_hub or None
    if cfg.push_to_hub is None:
        return
    if is_sweep():
        raise schema.ConfigError(
            f"A repository holds one model, got push_to_hub={cfg.push_to_hub} in a sweep. Push the best of its "
            "checkpoints with python -m experiments.push_checkpoint."
        )
    check_push(str(cfg.push_to_hub), asks_hub=not cfg.dry_run and processes.is_main())
    cfg.save_checkpoint = True


def _push(run_dir: Path, repository: str) -> None:
    """Pushes the checkpoint of a finished run, unless that was done.

    Raises:
        PushError: if the upload fails; it says how to push again.
    """
    file = run_dir / PUSHED_FILE
    if file.is_file() and json.loads(file.read_text())["repository"] == repository:
        logger.info("Already pushed to %s", repository)
        return
    logger.info("Pushing %s to %s", run_dir / CHECKPOINT, repository)
    address = push_checkpoint(run_dir / CHECKPOINT, repository)
    write_json(file, {"repository": repository, "address": address})
    print(f"Pushed: {address}", flush=True)


def _arms(cfg: DictConfig, pipeline: Pipeline) -> Iterator[tuple[DictConfig, Pipeline]]:
    """Yields config and pipeline of every reference method, then of the run itself."""
    for reference in reference_configs(cfg, pipeline.method.name):
        first = build_pipeline(reference)
        first.take_examples(pipeline)
        yield reference, first
    yield cfg, pipeline


def _follow(cfg: DictConfig, pipeline: Pipeline) -> None:
    """Takes part in what rank 0 runs; writes no results."""
    if not cfg.dry_run:
        for _, arm in _arms(cfg, pipeline):
            if processes.broadcast(False):
                arm.run()
    processes.wait_for_all()


def check_prunes(pipeline: Pipeline) -> None:
    """Raises ValueError if a method that prunes is asked to prune nothing."""
    if hasattr(pipeline.method, "sparsity") and pipeline.shape == config_shape(pipeline.config):
        raise ValueError(
            f"{pipeline.method.name} would prune nothing of the {pipeline.config.num_hidden_layers} decoder layers. "
            "Raise sparsity, or use method=dense."
        )


def _run_arm(cfg: DictConfig, pipeline: Pipeline, tracker: Tracker) -> RunRecord:
    """Runs one method and writes its folder; waits for another process that runs the same."""
    run_dir = run_directory(cfg, pipeline)
    run_dir.mkdir(parents=True, exist_ok=True)
    with leased(run_dir / RUNNING_FILE, "runs the same"):
        return _run_alone(run_dir, cfg, pipeline, tracker)


def _run_alone(run_dir: Path, cfg: DictConfig, pipeline: Pipeline, tracker: Tracker) -> RunRecord:
    """Runs one method and writes its folder; a finished folder of the same config, weights and data is unchanged."""
    identity_hash = content_hash(identity(cfg))
    record = RunRecord.load(run_dir)
    if record is not None and record.identity != identity_hash:
        raise ValueError(
            f"{run_dir} holds a run with another config (identity {record.identity}, this one is {identity_hash}). "
            "Give output_dir another folder, or delete that one."
        )
    changed = [] if record is None else changed_content(record, pipeline)
    reason = f"{', '.join(changed)} changed since it finished" if changed else ""
    if cfg.rerun and not changed and record is not None and record.status == "finished":
        reason = "rerun=true"
    if record is not None and not reason and is_complete(record, run_dir, cfg):
        logger.info("Already finished: %s", run_dir)
        if stages := changed_stages(record, pipeline):
            logger.warning(
                "It was made with %s, which changes the stages %s. Add rerun=true to run it again.",
                describe_other_environment(record),
                ", ".join(stages),
            )
        processes.broadcast(False)
        if not (run_dir / TRACKED_FILE).is_file():
            history = run_dir / HISTORY_FILE
            tracker.log(record, json.loads(history.read_text()) if history.is_file() else [], run_dir)
        return record
    write_text(run_dir / CONFIG_FILE, OmegaConf.to_yaml(cfg, resolve=True))
    handler = logging.FileHandler(run_dir / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        if reason:
            logger.warning("%s is run again: %s. Its record and files are replaced.", run_dir, reason)
            remove_results(run_dir)
        return _run_into(run_dir, cfg, pipeline, tracker)
    except Exception as error:
        cause = processes.cause_of(error)
        failed = RunRecord(
            "failed", portable(resolve(cfg)), identity_hash, cfg.seed, error=f"{type(cause).__name__}: {cause}"
        )
        failed.save(run_dir)
        raise cause from error
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _run_into(run_dir: Path, cfg: DictConfig, pipeline: Pipeline, tracker: Tracker) -> RunRecord:
    logger.info("%s on %s: %s", pipeline.method.name, pipeline.task.name, run_dir)
    own_memory = process_memory_bytes()
    _ = pipeline.content  # of before the run: data that change meanwhile are not what it was made from
    processes.broadcast(True)  # the others run it, too
    try:
        with tracker.watch(run_dir, resolve(cfg)):
            outcome = pipeline.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(pipeline.describe_next_step()) from None
    outcome.plan.save(run_dir / PLAN_FILE)
    shutil.copyfile(outcome.predictions, run_dir / PREDICTIONS_FILE)
    write_jsonl(run_dir / QUESTIONS_FILE, question_rows(pipeline.test_examples))
    write_json(run_dir / HISTORY_FILE, outcome.training["history"])
    plot_loss(outcome.training["history"], run_dir / LOSS_PICTURE)
    if outcome.plan.layer_importance:
        plot_importance(outcome.plan, outcome.report, run_dir / IMPORTANCE_PICTURE)
    if cfg.save_checkpoint:
        folder = run_dir / CHECKPOINT
        base = pipeline.base_model
        save_checkpoint(
            pipeline.load_result(),
            pipeline.tokenizer,
            outcome.plan,
            folder,
            base.name,
            portable(resolve(cfg)),
            find_origin(base.path, base.commit(pipeline.assets_dir)),
            card_results(pipeline, outcome.metrics),
        )
    record = finished_record(cfg, pipeline, outcome, own_memory)
    record.save(run_dir)  # before the tracker: it may fail
    tracker.log(record, outcome.training["history"], run_dir)
    return record
