"""GradPruner+: our recommended recipe, built from GradPruner's own parts and our extensions."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.batch_rows import distinct_rows
from gradpruner.candidates import CandidateSettings, LayerScores, choose_layers
from gradpruner.checks import AUTO
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import layer_importance
from gradpruner.method import Calibration, Compressed, Method
from gradpruner.plan import PruningPlan
from gradpruner.repair import JUDGED
from gradpruner.repair.judged import divide_rows
from gradpruner.surgery import apply_plan

logger = logging.getLogger(__name__)

CANDIDATES_FILE = "candidates.json"


@dataclass(frozen=True)
class GradPrunerPlus(GradPruner):
    """GradPruner whose pruned set competes with those of other criteria, and whose cuts are repaired.

    Held-out answers decide both which set is pruned (see `candidates`) and what repairs it (see `repair.judged`).
    Nothing merges, and the importance run ends once its pruned set has settled.

    Attributes:
        candidates: let sets compete; false prunes what the early gradients name, and then layers may merge.
        num_edits: edits of the best set that are scored.
        num_repaired: sets that are repaired before the choice, the best first.
        greedy_width: layers that are scored again for each one that the greedy set prunes; 0: no greedy set.
    """

    name: ClassVar[str] = "gradpruner_plus"

    merge_count: int = 0
    merge_rule: str = "none"
    repair: str = JUDGED
    steps: int | str | None = AUTO
    candidates: bool = True
    num_edits: int = 8
    num_repaired: int = 0
    greedy_width: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        super().__post_init__()
        for name in ("num_edits", "num_repaired", "greedy_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}. Set method.{name}=0 for none.")
        if not self.candidates:
            return
        if self.merge_count or self.merged_layers:
            raise ValueError(
                "Layers merge by the early gradients' own plan, got candidates=true with "
                f"merge_count={self.merge_count} and merged_layers={self.merged_layers}. Set method.candidates=false "
                "to merge, or merge_count=0."
            )

    @property
    def measured_as(self) -> type[Method]:
        """GradPruner, whose importance run this method shares, unless candidates are a part of the measurement."""
        return type(self) if self.candidates else GradPruner

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the settings of the importance run, and with candidates everything that the choice depends on."""
        settings = super().measurement_settings()
        if not self.candidates:
            return settings
        choice = dataclasses.asdict(self._candidate_settings())
        return {
            **settings,
            "choice": {
                **choice,
                "pruned": self.num_pruned_layers,
                "rows": self.repair_rows,
                "score": self.score,
                "step_weighting": self.step_weighting,
            },
        }

    def calibration(self) -> Calibration:
        """Returns the batches of the importance run, and more where the candidates look at more rows."""
        own = super().calibration()
        if not self.candidates:
            return own
        num_rows = -(-self.repair_rows // own.batch_size) * own.batch_size
        return dataclasses.replace(own, num_rows=max(own.num_rows, num_rows))

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Runs the importance run; then lets sets of layers compete."""
        taken, own = list(batches), super().calibration()
        super().measure(model, taken[: own.num_rows // own.batch_size], directory)
        if not self.candidates or not processes.is_main():
            return
        rows = distinct_rows(taken, self.repair_rows)
        scores = self._scores(model, EarlyGradients.load(directory), rows)
        num_pruned_layers = self._number_of_layers(directory)
        choice = choose_layers(model, scores, num_pruned_layers, rows, self._candidate_settings())
        logger.info("Of %d sets of layers, %s is pruned", len(choice.candidates), choice.candidates[0])
        write_json(directory / CANDIDATES_FILE, choice.to_dict())

    def pruner(
        self, model: PreTrainedModel, gradients: EarlyGradients, batches: Iterable[Batch]
    ) -> Callable[[PreTrainedModel, int], PruningPlan]:
        """Returns what prunes the best set of one criterion; see `GradPruner.pruner`."""
        if not self.candidates:
            return super().pruner(model, gradients, batches)
        rows = distinct_rows(batches, self.repair_rows)
        scores = self._scores(model, gradients, rows)

        def prune(candidate: PreTrainedModel, num_pruned_layers: int) -> PruningPlan:
            choice = choose_layers(model, scores, num_pruned_layers, rows, CandidateSettings(0, 0))
            plan = self._plan(gradients, choice.candidates[0].layers)
            apply_plan(candidate, plan)
            return plan

        return prune

    def _scores(self, model: PreTrainedModel, gradients: EarlyGradients, rows: list[Batch]) -> LayerScores:
        fitted, _, _ = divide_rows(rows)
        return LayerScores.measure(model, self._importance(gradients), fitted)

    def _importance(self, gradients: EarlyGradients) -> list[float]:
        importance: list[float] = layer_importance(gradients.energies, self.score, self.step_weighting).tolist()
        return importance

    def _plan(self, gradients: EarlyGradients, pruned_layers: tuple[int, ...]) -> PruningPlan:
        importance = tuple(self._importance(gradients))
        return PruningPlan(len(importance), pruned_layers, layer_importance=importance, method=self.name)

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Prunes the set that was chosen."""
        if not self.candidates:
            return super().prune(model, directory)
        choice = json.loads((directory / CANDIDATES_FILE).read_text())
        gradients = EarlyGradients.load(directory)
        plan = self._plan(gradients, tuple(choice["candidates"][0]["layers"]))
        report = {**self.importance_report(gradients, len(plan.pruned_layers)), "candidates": choice}
        if self.sparsity == AUTO:
            report["search"] = self._search_report(directory)
        return Compressed(apply_plan(model, plan), plan, report)

    def _candidate_settings(self) -> CandidateSettings:
        return CandidateSettings(
            self.num_edits, self.num_repaired if self.repair == JUDGED else 0, self.greedy_width, self.repair_refit
        )
