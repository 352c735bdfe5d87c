"""Kernel pruning: importance and merging of channels against slow loops, pairing, budget, shared measurement."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.kernel_igia import (
    CHANNEL_RULES,
    KernelIgia,
    channel_importance,
    channel_products,
    column_sums,
    merge_columns,
)
from gradpruner.budget import target_parameters
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import igia_matrix
from gradpruner.models.architectures import count_parameters, linear_sublayers
from gradpruner.models.counting import count_model
from gradpruner.models.shape import ModelShape, config_shape, model_shape

TINY = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
IMPORTANCE = {"steps": 3, "batch_size": 2, "lora_rank": 2, "sparsity": 0.4}
READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def make_model(model_type="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def gradients(make_batches, tmp_path):
    KernelIgia(**IMPORTANCE).measure(make_model(), make_batches(3), tmp_path)
    return EarlyGradients.load(tmp_path)


def test_column_sums_are_those_of_the_formed_matrix():
    factors = [(torch.randn(5, 2), torch.randn(2, 7)) for _ in range(3)]
    weights = [1.0, 0.0, 2.5]
    torch.testing.assert_close(
        column_sums(factors, weights), igia_matrix(factors, weights).double().sum(0), rtol=1e-5, atol=1e-7
    )


def test_importance_adds_up_all_that_reads_or_writes_a_channel(gradients):
    expected = torch.zeros(48, dtype=torch.float64)
    for layer in range(5):
        for name in gradients.sublayers:
            igia = igia_matrix(gradients.factors(layer, name)).double()
            expected += igia.sum(0) if name.endswith(READS) else igia.sum(1)
    torch.testing.assert_close(channel_importance(gradients, 5, 48, [1.0] * 3), expected, rtol=1e-5, atol=0)


def merge_slowly(weight, igia, pruned, partners, density, rule):
    """Merges entry by entry, in Python floats."""
    pairs = [(gone, into) for gone, into in zip(pruned, partners, strict=True) if into is not None]
    entries = [
        (-float(igia[row, gone]), row, number) for row in range(len(weight)) for number, (gone, _) in enumerate(pairs)
    ]
    top = {(row, number) for _, row, number in sorted(entries)[: int(len(entries) * density)]}
    result = [[float(value) for value in row] for row in weight]
    for row in range(len(weight)):
        for column in {into for _, into in pairs}:
            own = float(weight[row, column])
            passing = [
                float(weight[row, gone])
                for number, (gone, into) in enumerate(pairs)
                if into == column
                and (row, number) in top
                and (rule == "weighted_average" or float(weight[row, gone]) * own > 0)
            ]
            if passing:
                result[row][column] = own + sum(passing)
                if rule != "sign_sum":
                    result[row][column] /= 1 + len(passing)
    return result


@pytest.mark.parametrize("rule", [rule for rule in CHANNEL_RULES if rule != "none"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_merging_is_that_of_slow_loops(rule, density):
    weight, igia = torch.randn(6, 9), torch.rand(6, 9)
    kept, pruned, partners = (1, 2, 5, 7, 8), (0, 3, 4, 6), [None, 2, 2, 7]
    merged = merge_columns(weight, igia, kept, pruned, partners, density, rule)
    expected = torch.tensor(merge_slowly(weight, igia, pruned, partners, density, rule))
    torch.testing.assert_close(merged, expected)
    assert torch.equal(merged[:, [0, 3, 4, 6, 1, 5, 8]], weight[:, [0, 3, 4, 6, 1, 5, 8]])
    if rule != "weighted_average":
        assert torch.equal(merged.sign(), weight.sign())


def test_a_channel_without_a_partner_or_rule_merges_nowhere():
    weight, igia = torch.randn(3, 4), torch.rand(3, 4)
    assert torch.equal(merge_columns(weight, igia, (1, 2), (0, 3), [None, None], 1.0, "sign_sum"), weight)
    assert torch.equal(merge_columns(weight, igia, (1, 2), (0, 3), [1, 2], 1.0, "none"), weight)


def test_pairing():
    model = make_model()
    linears = [linear for layer in model.model.layers for linear in linear_sublayers(layer).items()]
    stacked = torch.cat(
        [
            model.model.embed_tokens.weight,
            *(linear.weight if name.endswith(READS) else linear.weight.T for name, linear in linears),
        ]
    ).detach()  # (all weights of a channel, d)
    torch.testing.assert_close(channel_products(model).detach().float(), stacked.T @ stacked, rtol=1e-4, atol=1e-4)
    method, kept, gone = KernelIgia(**IMPORTANCE), tuple(range(10, 48)), tuple(range(10))
    cosines = torch.cosine_similarity(stacked[:, list(gone), None], stacked[:, None, list(kept)], dim=0)
    assert method._partners(model, kept, gone) == [kept[n] for n in cosines.argmax(dim=1).tolist()]
    preceding = dataclasses.replace(method, pairing="preceding")
    assert preceding._partners(model, (1, 4, 5), (0, 2, 3, 6)) == [None, 1, 1, 5]


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [*(("llama", rule) for rule in CHANNEL_RULES), *((each, CHANNEL_RULES[0]) for each in ("mistral", "qwen2"))],
)
def test_end_to_end(model_type, rule, make_batches, tmp_path):
    method = KernelIgia(**IMPORTANCE, merge_rule=rule)
    batches, plans = make_batches(3), []
    for _ in range(2):
        model = make_model(model_type)
        plans.append(method.compress(model, batches).plan)
    assert plans[0] == plans[1]
    config = make_model(model_type).config
    shape, target = method.shape(config), target_parameters(config, 0.4, "layers")
    assert model_shape(model) == shape == ModelShape(shape.hidden_size, config_shape(config).layers)
    assert shape.hidden_size % 6 == 0
    per_channel = count_model(config).num_parameters / 48
    assert count_parameters(model) == count_model(config, shape).num_parameters
    embedding = config.vocab_size * shape.hidden_size
    assert abs(count_parameters(model) - embedding - target) <= 3 * per_channel + 1
    scores = torch.tensor(plans[0].details["channel_importance"])
    gone = [channel for channel in range(48) if channel not in plans[0].width.hidden]
    assert scores[list(plans[0].width.hidden)].min() >= scores[gone].max()
    assert len(plans[0].details["partners"]) == len(gone)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, batches[0]), logits(model, batches[0]))


def test_merged_weights_are_sliced_after_merging(make_batches, tmp_path):
    method, dense, model = KernelIgia(**IMPORTANCE), make_model(), make_model()
    method.measure(model, make_batches(3), tmp_path)
    plan = method.prune(model, tmp_path).plan
    gradients, kept = EarlyGradients.load(tmp_path), plan.width.hidden
    gone = tuple(channel for channel in range(48) if channel not in kept)
    changed = 0
    for index in range(5):
        for name, linear in linear_sublayers(dense.model.layers[index]).items():
            weight, igia = linear.weight.detach(), igia_matrix(gradients.factors(index, name))
            reads = name.endswith(READS)
            sides = (weight, igia) if reads else (weight.T, igia.T)
            merged = torch.tensor(merge_slowly(*sides, gone, plan.details["partners"], 0.2, "sign_average"))
            expected = merged[:, list(kept)] if reads else merged[:, list(kept)].T
            got = linear_sublayers(model.model.layers[index])[name].weight.detach()
            torch.testing.assert_close(got, expected)
            changed += int((got != (weight[:, list(kept)] if reads else weight[list(kept)])).sum())
    assert changed > 0
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight[:, list(kept)])


def test_a_sparsity_of_nothing_changes_no_bit(make_batches):
    [batch] = make_batches(1)
    model, before = make_model(), logits(make_model(), batch)
    settings = {**IMPORTANCE, "sparsity": 0.0}
    assert KernelIgia(**settings).compress(model, make_batches(3)).plan.width is None
    assert torch.equal(logits(model, batch), before)


def test_the_importance_run_is_gradpruners():
    ours = KernelIgia(**IMPORTANCE).resolve(5)
    theirs = GradPruner(**IMPORTANCE, merge_count=0).resolve(5)
    assert ours.measured_as is GradPruner is theirs.measured_as
    assert ours.measurement_settings() == theirs.measurement_settings()
    settings = {**IMPORTANCE, "steps": None, "fraction": 0.1}
    assert KernelIgia(**settings).resolve(5, 100).steps == 10


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pairing": "random"}, r"pairing must be one of similarity, preceding, got 'random'"),
        ({"merge_rule": "fisher"}, r"merge_rule of kernel_igia must be one of sign_average, .* got 'fisher'"),
        ({"match": "native"}, r"kernel_igia has no ratio of its own, got match=native\. Use layers or total"),
        ({"sparsity": None, "num_pruned_layers": 2}, r"prunes channels, got num_pruned_layers=2\. Give sparsity"),
        (
            {"repair": "least_squares"},
            r"kernel_igia drops no layers, got repair=least_squares\. Set method\.repair=none",
        ),
        ({"merge_count": 1}, r"merges channels, all that leave, got merge_count=1 and merged_layers=None\. Set"),
        ({"merged_layers": (1,)}, r"got merge_count=0 and merged_layers=\(1,\)"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        KernelIgia(**{**IMPORTANCE, **changes})


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match=r"method=kernel_igia makes layers narrower, .*got model type 'phi3'"):
        KernelIgia(**IMPORTANCE).shape(AutoConfig.for_model("phi3", **TINY))
