"""`make test-trl`: TRL fine-tunes a pruned model by examples/continue_with_trl.py, and the loss falls.

python -m tests.trl.check
"""

import json
import runpy
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "continue_with_trl.py"
CONFIG = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
PLAN = PruningPlan(num_hidden_layers=4, pruned_layers=(2,), method="test")


def main(folder: Path) -> None:
    """Runs the example on a tiny model; raises AssertionError if it did not train."""
    spec, source, target = ModelSpec("random:llama", config=CONFIG), folder / "pruned", folder / "tuned"
    model = apply_plan(spec.load(folder / "assets"), PLAN)
    save_checkpoint(model, spec.load_tokenizer(folder / "assets"), PLAN, source)
    sys.argv = [str(EXAMPLE), str(source), str(target)]
    trainer = runpy.run_path(str(EXAMPLE))["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], losses
    tuned = AutoModelForCausalLM.from_pretrained(target)
    assert tuned.config.num_hidden_layers == len(tuned.model.layers) == 3
    before = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(before.model.layers[2].mlp.down_proj.weight, tuned.model.layers[2].mlp.down_proj.weight)
    print(f"TRL {metadata.version('trl')}: loss {json.dumps(losses)}; 3 layers, changed and saved")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
