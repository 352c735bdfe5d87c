"""A checkpoint's config: read, refused if no such model can be pruned, and made to say what the weights' files hold."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gradpruner.messages import one_line, warn_once
from gradpruner.models.architectures import SUPPORTED_MODEL_TYPES, check_supported
from gradpruner.models.contents import AssetError
from gradpruner.models.tensor_files import StoredTensor, read_tensors

logger = logging.getLogger(__name__)

QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is llm-compressor's of 2024
# Ends of the names of model classes whose output is no next token.
OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForRewardModel")


def read_config(
    source: str, folder: Path | None, commit: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Returns the config of a checkpoint that can be pruned; reads no weights, except two that may be the same.

    Args:
        source: folder or Hub id.
        folder: where the weights' files are, or None if they are not on this machine yet.
        commit: of a Hub model.
        trust_remote_code: see `ModelSpec`.

    Raises:
        ValueError: if it cannot be read, is of a model that cannot be pruned, or the weights are quantized.
        OSError: if a Hub model has no config.
    """
    values, _ = PreTrainedConfig.get_config_dict(source, revision=commit)
    _check_model_type(values, source)
    check_not_quantized(values, source)
    try:
        config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AssetError(
            f"A model's config must have values that transformers {transformers.__version__} can use, got an error for "
            f"the config.json of {source} ({one_line(error)}). Get the file again, as it was saved with the weights."
        ) from error
    check_supported(config)
    if folder is not None:
        settle_tying(config, folder)
    return config


def check_not_quantized(values: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if the weights of a config (as a dict) are quantized."""
    found = [key for key in QUANTIZATION_KEYS if values.get(key) is not None]
    if not found:
        return
    settings = values[found[0]]
    known: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
    bits = next((n for n in (4, 8) if known.get(f"load_in_{n}bit")), known.get("bits", known.get("w_bit")))
    method = known.get("quant_method", "unknown")
    width = f", {bits} bits" if bits else ""
    raise ValueError(
        f"Cannot prune a quantized checkpoint, got {source} with a {found[0]} (method {method}{width}): "
        "quantized weights can be neither merged nor fully fine-tuned. Use the checkpoint that it was quantized from."
    )


def settle_tying(config: PreTrainedConfig, folder: Path) -> None:
    """Sets `tie_word_embeddings` to False if a folder holds an output head that differs from the embedding.

    transformers then uses both, but saves the wrong flag, by which vLLM and older releases drop the head.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    tensors = read_tensors(folder)
    for head, embedding in tied_names(config).items():
        pair = [_find(tensors, name, config) for name in (head, embedding)]
        if pair[0] is not None and pair[1] is not None and not pair[0].equals(pair[1]):
            config.tie_word_embeddings = False
            warn_once(
                logger,
                f"{folder} holds {pair[0].name} with other values than {pair[1].name}, although its config.json says "
                "tie_word_embeddings=true. Both are used as they are, and the config is corrected to false.",
            )


def tied_names(config: PreTrainedConfig) -> dict[str, str]:
    """Returns name of the output head -> name of the embedding that it is tied to, if the config says so."""
    names: dict[str, str] = AutoModelForCausalLM._model_mapping[type(config)]._tied_weights_keys or {}
    return names


def _check_model_type(values: Mapping[str, Any], source: str) -> None:
    """Raises AssetError if a config (as a dict) is of no model that transformers has, or of one for another task."""
    model_type, classes = values.get("model_type"), [str(name) for name in values.get("architectures") or ()]
    supported = f"Supported: {', '.join(SUPPORTED_MODEL_TYPES)}."
    if not isinstance(model_type, str):
        raise AssetError(
            f"The config.json of {source} must name the model_type, got {model_type!r} and the keys "
            f"{', '.join(sorted(values)[:5]) or 'none'}. Get the file again, as it was saved with the weights."
        )
    if model_type not in CONFIG_MAPPING:
        code = " and its own code comes with it (auto_map)" if values.get("auto_map") else ""
        raise AssetError(
            f"Cannot prune model type {model_type!r}: transformers {transformers.__version__} does not know it{code}, "
            f"got it from {source}. {supported} Choose a model of a supported type, or correct config.json."
        )
    if other := [name for name in classes if name.endswith(OTHER_TASKS)]:
        raise AssetError(
            f"Cannot prune {other[0]}: it predicts labels or scores and has no output head for tokens, got it from "
            f"{source}. Use the language model that it was made from."
        )


def _find(tensors: Mapping[str, StoredTensor], name: str, config: PreTrainedConfig) -> StoredTensor | None:
    """Returns a stored tensor by its name in the model; checkpoints of a bare decoder lack the model's own prefix."""
    prefix = AutoModelForCausalLM._model_mapping[type(config)].base_model_prefix
    return tensors.get(name) or tensors.get(name.removeprefix(f"{prefix}."))
