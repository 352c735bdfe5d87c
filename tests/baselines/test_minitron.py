"""MINITRON: scores by hand, shapes, kept units, and the distillation that follows."""

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.minitron import Minitron, _Means, kept_heads
from baselines.width_pruning import load_scores
from gradpruner.budget import counted_parameters, target_parameters
from gradpruner.layer_scores import block_influence
from gradpruner.models.architectures import count_parameters
from gradpruner.models.counting import count_model
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, model_shape

LLAMA_8B = "meta-llama/Llama-3.1-8B"
TINY = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EXPLICIT = {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 4}


def make_model(model_type="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY, head_dim=8)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# ---- scores ----


def test_aggregation_by_hand():
    means = _Means()
    means.mask = torch.ones(2, 2, dtype=torch.bool)
    means.note("x", torch.tensor([[[1.0, -2], [3, 0]], [[-1, 1], [1, 1]]]))
    assert means.rows["x"].tolist() == [[2, 1], [1, 1]]
    score = means.rows["x"].square().sum(0).sqrt()
    assert score.tolist() == pytest.approx([2.236068, 1.414214], abs=1e-6)


def test_padding_has_no_part_in_a_mean():
    means = _Means()
    means.mask = torch.tensor([[False, True]])
    means.note("x", torch.tensor([[[100.0], [3.0]]]))
    assert means.rows["x"].tolist() == [[3]]


def test_heads_and_groups_by_hand():
    # Channel scores [3, 4, 1, 0] with two channels per head give head scores [5, 1]; groups are ranked group-major.
    assert torch.tensor([3.0, 4, 1, 0]).view(2, 2).norm(dim=-1).tolist() == [5, 1]
    scores = torch.tensor([1.0, 9, 2, 2])
    assert scores.view(2, 2).norm(dim=1).tolist() == pytest.approx([9.055385, 2.828427], abs=1e-6)
    old = LayerShape(4, 2, 8)
    assert kept_heads(scores, old, LayerShape(2, 1, 8)) == (0, 1)
    assert kept_heads(scores, old, LayerShape(2, 2, 8)) == (1, 3)  # of equal heads the first is pruned
    assert kept_heads(scores, old, LayerShape(1, 1, 8)) == (1,)
    assert kept_heads(scores, old, old) == (0, 1, 2, 3)


def by_hand(model, batches):
    """Computes scores in loops over rows and tokens, from a model run without padding."""
    layers, channels, heads, hidden = model.model.layers, [], [], torch.zeros(48, dtype=torch.float64)
    seen = {}
    handles = []
    for index, layer in enumerate(layers):
        watched = {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
        for name, module in watched.items():
            handles.append(module.register_forward_hook(lambda m, i, o, key=(index, name): seen.update({key: i[0][0]})))
        for name in ("input_layernorm", "post_attention_layernorm"):
            handles.append(
                getattr(layer, name).register_forward_hook(lambda m, i, o, key=(index, name): seen.update({key: o[0]}))
            )
    squares = {}
    for batch in batches:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad():
                model(input_ids=row[mask.bool()][None])
            for key, states in seen.items():
                squares[key] = squares.get(key, 0) + states.abs().double().mean(0) ** 2
    for handle in handles:
        handle.remove()
    for index in range(len(layers)):
        channels.append(squares[index, "down"].sqrt())
        heads.append(squares[index, "o"].sqrt().view(6, 8).pow(2).sum(1).sqrt())
        hidden += squares[index, "input_layernorm"].sqrt() + squares[index, "post_attention_layernorm"].sqrt()
    return {"channels": torch.stack(channels), "heads": torch.stack(heads), "hidden": hidden}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_scores_are_those_of_slow_loops(model_type, make_batches, tmp_path):
    batches = make_batches(2, batch_size=3)
    model = make_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Minitron().measure(model, batches, tmp_path)
    scores = load_scores(tmp_path)
    expected = by_hand(make_model(model_type), batches)
    assert set(scores) == set(expected)  # layers are not scored if none is pruned
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_depth_drops_the_layers_of_least_influence(make_batches):
    batches = make_batches(2)
    model = make_model()
    influence = block_influence(make_model(), batches)
    plan = Minitron(axes="depth").compress(model, batches).plan
    lowest = sorted(sorted(range(5), key=lambda layer: influence[layer])[:2])
    assert list(plan.pruned_layers) == lowest and plan.width is None
    assert plan.layer_importance == pytest.approx(influence)


# ---- shapes ----


def test_shapes_of_a_large_model():
    config = shipped_config(LLAMA_8B)
    target = target_parameters(config, 0.4, "layers")
    width, ffn = (Minitron(axes=axes).shape(config) for axes in ("width", "ffn"))
    # 4,669,468,672 less head and attention at 3584 (459,669,504 and 32 x 36,700,160) over 32 x 3 x 3584: 8822.
    assert width == ModelShape(3584, (LayerShape(32, 8, 8832),) * 32)
    assert ffn == ModelShape(4096, (LayerShape(32, 8, 7104),) * 32)
    for shape in (width, ffn):
        one_step = 32 * 3 * shape.hidden_size * 64
        assert abs(count_model(config, shape).num_parameters_without_embedding - target) <= one_step / 2
    assert count_model(config, Minitron(axes="depth").shape(config)).num_parameters == 5_194_805_248
    explicit = Minitron(match="native", target_shape={"hidden_size": 3072, "intermediate_size": 9216})
    assert count_model(config, explicit.shape(config)).num_parameters == 4_512_746_496


@pytest.mark.parametrize("axes", ["width", "ffn", "depth"])
@pytest.mark.parametrize("match", ["layers", "total"])
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.4, 0.5])
def test_budgets(axes, match, sparsity):
    config = AutoConfig.for_model("llama", **{**TINY, "hidden_size": 192, "intermediate_size": 512})
    target = target_parameters(config, sparsity, match)
    shape = Minitron(axes=axes, match=match, sparsity=sparsity).shape(config)
    left = counted_parameters(count_model(config, shape), match)
    layer = count_model(config).layers[0].num_parameters
    assert abs(left - target) <= (layer / 2 if axes == "depth" else 5 * 3 * 192 * 64 / 2)


def test_smollm2_has_nine_heads():
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    shape = Minitron().shape(config)
    assert shape.hidden_size == 504 and shape.hidden_size % 9 == 0
    left, target = count_model(config, shape).num_parameters_without_embedding, target_parameters(config, 0.4, "layers")
    assert target == 18 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576  # 18 layers and a norm
    assert abs(left - target) < 0.005 * target


# ---- pruning ----


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "settings", [{}, {"axes": "ffn"}, {"axes": "depth"}, {"match": "native", "target_shape": EXPLICIT}]
)
def test_end_to_end(model_type, settings, make_batches, tmp_path):
    batches = make_batches(2)
    method = Minitron(**settings)
    plans = []
    for _ in range(2):
        model = make_model(model_type)
        plans.append(method.compress(model, batches).plan)
        json.dumps(plans[-1].to_dict(), allow_nan=False)
    assert plans[0] == plans[1]
    config = make_model(model_type).config
    shape = method.shape(config)
    assert model_shape(model) == shape and shape.is_uniform
    assert count_parameters(model) == count_model(config, shape).num_parameters
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, batches[0]), logits(model, batches[0]))


def test_what_stays_is_what_scores_highest(make_batches, tmp_path):
    method, model = Minitron(match="native", target_shape=EXPLICIT), make_model()
    method.measure(model, make_batches(2), tmp_path)
    scores = load_scores(tmp_path)
    width = method.prune(model, tmp_path).plan.width
    for layer, kept in zip((n for n in range(5) if n != int(scores["layers"].argmin())), width.channels, strict=True):
        gone = [channel for channel in range(64) if channel not in kept]
        assert scores["channels"][layer][list(kept)].min() >= scores["channels"][layer][gone].max()
    gone = [channel for channel in range(48) if channel not in width.hidden]
    assert scores["hidden"][list(width.hidden)].min() >= scores["hidden"][gone].max()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_masked_is_sliced(model_type, make_batches):
    [batch] = make_batches(1)
    sliced, masked = make_model(model_type), make_model(model_type)
    width = Minitron(axes="ffn").compress(sliced, [batch]).plan.width
    for layer, kept in zip(masked.model.layers, width.channels, strict=True):
        layer.mlp.down_proj.weight.data[:, [channel for channel in range(64) if channel not in kept]] = 0
    torch.testing.assert_close(logits(sliced, batch), logits(masked, batch))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_channels_without_activations_leave_first(model_type, make_batches):
    [batch] = make_batches(1)
    model = make_model(model_type)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[::2] = 0  # every second channel
    before = logits(model, batch)
    method = Minitron(match="native", target_shape={"intermediate_size": 32})
    assert method.compress(model, [batch]).plan.width.channels == (tuple(range(1, 64, 2)),) * 5
    torch.testing.assert_close(logits(model, batch), before)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("axes", ["width", "ffn", "depth"])
def test_a_sparsity_of_nothing_changes_no_bit(axes, model_type, make_batches):
    [batch] = make_batches(1)
    model, before = make_model(model_type), logits(make_model(model_type), batch)
    plan = Minitron(axes=axes, sparsity=0.0).compress(model, [batch]).plan
    assert plan.width is None and plan.pruned_layers == ()
    assert torch.equal(logits(model, batch), before)


def test_neither_batches_nor_padding_count(make_batches):
    [whole] = make_batches(1, batch_size=4)
    single = [{name: values[row : row + 1] for name, values in whole.items()} for row in range(4)]
    longer = {
        name: functional.pad(values, (4, 0), value=-100 if name == "labels" else 0) for name, values in whole.items()
    }
    plans = [Minitron().compress(make_model(), batches).plan for batches in ([whole], single, [longer])]
    assert plans[0] == plans[1] == plans[2]


def test_measurements_that_are_shared():
    width, ffn, other = (Minitron(**s).measurement_settings() for s in ({}, {"axes": "ffn"}, {"sparsity": 0.2}))
    assert width == ffn == other
    assert Minitron(axes="depth").measurement_settings() != width
    assert Minitron().prune_settings() == Minitron(recover_on="alpaca", temperature=2.0).prune_settings()
    assert Minitron().prune_settings() != Minitron(sparsity=0.2).prune_settings()


def test_recovery_is_distillation_of_all_weights():
    assert Minitron().recovery() is None
    recovery = Minitron(recover_on="alpaca", recover_training={"learning_rate": 1e-4}, temperature=2.0).recovery()
    assert recovery.training.mode == "full" and recovery.training.learning_rate == 1e-4
    assert recovery.distillation.temperature == 2.0 and recovery.distillation.tokens == "all"


def explicit(**sizes):
    return lambda: Minitron(match="native", target_shape=sizes).shape(make_model().config)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Minitron(axes="height"), r"axes must be one of width, depth, ffn, got 'height'"),
        (lambda: Minitron(batch_size=0), r"batch_size must be 1 or more, got 0"),
        (lambda: Minitron(match="native"), r"target_shape is for match=native and needed there, got target_shape=None"),
        (lambda: Minitron(target_shape={"hidden_size": 8}), r"got target_shape=.* and match=layers\. Set both"),
        (explicit(hidden=8), r"target_shape names sizes of a config, got hidden besides\. Known: num_hidden_layers"),
        (explicit(intermediate_size=65), r"target_shape\.intermediate_size must be between 1 and .* 64, got 65"),
        (explicit(hidden_size=40), r"a hidden_size that is a multiple of the query heads, got 6 query heads"),
        (explicit(num_attention_heads=4), r"equally many query heads, at most 2, .* got 4 query heads, 3 KV heads"),
        (explicit(num_key_value_heads=1), r"at most 2, .*got 6 query heads, 1 KV heads"),
        (
            lambda: Minitron(recover_on="alpaca", recover_training={"mode": "lora"}),
            r"Distillation trains all weights, got mode=lora",
        ),
        (lambda: Minitron(axes="ffn", sparsity=0.8).shape(make_model().config), r"No MLP width leaves"),
        (
            lambda: Minitron(match="total", sparsity=0.99).shape(make_model().config),
            r"No hidden size of \d+ to 48 and MLP width leave .* parameters with method=minitron, got sparsity=0\.99",
        ),
        (lambda: Minitron(axes="depth", sparsity=0.9).shape(make_model().config), r"leave at least 2 of the model's 5"),
        (lambda: Minitron().compress(make_model(), []), r"method=minitron looks at data, got no batches"),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_known_shape_is_dense_where_nothing_is_named():
    config = make_model().config
    assert Minitron(match="native", target_shape={}).shape(config) == config_shape(config)
