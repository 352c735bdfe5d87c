"""Random: drop randomly chosen layers, a floor that every method should beat. Uses no data."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from baselines.layer_dropping import LayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.models.architectures import decoder_layers


@dataclass(frozen=True)
class Random(LayerDropping):
    """Layer dropping by random scores. With the same seed, a higher sparsity drops the same layers and more.

    Attributes:
        seed: seed of the scores.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the seed."""
        return {"seed": self.seed}

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer by a random number in [0, 1)."""
        generator = random.Random(self.seed)
        return Scores([generator.random() for _ in decoder_layers(model)])
