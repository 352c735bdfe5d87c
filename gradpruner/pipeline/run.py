"""One run, as data flows: measure (-> decide) -> prune (-> repair) (-> recover) -> fine-tune -> predict -> evaluate.

Every stage is cached by the content that determines it, so a sweep measures once, the dense model is fine-tuned once
for every table, and a run that was killed goes on where it was. No method is known here by name.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.cost import COST_FILE, TotalCost, total_cost
from gradpruner.dense import Dense
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.finetune.result import PLAN_FILE, REPORT_FILE, TrainingAccount, merge_for_checkpoint, read_result
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, COMPLETE_MARK
from gradpruner.finetune.spec import ANSWERS_LOSS, DISTILL
from gradpruner.finetune.teacher import ANSWERS, PROMPT
from gradpruner.models.shape import ModelShape
from gradpruner.pipeline.cache import StageCache
from gradpruner.pipeline.disk import check_disk
from gradpruner.pipeline.estimate import check_memory
from gradpruner.pipeline.evaluation_stages import (
    METRICS_FILE,
    SPEED_FILE,
    evaluate_stage,
    predict_stage,
    speed_stage,
    vllm_stage,
)
from gradpruner.pipeline.runner import ModelStage, Stage, StageRunner
from gradpruner.pipeline.setup import Setup, hash_rows
from gradpruner.pipeline.stages import (
    Findings,
    decide_stage,
    finetune_stage,
    measure_stage,
    prune_stage,
    recover_stage,
    repair_stage,
    start_of,
)
from gradpruner.pipeline.teachers import Teachers, teach_stage
from gradpruner.pipeline.vllm_checks import check_vllm, uses_vllm
from gradpruner.pipeline.work import PlannedStage, stage_flops
from gradpruner.plan import PruningPlan
from gradpruner.record_sections import ContentSection, MethodReport, Metrics, SpeedSection, empty_section
from gradpruner.repair.saved import read_fits
from gradpruner.tasks import fingerprint


@dataclass(frozen=True)
class Outcome:
    """What a run found, still in the cache's folders.

    Attributes:
        plan: what was pruned and merged.
        report: what the method saw.
        num_parameters: of the compressed model.
        shape: of the compressed model.
        training: account of the fine-tune, see `finetune.run.finetune`.
        metrics: of the fine-tuned model.
        metrics_before: of the compressed model before fine-tuning, or empty.
        predictions: file with what the model answered to each test example, and what that scored.
        seconds: wall time of each stage when it was computed.
        compression: `seconds` and `peak_memory_bytes` of measuring, pruning, repair and teachers; loading models does
            not count.
        recovery: account of the training on other data between pruning and the fine-tune, or None.
        speed: phases of the dense model and this one, their ratios and the workload; None if not asked for.
    """

    plan: PruningPlan
    report: MethodReport
    num_parameters: int
    shape: ModelShape
    training: TrainingAccount
    metrics: Metrics
    metrics_before: Metrics
    predictions: Path
    seconds: dict[str, float]
    compression: TotalCost
    recovery: TrainingAccount | None = None
    speed: SpeedSection | None = None


@dataclass(frozen=True)
class _Chain:
    """The stages of a run; those that it does not have are None."""

    measure: Stage
    decide: Stage | None
    prune: ModelStage
    repair: ModelStage | None
    recover: ModelStage | None
    untuned: ModelStage  # whichever of the three is the last
    teachers: Teachers
    finetune: ModelStage
    predict: Stage
    evaluate: Stage


class Pipeline(Setup):
    """A run: everything that decides it, and its stages in order."""

    def check(self, resources: bool = True, save_to: Path | None = None) -> None:
        """Does the checks of `Setup.check`, and refuses a run that does not fit on this machine.

        Args:
            resources: also check space on the disk and memory of the GPU; a dry run does not.
            save_to: folder that the final model is saved to after the run, or None if it is not saved.

        Raises:
            ValueError: also if vLLM cannot generate the answers that it is to, or if the disk or the GPU cannot hold
                what the run needs.
        """
        super().check()
        check_vllm(self)
        if resources:
            folders = self._folders()
            if processes.is_main():
                check_disk(self, folders, save_to)
            check_memory(self, [stage for stage, folder in folders.items() if folder.is_dir()])

    def _folders(self) -> dict[str, Path]:
        """Returns where the result of each stage is or will be."""
        cache = StageCache(self.cache_dir / "stages")
        return {name: cache.path(stage.name, stage.key) for name, stage in self._named_stages().items()}

    def run(self) -> Outcome:
        """Runs every stage that is not in the cache yet."""
        self.check()
        self.resolved_evaluation.prepare()
        chain, runner = self._chain, self._runner
        taught = [runner.folder(stage) for stage in chain.teachers.predictions]  # first: they need other models
        pruned = runner.folder(chain.prune)
        repaired = runner.folder(chain.repair) if chain.repair else None
        recovered = runner.folder(chain.recover) if chain.recover else None
        before = runner.folder(self._evaluation_of(chain.untuned)) if self.evaluate_before else None
        trained = runner.folder(chain.finetune)
        after = runner.folder(chain.evaluate)
        described = trained if (trained / PLAN_FILE).is_file() else pruned  # some methods prune while they train
        report = json.loads((described / REPORT_FILE).read_text())
        shape, num_parameters = ModelShape.from_dict(report.pop("shape")), report.pop("num_parameters")
        plan = PruningPlan.load(described / PLAN_FILE)
        timed = {
            "measure": chain.measure,
            "decide": chain.decide,
            "prune": chain.prune,
            "repair": chain.repair,
            "recover": chain.recover,
            "finetune": chain.finetune,
            "predict": chain.predict,
            "evaluate": chain.evaluate,
        }
        measured, decided = runner.folder(chain.measure), runner.folder(chain.decide) if chain.decide else None
        costs = [folder / COST_FILE for folder in (measured, decided, pruned, repaired, *taught) if folder]
        return Outcome(
            plan=plan.with_details(repair=read_fits(repaired)) if repaired else plan,
            report=report,
            num_parameters=num_parameters,
            shape=shape,
            training=read_result(trained),
            metrics=json.loads((after / METRICS_FILE).read_text()),
            metrics_before=json.loads((before / METRICS_FILE).read_text()) if before else empty_section(),
            predictions=after / PREDICTIONS_FILE,
            seconds={name: runner.seconds(stage) for name, stage in timed.items() if stage},
            compression=self._with_tuned_dense(total_cost(*costs)),
            recovery=read_result(recovered) if recovered else None,
            speed=self._speed(shape) if self.measure_speed else None,
        )

    def _with_tuned_dense(self, cost: TotalCost) -> TotalCost:
        """Returns a cost with that of the fine-tune of the dense model that the run learns from, if it does."""
        if self._chain.teachers.tuned_dense is None:
            return cost
        account = read_result(self._runner.folder(self._chain.teachers.tuned_dense))
        return {
            "seconds": cost["seconds"] + account["train_seconds"],
            "peak_memory_bytes": max(cost["peak_memory_bytes"], account["peak_memory_bytes"]),
        }

    def describe_next_step(self) -> str:
        """Describes from which step a training that was interrupted goes on; empty if none has begun."""
        for name, folder in self._folders().items():
            checkpoints = folder.with_name(f"{folder.name}.partial") / CHECKPOINTS_FOLDER
            done = [int(mark.parent.name.split("-")[1]) for mark in checkpoints.glob(f"checkpoint-*/{COMPLETE_MARK}")]
            if checkpoints.is_dir():
                return f"{name} goes on from step {max(done, default=0) + 1}"
        return ""

    def load_result(self) -> PreTrainedModel:
        """Returns the fine-tuned model of a finished run as a checkpoint has it, rebuilt from the cache."""
        return merge_for_checkpoint(self._runner.take(self._chain.finetune), self.training)

    def stages(self) -> dict[str, bool]:
        """Which stages are in the cache already."""
        return {name: self._runner.is_cached(stage) for name, stage in self._named_stages().items()}

    def planned(self) -> list[PlannedStage]:
        """Returns the stages that `run` will ask for, in order, with the work that they take; computes none."""
        chain, flops = self._chain, stage_flops(self)
        named = self._named_stages()
        if self.evaluate_before:
            predicted = self._predictions_of(chain.untuned)
            before = {"predict_before": predicted, "evaluate_before": evaluate_stage(self, self._runner, predicted)}
            at = list(named).index("finetune")
            named = dict([*list(named.items())[:at], *before.items(), *list(named.items())[at:]])
        cache = StageCache(self.cache_dir / "stages")
        planned = [
            PlannedStage(
                name.replace("_", " "), stage.id, flops.get(name, 0.0), cache.path(stage.name, stage.key).is_dir()
            )
            for name, stage in named.items()
        ]
        # Only the run finds out the shape that is timed.
        return planned + [PlannedStage("speed", None, 0.0, False)] * self.measure_speed

    def stage_ids(self) -> dict[str, str]:
        """Returns the id of each stage, which covers settings, weights, data, code and versions; computes no stage."""
        return {name: stage.id for name, stage in self._named_stages().items()}

    @cached_property
    def content(self) -> ContentSection:
        """Weights and data that the run is made from, read when this is first asked for; loads no weights."""
        found: ContentSection = {
            "model": self.fingerprint,
            "train_rows": self.rows_hash,
            "test_rows": fingerprint(self.test_examples),
        }
        if self.recovery is not None:
            found["recovery_rows"] = hash_rows(self.recovery_rows)
        if encoder := self.resolved_evaluation.measurement_settings().get("weights"):
            found["encoder"] = encoder
        return found

    def _named_stages(self) -> dict[str, Stage]:
        """Returns the stages that the run has, in order."""
        chain = self._chain
        own = {name: stage for name, stage in vars(chain).items() if isinstance(stage, Stage) and name != "untuned"}
        return {**chain.teachers.named(), **own}

    @cached_property
    def _chain(self) -> _Chain:
        """The stages in order; nothing is computed yet."""
        runner, teachers = self._runner, self._teachers()
        start = start_of(self, runner, teachers.tuned_dense if self.training.tune_dense_first else None)
        measured = measure_stage(self, start)
        decides = self.resolved_method.decision_calibration() is not None
        decided = decide_stage(self, runner, start, measured) if decides else None
        findings = Findings(measured, decided)
        pruned = prune_stage(self, runner, start, findings)
        repaired = repair_stage(self, runner, start, findings, pruned) if self.repairs else None
        recovered = recover_stage(self, runner, start, pruned, repaired or pruned) if self.recovery else None
        untuned = recovered or repaired or pruned
        finetuned = finetune_stage(self, runner, untuned, teachers)
        predicted = self._predictions_of(finetuned)
        evaluated = evaluate_stage(self, runner, predicted)
        return _Chain(
            measured, decided, pruned, repaired, recovered, untuned, teachers, finetuned, predicted, evaluated
        )

    def _teachers(self) -> Teachers:
        """Returns the teachers that the fine-tune asks for; their stages are those of a run of the dense model."""
        runner, training = self._runner, self.training
        distills = training.loss == DISTILL
        if not distills and not training.tune_dense_first:
            return Teachers()
        plain = dataclasses.replace(
            training, loss=ANSWERS_LOSS, tuned_teacher=0.0, prompt_weight=1.0, tune_dense_first=False
        )
        dense = self.with_method(Dense(), plain)
        if training.tune_dense_first and self.base_model != self.model:
            raise ValueError(
                f"The fine-tuned dense model is what the method compresses with finetune.tune_dense_first=true, got "
                f"method={self.method.name}, which starts from {self.base_model.name} instead of {self.model.name}. "
                "Set finetune.tune_dense_first=false."
            )
        if dense.rows_hash != self.rows_hash or dense.config.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"The dense model can teach a model with the same tokens, got {self.model.name} and "
                f"{self.base_model.name}, whose tokenizers or vocabularies differ. Set finetune.loss=all_tokens or "
                "answers."
            )
        start = start_of(dense, runner)
        untuned = prune_stage(dense, runner, start, Findings(measure_stage(dense, start)))
        tuned = finetune_stage(dense, runner, untuned, Teachers()) if training.tunes_dense else None
        return Teachers(
            teach_stage(dense, runner, untuned, PROMPT) if distills and training.prompt_weight else None,
            tuned,
            teach_stage(dense, runner, tuned, ANSWERS) if tuned is not None and training.tuned_teacher else None,
        )

    def _evaluation_of(self, weights: ModelStage) -> Stage:
        return evaluate_stage(self, self._runner, self._predictions_of(weights))

    def _predictions_of(self, weights: ModelStage) -> Stage:
        stage = vllm_stage if uses_vllm(self) else predict_stage
        return stage(self, self._runner, weights)

    def _speed(self, shape: ModelShape) -> SpeedSection:
        folder = self._runner.folder(speed_stage(self, shape))
        summary: SpeedSection = json.loads((folder / SPEED_FILE).read_text())
        return summary

    @cached_property
    def _runner(self) -> StageRunner:
        return StageRunner(StageCache(self.cache_dir / "stages"))
