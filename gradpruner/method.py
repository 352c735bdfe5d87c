"""The protocol that GradPruner, every baseline and the dense model share, and GradPruner itself.

A method acts before fine-tuning (`measure`, then `prune`), during it (`callbacks`) and after it (`finish`). Measuring
is apart from pruning because it is the expensive half and most settings of a sweep only concern the other: whatever
`measurement_settings` does not name can vary without measuring again.
"""

import copy
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from gradpruner import stability
from gradpruner.architectures import check_model, decoder_layers
from gradpruner.auto_sparsity import AUTO, search
from gradpruner.distill import Distillation
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.finetune import TrainingSpec
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import (
    SCORES,
    STEP_WEIGHTINGS,
    check_choice,
    igia_matrix,
    layer_importance,
    step_importance,
    step_weights,
)
from gradpruner.importance import ImportanceSpec, record_early_gradients
from gradpruner.merge import check_rule
from gradpruner.models import ModelSpec
from gradpruner.plan import PruningPlan, check_counts, make_plan
from gradpruner.repair import REPAIRS, check_repairable, repair
from gradpruner.shape import ModelShape, config_shape
from gradpruner.surgery import apply_plan

logger = logging.getLogger(__name__)

LEAST_SQUARES = "least_squares"
SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class Compressed:
    """What a method made of a model.

    Attributes:
        model: the model to fine-tune.
        plan: what was done to its layers.
        report: JSON-ready account of what the method saw: scores, series, warnings.
    """

    model: PreTrainedModel
    plan: PruningPlan
    report: dict[str, Any]

    def log_warnings(self) -> None:
        """Logs the report's `warnings`; left to the caller, who may prune the same way several times."""
        for warning in self.report.get("warnings", []):
            logger.warning(warning)


@dataclass(frozen=True)
class Calibration:
    """The training batches that a method wants to look at.

    Attributes:
        batch_size: rows a batch.
        num_rows: how many rows in all.
        seed: order of the rows.
        once: take no row twice, even if there are fewer than asked for; else go round again, as training does.
    """

    batch_size: int
    num_rows: int
    seed: int
    once: bool = False

    def count(self, num_available: int) -> int:
        """How many rows it is of that many."""
        return min(self.num_rows, num_available) if self.once else self.num_rows


@dataclass(frozen=True)
class Recovery:
    """Training on other data between pruning and the fine-tune.

    Attributes:
        training: how to train.
        distillation: learn from the dense model's predictions; None: from the data's answers.
    """

    training: TrainingSpec
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on a combination that cannot work."""
        if self.distillation is not None and self.training.mode != "full":
            raise ValueError(
                f"Distillation trains all weights, got mode={self.training.mode}. Leave it out of "
                "method.recover_training."
            )


@dataclass(frozen=True)
class Method:
    """Base of all methods. Building one is cheap and checks its values; work starts in the hooks."""

    name: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ()  # modules of its own package that it works with

    def __post_init__(self) -> None:
        """Checks values in subclasses, each of which calls this one."""

    def base_model(self, model: ModelSpec) -> ModelSpec:
        """The model that the method starts from, given the dense one: that one, but for `small_dense`."""
        return model

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """A copy with everything that depends on the model or the training length made definite, and checked.

        Args:
            num_hidden_layers: decoder layers of the dense model.
            training_steps: optimizer steps of the planned fine-tune, or None if not known.

        Raises:
            ValueError: if the settings do not fit.
        """
        return self

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """The shape of the compressed model, known before a weight is loaded.

        Args:
            config: of the model that the method starts from.

        Raises:
            ValueError: if the method does not fit the architecture, or cannot make it as small as it should.
        """
        return config_shape(config)

    def undetermined(self) -> list[str]:
        """What only the run finds out. Until then `shape` and `calibration` are those of the most it may be."""
        return []

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError if the method does not work with this fine-tune."""

    def recovery(self) -> Recovery | None:
        """Training on other data between pruning and the fine-tune, or None."""
        return None

    def repair_calibration(self) -> Calibration | None:
        """The batches for `repair.repair` after pruning, or None for no repair."""
        return None

    def variant(self) -> str:
        """What sets this run apart from others of the method, for the name of its folder."""
        return ""

    def calibration(self) -> Calibration | None:
        """The batches that `measure` needs, or None."""
        return None

    @property
    def measured_as(self) -> "type[Method]":
        """The method whose `measure` this one has, settings being equal: the two then share what was measured."""
        return type(self)

    def measurement_settings(self) -> dict[str, Any]:
        """The settings that decide what `measure` writes; part of its cache key."""
        return {}

    def prune_settings(self) -> dict[str, Any]:
        """All settings of the method; part of the cache key of everything that comes after."""
        return dataclasses.asdict(self)

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Looks at the model and the data and writes what it saw to `directory`; leaves the model as it was."""

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Changes the model in place by what `measure` wrote to `directory`."""
        num_layers = len(decoder_layers(model))
        return Compressed(model, PruningPlan(num_hidden_layers=num_layers, method=self.name), {})

    def compress(self, model: PreTrainedModel, batches: Iterable[Batch] = ()) -> Compressed:
        """Measures and prunes in one go, for use without the runner.

        Args:
            model: the dense model; changed in place.
            batches: dicts of `input_ids`, `attention_mask`, `labels` (-100 = no loss), each (B, T).

        Raises:
            ValueError: if the architecture is not known, or settings, model and batches do not fit.
        """
        check_model(model)
        method = self.resolve(len(decoder_layers(model)))
        method.shape(model.config)
        repairs = method.repair_calibration() is not None
        taken: Iterable[Batch] = list(batches) if repairs else batches
        dense = copy.deepcopy(model) if repairs else None
        with tempfile.TemporaryDirectory() as scratch:
            method.measure(model, taken, Path(scratch))
            compressed = method.prune(model, Path(scratch))
        compressed.log_warnings()
        if dense is None:
            return compressed
        fits = repair(compressed.model, dense, compressed.plan, taken)
        return dataclasses.replace(compressed, plan=compressed.plan.with_details(repair=[asdict(fit) for fit in fits]))

    def callbacks(self) -> list[TrainerCallback]:
        """Trainer callbacks that act during fine-tuning."""
        return []

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Last word on the fine-tuned model before it is evaluated and saved."""
        return model


@dataclass(frozen=True)
class DepthMethod(Method):
    """Base of methods that take out whole layers. Give either `sparsity` or `num_pruned_layers`.

    Attributes:
        sparsity: fraction of decoder layers to prune; `round(sparsity * layers)` leave. `auto` where the method can
            find it.
        num_pruned_layers: how many layers leave.
        repair: what to do about the damage before fine-tuning, one of `repair.REPAIRS`; `least_squares` folds a linear
            map for every run of pruned layers into the layer before it.
        repair_rows: training rows for that, at most all.
    """

    finds_sparsity: ClassVar[bool] = False  # knows sparsity=auto

    sparsity: float | str | None = None
    num_pruned_layers: int | None = None
    repair: str = "none"
    repair_rows: int = 320

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        if (self.sparsity is None) == (self.num_pruned_layers is None):
            raise ValueError(
                f"Give either sparsity or num_pruned_layers, got sparsity={self.sparsity} and "
                f"num_pruned_layers={self.num_pruned_layers}. Set the other one to null."
            )
        if isinstance(self.sparsity, str):
            self._check_auto_sparsity()
        elif self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(
                f"sparsity is the fraction of decoder layers to prune, in [0, 1), got {self.sparsity}. "
                "For 40 % write sparsity=0.4."
            )
        check_choice("method.repair", self.repair, REPAIRS)
        if self.repair_rows < 2:
            raise ValueError(f"repair_rows must be 2 or more, got {self.repair_rows}. Raise method.repair_rows.")

    def _check_auto_sparsity(self) -> None:
        if self.sparsity != AUTO:
            raise ValueError(f"sparsity must be a number or auto, got {self.sparsity!r}. For 40 % write sparsity=0.4.")
        if not self.finds_sparsity:
            raise ValueError(
                f"sparsity=auto is found from an importance run, which method={self.name} does not have. Set sparsity "
                "to a number, or use method=gradpruner_plus."
            )

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Turns `sparsity` into a number of layers unless it is `auto`; see `Method.resolve`."""
        if self.sparsity == AUTO:
            return self
        num_pruned = self.num_pruned_layers
        if num_pruned is None:
            assert isinstance(self.sparsity, float | int)
            num_pruned = round(self.sparsity * num_hidden_layers)
        check_counts(num_hidden_layers, num_pruned)
        return dataclasses.replace(self, sparsity=None, num_pruned_layers=num_pruned)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Fewer layers of the same shape; which ones leave does not matter for that."""
        assert self.num_pruned_layers is not None
        if self.repair_calibration() is not None:
            check_repairable(config)
        dense = config_shape(config)
        return dataclasses.replace(dense, layers=dense.layers[self.num_pruned_layers :])

    def repair_calibration(self) -> Calibration | None:
        """Rows of the training split, each at most once."""
        if self.repair == "none":
            return None
        return Calibration(8, self.repair_rows, getattr(self, "seed", 0), once=True)

    def variant(self) -> str:
        """How much is pruned, and whether it is repaired."""
        cut = f"sparsity{self.sparsity}" if self.num_pruned_layers is None else f"layers{self.num_pruned_layers}"
        return cut if self.repair == "none" else f"{cut}-{self.repair}"


@dataclass(frozen=True)
class GradPruner(DepthMethod):
    """GradPruner (arXiv:2601.19503): prune the layers that early LoRA gradients find unimportant, merge the best.

    Give either `sparsity` or `num_pruned_layers`, and either `steps` or `fraction`. The settings of the importance run
    are those of `importance.ImportanceSpec`. With `sparsity=auto` as many layers leave as the answers' likelihood bears
    (see `auto_sparsity`); with `steps=auto` the importance run stops once the pruned set has settled.

    Attributes:
        merge_count: how many of the pruned layers merge, the most important first.
        merged_layers: the pruned layers that merge, instead of `merge_count`.
        density: fraction of each merged weight that may enter the kept one (the paper's 80 % sparsity is 0.2).
        merge_rule: one of `merge.MERGE_RULES`; or `least_squares`, which merges nothing and repairs, as
            `merge_rule=none` with `repair=least_squares` does.
        score: one of `igia.SCORES`.
        step_weighting: one of `igia.STEP_WEIGHTINGS`.
        steps: importance steps, or `auto`.
        fraction: importance steps as a fraction of the planned training steps (the paper's 1 %).
        max_steps: the most steps with `steps=auto`.
        patience: over how many of the last steps the pruned set must stay the same with `steps=auto`.
        tolerance: how far the answers' negative log-likelihood may rise with `sparsity=auto`, as a part of the dense
            model's, after repair and before any training.
        max_sparsity: the largest fraction of layers that may leave with `sparsity=auto`.
    """

    name: ClassVar[str] = "gradpruner"
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
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-5
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_init: str = "default"
    adapter: str = "lora"
    max_grad_norm: float = 0.0
    gradient_estimate: str = "product"
    gradient_checkpointing: bool = False
    seed: int = 0

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
        if self.steps is not None:
            self._importance_spec()  # checks its own values

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Turns `sparsity` into layers and `fraction` into steps; see `Method.resolve`."""
        resolved = super().resolve(num_hidden_layers)
        num_merged = self.merge_count if self.merged_layers is None else len(self.merged_layers)
        check_counts(num_hidden_layers, resolved._most_pruned(num_hidden_layers), num_merged)
        return resolved._with_steps(training_steps)

    def _most_pruned(self, num_hidden_layers: int) -> int:
        """How many layers leave, or at most so many with `sparsity=auto`."""
        if self.num_pruned_layers is not None:
            return self.num_pruned_layers
        if self.sparsity == AUTO:
            return max(1, math.floor(self.max_sparsity * num_hidden_layers))
        assert isinstance(self.sparsity, float | int)
        return round(self.sparsity * num_hidden_layers)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """That of the most layers pruned; see `Method.shape`."""
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
        """Layers and steps that are `auto`; see `Method.undetermined`."""
        layers = ["how many layers leave"] if self.sparsity == AUTO else []
        return layers + (["how many importance steps it takes"] if self.steps == AUTO else [])

    def variant(self) -> str:
        """How much is pruned and merged."""
        merged = self.merge_count if self.merged_layers is None else "-".join(map(str, self.merged_layers)) or 0
        return f"{super().variant()}-merge{merged}"

    def repair_calibration(self) -> Calibration | None:
        """As for all depth methods; `merge_rule=least_squares` asks for it, too."""
        if self.merge_rule == LEAST_SQUARES:
            return dataclasses.replace(self, merge_rule="none", repair=LEAST_SQUARES).repair_calibration()
        return super().repair_calibration()

    def calibration(self) -> Calibration:
        """Step for step the first batches of a training run."""
        spec = self._importance_spec()
        return Calibration(spec.batch_size, spec.batch_size * spec.steps * spec.accumulation, spec.seed)

    def measurement_settings(self) -> dict[str, Any]:
        """The importance run; neither counts nor rules: it serves every sparsity, merge count, score and density.

        With `auto` what decides about the number of steps or layers is part of it.
        """
        settings, auto = dataclasses.asdict(self._importance_spec()), dataclasses.asdict(self)
        if self.sparsity == AUTO:
            settings["auto"] = auto
        elif self.steps == AUTO:
            deciding = ("sparsity", "num_pruned_layers", "patience", "score", "step_weighting")
            settings["auto"] = {name: auto[name] for name in deciding}
        return settings

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Step 1: gradients of the first LoRA steps (Eq. 2); with `sparsity=auto` also how many layers can leave."""
        most, taken = self._most_pruned(len(decoder_layers(model))), list(batches)

        def has_settled(energies: Tensor) -> bool:
            return stability.has_settled(
                step_importance(energies, self.score, self.step_weighting), most, self.patience
            )

        gradients = record_early_gradients(
            model, taken, self._importance_spec(), directory, has_settled if self.steps == AUTO else None
        )
        if self.sparsity != AUTO:
            return
        found = search(
            model,
            taken[: -(-self.repair_rows // self.batch_size)],
            lambda candidate, num_pruned: self._pruned(candidate, gradients, num_pruned).plan,
            repairs=self.repair_calibration() is not None,
            tolerance=self.tolerance,
            most=most,
        )
        logger.info("sparsity=auto: %s", found)
        write_json(directory / SEARCH_FILE, found.to_dict())

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Steps 2 to 4: layer importance (Eq. 3, 4), plan, merge (Eq. 5, 6) and surgery."""
        gradients = EarlyGradients.load(directory)
        if self.num_pruned_layers is not None:
            return self._pruned(model, gradients, self.num_pruned_layers)
        found = json.loads((directory / SEARCH_FILE).read_text())
        compressed = self._pruned(model, gradients, found["num_pruned_layers"])
        return dataclasses.replace(compressed, report={**compressed.report, "search": found})

    def _pruned(self, model: PreTrainedModel, gradients: EarlyGradients, num_pruned_layers: int) -> Compressed:
        per_step = step_importance(gradients.energies, self.score, self.step_weighting)  # (t, L)
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
        report = {
            "losses": list(gradients.losses),
            "train_seconds": gradients.train_seconds,
            "peak_memory_bytes": gradients.peak_memory_bytes,
            **stability.stability_report(per_step, num_pruned_layers),
        }
        if plan.dropped_unmerged:
            report["warnings"].append(
                f"Layers {list(plan.dropped_unmerged)} were to merge but no kept layer comes before them: dropped "
                "unmerged."
            )
        weights = step_weights(gradients.energies, self.step_weighting).tolist()

        def igia(layer: int, sublayer: str) -> Tensor:
            return igia_matrix(gradients.factors(layer, sublayer), weights)

        return Compressed(apply_plan(model, plan, igia), plan, report)

    def _importance_spec(self) -> ImportanceSpec:
        fields = [field.name for field in dataclasses.fields(ImportanceSpec)]
        settings = {name: getattr(self, name) for name in fields}
        return ImportanceSpec(**settings | ({"steps": self.max_steps} if self.steps == AUTO else {}))
