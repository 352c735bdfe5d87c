"""Prune a model that is in memory, on rows that are in memory, and save the result.

    python examples/compress_in_memory.py HuggingFaceTB/SmolLM2-135M-Instruct pruned

The first argument is a Hub id or a folder, the second one the folder to write.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import gradpruner

source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)

# Examples of the task; yours may come from a file: [json.loads(line) for line in open("train.jsonl")].
rows = [{"prompt": f"What is {a} plus {b}?\nAnswer:", "answer": str(a + b)} for a in range(10) for b in range(10)]

compressed = gradpruner.compress(model, tokenizer, rows, sparsity=0.4)
print(f"Pruned layers {list(compressed.plan.pruned_layers)} of {compressed.plan.num_hidden_layers}")

gradpruner.save_checkpoint(compressed.model, tokenizer, compressed.plan, target)
print(f"Saved to {target}; plain transformers loads it, and its README.md shows how")
