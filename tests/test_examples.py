"""The scripts in `examples/` run as printed, on a tiny model.

`make test-trl` and `make test-gguf` run the two that need other packages.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIG = {"num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def run(name, *arguments):
    """Runs a script in this process, because importing torch again takes longer than the script."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Returns the folder that compress_in_memory.py writes."""
    folder = tmp_path_factory.mktemp("examples")
    run("compress_in_memory.py", ModelSpec("random:llama", config=CONFIG).source(folder), folder / "pruned")
    return folder / "pruned"


def test_compress_in_memory(pruned):
    plan = PruningPlan.load(pruned / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert len(plan.pruned_layers) == 2 and model.config.num_hidden_layers == 3
    assert "from_pretrained" in (pruned / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_continue_with_peft(pruned, tmp_path):
    trainer = run("continue_with_peft.py", pruned, tmp_path / "tuned")["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pruned, tmp_path / "tuned"))
    assert after.config.num_hidden_layers == 3
    assert not torch.equal(before.model.layers[2].mlp.down_proj.weight, after.model.layers[2].mlp.down_proj.weight)


def test_quantise(pruned, tmp_path, capsys):
    run("quantise.py", pruned, tmp_path / "int8")
    sizes = [float(number) for number in re.findall(r": ([\d.]+) MB", capsys.readouterr().out)]
    assert len(sizes) == 2 and sizes[1] < sizes[0]
    stored = (tmp_path / "int8" / "config.json").read_text()
    assert "Int8WeightOnlyConfig" in stored


def test_the_readme_lists_every_example():
    listed = re.findall(r"^\| \[`?([\w.]+)`?\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(text == link for text, link in listed)
    assert {link for _, link in listed} == {file.name for file in EXAMPLES.iterdir() if file.is_file()} - {"README.md"}


@pytest.mark.parametrize("name", [file.name for file in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_says_how_to_run_it(name):
    text = (EXAMPLES / name).read_text()
    [command] = re.findall(rf"^    python examples/{name}(.*)$", text, re.MULTILINE)
    [names] = re.findall(r"^(.*) = sys\.argv\[1:\]$", text, re.MULTILINE)
    assert len(command.split()) == len(names.split(","))
