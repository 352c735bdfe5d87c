"""GradPruner+: our recommended recipe, built from GradPruner's own parts and our extensions."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.batch_rows import distinct_rows
from gradpruner.candidates import CandidateSettings, LayerScores, choose_layers
from gradpruner.checks import AUTO, check_above_zero
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.halving import HalvingSettings
from gradpruner.igia import layer_importance
from gradpruner.method import Calibration, Compressed, Method
from gradpruner.plan import PruningPlan
from gradpruner.repair import JUDGED
from gradpruner.repair.judged import check_num_rows, divide_rows
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
        halving: optimizer steps of rounds of short LoRA fine-tunes that decide among the best sets, such as 8, 16, 32:
            with n rounds 2^n sets begin, and the better half of each round goes on; empty: no such rounds.
        halving_learning_rate: their peak rate.
        halving_batch_size: their rows per step.
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
    halving: tuple[int, ...] = ()
    halving_learning_rate: float = 1e-3
    halving_batch_size: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        super().__post_init__()
        for name in ("num_edits", "num_repaired", "greedy_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}. Set method.{name}=0 for none.")
        self._check_halving()
        if not self.candidates:
            return
        if self.merge_count or self.merged_layers:
            raise ValueError(
                "Layers merge by the early gradients' own plan, got candidates=true with "
                f"merge_count={self.merge_count} and merged_layers={self.merged_layers}. Set method.candidates=false "
                "to merge, or merge_count=0."
            )

    def _check_halving(self) -> None:
        if not self.halving:
            return
        if not all(isinstance(steps, int) and steps > 0 for steps in self.halving):
            raise ValueError(
                f"halving lists optimizer steps above 0, one number for each round, got {list(self.halving)}. Set "
                "method.halving=[8,16,32], or [] for no short fine-tunes."
            )
        check_above_zero(self, "halving_learning_rate", "halving_batch_size")
        if self.num_repaired or not self.candidates:
            raise ValueError(
                "halving decides among candidates as they are, unrepaired, got "
                f"candidates={str(self.candidates).lower()} and num_repaired={self.num_repaired}. Set "
                "method.candidates=true and method.num_repaired=0, or method.halving=[]."
            )

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError with `halving` on several processes: rank 0 alone chooses, and a fine-tune needs all."""
        super().check_training(training)
        if self.halving and processes.count() > 1:
            raise ValueError(
                f"halving trains candidates on one process, got {processes.count()}. Set method.halving=[], or start "
                "the run with plain python; the stages that it has computed serve a later run on several processes."
            )

    def check_rows(self, num_rows: int) -> None:
        """Raises ValueError if there are too few rows to choose candidates by, or to judge a repair by."""
        super().check_rows(num_rows)
        if self.candidates:
            check_num_rows(min(num_rows, self.repair_rows), num_rows)

    @property
    def measured_as(self) -> type[Method]:
        """GradPruner, whose importance run this method shares."""
        return GradPruner

    def decision_calibration(self) -> Calibration | None:
        """Returns rows of the training split, each at most once."""
        if not self.candidates:
            return super().decision_calibration()
        return Calibration(self.batch_size, self.repair_rows, self.seed, once=True)

    def decision_settings(self) -> dict[str, Any]:
        """Returns everything that the choice depends on beside the importance run."""
        if self.sparsity == AUTO:
            return super().decision_settings()
        return {
            **dataclasses.asdict(self._candidate_settings()),
            "pruned": self.num_pruned_layers,
            "score": self.score,
            "step_weighting": self.step_weighting,
        }

    def prune_settings(self) -> dict[str, Any]:
        """Returns all settings, those of short fine-tunes only where there are any: they follow the fine-tune's."""
        settings = super().prune_settings()
        unused = () if self.halving else ("halving_learning_rate", "halving_batch_size")
        return {name: value for name, value in settings.items() if name not in unused}

    def decide(self, model: PreTrainedModel, batches: Iterable[Batch], measured: Path, directory: Path) -> None:
        """Lets sets of layers compete; with `sparsity=auto`, the best sets of one criterion find how many leave."""
        if not self.candidates:
            super().decide(model, batches, measured, directory)
            return
        rows, gradients = distinct_rows(batches, self.repair_rows), EarlyGradients.load(measured)
        fitted, _, _ = divide_rows(rows)
        scores = LayerScores.measure(model, self._importance(gradients), fitted)

        def prune(candidate: PreTrainedModel, num_pruned_layers: int) -> PruningPlan:
            best = choose_layers(model, scores, num_pruned_layers, rows, CandidateSettings(0, 0)).candidates[0]
            plan = self._plan(gradients, best.layers)
            apply_plan(candidate, plan)
            return plan

        number = self.num_pruned_layers
        if number is None:
            number = self.find_number(model, rows, prune, directory)
        choice = choose_layers(model, scores, number, rows, self._candidate_settings())
        logger.info("Of %d sets of layers, %s is pruned", len(choice.candidates), choice.candidates[0])
        write_json(directory / CANDIDATES_FILE, choice.to_dict())

    def _importance(self, gradients: EarlyGradients) -> list[float]:
        importance: list[float] = layer_importance(gradients.energies, self.score, self.step_weighting).tolist()
        return importance

    def _plan(self, gradients: EarlyGradients, pruned_layers: tuple[int, ...]) -> PruningPlan:
        importance = tuple(self._importance(gradients))
        return PruningPlan(len(importance), pruned_layers, layer_importance=importance, method=self.name)

    def prune_as_decided(self, model: PreTrainedModel, measured: Path, decided: Path) -> Compressed:
        """Prunes the set that was chosen."""
        if not self.candidates:
            return super().prune_as_decided(model, measured, decided)
        choice = json.loads((decided / CANDIDATES_FILE).read_text())
        gradients = EarlyGradients.load(measured)
        plan = self._plan(gradients, tuple(choice["candidates"][0]["layers"]))
        report = {**self.importance_report(gradients, len(plan.pruned_layers)), "candidates": choice}
        if self.sparsity == AUTO:
            report["search"] = self.search_report(decided)
        return Compressed(apply_plan(model, plan), plan, report)

    def _candidate_settings(self) -> CandidateSettings:
        halving = None
        if self.halving:
            halving = HalvingSettings(
                tuple(self.halving), self.halving_learning_rate, self.halving_batch_size, self.seed
            )
        return CandidateSettings(
            self.num_edits,
            self.num_repaired if self.repair == JUDGED else 0,
            self.greedy_width,
            self.repair_refit,
            halving,
        )
