"""What all methods have in common that prune whole layers: how many, and the repair of the cuts."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.checks import AUTO, check_choice
from gradpruner.encoding import Batch
from gradpruner.method import Calibration, Method
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.plan import PruningPlan, check_counts
from gradpruner.repair import JUDGED, NO_REPAIR, REPAIRS, Fit, JudgedFit, check_repairable, repair
from gradpruner.repair.judged import check_num_rows


@dataclass(frozen=True)
class DepthMethod(Method):
    """Base of methods that prune whole layers. Give either `sparsity` or `num_pruned_layers`.

    Attributes:
        sparsity: fraction of decoder layers to prune, `round(sparsity * layers)` layers; `auto` where the method can
            find it.
        num_pruned_layers: number of layers to prune.
        repair: how to repair the damage before fine-tuning, one of `repair.REPAIRS`; `least_squares` folds a linear map
            for every run of pruned layers into the layer before it; `judged` tries several changes there and keeps
            what raises the likelihood of held-out answers.
        repair_rows: training rows to repair with, at most all.
        repair_refit: with `repair=judged`, also refit the kept layers behind the first cut.
    """

    finds_sparsity: ClassVar[bool] = False  # supports sparsity=auto

    sparsity: float | str | None = None
    num_pruned_layers: int | None = None
    repair: str = NO_REPAIR
    repair_rows: int = 320
    repair_refit: bool = False

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
        if self.repair_refit and self.repair != JUDGED:
            raise ValueError(
                f"repair_refit=true is a part of repair={JUDGED}, got repair={self.repair}. Set method.repair={JUDGED}."
            )

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
        """Returns a shape with fewer layers; which layers are pruned does not matter."""
        assert self.num_pruned_layers is not None
        if self.repair_calibration() is not None:
            check_repairable(config, self.repair_kind)
        dense = config_shape(config)
        return dataclasses.replace(dense, layers=dense.layers[self.num_pruned_layers :])

    def repair_calibration(self) -> Calibration | None:
        """Returns rows of the training split, each at most once."""
        if self.repair_kind == NO_REPAIR:
            return None
        return Calibration(8, self.repair_rows, getattr(self, "seed", 0), once=True)

    def check_rows(self, num_rows: int) -> None:
        """Raises ValueError if there are too few rows to judge a repair by."""
        if self.repair_kind == JUDGED:
            check_num_rows(min(num_rows, self.repair_rows), num_rows)

    @property
    def repair_kind(self) -> str:
        """What `repair` comes to, one of `repair.REPAIRS`."""
        return self.repair

    def repair_pruned(
        self, model: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, batches: Iterable[Batch]
    ) -> list[Fit] | list[JudgedFit]:
        """Repairs by `repair_kind`; see `Method.repair_pruned`."""
        return repair(model, dense, plan, batches, kind=self.repair_kind, refit=self.repair_refit)

    def variant(self) -> str:
        """Returns how much is pruned, and whether the model is repaired."""
        cut = f"sparsity{self.sparsity}" if self.num_pruned_layers is None else f"layers{self.num_pruned_layers}"
        if self.repair == NO_REPAIR:
            return cut
        return f"{cut}-{self.repair}{'-refit' if self.repair_refit else ''}"
