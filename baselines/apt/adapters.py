"""How APT changes LoRA adapters and their optimizer in training: narrows them with the model and raises ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gradpruner.models.architectures import decoder_layers
from gradpruner.models.shape import head_dim, model_shape, set_linear
from gradpruner.plan import WidthPlan
from gradpruner.width_surgery import READS_HIDDEN, WRITES_HIDDEN, head_channels, narrow

ADAPTER = "default"  # peft's name for the only adapter
Change = tuple[Tensor, Tensor, Callable[[Tensor], Tensor] | None]  # old, new, conversion of moments


def adapters(model: PeftModel) -> dict[str, lora.Linear]:
    """Returns the LoRA layers by their name in the base model, in the base model's order."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, lora.Linear)}


def factors(layer: lora.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Returns A, whose weight is (rank, inputs), and B, (outputs, rank)."""
    return layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]


def num_adapter_parameters(layer: lora.Linear) -> int:
    """Returns the number of parameters of A and B."""
    return sum(factor.weight.numel() for factor in factors(layer))


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[PreTrainedModel]:
    """Yields the base model with plain linear sublayers in place of LoRA layers; changes to these sublayers persist."""
    base, own = model.get_base_model(), adapters(model)
    try:
        for name, layer in own.items():
            base.set_submodule(name, layer.base_layer)
        yield base
    finally:
        for name, layer in own.items():
            base.set_submodule(name, layer)


@torch.no_grad()
def narrow_with_adapters(model: PeftModel, width: WidthPlan, optimizer: Optimizer) -> None:
    """Runs `width_surgery.narrow` on a model in training: slices frozen weights, adapters, and the optimizer's moments.

    Args:
        model: with LoRA on all linear sublayers of all decoder layers.
        width: units to keep, numbered as in `model`.
        optimizer: optimizer of the adapters.
    """
    with without_adapters(model) as base:
        shape = model_shape(base)
        narrow(base, width)
    channels, changes = head_dim(base.config), []
    hidden = None if width.hidden is None else torch.tensor(width.hidden)
    for layer, old, heads, kept in zip(decoder_layers(base), shape.layers, width.heads, width.channels, strict=True):
        rep = old.num_attention_heads // old.num_key_value_heads
        query = head_channels(heads, channels)
        kv = head_channels(sorted({head // rep for head in heads}), channels)
        mlp = torch.tensor(kept)
        inside = dict(zip(READS_HIDDEN, (query, kv, kv, mlp, mlp), strict=True))
        inside |= dict(zip(WRITES_HIDDEN, (query, mlp), strict=True))
        for name, units in inside.items():
            module: Any = layer.get_submodule(name)
            rows, columns = (units, hidden) if name in READS_HIDDEN else (hidden, units)
            a, b = factors(module)
            changes += [take(a, columns, 1), take(b, rows, 0)]
            module.in_features, module.out_features = a.in_features, b.out_features
    change_parameters(optimizer, [change for change in changes if change is not None])


@torch.no_grad()
def grow(model: PeftModel, ranks: dict[str, int], optimizer: Optimizer, generator: torch.Generator) -> None:
    """Gives adapters higher ranks; the model's output and alpha / rank are unchanged.

    New rows of A are drawn as in peft, new columns of B are zero. The moments of adapters that grow start anew.

    Args:
        model: with LoRA.
        ranks: new ranks by name of the LoRA layer, as in `adapters`.
        optimizer: optimizer of the adapters.
        generator: source of the draws, on the CPU.
    """
    changes: list[Change] = []
    config = model.peft_config[ADAPTER]
    for name, layer in adapters(model).items():
        rank, old = ranks[name], layer.r[ADAPTER]
        if rank == old:
            continue
        a, b = factors(layer)
        bound = 1 / math.sqrt(a.in_features)
        rows = torch.empty(rank - old, a.in_features).uniform_(-bound, bound, generator=generator)
        before = a.weight, b.weight
        set_linear(a, torch.cat([a.weight, rows.to(a.weight)]), None)
        set_linear(b, torch.cat([b.weight, b.weight.new_zeros(len(b.weight), rank - old)], dim=1), None)
        changes += [(before[0], a.weight, None), (before[1], b.weight, None)]
        alpha = layer.lora_alpha[ADAPTER] * rank / old
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, alpha, alpha / rank
        # peft makes the same adapters from these when it loads them.
        config.rank_pattern[name], config.alpha_pattern[name] = rank, alpha
    change_parameters(optimizer, changes)


def take(linear: nn.Linear, kept: Tensor | None, dim: int) -> Change | None:
    """Keeps only these rows (dim 0) or columns (dim 1) of a weight without bias; None keeps all."""
    if kept is None:
        return None
    old, index = linear.weight, kept.to(linear.weight.device)
    set_linear(linear, old.detach().index_select(dim, index), None)
    return old, linear.weight, lambda moment: moment.index_select(dim, index)


def change_parameters(optimizer: Optimizer, changes: list[Change]) -> None:
    """Replaces old parameters by new ones in the optimizer, with converted moments, or none without a conversion."""
    new = {id(change[0]): change[1] for change in changes}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]
    for old, parameter, convert in changes:
        state = optimizer.state.pop(old, None)
        if state and convert is not None:
            # Besides moments, the state holds a step count, a scalar.
            optimizer.state[parameter] = {
                key: convert(value) if value.shape == old.shape else value for key, value in state.items()
            }
