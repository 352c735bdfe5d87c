"""LLM-Pruner: published counts, scores by hand, gradients against autograd, and the pruned model."""

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.llm_pruner import LlmPruner, num_removed
from baselines.taylor_scores import (
    CRITERIA,
    channel_scores,
    combine,
    fold_queries,
    for_each_gradient,
    group_scores,
)
from baselines.width_pruning import highest
from gradpruner.budget import counted_parameters, target_parameters
from gradpruner.method import Recovery
from gradpruner.models.architectures import count_parameters, linear_sublayers
from gradpruner.models.counting import count_model
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import LayerShape, config_shape, model_shape

LLAMA_8B = "meta-llama/Llama-3.1-8B"
TINY = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
NATIVE = {"match": "native", "ratio": 0.4, "first_layer": 1, "end_layer": 4}


def make_model(model_type="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# ---- counts ----

LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
TINY_LLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "before", "after"),
    [
        (None, (4, 30), 8_030_261_248, 6_612_586_496),
        (LLAMA_7B, (4, 30), 6_738_415_616, 5_422_977_024),
        (TINY_LLAMA, (4, 18), 1_100_048_384, 945_907_712),
    ],
)
def test_published_parameters_at_ratio_a_quarter(config, layers, before, after):
    config = shipped_config(LLAMA_8B) if config is None else AutoConfig.for_model("llama", **config)
    method = LlmPruner(match="native", ratio=0.25, first_layer=layers[0], end_layer=layers[1])
    assert count_model(config).num_parameters == before
    assert count_model(config, method.shape(config)).num_parameters == after


@pytest.mark.parametrize(
    ("ratio", "groups", "ffn", "total"),
    [(0.4, 5, 8601, 5_789_052_928), (0.5, 4, 7168, 5_194_911_744), (0.5664, 4, 6216, 4_890_759_168)],
)
def test_parameters_of_other_ratios(ratio, groups, ffn, total):
    config = shipped_config(LLAMA_8B)
    shape = LlmPruner(match="native", ratio=ratio).shape(config)
    assert shape.layers[4:30] == (LayerShape(groups * 4, groups, ffn),) * 26
    assert shape.layers[:4] + shape.layers[30:] == (LayerShape(32, 8, 14336),) * 6
    assert count_model(config, shape).num_parameters == total


def test_the_default_budget_is_thirteen_layers():
    config = shipped_config(LLAMA_8B)
    shape = LlmPruner(sparsity=0.4).shape(config)
    assert shape.layers[10] == LayerShape(16, 4, 7168)
    assert abs(count_model(config, shape).num_parameters - 5_194_805_248) < 319_488


@pytest.mark.parametrize(("sparsity", "match"), [(0.2, "layers"), (0.4, "layers"), (0.4, "total"), (0.5, "layers")])
@pytest.mark.parametrize("uniform", [False, True])
def test_budgets_are_met_to_a_channel(sparsity, match, uniform):
    config = AutoConfig.for_model("llama", **{**TINY, "intermediate_size": 200, "num_hidden_layers": 16})
    shape = LlmPruner(sparsity=sparsity, match=match, uniform=uniform).shape(config)
    left = counted_parameters(count_model(config, shape), match)
    num_narrow = sum(layer != config_shape(config).layers[0] for layer in shape.layers)
    assert abs(left - target_parameters(config, sparsity, match)) <= num_narrow * 3 * 48
    assert shape.is_uniform == uniform and num_narrow == (16 if uniform else 13)
    assert all(48 % layer.num_attention_heads == 0 for layer in shape.layers if uniform)


@pytest.mark.parametrize(("count", "ratio", "expected"), [(1024, 0.4, 410), (4096, 0.4, 1639), (14336, 0.4, 5735)])
def test_rounding(count, ratio, expected):
    assert num_removed(count, ratio) == expected


def test_head_counts_round_down():
    assert 410 // 128 == 3 and 1639 // 128 == 12
    config = AutoConfig.for_model("llama", **{**TINY, "num_key_value_heads": 6})
    # 20 of 48 channels are pruned at 0.4: two heads of 8
    assert LlmPruner(**NATIVE).shape(config).layers[1].num_key_value_heads == 4


# ---- scores ----

W = {
    "gate": ([[1, 2], [0, 1], [-1, 1]], [[0.1, -0.2], [0.3, 0.1], [0.2, 0.2]]),
    "up": ([[1, 0], [2, -1], [1, 1]], [[0.5, 0.1], [-0.1, 0.2], [0.1, -0.3]]),
    "down": ([[1, -1, 2], [0, 1, 1]], [[0.2, 0.1, -0.1], [0.3, -0.2, 0.1]]),
}


def vectors(criterion):
    return [
        channel_scores(torch.tensor(w, dtype=torch.float32), criterion, name != "down", torch.tensor(g))
        for name, (w, g) in W.items()
    ]


def approx(values):
    return pytest.approx(values, rel=1e-6)


def test_param_first_by_hand():
    gate, up, down = vectors("param_first")
    assert gate.tolist() == approx([0.5, 0.1, 0.4])
    assert up.tolist() == approx([0.5, 0.4, 0.4])
    assert down.tolist() == approx([0.2, 0.3, 0.3])
    assert combine([gate, up, down], "sum").tolist() == approx([1.2, 0.8, 1.1])
    assert combine([gate, up, down], "mean").tolist() == approx([0.4, 0.8 / 3, 1.1 / 3])
    assert combine([gate, up, down], "max").tolist() == approx([0.5, 0.4, 0.4])
    assert combine([gate, up, down], "prod").tolist() == approx([0.05, 0.012, 0.048])
    assert combine([gate, up, down], "first").tolist() == approx([0.5, 0.1, 0.4])
    assert combine([gate, up, down], "second").tolist() == approx([0.5, 0.4, 0.4])
    assert highest(combine([gate, up, down], "sum"), 2) == (0, 2)


def test_other_criteria_by_hand():
    assert combine(vectors("vectorize"), "sum").tolist() == approx([1.0, 0.8, 0.3])
    assert combine(vectors("l1"), "sum").tolist() == approx([5, 6, 7])
    assert combine(vectors("l2"), "sum").tolist() == approx([7, 8, 9])


def test_second_order_by_hand():
    samples = torch.tensor([[[0.2, -0.4], [0.2, 0], [0.4, 0]], [[0, 0], [0.4, 0.2], [0, 0.4]]])
    fisher = samples.square().mean(0)
    assert fisher.flatten().tolist() == approx([0.02, 0.08, 0.1, 0.02, 0.08, 0.08])
    weight, gradient = torch.tensor(W["gate"][0], dtype=torch.float32), samples.mean(0)
    scores = {
        name: channel_scores(weight, name, True, gradient, fisher).tolist() for name in ("param_second", "param_mix")
    }
    assert scores["param_second"] == approx([0.34, 0.02, 0.16])
    assert scores["param_mix"] == approx([0.65, 0.09, 0.40])


def test_fold_of_query_heads():
    scores = torch.tensor([1.0, 1, 9, 9, 2, 2, 2, 2])
    assert fold_queries(scores, 2, 2).view(2, 2).sum(1).tolist() == [20, 8]
    assert fold_queries(scores, 2, 2, "reference").view(2, 2).sum(1).tolist() == [6, 22]
    zeros = {f"self_attn.{name}_proj": torch.zeros(4) for name in "kv"}
    own = {**zeros, "self_attn.q_proj": scores, "self_attn.o_proj": torch.zeros(8)}
    assert group_scores(own, LayerShape(4, 2, 8), 2, "sum", "exact").tolist() == [20, 8]


def loss_of(model, batch, rows=slice(None)):
    """Returns the mean loss over all real next tokens, for plain autograd."""
    output = logits_with_graph(model, {name: values[rows] for name, values in batch.items()})
    mask = batch["attention_mask"][rows].bool()
    real = mask[:, 1:] & mask[:, :-1]
    return functional.cross_entropy(output[:, :-1][real], batch["input_ids"][rows][:, 1:][real])


def logits_with_graph(model, batch):
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_gradients_are_autograds(model_type, make_batches):
    [batch] = make_batches(1, batch_size=3)
    model, found = make_model(model_type), {}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for_each_gradient(model, batch, range(1, 3), lambda *args: found.__setitem__(args[:2], args[2:]), squares=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert set(found) == {(i, name) for i in (1, 2) for name in linear_sublayers(model.model.layers[0])}
    weights = {(i, name): m.weight for i in (1, 2) for name, m in linear_sublayers(model.model.layers[i]).items()}
    whole = torch.autograd.grad(loss_of(model, batch), list(weights.values()))
    single = [torch.autograd.grad(loss_of(model, batch, slice(n, n + 1)), list(weights.values())) for n in range(3)]
    for number, key in enumerate(weights):
        weight, gradient, fisher = found[key]
        assert torch.equal(weight, weights[key])
        torch.testing.assert_close(gradient, whole[number], rtol=1e-4, atol=1e-7)
        mean = torch.stack([each[number] for each in single]).square().mean(0)
        torch.testing.assert_close(fisher, mean, rtol=1e-4, atol=1e-9)


# ---- pruning ----


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_end_to_end(criterion, make_batches):
    [batch] = make_batches(1)
    plans = []
    for _ in range(2):
        model = make_model()
        compressed = LlmPruner(criterion=criterion, seed=3, **NATIVE).compress(model, [batch])
        plans.append(json.dumps(compressed.plan.to_dict(), allow_nan=False))
        sizes = LayerShape(4, 2, 14)
        assert model_shape(model).layers == (LayerShape(6, 3, 24), sizes, sizes, sizes)
        assert logits(model, batch).isfinite().all()
    assert plans[0] == plans[1]


def test_measuring_leaves_the_model_as_it_was(make_batches, tmp_path):
    for steps in (1, 3):
        model = make_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        LlmPruner(iterative_steps=steps, **NATIVE).measure(model, make_batches(1), tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_dead_unit_scores_nothing_and_leaves_first(model_type, make_batches):
    [batch] = make_batches(1)
    model = make_model(model_type)
    layer = model.model.layers[2]
    layer.self_attn.o_proj.weight.data[:, 16:32] = 0  # KV group 1: query heads 2 and 3 of 8 channels
    layer.mlp.down_proj.weight.data[:, 5] = 0
    before = logits(model, batch)
    method = LlmPruner(match="native", ratio=0.34, first_layer=2, end_layer=3)
    scores = method._unit_scores(model, batch, range(2, 3))[2]
    assert scores["kv_groups"][1] == 0 and scores["channels"][5] == 0
    assert (scores["kv_groups"] == 0).sum() == 1 and (scores["channels"] == 0).sum() == 1
    plan = method.compress(model, [batch]).plan
    assert plan.width.heads[2] == (0, 1, 4, 5) and 5 not in plan.width.channels[2]
    one = LlmPruner(match="native", ratio=1 / 24 - 1e-9, first_layer=2, end_layer=3)
    model = make_model(model_type)
    model.model.layers[2].mlp.down_proj.weight.data[:, 5] = 0
    before = logits(model, batch)
    assert one.compress(model, [batch]).plan.width.channels[2] == tuple(n for n in range(24) if n != 5)
    torch.testing.assert_close(logits(model, batch), before)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_masked_is_sliced(model_type, make_batches):
    [batch] = make_batches(1)
    sliced, masked = make_model(model_type), make_model(model_type)
    width = LlmPruner(**NATIVE).compress(sliced, [batch]).plan.width
    for layer, heads, kept in zip(masked.model.layers, width.heads, width.channels, strict=True):
        gone = [channel for channel in range(48) if channel // 8 not in heads]
        layer.self_attn.o_proj.weight.data[:, gone] = 0
        layer.mlp.down_proj.weight.data[:, [channel for channel in range(24) if channel not in kept]] = 0
    torch.testing.assert_close(logits(sliced, batch), logits(masked, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("settings", [{"sparsity": 0.0}, {"match": "native", "ratio": 0.0}])
def test_a_ratio_of_nothing_changes_no_bit(settings, model_type, make_batches):
    [batch] = make_batches(1)
    model, before = make_model(model_type), logits(make_model(model_type), batch)
    assert LlmPruner(**settings).compress(model, [batch]).plan.width is None
    assert torch.equal(logits(model, batch), before)


def test_neither_batches_nor_padding_count(make_batches):
    [whole] = make_batches(1, batch_size=4)
    single = [{name: values[row : row + 1] for name, values in whole.items()} for row in range(4)]
    longer = {
        name: functional.pad(values, (4, 0), value=-100 if name == "labels" else 0) for name, values in whole.items()
    }
    plans = [
        LlmPruner(criterion="param_mix", **NATIVE).compress(make_model(), b).plan for b in ([whole], single, [longer])
    ]
    assert plans[0] == plans[1] == plans[2]


def test_cuts_step_by_step_score_again(make_batches):
    [batch] = make_batches(1)
    once, thrice = (
        LlmPruner(iterative_steps=steps, **NATIVE).compress(make_model(), [batch]).plan.width for steps in (1, 3)
    )
    assert [len(kept) for kept in once.channels] == [len(kept) for kept in thrice.channels] == [24, 14, 14, 14]
    assert once != thrice


def test_cuts_step_by_step_without_data_are_one_cut():
    once, thrice = (
        LlmPruner(criterion="l2", iterative_steps=steps, **NATIVE).compress(make_model()).plan for steps in (1, 3)
    )
    assert once == thrice


def test_a_one_shot_measurement_serves_every_budget():
    one, other = (LlmPruner(sparsity=sparsity).measurement_settings() for sparsity in (0.2, 0.4))
    assert one == other
    one, other = (LlmPruner(sparsity=part, iterative_steps=2).measurement_settings() for part in (0.2, 0.4))
    assert one != other


def test_recovery_is_off_until_a_dataset_is_named():
    assert LlmPruner().recovery() is None
    recovery = LlmPruner(recover_on="alpaca", recover_training={"mode": "lora", "epochs": 2}).recovery()
    assert isinstance(recovery, Recovery) and recovery.training.epochs == 2 and recovery.distillation is None


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: LlmPruner(criterion="param_third"), r"criterion must be one of param_first, .* got 'param_third'"),
        (lambda: LlmPruner(grouping="median"), r"grouping must be one of sum, mean"),
        (lambda: LlmPruner(gqa_fold="wrong"), r"gqa_fold must be one of exact, reference"),
        (lambda: LlmPruner(match="exactly"), r"method\.match must be one of layers, total, native"),
        (lambda: LlmPruner(sparsity=1.0), r"sparsity is the fraction to prune, in \[0, 1\), got 1\.0"),
        (
            lambda: LlmPruner(ratio=0.25),
            r"ratio is for match=native and needed there, got ratio=0\.25 and match=layers",
        ),
        (lambda: LlmPruner(match="native"), r"needed there, got ratio=None and match=native\. Set method\.ratio"),
        (lambda: LlmPruner(match="native", ratio=1.0), r"ratio is a part of the units, in \[0, 1\), got 1\.0"),
        (lambda: LlmPruner(num_rows=0), r"num_rows must be 1 or more, got 0"),
        (lambda: LlmPruner(uniform=True, first_layer=2), r"uniform=true makes all layers narrower, got first_layer=2"),
        (
            lambda: LlmPruner(recover_on="alpaca", recover_training={"speed": 1}),
            r"method\.recover_training takes the settings of finetune, got speed with method=llm_pruner\. Known: mode",
        ),
        (
            lambda: LlmPruner(first_layer=3, end_layer=3).shape(make_model().config),
            r"Layers from first_layer up to end_layer become narrower, out of 4, got 3 and 3",
        ),
        (
            lambda: LlmPruner(sparsity=0.75, first_layer=0, end_layer=1).shape(make_model().config),
            r"No MLP width leaves .* parameters: 1 to 24 leave .*Change sparsity, method\.match",
        ),
        (
            lambda: LlmPruner().shape(AutoConfig.for_model("olmo2", **TINY)),
            r"method=llm_pruner makes layers narrower, .*got model type 'olmo2'",
        ),
        (lambda: LlmPruner(**NATIVE).compress(make_model(), []), r"method=llm_pruner looks at data, got no batches"),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_scores_that_are_not_numbers_are_refused(make_batches, tmp_path):
    model = make_model()
    model.lm_head.weight.data.sign_().mul_(3e38)  # finite, but the logits overflow
    with pytest.raises(ValueError, match=r"Scores of (kv_groups|channels) are NaN or infinite with method=llm_pruner"):
        LlmPruner(**NATIVE).measure(model, make_batches(1), tmp_path)


def test_parameters_of_the_model_are_those_of_the_shape(make_batches):
    for settings in ({"sparsity": 0.25}, {"sparsity": 0.25, "uniform": True}, NATIVE):
        model = make_model()
        expected = count_model(model.config, LlmPruner(**settings).shape(model.config)).num_parameters
        LlmPruner(**settings).compress(model, make_batches(1))
        assert count_parameters(model) == expected
