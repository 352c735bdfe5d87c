"""First half of `make test-transformers4`, in the project's environment: checkpoints, and what is to come out of them.

    python -m tests.transformers4.make_checkpoints FOLDER

Writes FOLDER/<number>/ per checkpoint, FOLDER/expected.json and FOLDER/logits.safetensors for `check.py`.
"""

import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.files import write_json
from gradpruner.models.architectures import lora_targets
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan
from tests.test_architectures import CASES, make_config
from tests.tiny_tokenizers import CHAT_TEMPLATE, TOKENIZERS, VOCABULARY

PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 4), method="test")
TOKENS = torch.arange(5, 29)[None]  # longer than every window and trained length below
TEXTS = ("The café on 3rd Street", "  two spaces, 1987\n\n", "<|user|>Hi</s> there", "Δ你")
MESSAGES = [{"role": "user", "content": "What do plants need?"}]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
# Case of test_architectures, and rotary parameters besides.
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("llama", {"rope_type": "default", "rope_theta": 5e5}),
    "llama3": ("llama-tied", {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    "linear": ("mistral", {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}),
    "dynamic": ("olmo2", {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 4.0}),
    "yarn": ("qwen3", {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn, length as trained": ("qwen2", {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}),
    "part of the head": ("phi3", {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}),
    "longrope": ("phi3-tied", {"rope_type": "longrope", "rope_theta": 2e4, **FACTORS}),
    "two kinds": (
        "gemma3",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    ),
}


def main(folder: Path) -> None:
    """Deletes the folder and makes every checkpoint again."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [(name, case, {}) for name, case in zip(CASES, CASES, strict=True)]
    settings += [(f"{case}, {name}", case, {"rope_parameters": rope}) for name, (case, rope) in ROPES.items()]
    tokenizers = itertools.cycle(TOKENIZERS)
    writers = itertools.cycle(("merged", "adapter", "streamed"))
    expected, logits = {}, {}
    for number, (name, case, changes) in enumerate(settings):
        tokenizer, writer = next(tokenizers), next(writers)
        if case.startswith("qwen2"):  # transformers 5 takes every tokenizer of this type for a Qwen2Tokenizer
            tokenizer = "Qwen2"
        dtype = torch.bfloat16 if number % 5 == 4 else torch.float32
        place, key = folder / str(number), f"{name}; {tokenizer}; {writer}; {str(dtype).removeprefix('torch.')}"
        model = _save(case, changes, tokenizer, writer, dtype, place)
        with torch.no_grad():
            logits[key] = model(TOKENS).logits.float()
        expected[key] = {"folder": place.name, "adapter": writer == "adapter", **_of_tokenizer(place)}
        print(f"{number}: {key}", flush=True)
    write_json(folder / "expected.json", {"tokens": TOKENS.tolist(), "messages": MESSAGES, "checkpoints": expected})
    save_file(logits, folder / "logits.safetensors")


def _save(
    case: str, changes: dict[str, Any], tokenizer_name: str, writer: str, dtype: torch.dtype, folder: Path
) -> PreTrainedModel:
    """Writes a checkpoint; returns the model that it has to give."""
    torch.manual_seed(0)
    if "longrope" in str(changes):
        changes = changes | {"original_max_position_embeddings": 8}
    dense = AutoModelForCausalLM.from_config(make_config(case, vocab_size=VOCABULARY, **changes), dtype=dtype).eval()
    source = folder.with_name(f"{folder.name}-dense")
    dense.save_pretrained(source)
    tokenizer = TOKENIZERS[tokenizer_name]()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(source)
    model = apply_plan(dense, PLAN)
    if writer == "streamed":
        prune_checkpoint(PLAN, None, source, folder)
        return model
    tokenizer = AutoTokenizer.from_pretrained(source)
    if writer == "merged":
        save_checkpoint(model, tokenizer, PLAN, folder, "tiny")
        return model
    config = LoraConfig(r=2, target_modules=lora_targets(model), init_lora_weights=False, task_type="CAUSAL_LM")
    save_checkpoint(get_peft_model(model, config).eval(), tokenizer, PLAN, folder, "tiny")
    tuned: PreTrainedModel = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    return tuned.eval()


def _of_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns what the saved tokenizer does here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [dict(tokenizer(text)) for text in TEXTS]
    return {
        "texts": TEXTS,
        "encoded": encoded,
        "decoded": [tokenizer.decode(entry["input_ids"], skip_special_tokens=True) for entry in encoded],
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "special": dict(tokenizer.special_tokens_map),
        "padding_side": tokenizer.padding_side,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
