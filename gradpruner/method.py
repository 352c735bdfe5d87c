"""The protocol that GradPruner, every baseline and the dense model share.

A method acts before fine-tuning (`measure`, then `prune`), during it (`callbacks`) and after it (`finish`). Measuring
is separate from pruning because it is the expensive half, and most settings of a sweep only affect pruning: settings
that `measurement_settings` does not name can vary without measuring again. Between the two, `decide` looks at data once
more, if the method does so.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from gradpruner import processes
from gradpruner.encoding import Batch
from gradpruner.finetune.distill import Distillation
from gradpruner.finetune.spec import ANSWERS_LOSS, TrainingSpec
from gradpruner.models.architectures import check_model, decoder_layers
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan
from gradpruner.repair import Fit, JudgedFit, repair
from gradpruner.surgery import sharing_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compressed:
    """Compressed model with its plan and report.

    Attributes:
        model: the model to fine-tune.
        plan: what was done to its layers.
        report: JSON-ready record of what the method computed: scores, series, warnings.
    """

    model: PreTrainedModel
    plan: PruningPlan
    report: dict[str, Any]

    def log_warnings(self) -> None:
        """Logs the report's `warnings`. `prune` does not, because a caller may prune the same way several times."""
        for warning in self.report.get("warnings", []):
            logger.warning(warning)


@dataclass(frozen=True)
class Calibration:
    """Training batches that a method asks for.

    Attributes:
        batch_size: rows per batch.
        num_rows: total number of rows.
        seed: seed of the order of the rows.
        once: use no row twice, even if fewer exist than asked for; otherwise rows repeat, as in training.
    """

    batch_size: int
    num_rows: int
    seed: int
    once: bool = False

    def count(self, num_available: int) -> int:
        """Returns the number of rows to draw when `num_available` exist."""
        return min(self.num_rows, num_available) if self.once else self.num_rows


@dataclass(frozen=True)
class Recovery:
    """Training on other data between pruning and fine-tuning.

    Attributes:
        training: how to train.
        distillation: how to learn from the dense model's predictions; None: learn from the data's answers.
    """

    training: TrainingSpec
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on a combination that cannot work."""
        if self.training.loss != ANSWERS_LOSS:
            raise ValueError(
                f"Training between pruning and the fine-tune has a loss of its own, got loss={self.training.loss}. "
                "Leave it out of method.recover_training; finetune.loss is that of the fine-tune."
            )
        if self.training.tune_dense_first:
            raise ValueError(
                "Training between pruning and the fine-tune starts from the pruned model, got tune_dense_first=true. "
                "Leave it out of method.recover_training; finetune.tune_dense_first is that of the run."
            )
        if self.distillation is not None and self.training.mode != "full":
            raise ValueError(
                f"Distillation trains all weights, got mode={self.training.mode}. Leave it out of "
                "method.recover_training."
            )


@dataclass(frozen=True)
class Method:
    """Base of all methods. Creating one is cheap and checks its values; work starts in the hooks.

    Attributes:
        name: name of the method, as in `conf/method/`.
    """

    name: ClassVar[str]
    measures_together: ClassVar[bool] = False  # with several processes, all of them call `measure`, not only rank 0
    measures_per_layer: ClassVar[bool] = False  # `measure` passes over its rows for each layer anew; for time estimates

    def __post_init__(self) -> None:
        """Does nothing; subclasses check their values and call this one."""

    def base_model(self, model: ModelSpec) -> ModelSpec:
        """Returns the model that the method starts from: the dense model, except for `small_dense`."""
        return model

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Returns a checked copy in which everything that depends on the model or the training length is definite.

        Args:
            num_hidden_layers: decoder layers of the dense model.
            training_steps: optimizer steps of the planned fine-tuning, or None if unknown.

        Raises:
            ValueError: if the settings do not fit.
        """
        return self

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the shape of the compressed model, before any weight is loaded.

        Args:
            config: config of the model that the method starts from.

        Raises:
            ValueError: if the method does not support the architecture, or cannot make the model as small as required.
        """
        return config_shape(config)

    def undetermined(self) -> list[str]:
        """Describes the `auto` settings; until the run decides them, `shape` and `calibration` give upper bounds."""
        return []

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError if the method does not work with these training settings."""

    def check_rows(self, num_rows: int) -> None:
        """Raises ValueError if the method does not work with so few training rows."""

    def recovery(self) -> Recovery | None:
        """Returns the training on other data between pruning and fine-tuning, or None."""
        return None

    def repair_calibration(self) -> Calibration | None:
        """Returns the batches for `repair_pruned`, or None for no repair."""
        return None

    def repair_pruned(
        self, model: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, batches: Iterable[Batch]
    ) -> list[Fit] | list[JudgedFit]:
        """Repairs the pruned model in place; see `repair.repair`."""
        return repair(model, dense, plan, batches)

    def variant(self) -> str:
        """Returns what distinguishes this run from others of the method, for the name of its folder."""
        return ""

    def calibration(self) -> Calibration | None:
        """Returns the batches that `measure` needs, or None."""
        return None

    @property
    def measured_as(self) -> "type[Method]":
        """Method whose `measure` gives the same result for equal settings; the two methods then share measurements."""
        return type(self)

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the settings that decide what `measure` writes; part of its cache key."""
        return {}

    def prune_settings(self) -> dict[str, Any]:
        """Returns all settings of the method; part of the cache key of every later stage."""
        return dataclasses.asdict(self)

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Measures the model on the data and writes the result to `directory`; leaves the model unchanged."""

    def decision_calibration(self) -> Calibration | None:
        """Returns the batches that `decide` needs, or None if the method has no such step."""
        return None

    def decision_settings(self) -> dict[str, Any]:
        """Returns the settings that decide what `decide` writes; part of its cache key."""
        return {}

    def decide(self, model: PreTrainedModel, batches: Iterable[Batch], measured: Path, directory: Path) -> None:
        """Lets more data decide what to prune, by what `measure` wrote to `measured`; leaves the model unchanged.

        Writes the decision to `directory`. With several processes, rank 0 alone calls it.
        """

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Compresses the model in place, using what `measure` wrote to `directory`."""
        num_layers = len(decoder_layers(model))
        return Compressed(model, PruningPlan(num_hidden_layers=num_layers, method=self.name), {})

    def prune_as_decided(self, model: PreTrainedModel, measured: Path, decided: Path) -> Compressed:
        """Compresses the model in place, using what `measure` and `decide` wrote, in place of `prune`."""
        return self.prune(model, measured)

    def compress(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch] = (),
        repair_batches: Iterable[Batch] | None = None,
        decision_batches: Iterable[Batch] | None = None,
    ) -> Compressed:
        """Measures, prunes and repairs in one call, for use without the runner.

        Args:
            model: the dense model; changed in place.
            batches: dicts of `input_ids`, `attention_mask`, `labels` (-100 = no loss), each (B, T).
            repair_batches: batches for the repair; None: those of `batches`. No row should occur twice, because repairs
                are judged on rows that they were not fitted on.
            decision_batches: batches for `decide`; None: those of `batches`.

        Raises:
            ValueError: if the architecture is unknown, or settings, model and batches do not match.
        """
        check_model(model)
        method = self.resolve(len(decoder_layers(model)))
        method.shape(model.config)
        repairs, decides = method.repair_calibration() is not None, method.decision_calibration() is not None
        taken: Iterable[Batch] = list(batches) if repairs or decides else batches
        dense = sharing_copy(model) if repairs else None
        with tempfile.TemporaryDirectory() as own:
            scratch = Path(processes.broadcast(own))
            measured, decided = scratch / "measured", scratch / "decided"
            if processes.is_main():
                measured.mkdir()
                decided.mkdir()
            processes.wait_for_all()
            if method.measures_together or processes.is_main():
                method.measure(model, taken, measured)
            if decides and processes.is_main():
                method.decide(model, taken if decision_batches is None else decision_batches, measured, decided)
            processes.wait_for_all()
            compressed = method.prune_as_decided(model, measured, decided) if decides else method.prune(model, measured)
            processes.wait_for_all()
        compressed.log_warnings()
        if dense is None:
            return compressed
        repair_rows = taken if repair_batches is None else repair_batches
        fits = method.repair_pruned(compressed.model, dense, compressed.plan, repair_rows)
        return dataclasses.replace(compressed, plan=compressed.plan.with_details(repair=[asdict(fit) for fit in fits]))

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the Trainer callbacks that act during fine-tuning."""
        return []

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Makes the last changes to the fine-tuned model and returns the model to evaluate and save."""
        return model
