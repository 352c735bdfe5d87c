"""First-order Taylor importance of whole layers from full gradients, which IGIA approximates with LoRA gradients.

I_layer = sum over the layer's linear weights of |W * dL/dW|, where L is the mean answer loss over the calibration rows.
This is LLM-Pruner's criterion `param_first` (Ma et al., 2023), summed over a layer. The method is expensive because it
holds the gradients of all weights at once: it needs the memory of a full backward pass, which is measured and recorded
as for any other method.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from baselines.calibration import checked
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import IGNORED, Batch
from gradpruner.hidden_states import answer_loss
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.progress import track


@dataclass(frozen=True)
class TaylorDepth(CalibratedLayerDropping):
    """Layer dropping by the sum of |weight * gradient| over a layer's linear weights."""

    name: ClassVar[str] = "taylor_depth"

    num_rows: int = 128

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer; the gradient is of the loss over all answer tokens, whatever the batch size."""
        taken = checked(batches, self)
        weights = [[linear.weight for linear in linear_sublayers(layer).values()] for layer in decoder_layers(model)]
        required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        num_tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in taken)
        total = 0.0
        try:
            model.requires_grad_(False)
            for weight in (weight for layer in weights for weight in layer):
                weight.requires_grad_(True)
            for batch in track(taken, "full gradient", "batch"):
                loss, _ = answer_loss(model, batch)
                torch.autograd.backward(loss / num_tokens)
                total += float(loss.detach())
            scores = [math.fsum(_first_order(weight) for weight in layer) for layer in weights]
        finally:
            for parameter, required in required_grad:
                parameter.requires_grad_(required)
                parameter.grad = None
        return Scores(scores, {"answer_nll": total / num_tokens})


def _first_order(weight: torch.Tensor) -> float:
    assert weight.grad is not None
    return float((weight.detach().float() * weight.grad.float()).abs().sum(dtype=torch.float64))
