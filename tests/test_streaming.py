import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from experiments.prune_checkpoint import main
from gradpruner.checkpoints import pruned_tensors, streaming
from gradpruner.checkpoints.older_readers import add_older_keys
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.files import write_json
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import SCORES, igia_matrix, layer_importance, squared_frobenius, step_weights
from gradpruner.merge import MERGE_RULES
from gradpruner.models import tensor_files
from gradpruner.models.architectures import linear_sublayers
from gradpruner.models.contents import INDEX_FILE, WEIGHTS_FILE
from gradpruner.plan import PruningPlan, preceding_kept_layer
from gradpruner.record import RunRecord
from gradpruner.surgery import apply_plan

NUM_LAYERS = 6
SMALL_SHARD = 20_000  # bytes; a layer of the float32 model takes 31 KB, its largest tensor 6 KB, its embedding 33 KB
DEEP = ((0, 2, 3, 5), (0, 2, 3, 5))  # layer 0 has no kept layer before it; 2 and 3 merge into 1, 5 into 4


def plan_for(pruned, merged=(), rule="sign_average", density=0.4, num_layers=NUM_LAYERS):
    return PruningPlan(
        num_hidden_layers=num_layers,
        pruned_layers=tuple(pruned),
        absorbed_by={layer: preceding_kept_layer(layer, pruned) for layer in merged},
        merge_rule=rule,
        density=density,
        method="gradpruner",
    )


def scored(plan, gradients, weighting="energy", score="sumsq"):
    """Returns the plan with the layer importance that the gradients give, as a method makes it."""
    importance = layer_importance(gradients.energies, score, weighting).tolist()
    return dataclasses.replace(plan, layer_importance=tuple(importance))


def make_gradients(folder, model, steps=3, rank=2, seed=7):
    """Makes random factors for every sublayer, as the importance run stores them; they shrink from step to step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: linear.weight.shape for name, linear in linear_sublayers(model.model.layers[0]).items()}
    folder.mkdir()
    energies = torch.zeros(steps, len(model.model.layers), len(shapes), dtype=torch.float64)
    for step in range(steps):
        factors = {}
        for layer in range(len(model.model.layers)):
            for index, (name, (rows, columns)) in enumerate(shapes.items()):
                left = torch.randn(rows, rank, generator=generator) / (step + 1)
                right = torch.randn(rank, columns, generator=generator)
                energies[step, layer, index] = squared_frobenius(left, right)
                factors |= {f"layers.{layer}.{name}.left": left, f"layers.{layer}.{name}.right": right}
        save_file(factors, folder / f"step-{step:05d}.safetensors")
    write_json(
        folder / "importance.json",
        {
            "sublayers": list(shapes),
            "energies": energies.tolist(),
            "losses": [1.0] * steps,
            "train_seconds": 1.0,
            "peak_memory_bytes": 1,
        },
    )
    return EarlyGradients.load(folder)


@pytest.fixture
def make_source(tiny_llama, tiny_tokenizer, tmp_path):
    """Returns a factory of dense checkpoints with everything that a model folder holds; it also returns the model."""

    def make(name="dense", max_shard_size="5GB", **config):
        model = tiny_llama(**config)
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, max_new_tokens=17)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tiny_tokenizer.save_pretrained(folder)
        (folder / "LICENSE").write_text("free\n")
        return folder, model

    return make


@pytest.fixture
def source(make_source):
    return make_source()[0]


@pytest.fixture
def sharded(make_source):
    folder = make_source(max_shard_size=SMALL_SHARD)[0]
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture
def gradients(tiny_llama, tmp_path):
    return make_gradients(tmp_path / "factors", tiny_llama())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "pruned"


def weights_in(folder):
    """Returns all tensors of a checkpoint, read by safetensors."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        loaded = load_file(file)
        assert not loaded.keys() & tensors.keys()
        tensors |= loaded
    return tensors


def same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


def in_memory(plan, gradients, source, folder, weighting="energy"):
    """Prunes the whole model in memory: load, apply_plan, save_pretrained, keys for older readers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    weights = None if gradients is None else step_weights(gradients.energies, weighting).tolist()
    apply_plan(model, plan, lambda layer, name: igia_matrix(gradients.factors(layer, name), weights))
    model.save_pretrained(folder)
    add_older_keys(folder)
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# The same as in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", SMALL_SHARD])
def test_equals_the_in_memory_path(make_source, gradients, tmp_path, target, dtype, tied, shard):
    source, _ = make_source(max_shard_size=shard, dtype=dtype, tie_word_embeddings=tied)
    plan = scored(plan_for(*DEEP), gradients)
    in_memory(plan, gradients, source, tmp_path / "expected")
    prune_checkpoint(plan, gradients, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    assert config_of(target) == config_of(tmp_path / "expected")
    assert ("lm_head.weight" in weights_in(target)) is not tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_merge_rule(make_source, gradients, tmp_path, target, rule, dtype):
    source, _ = make_source(dtype=dtype)
    plan = scored(plan_for(*DEEP, rule), gradients)
    in_memory(plan, gradients, source, tmp_path / "expected")
    prune_checkpoint(plan, gradients, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    before, after = weights_in(source), weights_in(target)
    name = "self_attn.q_proj.weight"
    changed = not torch.equal(before[f"model.layers.1.{name}"], after[f"model.layers.0.{name}"])
    assert changed == (rule != "none")


@pytest.mark.parametrize("pruned", [(), (0,), (5,), (1, 3), (0, 1, 5), (1, 2, 3, 4)])
def test_without_merges(source, tmp_path, target, pruned):
    plan = plan_for(pruned)
    in_memory(plan, None, source, tmp_path / "expected")
    prune_checkpoint(plan, None, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    assert config_of(target) == config_of(tmp_path / "expected")


@pytest.mark.parametrize("score", SCORES)
def test_the_step_weighting_is_that_of_the_plan(source, gradients, tmp_path, target, score):
    plan = scored(plan_for(*DEEP), gradients, "normalized", score)
    in_memory(plan, gradients, source, tmp_path / "expected", "normalized")
    prune_checkpoint(plan, gradients, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    prune_checkpoint(scored(plan, gradients, "energy", score), gradients, source, tmp_path / "energy")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights_in(target)[name], weights_in(tmp_path / "energy")[name])


@pytest.mark.parametrize("weighting", ["energy", "normalized"])
def test_equals_what_gradpruner_makes(source, make_batches, tmp_path, target, weighting):
    method = GradPruner(
        num_pruned_layers=3, merge_count=2, steps=2, batch_size=2, learning_rate=1e-3, step_weighting=weighting
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    method.measure(model, make_batches(2), tmp_path / "measured")
    compressed = method.prune(model, tmp_path / "measured")
    assert compressed.plan.merges
    compressed.model.save_pretrained(tmp_path / "expected")
    gradients = EarlyGradients.load(tmp_path / "measured")
    prune_checkpoint(compressed.plan, gradients, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))


def test_sublayers_with_biases_and_norms_of_their_own(tmp_path, target):
    config = AutoConfig.for_model(
        "qwen3", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # biases are 0 and norms 1 by default, which would hide a swapped one
    model.save_pretrained(tmp_path / "dense")
    plan = plan_for((0,), num_layers=3)
    in_memory(plan, None, tmp_path / "dense", tmp_path / "expected")
    prune_checkpoint(plan, None, tmp_path / "dense", target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    assert {"model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.q_proj.bias"} < weights_in(
        target
    ).keys()


def test_layers_from_ten_on(make_source, tmp_path, target):
    """Names sort as text; layers must sort as numbers."""
    source, _ = make_source(num_hidden_layers=12, max_shard_size=SMALL_SHARD)
    plan = plan_for((1, 2, 10), num_layers=12)
    in_memory(plan, None, source, tmp_path / "expected")
    prune_checkpoint(plan, None, source, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))


def test_per_layer_lists_of_the_config(make_source, target):
    source, _ = make_source(layer_types=["full_attention", "sliding_attention"] * 3)
    prune_checkpoint(plan_for((1, 2, 4)), None, source, target)
    assert config_of(target)["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config_of(target)["num_hidden_layers"] == 3


def test_pruning_twice(source, tmp_path, target):
    prune_checkpoint(plan_for((1, 2)), None, source, target)
    (target / "probe.json").write_text("{}")  # the probe of the first pruned model
    prune_checkpoint(plan_for((1,), num_layers=4), None, target, tmp_path / "again")
    prune_checkpoint(plan_for((1, 2, 3)), None, source, tmp_path / "once")
    same_weights(weights_in(tmp_path / "again"), weights_in(tmp_path / "once"))
    assert PruningPlan.load(tmp_path / "again" / "plan.json") == plan_for((1,), num_layers=4)
    assert not (tmp_path / "again" / "probe.json").exists()


# What is written


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 10**9])
def test_any_shard_size_loads_in_plain_transformers(sharded, make_batches, target, max_shard_bytes):
    plan = plan_for((1, 3))
    prune_checkpoint(plan, None, sharded, target, max_shard_bytes)
    files = sorted(file.name for file in target.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == [WEIGHTS_FILE]
        assert not (target / INDEX_FILE).exists()
    else:
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = json.loads((target / INDEX_FILE).read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_in(target).values())
        assert all(name in load_file(target / file) for name, file in index["weight_map"].items())
    if max_shard_bytes == 20_000:
        sizes = {file: sum(tensor.nbytes for tensor in load_file(target / file).values()) for file in files}
        single = [file for file in files if len(load_file(target / file)) == 1]
        assert all(size <= 20_000 for file, size in sizes.items() if file not in single)
    loaded, info = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    batch = make_batches(1)[0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    dense = apply_plan(AutoModelForCausalLM.from_pretrained(sharded, dtype="auto"), plan)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, dense(**inputs).logits)
    assert loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == 15


def test_index_is_as_transformers_writes_it(sharded, tmp_path, target):
    prune_checkpoint(plan_for((1, 3)), None, sharded, target, SMALL_SHARD)
    model = apply_plan(AutoModelForCausalLM.from_pretrained(sharded, dtype="auto"), plan_for((1, 3)))
    model.save_pretrained(tmp_path / "expected", max_shard_size=SMALL_SHARD)
    ours, theirs = (json.loads((folder / INDEX_FILE).read_text()) for folder in (target, tmp_path / "expected"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


def test_files_are_aligned_and_marked(make_source, target):
    source, _ = make_source(dtype=torch.bfloat16)
    tensors = load_file(source / WEIGHTS_FILE)
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].float()
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.zeros(3, dtype=torch.uint8)  # ignored
    save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
    prune_checkpoint(plan_for((0,)), None, source, target)
    data = (target / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    assert weights_in(target)["model.layers.0.input_layernorm.weight"].dtype == torch.float32


def test_everything_else_is_carried_along(source, gradients, target):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "README.md").write_text("the dense model")
    for name in ("pytorch_model.bin", "model.pt", "model-q4.gguf", "pytorch_model.bin.index.json", ".hidden"):
        (source / name).write_text("weights")
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_text("weights")
    plan = scored(plan_for(*DEEP), gradients)
    prune_checkpoint(plan, gradients, source, target)
    same = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*same, "additional_chat_templates/tool.jinja"]:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    made = {"config.json", "plan.json", "README.md", WEIGHTS_FILE, "additional_chat_templates", "tokenizer_config.json"}
    assert {file.name for file in target.iterdir()} == made | set(same)
    assert PruningPlan.load(target / "plan.json") == plan
    card = (target / "README.md").read_text()
    assert "# dense with 2 of 6 layers" in card
    assert "2 into 1, 3 into 1, 5 into 4" in card
    assert '"max_shard_bytes": 5000000000' in card and "probe.json" not in card
    assert GenerationConfig.from_pretrained(target).max_new_tokens == 17
    text = "sixteen bytes, or"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, target)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[1].chat_template == tokenizers[0].chat_template


def test_links_of_the_hub_cache_are_followed(source, tmp_path, target):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    prune_checkpoint(plan_for((1,)), None, snapshot, target)
    assert not any(file.is_symlink() for file in target.iterdir())
    assert len(weights_in(target)) == len(weights_in(source)) - 9


# Memory and reads


def test_pruned_layers_are_never_read(sharded, gradients, tmp_path, target, monkeypatch):
    """Layers 0 and 2 are pruned unmerged."""
    plan = scored(plan_for((0, 2, 3), (3,)), gradients)
    in_memory(plan, gradients, sharded, tmp_path / "expected")
    unread = re.compile(r"model\.layers\.(0|2)\.")
    read = []
    parts = tensor_files.StoredTensor.parts
    monkeypatch.setattr(
        tensor_files.StoredTensor, "parts", lambda self, buffer: read.append(self) or parts(self, buffer)
    )
    prune_checkpoint(plan, gradients, sharded, target)
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    names = [stored.name for stored in read]
    assert not any(map(unread.match, names))
    # Of layer 3 only the weights that merge are read, and no byte is read twice.
    sublayers = {f"model.layers.3.{name}.weight" for name in gradients.sublayers}
    assert {name for name in names if name.startswith("model.layers.3.")} == sublayers
    assert len({(stored.file, stored.start) for stored in read}) == len(read)


def test_reads_at_the_level_of_the_file(source, target, monkeypatch):
    """Every byte that is read lies in the header or in a kept tensor, and no read is larger than the buffer."""
    ranges = []

    def fill(buffer, stream):
        ranges.append((stream.tell(), stream.tell() + len(buffer)))
        return original(buffer, stream)

    original = tensor_files.fill
    monkeypatch.setattr(tensor_files, "fill", fill)
    monkeypatch.setattr(streaming, "COPY_BYTES", 1000)
    tensors = tensor_files.read_header(source / WEIGHTS_FILE)
    header_end = min(stored.start for stored in tensors.values())
    pruned = [stored for name, stored in tensors.items() if re.match(r"model\.layers\.[13]\.", name)]
    assert len(pruned) == 18
    prune_checkpoint(plan_for((1, 3)), None, source, target)
    for start, end in ranges:
        assert not any(start < stored.start + stored.num_bytes and stored.start < end for stored in pruned)
        assert end <= header_end or end - start <= 1000
    total = sum(stored.num_bytes for stored in tensors.values()) - sum(stored.num_bytes for stored in pruned)
    assert sum(end - start for start, end in ranges if start >= header_end) == total


def test_short_reads_are_continued(source, tmp_path, target, monkeypatch):
    class Hesitant:
        def __init__(self, stream):
            self.stream, self.name = stream, stream.name

        def readinto(self, buffer):
            return self.stream.readinto(buffer[:100])

    original = tensor_files.fill
    monkeypatch.setattr(tensor_files, "fill", lambda buffer, stream: original(buffer, Hesitant(stream)))
    prune_checkpoint(plan_for((1, 3)), None, source, target)
    monkeypatch.undo()
    prune_checkpoint(plan_for((1, 3)), None, source, tmp_path / "expected")
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))


@pytest.mark.parametrize("rule", MERGE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_by_blocks(make_source, gradients, tmp_path, target, monkeypatch, rule, dtype):
    monkeypatch.setattr(pruned_tensors, "BLOCK_NUMEL", 100)  # 3 rows of 32; 2 of 48
    test_every_merge_rule(make_source, gradients, tmp_path, target, rule, dtype)


def test_starts_without_peft():
    """Loading and training libraries would take 60 MB more than the work itself."""
    code = (
        "import sys; import gradpruner.checkpoints.streaming;"
        "print([name for name in ('peft', 'datasets', 'gradpruner.models.spec') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


# Loaded again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_as_the_model_that_apply_plan_makes(make_source, gradients, make_batches, tmp_path, target, dtype, tied):
    source, _ = make_source(max_shard_size=SMALL_SHARD, dtype=dtype, tie_word_embeddings=tied)
    plan = scored(plan_for(*DEEP), gradients)
    expected = in_memory(plan, gradients, source, tmp_path / "expected")
    prune_checkpoint(plan, gradients, source, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    same_weights(model.state_dict(), expected.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.dtype == dtype
    assert model.config.num_hidden_layers == 2
    assert model.generation_config.max_new_tokens == 17
    batch = make_batches(1)[0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), OSError(28, "No space left on device")])
def test_interrupted_leaves_nothing(sharded, tmp_path, target, monkeypatch, error):
    write_file, written = streaming._write_file, []

    def failing(file, *arguments):
        if len(written) == 2:
            raise error
        written.append(file)
        write_file(file, *arguments)

    monkeypatch.setattr(streaming, "_write_file", failing)
    before = set(tmp_path.iterdir())
    with pytest.raises(type(error), match=r"stop|No space left"):
        prune_checkpoint(plan_for((1,)), None, sharded, target, SMALL_SHARD)
    assert len(written) == 2
    assert set(tmp_path.iterdir()) == before


def test_killed_leaves_no_target_and_can_start_again(sharded, tmp_path, target):
    """A child process ends in the middle of the weights as after kill -9: no clean-up runs."""
    child = os.fork()
    if child == 0:
        tensor_files.StoredTensor.parts = lambda self, buffer: os._exit(9)
        prune_checkpoint(plan_for((1,)), None, sharded, target, SMALL_SHARD)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists()
    assert (tmp_path / ".pruned.partial").is_dir()
    prune_checkpoint(plan_for((1,)), None, sharded, target)
    assert not (tmp_path / ".pruned.partial").exists()
    in_memory(plan_for((1,)), None, sharded, tmp_path / "expected")
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))


# Refusals


def refused(match, plan, gradients, source, target, **options):
    """Checks that pruning is refused with that message and the disk is unchanged."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(ValueError, match=match):
        prune_checkpoint(plan, gradients, source, target, **options)
    assert sorted(target.parent.rglob("*")) == before


def test_existing_target(source, target):
    target.mkdir()
    refused(
        r"The target exists already: .*pruned\. Remove it, or name a new folder", plan_for((1,)), None, source, target
    )


def test_source_as_target(source, tmp_path):
    here = tmp_path / "x" / ".." / "dense"
    refused(r"must differ, got .*dense for both\. Name a new", plan_for((1,)), None, source, here)


@pytest.mark.parametrize("num_layers", [5, 7])
def test_plan_for_another_depth(source, target, num_layers):
    match = rf"for {num_layers} decoder layers, the model in .*dense has 6\. Apply it to the dense"
    refused(match, plan_for((1,), num_layers=num_layers), None, source, target)


def test_merges_without_factors(source, target):
    match = r"merges layers \[2, 3\] but no factors were given\. Pass the folder"
    refused(match, plan_for((2, 3), (2, 3)), None, source, target)


def test_factors_of_another_depth(source, tiny_llama, tmp_path, target):
    other = make_gradients(tmp_path / "other", tiny_llama(num_hidden_layers=4))
    match = r"must be of 6 layers with sublayers .*, got 4 layers with .* in .*other\. Pass the folder"
    refused(match, plan_for((2,), (2,)), other, source, target)


def test_factors_of_other_sublayers(source, gradients, target):
    data = json.loads((gradients.directory / "importance.json").read_text())
    data["sublayers"][0] = "self_attn.c_attn"
    write_json(gradients.directory / "importance.json", data)
    other = EarlyGradients.load(gradients.directory)
    match = r"with sublayers \[.*q_proj.*\], got 6 layers with \[.*c_attn.*\] in .*factors\. Pass the folder"
    refused(match, plan_for((2,), (2,)), other, source, target)


def test_factors_of_other_shapes(source, tiny_llama, tmp_path, target):
    other = make_gradients(tmp_path / "other", tiny_llama(intermediate_size=40))
    match = r"layer 2, mlp\.gate_proj, must make a matrix of shape \(48, 32\), got \(40, 32\) in .*other\. Pass"
    refused(match, plan_for((2,), (2,)), other, source, target)


def test_missing_and_damaged_factors(source, gradients, target):
    match = r"Cannot read the factors of layer 2, .* in .*factors: got \w+: .*\. The folder is damaged: run"
    step = gradients.directory / "step-00001.safetensors"
    step.write_bytes(step.read_bytes()[:-4])
    refused(match, plan_for((2,), (2,)), gradients, source, target)
    step.unlink()
    refused(match, plan_for((2,), (2,)), gradients, source, target)


def test_factors_that_diverged(source, gradients, target):
    step = gradients.directory / "step-00001.safetensors"
    factors = load_file(step)
    factors["layers.2.self_attn.k_proj.left"][0, 0] = torch.nan
    save_file(factors, step)
    match = r"layer 2, self_attn\.k_proj, must have the norms of importance\.json beside them, got other .*: run the"
    refused(match, plan_for((2,), (2,)), EarlyGradients.load(gradients.directory), source, target)


def test_factors_of_another_run(source, gradients, tiny_llama, tmp_path, target):
    plan = scored(plan_for((2, 3), (3,)), gradients)
    other = make_gradients(tmp_path / "other", tiny_llama(), seed=8)
    match = r"must give the layer importance that the plan was made from, got a plan with \d.* and factors that give \d"
    refused(rf"{match}.* in .*other\. Pass the folder of the importance run", plan, other, source, target)
    refused("got a plan with none and", plan_for((2, 3), (3,)), gradients, source, target)
    shutil.copy(other.directory / "step-00001.safetensors", gradients.directory)
    match = r"layer 3, .*, must have the norms .* in .*factors\. Its files are of several importance runs: run"
    refused(match, plan, gradients, source, target)


def test_a_plan_that_merges_without_gradients(source, target):
    plan = plan_for((2, 3), (2, 3), "laco_code")
    match = r"Only plans that drop and merge layers .* that merges by laco_code\. Run the method with save_checkpoint"
    refused(match, plan, None, source, target)


def test_shards_of_nothing(source, target):
    refused(r"must be above 0, got 0\. Leave it out", plan_for((1,)), None, source, target, max_shard_bytes=0)


def test_too_little_disk_space(source, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 0, 1000))
    match = r"pruned needs [\d,]{7} bytes of disk, got 1,000 free in .*\. Make room, or choose"
    refused(match, plan_for((1,)), None, source, target)


def test_file_that_shrinks_while_it_is_read(source, tmp_path, target, monkeypatch):
    def prepare(*arguments):
        pruned = original(*arguments)
        os.truncate(source / WEIGHTS_FILE, 100_000)
        return pruned

    original = streaming.prepare
    monkeypatch.setattr(streaming, "prepare", prepare)
    with pytest.raises(ValueError, match=r"model\.safetensors ended \d+ bytes too early\. Download"):
        prune_checkpoint(plan_for((1,)), None, source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


# Command line


def write_run(folder, plan, **record):
    """Writes what the command reads of a run's folder."""
    plan.save(folder / "plan.json")
    (folder / "config.yaml").write_text(f"cache_dir: {folder.parent / 'cache'}\n")
    RunRecord("failed", {}, "identity", 0, **record).save(folder)


def test_command(sharded, gradients, tmp_path, target, capsys):
    plan = scored(plan_for(*DEEP), gradients, "normalized")
    in_memory(plan, gradients, sharded, tmp_path / "expected", "normalized")
    write_run(tmp_path / "run", plan, stage_ids={"measure": "0a1b"})
    shutil.copytree(gradients.directory, tmp_path / "cache/stages/measure/0a1b")
    assert main([*map(str, (tmp_path / "run", sharded, target)), "--max-shard-bytes", "20000"]) == 0
    same_weights(weights_in(target), weights_in(tmp_path / "expected"))
    assert (target / INDEX_FILE).exists()
    assert "2 of 6 layers, 3 of the 4 pruned layers merged" in capsys.readouterr().out
    by_file = [tmp_path / "run/plan.json", gradients.directory, sharded, tmp_path / "by-file"]
    assert main(list(map(str, by_file))) == 0
    same_weights(weights_in(tmp_path / "by-file"), weights_in(target))


def test_command_without_factors(source, tmp_path, target, capsys):
    plan_for((1, 3)).save(tmp_path / "plan.json")
    arguments = [str(tmp_path / "plan.json"), str(source), str(target)]
    assert main(arguments) == 0
    assert len(weights_in(target)) == len(weights_in(source)) - 2 * 9
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: The target exists already: .*\n", error)


@pytest.mark.parametrize(
    ("run", "factors", "match"),
    [
        ("missing.json", None, r"RUN must hold a plan\.json or be one, got no file at .*missing\.json\. Pass a fin"),
        ("dense", None, r"RUN must hold a plan\.json or be one, got no file at .*dense/plan\.json\. Pass a finished"),
        ("dense/LICENSE", None, r"RUN must hold a plan\.json or be one, got .*LICENSE, not one: .*\. Pass"),
        ("dense/config.json", None, r"Cannot use the plan .*config\.json: Cannot read plan version None"),
        ("list.json", None, r"RUN must hold a plan\.json or be one, got .*list\.json, not one: .*\. Pass"),
        ("plan.json", None, r"record beside it must name its importance run, got none in .*\. Give the folder of"),
        ("older", None, r"record beside it must name its importance run, got none in .*older\. Give .* as FACTORS"),
        ("run", None, r"hold the importance run of .*run, got no folder .*cache/stages/measure/0a1b\. Start this"),
        ("plan.json", "dense", r"FACTORS must be a folder with importance\.json, got .*dense\. Pass"),
        ("plan.json", "damaged", r"importance\.json must be as the importance run wrote it, got KeyError.*\. Run"),
    ],
)
def test_command_refuses_on_one_line(source, tmp_path, target, capsys, run, factors, match):
    plan = plan_for((1, 3), (3,))
    plan.save(tmp_path / "plan.json")
    write_run(tmp_path / "older", plan)
    write_run(tmp_path / "run", plan, stage_ids={"measure": "0a1b"})
    write_json(tmp_path / "list.json", [1])
    write_json(tmp_path / "damaged" / "importance.json", {"losses": []})
    given = [tmp_path / run] + ([] if factors is None else [tmp_path / factors])
    assert main([*map(str, given), str(source), str(target)]) == 1
    captured = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{match}.*\n", captured.err)
    assert captured.out == ""
    assert not target.exists()


def test_command_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "RUN [FACTORS] SOURCE TARGET" in capsys.readouterr().out
