"""Adapters that are saved apart from the pruned model that they belong to."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from test_architectures import make_config
from transformers import AutoModelForCausalLM

import gradpruner
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.models.architectures import lora_targets
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.surgery import apply_plan

PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 4), method="test")
# Heads and MLP channels to keep in the four layers, not equally many in each.
UNEVEN = WidthPlan(((0, 1, 2, 3),) * 3 + ((0, 1),), ((1, 2, 3),) * 4, None)
KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA with ranks that differ": {"rank_pattern": {"layers.2.mlp.down_proj": 5}},
    "LoRA on the attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA beside a trained head": {"modules_to_save": ["lm_head"]},
}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


def adapted(model, **config):
    """Returns the model with a random adapter."""
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": lora_targets(model), "init_lora_weights": False} | config
    tuned = get_peft_model(model, LoraConfig(**config, task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weight)
    return tuned.eval()


@pytest.fixture
def pruned(tmp_path):
    """Returns a factory of pruned models that were loaded from a folder, as all are, whose name peft would save."""

    def make(case, dtype=torch.float32):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(make_config(case)).save_pretrained(tmp_path / "dense")
        return apply_plan(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype), PLAN)

    return make


@pytest.fixture
def save(tiny_tokenizer, tmp_path):
    """Saves a model with adapter; returns the folder and the logits of before."""

    def run(tuned, plan=PLAN, folder=tmp_path / "saved"):
        expected = logits_of(tuned)
        save_checkpoint(tuned, tiny_tokenizer, plan, folder, "tiny")
        return folder, expected

    return run


def base_of(folder):
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("case", "kind", "dtype"),
    [
        *(("llama", kind, torch.float32) for kind in KINDS),
        ("llama-tied", "LoRA", torch.float32),
        ("llama-tied", "DoRA", torch.bfloat16),
        ("qwen2", "LoRA", torch.bfloat16),
        ("gemma2-tied", "LoRA", torch.float32),
        ("phi3", "rsLoRA", torch.float32),
        ("smollm3", "LoRA", torch.float16),
    ],
)
@pytest.mark.bad_input(
    "What is saved", "{kind} on {case}, {dtype}, kept apart", "AutoPeftModelForCausalLM gives the evaluated model"
)
def test_gives_the_evaluated_model(case, kind, dtype, pruned, save, tmp_path, monkeypatch):
    folder, expected = save(adapted(pruned(case, dtype), **KINDS[kind]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert base.dtype == dtype and base.config.num_hidden_layers == 4
    assert not torch.equal(logits_of(base), expected)
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), expected)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder / "adapter")), expected)


def test_no_file_names_the_dense_model(pruned, save, tmp_path):
    tuned = adapted(pruned("llama"))
    tuned.peft_config["default"].revision = "0123abc"  # a commit of the dense model
    folder, _ = save(tuned)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(folder), None)
    texts = [file for file in folder.rglob("*") if file.suffix in (".json", ".md", ".jinja")]
    assert len(texts) > 8
    assert not [file for file in texts if str(tmp_path / "dense") in file.read_text()]
    assert tuned.peft_config["default"].base_model_name_or_path == str(tmp_path / "dense")  # nothing changed in memory


@pytest.mark.bad_input("What is saved", "an adapter, saved in a relative folder", "the base's absolute path")
def test_saved_in_a_relative_folder(pruned, tiny_tokenizer, tmp_path, monkeypatch):
    tuned = adapted(pruned("llama"))
    expected = logits_of(tuned)
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tuned, tiny_tokenizer, PLAN, (tmp_path / "saved").relative_to(tmp_path), "tiny")
    monkeypatch.chdir(tmp_path / "dense")
    assert base_of(tmp_path / "saved") == str(tmp_path / "saved")
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved/adapter")), expected)


@pytest.mark.bad_input(
    "What is saved", "a checkpoint with adapter, moved", "base and adapter load together; peft alone refuses"
)
def test_moved(pruned, save, tmp_path):
    folder, expected = save(adapted(pruned("llama")))
    moved = shutil.move(folder, tmp_path / "moved")
    base = AutoModelForCausalLM.from_pretrained(moved)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, moved / "adapter")), expected)
    at_once = AutoModelForCausalLM.from_pretrained(moved, adapter_kwargs={"subfolder": "adapter"})
    assert torch.equal(logits_of(at_once), expected)
    with pytest.raises(OSError, match=str(folder)):
        AutoPeftModelForCausalLM.from_pretrained(moved / "adapter")


@pytest.mark.bad_input(
    "What is saved", "an adapter on layers that differ in width", "gradpruner.load_checkpoint and peft load it"
)
def test_on_layers_that_differ_in_width(pruned, save):
    plan = PruningPlan(num_hidden_layers=4, method="test", width=UNEVEN)
    folder, expected = save(adapted(apply_plan(pruned("llama"), plan)), plan)
    assert (folder / "shape.json").is_file() and base_of(folder) == str(folder)
    tuned = PeftModel.from_pretrained(gradpruner.load_checkpoint(folder), folder / "adapter")
    assert torch.equal(logits_of(tuned), expected)
    card = (folder / "adapter" / "README.md").read_text()
    assert (
        'PeftModel.from_pretrained(gradpruner.load_checkpoint("FOLDER"), "FOLDER/adapter")' in card
        and "Auto" not in card
    )


def test_cards_say_how_to_load(pruned, save):
    folder, _ = save(adapted(pruned("llama")))
    card = (folder / "adapter" / "README.md").read_text()
    assert (
        'AutoPeftModelForCausalLM.from_pretrained("FOLDER/adapter")' in card
        and "gradpruner.load_checkpoint" not in card
    )
    assert "before fine-tuning" in (folder / "README.md").read_text()
