"""Apply a pruning plan to a model: merge, drop and renumber layers, narrow them, update the config.

GradPruner (arXiv:2601.19503), Section 3.2. Norms and biases of the kept layers are unchanged.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.merge import merge_layers
from gradpruner.models.architectures import (
    LAYER_COUNTS,
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
    """Merges, drops and narrows layers in place.

    Args:
        model: the dense model; changed in place.
        plan: the plan to apply.
        igia: returns the IGIA-Matrix of a sublayer; called only for layers that merge, one sublayer at a time.

    Returns:
        `model`, for chaining.

    Raises:
        ValueError: if the plan is for another depth, the plan merges and no `igia` is given, or the model's layers have
            an unknown layout.
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
    """Returns another model with the same weights in the same memory, to have a dense model beside the pruned one.

    `apply_plan`, LaCo and repair replace tensors instead of writing to them, so a change in one model leaves the other
    unchanged. Training does write to the shared tensors.
    """
    shared = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, {**shared, **{id(buffer): buffer for buffer in model.buffers()}})


def drop_layers(model: PreTrainedModel, kept_layers: tuple[int, ...]) -> None:
    """Keeps only `kept_layers` of the model, in place, with cache indices and config to match.

    Each layer keeps its kind (window, rotary positions or none). Decoder state for kinds that no longer occur, such as
    the rotary frequencies of window layers, remains until the model is reloaded, but is not used.

    Raises:
        ValueError: if the model has no list of layers, or its config has an unknown list with one entry per layer.
    """
    layers = decoder_layers(model)
    kept = [layers[layer] for layer in kept_layers]
    keep_layers_in_config(model.config, kept_layers)  # in place: the model's modules share this config object
    _number(kept)
    model.get_decoder().layers = nn.ModuleList(kept)
    model.get_decoder().layers.training = layers.training


@contextmanager
def only_layers(model: PreTrainedModel, kept_layers: tuple[int, ...]) -> Iterator[None]:
    """Reduces the model to these layers while the context is open; copies no weight."""
    decoder, layers = model.get_decoder(), decoder_layers(model)
    entries = {
        key: copy.copy(getattr(model.config, key))
        for key in (*LAYER_COUNTS, *PER_LAYER_CONFIG_LISTS)
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
    """Sets the position of every layer: the key-value cache is indexed by it, and a gap breaks generate()."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - mypy takes it for a submodule


def _merge_into(
    layers: nn.ModuleList, absorber: int, merged: tuple[int, ...], plan: PruningPlan, igia: IgiaLookup
) -> None:
    """Merges every linear sublayer of the `merged` layers into the same sublayer of `absorber`."""
    sources = [linear_sublayers(layers[layer]) for layer in merged]
    for name, target in linear_sublayers(layers[absorber]).items():
        device = target.weight.device
        target.weight.data = merge_layers(
            target.weight,
            [source[name].weight.to(device) for source in sources],  # layers may be spread over several devices
            [igia(layer, name).to(device) for layer in merged],
            plan.density,
            plan.merge_rule,
            kept_igia=igia(absorber, name).to(device) if plan.merge_rule == "fisher" else None,
        )
