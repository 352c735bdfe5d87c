"""Last: drop the deepest layers except the final one. The simplest rule there is, and hard to beat; uses no data."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from baselines.layer_dropping import LayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.models.architectures import decoder_layers


@dataclass(frozen=True)
class Last(LayerDropping):
    """Layer dropping from the end; the final layer, which feeds the output head, is dropped last."""

    name: ClassVar[str] = "last"

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer by the number of layers that are dropped before it."""
        num_layers = len(decoder_layers(model))
        return Scores([float(num_layers - 2 - layer) for layer in range(num_layers - 1)] + [float(num_layers - 1)])
