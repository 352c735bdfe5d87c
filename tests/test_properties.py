"""Properties of every plan, merge and question, on inputs that hypothesis generates."""

import json
import math

import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from gradpruner.evaluate.base import Question
from gradpruner.evaluate.likelihood import _prediction
from gradpruner.evaluate.metrics import likelihood_metrics
from gradpruner.igia import SCORES, STEP_WEIGHTINGS, igia_matrix, layer_importance, squared_frobenius, step_weights
from gradpruner.merge import MERGE_RULES, merge_layers, top_fraction_mask
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.plan import PruningPlan, make_plan
from gradpruner.surgery import apply_plan
from gradpruner.tasks.base import Example

SIGN_RULES = ("sign_average", "sign_sum", "fisher")
every = settings(derandomize=True, deadline=None, max_examples=60, database=None)

seeds = st.integers(0, 2**32 - 1)
densities = st.floats(0.0, 1.0)
scores = st.one_of(st.integers(0, 4).map(float), st.floats(0.0, 1e30))  # integers give ties


@st.composite
def plans(draw, min_layers=2, max_layers=40):
    """Draws consistent arguments of `make_plan`, and returns them with the plan."""
    importance = draw(st.lists(scores, min_size=min_layers, max_size=max_layers))
    num_pruned = draw(st.integers(0, len(importance) - 2))
    merge_count = draw(st.integers(0, num_pruned))
    rule, density = draw(st.sampled_from(MERGE_RULES)), draw(densities)
    return (
        importance,
        num_pruned,
        merge_count,
        make_plan(importance, num_pruned, merge_count, merge_rule=rule, density=density),
    )


@st.composite
def merges(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Draws a kept weight, pruned weights and their IGIA-Matrices, with zeros, ties and numbers of any magnitude."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    number = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(dtypes))

    def weight():
        size = 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        return torch.where(
            torch.rand(shape, generator=generator) < 0.15, 0.0, torch.randn(shape, generator=generator) * size
        ).to(dtype)

    def igia():
        levels = draw(st.sampled_from([2, 5, 1000]))
        return torch.randint(0, levels, shape, generator=generator).float() / 8

    return weight(), [weight() for _ in range(number)], [igia() for _ in range(number)], igia()


# Plans


@every
@given(plans())
def test_every_layer_exactly_once_in_order(case):
    importance, num_pruned, merge_count, plan = case
    assert sorted(plan.kept_layers + plan.pruned_layers) == list(range(len(importance)))
    assert list(plan.kept_layers) == sorted(plan.kept_layers)
    assert list(plan.pruned_layers) == sorted(plan.pruned_layers)
    assert len(plan.pruned_layers) == num_pruned
    assert len(plan.absorbed_by) == (merge_count if plan.merge_rule != "none" else 0)
    dropped = max((importance[layer] for layer in plan.pruned_layers), default=-math.inf)
    assert dropped <= min(importance[layer] for layer in plan.kept_layers)


@every
@given(plans())
def test_absorbers_are_kept_before_and_nearest(case):
    *_, plan = case
    merged = [layer for layers in plan.merges.values() for layer in layers]
    assert sorted(merged + list(plan.dropped_unmerged)) == sorted(plan.absorbed_by)
    for layer, absorber in plan.absorbed_by.items():
        assert layer in plan.pruned_layers
        if absorber is None:
            assert all(kept > layer for kept in plan.kept_layers)
        else:
            assert absorber in plan.kept_layers
            assert absorber < layer
            assert all(between in plan.pruned_layers for between in range(absorber + 1, layer))


@every
@given(plans())
def test_plan_survives_json(case):
    *_, plan = case
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


@every
@given(
    seed=seeds,
    power=st.integers(-40, 40),
    score=st.sampled_from(SCORES),
    weighting=st.sampled_from(STEP_WEIGHTINGS),
    num_pruned=st.integers(0, 6),
)
def test_scaling_all_gradients_keeps_plan_and_masks(seed, power, score, weighting, num_pruned):
    """Scaling by a power of two does not round, so the plans must be equal, not just close."""
    generator = torch.Generator().manual_seed(seed)
    steps, layers, sublayers, rank = 3, 8, 2, 2

    def factor(rows, columns):  # (steps, layers, sublayers, rows, columns)
        return torch.randn(steps, layers, sublayers, rows, columns, generator=generator, dtype=torch.float64)

    left, right = factor(5, rank), factor(rank, 4)
    found = []
    for scale in (1.0, 2.0**power):
        energies = torch.tensor(
            [
                [
                    [squared_frobenius(left[t, i, m] * scale, right[t, i, m] * scale) for m in range(sublayers)]
                    for i in range(layers)
                ]
                for t in range(steps)
            ]
        )
        importance = layer_importance(energies, score, weighting).tolist()
        plan = make_plan(importance, num_pruned, num_pruned // 2)
        weights = step_weights(energies, weighting).tolist()
        igia = igia_matrix([(left[t, 0, 0] * scale, right[t, 0, 0] * scale) for t in range(steps)], weights)
        found.append((plan.pruned_layers, plan.absorbed_by, top_fraction_mask(igia, 0.3)))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


# Merges


@every
@given(merges(), densities)
def test_mask_count_is_exact_and_marks_the_largest(case, density):
    igia = case[3]
    mask = top_fraction_mask(igia, density)
    assert int(mask.sum()) == int(igia.numel() * density)
    if mask.any() and not mask.all():
        assert igia[mask].min() >= igia[~mask].max()
        ties = (igia == igia[mask].min()).flatten()
        assert mask.flatten()[ties].long().diff().le(0).all()  # among equal values, the first are marked


@every
@given(merges(), densities, st.sampled_from((*SIGN_RULES, "none")))
def test_signs_never_flip(case, density, rule):
    kept, pruned, igias, kept_igia = case
    merged = merge_layers(kept, pruned, igias, density, rule, kept_igia)
    assert torch.equal(torch.sign(merged), torch.sign(kept))
    assert merged.dtype == kept.dtype


@every
@given(merges(), densities, st.sampled_from(MERGE_RULES))
def test_untouched_entries_are_bit_identical(case, density, rule):
    kept, pruned, igias, kept_igia = case
    merged = merge_layers(kept, pruned, igias, density, rule, kept_igia)
    may_change = torch.zeros_like(kept, dtype=torch.bool)
    for weight, igia in zip(pruned, igias, strict=True):
        passes = top_fraction_mask(igia, density)
        if rule != "weighted_average":
            passes &= torch.sign(weight) * torch.sign(kept) > 0
        may_change |= passes & (rule != "none")
    bits = {4: torch.int32, 2: torch.int16}[kept.element_size()]
    assert torch.equal(merged.view(bits)[~may_change], kept.view(bits)[~may_change])


@every
@given(merges(dtypes=(torch.float32,)), densities, st.sampled_from(MERGE_RULES))
def test_merges_equal_the_oracle(case, density, rule):
    kept, pruned, igias, kept_igia = case
    merged = merge_layers(kept, pruned, igias, density, rule, kept_igia)
    oracles.close(merged, oracles.merge(kept, pruned, igias, density, rule, kept_igia))


@pytest.fixture(scope="module")
def dense():
    """Returns a Llama with 6 layers; tests work on copies of its weights."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=11, num_hidden_layers=6, **sizes))


@settings(every, max_examples=30)
@given(case=plans(min_layers=6, max_layers=6), seed=seeds)
def test_surgery_keeps_order_and_all_weights_that_absorb_nothing(dense, case, seed):
    *_, plan = case
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = AutoModelForCausalLM.from_config(dense.config.__class__.from_dict(dense.config.to_dict()))
    model.load_state_dict(before)
    shapes = {name: linear.weight.shape for name, linear in linear_sublayers(decoder_layers(model)[0]).items()}
    apply_plan(model, plan, lambda layer, sublayer: torch.rand(shapes[sublayer], generator=generator))
    after = model.state_dict()
    assert len(after) == len(before) - len(plan.pruned_layers) * sum(
        key.startswith("model.layers.0.") for key in before
    )
    for index, layer in enumerate(plan.kept_layers):
        for key in (key for key in before if key.startswith(f"model.layers.{layer}.")):
            now = after[key.replace(f".{layer}.", f".{index}.", 1)]
            if layer not in plan.merges or "norm" in key:
                assert torch.equal(now, before[key])
            elif plan.merge_rule != "weighted_average":
                assert torch.equal(torch.sign(now), torch.sign(before[key]))
    for key in before:
        if not key.startswith("model.layers."):
            assert torch.equal(after[key], before[key])


# Multiple choice


@st.composite
def questions(draw):
    """Draws options with their log-likelihoods, the label, and a display order; no two options tie."""
    number = draw(st.integers(2, 5))
    log_likelihoods = draw(st.lists(st.floats(-50.0, -0.01), min_size=number, max_size=number, unique=True))
    texts = ["x" * draw(st.integers(1, 12)) for _ in range(number)]
    assume(len({value / len(text) for value, text in zip(log_likelihoods, texts, strict=True)}) == number)
    return log_likelihoods, texts, draw(st.integers(0, number - 1)), draw(st.permutations(range(number)))


@every
@given(st.lists(questions(), min_size=1, max_size=8))
def test_permuting_options_keeps_the_accuracy(cases):
    def metrics(permuted):
        rows = []
        for index, (log_likelihoods, texts, label, order) in enumerate(cases):
            order = order if permuted else range(len(texts))
            example = Example(
                id=str(index),
                prompt="",
                answer=texts[label],
                choices=tuple(texts[option] for option in order),
                label=list(order).index(label),
            )
            question = Question(example, [], [[0] * len(texts[option]) for option in order])
            rows.append(_prediction(question, [log_likelihoods[option] for option in order]))
        return likelihood_metrics(rows)

    shown, permuted = metrics(False), metrics(True)
    by_position = ("majority_accuracy",)  # depends on the positions of the right options
    assert {key: value for key, value in shown.items() if key not in by_position} == {
        key: value for key, value in permuted.items() if key not in by_position
    }
    right = [max(range(len(texts)), key=values.__getitem__) == label for values, texts, label, _ in cases]
    assert shown["accuracy"] == sum(right) / len(cases)
