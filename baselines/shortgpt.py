"""ShortGPT: drop the layers that rotate their input the least (Men et al., arXiv:2403.03853).

Block Influence of a layer: 1 - mean over tokens of cos(its input, its output). Deviation from the repository
(sramshetty/ShortGPT), which sums over tokens and counts padding: here it is the mean over real tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from baselines.calibration import checked, real_tokens
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.hidden_states import last_hidden_state, watch_layers
from gradpruner.models.architectures import decoder_layers
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
        for _ in tqdm(range(self.num_pruned_layers), desc="shortgpt, one by one", unit="layer"):
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


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: list[Batch], description: str | None = None) -> list[float]:
    """Returns 1 - mean over all real tokens of cos(input, output), for every layer of the model."""
    sums = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)
    num_tokens = 0
    for batch in tqdm(batches, desc=description, unit="batch", disable=description is None):
        mask = real_tokens(batch, model.device)
        num_tokens += int(mask.sum())

        def add(layer: int, before: Tensor, after: Tensor, mask: Tensor = mask) -> None:
            real = mask.to(after.device)
            cosines = torch.cosine_similarity(before[real].float(), after[real].float(), dim=-1)  # (tokens,)
            sums[layer] += cosines.double().sum().cpu()

        with watch_layers(model, add):
            last_hidden_state(model, batch)
    return [1.0 - value for value in (sums / num_tokens).tolist()]
