"""Carry a pruning plan out on a model: merge, drop, renumber, make narrower, fix the config.

GradPruner (arXiv:2601.19503), Section 3.2. Norms and biases of the kept layer stay as they are.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.merge import merge_layers
from gradpruner.models.architectures import (
    PER_LAYER_CONFIG_LISTS,
    check_model,
    decoder_layers,
    keep_layers_in_config,
    linear_sublayers,
)
from gradpruner.plan import PruningPlan
from gradpruner.width_surgery import narrow

IgiaLookup = Callable[[int, str], Tensor]  # (layer, sublayer name) -> IGIA-Matrix, (out, in)


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: PruningPlan, igia: IgiaLookup | None = None) -> PreTrainedModel:
    """Merges and removes layers in place.

    Args:
        model: the dense model; changed in place.
        plan: what to do.
        igia: IGIA-Matrix of a sublayer; only asked for layers that merge, one sublayer at a time.

    Returns:
        `model`, for chaining.

    Raises:
        ValueError: if the plan is for another depth, merges and no `igia` is given, or the layers of the model are laid
            out in a way that we do not know.
    """
    check_model(model)
    layers = decoder_layers(model)
    if len(layers) != plan.num_hidden_layers:
        raise ValueError(
            f"The plan is for {plan.num_hidden_layers} decoder layers, the model has {len(layers)}. "
            "Apply it to the dense model that it was made for."
        )
    if plan.merges and igia is None:
        raise ValueError(f"The plan merges layers {list(plan.absorbed_by)} but no IGIA-Matrix was given. Pass igia.")
    for absorber, merged in plan.merges.items():
        assert igia is not None
        _merge_into(layers, absorber, merged, plan, igia)
    if plan.pruned_layers:
        drop_layers(model, plan.kept_layers)
    if plan.width is not None:
        narrow(model, plan.width)
    return model


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights in the same memory, for a dense model beside the pruned one.

    Carrying out a plan, and LaCo, and repair replace tensors and do not write to them: what changes in one of the two
    stays as it was in the other. Training does write to them.
    """
    shared = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, {**shared, **{id(buffer): buffer for buffer in model.buffers()}})


def drop_layers(model: PreTrainedModel, kept_layers: tuple[int, ...]) -> None:
    """Keeps only `kept_layers` of the model, in place, with cache indices and config to match.

    Each layer keeps its kind (window, rotary positions or none). What a decoder remembers of kinds that are gone, such
    as the rotary frequencies of window layers, stays until the model is reloaded and is not used.

    Raises:
        ValueError: if the model has no list of layers, or a config list with one entry a layer that we do not know.
    """
    layers = decoder_layers(model)
    kept = [layers[layer] for layer in kept_layers]
    keep_layers_in_config(model.config, kept_layers)  # in place: the model's modules share this config object
    _number(kept)
    model.get_decoder().layers = nn.ModuleList(kept)
    model.get_decoder().layers.training = layers.training


@contextmanager
def only_layers(model: PreTrainedModel, kept_layers: tuple[int, ...]) -> Iterator[None]:
    """The model with only these layers while it is open; no weight is copied."""
    decoder, layers = model.get_decoder(), decoder_layers(model)
    entries = {
        key: copy.copy(getattr(model.config, key))
        for key in ("num_hidden_layers", *PER_LAYER_CONFIG_LISTS)
        if hasattr(model.config, key)
    }
    try:
        drop_layers(model, kept_layers)
        yield
    finally:
        decoder.layers = layers
        for key, value in entries.items():
            setattr(model.config, key, value)
        _number(layers)


def _number(layers: Iterable[nn.Module]) -> None:
    """Tells every layer its position: the key-value cache is addressed by it, and a gap breaks generate()."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - mypy takes it for a submodule


def _merge_into(
    layers: nn.ModuleList, absorber: int, merged: tuple[int, ...], plan: PruningPlan, igia: IgiaLookup
) -> None:
    """Merges every linear sublayer of the `merged` layers into that of `absorber`."""
    sources = [linear_sublayers(layers[layer]) for layer in merged]
    for name, target in linear_sublayers(layers[absorber]).items():
        device = target.weight.device
        target.weight.data = merge_layers(
            target.weight,
            [source[name].weight for source in sources],
            [igia(layer, name).to(device) for layer in merged],
            plan.density,
            plan.merge_rule,
            kept_igia=igia(absorber, name).to(device) if plan.merge_rule == "fisher" else None,
        )
