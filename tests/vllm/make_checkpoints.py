"""First half of `make test-vllm`, in the project's environment: pruned checkpoints and transformers' output.

    python tests/vllm/make_checkpoints.py FOLDER

Writes FOLDER/<name>/ per checkpoint and FOLDER/expected.json for `check.py`.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gradpruner.checkpoints.adapter import ADAPTER_FOLDER
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.files import write_json
from gradpruner.models.architectures import lora_targets
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan, preceding_kept_layer
from gradpruner.surgery import apply_plan

ASSETS = Path(__file__).resolve().parents[2] / ".cache" / "assets"
NUM_NEW_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Question: What do plants need to grow?\nAnswer:",
    "def fibonacci(n):\n    ",
)
# vLLM's CPU attention refuses head sizes 8, 16 and 24. With the usual weights of 0.02, the best token of a random model
# leads by as little as 0.0007 (log-probability), and two libraries may disagree on it; larger weights widen the lead.
TINY: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# Not only the last layers: errors in renumbering or sliced lists only show when a layer after a gap moves up.
SMOLLM2_PRUNED = (4, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27)
# A base for the rotary angles that is not the default, as of Llama 3.
LLAMA3 = TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
CASES = {
    "tiny-llama": (ModelSpec("random:llama", dtype="float32", config=LLAMA3), (1, 4), (4,)),
    "tiny-llama-lora": (ModelSpec("random:llama", dtype="float32", config=LLAMA3), (1, 4), (4,)),
    "tiny-qwen3": (ModelSpec("random:qwen3", dtype="float32", config=TINY), (1, 4), (4,)),
    "smollm2-135m": (ModelSpec("packaged:smollm2-135m", dtype="float32"), SMOLLM2_PRUNED, ()),
}


def main(folder: Path) -> None:
    """Deletes the folder and makes every checkpoint again."""
    shutil.rmtree(folder, ignore_errors=True)
    expected = {}
    for name, (spec, pruned, merged) in CASES.items():
        save_pruned(spec, pruned, merged, folder / name)
        expected[name] = expected_answers(folder / name)
        least = min(entry["margin"] for entry in expected[name])
        print(f"{name}: made, smallest margin between best and second token {least:.4f}", flush=True)
    write_json(folder / "expected.json", expected)


def save_pruned(spec: ModelSpec, pruned: tuple[int, ...], merged: tuple[int, ...], folder: Path) -> None:
    """Saves the pruned model to `folder`, with an adapter if the folder's name says so."""
    model = AutoModelForCausalLM.from_pretrained(spec.source(ASSETS), dtype=torch.float32).eval()
    plan = PruningPlan(
        num_hidden_layers=model.config.num_hidden_layers,
        pruned_layers=pruned,
        absorbed_by={layer: preceding_kept_layer(layer, pruned) for layer in merged},
        merge_rule="sign_average" if merged else "none",
        density=0.5,
        method="test",
    )

    def igia(layer: int, name: str) -> torch.Tensor:
        return model.get_decoder().layers[layer].get_submodule(name).weight.abs()

    model = apply_plan(model, plan, igia)
    if folder.name.endswith("-lora"):
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=lora_targets(model), init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config).eval()
    save_checkpoint(model, spec.load_tokenizer(ASSETS), plan, folder, spec.name)


@torch.no_grad()
def expected_answers(folder: Path) -> list[dict[str, Any]]:
    """Returns transformers' greedy continuation of every prompt, computed from the saved files."""
    if (folder / ADAPTER_FOLDER).is_dir():
        model = AutoPeftModelForCausalLM.from_pretrained(folder / ADAPTER_FOLDER, dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
    entries = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        start = encoded["input_ids"].shape[1]
        generated = model.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        best = model(generated).logits[0, start - 1 : -1].log_softmax(-1).topk(2).values
        entries.append(
            {
                "prompt": prompt,
                "prompt_token_ids": encoded["input_ids"][0].tolist(),
                "token_ids": generated[0, start:].tolist(),
                "margin": float((best[:, 0] - best[:, 1]).min()),
            }
        )
    return entries


if __name__ == "__main__":
    main(Path(sys.argv[1]))
