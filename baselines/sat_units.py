"""Units that SAT omits: how they are scored and drawn, and how a block computes without them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradpruner.models.architectures import decoder_layers
from gradpruner.models.shape import check_width_supported, head_dim

OBSERVING_METRICS = ("wanda", "activation")  # need activations
SELECTION_METRICS = ("uniform", "magnitude", *OBSERVING_METRICS)
SELECTIONS = ("sample", "topk")


@dataclass(frozen=True)
class Block:
    """Attention or MLP of a decoder layer as a set of units that can be omitted: KV groups or channels.

    A unit is the same range of rows in every input projection and of columns in the output projection. The length of
    the range is the projection's size / `num_units`: Hugging Face puts the query heads of a KV group side by side.

    Attributes:
        name: such as `layers.3.mlp`.
        num_units: number of KV groups or channels.
        inputs: q, k and v projections, or gate and up; each an nn.Linear or peft's LoRA layer around one.
        output: o or down projection.
    """

    name: str
    num_units: int
    inputs: tuple[nn.Module, ...]
    output: nn.Module

    def omit_all_but(self, kept: Tensor, rescale: bool = False) -> None:
        """Makes the block compute with only these units, until `restore`.

        Args:
            kept: units to keep, ascending, int64.
            rescale: multiply the input of the output projection by units / kept units.
        """
        scale = self.num_units / len(kept) if rescale else 1.0
        for linear, dim, channels in self.slices(kept):
            vars(linear)["forward"] = _gathered(linear, dim, channels, scale if dim == 1 else 1.0)

    def restore(self) -> None:
        """Undoes `omit_all_but`."""
        for linear, _, _ in self.slices(torch.arange(self.num_units)):
            vars(linear).pop("forward", None)

    def slices(self, units: Tensor) -> Iterator[tuple[nn.Linear, int, Tensor]]:
        """Yields where the weights of these units are: (linear, 0 for rows or 1 for columns, indices).

        With LoRA, units are rows of W and B in an input projection, and columns of W and A in the output projection.
        peft's own forward then computes with the narrower matrices.
        """
        for module in self.inputs:
            for linear in _linears(module, "lora_B"):
                yield linear, 0, unit_channels(units.to(linear.weight.device), linear.out_features // self.num_units)
        for linear in _linears(self.output, "lora_A"):
            yield linear, 1, unit_channels(units.to(linear.weight.device), linear.in_features // self.num_units)

    @torch.no_grad()
    def scores(self, metric: str, mean_square: Tensor | None = None) -> Tensor:
        """Returns the importance of every unit.

        Args:
            metric: one of `SELECTION_METRICS`.
            mean_square: mean square over tokens of the output projection's input, (C,); for `OBSERVING_METRICS`.

        Returns:
            (num_units,) float64, 0 or above, comparable only within the block.
        """
        if metric == "uniform":
            return torch.ones(self.num_units, dtype=torch.float64)
        if metric == "magnitude":
            matrices = [*(_weight(module) for module in self.inputs), _weight(self.output).T]
            return magnitude_scores(matrices, self.num_units)
        assert mean_square is not None
        norms = mean_square.sqrt()
        if metric == "wanda":
            return wanda_scores(_weight(self.output), norms, self.num_units)
        return activation_scores(norms, self.num_units)


def unit_channels(units: Tensor, width: int) -> Tensor:
    """Returns the channel indices of units of `width` channels each: (n,) becomes (n * width,)."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def magnitude_scores(matrices: Sequence[Tensor], num_units: int) -> Tensor:
    """Returns each unit's sum of squared weights, (num_units,) float64; every matrix has units along dimension 0."""
    rows = (matrix.float().square().sum(dim=1, dtype=torch.float64) for matrix in matrices)
    return torch.stack([row.view(num_units, -1).sum(dim=1) for row in rows]).sum(dim=0).cpu()


def wanda_scores(weight: Tensor, norms: Tensor, num_units: int) -> Tensor:
    """Returns the sum over a unit's columns j of sum_i |W_ij| * norm_j, Wanda's score of weights (Sun et al., 2023).

    Args:
        weight: weight of the output projection, (d_out, C).
        norms: L2 norm over tokens of each input channel, (C,).
        num_units: number of units that the channels form.

    Returns:
        (num_units,) float64.
    """
    columns: Tensor = weight.abs().sum(dim=0, dtype=torch.float64) * norms.to(weight.device)  # (C,)
    return columns.view(num_units, -1).sum(dim=1).cpu()


def activation_scores(norms: Tensor, num_units: int) -> Tensor:
    """Returns the L2 norm of each unit's activations, (num_units,) float64, from the norms of its channels, (C,)."""
    units: Tensor = torch.linalg.vector_norm(norms.view(num_units, -1), dim=1, dtype=torch.float64)
    return units.cpu()


def select_units(scores: Tensor, num_kept: int, selection: str, generator: torch.Generator) -> Tensor:
    """Selects the units to keep.

    `sample` draws units one by one without replacement, each with a probability proportional to its score, by adding
    Gumbel noise to log-scores. Units that score 0 come last. Equal scores are taken in the order of their indices.

    Args:
        scores: (n,) float64, 0 or above.
        num_kept: number of units to keep.
        selection: one of `SELECTIONS`.
        generator: source of the noise, on the CPU.

    Returns:
        Indices of the kept units, ascending, (num_kept,) int64.
    """
    keys = scores
    if selection == "sample":
        noise = torch.empty_like(scores).exponential_(generator=generator)
        keys = scores.log() - noise.log()  # -log of an exponential variable is Gumbel
    order = torch.sort(keys, descending=True, stable=True).indices
    return torch.sort(order[:num_kept]).values


def find_blocks(model: nn.Module) -> list[Block]:
    """Returns the attention and MLP blocks of every decoder layer, in the order of the forward pass.

    Args:
        model: a causal language model, plain or with peft's LoRA adapters.

    Raises:
        ValueError: if the model type is not one of `shape.WIDTH_MODEL_TYPES`, or a projection is neither nn.Linear nor
            plain LoRA around one.
    """
    base = _base_model(model)
    check_width_supported(base.config, "sat")
    blocks = []
    for number, layer in enumerate(decoder_layers(base)):
        q, k, v, o = (_projection(layer, number, f"self_attn.{each}_proj") for each in "qkvo")
        blocks.append(Block(f"layers.{number}.self_attn", k.out_features // head_dim(base.config), (q, k, v), o))
        gate, up, down = (_projection(layer, number, f"mlp.{each}_proj") for each in ("gate", "up", "down"))
        blocks.append(Block(f"layers.{number}.mlp", down.in_features, (gate, up), down))
    return blocks


class ChannelStatistics:
    """Mean square over real tokens of the input of every output projection, from training forwards.

    Omitted channels keep the value from when they were last computed. A forward that gradient checkpointing replays
    counts once.

    Attributes:
        mean_square: one tensor per block, (C,) float64, as of the last `update`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._ready = False
        weights = [_linears(block.output, "lora_A")[0].weight for block in blocks]
        self.mean_square = [weight.new_zeros(weight.shape[1], dtype=torch.float64) for weight in weights]
        self._sums = [torch.zeros_like(mean) for mean in self.mean_square]
        self._counts = [torch.zeros_like(mean) for mean in self.mean_square]
        self._channels = [torch.arange(len(mean), device=mean.device) for mean in self.mean_square]  # those computed
        self._tokens: Tensor | None = None  # real tokens of the current batch, (N,); None means all
        self._awaited: set[int] = set()  # blocks that have not seen the current batch
        self._hooks = [_base_model(model).get_decoder().register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, block in enumerate(blocks):
            self._hooks.append(block.output.register_forward_pre_hook(partial(self._observe, index)))

    def update(self) -> bool:
        """Updates `mean_square` with the forwards since the last call; returns False if there has never been one."""
        for mean, total, count in zip(self.mean_square, self._sums, self._counts, strict=True):
            seen = count > 0
            mean[seen] = total[seen] / count[seen]
            self._ready = self._ready or bool(seen.any())
            total.zero_()
            count.zero_()
        return self._ready

    def watch(self, kept: Sequence[Tensor]) -> None:
        """Sets which units of each block are computed from now on."""
        self._channels = [
            unit_channels(units, len(mean) // block.num_units).to(mean.device)
            for block, units, mean in zip(self._blocks, kept, self.mean_square, strict=True)
        ]

    def state(self) -> dict[str, Tensor]:
        """Returns everything that a resumed run needs besides `watch`, by name."""
        return {
            f"{block.name}.{kind}": tensor
            for kind, tensors in self._tensors().items()
            for block, tensor in zip(self._blocks, tensors, strict=True)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores a `state`, which may also hold other tensors."""
        for kind, tensors in self._tensors().items():
            for block, tensor in zip(self._blocks, tensors, strict=True):
                tensor.copy_(state[f"{block.name}.{kind}"])
        self._ready = True

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {"mean_square": self.mean_square, "sum": self._sums, "count": self._counts}

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")  # (B, T)
        self._tokens = None if mask is None else mask.flatten().nonzero().squeeze(1)
        self._awaited = set(range(len(self._blocks)))

    @torch.no_grad()
    def _observe(self, index: int, module: nn.Module, args: tuple[Tensor]) -> None:
        if index not in self._awaited:  # a replay
            return
        self._awaited.remove(index)
        hidden = args[0].flatten(0, -2)  # (B * T, kept channels)
        if self._tokens is not None:
            hidden = hidden.index_select(0, self._tokens.to(hidden.device))
        self._sums[index].index_add_(0, self._channels[index], hidden.float().square().sum(0, dtype=torch.float64))
        self._counts[index][self._channels[index]] += len(hidden)


def _base_model(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _GatheredLinear(torch.autograd.Function):
    """F.linear with only some rows (dim 0) or columns (dim 1) of the weight.

    The backward pass gathers them again: plain autograd would keep the gathered copies of all layers until then, which
    need as much memory as the kept weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, indices)
        ctx.dim = dim
        return F.linear(x, weight.index_select(dim, indices), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ weight.index_select(ctx.dim, indices)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight).index_add_(ctx.dim, indices, rows.T @ x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_weight, grad_bias, None, None


def _gathered(linear: nn.Linear, dim: int, indices: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """Returns a forward for `linear` with only these rows (dim 0) or columns (dim 1), on inputs times `scale`."""

    def forward(x: Tensor) -> Tensor:
        bias = linear.bias if linear.bias is None or dim == 1 else linear.bias.index_select(0, indices)
        x = x if scale == 1.0 else x * scale
        return _GatheredLinear.apply(x, linear.weight, bias, dim, indices)  # type: ignore[no-untyped-call,no-any-return]

    return forward


def _linears(projection: nn.Module, factor: str) -> list[nn.Linear]:
    """Returns the modules to narrow: the linear itself, and with LoRA this factor (`lora_A` or `lora_B`)."""
    if isinstance(projection, lora.Linear):
        return [projection.base_layer, *getattr(projection, factor).values()]
    assert isinstance(projection, nn.Linear)
    return [projection]


def _weight(projection: nn.Module) -> Tensor:
    """Returns the weight that the projection computes with, including adapters, (d_out, d_in)."""
    if isinstance(projection, lora.Linear):
        weight: Tensor = projection.base_layer.weight.detach()
        return sum((projection.get_delta_weight(adapter) for adapter in projection.active_adapters), start=weight)
    assert isinstance(projection, nn.Linear)
    return projection.weight.detach()


def _projection(layer: nn.Module, number: int, name: str) -> Any:
    projection: Any = layer.get_submodule(name)
    is_lora = type(projection) is lora.Linear
    variants = list(projection.lora_variant.values()) if is_lora else []
    base = projection.base_layer if is_lora else projection
    # Exact types: a subclass may compute differently, or hold packed weights.
    if variants or type(base) is not nn.Linear:
        kind = type(variants[0] if variants else base).__name__
        raise ValueError(
            "method=sat gathers rows and columns of nn.Linear and of plain LoRA around it, got "
            f"layers.{number}.{name} with {kind}. Train all weights or plain LoRA, on a model that is not quantized."
        )
    return projection
