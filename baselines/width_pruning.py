"""Shared code of the methods that narrow layers: a budget, scores of units, and the choice of units to keep.

Scores come from the downstream training split, as for all pruning baselines (Section 4.2).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from gradpruner.budget import check_match, check_sparsity
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.method import Method
from gradpruner.models.shape import ModelShape, check_width_supported

SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True)
class WidthPruning(Method):
    """Base of the methods that narrow layers.

    Attributes:
        sparsity: fraction to prune, with the meaning that `match` gives it.
        match: `layers`: keep as many parameters as GradPruner does when it prunes that fraction of layers, the input
            embedding not counted; `total`: prune that fraction of all parameters; `native`: the method's own setting
            decides.
    """

    sparsity: float = 0.4
    match: str = "layers"

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        check_sparsity(self.sparsity)
        check_match(self.match)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the shape with narrower layers; see `Method.shape`."""
        check_width_supported(config, self.name)
        return self.narrower_shape(config)

    @abstractmethod
    def narrower_shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the shape that meets the budget, for a supported architecture."""

    def variant(self) -> str:
        """Returns the sparsity, and `match` unless it is `layers`."""
        return f"sparsity{self.sparsity}" + ("" if self.match == "layers" else f"-{self.match}")


def save_scores(scores: Mapping[str, Tensor], directory: Path, method: str) -> None:
    """Writes one score per unit, by name.

    Raises:
        ValueError: if scores are not finite; -inf is allowed, for units that are pruned whatever the others score.
    """
    for name, values in scores.items():
        if bool((values.isnan() | (values == torch.inf)).any()):
            raise ValueError(
                f"Scores of {name} are NaN or infinite with method={method}. Check the weights, or use a wider dtype "
                "(model.dtype=float32)."
            )
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: values.double().cpu().contiguous() for name, values in scores.items()}, directory / SCORES_FILE)


def load_scores(directory: Path) -> dict[str, Tensor]:
    """Reads the scores that `save_scores` wrote, float64."""
    scores: dict[str, Tensor] = load_file(directory / SCORES_FILE)
    return scores


def highest(scores: Sequence[float] | Tensor, count: int) -> tuple[int, ...]:
    """Returns the `count` highest-scoring units to keep, ascending; of equal ones the first is pruned first."""
    values = torch.as_tensor(scores, dtype=torch.float64)
    order = torch.sort(values, stable=True).indices  # lowest first, equal ones by index
    return tuple(sorted(order[len(values) - count :].tolist()))


def heads_of(groups: Sequence[int], rep: int) -> tuple[int, ...]:
    """Returns the query heads of KV groups, `rep` per group."""
    return tuple(group * rep + head for group in groups for head in range(rep))


def training_spec(settings: Mapping[str, Any] | None, method: str) -> TrainingSpec:
    """Returns how to train between pruning and the fine-tune.

    Raises:
        ValueError: if a setting is not one of `finetune.spec.TrainingSpec`.
    """
    known = [field.name for field in fields(TrainingSpec)]
    unknown = sorted(set(settings or {}) - set(known))
    if unknown:
        raise ValueError(
            f"method.recover_training takes the settings of finetune, got {', '.join(unknown)} with method={method}. "
            f"Known: {', '.join(known)}."
        )
    return TrainingSpec(**(settings or {}))
