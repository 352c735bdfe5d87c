"""Checkpoints that do not hold what their config says, hold more than that, or are quantized."""

import importlib.util
import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from gradpruner.models.assets import AssetError
from gradpruner.models.loading import check_checkpoint, check_not_quantized
from gradpruner.models.spec import ModelSpec

LAYER = "model.layers.1."


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


@pytest.mark.parametrize(
    ("prefix", "advice"),
    [
        ("_orig_mod.", r"torch\.compile: save model\._orig_mod"),
        ("module.", r"DistributedDataParallel: save model\.module"),
        ("base_model.model.", r"peft: save the result of merge_and_unload"),
        ("student.", r"Save the model again without the prefix"),
    ],
)
def test_a_prefix_is_refused_by_name(checkpoint, assets_dir, no_weights, prefix, advice):
    folder = checkpoint(prefixed(prefix))
    message = (
        rf"The weights in {folder} do not fit .* they lack 57 tensors \(lm_head\.weight, .* and 54 more\); they also "
    )
    message += rf"hold 57 tensors \({prefix}lm_head\.weight, .*seem to have the prefix '{prefix}'\. .*{advice}"
    with pytest.raises(ValueError, match=message):
        ModelSpec(str(folder)).load(assets_dir)


def test_two_prefixes_are_taken_for_one(checkpoint, assets_dir):
    with pytest.raises(ValueError, match=r"the prefix 'module\._orig_mod\.'.*torch\.compile.*DistributedDataParallel"):
        ModelSpec(str(checkpoint(prefixed("module._orig_mod.")))).load(assets_dir)


def test_missing_layers_are_refused(checkpoint, assets_dir, no_weights):
    folder = checkpoint(without(LAYER))
    message = rf"they lack 9 tensors \({LAYER}input_layernorm\.weight, .* and 6 more\)\. .*Give model\.path a complete"
    with pytest.raises(ValueError, match=message):
        ModelSpec(str(folder)).load(assets_dir)


def test_a_config_with_too_few_layers_is_refused(checkpoint, assets_dir, no_weights):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    message = r"they also hold 9 tensors \(model\.layers\.5\.input_layernorm\.weight, "
    with pytest.raises(ValueError, match=message) as error:
        ModelSpec(str(folder)).load(assets_dir)
    assert "lack" not in str(error.value)
    assert "prefix" not in str(error.value)
    assert "random" not in str(error.value)


def test_wrong_shapes_are_refused(checkpoint, assets_dir, no_weights):
    def change(tensors):
        return tensors | {f"{LAYER}mlp.down_proj.weight": torch.zeros(32, 40)}

    message = rf"have other shapes in 1 tensor \({LAYER}mlp\.down_proj\.weight \(is \(32, 40\), must be \(32, 48\)\)\)"
    with pytest.raises(ValueError, match=message):
        ModelSpec(str(checkpoint(change))).load(assets_dir)


def test_a_missing_head_is_refused(checkpoint, assets_dir, no_weights):
    with pytest.raises(ValueError, match=r"they lack 1 tensor \(lm_head\.weight\)"):
        ModelSpec(str(checkpoint(without("lm_head")))).load(assets_dir)


def test_missing_embeddings_are_refused_if_tied(checkpoint, assets_dir, no_weights):
    with pytest.raises(ValueError, match=r"they lack 2 tensors \(lm_head\.weight, model\.embed_tokens\.weight\)"):
        ModelSpec(str(checkpoint(without("embed_tokens"), tie_word_embeddings=True))).load(assets_dir)


def test_a_tied_head_may_be_missing(checkpoint, assets_dir, tiny_llama):
    folder = checkpoint(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = ModelSpec(str(folder)).load(assets_dir)
    assert states_are_equal(loaded, tiny_llama(tie_word_embeddings=True))


def test_old_rotary_buffers_are_fine(checkpoint, assets_dir, tiny_llama):
    def change(tensors):
        return tensors | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(6)}

    assert states_are_equal(ModelSpec(str(checkpoint(change))).load(assets_dir), tiny_llama())


def test_names_without_the_models_own_prefix_are_fine(checkpoint, assets_dir, tiny_llama):
    """As transformers adds it, which checkpoints of the bare decoder need."""
    folder = checkpoint(lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert states_are_equal(ModelSpec(str(folder)).load(assets_dir), tiny_llama())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_fine(checkpoint, dtype):
    folder = checkpoint(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    check_checkpoint(folder, AutoConfig.from_pretrained(folder))


def shards(tiny_llama, folder):
    tiny_llama().save_pretrained(folder, max_shard_size=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return files


def test_shards_are_read_together(tiny_llama, tmp_path, assets_dir):
    files = shards(tiny_llama, tmp_path)
    assert states_are_equal(ModelSpec(str(tmp_path)).load(assets_dir), tiny_llama())
    tensors = load_file(files[1])
    lost = sorted(tensors)[0]
    save_file({name: tensors[name] for name in tensors if name != lost}, files[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"they lack 1 tensor \({lost}\)"):
        ModelSpec(str(tmp_path)).load(assets_dir)


def test_a_missing_shard(tiny_llama, tmp_path, assets_dir, no_weights):
    lost = shards(tiny_llama, tmp_path)[1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"names a file that is missing: {lost}\. Download or save"):
        ModelSpec(str(tmp_path)).load(assets_dir)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index(tiny_llama, tmp_path, assets_dir, no_weights, text):
    shards(tiny_llama, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AssetError, match=r"must hold a weight_map, got .*index\.json\. The file is damaged: down"):
        ModelSpec(str(tmp_path)).load(assets_dir)


def test_a_truncated_file(checkpoint, assets_dir, no_weights):
    file = checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file} must be a safetensors file, got one that is damaged .*Download or"):
        ModelSpec(str(file.parent)).load(assets_dir)


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


def test_what_is_no_folder_passes_the_check(checkpoint):
    check_checkpoint("a/b", AutoConfig.from_pretrained(checkpoint()))


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


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_refused(merged, assets_dir, with_config):
    model, folder = merged
    if with_config:
        model.config.save_pretrained(folder)
    message = rf"No model in {folder}: it holds an adapter alone \(adapter_config\.json\)\. Merge the adapter into "
    for use in (ModelSpec(str(folder)).load, ModelSpec(str(folder)).load_config):
        with pytest.raises(AssetError, match=message):
            use(assets_dir)


# Devices


def test_weights_go_straight_to_a_device(checkpoint, assets_dir, monkeypatch):
    """The meta device stands in for a GPU; on it nothing but the arguments can be looked at."""
    folder, real = checkpoint(), AutoModelForCausalLM.from_pretrained
    given = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: given.append(kwargs) or real(*args, **kwargs)
    )
    monkeypatch.setattr("gradpruner.models.spec.default_device", lambda: torch.device("meta"))
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

QUANTIZED = r"Cannot prune a quantized checkpoint, got {} with a quantization_config \(method {}\): .*Give model\.path "


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "awq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes, 8 bits"),
        ({"load_in_4bit": True}, "unknown, 4 bits"),
        ({}, "unknown"),
    ],
)
def test_a_quantized_config_is_refused(checkpoint, assets_dir, no_weights, quantization, method):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for use in (ModelSpec(str(folder)).load_config, ModelSpec(str(folder)).load):
        with pytest.raises(ValueError, match=QUANTIZED.format(folder, method)):
            use(assets_dir)


def test_a_null_quantization_config_is_fine(checkpoint, assets_dir):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    ModelSpec(str(folder)).load(assets_dir)


def test_a_settings_object_is_refused_as_its_dict_is(tiny_llama):
    config = tiny_llama().config
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=QUANTIZED.format("somewhere", "bitsandbytes, 4 bits")):
        check_not_quantized(config, "somewhere")


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
