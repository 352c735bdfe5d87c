"""Angular distance: prune the block of layers that rotates the last token the least (Gromov et al., arXiv:2403.17887).

d(l, n) = mean over rows of arccos(cos(x_l, x_l+n)) / pi at the last token, where x_l is the input of layer l and x_L
the raw output of the last layer. The n layers from the l with the smallest d are pruned. Deviations from
arcee-ai/PruneMe: layer 0 may be in the block (PruneMe discards the embedding state), and the last token is the last
real one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from baselines.calibration import checked
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.layer_scores import angular_distances, nearest_block


@dataclass(frozen=True)
class Angular(CalibratedLayerDropping):
    """Pruning of one contiguous block; the scores of single layers, d(l, 1), are only reported."""

    name: ClassVar[str] = "angular"

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Measures the distances between all pairs of states, so that one measurement serves every block length."""
        distances = angular_distances(model, checked(batches, self))
        single = [distances[layer][layer + 1] for layer in range(len(distances) - 1)]
        return Scores(single, {"angular_distances": distances})

    def choose(self, scores: Scores, num_pruned_layers: int) -> tuple[int, ...]:
        """Returns the block with the smallest distance between its ends; the first of equal ones."""
        return nearest_block(scores.details["angular_distances"], num_pruned_layers)
