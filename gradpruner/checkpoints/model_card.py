"""README.md of a saved checkpoint: how to use it, which layers were pruned and merged, and with which settings."""

import json
from collections.abc import Mapping
from typing import Any

from gradpruner.checkpoints.card_metadata import Results, card_metadata
from gradpruner.models.origin import Origin
from gradpruner.models.shape import ModelShape, describe_shape
from gradpruner.plan import PruningPlan

LOCAL = "."  # in code that runs in the checkpoint's folder


def model_card(
    plan: PruningPlan,
    base_name: str,
    settings: Mapping[str, Any] | None = None,
    has_probe: bool = False,
    shape: ModelShape | None = None,
    is_stock: bool = True,
    has_adapter: bool = False,
    origin: Origin | None = None,
    results: Results | None = None,
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
        origin: of the dense model.
        results: results of the saved model, if it was evaluated.
    """
    title = f"{base_name} with {len(plan.kept_layers)} of {plan.num_hidden_layers} layers"
    metadata = card_metadata(plan, title, origin or Origin(), results, is_stock)
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
            "`gradpruner.load_checkpoint`."
        )
    if has_adapter:
        loading += (
            " Its weights are those of before fine-tuning;\nthe adapter in `adapter/` belongs to them, see its card."
        )
    return f"""{metadata}
# {title}

Made with `{plan.method}` of the gradpruner project. {loading}

## Use

{usage(LOCAL, is_stock, has_adapter)}
{_results_section(results)}## Layers

| | layers (0-based, of the dense model) |
| --- | --- |
| kept | {", ".join(map(str, plan.kept_layers))} |
| pruned | {", ".join(map(str, plan.pruned_layers)) or "none"} |
| merged | {(merged or "none") + rule} |
{widths}
{files}
{config}"""


def usage(where: str, is_stock: bool, has_adapter: bool) -> str:
    """Returns an example of Python code that loads the checkpoint and generates text, as Markdown.

    Args:
        where: id on the Hub, or `LOCAL` for code that runs in the checkpoint's folder.
        is_stock: see `model_card`.
        has_adapter: see `model_card`.
    """
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    load = f'AutoModelForCausalLM.from_pretrained("{where}")'
    if not is_stock:
        imports = ["import gradpruner", "from transformers import AutoTokenizer"]
        load = f'gradpruner.load_checkpoint("{where}")'
        if where != LOCAL:
            imports.insert(1, "from huggingface_hub import snapshot_download")
            load = f'gradpruner.load_checkpoint(snapshot_download("{where}"))'
    lines = [f"model = {load}"]
    if has_adapter:
        imports.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{where}", subfolder="adapter")')
    code = "\n".join([*sorted(imports), "", *lines])
    return f"""{"In this folder:" if where == LOCAL else "With the files of this repository:"}

```python
{code}
tokenizer = AutoTokenizer.from_pretrained("{where}")
inputs = tokenizer("Question: What do plants need to grow?\\nAnswer:", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
"""


def _results_section(results: Results | None) -> str:
    """Returns the section with the metrics; empty if there are none."""
    rows = results.rows() if results else []
    if results is None or not rows:
        return ""
    table = "".join(f"| {name} | {value:.4f} ± {error:.4f} |\n" for _, name, value, error in rows)
    return f"""## Results

On {results.metrics["num_examples"]} test rows of {results.dataset}, with the standard error over rows:

| metric | value |
| --- | --- |
{table}
"""


def adapter_card(is_stock: bool, where: str | None = None) -> str:
    """Returns the card of the adapter in `adapter/`.

    Args:
        is_stock: whether plain transformers loads the pruned model that it belongs to.
        where: id on the Hub; None: `FOLDER` stands for the checkpoint's folder.
    """
    if where is not None:
        return f"""# LoRA adapter of the pruned model in the folder above

Its layers are those of the pruned model, so it fits no other: not the dense model either.

{usage(where, is_stock, True)}"""
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
