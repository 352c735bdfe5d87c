"""Scores of layers by how little they turn the states that pass through them: Block Influence and angular distance."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import last_hidden_state, watch_layers
from gradpruner.models.architectures import decoder_layers
from gradpruner.progress import track


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: list[Batch], description: str | None = None) -> list[float]:
    """Returns 1 - mean over all real tokens of cos(input, output), for every layer of the model."""
    sums = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)
    num_tokens = 0
    for batch in batches if description is None else track(batches, description, "batch"):
        mask = batch["attention_mask"].to(model.device).bool()  # (B, T)
        num_tokens += int(mask.sum())

        def add(layer: int, before: Tensor, after: Tensor, mask: Tensor = mask) -> None:
            real = mask.to(after.device)
            cosines = torch.cosine_similarity(before[real].float(), after[real].float(), dim=-1)  # (tokens,)
            sums[layer] += cosines.double().sum().cpu()

        with watch_layers(model, add):
            last_hidden_state(model, batch)
    return [1.0 - value for value in (sums / num_tokens).tolist()]


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
    for batch in track(batches, "angular distance", "batch"):
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
