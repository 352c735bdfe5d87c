"""Angular distance: prune the block of layers that rotates the last token the least (Gromov et al., arXiv:2403.17887).

d(l, n) = mean over rows of arccos(cos(x_l, x_l+n)) / pi at the last token, where x_l is the input of layer l and x_L
the raw output of the last layer. The n layers from the l with the smallest d are pruned. Deviations from
arcee-ai/PruneMe: layer 0 may be in the block (PruneMe discards the embedding state), and the last token is the last
real one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from baselines.calibration import checked
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.hidden_states import last_hidden_state, watch_layers
from gradpruner.models.architectures import decoder_layers


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


def nearest_block(distances: list[list[float]], length: int) -> tuple[int, ...]:
    """Returns the `length` layers from the l with the smallest d(l, length).

    Args:
        distances: (L+1, L+1), between the states before and after every layer.
        length: layers in the block, at most L.
    """
    start = min(range(len(distances) - length), key=lambda layer: (distances[layer][layer + length], layer))
    return tuple(range(start, start + length))


@torch.no_grad()
def angular_distances(model: PreTrainedModel, batches: list[Batch]) -> list[list[float]]:
    """Returns the mean angle / pi between any two states of the last token, before or after a layer, (L+1, L+1)."""
    num_states = len(decoder_layers(model)) + 1
    sums = torch.zeros(num_states, num_states, dtype=torch.float64)
    num_rows = 0
    for batch in tqdm(batches, desc="angular distance", unit="batch"):
        states = _last_token_states(model, batch)  # (B, L+1, d)
        unit = torch.nn.functional.normalize(states, dim=-1)
        cosines = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)  # rounding can exceed [-1, 1], where arccos is NaN
        sums += (cosines.arccos() / torch.pi).sum(dim=0).cpu()
        num_rows += len(unit)
    distances: list[list[float]] = (sums / num_rows).tolist()
    return distances


def _last_token_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns every row's states of the last real token, before each layer and after the last, (B, L+1, d) float64."""
    mask = batch["attention_mask"].cpu()  # an index on the CPU serves states on any device
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # (B,)
    rows = torch.arange(len(last))
    before_and_after: list[tuple[Tensor, Tensor]] = []

    def keep(layer: int, before: Tensor, after: Tensor) -> None:
        before_and_after.append((before[rows, last].double().cpu(), after[rows, last].double().cpu()))

    with watch_layers(model, keep):
        last_hidden_state(model, batch)
    return torch.stack([*(before for before, _ in before_and_after), before_and_after[-1][1]], dim=1)
