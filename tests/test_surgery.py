import copy
import re

import oracles
import pytest
import torch
from transformers import AutoModelForCausalLM

from gradpruner import surgery
from gradpruner.merge import MERGE_RULES
from gradpruner.models.architectures import (
    count_parameters,
    decoder_layers,
    empty_model,
    linear_sublayers,
    lora_targets,
    shrink_config,
)
from gradpruner.plan import PruningPlan, make_plan, preceding_kept_layer
from gradpruner.surgery import apply_plan, drop_layers

SUBLAYERS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}
PLANS = [(1, 3), (2, 3, 4), (0,), (0, 1, 5), (5,), (1, 2, 3, 4)]


@pytest.fixture(params=["llama", "llama-tied", "mistral", "mistral-tied"])
def make_model(request, tiny_llama, tiny_mistral):
    """Returns a factory of models of a supported layout, with tied or separate embeddings."""
    factory = tiny_llama if request.param.startswith("llama") else tiny_mistral

    def make(**config):
        return factory(tie_word_embeddings=request.param.endswith("tied"), **config)

    return make


@pytest.fixture
def batch(make_batches):
    return make_batches(1)[0]


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def plan_for(pruned, merged=(), rule="sign_average", density=0.5, num_layers=6):
    return PruningPlan(
        num_hidden_layers=num_layers,
        pruned_layers=tuple(pruned),
        absorbed_by={layer: preceding_kept_layer(layer, pruned) for layer in merged},
        merge_rule=rule,
        density=density,
    )


def built_by_hand(dense, kept, changed=None):
    """Returns a new, shallower model of the same class, filled by renaming the dense model's entries."""
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in kept]
    reference = type(dense)(config).eval()
    state = {}
    for key, value in (dense.state_dict() | (changed or {})).items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if match is None:
            state[key] = value
        elif int(match[1]) in kept:
            state[f"model.layers.{kept.index(int(match[1]))}.{match[2]}"] = value
    reference.load_state_dict(state, strict=True)
    return reference


def random_igia(model, seed=0):
    """Returns a random IGIA-Matrix for every sublayer, by (layer, name)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (index, name): torch.rand(linear.weight.shape, generator=generator)
        for index, layer in enumerate(model.model.layers)
        for name, linear in linear_sublayers(layer).items()
    }


@pytest.mark.parametrize("pruned", PLANS)
def test_logits_equal_a_model_built_by_hand(make_model, batch, pruned):
    dense = make_model()
    reference = built_by_hand(dense, [layer for layer in range(6) if layer not in pruned])
    before = logits_of(dense, batch)
    model = apply_plan(dense, plan_for(pruned))
    assert model is dense
    assert torch.equal(logits_of(model, batch), logits_of(reference, batch))
    assert not torch.allclose(logits_of(model, batch), before, atol=1e-3)
    assert model.config.num_hidden_layers == len(decoder_layers(model)) == 6 - len(pruned)
    assert count_parameters(model) == count_parameters(reference) == count_parameters(empty_model(model.config))


@pytest.mark.parametrize("pruned", [(1, 3), (0,), (5,)])
def test_generation_uses_the_cache_correctly(make_model, make_batches, pruned):
    model = apply_plan(make_model(), plan_for(pruned))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6 - len(pruned)))
    batch = make_batches(1, length=10)[0]
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    cached = model.generate(**prompt, **settings, use_cache=True, output_logits=True)
    plain = model.generate(**prompt, **settings, use_cache=False, output_logits=True)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_in_plain_transformers_bit_for_bit(make_model, batch, tmp_path, dtype):
    dense = make_model(dtype=dtype)
    igia = random_igia(dense)
    model = apply_plan(dense, plan_for((2, 3), (3,)), lambda layer, name: igia[layer, name])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == dtype
    assert loaded.config.num_hidden_layers == 4
    assert torch.equal(logits_of(loaded.eval(), batch), logits_of(model, batch))


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_merged_weights_equal_the_oracle(make_model, rule):
    dense = make_model()
    weights = {key: value.clone() for key, value in dense.state_dict().items()}
    igia = random_igia(dense)
    model = apply_plan(dense, plan_for((0, 2, 3, 5), (0, 2, 3, 5), rule), lambda layer, name: igia[layer, name])
    absorbs = {1: (2, 3), 4: (5,)} if rule != "none" else {}
    for index, kept in enumerate((1, 4)):
        found = linear_sublayers(model.model.layers[index])
        assert set(found) == SUBLAYERS
        for name, linear in found.items():
            expected = oracles.merge(
                weights[f"model.layers.{kept}.{name}.weight"],
                [weights[f"model.layers.{layer}.{name}.weight"] for layer in absorbs.get(kept, ())],
                [igia[layer, name] for layer in absorbs.get(kept, ())],
                0.5,
                rule,
                igia[kept, name] if rule == "fisher" else None,
            )
            oracles.close(linear.weight, expected)


def test_only_linear_weights_of_absorbing_layers_change(make_model, batch):
    dense = make_model()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    igia = random_igia(dense)
    apply_plan(dense, plan_for((2, 3), (3,)), lambda layer, name: igia[layer, name])
    after = dense.state_dict()
    for key, value in before.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight)", key)
        if match is None:  # embeddings, final norm, head
            assert torch.equal(after[key], value)
        elif int(match[1]) not in (2, 3):
            renamed = f"model.layers.{(0, 1, None, None, 2, 3)[int(match[1])]}.{match[2]}{match[3]}"
            changes = match[1] == "1" and match[2] in SUBLAYERS
            assert torch.equal(after[renamed], value) != changes, key


def test_igia_is_asked_for_merged_layers_only_one_sublayer_at_a_time(tiny_llama):
    model, asked = tiny_llama(), []

    def igia(layer, name):
        asked.append((layer, name))
        return torch.rand_like(linear_sublayers(dense_layers[layer])[name].weight)

    dense_layers = list(model.model.layers)
    apply_plan(model, plan_for((1, 2, 4), (2,)), igia)
    assert sorted(asked) == sorted((2, name) for name in SUBLAYERS)
    asked.clear()
    model = tiny_llama()
    dense_layers = list(model.model.layers)
    apply_plan(model, plan_for((1, 2, 4), (2,), rule="fisher"), igia)
    assert sorted(asked) == sorted((layer, name) for layer in (0, 2) for name in SUBLAYERS)


def test_layer_without_kept_predecessor_is_dropped_without_asking_for_igia(tiny_llama, batch):
    dense = tiny_llama()
    reference = built_by_hand(dense, [1, 2, 3, 4, 5])
    plan = make_plan([0.0, 5.0, 5.0, 5.0, 5.0, 5.0], 1, 1)
    assert plan.dropped_unmerged == (0,)
    assert torch.equal(logits_of(apply_plan(dense, plan), batch), logits_of(reference, batch))


def test_empty_plan_is_the_identity(make_model, batch):
    model = make_model()
    before, config = logits_of(model, batch), model.config.to_dict()
    apply_plan(model, plan_for(()))
    assert torch.equal(logits_of(model, batch), before)
    assert model.config.to_dict() == config


def test_density_zero_merges_nothing(make_model, batch):
    dense = make_model()
    reference = built_by_hand(dense, [0, 1, 4, 5])
    igia = random_igia(dense)
    apply_plan(dense, plan_for((2, 3), (2, 3), density=0.0), lambda layer, name: igia[layer, name])
    assert torch.equal(logits_of(dense, batch), logits_of(reference, batch))


def test_removing_an_identity_layer_leaves_logits_unchanged(make_model, batch):
    """Pruning a layer that writes nothing to the residual stream changes nothing (baselines.md, section 8)."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    before = logits_of(model, batch)
    assert torch.equal(logits_of(apply_plan(model, plan_for((3,))), batch), before)


def test_parameters_stay_trainable(make_model, batch):
    model = make_model()
    igia = random_igia(model)
    apply_plan(model, plan_for((2, 3), (3,)), lambda layer, name: igia[layer, name])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_stay_tied(make_model, tmp_path):
    model = apply_plan(make_model(), plan_for((1, 3)))
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert count_parameters(loaded) == count_parameters(model)


def test_pruning_twice(tiny_llama, batch):
    """Layer numbers of the second plan are those of the already pruned model."""
    dense = tiny_llama()
    reference = built_by_hand(dense, [0, 4, 5])
    apply_plan(apply_plan(dense, plan_for((1, 2))), plan_for((1,), num_layers=4))
    assert torch.equal(logits_of(dense, batch), logits_of(reference, batch))


def test_per_layer_lists_of_the_config_follow_the_kept_layers(tiny_llama, tmp_path):
    types = ["full_attention", "sliding_attention"] * 3
    model = tiny_llama(layer_types=types)
    modules_config = model.model.layers[0].self_attn.config
    drop_layers(model, (0, 3, 5))
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.num_hidden_layers == 3
    assert modules_config is model.config
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == model.config.layer_types


def test_shrink_config_leaves_the_original(tiny_llama):
    config = tiny_llama(layer_types=["full_attention"] * 6).config
    before = config.to_dict()
    smaller = shrink_config(config, (0, 5))
    assert (smaller.num_hidden_layers, len(smaller.layer_types)) == (2, 2)
    assert config.to_dict() == before


def test_sublayers_and_targets(make_model):
    model = make_model()
    assert all(set(linear_sublayers(layer)) == SUBLAYERS for layer in decoder_layers(model))
    assert lora_targets(model) == sorted(name.rsplit(".", 1)[-1] for name in SUBLAYERS)


# Models spread over devices, see also test_devices.py


def test_merged_weights_are_sent_to_the_device_of_the_kept_one(tiny_llama, monkeypatch):
    model, seen = tiny_llama(), []

    def merge(kept, pruned, igias, density, rule, kept_igia=None):
        seen.append({tensor.device.type for tensor in (kept, *pruned, *igias, kept_igia)})
        return torch.empty_like(kept)

    monkeypatch.setattr(surgery, "merge_layers", merge)
    igia = random_igia(model)
    model.model.layers[1].to("meta")
    apply_plan(model, plan_for((2, 3), (2, 3), rule="fisher"), lambda layer, name: igia[layer, name])
    assert seen == [{"meta"}] * len(SUBLAYERS)


# Refusals


@pytest.mark.parametrize("num_layers", [5, 7])
def test_plan_for_another_depth(tiny_llama, batch, num_layers):
    model = tiny_llama()
    before = logits_of(model, batch)
    with pytest.raises(ValueError, match=f"for {num_layers} decoder layers, the model has 6\\. Apply it to the dense"):
        apply_plan(model, plan_for((1,), num_layers=num_layers))
    assert torch.equal(logits_of(model, batch), before)


def test_same_plan_twice(tiny_llama):
    model = apply_plan(tiny_llama(), plan_for((1,)))
    with pytest.raises(ValueError, match="The plan is for 6 decoder layers, the model has 5"):
        apply_plan(model, plan_for((1,)))


def test_merging_without_igia(tiny_llama):
    with pytest.raises(ValueError, match=r"merges layers \[2, 3\] but no IGIA-Matrix was given\. Pass igia"):
        apply_plan(tiny_llama(), plan_for((2, 3), (2, 3)))
