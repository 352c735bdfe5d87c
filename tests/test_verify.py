"""Tests of `experiments.verify`, good checkpoints and each kind of damage, and of `gradpruner.checkpoints.probe`."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from experiments import verify
from experiments.config import CONF
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.probe import TEXT, make_probe
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan

PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 4), method="test")
FRESH = "plain transformers"


@pytest.fixture(scope="module")
def good(tiny_spec, tiny_tokenizer, assets_dir, tmp_path_factory):
    """A checkpoint with four of six layers."""
    folder = tmp_path_factory.mktemp("verify") / "checkpoint"
    model = apply_plan(tiny_spec.load(assets_dir), PLAN)
    save_checkpoint(model, tiny_tokenizer, PLAN, folder, "tiny")
    return folder


@pytest.fixture
def checkpoint(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "checkpoint")


@pytest.fixture
def verify_here(monkeypatch):
    """Returns `verify` without the fresh process, for speed; it gives checks by name."""

    def run(folder):
        def in_this_process(folder, probe):
            return [check for check in verify._fresh_checks(str(folder), probe, TEXT, 16) if check.name != FRESH]

        monkeypatch.setattr(verify, "_in_fresh_process", in_this_process)
        checks = verify.verify(folder)
        names = [check.name for check in checks]
        assert len(set(names)) == len(names)
        return {check.name: check for check in checks}

    return run


def failed(checks):
    return {name for name, check in checks.items() if check.ok is False}


def change_weights(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def main(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["verify", str(folder)])
    with pytest.raises(SystemExit) as end:
        verify.main()
    return end.value.code


# The command, fresh process included


def test_a_good_checkpoint_passes(good, monkeypatch, capsys):
    assert main(monkeypatch, good) == 0
    output = capsys.readouterr().out
    for text in (
        "num_hidden_layers is 4, the plan keeps 4 of 6",
        "without gradpruner and peft",
        "tolerance 0.001 (float32)",
        "16 tokens as recorded",
        "16 tokens as without key-value cache",
        "The checkpoint is good.",
    ):
        assert text in output
    assert "NO" not in output


def test_damage_exits_with_1_and_is_named(checkpoint, monkeypatch, capsys):
    change_weights(checkpoint, "model.layers.2.mlp.down_proj.weight", lambda weight: weight[3].neg_())
    assert main(monkeypatch, checkpoint) == 1
    output = capsys.readouterr().out
    assert "Failed: logits" in output and "position" in output


def test_the_fresh_process_never_imports_this_project(good):
    request = {"folder": str(good), "probe": None, "text": TEXT, "num_new_tokens": 2}
    python, *rest = verify.fresh_command()
    done = subprocess.run(
        [python, "-X", "importtime", *rest],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=CONF.parent,  # where `import experiments` would work without -I
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert {"torch", "transformers"} <= imported
    assert not {name for name in imported if name.split(".")[0] in verify.BLOCKED}
    assert {check["name"]: check["ok"] for check in json.loads(done.stdout)}[FRESH]


def test_a_fresh_process_that_dies_is_a_failed_check(checkpoint, monkeypatch):
    monkeypatch.setattr(verify, "fresh_command", lambda: [sys.executable, "-c", "raise SystemExit('out of memory')"])
    last = verify.verify(checkpoint)[-1]
    assert last == verify.Check("fresh process", False, "ended with code 1: out of memory")


def test_errors_are_one_readable_line(good, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.verify", str(tmp_path / "nowhere")],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"Error: No folder {tmp_path}/nowhere.") and done.stderr.count("\n") == 1


def test_what_is_no_checkpoint(good, tmp_path):
    with pytest.raises(verify.CheckpointError, match=r"it has no config\.json\. Did you mean .*/checkpoint\?"):
        verify.verify(good.parent)
    with pytest.raises(verify.CheckpointError, match=r"it has no config\.json\. Give a folder written by"):
        verify.verify(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(verify.CheckpointError, match=r"config\.json is damaged: .*\. Save it again"):
        verify.verify(tmp_path)


# Kinds of damage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_good_in_every_dtype(dtype, tiny_llama, tiny_tokenizer, tmp_path, verify_here):
    # Weights so large that the first new token is not a tie, which other processors may break differently.
    model = apply_plan(tiny_llama(dtype=dtype, seed=3, initializer_range=0.3), PLAN)
    save_checkpoint(model, tiny_tokenizer, PLAN, tmp_path / "checkpoint", "tiny")
    checks = verify_here(tmp_path / "checkpoint")
    assert [check for check in checks.values() if not check.ok] == []
    name = str(dtype).removeprefix("torch.")
    assert checks["logits"].details.endswith(f"tolerance {verify.TOLERANCES[name]:g} ({name})")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_flipped_weight(checkpoint, verify_here, name):
    def flip(weight):
        weight.view(-1)[weight.abs().argmax()] *= -1

    change_weights(checkpoint, name, flip)
    checks = verify_here(checkpoint)
    assert "logits" in failed(checks) <= {"logits", "generate"}
    assert "of 64 log-probabilities, tolerance 0.001 (float32), at position" in checks["logits"].details


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(checkpoint, verify_here, value):
    change_weights(checkpoint, "model.layers.3.mlp.up_proj.weight", lambda weight: weight[1, 1:3].fill_(value))
    checks = verify_here(checkpoint)
    assert {"finite", "logits"} <= failed(checks)
    assert checks["finite"].details == "2 NaN or infinite of 1536 in model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(("depth", "kind"), [(3, "unexpected"), (5, "missing")])
def test_wrong_depth(checkpoint, verify_here, depth, kind):
    change_json(checkpoint / "config.json", num_hidden_layers=depth)
    checks = verify_here(checkpoint)
    assert {"depth", "load", "logits"} <= failed(checks)
    assert checks["depth"].details == f"num_hidden_layers is {depth}, the plan keeps 4 of 6"
    assert f"9 {kind}, model.layers.{min(depth, 4)}." in checks["load"].details


def test_per_layer_list_of_the_dense_model(checkpoint, verify_here):
    change_json(checkpoint / "config.json", layer_types=["full_attention"] * 6)
    checks = verify_here(checkpoint)
    assert "per-layer lists" in failed(checks)
    assert checks["per-layer lists"].details == "layer_types has 6 entries, for 4 layers"


def test_changed_tokenizer(checkpoint, verify_here):
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    checks = verify_here(checkpoint)
    assert failed(checks) == {"token ids"}  # the model gets the recorded ids
    assert checks["token ids"].details == "108 tokens, 108 recorded, different from number 5 on"


def test_tokenizer_that_loses_text(checkpoint, verify_here):
    change_json(checkpoint / "tokenizer.json", decoder=None)
    checks = verify_here(checkpoint)
    assert failed(checks) == {"round trip"}
    assert checks["round trip"].details.startswith("became 'T h e")


def test_missing_tokenizer(checkpoint, verify_here):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    assert failed(verify_here(checkpoint)) == {"tokenizer"}


def test_missing_probe_leaves_the_other_checks(checkpoint, verify_here):
    (checkpoint / "probe.json").unlink()
    checks = verify_here(checkpoint)
    assert failed(checks) == set()
    assert checks["probe"].ok is None and checks["probe"].details.startswith("no probe.json")
    assert {"depth", "finite", "load", "round trip", "generate", "cache"} <= checks.keys()
    assert not {"logits", "token ids"} & checks.keys()


@pytest.mark.parametrize(
    ("text", "details"),
    [
        ("{", "probe.json cannot be read: JSONDecodeError"),
        ("[]", "probe.json cannot be read: TypeError"),
        ('{"version": 9}', "probe.json is of version 9, not 1"),
        ('{"version": 1}', "probe.json cannot be read: KeyError"),
        ('{"version": 1, "dtype": "", "token_ids": [], "positions": []}', "lacks continuation, decoded, margins"),
    ],
)
def test_damaged_probe(checkpoint, verify_here, text, details):
    (checkpoint / "probe.json").write_text(text)
    checks = verify_here(checkpoint)
    assert failed(checks) == {"probe"}
    assert details in checks["probe"].details


def test_plan_missing_or_damaged(checkpoint, verify_here):
    change_json(checkpoint / "plan.json", pruned_layers=[4, 1])
    checks = verify_here(checkpoint)
    assert failed(checks) == {"depth"} and "plan.json cannot be read: pruned_layers" in checks["depth"].details
    (checkpoint / "plan.json").unlink()
    assert verify_here(checkpoint)["depth"].ok is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "adapter/adapter_model.bin", "rng.pt"])
def test_pickle_beside(checkpoint, verify_here, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    checks = verify_here(checkpoint)
    assert failed(checks) == {"weight files"}
    assert checks["weight files"].details == f"pickle files, which can run code when loaded: {name}"


def test_missing_and_truncated_weights(checkpoint, verify_here):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert failed(verify_here(checkpoint)) == {"finite", "load"}
    weights.unlink()
    checks = verify_here(checkpoint)
    assert failed(checks) == {"weight files", "load"} and checks["finite"].ok is None
    assert checks["weight files"].details == "no *.safetensors"


def test_missing_shard(checkpoint, verify_here):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    checks = verify_here(checkpoint)
    assert checks["weight files"].details == "shards named in the index but missing: model-2.safetensors"
    index.write_text("{}")
    assert verify_here(checkpoint)["weight files"].details == "KeyError: 'weight_map'"


def test_generation_that_goes_wrong_with_the_cache_alone(tiny_llama):
    model = tiny_llama()
    model.get_decoder().layers[2].self_attn.layer_idx = 1  # two layers share one entry of the cache
    checks = {check.name: check for check in verify._model_checks(model, list(range(2, 40)), None, 16)}
    assert failed(checks) == {"cache"} and "but then" in checks["cache"].details


def test_a_tie_may_be_broken_in_another_way():
    assert verify._same_tokens([1, 2, 3], [1, 2, 3], [1.0] * 3, 0.1) == (True, "3 tokens")
    assert verify._same_tokens([1, 9, 8], [1, 2, 3], [1.0, 0.05, 1.0], 0.1)[0]
    assert verify._same_tokens([9, 8], [1, 2], [0.05, 1.0], 0.1)[0] is None  # nothing was compared
    same, details = verify._same_tokens([1, 9, 8], [1, 2, 3], [1.0, 0.5, 0.0], 0.1)
    assert not same and details == "1 tokens, but then [9] instead of [2], not"
    assert not verify._same_tokens([1], [1, 2], [1.0, 1.0], 0.1)[0]


def test_adapter_is_mentioned_and_the_probe_is_of_the_base(tiny_llama, tiny_tokenizer, tmp_path, verify_here):
    base = apply_plan(tiny_llama(), PLAN)
    expected = make_probe(base, tiny_tokenizer)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path / "checkpoint"
    save_checkpoint(get_peft_model(base, config), tiny_tokenizer, PLAN, folder, "tiny")
    assert json.loads((folder / "probe.json").read_text())["continuation"] == expected["continuation"]
    checks = verify_here(folder)
    assert failed(checks) == set()
    assert checks["adapter"].ok is None and "not loaded" in checks["adapter"].details


# The probe


def test_probe_says_what_the_model_says(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, eos_token_id=list(range(258)))
    probe = make_probe(model, tiny_tokenizer)
    assert probe["token_ids"] == tiny_tokenizer(TEXT).input_ids and probe["decoded"] == probe["text"] == TEXT
    prompt = torch.tensor([probe["token_ids"]])
    with torch.no_grad():
        log_probabilities = model(prompt).logits[0].log_softmax(-1)
    positions = [entry["position"] for entry in probe["positions"]]
    assert len(set(positions)) == 8 and positions[0] == 0 and positions[-1] == len(probe["token_ids"]) - 1
    for entry in probe["positions"]:
        best = log_probabilities[entry["position"]].sort(descending=True)
        assert [token for token, _ in entry["top"]] == best.indices[:8].tolist()
        assert [value for _, value in entry["top"]] == pytest.approx(best.values[:8].tolist())
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=16)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert generated[0, prompt.shape[1] :].tolist() == probe["continuation"]
    best = log_probabilities[-1].sort(descending=True).values
    assert probe["margins"][0] == pytest.approx(float(best[0] - best[1]), abs=1e-5) and len(probe["margins"]) == 16
    assert json.loads(json.dumps(probe))["dtype"] == "float32"


def test_probe_leaves_the_model_as_it_is(tiny_llama, tiny_tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    assert make_probe(model, tiny_tokenizer) == make_probe(model, tiny_tokenizer)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_answers_nan_is_not_saved(tiny_llama, tiny_tokenizer, tmp_path):
    model = tiny_llama(num_hidden_layers=6)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"answers with NaN or infinity.*lower learning rate"):
        save_checkpoint(model, tiny_tokenizer, PLAN, tmp_path / "checkpoint", "tiny")
    assert not (tmp_path / "checkpoint").exists()
