"""GradPruner (arXiv:2601.19503): the method of the paper, its variants, and our extensions."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner import stability
from gradpruner.auto_sparsity import search
from gradpruner.batch_rows import distinct_rows
from gradpruner.checks import AUTO, check_choice
from gradpruner.depth_method import DepthMethod
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import SCORES, STEP_WEIGHTINGS, igia_matrix, layer_importance, step_importance, step_weights
from gradpruner.importance import record_early_gradients
from gradpruner.importance_spec import ImportanceSettings, ImportanceSpec
from gradpruner.merge import check_rule
from gradpruner.method import Calibration, Compressed
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.models.shape import ModelShape
from gradpruner.plan import PruningPlan, check_counts, make_plan
from gradpruner.repair import LEAST_SQUARES
from gradpruner.surgery import apply_plan

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.json"
FEWEST_STEPS = 5  # importance steps below which the report warns


@dataclass(frozen=True)
class GradPruner(DepthMethod, ImportanceSettings):
    """GradPruner (arXiv:2601.19503): prune the layers that early LoRA gradients find unimportant, merge the best.

    Give either `sparsity` or `num_pruned_layers`, and either `steps` or `fraction`. The settings of the importance run
    are those of `ImportanceSettings`. With `sparsity=auto`, as many layers are pruned as the answers' likelihood allows
    (see `auto_sparsity`). With `steps=auto`, the importance run stops once the pruned set has settled.

    Attributes:
        merge_count: number of pruned layers to merge, the most important first.
        merged_layers: the pruned layers to merge, instead of `merge_count`.
        density: fraction of each merged weight that may enter the kept one (the paper's 80 % sparsity is 0.2).
        merge_rule: one of `merge.MERGE_RULES`; or `least_squares`, which merges nothing and repairs, like
            `merge_rule=none` with `repair=least_squares`.
        score: one of `igia.SCORES`.
        step_weighting: one of `igia.STEP_WEIGHTINGS`.
        steps: importance steps, or `auto`.
        fraction: importance steps as a fraction of the planned training steps (the paper's 1 %).
        max_steps: largest number of steps with `steps=auto`.
        patience: number of last steps over which the pruned set must not change with `steps=auto`.
        tolerance: how far the answers' negative log-likelihood may rise with `sparsity=auto`, as a fraction of the
            dense model's, after repair and before any training.
        max_sparsity: largest fraction of layers that may be pruned with `sparsity=auto`.
    """

    name: ClassVar[str] = "gradpruner"
    measures_together: ClassVar[bool] = True
    finds_sparsity: ClassVar[bool] = True

    merge_count: int = 3
    merged_layers: tuple[int, ...] | None = None
    density: float = 0.2
    merge_rule: str = "sign_average"
    score: str = "sumsq"
    step_weighting: str = "energy"
    steps: int | str | None = 40
    fraction: float | None = None
    max_steps: int = 100
    patience: int = 5
    tolerance: float = 0.1
    max_sparsity: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        super().__post_init__()
        if (self.steps is None) == (self.fraction is None):
            raise ValueError(
                f"Give either steps or fraction, got steps={self.steps} and fraction={self.fraction}. "
                "Set the other one to null."
            )
        if isinstance(self.steps, str) and self.steps != AUTO:
            raise ValueError(f"steps must be a number or auto, got {self.steps!r}. Change method.steps.")
        if self.patience < 1:
            raise ValueError(f"patience must be 1 or more, got {self.patience}. Raise method.patience.")
        if self.tolerance < 0.0:
            raise ValueError(
                f"tolerance must be 0 or above, got {self.tolerance}. For 10 % write method.tolerance=0.1."
            )
        if not 0.0 < self.max_sparsity < 1.0:
            raise ValueError(f"max_sparsity is a fraction of the layers, in (0, 1), got {self.max_sparsity}.")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction is a part of the training steps, in (0, 1], got {self.fraction}.")
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"density must be in [0, 1], got {self.density}. Set method.density, e.g. to 0.2.")
        if self.merge_count < 0:
            raise ValueError(f"merge_count must be 0 or above, got {self.merge_count}. Use 0 for no merging.")
        if self.merge_rule != LEAST_SQUARES:
            check_rule(self.merge_rule)
        check_choice("score", self.score, SCORES)
        check_choice("step_weighting", self.step_weighting, STEP_WEIGHTINGS)
        self.check_importance_settings()
        if self.steps is not None:
            self._importance_spec()  # checks the number of steps

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Turns `sparsity` into layers and `fraction` into steps; see `Method.resolve`."""
        resolved = super().resolve(num_hidden_layers)
        num_merged = self.merge_count if self.merged_layers is None else len(self.merged_layers)
        check_counts(num_hidden_layers, resolved._most_pruned(num_hidden_layers), num_merged)
        return resolved._with_steps(training_steps)

    def _most_pruned(self, num_hidden_layers: int) -> int:
        """Returns the number of layers to prune, or its upper bound with `sparsity=auto`."""
        if self.num_pruned_layers is not None:
            return self.num_pruned_layers
        if self.sparsity == AUTO:
            return max(1, math.floor(self.max_sparsity * num_hidden_layers))
        assert isinstance(self.sparsity, float | int)
        return round(self.sparsity * num_hidden_layers)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the shape with the most layers that may be pruned; see `Method.shape`."""
        most = self._most_pruned(config.num_hidden_layers)
        return super(GradPruner, dataclasses.replace(self, sparsity=None, num_pruned_layers=most)).shape(config)

    def _with_steps(self, training_steps: int | None) -> Self:
        """Turns `fraction` into steps."""
        if self.steps is not None:
            return self
        assert self.fraction is not None
        if training_steps is None:
            raise ValueError(
                f"fraction={self.fraction} needs the number of planned training steps, which is not known here. "
                "Call resolve(num_hidden_layers, training_steps) first, or give steps."
            )
        return dataclasses.replace(self, steps=max(2, round(self.fraction * training_steps)), fraction=None)

    def undetermined(self) -> list[str]:
        """Describes the `auto` settings among layers and steps; see `Method.undetermined`."""
        layers = ["how many layers leave"] if self.sparsity == AUTO else []
        return layers + (["how many importance steps it takes"] if self.steps == AUTO else [])

    def variant(self) -> str:
        """Returns how much is pruned and merged."""
        merged = self.merge_count if self.merged_layers is None else "-".join(map(str, self.merged_layers)) or 0
        return f"{super().variant()}-merge{merged}"

    @property
    def repair_kind(self) -> str:
        """`merge_rule=least_squares` also repairs."""
        return LEAST_SQUARES if self.merge_rule == LEAST_SQUARES else self.repair

    def calibration(self) -> Calibration:
        """Returns the batches of the first steps of a training run, in the same order."""
        spec = self._importance_spec()
        return Calibration(spec.batch_size, spec.batch_size * spec.steps * spec.accumulation, spec.seed)

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the settings of the importance run; one run serves every sparsity, merge count, score and density.

        With `steps=auto`, the settings that decide the number of steps are included.
        """
        settings = dataclasses.asdict(self._importance_spec())
        if self.steps == AUTO:
            deciding = ["sparsity", "num_pruned_layers", "patience", "score", "step_weighting"]
            deciding += ["max_sparsity"] if self.sparsity == AUTO else []
            settings["auto"] = {name: getattr(self, name) for name in deciding}
        return settings

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Runs step 1: gradients of the first LoRA steps (Eq. 2)."""
        most = self._most_pruned(len(decoder_layers(model)))

        def has_settled(energies: Tensor) -> bool:
            return stability.has_settled(
                step_importance(energies, self.score, self.step_weighting), most, self.patience
            )

        record_early_gradients(
            model, batches, self._importance_spec(), directory, has_settled if self.steps == AUTO else None
        )

    def decision_calibration(self) -> Calibration | None:
        """Returns rows of the training split, each at most once, for `sparsity=auto`; else nothing is open."""
        return Calibration(self.batch_size, self.repair_rows, self.seed, once=True) if self.sparsity == AUTO else None

    def decision_settings(self) -> dict[str, Any]:
        """Returns all settings: a search prunes, merges and repairs."""
        return self.prune_settings()

    def decide(self, model: PreTrainedModel, batches: Iterable[Batch], measured: Path, directory: Path) -> None:
        """Finds how many layers are pruned, with `sparsity=auto`."""
        gradients = EarlyGradients.load(measured)

        def prune(candidate: PreTrainedModel, num_pruned_layers: int) -> PruningPlan:
            return self._pruned(candidate, gradients, num_pruned_layers).plan

        self.find_number(model, distinct_rows(batches, self.repair_rows), prune, directory)

    def find_number(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        prune: Callable[[PreTrainedModel, int], PruningPlan],
        directory: Path,
    ) -> int:
        """Finds how many layers can be pruned, and writes what was tried to `directory`; see `auto_sparsity.search`."""
        found = search(
            model,
            batches,
            prune,
            repair=None if self.repair_calibration() is None else self.repair_pruned,
            tolerance=self.tolerance,
            most=self._most_pruned(len(decoder_layers(model))),
        )
        logger.info("sparsity=auto: %s", found)
        write_json(directory / SEARCH_FILE, found.to_dict())
        return found.num_pruned_layers

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Runs steps 2 to 4: layer importance (Eq. 3, 4), plan, merge (Eq. 5, 6) and surgery."""
        assert self.num_pruned_layers is not None
        return self._pruned(model, EarlyGradients.load(directory), self.num_pruned_layers)

    def prune_as_decided(self, model: PreTrainedModel, measured: Path, decided: Path) -> Compressed:
        """Runs steps 2 to 4 with the number of layers that `sparsity=auto` found."""
        found = self.search_report(decided)
        compressed = self._pruned(model, EarlyGradients.load(measured), found["num_pruned_layers"])
        return dataclasses.replace(compressed, report={**compressed.report, "search": found})

    def search_report(self, decided: Path) -> dict[str, Any]:
        """Returns what `find_number` wrote."""
        found: dict[str, Any] = json.loads((decided / SEARCH_FILE).read_text())
        return found

    def _pruned(self, model: PreTrainedModel, gradients: EarlyGradients, num_pruned_layers: int) -> Compressed:
        importance = layer_importance(gradients.energies, self.score, self.step_weighting).tolist()
        plan = make_plan(
            importance,
            num_pruned_layers,
            min(self.merge_count, num_pruned_layers),
            merge_rule="none" if self.merge_rule == LEAST_SQUARES else self.merge_rule,
            density=self.density,
            merged_layers=self.merged_layers,
            method=self.name,
        )
        report = self.importance_report(gradients, num_pruned_layers)
        if plan.dropped_unmerged:
            report["warnings"].append(
                f"Layers {list(plan.dropped_unmerged)} were to merge but no kept layer comes before them: dropped "
                "unmerged."
            )
        weights, layers = step_weights(gradients.energies, self.step_weighting).tolist(), decoder_layers(model)

        def igia(layer: int, sublayer: str) -> Tensor:
            absorber = plan.absorbed_by.get(layer)
            target = linear_sublayers(layers[layer if absorber is None else absorber])[sublayer].weight
            return igia_matrix(gradients.factors(layer, sublayer, target.device), weights)

        return Compressed(apply_plan(model, plan, igia), plan, report)

    def importance_report(self, gradients: EarlyGradients, num_pruned_layers: int) -> dict[str, Any]:
        """Returns the report on the importance run, with warnings where the ranking is doubtful."""
        per_step = step_importance(gradients.energies, self.score, self.step_weighting)  # (t, L)
        report = {
            "losses": list(gradients.losses),
            "train_seconds": gradients.train_seconds,
            "peak_memory_bytes": gradients.peak_memory_bytes,
            **stability.stability_report(per_step, num_pruned_layers),
        }
        report["warnings"] += step_warnings(per_step)
        return report

    def _importance_spec(self) -> ImportanceSpec:
        fields = [field.name for field in dataclasses.fields(ImportanceSpec)]
        settings = {name: getattr(self, name) for name in fields}
        return ImportanceSpec(**settings | ({"steps": self.max_steps} if self.steps == AUTO else {}))


def step_warnings(step_importance: Tensor) -> list[str]:
    """Returns a warning if fewer than `FEWEST_STEPS` steps rank the layers.

    Args:
        step_importance: importance per step and layer, (t, L); see `igia.step_importance`.
    """
    num_steps, num_with_gradient = len(step_importance), int(step_importance.any(dim=1).sum())
    if num_steps >= FEWEST_STEPS:
        return []
    return [
        f"Only {num_steps} importance steps rank the layers, {num_with_gradient} of them with a gradient: below "
        f"{FEWEST_STEPS}, a few rows may decide. Raise method.steps or method.fraction, or lower finetune.batch_size, "
        "which gives method.fraction more steps."
    ]
