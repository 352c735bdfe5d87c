"""Scores of layers by how little they turn the states that pass through them: Block Influence and angular distance."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import last_hidden_state, watch_layers
from gradpruner.models.architectures import decoder_layers
from gradpruner.progress import track


def block_influence(model: PreTrainedModel, batches: list[Batch], description: str | None = None) -> list[float]:
    """Returns 1 - mean over all real tokens of cos(input, output), for every layer of the model."""
    influence = _Influence(model)
    _run(model, batches if description is None else track(batches, description, "batch"), influence)
    return influence.result()


def angular_distances(model: PreTrainedModel, batches: list[Batch]) -> list[list[float]]:
    """Returns the mean angle / pi between any two states of the last token, before or after a layer, (L+1, L+1)."""
    angles = _Angles(model)
    _run(model, track(batches, "angular distance", "batch"), angles)
    return angles.result()


def influence_and_distances(model: PreTrainedModel, batches: list[Batch]) -> tuple[list[float], list[list[float]]]:
    """Returns `block_influence` and `angular_distances`, from one pass."""
    influence, angles = _Influence(model), _Angles(model)
    _run(model, track(batches, "how far layers turn states", "batch"), influence, angles)
    return influence.result(), angles.result()


@torch.no_grad()
def _run(model: PreTrainedModel, batches: Iterable[Batch], *sums: "_Influence | _Angles") -> None:
    """Adds the forward passes of all batches to each of the sums."""
    for batch in batches:
        with ExitStack() as watching:
            for each in sums:
                watching.enter_context(each.watch(batch))
            last_hidden_state(model, batch)


def nearest_block(distances: list[list[float]], length: int) -> tuple[int, ...]:
    """Returns the `length` layers from the l with the smallest d(l, length).

    Args:
        distances: (L+1, L+1), between the states before and after every layer.
        length: layers in the block, at most L.
    """
    start = min(range(len(distances) - length), key=lambda layer: (distances[layer][layer + length], layer))
    return tuple(range(start, start + length))


class _Influence:
    """Sums of cosines of all real tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._sums = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)
        self._num_tokens = 0

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Adds the forward pass of a batch inside the context."""
        mask = batch["attention_mask"].to(self._model.device).bool()  # (B, T)
        self._num_tokens += int(mask.sum())

        def add(layer: int, before: Tensor, after: Tensor) -> None:
            real = mask.to(after.device)
            cosines = torch.cosine_similarity(before[real].float(), after[real].float(), dim=-1)  # (tokens,)
            self._sums[layer] += cosines.double().sum().cpu()

        with watch_layers(self._model, add):
            yield

    def result(self) -> list[float]:
        return [1.0 - value for value in (self._sums / self._num_tokens).tolist()]


class _Angles:
    """Sums of angles between the states of the last real token of each row, before each layer and after the last."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        num_states = len(decoder_layers(model)) + 1
        self._sums = torch.zeros(num_states, num_states, dtype=torch.float64)
        self._num_rows = 0

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Adds the forward pass of a batch inside the context."""
        mask = batch["attention_mask"].cpu()  # an index on the CPU serves states on any device
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # (B,)
        rows = torch.arange(len(last))
        before_and_after: list[tuple[Tensor, Tensor]] = []

        def keep(layer: int, before: Tensor, after: Tensor) -> None:
            before_and_after.append((before[rows, last].double().cpu(), after[rows, last].double().cpu()))

        with watch_layers(self._model, keep):
            yield
        states = torch.stack([*(before for before, _ in before_and_after), before_and_after[-1][1]], dim=1)
        unit = torch.nn.functional.normalize(states, dim=-1)  # (B, L+1, d)
        cosines = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)  # rounding can exceed [-1, 1], where arccos is NaN
        self._sums += (cosines.arccos() / torch.pi).sum(dim=0)
        self._num_rows += len(unit)

    def result(self) -> list[list[float]]:
        distances: list[list[float]] = (self._sums / self._num_rows).tolist()
        return distances
