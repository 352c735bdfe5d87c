"""APT's arithmetic: what units score and cost, which stay under a budget, and how budgets and ranks go over time.

APT (Zhao et al., arXiv:2401.12200). With H what goes into an output projection W (heads, MLP channels) or comes out of
it (hidden channels), L the loss, and sums over batch and tokens, a channel j scores

    S_j = (sum |H_j|) (sum |dL/dH_j|) + sqrt(max(0, kurtosis of its column of mean(H) * W))

a head the sum of the first term over its channels and the kurtosis of all its columns; a hidden channel both terms for
all 2 L output projections, with its rows of the same matrices. Units of all kinds are then ranked by score over cost.

Deviations from the code (ROIM1998/APT): a KV group is the sum of its query heads, which the code does not know; the
kurtosis of a head is that of its own columns, where a reshape mixes all heads; padding has no part in sums and means;
one KV group and one MLP channel of every layer always stay; the prefix is exact, where a comparison in the code's
search may cost a unit.
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
    """One number for every unit of the dense model: a score, a mask, or whether it stays.

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
        """The same number for all; float64 or bool."""
        layer, num_layers = shape.layers[0], len(shape.layers)
        sizes = ((num_layers, layer.num_key_value_heads), (num_layers, layer.intermediate_size), (shape.hidden_size,))
        dtype = torch.bool if isinstance(value, bool) else torch.float64
        return cls(*(torch.full(size, value, dtype=dtype) for size in sizes))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Reads what `tensors` gave."""
        return cls(*(tensors[prefix + field.name] for field in fields(cls)))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """By name, for saving."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors."""
        return self.groups, self.channels, self.hidden

    def combine(self, function: Callable[..., Tensor], *others: "Units") -> "Units":
        """A function of the tensors, kind by kind."""
        return Units(
            *(function(*tensors) for tensors in zip(self.all(), *(each.all() for each in others), strict=True))
        )

    def parts(self) -> dict[str, float]:
        """Mean of each kind: of units that stay, the part."""
        return {name: float(values.double().mean()) for name, values in self.tensors().items()}


# ---- scores ----


def excess_kurtosis(values: Tensor, dim: int) -> Tensor:
    """Mean fourth power of standardized values, less 3, with the standard deviation of a sample (n - 1), as the code.

    Where all values are equal, or there is only one, it is -3.
    """
    centred, size = values - values.mean(dim, keepdim=True), values.shape[dim]
    deviation = torch.linalg.vector_norm(centred, dim=dim, keepdim=True) / math.sqrt(max(1, size - 1))
    squares = (centred / deviation.clamp_min(torch.finfo(values.dtype).tiny)).square()
    fourth: Tensor = torch.linalg.vector_norm(squares, dim=dim).square() / size
    return fourth - 3


def outlier_term(values: Tensor, dim: int) -> Tensor:
    """sqrt(max(0, kurtosis)), float64 on the CPU."""
    return excess_kurtosis(values, dim).clamp_min(0).sqrt().double().cpu()


def salience(sum_abs: Tensor, sum_abs_gradient: Tensor) -> Tensor:
    """The product of sums (paper's Eq. 4), not the sum of products; one a channel, float64 on the CPU."""
    return (sum_abs.double() * sum_abs_gradient.double()).cpu()


def group_scores(per_channel: Tensor, contribution: Tensor, num_groups: int, width: int) -> Tensor:
    """Scores of KV groups: sums over the query heads that read one.

    Args:
        per_channel: salience of what goes into o_proj, (query heads * width,).
        contribution: mean(H) * W, (d, query heads * width), at any scale.
        num_groups: KV heads.
        width: channels of a head.

    Returns:
        (num_groups,) float64.
    """
    columns = contribution.T.reshape(len(per_channel) // width, -1)  # (query heads, width * d)
    heads = per_channel.view(-1, width).sum(1) + outlier_term(columns, 1)
    return heads.view(num_groups, -1).sum(1)


def running(score: Units, new: Units) -> Units:
    """The moving average; -inf, of units that left, stays."""
    return score.combine(lambda old, own: DECAY * old + (1 - DECAY) * own, new)


def rank_salience(factor: Tensor, gradient: Tensor) -> float:
    """|sum_j A_rj dL/dA_rj|, mean over the ranks r of an adapter.

    Args:
        factor: A, (rank, inputs).
        gradient: of the loss, (rank, inputs).
    """
    return float((factor * gradient).sum(1).abs().mean())


# ---- costs ----


@dataclass(frozen=True)
class Costs:
    """Parameters of a decoder whose layers keep `groups` KV groups and `channels` MLP channels between them.

    Attributes:
        group: weights of a KV group, for each channel of the residual stream.
        channel: weights of an MLP channel, for each channel of the residual stream.
        group_bias: other parameters of a KV group.
        channel_bias: other parameters of an MLP channel.
        outside: other parameters of a channel of the residual stream: norms, biases, embeddings.
        fixed: what no unit takes along.
    """

    group: int
    channel: int
    group_bias: int = 0
    channel_bias: int = 0
    outside: int = 0
    fixed: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, embeddings: bool) -> Self:
        """Those of a model.

        Args:
            config: of the dense model, one of `shape.WIDTH_MODEL_TYPES`.
            embeddings: count input embedding and output head, too; the method itself does not.
        """
        model, sizes = empty_model(config), config_shape(config).layers[0]
        layers = decoder_layers(model)
        rep = sizes.num_attention_heads // sizes.num_key_value_heads
        group_bias, channel_bias, outside, fixed = 0, 0, 0, 0
        for name, parameter in layers[0].named_parameters():
            module = name.rsplit(".", 1)[0]
            if parameter.ndim > 1:
                continue  # weights are what `group` and `channel` count
            if module in READS_HIDDEN and module.startswith("self_attn"):
                group_bias += parameter.numel() // sizes.num_key_value_heads
            elif module in READS_HIDDEN:
                channel_bias += parameter.numel() // sizes.intermediate_size
            elif module in (*WRITES_HIDDEN, "input_layernorm", "post_attention_layernorm"):
                outside += len(layers)
            else:
                fixed += parameter.numel() * len(layers)  # norms of single heads
        outside += 1  # the final norm
        if embeddings:
            both = {
                id(table.weight): table.weight
                for table in (model.get_input_embeddings(), model.get_output_embeddings())
            }
            outside += sum(weight.shape[0] for weight in both.values())
        return cls(head_dim(config) * (2 * rep + 2), 3, group_bias, channel_bias, outside, fixed)

    def count(self, hidden: Count, groups: Count, channels: Count) -> Count:
        """Parameters with so many units, of all layers together; numbers or int64 tensors."""
        inside = hidden * (groups * self.group + channels * self.channel + self.outside)
        return inside + groups * self.group_bias + channels * self.channel_bias + self.fixed

    def of_shape(self, shape: ModelShape) -> int:
        """Parameters of a whole model."""
        groups = sum(layer.num_key_value_heads for layer in shape.layers)
        channels = sum(layer.intermediate_size for layer in shape.layers)
        return self.count(shape.hidden_size, groups, channels)


def unit_costs(shape: ModelShape, width: int) -> tuple[int, int, int]:
    """Parameters by which the score of a KV group, an MLP channel and a hidden channel is divided, as in the code.

    That counts biases everywhere, which LLaMA does not have, and no embedding.

    Args:
        shape: of the dense model.
        width: channels of a head.
    """
    layer, num_layers = shape.layers[0], len(shape.layers)
    rep = layer.num_attention_heads // layer.num_key_value_heads
    group = width * (2 * rep + 2)
    hidden = num_layers * (group * layer.num_key_value_heads + 3 * layer.intermediate_size + 6)
    return shape.hidden_size * group + width * (rep + 2), shape.hidden_size * 3 + 1, hidden


# ---- which units stay ----


def keep_one(scores: Units, multiple: int = 1) -> Units:
    """Scores with the best KV group and MLP channel of each layer, and `multiple` hidden channels, at infinity."""
    raised = scores.combine(torch.clone)
    for values in (*raised.groups, *raised.channels):
        values[list(highest(values, 1))] = torch.inf
    raised.hidden[list(highest(raised.hidden, multiple))] = torch.inf
    return raised


def densest_units(
    scores: Units, unit_cost: Sequence[float], costs: Costs, budget: float, multiple: int = 1
) -> tuple[Units, int]:
    """The longest prefix that fits the budget, of all units sorted by score over cost; of equal ones the first leaves.

    Args:
        scores: float64; infinity stays and comes first, -inf has left already.
        unit_cost: of a KV group, an MLP channel and a hidden channel.
        costs: parameters of what stays.
        budget: parameters.
        multiple: the number of hidden channels that stay is a multiple of it: of those in the prefix the last ones
            leave. What this frees, the prefix can use.

    Returns:
        Which units stay, and the length of the prefix.
    """
    kinds = scores.all()
    density = torch.cat([values.flatten() / cost for values, cost in zip(kinds, unit_cost, strict=True)])
    sizes = [values.numel() for values in kinds]
    kind = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    order = torch.sort(density, stable=True).indices.flip(0)[: int((density > -torch.inf).sum())]
    groups, channels, hidden = ((kind[order] == index).cumsum(0) for index in range(3))
    cumulative = costs.count(hidden // multiple * multiple, groups, channels)  # of every prefix; never falls
    length = int(torch.searchsorted(cumulative, torch.tensor(math.floor(budget)), right=True))
    kept = torch.zeros_like(density, dtype=torch.bool)
    chosen = order[:length]
    kept[chosen] = True
    of_hidden = chosen[kind[chosen] == 2]
    kept[of_hidden[len(of_hidden) // multiple * multiple :]] = False
    parts = (part.view_as(values) for part, values in zip(torch.split(kept, sizes), kinds, strict=True))
    return Units(*parts), length


def width_plan(kept: Units, rep: int, among: Units) -> WidthPlan | None:
    """The plan that keeps these units of a model that has others; None if that is all of them.

    Args:
        kept: units of the dense model that stay, bool.
        rep: query heads of a KV group.
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


# ---- over time ----


def kept_fraction(step: float, start: float, end: float, last: float) -> float:
    """The cubic schedule: 1 until `start`, `last` from `end` on."""
    if step >= end:
        return last
    return min(1.0, last + (1.0 - last) * ((end - step) / (end - start)) ** 3)


@dataclass(frozen=True)
class Schedule:
    """When what happens; all are counts of optimizer steps that are done.

    Attributes:
        start: the warm-up is over: masks move from here on, and the teacher is the model as it is.
        cuts: when units leave, ascending.
        distil_end: the teacher is not asked any more.
    """

    start: int
    cuts: tuple[int, ...]
    distil_end: int

    @classmethod
    def of(cls, num_steps: int, prune_start: float, prune_end: float, distil_end: float, num_cuts: int) -> Self:
        """From parts of all steps; fewer cuts than asked for where there are fewer steps."""
        start = max(1, round(prune_start * num_steps))  # nothing has a score before the first step
        length = max(0, round(prune_end * num_steps) - start)
        cuts = sorted({start + math.ceil(length * cut / num_cuts) for cut in range(1, num_cuts + 1)})
        return cls(start, tuple(cuts), round(distil_end * num_steps))

    def progress(self, step: int) -> float:
        """From 0 at `start` to 1 at the last cut and after."""
        length = self.cuts[-1] - self.start
        return 1.0 if step >= self.cuts[-1] else max(0.0, (step - self.start) / length)

    def next_cut(self, step: int) -> int:
        """The first cut at this step or after it."""
        return next(cut for cut in self.cuts if cut >= step)


def grown_ranks(
    ranks: Sequence[int], widths: Sequence[int], saliences: Sequence[float], target: float, max_rank: int
) -> list[int]:
    """Ranks of adapters after the more salient half of them has taken up what is left of the target.

    r' = floor(r ((target - current) / parameters of that half + 1)), as in the code; the paper's is r target / current.

    Args:
        ranks: r of each adapter.
        widths: parameters of one rank: inputs + outputs.
        saliences: see `rank_salience`, averaged over steps.
        target: parameters of all adapters.
        max_rank: no rank grows beyond.
    """
    growing = highest(saliences, len(ranks) // 2)
    current = sum(rank * width for rank, width in zip(ranks, widths, strict=True))
    of_growing = sum(ranks[index] * widths[index] for index in growing)
    grown = list(ranks)
    for index in growing:
        larger = math.floor(ranks[index] * ((target - current) / of_growing + 1))
        grown[index] = max(ranks[index], min(larger, max_rank))
    return grown
