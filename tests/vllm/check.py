"""Second half of `make test-vllm`, in vLLM's environment: vLLM must generate the same greedy tokens as transformers.

    VLLM_CPU_KVCACHE_SPACE=1 python tests/vllm/check.py FOLDER

`make_checkpoints.py` wrote FOLDER; this script imports nothing of the project. Prints one line per checkpoint and exits
with 1 if any checkpoint differs.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(folder: Path) -> int:
    """Returns the number of checkpoints that differ."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    lines = []
    for name, entries in expected.items():
        problem = _first_problem(folder / name, entries)
        num_tokens = sum(len(entry["token_ids"]) for entry in entries)
        details = problem or f"{num_tokens} greedy tokens after {len(entries)} prompts equal those of transformers"
        lines.append(f"{'FAILED' if problem else 'ok':8}{name:16}{details}")
    print(f"\nvLLM {_version()}, torch {metadata.version('torch')}, transformers {metadata.version('transformers')}")
    print("\n".join(lines))
    return sum(line.startswith("FAILED") for line in lines)


def _first_problem(checkpoint: Path, entries: list[dict[str, Any]]) -> str | None:
    """Describes the first difference; returns None if there is none."""
    adapter = checkpoint / "adapter"
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "disable_log_stats": True}
    model = LLM(str(checkpoint), enable_lora=adapter.is_dir(), **settings)
    lora = LoRARequest(adapter.name, 1, str(adapter)) if adapter.is_dir() else None
    length = len(entries[0]["token_ids"])
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    outputs = model.generate([entry["prompt"] for entry in entries], sampling, use_tqdm=False, lora_request=lora)
    for entry, output in zip(entries, outputs, strict=True):
        if list(output.prompt_token_ids) != entry["prompt_token_ids"]:
            return f"the tokenizer splits {entry['prompt']!r} in another way"
        ours, theirs = entry["token_ids"], list(output.outputs[0].token_ids)
        if ours != theirs:
            index = next((i for i in range(min(len(ours), len(theirs))) if ours[i] != theirs[i]), len(theirs))
            return (
                f"after {entry['prompt']!r} {index} of {length} tokens are equal, then {theirs[index:][:4]} instead of "
                f"{ours[index:][:4]} (smallest margin between best and second token {entry['margin']:.4f})"
            )
    return None


def _version() -> str:
    """Returns the version of vLLM; the CPU build has another distribution name."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "?"


if __name__ == "__main__":
    raise SystemExit(min(1, main(Path(sys.argv[1]))))
