"""Forward passes that go on where they stopped: the states that enter one layer are kept for all batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import decode, watch_layers
from gradpruner.models.architectures import decoder_layers
from gradpruner.surgery import only_layers


class PartialPass:
    """Forward pass of all batches, up to a position: earlier layers run once, however often later ones do.

    States are kept in the memory of the host.

    Args:
        model: the model; a caller may change layers from the current position on.
        batches: dicts of `input_ids`, `attention_mask` and perhaps `labels`, each (B, T).

    Attributes:
        position: the layer that the kept states enter, counted in the model.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.position = 0
        self._model, self._batches = model, batches
        self._states: list[Tensor] = []  # none before the first layer

    @torch.no_grad()
    def advance(self, position: int) -> None:
        """Goes on to the states that enter the layer at `position`, or leave the last one, (B, T, d) each."""
        assert position >= self.position
        if position > self.position:
            self._states = list(self.after(position - 1))
            self.position = position

    @torch.no_grad()
    def after(self, layer: int) -> Iterator[Tensor]:
        """Yields the raw output of a layer behind the position, batch by batch, (B, T, d); keeps the position."""
        seen: list[Tensor] = []

        def note(index: int, before: Tensor, after: Tensor) -> None:
            if index == layer - self.position:
                seen.append(after.cpu())

        for number, batch in enumerate(self._batches):
            with self.layers(number, layer + 1), watch_layers(self._model, note):
                decode(self._model, batch)
            yield seen.pop()

    def state(self, number: int) -> Tensor:
        """Returns the kept states of a batch, (B, T, d)."""
        return self._states[number]

    @contextmanager
    def layers(self, number: int, end: int | None = None) -> Iterator[None]:
        """Reduces the model to its layers from the position to `end`, and gives the first one the kept states."""
        end = len(decoder_layers(self._model)) if end is None else end
        with only_layers(self._model, tuple(range(self.position, end))):
            if not self._states:
                yield
                return
            with _entering(self._model, self._states[number]):
                yield


@contextmanager
def _entering(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    """Gives these states to the first decoder layer instead of the embeddings, (B, T, d), while the context is open."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = args[0] if args else kwargs["hidden_states"]
        own = states.to(device=given.device)
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    handle = decoder_layers(model)[0].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
