"""LLM-Pruner's scores of KV groups and MLP channels, and the gradients they need, one matrix at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import text_loss
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.models.shape import LayerShape

TAYLOR = ("param_first", "param_second", "param_mix", "vectorize")
CRITERIA = (*TAYLOR, "l1", "l2", "random")
GROUPINGS = ("sum", "mean", "max", "prod", "first", "second")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def channel_scores(
    weight: Tensor, criterion: str, rows: bool, gradient: Tensor | None = None, fisher: Tensor | None = None
) -> Tensor:
    """Returns the importance of the rows or columns of a weight.

    Args:
        weight: W, (out, in).
        criterion: one of `CRITERIA` except `random`.
        rows: score the rows (outputs) rather than the columns.
        gradient: g, (out, in).
        fisher: a, mean over rows of squared gradients, (out, in).

    Returns:
        (out,) or (in,) float64.
    """
    other, weight = (1 if rows else 0), weight.float()
    if criterion == "l1":
        return weight.abs().sum(other, dtype=torch.float64)
    if criterion == "l2":
        return weight.square().sum(other, dtype=torch.float64)
    if criterion in ("param_second", "param_mix"):
        assert fisher is not None
        second = weight.square() * fisher.float()
    if criterion == "param_second":
        return second.sum(other, dtype=torch.float64)
    assert gradient is not None
    first = weight * gradient.float()
    if criterion == "vectorize":
        return first.sum(other, dtype=torch.float64).abs()
    return (first if criterion == "param_first" else first - second / 2).abs().sum(other, dtype=torch.float64)


def combine(vectors: Sequence[Tensor], grouping: str) -> Tensor:
    """Returns one score per channel from the matrices that contain the channel, (channels,)."""
    if grouping in ("first", "second"):
        return vectors[("first", "second").index(grouping)]
    stacked = torch.stack(list(vectors))
    reduce: dict[str, Callable[..., Any]] = {
        "sum": torch.sum,
        "mean": torch.mean,
        "max": torch.amax,
        "prod": torch.prod,
    }
    combined: Tensor = reduce[grouping](stacked, dim=0)
    return combined


def fold_queries(scores: Tensor, num_groups: int, width: int, fold: str = "exact") -> Tensor:
    """Returns scores of KV channels, each the sum of its query channels' scores.

    Args:
        scores: (query heads * width,), query heads of a group side by side.
        num_groups: number of KV heads.
        width: channels per head.
        fold: `exact`, or `reference` for the code's fold, which gives KV head g the query heads g, g + num_groups, ...

    Returns:
        (num_groups * width,)
    """
    if fold == "reference":
        return scores.view(-1, num_groups * width).sum(0)
    return scores.view(num_groups, -1, width).sum(1).flatten()


def group_scores(vectors: Mapping[str, Tensor], sizes: LayerShape, width: int, grouping: str, fold: str) -> Tensor:
    """Returns one score per KV group of a layer, (KV heads,); the matrix that LLM-Pruner starts from comes first."""
    names = "kqvo" if sizes.num_key_value_heads < sizes.num_attention_heads else "qkvo"
    folded = []
    for name in names:
        own = vectors[f"self_attn.{name}_proj"]
        folded.append(fold_queries(own, sizes.num_key_value_heads, width, fold) if name in "qo" else own)
    return combine(folded, grouping).view(-1, width).sum(1)


def for_each_gradient(
    model: PreTrainedModel,
    batch: Batch,
    layers: range,
    note: Callable[[int, str, Tensor, Tensor, Tensor | None], None],
    squares: bool = False,
) -> None:
    """Computes the gradients of the linear weights of some layers, one at a time, in one backward pass.

    No weight gets a `.grad`: the weights are frozen, so autograd keeps only activations. A hook on the output of each
    linear sublayer computes the weight's gradient from the input and the gradient of the output, then discards it.

    Args:
        model: in evaluation mode; unchanged.
        batch: calibration rows; the loss is the mean over all their real tokens.
        layers: layers to compute gradients for.
        note: called with layer, sublayer, weight, gradient, and mean squared gradient or None; tensors are (out, in).
        squares: also compute the mean over rows of the squared gradient of the row's own mean loss.
    """
    mask = batch["attention_mask"]
    tokens = (mask.sum(dim=1) - 1).tolist()
    scales = [sum(tokens) / max(1, count) for count in tokens]

    def on_output(index: int, name: str) -> Callable[[nn.Linear, tuple[Tensor], Tensor], None]:
        def forward(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            def backward(gradient: Tensor) -> None:
                seen, back = inputs[0].detach().float(), gradient.float()  # (B, T, in), (B, T, out)
                fisher = None
                if squares:
                    fisher = torch.zeros_like(linear.weight, dtype=torch.float32)
                    for row, scale in enumerate(scales):
                        fisher += (back[row].T @ seen[row] * scale).square_() / len(scales)
                whole = back.flatten(0, 1).T @ seen.flatten(0, 1)
                note(index, name, linear.weight.detach(), whole, fisher)

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    handles = [
        linear.register_forward_hook(on_output(index, name))
        for index in layers
        for name, linear in linear_sublayers(decoder_layers(model)[index]).items()
    ]
    with _frozen(model):
        handles.append(
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        )
        try:
            loss, num_tokens = text_loss(model, batch)
            torch.autograd.backward(loss / num_tokens.sum())
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
