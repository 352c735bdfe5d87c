"""Second half of `make test-transformers4`, with transformers 4: models and tokenizers must be what they are with 5.

    python tests/transformers4/check.py FOLDER

`make_checkpoints.py` wrote FOLDER; this script imports nothing of the project. Prints one line per checkpoint and exits
with 1 if any checkpoint differs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Largest difference of a logit. Most models give 0; transformers 4 computes Gemma 2 with another kernel.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}


def main(folder: Path) -> int:
    """Returns the number of checkpoints that differ."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    logits = load_file(folder / "logits.safetensors")
    tokens = torch.tensor(expected["tokens"])
    lines = []
    for name, entry in expected["checkpoints"].items():
        problems = []
        try:
            problems += _of_tokenizer(folder / entry["folder"], entry, expected["messages"])
            problems += _of_model(folder / entry["folder"], entry, tokens, logits[name])
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        lines.append(f"{'FAILED' if problems else 'ok':8}{name}  {'; '.join(problems)}")
    versions = (transformers.__version__, peft.__version__, torch.__version__)
    print("\ntransformers {}, peft {}, torch {}".format(*versions))
    print("\n".join(lines))
    return sum(line.startswith("FAILED") for line in lines)


def _of_tokenizer(folder: Path, entry: dict[str, Any], messages: list[dict[str, str]]) -> Iterator[str]:
    """Describes what the tokenizer does in another way."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, encoded, decoded in zip(entry["texts"], entry["encoded"], entry["decoded"], strict=True):
        ours = dict(tokenizer(text))
        if ours != encoded:
            yield f"{text!r} becomes {ours}, not {encoded}"
        if tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) != decoded:
            yield f"{encoded['input_ids']} do not become {decoded!r}"
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for what, ours in (
        ("chat", tokenizer.apply_chat_template(messages, tokenize=False)),
        ("special", special),
        ("padding_side", tokenizer.padding_side),
    ):
        if ours != entry[what]:
            yield f"{what} is {ours!r}, not {entry[what]!r}"


@torch.no_grad()
def _of_model(folder: Path, entry: dict[str, Any], tokens: torch.Tensor, logits: torch.Tensor) -> Iterator[str]:
    """Describes what the model, and with an adapter each way to load it, says in another way."""
    settings: dict[str, Any] = {"torch_dtype": "auto"}  # the name that all of transformers 4 knows

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, **settings)

    loaders = {"AutoModel": base}
    if entry["adapter"]:
        loaders = {
            "AutoPeftModel": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", **settings),
            "PeftModel": lambda: peft.PeftModel.from_pretrained(base(), folder / "adapter"),
        }
    for name, load in loaders.items():
        model = load().eval()
        dtype = str(model.dtype).removeprefix("torch.")
        difference = float((model(tokens).logits.float() - logits).abs().max())
        if not difference <= TOLERANCES[dtype]:
            yield f"{name}: logits differ by up to {difference:.2g}"
        prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        output = model.generate(
            **prompt,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cached = output.logits[0]
        difference = float((cached.float() - logits[:, -1]).abs().max())
        if not difference <= TOLERANCES[dtype]:
            yield f"{name}: generate() starts from other logits, by up to {difference:.2g}"


if __name__ == "__main__":
    raise SystemExit(min(1, main(Path(sys.argv[1]))))
