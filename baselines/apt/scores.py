"""APT's arithmetic: scores and costs of units, and the choice of units under a budget.

APT (Zhao et al., arXiv:2401.12200). With H the input (heads, MLP channels) or the output (hidden channels) of an output
projection W, L the loss, and sums over batch and tokens, a channel j scores

    S_j = (sum |H_j|) (sum |dL/dH_j|) + sqrt(max(0, kurtosis of its column of mean(H) * W))

A head scores the sum of the first term over its channels, plus the second term with the kurtosis of all its columns. A
hidden channel scores both terms summed over all 2 L output projections, with its rows of the same matrices. W includes
the adapter: it is W + s B A. Units of all kinds are then ranked by score / cost.

Deviations from the code (ROIM1998/APT): a KV group scores the sum of its query heads, while the code has no KV groups;
the kurtosis of a head is of its own columns, where a reshape in the code mixes all heads; padding is excluded from sums
and means; one KV group and one MLP channel of every layer are always kept; the prefix is exact, where a comparison in
the code's search may lose a unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from baselines.width_pruning import heads_of, highest
from gradpruner.models.architectures import decoder_layers, empty_model
from gradpruner.models.shape import ModelShape, config_shape, head_dim
from gradpruner.plan import WidthPlan
from gradpruner.width_surgery import READS_HIDDEN, WRITES_HIDDEN

DECAY = 0.85  # of running scores
Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Units:
    """One number for every unit of the dense model: a score, a mask, or whether the unit is kept.

    Attributes:
        groups: KV groups, (L, KV heads).
        channels: MLP channels, (L, intermediate size).
        hidden: channels of the residual stream, (hidden size,).
    """

    groups: Tensor
    channels: Tensor
    hidden: Tensor

    @classmethod
    def full(cls, shape: ModelShape, value: float | bool) -> Self:
        """Returns the same number for all units; float64 or bool."""
        layer, num_layers = shape.layers[0], len(shape.layers)
        sizes = ((num_layers, layer.num_key_value_heads), (num_layers, layer.intermediate_size), (shape.hidden_size,))
        dtype = torch.bool if isinstance(value, bool) else torch.float64
        return cls(*(torch.full(size, value, dtype=dtype) for size in sizes))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Reads the tensors that `tensors` returned."""
        return cls(*(tensors[prefix + field.name] for field in fields(cls)))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Returns the tensors by name, for saving."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the three tensors."""
        return self.groups, self.channels, self.hidden

    def combine(self, function: Callable[..., Tensor], *others: "Units") -> "Units":
        """Applies a function to the tensors, kind by kind."""
        return Units(
            *(function(*tensors) for tensors in zip(self.all(), *(each.all() for each in others), strict=True))
        )

    def parts(self) -> dict[str, float]:
        """Returns the mean of each kind, which for bool is the fraction of units that are kept."""
        return {name: float(values.double().mean()) for name, values in self.tensors().items()}


# ---- scores ----


def excess_kurtosis(values: Tensor, dim: int) -> Tensor:
    """Returns the mean fourth power of standardized values, minus 3.

    The standard deviation is that of a sample (n - 1), as in the code. If all values are equal, or there is only one,
    the result is -3.
    """
    centred, size = values - values.mean(dim, keepdim=True), values.shape[dim]
    deviation = torch.linalg.vector_norm(centred, dim=dim, keepdim=True) / math.sqrt(max(1, size - 1))
    squares = (centred / deviation.clamp_min(torch.finfo(values.dtype).tiny)).square()
    fourth: Tensor = torch.linalg.vector_norm(squares, dim=dim).square() / size
    return fourth - 3


def outlier_term(values: Tensor, dim: int) -> Tensor:
    """Returns sqrt(max(0, kurtosis)), float64 on the CPU."""
    return excess_kurtosis(values, dim).clamp_min(0).sqrt().double().cpu()


def salience(sum_abs: Tensor, sum_abs_gradient: Tensor) -> Tensor:
    """Returns the product of sums (paper's Eq. 4), not the sum of products, per channel; float64 on the CPU."""
    return (sum_abs.double() * sum_abs_gradient.double()).cpu()


def group_scores(per_channel: Tensor, contribution: Tensor, num_groups: int, width: int) -> Tensor:
    """Returns the scores of KV groups: sums over the query heads that read each group.

    Args:
        per_channel: salience of o_proj's input, (query heads * width,).
        contribution: mean(H) * W, (d, query heads * width), at any scale.
        num_groups: number of KV heads.
        width: channels per head.

    Returns:
        (num_groups,) float64.
    """
    columns = contribution.T.reshape(len(per_channel) // width, -1)  # (query heads, width * d)
    heads = per_channel.view(-1, width).sum(1) + outlier_term(columns, 1)
    return heads.view(num_groups, -1).sum(1)


def running(score: Units, new: Units) -> Units:
    """Returns the moving average; pruned units keep their -inf."""
    return score.combine(lambda old, own: DECAY * old + (1 - DECAY) * own, new)


# ---- costs ----


@dataclass(frozen=True)
class Costs:
    """Parameters per unit of a decoder.

    Attributes:
        group: weights per KV group and channel of the residual stream.
        channel: weights per MLP channel and channel of the residual stream.
        group_bias: other parameters per KV group.
        channel_bias: other parameters per MLP channel.
        outside: other parameters per channel of the residual stream: norms, biases, embeddings.
        fixed: parameters that belong to no unit.
    """

    group: int
    channel: int
    group_bias: int = 0
    channel_bias: int = 0
    outside: int = 0
    fixed: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, match: str) -> Self:
        """Returns the costs of a model.

        Args:
            config: config of the dense model, one of `shape.WIDTH_MODEL_TYPES`.
            match: what counts besides the layers and the final norm: with `total` input embedding and output head,
                with `layers` an output head with weights of its own, with `native` neither, as in APT.
        """
        model, sizes = empty_model(config), config_shape(config).layers[0]
        layers = decoder_layers(model)
        rep = sizes.num_attention_heads // sizes.num_key_value_heads
        group_bias, channel_bias, outside, fixed = 0, 0, 0, 0
        for name, parameter in layers[0].named_parameters():
            module = name.rsplit(".", 1)[0]
            if parameter.ndim > 1:
                continue  # `group` and `channel` count the weights
            if module in READS_HIDDEN and module.startswith("self_attn"):
                group_bias += parameter.numel() // sizes.num_key_value_heads
            elif module in READS_HIDDEN:
                channel_bias += parameter.numel() // sizes.intermediate_size
            elif module in (*WRITES_HIDDEN, "input_layernorm", "post_attention_layernorm"):
                outside += len(layers)
            else:
                fixed += parameter.numel() * len(layers)  # head norms, which all heads share
        outside += 1  # the final norm
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if match == "total":
            outside += embedding.shape[0]
        if match != "native" and head is not embedding:
            outside += head.shape[0]
        return cls(head_dim(config) * (2 * rep + 2), 3, group_bias, channel_bias, outside, fixed)

    def count(self, hidden: Count, groups: Count, channels: Count) -> Count:
        """Returns the parameters with these numbers of units over all layers; ints or int64 tensors."""
        inside = hidden * (groups * self.group + channels * self.channel + self.outside)
        return inside + groups * self.group_bias + channels * self.channel_bias + self.fixed

    def of_shape(self, shape: ModelShape) -> int:
        """Returns the parameters of a whole model."""
        groups = sum(layer.num_key_value_heads for layer in shape.layers)
        channels = sum(layer.intermediate_size for layer in shape.layers)
        return self.count(shape.hidden_size, groups, channels)


def unit_costs(shape: ModelShape, width: int) -> tuple[int, int, int]:
    """Returns the parameters by which the scores of a KV group, an MLP channel and a hidden channel are divided.

    As in the code, all projections count as having biases, which LLaMA does not have, and embeddings do not count.

    Args:
        shape: shape of the dense model.
        width: channels per head.
    """
    layer, num_layers = shape.layers[0], len(shape.layers)
    rep = layer.num_attention_heads // layer.num_key_value_heads
    group = width * (2 * rep + 2)
    hidden = num_layers * (group * layer.num_key_value_heads + 3 * layer.intermediate_size + 6)
    return shape.hidden_size * group + width * (rep + 2), shape.hidden_size * 3 + 1, hidden


# ---- choice of units ----


def keep_one(scores: Units, multiple: int = 1) -> Units:
    """Returns scores with the best KV group and MLP channel per layer, and `multiple` hidden channels, at infinity."""
    raised = scores.combine(torch.clone)
    for values in (*raised.groups, *raised.channels):
        values[list(highest(values, 1))] = torch.inf
    raised.hidden[list(highest(raised.hidden, multiple))] = torch.inf
    return raised


def densest_units(
    scores: Units, unit_cost: Sequence[float], costs: Costs, budget: float, multiple: int = 1
) -> tuple[Units, int]:
    """Keeps the longest prefix that fits the budget, of all units sorted by score / cost.

    Of equal units, the first is pruned first.

    Args:
        scores: float64; infinity is kept and comes first, -inf marks units that are already pruned.
        unit_cost: costs of a KV group, an MLP channel and a hidden channel.
        costs: parameters per kept unit.
        budget: parameters that may be kept.
        multiple: the number of kept hidden channels is a multiple of it: the last ones in the prefix are pruned, and
            the prefix can use the parameters that this frees.

    Returns:
        Which units are kept, and the length of the prefix.
    """
    kinds = scores.all()
    density = torch.cat([values.flatten() / cost for values, cost in zip(kinds, unit_cost, strict=True)])
    sizes = [values.numel() for values in kinds]
    kind = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    order = torch.sort(density, stable=True).indices.flip(0)[: int((density > -torch.inf).sum())]
    groups, channels, hidden = ((kind[order] == index).cumsum(0) for index in range(3))
    cumulative = costs.count(hidden // multiple * multiple, groups, channels)  # parameters of every prefix; never falls
    length = int(torch.searchsorted(cumulative, torch.tensor(math.floor(budget)), right=True))
    kept = torch.zeros_like(density, dtype=torch.bool)
    chosen = order[:length]
    kept[chosen] = True
    of_hidden = chosen[kind[chosen] == 2]
    kept[of_hidden[len(of_hidden) // multiple * multiple :]] = False
    parts = (part.view_as(values) for part, values in zip(torch.split(kept, sizes), kinds, strict=True))
    return Units(*parts), length


def width_plan(kept: Units, rep: int, among: Units) -> WidthPlan | None:
    """Returns the plan that keeps these units of a model; None if the model has no others.

    Args:
        kept: units of the dense model to keep, bool.
        rep: query heads per KV group.
        among: units of the dense model that the model has, bool.
    """
    if all(torch.equal(own, other) for own, other in zip(kept.all(), among.all(), strict=True)):
        return None
    pairs = [zip(own, had, strict=True) for own, had in ((kept.groups, among.groups), (kept.channels, among.channels))]
    groups, channels = (tuple(_positions(own[had]) for own, had in kind) for kind in pairs)
    hidden = _positions(kept.hidden[among.hidden])
    return WidthPlan(
        tuple(heads_of(own, rep) for own in groups),
        channels,
        None if len(hidden) == int(among.hidden.sum()) else hidden,
    )


def _positions(kept: Tensor) -> tuple[int, ...]:
    return tuple(kept.nonzero().flatten().tolist())
