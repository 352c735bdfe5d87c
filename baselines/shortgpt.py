"""ShortGPT: drop the layers that rotate their input the least (Men et al., arXiv:2403.03853).

Block Influence of a layer: 1 - mean over tokens of cos(its input, its output). Deviation from the repository
(sramshetty/ShortGPT), which sums over tokens and counts padding: here it is the mean over real tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from baselines.calibration import checked
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.layer_scores import block_influence
from gradpruner.models.architectures import decoder_layers
from gradpruner.progress import track
from gradpruner.surgery import only_layers


@dataclass(frozen=True)
class ShortGpt(CalibratedLayerDropping):
    """Layer dropping by Block Influence.

    Attributes:
        iterative: measure again after every dropped layer instead of once, in one pass per dropped layer.
    """

    name: ClassVar[str] = "shortgpt"

    iterative: bool = False

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the row settings, and with `iterative` the number of layers to drop."""
        more = {"num_pruned_layers": self.num_pruned_layers} if self.iterative else {}
        return {**super().measurement_settings(), **more}

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer by its Block Influence, or with `iterative` by its place in the order of dropping."""
        taken = checked(batches, self)
        if not self.iterative:
            return Scores(block_influence(model, taken, "block influence"))
        assert self.num_pruned_layers is not None
        kept = list(range(len(decoder_layers(model))))
        rounds: list[dict[str, Any]] = []
        for _ in track(range(self.num_pruned_layers), "shortgpt, one by one", "layer"):
            with only_layers(model, tuple(kept)):
                influence = block_influence(model, taken)
            lowest = min(range(len(kept)), key=lambda position: (influence[position], position))
            rounds.append({"layer": kept.pop(lowest), "block_influence": influence})
        # The score is the order of dropping: the first dropped layer has the lowest, all kept layers the highest.
        order = [entry["layer"] for entry in rounds]
        scores = [
            float(order.index(layer)) if layer in order else float(len(order))
            for layer in range(len(kept) + len(order))
        ]
        return Scores(scores, {"rounds": rounds})
