"""Save a compressed, fine-tuned model so that plain transformers, and tools built on it, load it without this code.

If layers differ in width, no stock config describes the model. Then `shape.json` beside the weights holds the widths,
config.json keeps the dense model's, and only `load_checkpoint` can load the weights: plain transformers refuses them.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from gradpruner.checkpoints.adapter import ADAPTER_FOLDER, save_adapter
from gradpruner.checkpoints.card_metadata import Results
from gradpruner.checkpoints.model_card import adapter_card, model_card
from gradpruner.checkpoints.older_readers import add_older_keys
from gradpruner.checkpoints.probe import PROBE_FILE, make_probe
from gradpruner.files import write_json, write_text
from gradpruner.models.origin import CARD, Origin, find_origin
from gradpruner.models.padding import without_added_padding
from gradpruner.models.shape import ModelShape, config_shape, model_shape, resize_layers
from gradpruner.models.tensor_files import read_tensors
from gradpruner.plan import PruningPlan

SHAPE_FILE = "shape.json"
SHAPE_VERSION = 1
MAX_SHARD_SIZE = "5GB"  # transformers' default of 50 GB is too much for most file systems and hubs


def save_checkpoint(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    folder: str | Path,
    base_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    results: Results | None = None,
) -> None:
    """Writes weights, config, tokenizer, plan, probe and a model card to `folder`, whole or not at all.

    Args:
        model: model to save; of a PeftModel the base goes to `folder` and the adapter to `folder/adapter`.
        tokenizer: saved as its source had it, chat template included and without a padding token that
            `ModelSpec.load_tokenizer` added.
        plan: which layers were pruned and merged.
        folder: replaced if it exists.
        base_name: name of the dense model, for the card; None: the last part of the path that it was loaded from.
        settings: the config of the run, for the card.
        origin: of the dense model, for the card; None: that of the path that it was loaded from.
        results: results of the model, for the card.

    Raises:
        ValueError: if the model answers with NaN or infinity.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    has_adapter = isinstance(model, PeftModel)
    if has_adapter:
        save_adapter(model, tokenizer, partial / ADAPTER_FOLDER, folder)
        model = model.unload()
    if origin is None:
        origin = find_origin(model.name_or_path)
    base_name = base_name or Path(model.name_or_path).name or "A model"
    probe = make_probe(model, tokenizer)
    model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    without_added_padding(tokenizer).save_pretrained(partial)
    add_older_keys(partial)
    plan.save(partial / "plan.json")
    write_json(partial / PROBE_FILE, probe)
    shape = model_shape(model)
    is_stock = shape == config_shape(model.config)
    if not is_stock:
        write_json(partial / SHAPE_FILE, {"version": SHAPE_VERSION, **shape.to_dict()})
    card = model_card(plan, base_name, settings, True, shape, is_stock, has_adapter, origin, results)
    write_text(partial / CARD, card)
    if has_adapter:  # in place of peft's own, an empty form that names the dense model
        write_text(partial / ADAPTER_FOLDER / CARD, adapter_card(is_stock))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def load_checkpoint(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Loads what `save_checkpoint` wrote, whether or not all layers have the same width.

    Args:
        folder: folder with config.json and safetensors.
        dtype: dtype of the weights; `auto` is the saved one.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ValueError: if `shape.json` is damaged, or does not fit the weights.
        OSError: if `folder` holds no checkpoint.
    """
    folder = Path(folder)
    if not (folder / SHAPE_FILE).is_file():
        stock: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        return stock.eval()
    config = AutoConfig.from_pretrained(folder)
    shape = _read_shape(folder, config.num_hidden_layers)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        resize_layers(model, shape)
    model.tie_weights()
    _read_weights(model, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return (model if dtype == "auto" else model.to(dtype)).eval()


def _read_shape(folder: Path, num_layers: int) -> ModelShape:
    try:
        data = json.loads((folder / SHAPE_FILE).read_text(encoding="utf-8"))
        problem = f"it is of version {data['version']}, this release reads {SHAPE_VERSION}"
        if data["version"] == SHAPE_VERSION:
            shape = ModelShape.from_dict(data)
            if len(shape.layers) == num_layers:
                return shape
            problem = f"it names {len(shape.layers)} layers, config.json {num_layers}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f"Cannot read {folder / SHAPE_FILE}: {problem}. Save the checkpoint again with this release.")


@torch.no_grad()
def _read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fills all parameters from the files; tied parameters have one name there."""
    stored = read_tensors(folder)
    wanted = {name: tensor for name, tensor in model.named_parameters() if name in stored}
    missing = sorted({name for name, _ in model.named_parameters()} - set(wanted))
    unknown = sorted(set(stored) - set(wanted))
    different = sorted(name for name, tensor in wanted.items() if stored[name].shape != tuple(tensor.shape))
    for problem, names in (("lack", missing), ("also hold", unknown), ("have other shapes in", different)):
        if names:
            raise ValueError(
                f"The weights in {folder} do not fit its {SHAPE_FILE}: they {problem} {names[0]}"
                + (f" and {len(names) - 1} more. " if names[1:] else ". ")
                + "Save the checkpoint again."
            )
    for name, tensor in wanted.items():
        tensor.copy_(stored[name].read())
