"""Shape of a decoder: the width of its residual stream, and the heads and MLP channels of each layer.

A layer can lose whole KV groups (a KV head with the query heads that read it), query heads and MLP channels. Single
channels of a head cannot be pruned, because rotary embedding pairs them. If all layers have the same widths, a stock
config describes the model. Otherwise no stock model has that shape, and it is built by resizing a stock one.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.models.architectures import decoder_layers, empty_model, linear_sublayers, shrink_config
from gradpruner.record_sections import ShapeSection

# Layers of these types are q, k, v, o, gate, up and down projections, RMSNorms, and at most norms of single heads;
# nothing is scaled by a rule that depends on a width.
WIDTH_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer; every KV head has `num_attention_heads / num_key_value_heads` query heads."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder.

    Attributes:
        hidden_size: channels of the residual stream.
        layers: widths of the decoder layers, first to last.
    """

    hidden_size: int
    layers: tuple[LayerShape, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same widths, so that a stock config describes the model."""
        return len(set(self.layers)) == 1

    def to_dict(self) -> ShapeSection:
        """Returns the JSON-ready form: the list of each size has one entry per layer."""
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": [layer.num_attention_heads for layer in self.layers],
            "num_key_value_heads": [layer.num_key_value_heads for layer in self.layers],
            "intermediate_size": [layer.intermediate_size for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote."""
        rows = zip(*(data[size] for size in LAYER_SIZES), strict=True)
        return cls(data["hidden_size"], tuple(LayerShape(*row) for row in rows))


def describe_shape(shape: ModelShape) -> dict[str, str]:
    """Returns sizes by name as text: `9 in 4, 6 in 24` if four layers have 9 and the next 24 have 6."""
    sizes = {size: [getattr(layer, size) for layer in shape.layers] for size in LAYER_SIZES}
    runs = {size: [(count, len(list(same))) for count, same in itertools.groupby(all_)] for size, all_ in sizes.items()}
    texts = {
        size: str(own[0][0]) if len(own) == 1 else ", ".join(f"{count} in {length}" for count, length in own)
        for size, own in runs.items()
    }
    return {"hidden_size": str(shape.hidden_size), **texts}


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the number of channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def config_shape(config: PreTrainedConfig) -> ModelShape:
    """Returns the shape of the stock model of a config."""
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layer = LayerShape(config.num_attention_heads, num_kv_heads, config.intermediate_size)
    return ModelShape(config.hidden_size, (layer,) * config.num_hidden_layers)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Returns the shape of a model's modules, or of its config if layers of its type cannot be narrower."""
    if model.config.model_type not in WIDTH_MODEL_TYPES:
        return config_shape(model.config)
    layers, width = [], head_dim(model.config)
    for layer in decoder_layers(model):
        linear = linear_sublayers(layer)
        heads, kv_heads = (linear[f"self_attn.{name}_proj"].out_features // width for name in "qk")
        layers.append(LayerShape(heads, kv_heads, linear["mlp.down_proj"].in_features))
    return ModelShape(model.get_input_embeddings().embedding_dim, tuple(layers))


def check_width_supported(config: PreTrainedConfig, method: str) -> None:
    """Refuses a model whose layers cannot be made narrower, from its config alone.

    Raises:
        ValueError: if the architecture is not one of `WIDTH_MODEL_TYPES`.
    """
    if config.model_type not in WIDTH_MODEL_TYPES:
        raise ValueError(
            f"method={method} makes layers narrower, which is known for {', '.join(WIDTH_MODEL_TYPES)}, got model type "
            f"{config.model_type!r}. Choose such a model, or a method that takes out whole layers."
        )


def shaped_config(config: PreTrainedConfig, shape: ModelShape) -> PreTrainedConfig:
    """Returns a copy of the config with the depth of the shape and, if a stock config can state them, its widths.

    Otherwise layers keep the sizes of `config`, and a model has to be resized to the shape.
    """
    changed = shrink_config(config, tuple(range(len(shape.layers))))
    set_widths(changed, shape)
    return changed


def set_widths(config: PreTrainedConfig, shape: ModelShape) -> None:
    """Writes the widths of a shape into a config.

    Widths of layers are written only if all layers have the same, and if the width of the residual stream is a multiple
    of the heads: otherwise transformers does not read a Llama config.
    """
    if shape.layers == config_shape(config).layers and shape.hidden_size == config.hidden_size:
        return
    config.head_dim = head_dim(config)  # set first: otherwise it would follow from the other two
    config.hidden_size = shape.hidden_size
    if shape.is_uniform and shape.hidden_size % shape.layers[0].num_attention_heads == 0:
        for size in LAYER_SIZES:
            setattr(config, size, getattr(shape.layers[0], size))


def empty_shaped_model(config: PreTrainedConfig, shape: ModelShape) -> PreTrainedModel:
    """Returns the model of that shape without storage (meta device), for counting."""
    model = empty_model(shaped_config(config, shape))
    if config_shape(model.config) != shape:
        resize_layers(model, shape)
    return model


@torch.no_grad()
def resize_layers(model: PreTrainedModel, shape: ModelShape) -> None:
    """Gives layers that differ from the shape new, uninitialized linear weights of its sizes, in place."""
    width, hidden = head_dim(model.config), shape.hidden_size
    for layer, sizes, own in zip(decoder_layers(model), shape.layers, model_shape(model).layers, strict=True):
        if sizes == own:
            continue
        query, kv = sizes.num_attention_heads * width, sizes.num_key_value_heads * width
        outputs_inputs = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (sizes.intermediate_size, hidden),
            "mlp.up_proj": (sizes.intermediate_size, hidden),
            "mlp.down_proj": (hidden, sizes.intermediate_size),
        }
        for name, linear in linear_sublayers(layer).items():
            outputs, inputs = outputs_inputs[name]
            bias = None if linear.bias is None else linear.bias.new_empty(outputs)
            set_linear(linear, linear.weight.new_empty(outputs, inputs), bias)
        note_sizes(layer, sizes)


def set_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives a linear sublayer a weight and bias of other sizes; whether they are trained is unchanged."""
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)


def note_sizes(layer: nn.Module, sizes: LayerShape) -> None:
    """Sets the sizes that a layer's modules store besides the weights."""
    set_attribute(layer, "self_attn.num_key_value_groups", sizes.num_attention_heads // sizes.num_key_value_heads)
    set_attribute(layer, "mlp.intermediate_size", sizes.intermediate_size)


def set_attribute(module: nn.Module, path: str, value: object) -> None:
    """Sets a non-tensor attribute of a submodule; mypy takes all attributes of modules for tensors."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, value)
