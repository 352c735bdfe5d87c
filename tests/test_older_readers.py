"""Keys for readers of before transformers 5; `make test-transformers4` tries them with transformers 4 itself."""

import json

import pytest
import torch
from test_architectures import make_config
from tiny_tokenizers import CHAT_TEMPLATE, TOKENIZERS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.older_readers import add_older_keys, older_config, older_tokenizer_config
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan

PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 4), method="test")
TEXTS = ("The café on 3rd Street", "  two spaces, 1987\n\n", "<|user|>Hi</s> there", "Δ你")
THETA = {"rope_theta": 5e5}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
# Name, case of test_architectures, `rope_parameters`, older keys.
ROPES = {
    "another rope_theta": ("llama", {"rope_type": "default", **THETA}, THETA),
    "rope of Llama 3": (
        "llama-tied",
        {"rope_type": "llama3", **THETA, **LLAMA3},
        {**THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "linear rope": (
        "mistral",
        {"rope_type": "linear", **THETA, "factor": 4.0},
        {**THETA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "dynamic rope of OLMo 2": (
        "olmo2",
        {"rope_type": "dynamic", **THETA, "factor": 4.0},
        {**THETA, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    "YaRN": (
        "qwen3",
        {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": 32},
        {**THETA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "YaRN without the length of the training": (
        "qwen2",
        {"rope_type": "yarn", **THETA, "factor": 4.0},
        {**THETA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "rope on a part of each head": (
        "phi3",
        {"rope_type": "default", **THETA, "partial_rotary_factor": 0.5},
        {**THETA, "partial_rotary_factor": 0.5},
    ),
    "LongRoPE of Phi-3": (
        "phi3-tied",
        {"rope_type": "longrope", **THETA, **FACTORS, "original_max_position_embeddings": 8},
        {
            **THETA,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 8,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
    ),
    "two ropes of Gemma 3": (
        "gemma3",
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None]).logits


def make_dense(case, rope, dtype=torch.float32):
    changes = {"original_max_position_embeddings": 8} if rope.get("rope_type") == "longrope" else {}
    config = make_config(case, rope_parameters=json.loads(json.dumps(rope)), **changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.filterwarnings("ignore:This model config has set a `rope_parameters")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.bad_input("What is saved", "{name}", "older keys that say the same"))
        for name in ROPES
    ],
)
def test_both_writers_add_the_keys_and_give_the_same_model(name, dtype, tiny_tokenizer, tmp_path):
    case, rope, expected = ROPES[name]
    dense = make_dense(case, rope, dtype)
    dense.save_pretrained(tmp_path / "dense")
    prune_checkpoint(PLAN, None, tmp_path / "dense", tmp_path / "streamed")
    model = apply_plan(dense, PLAN)
    save_checkpoint(model, tiny_tokenizer, PLAN, tmp_path / "saved", "tiny")
    config = read(tmp_path / "saved")
    assert older_config(config) == {**expected, "torch_dtype": str(dtype).removeprefix("torch.")}
    assert config == {**config, **older_config(config)} == read(tmp_path / "streamed")
    for folder in ("saved", "streamed"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.dtype == dtype
        assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    add_older_keys(tmp_path / "again")
    assert {key: read(tmp_path / "again")[key] for key in older_config(config)} == older_config(config)


def test_a_config_of_transformers_4_needs_no_more():
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16"}
    assert older_config(config) == {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.bad_input(
                "What is saved", "the tokenizer: {name}", "the same tokens under a class that transformers 4 knows"
            ),
        )
        for name in TOKENIZERS
    ],
)
def test_tokenizers_stay_what_they_are(name, tiny_llama, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = CHAT_TEMPLATE
    source = tmp_path / "dense"
    tiny_llama(vocab_size=800).save_pretrained(source)
    tokenizer.save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    save_checkpoint(apply_plan(tiny_llama(vocab_size=800), PLAN), tokenizer, PLAN, tmp_path / "saved", "tiny")
    prune_checkpoint(PLAN, None, source, tmp_path / "streamed")
    for folder in (tmp_path / "saved", tmp_path / "streamed"):
        config, loaded = read(folder, "tokenizer_config.json"), AutoTokenizer.from_pretrained(folder)
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert isinstance(config.get("extra_special_tokens", {}), dict)  # transformers 4 calls its keys()
        assert "token_type_ids" not in config["model_input_names"]
        assert older_tokenizer_config(config) == config
        for text in TEXTS:
            encoded = tokenizer(text)
            assert dict(loaded(text)) == dict(encoded)
            assert loaded.decode(encoded["input_ids"]) == tokenizer.decode(encoded["input_ids"])
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.extra_special_tokens == tokenizer.extra_special_tokens
        assert loaded.padding_side == tokenizer.padding_side
        assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("of transformers 4", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ("with code of its own", {"tokenizer_class": "Own", "backend": "tokenizers", "auto_map": {}}),
        ("of an unknown class", {"tokenizer_class": "Own", "backend": "tokenizers"}),
        ("without a class", {"backend": "tokenizers"}),
    ],
)
@pytest.mark.bad_input("What is saved", "a tokenizer_config.json {kind}", "the file unchanged")
def test_other_tokenizer_configs_are_unchanged(kind, config):
    assert older_tokenizer_config(config) == config


@pytest.mark.parametrize("text", ["{", "[1]", ""])
@pytest.mark.bad_input(
    "What is saved", "a tokenizer_config.json with {text!r}", "error: tokenizer_config.json must hold a JSON object"
)
def test_damaged_tokenizer_config_is_refused_before_the_weights(text, tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text(text)
    match = r"tokenizer_config\.json must hold a JSON object, got .*\. Download or save the checkpoint again\."
    with pytest.raises(ValueError, match=match):
        prune_checkpoint(PLAN, None, tmp_path / "dense", tmp_path / "pruned")
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("kind", ["without", "with"])
@pytest.mark.bad_input(
    "What is saved", "a tokenizer {kind} chat template, without padding token", "the same in the checkpoint"
)
def test_chat_template_and_generation_config_come_along(kind, tiny_llama, tmp_path):
    template = CHAT_TEMPLATE if kind == "with" else None
    tokenizer, model = TOKENIZERS["generic"](), tiny_llama(vocab_size=800, pad_token_id=None)
    tokenizer.chat_template = template
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], do_sample=True, temperature=0.6, top_p=0.9)
    source = tmp_path / "dense"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    prune_checkpoint(PLAN, None, source, tmp_path / "streamed")
    save_checkpoint(apply_plan(model, PLAN), tokenizer, PLAN, tmp_path / "saved", "tiny")
    for folder in (tmp_path / "saved", tmp_path / "streamed"):
        assert (folder / "chat_template.jinja").is_file() == (template is not None)
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
        settings = GenerationConfig.from_pretrained(folder)
        assert (settings.eos_token_id, settings.temperature, settings.pad_token_id) == ([1, 2], 0.6, None)
        assert read(folder)["pad_token_id"] is None
        assert "pad_token" not in read(folder, "tokenizer_config.json")


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("case", "pruned", "expected"),
    [
        ("qwen2", (1, 4), {"layer_types": [FULL] * 3 + [SLIDING], "max_window_layers": 3}),
        ("qwen2", (4, 5), {"layer_types": [FULL] * 4, "max_window_layers": 4}),
        ("qwen2-tied", (1, 4), {"layer_types": [FULL] * 4, "max_window_layers": 4}),  # 28 by default
        ("qwen3", (0, 1), {"layer_types": [SLIDING] * 4, "max_window_layers": 0}),
        ("gemma2", (1, 3), {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("gemma3", (0, 2), {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("smollm3", (0, 4), {"layer_types": [FULL] * 4, "no_rope_layers": [1, 0, 1, 0]}),
    ],
)
@pytest.mark.bad_input("What is saved", "{case} without layers {pruned}", "every entry by depth for the kept layers")
def test_entries_by_depth(case, pruned, expected, tiny_tokenizer, tmp_path):
    plan = PruningPlan(num_hidden_layers=6, pruned_layers=pruned, method="test")
    dense = AutoModelForCausalLM.from_config(make_config(case)).eval()
    dense.save_pretrained(tmp_path / "dense")
    prune_checkpoint(plan, None, tmp_path / "dense", tmp_path / "streamed")
    save_checkpoint(apply_plan(dense, plan), tiny_tokenizer, plan, tmp_path / "saved", "tiny")
    for folder in ("saved", "streamed"):
        found = read(tmp_path / folder)
        assert {key: found[key] for key in ("num_hidden_layers", *expected)} == {"num_hidden_layers": 4, **expected}


def test_a_tokenizer_without_tokenizer_json_is_unchanged(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    text = '{"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}'
    (tmp_path / "tokenizer_config.json").write_text(text)
    add_older_keys(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == text
