"""Layout of a decoder: its layers, their linear sublayers, and the config entries for single layers.

No code here is specific to one model: a decoder is a list of layers with the same linear sublayers, 1-D parameters such
as norms and biases, and config lists with one entry per layer. Any other layout is refused before weights are read. To
support a new architecture, add a case to `tests/test_architectures.py`; once it passes, add its `model_type` to
`SUPPORTED_MODEL_TYPES`, and its config lists to `PER_LAYER_CONFIG_LISTS`.
"""

import copy
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gradpruner.messages import first_few

# Model types that tests/test_architectures.py compresses, generates with, saves, reloads and compresses again.
SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "phi3",
    "olmo2",
)
# Config entries with one value per decoder layer; surgery keeps the values of the kept layers. transformers derives
# them from rules by position (max_window_layers, sliding_window_pattern, no_rope_layer_interval, ...) only if None.
PER_LAYER_CONFIG_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Config entries that count layers from the first: all of them, and those before the first with a sliding window.
LAYER_COUNTS = ("num_hidden_layers", "max_window_layers")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses a model whose layers cannot be pruned one by one, from its config alone.

    Builds the model on the meta device to look at its layers; no weights are read.

    Raises:
        ValueError: naming the part of the architecture that is not supported.
    """
    _check_family(config)
    _check_per_layer_entries(config)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        _refuse(config, f"transformers builds no causal language model of its own from {type(config).__name__}")
    try:
        model = empty_model(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _refuse(config, f"transformers cannot build it from its config ({reason})", "Get its config.json again.")
    check_model(model)


def check_model(model: PreTrainedModel) -> None:
    """Does the work of `check_supported` for a loaded model, whose layers may differ from its config."""
    config = model.config
    _check_family(config)
    _check_per_layer_entries(config)
    _check_layers(model)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        _refuse(
            config,
            "its layers look like those of a supported model, but what its code derives from a layer's position is "
            "untested",
            "To support it, see gradpruner/models/architectures.py.",
        )


def _check_family(config: PreTrainedConfig) -> None:
    """Raises ValueError on kinds of models that the config alone shows to be unsupported."""
    entries = vars(config)
    nested = sorted(key for key, value in entries.items() if isinstance(value, PreTrainedConfig))
    counts = {key: value for key, value in entries.items() if _is_count(value)}
    experts = {key: count for key, count in counts.items() if "experts" in key and "per_tok" not in key and count > 1}
    num_shared = entries.get("num_kv_shared_layers")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(config, "it is an encoder-decoder, and only the layers of a decoder-only model are known here")
    if nested:
        advice = "Load its text model as a checkpoint of its own."
        _refuse(config, f"its decoder is a part of a larger model, described in {', '.join(nested)}", advice)
    if experts:
        found = ", ".join(f"{key}={count}" for key, count in sorted(experts.items()))
        _refuse(config, f"it is a mixture of experts ({found}), and only one dense MLP a layer is known here")
    if num_shared:
        _refuse(
            config,
            f"its layers share keys and values (num_kv_shared_layers={num_shared}), so that one cannot leave without "
            "the other",
        )
    depth: Any = getattr(config, "num_hidden_layers", None)
    if not _is_count(depth) or depth < 1:
        _refuse(config, f"{type(config).__name__} must have a num_hidden_layers of 1 or more, got {depth}")


def _check_per_layer_entries(config: PreTrainedConfig) -> None:
    """Raises ValueError on config entries for single layers that cannot be sliced here."""
    if config.is_heterogeneous:
        names = ", ".join(sorted(config.per_layer_attributes))
        _refuse(config, f"its layers differ from each other: per_layer_config sets {names} layer by layer")
    depth = config.num_hidden_layers
    unknown = sorted(
        key
        for key, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and key not in PER_LAYER_CONFIG_LISTS
        and not key.startswith("_")
        and key != "architectures"
        and not key.endswith(("token_id", "token_ids"))
    )
    if unknown:
        _refuse(
            config,
            f"config entries {', '.join(unknown)} have one value for each of {depth} layers, and what they mean is not "
            "known here",
            "If they belong to the layers, add them to PER_LAYER_CONFIG_LISTS in gradpruner/models/architectures.py.",
        )


def _check_layers(model: PreTrainedModel) -> None:
    """Raises ValueError unless all layers have the same linear sublayers and only 1-D parameters besides."""
    config, layers = model.config, decoder_layers(model)
    shapes = [{name: tuple(value.shape) for name, value in layer.named_parameters()} for layer in layers]
    experts = sorted(name for name in shapes[0].keys() | shapes[-1].keys() if "experts." in name)
    if experts:
        _refuse(
            config,
            f"it is a mixture of experts ({first_few(experts, 4)}), and only one dense MLP a layer is known here",
        )
    for layer, found in enumerate(shapes):
        different = sorted(name for name in shapes[0].keys() | found.keys() if shapes[0].get(name) != found.get(name))
        if different:
            _refuse(
                config, f"its layers differ from each other: layer {layer} from layer 0 in {first_few(different, 4)}"
            )
    # All layers have the same parameters, so checking the first is enough.
    linears = {f"{name}.weight" for name in linear_sublayers(layers[0])}
    unknown = [
        f"{name} ({value.ndim}-D)"
        for name, value in layers[0].named_parameters()
        if value.ndim > 1 and name not in linears
    ]
    if unknown:
        part = f"its layers hold parameters that are neither weights of nn.Linear nor 1-D: {first_few(unknown, 4)}"
        _refuse(config, part)
    if not linears:
        _refuse(config, "its layers have no nn.Linear sublayers")
    owners = [{id(value) for value in layer.parameters()} for layer in layers]
    if len(set().union(*owners)) < sum(map(len, owners)):
        _refuse(config, "its layers share parameters with each other")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(config: PreTrainedConfig, part: str, advice: str = "Choose a model of a supported type.") -> NoReturn:
    supported = ", ".join(SUPPORTED_MODEL_TYPES)
    raise ValueError(f"Cannot prune model type {config.model_type!r}: {part}. Supported: {supported}. {advice}")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder layers, first to last; raises ValueError if the decoder has no list `layers` of them."""
    decoder = model.get_decoder()
    layers, depth = getattr(decoder, "layers", None), getattr(model.config, "num_hidden_layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != depth:
        _refuse(model.config, f"its {type(decoder).__name__} has no list `layers` of num_hidden_layers={depth} layers")
    return layers


def linear_sublayers(layer: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear sublayers of a decoder layer by name (`self_attn.q_proj`, `mlp.down_proj`, ...)."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def check_finite_weights(model: PreTrainedModel) -> None:
    """Raises ValueError naming decoder layers that are offloaded, or layers and other weights with NaN or infinity."""
    offloaded = [
        layer
        for layer, module in enumerate(decoder_layers(model))
        if any(parameter.is_meta for parameter in module.parameters())
    ]
    if offloaded:
        raise ValueError(
            f"The weights of decoder layers must be on a device, got layers {offloaded} offloaded to the host or disk. "
            "Load the model with a device_map of devices that can hold all of it, or on the CPU."
        )
    inside = {id(parameter) for module in decoder_layers(model) for parameter in module.parameters()}
    bad_layers = [
        layer
        for layer, module in enumerate(decoder_layers(model))
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    ]
    bad = [f"decoder layers {bad_layers}"] if bad_layers else []
    bad += [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and not bool(parameter.isfinite().all())
    ]
    if bad:
        raise ValueError(
            f"The weights of {' and '.join(bad)} hold NaN or infinity, so nothing computed from them means anything. "
            "Load an undamaged checkpoint, or another dtype (float16 overflows above 65504)."
        )


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Returns names for peft that match exactly the linear sublayers of all decoder layers ("all-linear")."""
    return sorted({name.rsplit(".", 1)[-1] for layer in decoder_layers(model) for name in linear_sublayers(layer)})


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters; tied ones count once. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def shrink_config(config: PreTrainedConfig, kept_layers: tuple[int, ...]) -> PreTrainedConfig:
    """Returns a copy of the config for the kept layers alone: counts of layers, and lists with one entry per layer."""
    config = copy.deepcopy(config)
    keep_layers_in_config(config, kept_layers)
    return config


def keep_layers_in_config(config: PreTrainedConfig, kept_layers: tuple[int, ...]) -> None:
    """Changes the config in place so that it describes the kept layers alone; each keeps its kind.

    Rules by position are first written out as the explicit lists of `PER_LAYER_CONFIG_LISTS`, which take precedence
    over the rules when a saved config is read again; then the lists are sliced. `max_window_layers`, which older
    readers go by, counts the kept ones among the layers that it counted before.

    Raises:
        ValueError: if other entries have one value per layer.
    """
    _check_per_layer_entries(config)
    if any(getattr(config, key, ()) is None for key in PER_LAYER_CONFIG_LISTS):
        explicit = type(config).from_dict(config.to_dict())  # made while every layer still has its dense position
        for key in PER_LAYER_CONFIG_LISTS:
            if getattr(explicit, key, None) is not None:
                setattr(config, key, getattr(explicit, key))
    for key in PER_LAYER_CONFIG_LISTS:
        values = getattr(config, key, None)
        if values is not None:
            setattr(config, key, [values[layer] for layer in kept_layers])
    for key in LAYER_COUNTS:
        if getattr(config, key, None) is not None:
            setattr(config, key, sum(layer < getattr(config, key) for layer in kept_layers))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the model without storage (meta device), for counting."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
