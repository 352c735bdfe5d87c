"""Narrow the layers of a model: slice KV groups, query heads, MLP channels and channels of the residual stream.

Removing heads or MLP channels gives the same logits as zeroing them. For channels of the residual stream this is only
approximately so, because RMSNorm then averages over fewer channels; MINITRON's reference code does not correct for that
either.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.models.shape import (
    LayerShape,
    ModelShape,
    check_width_supported,
    head_dim,
    model_shape,
    note_sizes,
    set_attribute,
    set_linear,
    set_widths,
)
from gradpruner.plan import PruningPlan, WidthPlan

READS_HIDDEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITES_HIDDEN = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def narrow(model: PreTrainedModel, width: WidthPlan) -> None:
    """Keeps only the units of a plan, in place; the config is updated where all layers then have the same shape.

    Args:
        model: the model with the plan's kept layers only.
        width: units to keep in each layer.

    Raises:
        ValueError: if the architecture is unknown, or if the plan is for another number of layers, names units that the
            model does not have, or gives KV heads different numbers of query heads.
    """
    check_width_supported(model.config, "narrow")
    shape, layers = model_shape(model), decoder_layers(model)
    new = narrowed_shape(shape, width)
    channels = head_dim(model.config)
    for layer, old, sizes, heads, kept in zip(
        layers, shape.layers, new.layers, width.heads, width.channels, strict=True
    ):
        rep = old.num_attention_heads // old.num_key_value_heads
        _narrow_layer(layer, sizes, heads, sorted({head // rep for head in heads}), kept, channels)
    if width.hidden is not None:
        _narrow_hidden(model, torch.tensor(width.hidden))
    set_widths(model.config, new)


def narrowed_shape(shape: ModelShape, width: WidthPlan) -> ModelShape:
    """Returns the shape after narrowing; raises ValueError as `narrow` does."""
    if len(width.heads) != len(shape.layers):
        raise ValueError(
            f"The plan says what stays of {len(width.heads)} layers, the model has {len(shape.layers)}. "
            "Apply it to the model that it was made for."
        )
    layers = []
    for index, (old, heads, kept) in enumerate(zip(shape.layers, width.heads, width.channels, strict=True)):
        if heads[-1] >= old.num_attention_heads or kept[-1] >= old.intermediate_size:
            raise ValueError(
                f"Layer {index} has {old.num_attention_heads} heads and {old.intermediate_size} MLP channels, the plan "
                f"keeps head {heads[-1]} and channel {kept[-1]}. Apply it to the model that it was made for."
            )
        rep = old.num_attention_heads // old.num_key_value_heads
        readers = [sum(head // rep == group for head in heads) for group in range(old.num_key_value_heads)]
        kept_readers = {count for count in readers if count}
        if len(kept_readers) != 1:
            raise ValueError(
                f"Every KV head that stays must keep equally many query heads, got {readers} in layer {index}. "
                "Keep whole KV groups, or the same number of heads in each."
            )
        layers.append(LayerShape(len(heads), sum(count > 0 for count in readers), len(kept)))
    return ModelShape(shape.hidden_size if width.hidden is None else len(width.hidden), tuple(layers))


def planned_shape(dense: ModelShape, plan: PruningPlan) -> ModelShape:
    """Returns the shape of the model after the whole plan is applied.

    Raises:
        ValueError: if the plan is for another depth, or for the reasons of `narrow`.
    """
    if plan.num_hidden_layers != len(dense.layers):
        raise ValueError(
            f"The plan is for {plan.num_hidden_layers} decoder layers, the model has {len(dense.layers)}. "
            "Apply it to the dense model that it was made for."
        )
    kept = ModelShape(dense.hidden_size, tuple(dense.layers[layer] for layer in plan.kept_layers))
    return kept if plan.width is None else narrowed_shape(kept, plan.width)


def _narrow_layer(
    layer: nn.Module, sizes: LayerShape, heads: Sequence[int], kv_heads: Sequence[int], kept: Sequence[int], width: int
) -> None:
    linears = linear_sublayers(layer)
    device = linears["mlp.down_proj"].weight.device
    query, kv = (head_channels(units, width).to(device) for units in (heads, kv_heads))
    mlp = torch.tensor(kept, device=device)
    rows = {"q_proj": query, "k_proj": kv, "v_proj": kv, "gate_proj": mlp, "up_proj": mlp}
    columns = {"o_proj": query, "down_proj": mlp}
    for name, linear in linears.items():
        own = name.rsplit(".", 1)[-1]
        _slice(linear, rows.get(own), columns.get(own))
    note_sizes(layer, sizes)


def _narrow_hidden(model: PreTrainedModel, hidden: Tensor) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[:, hidden].clone(), embedding.weight.requires_grad)
    embedding.embedding_dim = len(hidden)
    if is_tied:
        head.weight, head.in_features = embedding.weight, len(hidden)
    else:
        _slice(head, None, hidden)
    norms = [model.get_decoder().norm]
    for layer in decoder_layers(model):
        norms += [layer.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm")]
        for path in ("hidden_size", "mlp.hidden_size"):
            set_attribute(layer, path, len(hidden))
        for name, linear in linear_sublayers(layer).items():
            _slice(linear, hidden if name in WRITES_HIDDEN else None, hidden if name in READS_HIDDEN else None)
    for norm in norms:
        weight = norm.get_parameter("weight")
        norm.register_parameter("weight", nn.Parameter(weight[hidden].clone(), weight.requires_grad))


def head_channels(heads: Sequence[int], width: int) -> Tensor:
    """Returns the channels of some heads of `width` channels each, in the order of the heads."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


def _slice(linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    if rows is not None or columns is not None:
        set_linear(linear, weight.detach().clone(), None if bias is None else bias.detach().clone())
