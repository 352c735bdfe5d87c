"""Quantise a pruned model to 8-bit weights with torchao, save it, and compare sizes and answers.

    pip install torchao
    python examples/quantise.py pruned pruned-int8

The first argument is a saved checkpoint, the second one the folder to write. Quantise last: quantised weights cannot be
pruned.
"""

import sys
from pathlib import Path

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
model.save_pretrained(target)
tokenizer.save_pretrained(target)

inputs = tokenizer("What is 3 plus 4?\nAnswer:", return_tensors="pt")
for folder in (source, target):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    megabytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
    print(f"{folder}: {megabytes:.1f} MB, answers {answer!r}")
