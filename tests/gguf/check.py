"""`make test-gguf`: pruned checkpoints become GGUF files with the same weights, and llama.cpp gives the same tokens.

    python -m tests.gguf.check ARCHIVE FOLDER

ARCHIVE is the source archive of llama-cpp-python. FOLDER is made again, with the checkpoints and their GGUF files. Runs
examples/convert_to_gguf.py, then reads the files with the packages gguf and llama-cpp-python.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import AutoModelForCausalLM

from gradpruner.models.spec import ModelSpec
from tests.vllm.make_checkpoints import ASSETS, NUM_NEW_TOKENS, SMOLLM2_PRUNED, TINY, expected_answers, save_pruned

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "convert_to_gguf.py"
SMOLLM2 = ModelSpec("packaged:smollm2-135m", dtype="float32")
# The converter knows tokenizers by what they give, so that the random models need one that it knows: SmolLM2's.
RANDOM = TINY | {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CASES = {
    "smollm2-135m": (SMOLLM2, SMOLLM2_PRUNED, (), "llama", 18),
    "tiny-llama": (ModelSpec("random:llama", dtype="float32", config=RANDOM), (1, 4), (4,), "llama", 4),
    "tiny-qwen3": (ModelSpec("random:qwen3", dtype="float32", config=RANDOM), (1, 4), (4,), "qwen3", 4),
}


def main(archive: Path, folder: Path) -> None:
    """Checks every case; raises AssertionError at the first difference."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (spec, pruned, merged, architecture, num_layers) in CASES.items():
        checkpoint, file = folder / name, folder / f"{name}.gguf"
        save_pruned(spec, pruned, merged, checkpoint)
        SMOLLM2.load_tokenizer(ASSETS).save_pretrained(checkpoint)
        subprocess.run([sys.executable, EXAMPLE, checkpoint, file, archive], check=True, stderr=subprocess.DEVNULL)
        reader = GGUFReader(file)
        assert reader.get_field("general.architecture").contents() == architecture
        assert reader.get_field(f"{architecture}.block_count").contents() == num_layers
        check_weights(reader, checkpoint, num_layers)
        check_tokens(file, checkpoint, name)


def check_weights(reader: GGUFReader, checkpoint: Path, num_layers: int) -> None:
    """Checks layer by layer that the weights are those of the checkpoint; Llama's q and k are permuted in GGUF."""
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = AutoModelForCausalLM.from_pretrained(checkpoint).get_decoder().layers
    assert {name.split(".")[1] for name in stored if name.startswith("blk.")} == set(map(str, range(num_layers)))
    for index, layer in enumerate(layers):
        pairs = {
            "ffn_down": layer.mlp.down_proj,
            "ffn_up": layer.mlp.up_proj,
            "attn_v": layer.self_attn.v_proj,
            "attn_output": layer.self_attn.o_proj,
        }
        for name, linear in pairs.items():
            assert np.array_equal(stored[f"blk.{index}.{name}.weight"], linear.weight.detach().numpy()), (index, name)


def check_tokens(file: Path, checkpoint: Path, name: str) -> None:
    """Checks that llama.cpp continues every prompt with the tokens that transformers gives."""
    llama = Llama(str(file), n_ctx=512, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    entries = expected_answers(checkpoint)
    for entry in entries:
        llama.reset()
        generated = llama.generate(entry["prompt_token_ids"], temp=0.0)
        token_ids = [next(generated) for _ in range(NUM_NEW_TOKENS)]
        assert token_ids == entry["token_ids"], (name, entry["prompt"], token_ids, entry["token_ids"], entry["margin"])
    least = min(entry["margin"] for entry in entries)
    num_tokens = len(entries) * NUM_NEW_TOKENS
    print(f"{name}: weights and {num_tokens} greedy tokens equal (smallest margin {least:.4f})", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
