"""README.md of a saved checkpoint: which layers were pruned and merged, and with which settings."""

import json
from collections.abc import Mapping
from typing import Any

from gradpruner.models.shape import ModelShape, describe_shape
from gradpruner.plan import PruningPlan


def model_card(
    plan: PruningPlan,
    base_name: str,
    settings: Mapping[str, Any] | None = None,
    has_probe: bool = False,
    shape: ModelShape | None = None,
    is_stock: bool = True,
    has_adapter: bool = False,
) -> str:
    """Returns the text of the card.

    Args:
        plan: which layers were pruned and merged.
        base_name: name of the dense model.
        settings: JSON-ready settings that the checkpoint was made with, printed in full.
        has_probe: whether `probe.json` is beside the card.
        shape: shape of the model, printed for plans that make layers narrower.
        is_stock: whether plain transformers loads the checkpoint; if not, `shape.json` is beside the card.
        has_adapter: whether the fine-tuned adapter is kept apart, in `adapter/`.
    """
    merged = ", ".join(f"{layer} into {absorber}" for absorber, layers in plan.merges.items() for layer in layers)
    rule = f" ({plan.merge_rule}, density {plan.density})" if merged else ""
    files = "`plan.json` holds the plan with the layer importance behind it."
    if has_probe:
        files += (
            " `probe.json` holds what this model said about a short\ntext when it was saved; "
            "`python -m experiments.verify FOLDER` of the project checks the checkpoint against it."
        )
    config = f"\n## Settings\n\n```json\n{json.dumps(settings, indent=2)}\n```\n" if settings else ""
    sizes = describe_shape(shape) if shape is not None and plan.width is not None else {}
    widths = "".join(f"| {size} | {text} |\n" for size, text in sizes.items())
    loading = "A stock checkpoint for `AutoModelForCausalLM.from_pretrained`."
    if not is_stock:
        loading = (
            "Its layers differ in width, as `shape.json` says, so plain transformers cannot build it. Load it with\n"
            "`gradpruner.load_checkpoint(FOLDER)` of the project."
        )
    if has_adapter:
        loading += (
            " Its weights are those of before fine-tuning;\nthe adapter in `adapter/` belongs to them, see its card."
        )
    return f"""# {base_name} with {len(plan.kept_layers)} of {plan.num_hidden_layers} layers

Made with `{plan.method}` of the gradpruner project. {loading}

| | layers (0-based, of the dense model) |
| --- | --- |
| kept | {", ".join(map(str, plan.kept_layers))} |
| pruned | {", ".join(map(str, plan.pruned_layers)) or "none"} |
| merged | {(merged or "none") + rule} |
{widths}
{files}
{config}"""


def adapter_card(is_stock: bool) -> str:
    """Returns the card of the adapter in `adapter/`.

    Args:
        is_stock: whether plain transformers loads the pruned model that it belongs to.
    """
    base, loader = 'AutoModelForCausalLM.from_pretrained("FOLDER")', "from transformers import AutoModelForCausalLM"
    if not is_stock:
        base, loader = 'gradpruner.load_checkpoint("FOLDER")', "import gradpruner"
    by_name = """
`AutoPeftModelForCausalLM.from_pretrained("FOLDER/adapter")` gives the same. It takes the base that
`adapter_config.json` names, the absolute path that this folder had when it was saved: after moving or uploading the
folder, write the new path or Hub id there.
"""
    return f"""# LoRA adapter of the pruned model in the folder above

Its layers are those of the pruned model, so it fits no other: not the dense model either. Load the two together:

```python
{loader}
from peft import PeftModel

model = PeftModel.from_pretrained({base}, "FOLDER/adapter")
```
{by_name if is_stock else ""}"""
