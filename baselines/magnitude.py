"""Magnitude: drop the layers whose linear weights have the smallest sum of squares. Uses no data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from baselines.layer_dropping import LayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.models.architectures import decoder_layers, linear_sublayers


@dataclass(frozen=True)
class Magnitude(LayerDropping):
    """Layer dropping by the sum of squares of a layer's linear weights, in float64."""

    name: ClassVar[str] = "magnitude"

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer by its sum of squares."""
        return Scores([_sum_of_squares(layer) for layer in decoder_layers(model)])


def _sum_of_squares(layer: nn.Module) -> float:
    return math.fsum(
        float(linear.weight.detach().double().square().sum()) for linear in linear_sublayers(layer).values()
    )
