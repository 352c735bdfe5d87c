"""Answer likelihood of many models that share their first layers, whose states are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_loss, decode, watch_layers
from gradpruner.models.architectures import decoder_layers
from gradpruner.surgery import only_layers


@contextmanager
def entering(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
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


class AnswerJudge:
    """Answer NLL of a model whose early layers no longer change: their states are kept, later layers run each time.

    Args:
        model: the model; a caller may change layers from the current position on.
        batches: dicts of `input_ids`, `attention_mask`, `labels`, each (B, T).
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._position = 0
        self._states: list[Tensor] = []  # that enter the layer at the position; none for the first layer

    @torch.no_grad()
    def advance(self, position: int) -> None:
        """Keeps the states that enter the layer at `position`, not before the current one, counted in the model."""
        if position == self._position:
            return
        seen: list[Tensor] = []
        last = position - self._position - 1

        def note(index: int, before: Tensor, after: Tensor) -> None:
            if index == last:
                seen.append(after)

        with only_layers(self._model, tuple(range(self._position, position))), watch_layers(self._model, note):
            for number, batch in enumerate(self._batches):
                with self._entering(number):
                    decode(self._model, batch)
        self._position, self._states = position, seen

    @torch.no_grad()
    def nll(self) -> float:
        """Returns nats per answer token."""
        total, num_tokens = 0.0, 0
        with only_layers(self._model, tuple(range(self._position, len(decoder_layers(self._model))))):
            for number, batch in enumerate(self._batches):
                with self._entering(number):
                    loss, count = answer_loss(self._model, batch)
                total += float(loss)
                num_tokens += count
        return total / num_tokens

    def _entering(self, number: int) -> AbstractContextManager[None]:
        return entering(self._model, self._states[number]) if self._states else nullcontext()
