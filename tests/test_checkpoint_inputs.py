"""Damaged and unusual checkpoints get the same answer from a run, from the library and from pruning on disk."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.config import CONF, build_pipeline
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.models.chat_template import render_prompt
from gradpruner.models.padding import without_added_padding
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(3,), method="last")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 2471645608\n"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_spec, assets_dir, tmp_path):
    """Returns a folder with a whole model: 6 layers, an output head of its own, 258 tokens."""
    return Path(shutil.copytree(tiny_spec.source(assets_dir), tmp_path / "model"))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Returns `dry_run(path)`, which makes the checks of a run and of a dry run, with four rows of data."""
    place = tmp_path_factory.mktemp("run")
    row = json.dumps({"question": "red?", "options": ["red", "blue"], "answer": "red"})
    (place / "rows.jsonl").write_text(f"{row}\n" * 4)
    overrides = [
        *("debug=smoke", "method=last", "reference=null", "evaluate_before=false", "dataset=jsonl"),
        *(
            f"dataset.train_file={place}/rows.jsonl",
            f"dataset.test_file={place}/rows.jsonl",
            f"cache_dir={place}/cache",
        ),
        *("dataset.prompt='{question}'", "dataset.answer_field=answer", "dataset.choices_field=options"),
        "dataset.max_length=64",
    ]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        pipeline = build_pipeline(compose("config", overrides=overrides))

    def check(path, **settings):
        changed = dataclasses.replace(pipeline, model=ModelSpec(str(path), **settings))
        changed.check(resources=False)
        return changed

    return check


@pytest.fixture
def no_weights(monkeypatch):
    """Makes reading weights through the automatic class an error."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read")
    )


@pytest.fixture
def ways(dry_run, assets_dir, tmp_path):
    """Returns the three ways in, by name: each takes the path of a model."""
    return {
        "a dry run": dry_run,
        "the library": lambda path: ModelSpec(str(path)).load(assets_dir),
        "pruning on disk": lambda path: prune_checkpoint(PLAN, None, Path(path), tmp_path / "pruned"),
    }


# How a folder is changed


def tensors(change):
    """Changes the tensors of a folder."""

    def apply(folder):
        loaded = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(
            {name: value.contiguous() for name, value in change(loaded).items()}, folder / WEIGHTS, {"format": "pt"}
        )

    return apply


def named(rename):
    return tensors(lambda found: {rename(name): tensor for name, tensor in found.items()})


def without(part):
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def replaced(name, make):
    return tensors(lambda found: found | {name: make(found[name])})


def config(**values):
    """Changes entries of config.json; None removes one."""

    def apply(folder):
        data = json.loads((folder / "config.json").read_text()) | values
        data = {key: value for key, value in data.items() if value is not None or key not in values}
        (folder / "config.json").write_text(json.dumps(data))

    return apply


def text(name, content):
    """Puts a text in place of a file."""
    return lambda folder: (folder / name).write_text(content)


def cut(size):
    """Keeps the first bytes of the weights, or all but the last `-size`."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def only(*names, keep=("config.json",)):
    """Leaves no files but those kept and the ones named, which may be in folders."""

    def apply(folder):
        for file in folder.iterdir():
            if file.name not in keep:
                file.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")

    return apply


def sharded(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "new", max_shard_size=60_000)
    (folder / WEIGHTS).unlink()
    for file in (folder / "new").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "new")
    assert len(list(folder.glob("*.safetensors"))) > 2


def lost_shard(folder):
    sharded(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    sharded(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def no_index(folder):
    sharded(folder)
    (folder / INDEX).unlink()


def index(content):
    return lambda folder: (sharded(folder), (folder / INDEX).write_text(content))


def longer(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x" * 1000)


def renamed(name):
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def lost_link(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/4d7a21")


def training_run(folder):
    (folder / "checkpoint-500").mkdir()
    for file in list(folder.iterdir()):
        if file.is_file():
            file.rename(folder / "checkpoint-500" / file.name)
    (folder / "checkpoint-500/optimizer.pt").write_bytes(b"x")


def file_alone(folder):
    data = (folder / WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    folder.write_bytes(data)


def pickled(folder):
    found = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    torch.save(found, folder / WEIGHTS)


def unmerged(name):
    return name.replace("q_proj.", "q_proj.base_layer.")


def packed(found):
    rest = {name: tensor for name, tensor in found.items() if "q_proj" not in name}
    return rest | {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}


def scored(found):
    return {name: tensor for name, tensor in found.items() if name != HEAD} | {"score.weight": torch.zeros(2, 32)}


PREFIX = r"do not fit .* they lack 57 tensors .* they also hold 57 .*seem to have the prefix '{}'\..*{}"
QUANTIZED = (
    r"Cannot prune a quantized checkpoint, got .*model with a {} \(method {}\): .*Use the checkpoint that it was"
)
POINTERS = r"must hold the files themselves, got Git LFS pointers in .*model: {}\. Run .*`git lfs pull` there"
WHOLE = r"model\.safetensors must be a whole safetensors file, got {}\. Download or save .*`git lfs pull`"
KIND = r"No model in .*model: it holds {}"
JSON = r"{} must hold a JSON object, got {}.*\. Download or save the checkpoint again"
TYPE = r"Cannot prune model type '{}': {}.* Supported: llama, .*"

REFUSED = [
    # tensors
    (
        "a layer missing",
        without(".layers.1."),
        r"they lack 9 tensors \(model\.layers\.1\..*\. Use a complete checkpoint",
    ),
    (
        "a config with more layers",
        config(num_hidden_layers=8),
        r"they lack 18 tensors \(model\.layers\.6\..*Use a complete",
    ),
    (
        "a config with fewer layers",
        config(num_hidden_layers=4),
        r"they also hold 18 tensors \(model\.layers\.4\..*Use a",
    ),
    (
        "the output head missing, untied",
        without(HEAD),
        r'they lack 1 tensor \(lm_head\.weight\).*set "tie_word_embeddings": true in',
    ),
    (
        "the embedding missing",
        without(EMBEDDING),
        r"they lack 1 tensor \(model\.embed_tokens\.weight\).*Use a complete",
    ),
    (
        "heads missing in a layer",
        replaced(UP.replace("mlp.up", "self_attn.q"), lambda value: value[:16]),
        r"have other shapes in 1 tensor \(model\.layers\.1\.self_attn\.q_proj\.weight \(is \(16, 32\), must be",
    ),
    (
        "names with the prefix _orig_mod.",
        named("_orig_mod.{}".format),
        PREFIX.format("_orig_mod.", r"torch\.compile: save model\._orig_mod"),
    ),
    (
        "names with the prefix module.",
        named("module.{}".format),
        PREFIX.format("module.", r"DistributedDataParallel: save model\.module"),
    ),
    (
        "names with the prefix base_model.model.",
        named("base_model.model.{}".format),
        PREFIX.format("base_model.model.", r"peft: save the result of merge_and_unload\(\)"),
    ),
    (
        "names with the prefix _fsdp_wrapped_module.",
        named("_fsdp_wrapped_module.{}".format),
        PREFIX.format("_fsdp_wrapped_module.", "FSDP, activation"),
    ),
    (
        "names with the prefix student.",
        named("student.{}".format),
        PREFIX.format("student.", "Save the model again without the prefix"),
    ),
    (
        "a wrapper within the names of some layers",
        named(lambda name: name.replace("layers.2.", "layers.2._checkpoint_wrapped_module.")),
        r"they lack 9 tensors .* also hold 9 .*FSDP, activation checkpointing or Lightning: save the unwrapped",
    ),
    (
        "LoRA layers that were not merged",
        named(unmerged),
        r"also hold 6 tensors \(.*base_layer.*peft: save the result of merge_and_unload",
    ),
    (
        "packed 4-bit tensors without a quantization config",
        tensors(packed),
        r"lack 6 tensors .* also hold 1 .*qweight.*quantized weights: use the checkpoint",
    ),
    (
        "a reward model's value head",
        tensors(lambda found: found | {"v_head.summary.weight": torch.zeros(1, 32)}),
        r"also hold 1 tensor \(v_head\.summary\.weight\)\. .*classifier or reward model: use the language",
    ),
    (
        "empty tensors, as ZeRO-3 saves them",
        tensors(lambda found: {name: torch.zeros(0) for name in found}),
        r"have other shapes in 57 tensors .*DeepSpeed ZeRO-3: save with stage3_gather",
    ),
    (
        "int8 values",
        replaced(UP, lambda value: value.to(torch.int8)),
        r"Weights must be one of F64, F32, F16, BF16, got I8 in .* for 1 tensor .*not quantized",
    ),
    (
        "fp8 values",
        replaced(UP, lambda value: value.to(torch.float8_e4m3fn)),
        r"Weights must be one of .*, got F8_E4M3 in .* for 1 tensor .*not quantized",
    ),
    # files
    ("a Git LFS pointer in place of the weights", text(WEIGHTS, POINTER), POINTERS.format("model.safetensors")),
    ("a Git LFS pointer in place of config.json", text("config.json", POINTER), POINTERS.format("config.json")),
    ("a Git LFS pointer in place of the tokenizer", text("tokenizer.json", POINTER), POINTERS.format("tokenizer.json")),
    ("a download that was cut", cut(-1000), WHOLE.format(r"[\d,]+ of [\d,]+ bytes")),
    ("a download that was cut in its header", cut(500), WHOLE.format("500 bytes, which is not even its header")),
    ("an empty weights file", cut(0), WHOLE.format("0 bytes, .*")),
    (
        "an error page saved as the weights",
        text(WEIGHTS, "<!DOCTYPE html><html>Access denied"),
        WHOLE.format("a file that starts with .*DOCTYPE.*"),
    ),
    ("a pickle under the name of safetensors", pickled, WHOLE.format("a file that starts with b'PK.*")),
    ("bytes after the end of the weights", longer, WHOLE.format("1,000 bytes after its end")),
    (
        "a header that is no JSON",
        text(WEIGHTS, "\x04" + "\0" * 7 + "{{{{"),
        WHOLE.format("a header that cannot be read .*"),
    ),
    (
        "a link to weights that are gone",
        lost_link,
        r"got links to files that are missing in .*model: model\.safetensors\. Copy the folder",
    ),
    (
        "a shard missing",
        lost_shard,
        r"files that the checkpoint's index names must be there, got \d of \d in .*: model-00002-of.* missing\.",
    ),
    (
        "a shard that was cut",
        cut_shard,
        r"model-00002-of-.* must be a whole safetensors file, got [\d,]+ of [\d,]+ bytes",
    ),
    (
        "shards without their index",
        no_index,
        KIND.format(r"safetensors, but neither model\.safetensors nor .*Download or save"),
    ),
    ("an index that is no JSON", index("{"), JSON.format(r"index\.json", "no JSON")),
    (
        "an index without a weight_map",
        index("{}"),
        r"index of a checkpoint must hold a weight_map, got none in .*\. The file is damaged",
    ),
    (
        "an index with a number for a weight_map",
        index('{"weight_map": 3}'),
        r"index of a checkpoint must hold a weight_map, got none in",
    ),
    (
        "weights under another name",
        renamed("consolidated.safetensors"),
        KIND.format(r"safetensors, but neither .*\(consolidated\.safetensors\)\. Download"),
    ),
    # other kinds of folders
    (
        "an adapter alone",
        only("adapter_config.json", "adapter_model.safetensors", keep=()),
        KIND.format(
            r"an adapter alone \(adapter_config\.json, adapter_model\.safetensors\)\. Merge the adapter into its base"
        ),
    ),
    (
        "an adapter with its base's config",
        only("adapter_config.json", "adapter_model.bin"),
        KIND.format(r"an adapter alone .*Merge"),
    ),
    (
        "pytorch_model.bin only",
        only("pytorch_model.bin"),
        KIND.format(r"only pickle files \(pytorch_model\.bin\)\. Pickle files can run code .*convert"),
    ),
    (
        "consolidated.00.pth only",
        only("consolidated.00.pth", "params.json", keep=()),
        KIND.format(r"only pickle files \(consolidated\.00\.pth\)\. Pickle"),
    ),
    (
        "GGUF files only",
        only("model.Q4_K_M.gguf", keep=()),
        KIND.format(r"GGUF weights, .*\(model\.Q4_K_M\.gguf\)\. Use the safetensors"),
    ),
    (
        "ONNX weights only",
        only("model.onnx"),
        KIND.format(r"weights of another framework \(model\.onnx\)\. Use a checkpoint for PyTorch"),
    ),
    (
        "a download that is unfinished",
        only("model.safetensors.incomplete"),
        KIND.format(r"an unfinished download \(model\.safetensors\.incomplete\)\. Download the model again"),
    ),
    (
        "shards of a DeepSpeed run",
        only("zero_to_fp32.py", "latest", "global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        KIND.format(r"parts of a DeepSpeed training run \(global_step500, zero_to_fp32\.py\)\. Put them together"),
    ),
    (
        "shards of an FSDP run",
        only("pytorch_model_fsdp_0/__0_0.distcp"),
        KIND.format(r"parts of an FSDP training run \(pytorch_model_fsdp_0\)\. Put them together"),
    ),
    (
        "a folder of a training run's checkpoints",
        training_run,
        KIND.format(r"models in folders of its own \(checkpoint-500\)\. Use one of"),
    ),
    (
        "a folder without weights",
        only(),
        KIND.format(r"no weights\. Use a folder written by save_pretrained, or a Hub id"),
    ),
    ("an empty folder", only(keep=()), KIND.format(r"neither config\.json nor weights\. Use a folder")),
    (
        "a weights file in place of its folder",
        file_alone,
        r"No model in .*model: it is a file\. Use the folder of a whole model",
    ),
    (
        "a folder that does not exist",
        shutil.rmtree,
        r"No model in .*model: there is no such folder, and .*\. Correct the path",
    ),
    # config
    ("config.json missing", only(keep=(WEIGHTS,)), KIND.format(r"weights but no config\.json\. Copy the file there")),
    ("config.json that is no JSON", text("config.json", "{"), JSON.format(r"config\.json", "no JSON")),
    ("config.json that is empty", text("config.json", ""), JSON.format(r"config\.json", "an empty file")),
    ("config.json that is a list", text("config.json", "[]"), JSON.format(r"config\.json", "a list")),
    (
        "generation_config.json that is no JSON",
        text("generation_config.json", "{"),
        JSON.format(r"generation_config\.json", "no JSON"),
    ),
    (
        "a config without model_type",
        config(model_type=None),
        r"config\.json of .*model must name the model_type, got None .*Get the file again",
    ),
    (
        "an unknown model_type",
        config(model_type="llama9"),
        TYPE.format("llama9", r"transformers [\d.]+ does not know it, got it from"),
    ),
    (
        "a model_type with code of its own",
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        TYPE.format("mine", "transformers .* its own code comes with it"),
    ),
    (
        "a text in place of a size",
        config(hidden_size="big"),
        r"must have values that transformers .* can use, got an error .*'hidden_size' expected int, got str.*Get",
    ),
    (
        "a hidden size that the heads do not divide",
        config(num_attention_heads=5),
        r"got an error .*not a multiple of the number of attention heads.*Get the file",
    ),
    (
        "an unknown activation",
        config(hidden_act="nope"),
        TYPE.format("llama", r"transformers cannot build it from its config \(KeyError: 'nope'\)"),
    ),
    (
        "no layers",
        config(num_hidden_layers=0),
        TYPE.format("llama", "LlamaConfig must have a num_hidden_layers of 1 or more, got 0"),
    ),
    (
        "an encoder",
        text("config.json", '{"model_type": "bert", "num_hidden_layers": 3}'),
        TYPE.format("bert", "its BertModel has no list `layers`"),
    ),
    ("an encoder-decoder", text("config.json", '{"model_type": "t5"}'), TYPE.format("t5", "it is an encoder-decoder")),
    (
        "an image classifier",
        text("config.json", '{"model_type": "vit"}'),
        TYPE.format("vit", "transformers builds no causal language model"),
    ),
    (
        "a vision-language model",
        text("config.json", '{"model_type": "llava"}'),
        TYPE.format("llava", "its decoder is a part of a larger model"),
    ),
    (
        "a sequence classifier",
        lambda folder: (tensors(scored)(folder), config(architectures=["LlamaForSequenceClassification"])(folder)),
        r"Cannot prune LlamaForSequenceClassification: it predicts labels or scores .*Use the language",
    ),
    # quantized
    *(
        (
            f"a checkpoint quantized with {method}",
            config(quantization_config={"quant_method": method, **rest}),
            QUANTIZED.format("quantization_config", found),
        )
        for method, rest, found in [
            ("gptq", {"bits": 4, "group_size": 128}, "gptq, 4 bits"),
            ("awq", {"w_bit": 4}, "awq, 4 bits"),
            ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes, 8 bits"),
            ("fp8", {"activation_scheme": "dynamic"}, "fp8"),
            ("compressed-tensors", {"config_groups": {}}, "compressed-tensors"),
            ("torchao", {"quant_type": {}}, "torchao"),
            ("mxfp4", {}, "mxfp4"),
        ]
    ),
    (
        "a compression_config of llm-compressor",
        config(compression_config={"quant_method": "sparse"}),
        QUANTIZED.format("compression_config", "sparse"),
    ),
    (
        "a quantization_config that is a list",
        config(quantization_config=[1]),
        QUANTIZED.format("quantization_config", "unknown"),
    ),
]


@pytest.mark.bad_input("Checkpoints", "{given}")
@pytest.mark.parametrize(("given", "change", "match"), REFUSED, ids=[given for given, *_ in REFUSED])
def test_refused_in_the_same_words(folder, ways, request, tmp_path, given, change, match):
    change(folder)
    request.getfixturevalue("no_weights")  # only now: some changes load the model
    messages = {}
    for way, enter in ways.items():
        with pytest.raises(ValueError, match=match) as error:
            enter(folder)
        messages[way] = str(error.value)
    assert len(set(messages.values())) == 1, messages
    assert "\n" not in messages["the library"]
    assert not (tmp_path / "pruned").exists()


# Not a number


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (UP, torch.nan, r"The weights of decoder layers \[1\] hold NaN or infinity"),
        (HEAD, torch.nan, r"The weights of lm_head\.weight hold NaN or infinity"),
        (EMBEDDING, torch.inf, r"The weights of model\.embed_tokens\.weight hold NaN or infinity"),
        ("model.norm.weight", -torch.inf, r"The weights of model\.norm\.weight hold NaN or infinity"),
    ],
)
@pytest.mark.bad_input("Checkpoints", "NaN or infinity in {name}")
def test_weights_that_are_no_numbers(folder, assets_dir, tmp_path, name, value, match):
    replaced(name, lambda weight: weight.index_fill(0, torch.tensor([5]), value))(folder)
    with pytest.raises(ValueError, match=match):
        ModelSpec(str(folder)).load(assets_dir)
    with pytest.raises(
        ValueError, match=rf"must be finite, got NaN or infinity in {re.escape(name)} of .*\. Use an und"
    ):
        prune_checkpoint(PLAN, None, folder, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


# What is fine


def same(model, other):
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def optimizer_beside(folder):
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "trainer_state.json").write_text("{}")


FINE = [
    ("a checkpoint-500 with optimizer and trainer state", optimizer_beside),
    ("shards", sharded),
    ("fp16 values", tensors(lambda found: {name: tensor.half() for name, tensor in found.items()})),
    ("values of several dtypes", replaced(UP, lambda value: value.bfloat16())),
    ("names without the model's own prefix", named(lambda name: name.removeprefix("model."))),
    (
        "rotary buffers of older releases",
        tensors(
            lambda found: (
                found | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(6)}
            )
        ),
    ),
    (
        "a quantization_config of null",
        lambda folder: (
            config(quantization_config="x")(folder)
            or text("config.json", (folder / "config.json").read_text().replace('"x"', "null"))(folder)
        ),
    ),
]


@pytest.mark.parametrize(("given", "change"), FINE, ids=[given for given, _ in FINE])
@pytest.mark.bad_input("Checkpoints", "{given}", "used as it is")
def test_fine(folder, ways, tmp_path, given, change):
    change(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert same(ways["the library"](folder), expected)
    ways["a dry run"](folder)
    ways["pruning on disk"](folder)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_hidden_layers == 5
    assert not (tmp_path / "pruned/trainer_state.json").exists()


@pytest.mark.bad_input(
    "Checkpoints", "an adapter beside merged weights", "the weights alone, with a warning; the adapter is not copied"
)
def test_an_adapter_beside_the_weights(folder, ways, tmp_path, caplog):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    for way, enter in ways.items():
        own = Path(shutil.copytree(folder, tmp_path / way))  # of each folder there is one warning in a process
        enter(own)
        warning = f"{own} holds the weights of a whole model and an adapter beside them (adapter_config.json)"
        assert caplog.text.count(warning) == 1
    assert not list((tmp_path / "pruned").glob("adapter*"))


# The head and the embedding


@pytest.mark.bad_input(
    "Checkpoints",
    "tie_word_embeddings=true beside an output head of other values",
    "the head of the file, and the flag corrected to false in what is counted and saved",
)
def test_an_untied_head_beside_the_tied_flag(folder, ways, assets_dir, tmp_path, caplog, tiny_tokenizer):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    config(tie_word_embeddings=True)(folder)
    checked = ways["a dry run"](folder)
    assert checked.num_dense_parameters == plain.num_parameters()
    assert "holds lm_head.weight with other values than model.embed_tokens.weight" in caplog.text
    model = ways["the library"](folder)
    assert same(model, plain)
    ways["pruning on disk"](folder)
    save_checkpoint(model, tiny_tokenizer, PruningPlan(num_hidden_layers=6, method="none"), tmp_path / "saved", "base")
    for made in ("saved", "pruned"):
        assert json.loads((tmp_path / made / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / made / WEIGHTS)[HEAD], plain.lm_head.weight)


@pytest.mark.parametrize(
    ("given", "change"),
    [
        (
            "tie_word_embeddings=true beside a head that equals the embedding",
            tensors(lambda t: t | {HEAD: t[EMBEDDING].clone()}),
        ),
        ("tie_word_embeddings=true and the head alone", without(EMBEDDING)),
        ("tie_word_embeddings=true and the embedding alone", without(HEAD)),
    ],
)
@pytest.mark.bad_input("Checkpoints", "{given}", "one matrix for both")
def test_a_tied_head(folder, ways, tmp_path, caplog, given, change):
    config(tie_word_embeddings=True)(folder)
    change(folder)
    checked, model = ways["a dry run"](folder), ways["the library"](folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert checked.num_dense_parameters == model.num_parameters()
    ways["pruning on disk"](folder)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert pruned.config.tie_word_embeddings and torch.equal(pruned.lm_head.weight, model.lm_head.weight)
    assert torch.equal(pruned.model.embed_tokens.weight, model.lm_head.weight)
    assert "other values" not in caplog.text


# Tokenizers


def tokenizer(change):
    """Changes the tokenizer of a folder."""

    def apply(folder):
        loaded = AutoTokenizer.from_pretrained(folder)
        change(loaded)
        loaded.save_pretrained(folder)

    return apply


def lost(*names):
    return tokenizer(lambda loaded: [setattr(loaded, f"{name}_token", None) for name in names])


def files(*keep):
    return lambda folder: [file.unlink() for file in folder.glob("*token*") if file.name not in keep]


def no_eos_anywhere(folder):
    lost("eos", "pad")(folder)
    config(eos_token_id=None)(folder)


BEYOND = (
    r"must have an embedding for every token of the data, got vocab_size={} in .* and tokens {} in 8 of 8 rows\. Use"
)
END = r"must have an embedding for it, got '<\|end\|>' with id {} and vocab_size=258 in .*\. Use the tokenizer"
TOKENIZERS = [
    (
        "no tokenizer",
        files(),
        r"A model needs its tokenizer, got none of tokenizer\.json, .* in .*\. Copy the tokenizer's",
    ),
    ("tokenizer_config.json alone", files("tokenizer_config.json"), r"A model needs its tokenizer, got none of .*Copy"),
    ("tokenizer.json that is no JSON", text("tokenizer.json", "{"), JSON.format(r"tokenizer\.json", "no JSON")),
    (
        "tokenizer.json of another format",
        text("tokenizer.json", '{"model": 3}'),
        r"Cannot load the tokenizer of .*, got .*Save it again",
    ),
    (
        "tokenizer_config.json that is no JSON",
        text("tokenizer_config.json", "{"),
        JSON.format(r"tokenizer_config\.json", "no JSON"),
    ),
    (
        "a tokenizer without end-of-text token, nor one in the config",
        no_eos_anywhere,
        r"got a tokenizer without one \(eos_token\) in .* and eos_token_id=None .*Set eos_token in",
    ),
    (
        "an end-of-text token beyond the vocabulary",
        tokenizer(lambda t: t.add_special_tokens({"eos_token": "<|end|>"})),
        END.format(258),
    ),
    (
        "end-of-text and padding tokens beyond the vocabulary",
        tokenizer(lambda t: t.add_special_tokens({"pad_token": "[PAD]", "eos_token": "<|end|>"})),
        END.format(259),
    ),
    (
        "an added token beyond the vocabulary that the data have",
        tokenizer(lambda t: t.add_tokens(["red"])),
        BEYOND.format(258, r"'red' \(258\)"),
    ),
]


@pytest.mark.parametrize(("given", "change", "match"), TOKENIZERS, ids=[given for given, *_ in TOKENIZERS])
@pytest.mark.bad_input("Checkpoints", "{given}")
def test_a_tokenizer_is_refused(folder, dry_run, assets_dir, no_weights, given, change, match):
    change(folder)
    with pytest.raises(ValueError, match=match) as error:
        dry_run(folder)
    if "the data have" not in given:  # the library knows no data
        with pytest.raises(ValueError, match=re.escape(str(error.value))):
            ModelSpec(str(folder)).load_tokenizer(assets_dir)


@pytest.mark.bad_input(
    "Checkpoints", "the tokenizer of a model with a larger vocabulary", "error: must have an embedding for every token"
)
def test_a_vocabulary_that_is_too_small(folder, dry_run, no_weights):
    config(vocab_size=100)(folder)
    tensors(lambda found: found | {name: found[name][:100] for name in (HEAD, EMBEDDING)})(folder)
    with pytest.raises(ValueError, match=BEYOND.format(100, r"'Ġ' \(222\)")):
        dry_run(folder)


@pytest.mark.bad_input(
    "Checkpoints", "a padding token beyond the vocabulary", "the end-of-text token pads, with a warning"
)
def test_a_padding_token_beyond_the_vocabulary(folder, dry_run, assets_dir, caplog):
    tokenizer(lambda loaded: loaded.add_special_tokens({"pad_token": "[PAD]"}))(folder)
    loaded = dry_run(folder).tokenizer
    assert (loaded.pad_token, loaded.pad_token_id) == ("</s>", 1)
    assert "has no embedding for the padding token '[PAD]' (id 258, vocab_size=258)" in caplog.text
    assert "'</s>' pads instead" in caplog.text
    assert without_added_padding(loaded).pad_token == "[PAD]"  # as its source has it
    model = ModelSpec(str(folder)).load(assets_dir)
    ids = loaded(["a", "long text"], padding=True, return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


@pytest.mark.bad_input("Checkpoints", "an added token beyond the vocabulary that no row has", "used as it is")
def test_an_unused_token_beyond_the_vocabulary(folder, dry_run, caplog):
    tokenizer(lambda loaded: loaded.add_tokens(["<|im_start|>"], special_tokens=True))(folder)
    assert max(dry_run(folder).rows[0].input_ids) < 258
    assert "vocab_size" not in caplog.text


@pytest.mark.parametrize(
    ("given", "change", "said"),
    [
        ("a tokenizer without end-of-text token", lost("eos"), True),
        ("a tokenizer without end-of-text and padding token", lost("eos", "pad"), True),
        ("tokenizer.json alone", files("tokenizer.json"), True),
        ("a tokenizer without start-of-text token", lost("bos"), False),
        ("a tokenizer without padding token", lost("pad"), False),
    ],
)
@pytest.mark.bad_input(
    "Checkpoints", "{given}", "the same tokens as before; an end-of-text token of the config is named"
)
def test_special_tokens_that_a_tokenizer_lacks(folder, dry_run, caplog, given, change, said):
    expected = dry_run(folder).rows
    before = AutoTokenizer.from_pretrained(folder)
    change(folder)
    checked = dry_run(folder)
    assert checked.rows == expected and checked.rows[0].input_ids[-1] == before.eos_token_id
    assert checked.tokenizer.pad_token_id == 1
    assert ("no end-of-text token (eos_token): '</s>' is used, which config.json names" in caplog.text) == said
    saved = without_added_padding(checked.tokenizer)
    assert saved.special_tokens_map == AutoTokenizer.from_pretrained(folder).special_tokens_map


# Chat templates


@pytest.mark.bad_input("Checkpoints", "a chat template that writes the start-of-text token itself", "one such token")
def test_a_start_token_in_the_chat_template(folder, dry_run):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    config_file = folder / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"add_bos_token": True}))
    ids = dry_run(folder, chat_template=True).rows[0].input_ids
    assert ids[0] == 0 and ids.count(0) == 1


@pytest.mark.parametrize(
    ("given", "template", "match"),
    [
        (
            "no chat template",
            None,
            r"model\.chat_template=true needs a tokenizer with a chat template.*Use the instruct",
        ),
        (
            "a chat template with a syntax error",
            "{% for %}",
            r"template must render .*, got TemplateSyntaxError: .*Correct",
        ),
        (
            "a chat template that wants a system message",
            "{{ raise_exception('System first.') }}",
            r"template must render a single message of the user, got TemplateError: System first\. Correct",
        ),
    ],
)
@pytest.mark.bad_input("Checkpoints", "{given}, and model.chat_template=true")
def test_a_chat_template_is_refused(folder, dry_run, no_weights, given, template, match):
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=match):
        dry_run(folder, chat_template=True)
    if template is not None:
        with pytest.raises(ValueError, match=match):
            render_prompt(AutoTokenizer.from_pretrained(folder), "Why?")


# Paths


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("", r"model\.path must name a model, got ''\. Give it a Hub id such as .*, or a local folder"),
        (
            "/no/such/model",
            r"No model in /no/such/model: there is no such folder, and /no/such does not exist either\. Corr",
        ),
        ("~/no/such/model", r"No model in .*/no/such/model: there is no such folder"),
        (
            "./tests-of-nothing",
            r"No model in .*: there is no such folder, and .* holds the folders .* Correct the path",
        ),
        ("packaged:smolm2", r"Unknown packaged model 'smolm2'\. Known: smollm2-135m"),
        (
            "random:lama",
            r"random: must be followed by a model type, got 'lama' \(did you mean 'llama'\?\)\. Supported: llama",
        ),
    ],
)
@pytest.mark.bad_input("Checkpoints", "model.path={path}")
def test_a_path_of_no_model(dry_run, path, match):
    with pytest.raises(ValueError, match=match):
        dry_run(path)


def test_the_folders_beside_a_missing_one_are_named(dry_run, tmp_path):
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path} holds the folders llama-7b\. Correct the path"):
        dry_run(tmp_path / "lama-7b")


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog):
    caplog.set_level(logging.WARNING)
