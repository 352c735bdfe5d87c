"""Weights that are not those of the config, beside an adapter or on a device; `test_checkpoint_inputs.py` has more."""

import importlib.util
import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from gradpruner.models.loading import check_checkpoint
from gradpruner.models.spec import ModelSpec


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    """Returns `checkpoint(change, **config)`: a folder with a tiny Llama whose tensors went through `change`."""

    def make(change=dict, **config):
        folder = tmp_path / "checkpoint"
        tiny_llama(**config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Makes reading weights through the automatic class an error."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def states_are_equal(model, other):
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Tensors


@pytest.mark.bad_input(
    "Checkpoints",
    "names with two prefixes, module. and _orig_mod.",
    "error: the names seem to have the prefix 'module._",
)
def test_two_prefixes_are_taken_for_one(checkpoint, assets_dir):
    with pytest.raises(ValueError, match=r"the prefix 'module\._orig_mod\.'.*torch\.compile.*DistributedDataParallel"):
        ModelSpec(str(checkpoint(prefixed("module._orig_mod.")))).load(assets_dir)


@pytest.mark.bad_input(
    "Checkpoints", "tied, neither head nor embedding", "error: they lack 2 tensors (lm_head.weight, "
)
def test_missing_embeddings_are_refused_if_tied(checkpoint, assets_dir, no_weights):
    with pytest.raises(ValueError, match=r"they lack 2 tensors \(lm_head\.weight, model\.embed_tokens\.weight\)"):
        ModelSpec(str(checkpoint(without("embed_tokens"), tie_word_embeddings=True))).load(assets_dir)


def shards(tiny_llama, folder):
    tiny_llama().save_pretrained(folder, max_shard_size=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return files


@pytest.mark.bad_input("Checkpoints", "a tensor missing from one of the shards", "error: they lack 1 tensor")
def test_shards_are_read_together(tiny_llama, tmp_path, assets_dir):
    files = shards(tiny_llama, tmp_path)
    assert states_are_equal(ModelSpec(str(tmp_path)).load(assets_dir), tiny_llama())
    tensors = load_file(files[1])
    lost = sorted(tensors)[0]
    save_file({name: tensors[name] for name in tensors if name != lost}, files[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"they lack 1 tensor \({lost}\)"):
        ModelSpec(str(tmp_path)).load(assets_dir)


def test_the_check_reads_no_values(checkpoint, no_weights):
    """A file whose values are a hole of 4 GB passes."""
    folder = checkpoint(num_hidden_layers=1)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 2**24
    header, offset = {}, 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        shape = [config.vocab_size, 32] if tensor.shape[0] == 258 else list(tensor.shape)
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    check_checkpoint(folder, config)


def test_the_check_leaves_config_and_logging_alone(checkpoint):
    folder = checkpoint()
    config = AutoConfig.from_pretrained(folder)
    before, verbosity = config.to_dict(), transformers_logging.get_verbosity()
    check_checkpoint(folder, config)
    assert config.to_dict() == before
    assert config.name_or_path == str(folder)
    assert transformers_logging.get_verbosity() == verbosity


# Adapters


@pytest.fixture
def merged(tiny_llama, tmp_path):
    """A model into which an adapter is merged, with that adapter beside it."""
    lora = LoraConfig(r=2, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "merged"
    model.save_pretrained(folder)
    return model.merge_and_unload(), folder


@pytest.mark.bad_input(
    "Checkpoints", "an adapter beside the weights that it is merged into", "the merged weights' logits"
)
def test_an_adapter_beside_merged_weights_is_not_applied_again(merged, assets_dir, caplog):
    model, folder = merged
    model.save_pretrained(folder)
    loaded = ModelSpec(str(folder)).load(assets_dir)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert states_are_equal(loaded, model)
    assert (
        f"{folder} holds the weights of a whole model and an adapter beside them (adapter_config.json)" in caplog.text
    )


def test_without_the_precaution_the_adapter_would_be_applied(merged):
    """If this fails, transformers has changed and `NO_ADAPTER` may have become superfluous."""
    model, folder = merged
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, model(ids).logits)


def test_no_warning_without_an_adapter(checkpoint, assets_dir, caplog):
    caplog.set_level(logging.WARNING)
    ModelSpec(str(checkpoint())).load(assets_dir)
    assert "adapter" not in caplog.text


# Devices


def test_weights_go_straight_to_a_device(checkpoint, assets_dir, monkeypatch):
    """The meta device stands in for a GPU; on it nothing but the arguments can be looked at."""
    folder, real = checkpoint(), AutoModelForCausalLM.from_pretrained
    given = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: given.append(kwargs) or real(*args, **kwargs)
    )
    monkeypatch.setattr("gradpruner.models.spec.default_device", lambda: torch.device("meta"))
    monkeypatch.setattr("gradpruner.models.spec.check_finite_weights", lambda model: None)
    model = ModelSpec(str(folder), dtype="float32").load(assets_dir)
    assert [kwargs["device_map"] for kwargs in given] == [{"": torch.device("meta")}]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not hasattr(model, "hf_device_map")  # the Trainer would take it for a model spread over devices


def test_on_a_cpu_no_device_map_is_given(checkpoint, assets_dir, monkeypatch):
    folder, real = checkpoint(), AutoModelForCausalLM.from_pretrained
    given = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: given.append(kwargs) or real(*args, **kwargs)
    )
    ModelSpec(str(folder)).load(assets_dir)
    assert [kwargs["device_map"] for kwargs in given] == [None]


@pytest.mark.gpu
def test_weights_on_a_gpu(checkpoint, assets_dir, tiny_llama):
    model = ModelSpec(str(checkpoint()), dtype="float32").load(assets_dir)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
    assert states_are_equal(model.cpu(), tiny_llama())


# Quantized weights

QUANTIZED = (
    r"Cannot prune a quantized checkpoint, got {} with a quantization_config \(method {}\): .*Use the checkpoint"
)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_a_real_bitsandbytes_folder_is_refused(tiny_llama, tmp_path, assets_dir):
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    model.save_pretrained(tmp_path / "quantized")
    for use in (ModelSpec(str(tmp_path / "quantized")).load_config, ModelSpec(str(tmp_path / "quantized")).load):
        with pytest.raises(ValueError, match=QUANTIZED.format(tmp_path / "quantized", "bitsandbytes, 4 bits")):
            use(assets_dir)
