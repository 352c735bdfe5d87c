"""One run as data flows: examples -> measure -> prune (-> recover) -> fine-tune -> evaluate -> record.

Every stage is cached by the content that determines it, so a sweep measures once, the dense model is fine-tuned once
for every table, and a run that was killed goes on where it was. No method is known here by name.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gradpruner import finetune, speed
from gradpruner.architectures import check_finite_weights, count_parameters, empty_model
from gradpruner.cache import StageCache, content_hash
from gradpruner.distill import DistillationLoss
from gradpruner.efficiency import Cost, total_cost
from gradpruner.encoding import Batch, Encoder, TrainingRow, encode_training_rows, training_batches
from gradpruner.evaluate.base import PREDICTIONS_FILE, Evaluation, Question, predict_all
from gradpruner.files import read_jsonl, write_json, write_jsonl
from gradpruner.finetune import TrainingSpec, load_finetuned
from gradpruner.method import Calibration, Compressed, Method, Recovery
from gradpruner.models import ModelSpec
from gradpruner.plan import PruningPlan
from gradpruner.repair import load_repair, read_fits, repair, save_repair
from gradpruner.shape import ModelShape, config_shape, model_shape
from gradpruner.speed_comparison import compare, workload_like
from gradpruner.stage_keys import StageKeys
from gradpruner.surgery import sharing_copy
from gradpruner.tasks import Example, Task

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
PLAN_FILE, REPORT_FILE = finetune.PLAN_FILE, finetune.REPORT_FILE
SECONDS_FILE = "seconds.json"
COST_FILE = "cost.json"
SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class Outcome:
    """What a run found, still in the cache's folders.

    Attributes:
        plan: what was pruned and merged.
        report: what the method saw, with `num_parameters` and `shape` of the compressed model.
        training: account of the fine-tune, see `finetune.finetune`.
        metrics: of the fine-tuned model.
        metrics_before: of the compressed model before fine-tuning, or empty.
        predictions: file with what the model answered to each test example, and what that scored.
        seconds: wall time per stage when it was computed.
        compression: `seconds` and `peak_memory_bytes` of measuring and pruning, without loading the model.
        recovery: account of the training on other data between pruning and the fine-tune, or None.
        speed: phases of the dense model and this one, their ratios and the workload; None if not asked for.
    """

    plan: PruningPlan
    report: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, Any]
    metrics_before: dict[str, Any]
    predictions: Path
    seconds: dict[str, float]
    compression: dict[str, float]
    recovery: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pipeline:
    """Everything that decides a run.

    Attributes:
        model: the dense model.
        task: training data, and test data unless there is a `test_task`.
        method: what to do to the model.
        training: how to fine-tune.
        evaluation: how to evaluate.
        seed: of data order, adapters and draws.
        cache_dir: folder for stages and converted models.
        evaluate_before: also evaluate before fine-tuning.
        test_task: another dataset to test on (Table 12).
        recovery_task: data for the method's training between pruning and the fine-tune.
        measure_speed: time training steps and inference, beside the dense model.
    """

    model: ModelSpec
    task: Task
    method: Method
    training: TrainingSpec
    evaluation: Evaluation
    seed: int
    cache_dir: Path
    evaluate_before: bool = True
    test_task: Task | None = None
    recovery_task: Task | None = None
    measure_speed: bool = False

    # ---- what can be known, and refused, before any weight is loaded ----

    @cached_property
    def train_examples(self) -> list[Example]:
        """Rendered training examples."""
        return self.task.load("train", self.seed)

    @cached_property
    def test_examples(self) -> list[Example]:
        """Rendered test examples."""
        return self.tested_task.load("test", self.seed)

    @cached_property
    def base_model(self) -> ModelSpec:
        """The model that the method starts from; the dense one, but for `small_dense`."""
        return self.method.base_model(self.model)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Config of the model that the method starts from."""
        return self.base_model.load_config(self.assets_dir)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.base_model.load_tokenizer(self.assets_dir)

    @cached_property
    def rows(self) -> list[TrainingRow]:
        """Tokenized training rows."""
        return encode_training_rows(self.train_examples, self._encoder(self.task))

    @cached_property
    def recovery(self) -> Recovery | None:
        """What the method wants to train on other data, if there is such data."""
        return self.resolved_method.recovery() if self.recovery_task is not None else None

    @cached_property
    def recovery_rows(self) -> list[TrainingRow]:
        """Tokenized rows for that; empty if there is none."""
        if self.recovery_task is None or self.recovery is None:
            return []
        task, distillation = self.recovery_task, self.recovery.distillation
        rows = encode_training_rows(task.load("train", self.seed), self._encoder(task))
        if distillation is None or distillation.tokens == "answer":
            return rows
        # The first token of a row is predicted from nothing.
        return [dataclasses.replace(row, num_answer_tokens=len(row.input_ids) - 1) for row in rows]

    @property
    def repairs(self) -> bool:
        """Whether the method has its damage repaired in closed form."""
        return self.resolved_method.repair_calibration() is not None

    @cached_property
    def shape(self) -> ModelShape:
        """Shape of the compressed model."""
        return self.resolved_method.shape(self.config)

    @cached_property
    def resolved_evaluation(self) -> Evaluation:
        """The evaluation with everything that depends on the task and this machine made definite."""
        return self.evaluation.resolve(self.tested_task, self.test_examples)

    @cached_property
    def questions(self) -> list[Question]:
        """Tokenized test examples."""
        return self.resolved_evaluation.questions(self.test_examples, self._encoder(self.tested_task))

    @cached_property
    def resolved_method(self) -> Method:
        """The method with counts and steps made definite for this model and this training length."""
        return self.method.resolve(self.config.num_hidden_layers, self.training.num_steps(len(self.rows)))

    @cached_property
    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense model."""
        return self.config if self.base_model == self.model else self.model.load_config(self.assets_dir)

    @cached_property
    def num_dense_parameters(self) -> int:
        """Parameters of the dense model, tied ones once."""
        return count_parameters(empty_model(self.dense_config))

    def check(self, disk: bool = True) -> None:
        """Reads config and data and resolves the method; raises what `ModelSpec`, `Task` and `Method` raise.

        Args:
            disk: also look for the disk space that the run needs.

        Raises:
            ValueError: also if started by torchrun, if `max_length` is over the model's positions, or if the disk has
                no room for what the run will write.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"A run is one process, got WORLD_SIZE={os.environ['WORLD_SIZE']} from torchrun or accelerate. "
                "Start it with plain python; spread a sweep over processes with hydra/launcher=joblib."
            )
        self._check_positions()
        self.method.check_training(self.training)
        _ = self.resolved_method, self.shape, self.questions, self.recovery_rows
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # Weights in float32; full fine-tuning keeps two checkpoints with two optimizer moments besides.
        trains_all = "full" in (self.training.mode, self.recovery and self.recovery.training.mode)
        copies = 8 if trains_all else 1
        needed, free = 4 * self.num_dense_parameters * copies, shutil.disk_usage(self.cache_dir).free
        if disk and needed > free:
            raise ValueError(
                f"Not enough disk space in {self.cache_dir.absolute()}: about {needed / 1e9:.1f} GB needed, "
                f"{free / 1e9:.1f} GB free. Free some, or set cache_dir to another disk."
            )

    def _check_positions(self) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        tasks = [task for task in (self.task, self.test_task, self.recovery_task) if task is not None]
        longest = max(task.max_length for task in tasks)
        if limit is not None and longest > limit:
            raise ValueError(
                f"dataset.max_length must be at most the {limit} positions that {self.base_model.name} was made for, "
                f"got {longest}. Lower dataset.max_length."
            )

    @property
    def dataset_name(self) -> str:
        """The name of the training data, and of the test data where it is other data."""
        return self.task.name + (f"-to-{self.test_task.name}" if self.test_task else "")

    @property
    def tested_task(self) -> Task:
        """Where the test data is from."""
        return self.test_task or self.task

    def _encoder(self, task: Task) -> Encoder:
        return Encoder(self.tokenizer, task.max_length, self.model.chat_template)

    # ---- the stages ----

    def run(self) -> Outcome:
        """Runs every stage that is not in the cache yet."""
        self.check()
        self.resolved_evaluation.prepare()
        states = _Models(self)
        pruned = self._cached("prune", self._keys.prune, states.write_plan)
        repaired = self._repaired(states) if self.repairs else None
        recovered = self._recovered(states) if self.recovery else None
        before = self._evaluated(self._keys.untuned, states.untuned) if self.evaluate_before else None
        trained = self._cached("finetune", self._keys.finetune, states.write_finetuned, resumable=True)
        after = self._evaluated(self._keys.finetune, states.finetuned)
        predicted = self._predicted(self._keys.finetune, states.finetuned)
        folders = {"measure": self._measured(), "finetune": trained, "predict": predicted, "evaluate": after}
        described = trained if (trained / PLAN_FILE).is_file() else pruned  # some methods prune while they train
        report = json.loads((described / REPORT_FILE).read_text())
        plan = PruningPlan.load(described / PLAN_FILE)
        costs = [folder / COST_FILE for folder in (self._measured(), pruned, repaired) if folder is not None]
        return Outcome(
            plan=plan.with_details(repair=read_fits(repaired)) if repaired else plan,
            report=report,
            training=finetune.read_result(trained),
            metrics=json.loads((after / METRICS_FILE).read_text()),
            metrics_before=json.loads((before / METRICS_FILE).read_text()) if before else {},
            predictions=after / PREDICTIONS_FILE,
            seconds={stage: _seconds(folder) for stage, folder in folders.items()},
            compression=total_cost(*costs),
            recovery=finetune.read_result(recovered) if recovered else None,
            speed=self._speed(ModelShape.from_dict(report["shape"])) if self.measure_speed else None,
        )

    def load_result(self) -> PreTrainedModel:
        """The fine-tuned model of a finished run, rebuilt from the cache."""
        return _Models(self).finetuned()

    def stages(self) -> dict[str, bool]:
        """Which stages are in the cache already."""
        keys = {"measure": self._keys.measure, "prune": self._keys.prune, "finetune": self._keys.finetune}
        if self.repairs:
            keys["repair"] = self._keys.repair
        if self.recovery:
            keys["recover"] = self._keys.recover
        found = {stage: self._cache.find(stage, key) is not None for stage, key in keys.items()}
        found["predict"] = self._cache.find("predict", self._keys.predict(self._keys.finetune)) is not None
        found["evaluate"] = self._cache.find("evaluate", self._keys.evaluate(self._keys.finetune)) is not None
        return found

    def _cached(self, stage: str, key: dict[str, Any], compute: Any, resumable: bool = False) -> Path:
        def timed(directory: Path) -> None:
            start = time.perf_counter()
            compute(directory)
            write_json(directory / SECONDS_FILE, time.perf_counter() - start)

        name = f"{stage}/{content_hash(key)}"
        if name not in self._finished:  # once a run: looking an entry up verifies its checksums
            self._finished[name] = self._cache.get(stage, key, timed, resumable)
        return self._finished[name]

    def _measured(self) -> Path:
        """Folder of what the method measured."""
        method = self.resolved_method

        def compute(directory: Path) -> None:
            model = self.base_model.load(self.assets_dir)
            with Cost() as cost:
                method.measure(model, self._calibration_batches(method.calibration()), directory)
            cost.save(directory / COST_FILE)

        return self._cached("measure", self._keys.measure, compute)

    def _repaired(self, states: "_Models") -> Path:
        """Folder with the maps that mend what pruning did."""
        return self._cached("repair", self._keys.repair, states.write_repair)

    def _recovered(self, states: "_Models") -> Path:
        """Folder with the weights after the training between pruning and the fine-tune."""
        return self._cached("recover", self._keys.recover, states.write_recovered, resumable=True)

    def _speed(self, shape: ModelShape) -> dict[str, Any]:
        """Steps and inference of the dense model and of that shape, timed in turns; all runs alike share it.

        A method that acts in training has no training steps like another's: those are left out then.
        """
        workload = workload_like(self.base_model, self.training, self.rows)
        roles = ("infer",) if self.resolved_method.callbacks() else speed.ROLES
        models = {"dense": (self.dense_config, config_shape(self.dense_config)), "own": (self.config, shape)}

        def compute(directory: Path) -> None:
            write_json(directory / SPEED_FILE, compare(models["dense"], models["own"], workload, roles))

        folder = self._cached("speed", self._keys.speed(models, workload, roles), compute)
        summary: dict[str, Any] = json.loads((folder / SPEED_FILE).read_text())
        return summary

    def _calibration_batches(self, calibration: Calibration | None) -> Iterable[Batch]:
        if calibration is None:
            return ()
        num_rows = calibration.count(len(self.rows))
        return training_batches(
            self.rows, calibration.batch_size, num_rows, self.tokenizer.pad_token_id, calibration.seed
        )

    def _predicted(self, weights_key: dict[str, Any], load: Callable[[], PreTrainedModel]) -> Path:
        """Folder with what the weights that `load` gives answer to the test examples."""

        def compute(directory: Path) -> None:
            predict_all(load, self.resolved_evaluation, self._encoder(self.tested_task), self.questions, directory)

        return self._cached("predict", self._keys.predict(weights_key), compute, resumable=True)

    def _evaluated(self, weights_key: dict[str, Any], load: Callable[[], PreTrainedModel]) -> Path:
        """Folder with the predictions, what each scored, and metrics."""
        predicted = self._predicted(weights_key, load)

        def compute(directory: Path) -> None:
            predictions = read_jsonl(predicted / PREDICTIONS_FILE)
            measured, rows = self.resolved_evaluation.measure(predictions, self.test_examples)
            write_jsonl(directory / PREDICTIONS_FILE, rows)
            write_json(directory / METRICS_FILE, measured)

        return self._cached("evaluate", self._keys.evaluate(weights_key), compute)

    @cached_property
    def _finished(self) -> dict[str, Path]:
        return {}

    @cached_property
    def _cache(self) -> StageCache:
        return StageCache(self.cache_dir / "stages")

    @property
    def assets_dir(self) -> Path:
        """Folder of converted and random models."""
        return self.cache_dir / "assets"

    @cached_property
    def _keys(self) -> StageKeys:
        return StageKeys(self)


class _Models:
    """Loads, compresses and trains on demand; keeps at most one model, and only while it is untrained."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._compressed: Compressed | None = None
        self._prune_cost: Cost | None = None
        self._is_repaired = self._is_recovered = False

    def untuned(self) -> PreTrainedModel:
        """The model that the fine-tune starts from."""
        recovery = self._pipeline.recovery
        if recovery is None or self._is_recovered:
            return self._repair().model
        recovered = self._pipeline._recovered(self)
        compressed = self._repair()
        model = load_finetuned(compressed.model, recovery.training, recovered)
        self._compressed, self._is_recovered = dataclasses.replace(compressed, model=model), True
        return model

    def write_repair(self, directory: Path) -> None:
        pipeline, measured = self._pipeline, self._pipeline._measured()
        self._forget()
        dense = pipeline.base_model.load(pipeline.assets_dir)
        compressed = pipeline.resolved_method.prune(sharing_copy(dense), measured)
        batches = pipeline._calibration_batches(pipeline.resolved_method.repair_calibration())
        with Cost() as cost:
            fits = repair(compressed.model, dense, compressed.plan, batches)
        save_repair(compressed.model, compressed.plan, fits, directory)
        cost.save(directory / COST_FILE)

    def write_plan(self, directory: Path) -> None:
        compressed = self._compress()
        compressed.log_warnings()
        compressed.plan.save(directory / PLAN_FILE)
        size = {"num_parameters": count_parameters(compressed.model), "shape": model_shape(compressed.model).to_dict()}
        report = {**compressed.report, **size}
        write_json(directory / REPORT_FILE, report)
        assert self._prune_cost is not None
        self._prune_cost.save(directory / COST_FILE)

    def write_recovered(self, directory: Path) -> None:
        pipeline, recovery, compressed = self._pipeline, self._pipeline.recovery, self._repair()
        assert recovery is not None
        self._forget()
        loss = None
        if recovery.distillation is not None:
            teacher = pipeline.base_model.load(pipeline.assets_dir)
            loss = DistillationLoss(teacher, recovery.distillation, compressed.plan)
        finetune.finetune(
            compressed.model,
            pipeline.recovery_rows,
            pipeline.tokenizer.pad_token_id,
            recovery.training,
            directory,
            pipeline.seed,
            loss=loss,
            description="recover" if loss is None else "distil",
        )

    def write_finetuned(self, directory: Path) -> None:
        pipeline = self._pipeline
        model = self.untuned()
        self._forget()
        finetune.finetune(
            model,
            pipeline.rows,
            pipeline.tokenizer.pad_token_id,
            pipeline.training,
            directory,
            pipeline.seed,
            pipeline.resolved_method.callbacks(),
        )

    def finetuned(self) -> PreTrainedModel:
        pipeline = self._pipeline
        # Always from disk, even right after training: a run and its continuation then take the same way.
        trained = pipeline._cached("finetune", pipeline._keys.finetune, self.write_finetuned, resumable=True)
        model = load_finetuned(self.untuned(), pipeline.training, trained)
        self._forget()
        return pipeline.resolved_method.finish(model)

    def _forget(self) -> None:
        """Training changes the model in place."""
        self._compressed, self._is_repaired, self._is_recovered = None, False, False

    def _repair(self) -> Compressed:
        """What pruning gave, repaired if the method says so."""
        if self._pipeline.repairs and not self._is_repaired:
            repaired = self._pipeline._repaired(self)
            compressed = self._compress()
            load_repair(compressed.model, compressed.plan, repaired)
            self._is_repaired = True
        return self._compress()

    def _compress(self) -> Compressed:
        if self._compressed is None:
            pipeline = self._pipeline
            measured = pipeline._measured()
            model = pipeline.base_model.load(pipeline.assets_dir)
            check_finite_weights(model)
            with Cost() as cost:
                self._compressed = pipeline.resolved_method.prune(model, measured)
            self._prune_cost = cost
        return self._compressed


def _seconds(entry: Path) -> float:
    return float(json.loads((entry / SECONDS_FILE).read_text()))
