"""Save a compressed, fine-tuned model so that plain transformers, and whatever builds on it, loads it without us."""

import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpruner.files import write_json, write_text
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
) -> None:
    """Writes weights, config, tokenizer, plan, probe and a model card to `folder`, whole or not at all.

    Args:
        model: what to save; of a PeftModel the base goes to `folder` and the adapter to `folder/adapter`.
        tokenizer: saved as it is, chat template included.
        plan: what was pruned.
        folder: replaced if it exists.
        base_name: name of the dense model, for the card.

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
    write_text(partial / "README.md", _model_card(plan, base_name))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _model_card(plan: PruningPlan, base_name: str) -> str:
    merged = ", ".join(
        f"{layer} into {absorber}" for layer, absorber in sorted(plan.absorbed_by.items()) if absorber is not None
    )
    rule = f" ({plan.merge_rule}, density {plan.density})" if merged and plan.merge_rule != "none" else ""
    return f"""# {base_name} with {len(plan.kept_layers)} of {plan.num_hidden_layers} layers

Made with `{plan.method}` of the gradpruner project. A stock checkpoint for `AutoModelForCausalLM.from_pretrained`.

| | layers (0-based, of the dense model) |
| --- | --- |
| kept | {", ".join(map(str, plan.kept_layers))} |
| pruned | {", ".join(map(str, plan.pruned_layers)) or "none"} |
| merged | {(merged or "none") + rule} |

`plan.json` holds the plan with the layer importance behind it. `probe.json` holds what this model said about a short
text when it was saved; `python -m experiments.verify FOLDER` of the project checks the checkpoint against it.
"""
