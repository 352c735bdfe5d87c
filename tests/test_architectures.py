"""Every supported architecture from end to end, on tiny random models, and the models that are refused."""

import copy
import json
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
    ViTConfig,
)

from gradpruner.grad_pruner import GradPruner
from gradpruner.models.architectures import (
    SUPPORTED_MODEL_TYPES,
    check_model,
    check_supported,
    decoder_layers,
    empty_model,
    linear_sublayers,
    lora_targets,
    shrink_config,
)
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan, make_plan
from gradpruner.surgery import apply_plan, drop_layers

LENGTH = 12  # longer than the window
WINDOW = 4
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
# Model type and its settings besides `TINY`: biases, window layers by the rule of each type, layers without positions.
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-tied": ("gemma2", GEMMA | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3}),
    "gemma3-tied": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3}),
    "smollm3-tied": (
        "smollm3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True}),
}
TINY = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
METHOD = GradPruner(num_pruned_layers=2, merge_count=1, steps=2, batch_size=2, lora_rank=2)
# Attributes of a layer's modules that hold its kind; `layer_idx` holds its position.
KIND = ("layer_type", "sliding_window", "is_sliding", "use_rope")


def make_config(name, **changes):
    model_type, config = CASES[name]
    return AutoConfig.for_model(model_type, **(TINY | config | changes))


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def make_model():
    """Returns a factory of random models of `CASES`, with 1-D parameters that differ from layer to layer."""

    def make(name, **changes):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(name, **changes))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are constant by default, which would hide a swapped one
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture
def batches(make_batches):
    return make_batches(2, length=LENGTH)


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def kinds_of(model):
    return [
        {key: getattr(layer.self_attn, key) for key in KIND if hasattr(layer.self_attn, key)}
        for layer in decoder_layers(model)
    ]


def lists_of(config):
    keys = ("layer_types", "no_rope_layers")
    return {key: list(getattr(config, key)) for key in keys if getattr(config, key, None) is not None}


def built_by_hand(dense, kept):
    """Returns a shallower model of the same class: its config goes through JSON, its weights are renamed one by one."""
    entries = json.loads(dense.config.to_json_string(use_diff=False))
    for key in lists_of(dense.config):
        entries[key] = [entries[key][layer] for layer in kept]
    entries["num_hidden_layers"] = len(kept)
    reference = type(dense)(type(dense.config).from_dict(entries)).eval()
    state = {}
    for key, value in dense.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if match is None:
            state[key] = value
        elif int(match[1]) in kept:
            state[f"model.layers.{kept.index(int(match[1]))}.{match[2]}"] = value
    reference.load_state_dict(state, strict=True)
    return reference


def check_generation(model, batch):
    """Checks that tokens and scores are the same with and without the cache, past the window."""
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    cached = model.generate(**prompt, **settings, use_cache=True, output_logits=True)
    plain = model.generate(**prompt, **settings, use_cache=False, output_logits=True)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


def reload(model, folder):
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def test_every_supported_type_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(SUPPORTED_MODEL_TYPES)
    for model_type in SUPPORTED_MODEL_TYPES:
        ties = {make_config(name).tie_word_embeddings for name in CASES if CASES[name][0] == model_type}
        assert ties == {True, False}


def test_compress_generate_save_reload_and_compress_again(name, make_model, batches, tmp_path):
    dense = make_model(name)
    original, kinds = copy.deepcopy(dense), kinds_of(dense)
    model, plan, _ = vars(METHOD.compress(dense, batches)).values()
    kept = list(plan.kept_layers)
    assert (len(kept), len(plan.absorbed_by)) == (4, 1)
    assert kinds_of(model) == [kinds[layer] for layer in kept]
    check_generation(model, batches[0])

    loaded = reload(model, tmp_path / "once")
    assert kinds_of(loaded) == kinds_of(model)
    assert lists_of(loaded.config) == lists_of(model.config)
    assert torch.equal(logits_of(loaded, batches[0]), logits_of(model, batches[0]))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == original.config.tie_word_embeddings
    check_generation(loaded, batches[0])

    again = METHOD.compress(loaded, batches)
    assert kinds_of(again.model) == [kinds[kept[layer]] for layer in again.plan.kept_layers]
    twice = reload(again.model, tmp_path / "twice")
    assert torch.equal(logits_of(twice, batches[0]), logits_of(again.model, batches[0]))


# All layers, a mix, and layers of only one kind.
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 2, 5), (1, 3), (0, 1), (4, 5), (2, 5), (3, 4), (0, 3)])
def test_kept_layers_stay_what_they_are(name, kept, make_model, batches, tmp_path):
    dense = make_model(name)
    kinds, before = kinds_of(dense), logits_of(dense, batches[0])
    reference = built_by_hand(dense, kept)
    drop_layers(dense, kept)
    assert kinds_of(dense) == kinds_of(reference) == [kinds[layer] for layer in kept]
    assert [layer.self_attn.layer_idx for layer in decoder_layers(dense)] == list(range(len(kept)))
    assert torch.equal(logits_of(dense, batches[0]), logits_of(reference, batches[0]))
    assert torch.equal(logits_of(dense, batches[0]), before) == (len(kept) == 6)
    loaded = reload(dense, tmp_path)
    assert kinds_of(loaded) == kinds_of(dense)
    assert torch.equal(logits_of(loaded, batches[0]), logits_of(dense, batches[0]))
    check_generation(dense, batches[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2", {"layer_types": [FULL] * 4 + [SLIDING] * 2}),
        ("qwen3", {"layer_types": [FULL] * 2 + [SLIDING] * 4}),
        ("gemma2", {"layer_types": [SLIDING, FULL] * 3}),
        ("gemma3", {"layer_types": [SLIDING, SLIDING, FULL] * 2}),
        ("smollm3", {"layer_types": [FULL] * 6, "no_rope_layers": [1, 1, 0] * 2}),
        ("smollm3-tied", {"layer_types": [FULL, SLIDING] * 3, "no_rope_layers": [1, 0] * 3}),
    ],
)
def test_cases_mix_kinds_by_the_rule_of_their_type(name, expected, make_model, batches):
    model = make_model(name)
    assert lists_of(model.config) == expected
    # The kinds matter for these inputs: with all layers of the first kind, the logits differ.
    for key, values in expected.items():
        if len(set(values)) > 1:
            same_kind = make_model(name, **{key: [values[0]] * 6})
            same_kind.load_state_dict(model.state_dict())
            assert not torch.allclose(logits_of(same_kind, batches[0]), logits_of(model, batches[0]), atol=1e-3)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "smollm3-tied"])
def test_rules_by_position_are_written_out_before_layers_leave(name):
    config = make_config(name)
    expected = {key: [values[layer] for layer in (1, 3, 4, 5)] for key, values in lists_of(config).items()}
    for key in expected:
        setattr(config, key, None)  # now only the rule says it
    shorter = shrink_config(config, (1, 3, 4, 5))
    assert lists_of(shorter) == expected
    assert lists_of(type(config).from_dict(shorter.to_diff_dict())) == expected
    assert not lists_of(config)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "smollm3-tied"])
def test_surgery_and_shrunk_config_agree(name, make_model):
    model = make_model(name)
    expected = shrink_config(model.config, (0, 1, 4))
    config = model.config
    drop_layers(model, (0, 1, 4))
    assert model.config is config
    assert config.to_dict() == expected.to_dict()


def test_sublayers_follow_the_architecture(make_model):
    fused = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    model = make_model("phi3")
    assert set(linear_sublayers(decoder_layers(model)[0])) == fused
    assert lora_targets(model) == sorted(name.rsplit(".", 1)[-1] for name in fused)


def test_merge_changes_linear_weights_only(name, make_model):
    dense = make_model(name)
    before = {key: value.clone() for key, value in decoder_layers(dense)[1].state_dict().items()}
    plan = make_plan([5.0, 5.0, 1.0, 5.0, 5.0, 5.0], 1, 1, density=0.5)

    def igia(layer, sublayer):
        return torch.rand_like(linear_sublayers(layers[layer])[sublayer].weight)

    layers = list(decoder_layers(dense))
    apply_plan(dense, plan, igia)
    weights = {f"{sublayer}.weight" for sublayer in linear_sublayers(layers[1])}
    changed = {
        key for key, value in decoder_layers(dense)[1].state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == weights


def test_random_models_of_every_type(tmp_path):
    """`random:<model_type>` goes through the same check as a checkpoint."""
    for model_type in SUPPORTED_MODEL_TYPES:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        spec = ModelSpec(f"random:{model_type}", config=small | {"num_key_value_heads": 1, "head_dim": 8})
        model = spec.load(tmp_path)
        assert (model.config.model_type, len(decoder_layers(model))) == (model_type, 3)
        assert model.config._attn_implementation == ("eager" if model_type == "gemma2" else "sdpa")


# Refusals

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 20}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (T5Config(), r"'t5': it is an encoder-decoder, and only"),
        (MixtralConfig(), r"'mixtral': it is a mixture of experts \(num_local_experts=8\), and only"),
        (Qwen3MoeConfig(), r"'qwen3_moe': it is a mixture of experts \(num_local_experts=128\)"),
        (MixtralConfig(**SMALL, num_local_experts=1, num_experts_per_tok=1), r"mixture of experts \(mlp\.experts\."),
        (Gemma3nTextConfig(), r"'gemma3n_text': its layers share keys and values \(num_kv_shared_layers=15\), so that"),
        (LlamaConfig(**SMALL, num_kv_shared_layers=2), r"share keys and values \(num_kv_shared_layers=2\)"),
        (GPT2Config(), r"'gpt2': its GPT2Model has no list `layers` of num_hidden_layers=12 layers"),
        (Gemma3Config(), r"'gemma3': its decoder is a part of a larger model, described in text_config, vision_config"),
        (ViTConfig(), r"'vit': transformers builds no causal language model of its own from ViTConfig"),
        (
            LlamaConfig(**SMALL, per_layer_config={2: {"intermediate_size": 8}}),
            r"'llama': its layers differ from each other: per_layer_config sets intermediate_size layer by layer",
        ),
        (
            Lfm2Config(**SMALL, num_key_value_heads=1, layer_types=["conv", "full_attention"] * 2),
            r"'lfm2': its layers differ from each other: layer 1 from layer 0 in conv\.conv\.weight, .* and \d+ more",
        ),
        (
            JambaConfig(**SMALL, num_experts=1, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1),
            r"'jamba': its layers differ from each other",
        ),
        (
            MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=20, state_size=4),
            r"neither weights of nn\.Linear nor 1-D: mixer\.A_log \(2-D\), mixer\.conv1d\.weight \(3-D\)\. Supported",
        ),
        (
            LlamaConfig(**SMALL, attention_temperatures=[1.0, 0.5, 1.0, 0.5]),
            r"'llama': config entries attention_temperatures have one value for each of 4 layers, and what they mean",
        ),
        (GraniteConfig(**SMALL), r"'granite': its layers look like those of a supported model, but .* is untested"),
        (GPTNeoXConfig(**SMALL), r"'gpt_neox': its layers look like those of a supported model"),
    ],
    ids=lambda value: getattr(value, "model_type", "refused"),
)
def test_refusal_says_which_part_is_not_known(config, part):
    with pytest.raises(ValueError, match=part) as error:
        check_supported(config)
    message = str(error.value)
    assert message.startswith(f"Cannot prune model type {config.model_type!r}: ")
    assert f". Supported: {', '.join(SUPPORTED_MODEL_TYPES)}. " in message
    assert message.endswith(".")


def test_refused_before_weights(tmp_path):
    MixtralConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match="mixture of experts"):
        ModelSpec(str(tmp_path)).load(tmp_path)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_token_ids_are_no_list_of_layers(num_layers):
    """Llama 3 has three end tokens, and a pruned model may have three layers."""
    check_supported(LlamaConfig(**SMALL | {"num_hidden_layers": num_layers}, eos_token_id=[1, 2, 3][:num_layers]))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda layers: setattr(layers[3].mlp, "up_proj", torch.nn.Linear(32, 24, bias=False)),
            r"differ from each other: layer 3 from layer 0 in mlp\.up_proj\.weight\.",
        ),
        (
            lambda layers: setattr(layers[3].self_attn, "gate", torch.nn.Linear(4, 4, bias=False)),
            r"differ from each other: layer 3 from layer 0 in self_attn\.gate\.weight\.",
        ),
        (
            lambda layers: [setattr(layer, "table", torch.nn.Embedding(3, 4)) for layer in layers],
            r"its layers hold parameters that are neither weights of nn\.Linear nor 1-D: table\.weight \(2-D\)\.",
        ),
        (
            lambda layers: setattr(layers[3].mlp, "up_proj", layers[2].mlp.up_proj),
            r"its layers share parameters with each other\.",
        ),
        (
            lambda layers: layers.append(copy.deepcopy(layers[0])),
            r"its LlamaModel has no list `layers` of num_hidden_layers=6 layers",
        ),
    ],
)
def test_a_changed_model_is_refused(make_model, change, part):
    model = make_model("llama")
    check_model(model)
    change(decoder_layers(model))
    for act in (check_model, lambda model: apply_plan(model, PruningPlan(num_hidden_layers=6, pruned_layers=(1,)))):
        with pytest.raises(ValueError, match=f"Cannot prune model type 'llama': .*{part}"):
            act(model)


def test_layers_without_linear_sublayers(make_model):
    model = make_model("llama")
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList([torch.nn.LayerNorm(4) for _ in range(6)])
    with pytest.raises(ValueError, match=r"its layers have no nn\.Linear sublayers"):
        check_model(model)


@pytest.mark.parametrize("config_class", [Qwen2Config, SmolLM3Config])
def test_unknown_list_is_not_sliced_wrongly(config_class):
    config = config_class(**SMALL, num_key_value_heads=1)
    config.window_of_layer = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="config entries window_of_layer have one value for each of 4 layers"):
        shrink_config(config, (0, 1))


def test_checking_needs_no_memory():
    """A model of 70B parameters is checked on the meta device."""
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_key_value_heads=8)
    check_supported(config)
    assert next(empty_model(config).parameters()).is_meta
