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

from experiments import verify, verify_fresh
from experiments.config import CONF
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.probe import TEXT, make_probe
from gradpruner.plan import PruningPlan, WidthPlan
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
        def in_this_process(folder, probe, adapter_probe):
            checks = verify_fresh.checks_of_model(str(folder), probe, TEXT, 16, adapter_probe)
            return [check for check in checks if check.name != FRESH]

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
    assert not {name for name in imported if name.split(".")[0] in verify_fresh.BLOCKED}
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
    assert checks["logits"].details.endswith(f"tolerance {verify_fresh.TOLERANCES[name]:g} ({name})")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.bad_input("What is saved", "a checkpoint with an entry of {name} negated", "verify fails: logits")
def test_flipped_weight(checkpoint, verify_here, name):
    def flip(weight):
        weight.view(-1)[weight.abs().argmax()] *= -1

    change_weights(checkpoint, name, flip)
    checks = verify_here(checkpoint)
    assert "logits" in failed(checks) <= {"logits", "generate"}
    assert "of 64 log-probabilities, tolerance 0.001 (float32), at position" in checks["logits"].details


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.bad_input("What is saved", "a checkpoint with {value} in a weight", "verify fails and names the tensor")
def test_weight_that_is_not_finite(checkpoint, verify_here, value):
    change_weights(checkpoint, "model.layers.3.mlp.up_proj.weight", lambda weight: weight[1, 1:3].fill_(value))
    checks = verify_here(checkpoint)
    assert {"finite", "logits"} <= failed(checks)
    assert checks["finite"].details == "2 NaN or infinite of 1536 in model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(("depth", "kind"), [(3, "unexpected"), (5, "missing")])
@pytest.mark.bad_input(
    "What is saved", "a config of {depth} layers beside weights of 4", "verify fails: depth, {kind} tensors"
)
def test_wrong_depth(checkpoint, verify_here, depth, kind):
    change_json(checkpoint / "config.json", num_hidden_layers=depth)
    checks = verify_here(checkpoint)
    assert {"depth", "load", "logits"} <= failed(checks)
    assert checks["depth"].details == f"num_hidden_layers is {depth}, the plan keeps 4 of 6"
    assert f"9 {kind}, model.layers.{min(depth, 4)}." in checks["load"].details


@pytest.mark.bad_input(
    "What is saved",
    "a config with a list of layers of the dense model",
    "verify fails: layer_types has 6 entries, for 4 layers",
)
def test_per_layer_list_of_the_dense_model(checkpoint, verify_here):
    change_json(checkpoint / "config.json", layer_types=["full_attention"] * 6)
    checks = verify_here(checkpoint)
    assert "per-layer lists" in failed(checks)
    assert checks["per-layer lists"].details == "layer_types has 6 entries, for 4 layers"


@pytest.mark.bad_input(
    "What is saved", "a checkpoint with another vocabulary", "verify fails: token ids differ from number 5 on"
)
def test_changed_tokenizer(checkpoint, verify_here):
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    checks = verify_here(checkpoint)
    assert failed(checks) == {"token ids"}  # the model gets the recorded ids
    assert checks["token ids"].details == "108 tokens, 108 recorded, different from number 5 on"


@pytest.mark.bad_input("What is saved", "a tokenizer without decoder", "verify fails: round trip")
def test_tokenizer_that_loses_text(checkpoint, verify_here):
    change_json(checkpoint / "tokenizer.json", decoder=None)
    checks = verify_here(checkpoint)
    assert failed(checks) == {"round trip"}
    assert checks["round trip"].details.startswith("became 'T h e")


@pytest.mark.bad_input("What is saved", "a checkpoint without tokenizer", "verify fails: tokenizer")
def test_missing_tokenizer(checkpoint, verify_here):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    assert failed(verify_here(checkpoint)) == {"tokenizer"}


@pytest.mark.bad_input("What is saved", "a checkpoint without probe.json", "verify makes the other checks")
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
@pytest.mark.bad_input("What is saved", "a probe.json with {text}", "verify fails: {details}")
def test_damaged_probe(checkpoint, verify_here, text, details):
    (checkpoint / "probe.json").write_text(text)
    checks = verify_here(checkpoint)
    assert failed(checks) == {"probe"}
    assert details in checks["probe"].details


@pytest.mark.bad_input("What is saved", "a plan.json that is damaged", "verify fails: plan.json cannot be read")
def test_plan_missing_or_damaged(checkpoint, verify_here):
    change_json(checkpoint / "plan.json", pruned_layers=[4, 1])
    checks = verify_here(checkpoint)
    assert failed(checks) == {"depth"} and "plan.json cannot be read: pruned_layers" in checks["depth"].details
    (checkpoint / "plan.json").unlink()
    assert verify_here(checkpoint)["depth"].ok is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "adapter/adapter_model.bin", "rng.pt"])
@pytest.mark.bad_input("What is saved", "{name} in a checkpoint", "verify fails: pickle files, which can run code")
def test_pickle_beside(checkpoint, verify_here, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    checks = verify_here(checkpoint)
    assert "weight files" in failed(checks) <= {"weight files", "adapter", "adapter base"}
    assert checks["weight files"].details == f"pickle files, which can run code when loaded: {name}"


@pytest.mark.bad_input("What is saved", "a checkpoint with weights cut short or gone", "verify fails: finite, load")
def test_missing_and_truncated_weights(checkpoint, verify_here):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert failed(verify_here(checkpoint)) == {"finite", "load"}
    weights.unlink()
    checks = verify_here(checkpoint)
    assert failed(checks) == {"weight files", "load"} and checks["finite"].ok is None
    assert checks["weight files"].details == "no *.safetensors"


@pytest.mark.bad_input("What is saved", "an index that names a missing shard", "verify fails and names the shard")
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
    checks = {check.name: check for check in verify_fresh.answers(model, list(range(2, 40)), None, 16)}
    assert failed(checks) == {"cache"} and "but then" in checks["cache"].details


def test_a_tie_may_be_broken_in_another_way():
    assert verify_fresh.same_tokens([1, 2, 3], [1, 2, 3], [1.0] * 3, 0.1) == (True, "3 tokens")
    assert verify_fresh.same_tokens([1, 9, 8], [1, 2, 3], [1.0, 0.05, 1.0], 0.1)[0]
    assert verify_fresh.same_tokens([9, 8], [1, 2], [0.05, 1.0], 0.1)[0] is None  # nothing was compared
    same, details = verify_fresh.same_tokens([1, 9, 8], [1, 2, 3], [1.0, 0.5, 0.0], 0.1)
    assert not same and details == "1 tokens, but then [9] instead of [2], not"
    assert not verify_fresh.same_tokens([1], [1, 2], [1.0, 1.0], 0.1)[0]


# Adapters


@pytest.fixture(scope="module")
def adapted(tiny_spec, tiny_tokenizer, assets_dir, tmp_path_factory):
    """A checkpoint whose adapter is kept apart."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapted") / "checkpoint"
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(apply_plan(tiny_spec.load(assets_dir), PLAN), config)
    save_checkpoint(model, tiny_tokenizer, PLAN, folder, "tiny")
    return folder


@pytest.fixture
def with_adapter(adapted, tmp_path):
    """A copy to damage, which names itself as base."""
    folder = shutil.copytree(adapted, tmp_path / "checkpoint")
    change_json(folder / "adapter/adapter_config.json", base_model_name_or_path=str(folder))
    return folder


def change_adapter(folder, change):
    """Lets `change` have the dict of all tensors of the adapter."""
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


ADAPTER_CHECKS = {f"adapter {name}" for name in ("base", "probe", "logits", "generate", "cache")} | {"adapter"}


def test_a_good_adapter_passes_in_the_fresh_process(adapted):
    checks = {check.name: check for check in verify.verify(adapted)}
    assert failed(checks) == set() and checks.keys() >= ADAPTER_CHECKS | {FRESH, "logits"}
    assert [checks[name].ok for name in sorted(ADAPTER_CHECKS - {"adapter generate"})] == [True] * 5
    assert checks["adapter base"].details == f"names {adapted}, this folder"
    assert "all 16 tensors in place" in checks["adapter"].details
    assert "tolerance 0.001 (float32)" in checks["adapter logits"].details
    base, tuned = (json.loads((folder / "probe.json").read_text()) for folder in (adapted, adapted / "adapter"))
    assert base["token_ids"] == tuned["token_ids"] and base["positions"] != tuned["positions"]


@pytest.mark.bad_input(
    "What is saved", "verify, given an adapter on layers that differ in width", "base and adapter are checked"
)
def test_adapter_on_layers_that_differ_in_width(tiny_llama, tiny_tokenizer, tmp_path, verify_here):
    width = WidthPlan(((0, 1, 2, 3), (0, 1)), ((1, 2, 3),) * 2, None)
    plan = PruningPlan(num_hidden_layers=2, method="test", width=width)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(apply_plan(tiny_llama(num_hidden_layers=2), plan), config)
    save_checkpoint(model, tiny_tokenizer, plan, tmp_path / "checkpoint", "tiny")
    checks = verify_here(tmp_path / "checkpoint")
    assert failed(checks) == set() and checks.keys() >= ADAPTER_CHECKS | {"own loader"}


@pytest.mark.bad_input("What is saved", "an adapter with a weight changed", "verify fails: adapter logits")
def test_changed_adapter(with_adapter, verify_here):
    change_adapter(with_adapter, lambda tensors: tensors[min(tensors)].neg_())
    assert "adapter logits" in failed(verify_here(with_adapter)) <= {"adapter logits", "adapter generate"}


@pytest.mark.bad_input("What is saved", "an adapter with a tensor {kind}", "verify fails and names the tensor")
@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_adapter_of_another_depth(with_adapter, verify_here, kind):
    def change(tensors):
        last = next(name for name in tensors if "layers.3" in name)
        if kind == "missing":
            del tensors[last]
        else:  # peft itself does not mind
            tensors[last.replace("layers.3", "layers.4")] = tensors[last].clone()

    change_adapter(with_adapter, change)
    checks = verify_here(with_adapter)
    assert "adapter" in failed(checks) and checks["adapter"].details.startswith(f"1 {kind}, base_model.model.model.lay")


@pytest.mark.bad_input("What is saved", "an adapter that names {kind} as its base", "verify: {result}")
@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("the dense model", "failed, another folder"),
        ("a folder that is gone", "not checked, was the checkpoint moved?"),
        ("a model of the Hub", "not checked, is no folder here"),
    ],
)
def test_adapter_of_another_base(with_adapter, verify_here, tmp_path, kind, result):
    (tmp_path / "dense").mkdir()
    places = {"the dense model": tmp_path / "dense", "a folder that is gone": tmp_path / "gone"}
    place = str(places.get(kind, "meta-llama/Llama-3.1-8B"))
    change_json(with_adapter / "adapter/adapter_config.json", base_model_name_or_path=place)
    check = verify_here(with_adapter)["adapter base"]
    outcome, said = result.split(", ")
    assert (check.ok, said in check.details) == ({"failed": False, "not checked": None}[outcome], True)
    assert place in check.details and f"write {with_adapter} into adapter_config.json" in check.details


@pytest.mark.bad_input(
    "What is saved", "an adapter without probe, as of older versions", "verify loads it all the same"
)
def test_adapter_without_probe(with_adapter, verify_here):
    (with_adapter / "adapter/probe.json").unlink()
    checks = verify_here(with_adapter)
    assert failed(checks) == set() and checks["adapter probe"].ok is None
    assert "adapter logits" not in checks and checks["adapter cache"].ok


@pytest.mark.bad_input("What is saved", "a folder adapter/ without its {name}", "verify fails: adapter")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapter_folder(with_adapter, verify_here, name):
    (with_adapter / "adapter" / name).unlink()
    assert "adapter" in failed(verify_here(with_adapter)) <= {"adapter", "adapter base"}


@pytest.mark.bad_input("What is saved", "verify, given the folder of the adapter", "error: Did you mean the one above?")
def test_the_adapter_is_no_checkpoint(adapted):
    with pytest.raises(verify.CheckpointError, match=rf"it has no config\.json\. Did you mean {adapted}\?"):
        verify.verify(adapted / "adapter")


# Keys for older readers, and the other files


OLDER = ("rope_theta", "torch_dtype")


@pytest.mark.bad_input("What is saved", "a checkpoint without the keys for older readers", "verify says so and passes")
def test_checkpoint_of_an_older_version(checkpoint, verify_here):
    config = json.loads((checkpoint / "config.json").read_text())
    text = json.dumps({key: value for key, value in config.items() if key not in OLDER})
    (checkpoint / "config.json").write_text(text)
    path = checkpoint / "tokenizer_config.json"
    change_json(path, tokenizer_class="TokenizersBackend")
    checks = verify_here(checkpoint)
    assert failed(checks) == set()
    assert checks["older readers"].ok is None and checks["tokenizer class"].ok is None
    for part in ("no torch_dtype, rope_theta", "Save it again"):
        assert part in checks["older readers"].details
    assert checks["tokenizer class"].details.startswith("TokenizersBackend as of transformers 5")


@pytest.mark.parametrize(
    ("change", "details"),
    [
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, not 10000.0"),
        ({"torch_dtype": "float16"}, "torch_dtype is float16, not float32"),
        ({"rope_theta": None}, "rope_theta is None, not 10000.0"),
        ({"dtype": "bfloat16"}, "torch_dtype is float32, not bfloat16"),
    ],
)
@pytest.mark.bad_input("What is saved", "a config with {change} beside other keys", "verify fails: {details}")
def test_older_keys_that_say_something_else(checkpoint, verify_here, change, details):
    change_json(checkpoint / "config.json", **change)
    checks = verify_here(checkpoint)
    assert "older readers" in failed(checks) and checks["older readers"].details == details


def test_one_older_key_of_two(checkpoint, verify_here):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_theta"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert verify_here(checkpoint)["older readers"] == verify_fresh.Check("older readers", False, "no rope_theta")


@pytest.mark.bad_input("What is saved", "a generation_config.json with {values}", "verify fails: {details}")
@pytest.mark.parametrize(
    ("values", "details"),
    [
        ({"eos_token_id": [1, 258]}, "token ids [258] are outside of the vocabulary of 258"),
        ({"pad_token_id": 32000}, "token ids [32000] are outside of the vocabulary of 258"),
        ({"pad_token_id": -1}, "token ids [-1] are outside of the vocabulary of 258"),
    ],
)
def test_generation_config_of_another_vocabulary(checkpoint, verify_here, values, details):
    change_json(checkpoint / "generation_config.json", **values)
    checks = verify_here(checkpoint)
    assert failed(checks) == {"generation config"} and checks["generation config"].details == details


def test_generation_config_missing_or_damaged(checkpoint, verify_here):
    assert verify_here(checkpoint)["generation config"].details == "bos_token_id 0, eos_token_id 1, pad_token_id 1"
    (checkpoint / "generation_config.json").write_text("{")
    assert "generation config" in failed(verify_here(checkpoint))
    (checkpoint / "generation_config.json").unlink()
    checks = verify_here(checkpoint)
    assert failed(checks) == set() and checks["generation config"].ok is None


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


@pytest.mark.bad_input(
    "What is saved", "a model that answers NaN", "error: The model to be saved answers with NaN or infinity"
)
def test_a_model_that_answers_nan_is_not_saved(tiny_llama, tiny_tokenizer, tmp_path):
    model = tiny_llama(num_hidden_layers=6)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"answers with NaN or infinity.*lower learning rate"):
        save_checkpoint(model, tiny_tokenizer, PLAN, tmp_path / "checkpoint", "tiny")
    assert not (tmp_path / "checkpoint").exists()
