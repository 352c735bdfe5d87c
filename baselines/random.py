"""Random: drop layers by lot. What a method must beat to have found anything; looks at no data."""

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
    """Scores every layer by a random number, so that of one seed a higher sparsity drops the same layers and more.

    Attributes:
        seed: of the numbers.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def measurement_settings(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Numbers in [0, 1)."""
        generator = random.Random(self.seed)
        return Scores([generator.random() for _ in decoder_layers(model)])
