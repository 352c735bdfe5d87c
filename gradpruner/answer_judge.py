"""Answer likelihood of many models that share their first layers, whose states are computed once."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_loss
from gradpruner.partial_pass import PartialPass


class AnswerJudge:
    """Answer NLL of a model whose early layers no longer change: later layers alone run each time.

    Args:
        model: the model; a caller may change layers from the current position on.
        batches: dicts of `input_ids`, `attention_mask`, `labels`, each (B, T).
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._pass = PartialPass(model, batches)

    def advance(self, position: int) -> None:
        """Keeps the states that enter the layer at `position`, not before the current one, counted in the model."""
        self._pass.advance(position)

    @torch.no_grad()
    def nll(self) -> float:
        """Returns nats per answer token."""
        total, num_tokens = 0.0, 0
        for number, batch in enumerate(self._batches):
            with self._pass.layers(number):
                loss, count = answer_loss(self._model, batch)
            total += float(loss)
            num_tokens += count
        return total / num_tokens
