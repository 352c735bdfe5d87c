"""Shared code of the layer-dropping baselines: score the decoder layers, drop the lowest.

A baseline is a subclass that defines how layers are scored (`score_layers`) and, if not simply the lowest, which layers
are dropped (`choose`). Scores come from the downstream training split (Section 4.2: "the pruning baselines also utilize
the downstream datasets as calibration data"). Neither padding nor the batch size changes a score.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from baselines.calibration import Calibrated
from gradpruner.depth_method import DepthMethod
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.method import Compressed
from gradpruner.models.architectures import check_finite_weights
from gradpruner.plan import PruningPlan, lowest_layers
from gradpruner.surgery import apply_plan

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class Scores:
    """Layer scores of a baseline.

    Attributes:
        layers: one score per layer; the lowest are dropped.
        details: other results to record, JSON-ready.
    """

    layers: list[float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _NoBatches:
    """Stands for no batches, which a method that asks for none may ignore, but not loop over."""

    method: str

    def __iter__(self) -> Iterator[Batch]:
        raise ValueError(
            f"method={self.method} looks at data, got no batches. Extend CalibratedLayerDropping or define "
            "calibration(), or give compress() some."
        )


@dataclass(frozen=True)
class LayerDropping(DepthMethod):
    """Base of the baselines that drop layers and change nothing else; `score_layers` gets no data."""

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Scores the layers.

        Raises:
            ValueError: if weights or scores are not finite, or calibration data is needed and there is none.
        """
        check_finite_weights(model)
        scores = self.score_layers(model, list(batches) or _NoBatches(self.name))
        bad = [layer for layer, score in enumerate(scores.layers) if not abs(score) < float("inf")]
        if bad:
            raise ValueError(
                f"The scores of layers {bad} are NaN or infinite with method={self.name}. Check the weights, or use a "
                "wider dtype (model.dtype=float32)."
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / SCORES_FILE, {"layers": scores.layers, "details": scores.details})

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Drops the layers that `choose` returns."""
        assert self.num_pruned_layers is not None
        scores = Scores(**json.loads((directory / SCORES_FILE).read_text()))
        plan = PruningPlan(
            num_hidden_layers=len(scores.layers),
            pruned_layers=self.choose(scores, self.num_pruned_layers),
            layer_importance=tuple(scores.layers),
            method=self.name,
            details=scores.details,
        )
        return Compressed(apply_plan(model, plan), plan, {})

    @abstractmethod
    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores every layer; leaves the model unchanged."""

    def choose(self, scores: Scores, num_pruned_layers: int) -> tuple[int, ...]:
        """Returns the layers to drop, ascending: the lowest scores, and the first of equal ones."""
        return lowest_layers(scores.layers, num_pruned_layers)


@dataclass(frozen=True)
class CalibratedLayerDropping(Calibrated, LayerDropping):
    """Base of the layer-dropping baselines that use data."""
