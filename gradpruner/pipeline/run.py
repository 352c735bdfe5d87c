"""One run, as data flows: measure -> prune (-> repair) (-> recover) -> fine-tune -> predict -> evaluate -> speed.

Every stage is cached by the content that determines it, so a sweep measures once, the dense model is fine-tuned once
for every table, and a run that was killed goes on where it was. No method is known here by name.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from gradpruner.cost import TotalCost, total_cost
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.finetune.run import PLAN_FILE, REPORT_FILE, TrainingAccount, read_result
from gradpruner.models.shape import ModelShape
from gradpruner.pipeline.cache import StageCache
from gradpruner.pipeline.runner import ModelStage, Stage, StageRunner
from gradpruner.pipeline.setup import Setup
from gradpruner.pipeline.stages import (
    COST_FILE,
    METRICS_FILE,
    SPEED_FILE,
    evaluate_stage,
    finetune_stage,
    measure_stage,
    predict_stage,
    prune_stage,
    recover_stage,
    repair_stage,
    speed_stage,
)
from gradpruner.plan import PruningPlan
from gradpruner.record_sections import MethodReport, Metrics, SpeedSection, empty_section
from gradpruner.repair import read_fits


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
        compression: `seconds` and `peak_memory_bytes` of measuring and pruning, without loading the model.
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
    prune: ModelStage
    repair: ModelStage | None
    recover: ModelStage | None
    untuned: ModelStage  # whichever of the three is the last
    finetune: ModelStage
    predict: Stage
    evaluate: Stage


class Pipeline(Setup):
    """A run: everything that decides it, and its stages in order."""

    def run(self) -> Outcome:
        """Runs every stage that is not in the cache yet."""
        self.check()
        self.resolved_evaluation.prepare()
        chain, runner = self._chain, self._runner
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
            "finetune": chain.finetune,
            "predict": chain.predict,
            "evaluate": chain.evaluate,
        }
        costs = [folder / COST_FILE for folder in (runner.folder(chain.measure), pruned, repaired) if folder]
        return Outcome(
            plan=plan.with_details(repair=read_fits(repaired)) if repaired else plan,
            report=report,
            num_parameters=num_parameters,
            shape=shape,
            training=read_result(trained),
            metrics=json.loads((after / METRICS_FILE).read_text()),
            metrics_before=json.loads((before / METRICS_FILE).read_text()) if before else empty_section(),
            predictions=after / PREDICTIONS_FILE,
            seconds={name: runner.seconds(stage) for name, stage in timed.items()},
            compression=total_cost(*costs),
            recovery=read_result(recovered) if recovered else None,
            speed=self._speed(shape) if self.measure_speed else None,
        )

    def load_result(self) -> PreTrainedModel:
        """The fine-tuned model of a finished run, rebuilt from the cache."""
        return self._runner.take(self._chain.finetune)

    def stages(self) -> dict[str, bool]:
        """Which stages are in the cache already."""
        found = {name: stage for name, stage in vars(self._chain).items() if stage is not None and name != "untuned"}
        return {name: self._runner.is_cached(stage) for name, stage in found.items()}

    @cached_property
    def _chain(self) -> _Chain:
        """The stages in order; nothing is computed yet."""
        runner = self._runner
        measured = measure_stage(self)
        pruned = prune_stage(self, runner, measured)
        repaired = repair_stage(self, runner, measured, pruned) if self.repairs else None
        recovered = recover_stage(self, runner, pruned, repaired or pruned) if self.recovery else None
        untuned = recovered or repaired or pruned
        finetuned = finetune_stage(self, runner, untuned)
        predicted = predict_stage(self, runner, finetuned)
        evaluated = evaluate_stage(self, runner, predicted)
        return _Chain(measured, pruned, repaired, recovered, untuned, finetuned, predicted, evaluated)

    def _evaluation_of(self, weights: ModelStage) -> Stage:
        return evaluate_stage(self, self._runner, predict_stage(self, self._runner, weights))

    def _speed(self, shape: ModelShape) -> SpeedSection:
        folder = self._runner.folder(speed_stage(self, shape))
        summary: SpeedSection = json.loads((folder / SPEED_FILE).read_text())
        return summary

    @cached_property
    def _runner(self) -> StageRunner:
        return StageRunner(StageCache(self.cache_dir / "stages"))
