"""The stages that make a model. One function makes each: what it computes, beside the key of what that depends on.

A key holds everything that the result depends on, code and libraries included, and nothing else. Settings outside of
the key may vary within a sweep without the stage being computed again. The key of a stage holds that of the stage
before it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.cost import COST_FILE, Cost
from gradpruner.encoding import Batch, training_batches
from gradpruner.files import write_json
from gradpruner.finetune.distill import DistillationLoss
from gradpruner.finetune.precision import resolve_precision
from gradpruner.finetune.result import PLAN_FILE, REPORT_FILE, load_finetuned, merge_for_checkpoint
from gradpruner.finetune.run import finetune
from gradpruner.method import Calibration, Compressed
from gradpruner.models.architectures import count_parameters
from gradpruner.models.shape import model_shape
from gradpruner.pipeline.code_version import code_version
from gradpruner.pipeline.runner import ModelStage, Stage, StageRunner, libraries
from gradpruner.pipeline.setup import Setup, hash_rows
from gradpruner.pipeline.teachers import Teachers, signal_loss
from gradpruner.plan import PruningPlan
from gradpruner.repair.saved import current_weights, load_repair, save_repair
from gradpruner.surgery import sharing_copy


@dataclass(frozen=True)
class Start:
    """The dense weights that a method compresses.

    Attributes:
        load: returns a model with them.
        tuned: their fine-tune on the task, if they had one.
    """

    load: Callable[[], PreTrainedModel]
    tuned: ModelStage | None = None

    @property
    def needs(self) -> tuple[Stage, ...]:
        """Stages whose results `load` reads."""
        return () if self.tuned is None else (self.tuned,)


def start_of(setup: Setup, runner: StageRunner, tuned: ModelStage | None = None) -> Start:
    """Returns the weights of the model as it is, or those after its fine-tune."""

    def load() -> PreTrainedModel:
        runner.release()
        if tuned is None:
            return setup.base_model.load(setup.assets_dir)
        return merge_for_checkpoint(runner.take(tuned), setup.training)

    return Start(load, tuned)


def measure_stage(setup: Setup, start: Start) -> Stage:
    """What the method looks at before it prunes.

    Neither counts nor rules are part of the key unless the method says so: one measurement serves a sweep over them.
    """
    method, model = setup.resolved_method, setup.base_model
    calibration = method.calibration()

    def compute(directory: Path) -> None:
        dense = start.load()
        with Cost() as cost:
            method.measure(dense, calibration_batches(setup, calibration), directory)
        if processes.is_main():
            cost.save(directory / COST_FILE)

    key = {
        "model": setup.fingerprint,
        "dtype": str(model.torch_dtype),  # not `auto`: a CPU and a GPU may share a cache
        "attn_implementation": model.attn_implementation,
        "method": method.measured_as.name,
        "settings": method.measurement_settings(),
        "rows": None if calibration is None else setup.rows_hash,
        "code": code_version(measure_stage, method.measured_as),
        "libraries": libraries(),
    }
    if start.tuned is not None:
        key["tuned"] = start.tuned.id
    return Stage("measure", key, compute, together=method.measures_together, needs=start.needs)


def decide_stage(setup: Setup, runner: StageRunner, start: Start, measured: Stage) -> Stage:
    """What a method decides beyond its measurement, which thereby serves methods and settings that differ here."""
    method = setup.resolved_method
    calibration = method.decision_calibration()
    assert calibration is not None

    def compute(directory: Path) -> None:
        measurements = runner.folder(measured)
        dense = start.load()
        with Cost() as cost:
            method.decide(dense, calibration_batches(setup, calibration), measurements, directory)
        cost.save(directory / COST_FILE)

    key = {
        "measure": measured.id,
        "method": method.name,
        "settings": method.decision_settings(),
        "calibration": dataclasses.asdict(calibration),
        "rows": setup.rows_hash,
        "code": code_version(decide_stage, type(method)),
        "libraries": libraries(),
    }
    return Stage("decide", key, compute, needs=(*start.needs, measured))


@dataclass(frozen=True)
class Findings:
    """What a method prunes by.

    Attributes:
        measured: what it has measured.
        decided: what it has decided beyond that; None if it decides nothing.
    """

    measured: Stage
    decided: Stage | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, which have run before `prune`."""
        return (self.measured,) if self.decided is None else (self.measured, self.decided)

    @property
    def id(self) -> str:
        """Identity of the last of them, which holds that of the others."""
        return self.stages[-1].id

    def pruner(self, setup: Setup, runner: StageRunner) -> Callable[[PreTrainedModel], Compressed]:
        """Returns what prunes a model in place. Computes the stages first if need be, before a model is in memory."""
        method, folders = setup.resolved_method, [runner.folder(stage) for stage in self.stages]
        prune = method.prune if self.decided is None else method.prune_as_decided
        return lambda model: prune(model, *folders)


def prune_stage(setup: Setup, runner: StageRunner, start: Start, findings: Findings) -> ModelStage:
    """Prunes and merges by what was measured or decided; keeps the plan: dense weights are at hand to repeat it."""
    method = setup.resolved_method

    def prune() -> tuple[Compressed, Cost]:
        prune_by_findings = findings.pruner(setup, runner)
        model = start.load()
        with Cost() as cost:
            return prune_by_findings(model), cost

    def compute(directory: Path) -> None:
        compressed, cost = prune()
        compressed.log_warnings()
        compressed.plan.save(directory / PLAN_FILE)
        size = {"num_parameters": count_parameters(compressed.model), "shape": model_shape(compressed.model).to_dict()}
        write_json(directory / REPORT_FILE, {**compressed.report, **size})
        cost.save(directory / COST_FILE)
        runner.hold(key, compressed.model)

    def load(directory: Path) -> PreTrainedModel:
        compressed, _ = prune()
        return compressed.model

    key = {
        "measure": findings.id,
        "method": method.name,
        "settings": method.prune_settings(),
        "code": code_version(prune_stage, type(method)),
        "libraries": libraries(),
    }
    return ModelStage("prune", key, compute, needs=(*start.needs, *findings.stages), load=load)


def repair_stage(setup: Setup, runner: StageRunner, start: Start, findings: Findings, pruned: ModelStage) -> ModelStage:
    """Fits and folds in the linear maps that repair the pruned model, on rows of the training split."""
    method = setup.resolved_method
    calibration = method.repair_calibration()
    assert calibration is not None

    def compute(directory: Path) -> None:
        prune_by_findings = findings.pruner(setup, runner)
        dense = start.load()
        compressed = prune_by_findings(sharing_copy(dense))
        batches = calibration_batches(setup, calibration)
        before = current_weights(compressed.model)
        with Cost() as cost:
            fits = method.repair_pruned(compressed.model, dense, compressed.plan, batches)
        save_repair(compressed.model, before, fits, directory)
        cost.save(directory / COST_FILE)

    def load(directory: Path) -> PreTrainedModel:
        model = runner.take(pruned)
        load_repair(model, directory)
        return model

    key = {
        "prune": pruned.id,
        "calibration": dataclasses.asdict(calibration),
        "rows": setup.rows_hash,
        "code": code_version(repair_stage, type(method)),
        "libraries": libraries(),
    }
    return ModelStage("repair", key, compute, needs=(*findings.stages, pruned), load=load)


def recover_stage(
    setup: Setup, runner: StageRunner, start: Start, pruned: ModelStage, compressed: ModelStage
) -> ModelStage:
    """Trains on the method's other data, between pruning and the fine-tune.

    Args:
        setup: the run.
        runner: of its stages.
        start: the dense weights, which may teach.
        pruned: where the plan is.
        compressed: the model that the training starts from.
    """
    recovery = setup.recovery
    assert recovery is not None

    def compute(directory: Path) -> None:
        loss, model = None, runner.take(compressed)
        if recovery.distillation is not None:
            teacher = start.load()
            loss = DistillationLoss(teacher, recovery.distillation, _plan(runner, pruned))
        finetune(
            model,
            setup.recovery_rows,
            setup.tokenizer.pad_token_id,
            recovery.training,
            directory,
            setup.seed,
            loss=loss,
            description="recover" if loss is None else "distil",
        )

    def load(directory: Path) -> PreTrainedModel:
        # Merged even where that rounds: the fine-tune puts its own adapters on.
        return merge_for_checkpoint(
            load_finetuned(runner.take(compressed), recovery.training, directory), recovery.training
        )

    key = {
        "compressed": compressed.id,
        "recovery": dataclasses.asdict(recovery) | {"training": recovery.training.result_settings()},
        "precision": resolve_precision(recovery.training),
        "rows": hash_rows(setup.recovery_rows),
        "seed": setup.seed,
        "code": code_version(recover_stage),
        "libraries": libraries(),
    }
    needs = (pruned, compressed)
    return ModelStage("recover", key, compute, resumable=True, together=True, needs=needs, load=load)


def finetune_stage(setup: Setup, runner: StageRunner, untuned: ModelStage, teachers: Teachers) -> ModelStage:
    """Fine-tunes on the task, with the callbacks of methods that act while the model trains."""
    method = setup.resolved_method

    def compute(directory: Path) -> None:
        finetune(
            runner.take(untuned),
            setup.rows,
            setup.tokenizer.pad_token_id,
            setup.training,
            directory,
            setup.seed,
            method.callbacks(),
            loss=signal_loss(setup, runner, teachers),
        )

    def load(directory: Path) -> PreTrainedModel:
        # From disk even right after training, so that a run and its continuation go the same way.
        return method.finish(load_finetuned(runner.take(untuned), setup.training, directory))

    key = {
        "untuned": untuned.id,
        "training": setup.training.result_settings(),
        "precision": resolve_precision(setup.training),
        "rows": setup.rows_hash,
        "seed": setup.seed,
        "code": code_version(finetune_stage, type(method)),
        "libraries": libraries(),
    }
    if teachers.predictions:
        key["teachers"] = [stage.id for stage in teachers.predictions]
    needs = (*teachers.predictions, untuned)  # the student's model is loaded last
    return ModelStage("finetune", key, compute, resumable=True, together=True, needs=needs, load=load, is_final=True)


def calibration_batches(setup: Setup, calibration: Calibration | None) -> Iterable[Batch]:
    """The training batches that a method looks at."""
    if calibration is None:
        return ()
    num_rows = calibration.count(len(setup.rows))
    return training_batches(
        setup.rows, calibration.batch_size, num_rows, setup.tokenizer.pad_token_id, calibration.seed
    )


def _plan(runner: StageRunner, pruned: Stage) -> PruningPlan:
    return PruningPlan.load(runner.folder(pruned) / PLAN_FILE)
