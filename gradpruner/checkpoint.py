"""Save a compressed, fine-tuned model so that plain transformers, and whatever builds on it, loads it without us."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpruner.files import write_json, write_text
from gradpruner.model_card import model_card
from gradpruner.plan import PruningPlan
from gradpruner.probe import PROBE_FILE, make_probe

ADAPTER_FOLDER = "adapter"
MAX_SHARD_SIZE = "5GB"  # transformers' default of 50 GB is too much for most file systems and hubs


def save_checkpoint(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    folder: Path,
    base_name: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights, config, tokenizer, plan, probe and a model card to `folder`, whole or not at all.

    Args:
        model: what to save; of a PeftModel the base goes to `folder` and the adapter to `folder/adapter`.
        tokenizer: saved as it is, chat template included.
        plan: what was pruned.
        folder: replaced if it exists.
        base_name: name of the dense model, for the card.
        settings: the config of the run, for the card.

    Raises:
        ValueError: if the model answers with NaN or infinity.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(partial / ADAPTER_FOLDER)
        model = model.unload()
    probe = make_probe(model, tokenizer)
    model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(partial)
    plan.save(partial / "plan.json")
    write_json(partial / PROBE_FILE, probe)
    write_text(partial / "README.md", model_card(plan, base_name, settings, has_probe=True))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
