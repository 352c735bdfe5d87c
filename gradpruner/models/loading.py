"""Checks of a checkpoint: it is not quantized, holds every tensor of its model, and brings no adapter along.

transformers only warns of tensors that are missing or have unknown names, and initializes what is missing at random.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from gradpruner.models.architectures import empty_model
from gradpruner.models.assets import ADAPTER_CONFIG_FILE, adapter_alone, find_weight_files

logger = logging.getLogger(__name__)

# For `from_pretrained`, which applies an adapter that lies beside the weights. This makes it look for one in a folder
# that no checkpoint has.
NO_ADAPTER = {"subfolder": "no-adapter"}
WRAPPERS = {  # part of a prefix -> what puts it before the names of tensors, and how to save without it
    "base_model.": "Such names come from peft: save the result of merge_and_unload().",
    "_orig_mod.": "Such names come from torch.compile: save model._orig_mod.",
    "module.": "Such names come from DistributedDataParallel: save model.module.",
}
NUM_NAMED = 3  # tensors that a message names


def check_not_quantized(config: PreTrainedConfig, source: str) -> None:
    """Raises ValueError if the checkpoint's weights are quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else settings.to_dict()
    bits = next((n for n in (4, 8) if values.get(f"load_in_{n}bit")), values.get("bits", values.get("w_bit")))
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", "unknown")))
    width = f", {bits} bits" if bits else ""
    raise ValueError(
        f"Cannot prune a quantized checkpoint, got {source} with a quantization_config (method {method}{width}): "
        "quantized weights can be neither merged nor fully fine-tuned. Give model.path the checkpoint that it was "
        "quantized from."
    )


def check_checkpoint(source: str | Path, config: PreTrainedConfig) -> None:
    """Compares names and shapes of a folder's tensors with what the model needs; reads the headers of its files only.

    transformers itself makes the comparison, on the meta device: it knows which tensors are tied, renamed or ignored.

    Args:
        source: folder with safetensors; anything else passes.
        config: the checkpoint's config.

    Raises:
        ValueError: naming missing, unexpected or wrongly shaped tensors, or a file that is missing or damaged.
    """
    folder = Path(source)
    files = find_weight_files(folder) if folder.is_dir() else []
    if not files:
        return
    stored = {name: tensor for file in files for name, tensor in _read_header(file).items()}
    with _quiet():
        _, report = type(empty_model(config)).from_pretrained(
            None,
            config=config,
            state_dict=stored,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loading_report(report, str(source))


def check_loading_report(report: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if a model was loaded with anything but its own tensors.

    Args:
        report: what `from_pretrained` returns with `output_loading_info=True`.
        source: where the tensors come from, for the message.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = sorted(report["mismatched_keys"])
    different = [f"{name} (is {tuple(found)}, must be {tuple(wanted)})" for name, found, wanted in shapes]
    lists = {"lack": missing, "also hold": unexpected, "have other shapes in": different}
    problems = [f"they {verb} {_some(names)}" for verb, names in lists.items() if names]
    problems += [str(message) for message in report.get("error_msgs", ())]
    if not problems:
        return
    advice = "Give model.path a complete checkpoint, with the config.json that was saved with it."
    prefix = _common_prefix(missing, unexpected)
    if prefix:
        problems.append(f"the names seem to have the prefix {prefix!r}")
        hints = [hint for part, hint in WRAPPERS.items() if part in prefix]
        advice = " ".join(hints or ["Save the model again without the prefix."])
    harm = "What does not come from there would be random numbers. " if missing or different else ""
    raise ValueError(
        f"The weights in {source} do not fit the model that its config.json describes: {'; '.join(problems)}. "
        f"{harm}{advice}"
    )


def check_not_adapter_alone(source: str, commit: str | None) -> None:
    """Raises ValueError if a Hub model is an adapter without its base model; `assets.resolve` does so for a folder."""
    if commit is None or _has_file(source, commit, "config.json") or not _has_file(source, commit, ADAPTER_CONFIG_FILE):
        return
    raise adapter_alone(source)


def warn_of_adapter(source: str, commit: str | None) -> None:
    """Logs that an adapter beside the weights is not applied, if there is one."""
    if _has_file(source, commit, ADAPTER_CONFIG_FILE):
        logger.warning(
            "%s holds the weights of a whole model and an adapter beside them (%s). The weights are used without the "
            "adapter. If it is not merged into them yet, merge it with peft's merge_and_unload() first.",
            source,
            ADAPTER_CONFIG_FILE,
        )


def _has_file(source: str, commit: str | None, name: str) -> bool:
    """Returns whether a folder or Hub model has a file; what cannot be reached counts as absent."""
    found = cached_file(
        source,
        name,
        revision=commit,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _read_header(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file without their values (meta device)."""
    try:
        with safe_open(file, framework="np") as stream:  # "pt" would reserve memory for the whole file
            shapes = {name: stream.get_slice(name).get_shape() for name in stream.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(
            f"The checkpoint's index names a file that is missing: {file}. Download or save the checkpoint again."
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"{file} must be a safetensors file, got one that is damaged ({error}). "
            "Download or save the checkpoint again."
        ) from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


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
    rest = len(names) - NUM_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:NUM_NAMED])}{more})"


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
