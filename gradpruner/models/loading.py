"""Checks of a checkpoint's weights: they are those of the model that the config describes, all of them, unquantized.

transformers only warns of tensors that are missing or have unknown names, and initializes what is missing at random.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gradpruner.messages import first_few, warn_once
from gradpruner.models.architectures import empty_model
from gradpruner.models.contents import ADAPTER_CONFIG_FILE
from gradpruner.models.read_config import tied_names
from gradpruner.models.tensor_files import FLOAT_DTYPES, StoredTensor, read_tensors

logger = logging.getLogger(__name__)

# For `from_pretrained`, which applies an adapter that lies beside the weights. This makes it look for one in a folder
# that no checkpoint has.
NO_ADAPTER = {"subfolder": "no-adapter"}
# Part of a name, between dots -> where such names come from, and what to do. The first that occurs counts.
WRAPPERS = {
    ("base_model", "lora_A", "lora_B", "base_layer", "modules_to_save"): (
        "Such names come from peft: save the result of merge_and_unload()."
    ),
    ("_orig_mod",): "Such names come from torch.compile: save model._orig_mod.",
    ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_flat_param"): (
        "Such names come from FSDP, activation checkpointing or Lightning: save the unwrapped model, as "
        "accelerator.save_model() does."
    ),
    ("module",): "Such names come from DistributedDataParallel: save model.module.",
    ("qweight", "qzeros", "weight_scale", "weight_scale_inv", "weight_packed", "absmax", "quant_map", "SCB"): (
        "Such names come from quantized weights: use the checkpoint that it was quantized from."
    ),
    ("score", "classifier", "v_head", "reward_head", "value_head"): (
        "Such names come from a classifier or reward model: use the language model that it was made from."
    ),
}


def check_checkpoint(folder: Path, config: PreTrainedConfig, source: str | None = None) -> None:
    """Compares a folder's tensors with those that the model needs; reads the headers of its files only.

    transformers itself makes the comparison, on the meta device: it knows which tensors are tied, renamed or ignored.

    Args:
        folder: folder with safetensors.
        config: the checkpoint's config.
        source: what messages call the folder, if not by its path.

    Raises:
        ValueError: naming missing, unexpected, wrongly shaped or quantized tensors, or a file that is missing or
            damaged.
    """
    stored = read_tensors(folder)
    with _quiet():
        model, report = type(empty_model(config)).from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loading_report(report, source or str(folder), config)
    _check_floats(stored, model, source or str(folder))


def check_loading_report(report: Mapping[str, Any], source: str, config: PreTrainedConfig) -> None:
    """Raises ValueError if a model was loaded with anything but its own tensors.

    Args:
        report: what `from_pretrained` returns with `output_loading_info=True`.
        source: where the tensors come from, for the message.
        config: of the model.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = sorted(report["mismatched_keys"])
    different = [f"{name} (is {tuple(found)}, must be {tuple(wanted)})" for name, found, wanted in shapes]
    lists = {"lack": missing, "also hold": unexpected, "have other shapes in": different}
    problems = [f"they {verb} {_some(names)}" for verb, names in lists.items() if names]
    problems += [str(message) for message in report.get("error_msgs", ())]
    if not problems:
        return
    advice = "Use a complete checkpoint, with the config.json that was saved with it."
    parts = {part for name in unexpected for part in name.split(".")}
    if any(0 in found for _, found, _ in shapes):
        advice = (
            "Empty tensors come from DeepSpeed ZeRO-3: save with stage3_gather_16bit_weights_on_model_save, or put the "
            "parts together with zero_to_fp32.py."
        )
    if prefix := _common_prefix(missing, unexpected):
        problems.append(f"the names seem to have the prefix {prefix!r}")
        advice = "Save the model again without the prefix."
        parts = set(prefix.split("."))
    hints = [hint for words, hint in WRAPPERS.items() if parts & set(words)]
    advice = " ".join(hints or [advice])
    if missing and not unexpected and set(missing) <= set(tied_names(config)):
        advice = (
            'If the model has no head of its own because it is tied to the embedding, set "tie_word_embeddings": true '
            f"in config.json. Otherwise: {advice[0].lower()}{advice[1:]}"
        )
    harm = "What does not come from there would be random numbers. " if missing or different else ""
    raise ValueError(
        f"The weights in {source} do not fit the model that its config.json describes: {'; '.join(problems)}. "
        f"{harm}{advice}"
    )


def warn_of_adapter(folder: Path, source: str) -> None:
    """Logs that an adapter beside the weights is not applied, if there is one."""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        warn_once(
            logger,
            f"{source} holds the weights of a whole model and an adapter beside them ({ADAPTER_CONFIG_FILE}). The "
            "weights are used without the adapter. If it is not merged into them yet, merge it with peft's "
            "merge_and_unload() first.",
        )


def _check_floats(stored: Mapping[str, StoredTensor], model: PreTrainedModel, source: str) -> None:
    """Raises ValueError if a weight of the model is stored in a dtype of quantized weights."""
    wanted = set(model.state_dict())
    wanted |= {name.removeprefix(f"{model.base_model_prefix}.") for name in wanted}
    other = sorted(name for name, tensor in stored.items() if name in wanted and tensor.dtype not in FLOAT_DTYPES)
    if other:
        dtypes = ", ".join(sorted({stored[name].dtype for name in other}))
        raise ValueError(
            f"Weights must be one of {', '.join(FLOAT_DTYPES)}, got {dtypes} in {source} for {_some(other)}. Use a "
            "checkpoint that is not quantized."
        )


def _common_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Returns the commonest prefix that turns a missing name into an unexpected one; empty if there is none."""
    wanted, found = set(missing), Counter[str]()
    for name in unexpected:
        parts = name.split(".")
        for index in range(1, len(parts)):
            if ".".join(parts[index:]) in wanted:
                found[".".join(parts[:index]) + "."] += 1
                break
    return found.most_common(1)[0][0] if found else ""


def _some(names: list[str]) -> str:
    """Returns the number of the names and the first few of them as text."""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first_few(names)})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from reporting what the caller raises."""
    verbosity, had_progress_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
