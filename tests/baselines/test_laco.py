"""LaCo: its two rules, its loop, its budget, and the merged model."""

import pytest
import torch

from baselines.laco import LaCo, merged_weight
from gradpruner.models.architectures import linear_sublayers


def laco(num_pruned_layers, **settings):
    return LaCo(num_pruned_layers=num_pruned_layers, **settings)


def run(num_layers, accept, method):
    """Runs the loop over plain lists; returns the trials and the kept layers, each with the layers that it absorbed."""
    kept = [[layer] for layer in range(num_layers)]

    def merge(layer, num_absorbed):
        block = kept[layer : layer + num_absorbed + 1]
        kept[layer : layer + num_absorbed + 1] = [[number for own in block for number in own]]

    trials = method.collapse(num_layers, lambda layer, m: accept(layer, m, len(kept)), merge)
    return trials, kept


@pytest.mark.parametrize(("rule", "expected"), [("paper", [6.0, 4.0]), ("code", [4.0, 1.0])])
def test_rules_oracle(rule, expected):
    block = [torch.tensor(values) for values in ([1.0, 2.0], [3.0, 5.0], [4.0, 1.0])]
    assert merged_weight(block, rule).tolist() == expected
    assert merged_weight(block[:2], rule).tolist() == [3.0, 5.0]  # one absorbed layer: no difference


def test_loop_oracle_accept_all():
    method = laco(13, rule="paper", layers_per_merge=4, interval=2, lowest_layer=1)
    sizes = []

    def accept(layer, m, size):
        sizes.append((layer, size - m))
        return 1.0

    trials, kept = run(32, accept, method)
    assert sizes == [(28, 29), (25, 26), (22, 23), (19, 20), (16, 19)]
    assert [trial.num_absorbed for trial in trials] == [3, 3, 3, 3, 1]
    assert len(kept) == 19


def notebook_loop(num_layers, merge_layers, interval, accept):
    """The loop of the authors' notebook, with HIGHEST_LAY = L - 1 and LOWEST_LAY = 0."""
    kept, trials = [[layer] for layer in range(num_layers)], []
    lay = num_layers - 1 - merge_layers
    while lay >= 0:
        count = min(merge_layers - 1, len(kept) - lay - 1)
        trials.append((lay, count))
        if accept(lay):
            kept[lay] = [number for own in kept[lay : lay + count + 1] for number in own]
            del kept[lay + 1 : lay + count + 1]
            lay -= interval
            if lay >= len(kept):
                lay = len(kept) - 1 - merge_layers
        else:
            lay -= 1
    return trials, kept


@pytest.mark.parametrize(("merge_layers", "interval"), [(7, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("accept", [lambda layer: True, lambda layer: layer % 3 > 0], ids=["all", "some"])
def test_the_loop_is_that_of_the_notebook(merge_layers, interval, accept):
    trials, kept = notebook_loop(40, merge_layers, interval, accept)
    method = laco(40 - len(kept), layers_per_merge=merge_layers, interval=interval, lowest_layer=0)
    own_trials, own_kept = run(40, lambda layer, m, size: float(accept(layer)), method)
    own = [(trial.layer, trial.num_absorbed) for trial in own_trials]
    assert own == trials[: len(own)] and own_kept == kept


def test_the_first_try_leaves_the_final_layer_alone():
    # Llama-2-13B: H = 39, so l = 32 absorbs 33 to 38. Then l = 31 of 34 layers can absorb 2, the final one among them.
    trials, kept = run(40, lambda *given: 1.0, laco(10, layers_per_merge=7, interval=1, lowest_layer=0))
    assert [(trial.layer, trial.num_absorbed) for trial in trials] == [(32, 6), (31, 2), (30, 1), (29, 1)]
    trials, kept = run(40, lambda *given: 1.0, laco(6, layers_per_merge=7, interval=1, lowest_layer=0))
    assert kept[-2:] == [[32, 33, 34, 35, 36, 37, 38], [39]]
    trials, _ = run(32, lambda *given: 1.0, laco(13))  # C = 4, I = 2: 13 of 32 layers
    assert [(trial.layer, trial.num_absorbed) for trial in trials] == [
        *((27, 3), (25, 3), (23, 2)),
        *((21, 2), (19, 2), (17, 1)),
    ]


def test_loop_oracle_even_layers_only():
    method = laco(8, layers_per_merge=3, interval=2, lowest_layer=1, highest_layer=12)
    trials, kept = run(12, lambda layer, m, size: 1.0 if layer % 2 == 0 else 0.0, method)
    assert [trial.layer for trial in trials] == [9, 8, 6, 4, 2]
    assert [trial.accepted for trial in trials] == [False, True, True, True, True]
    assert [own[0] for own in kept] == [0, 1, 2, 11]
    assert kept[2][-1] == 10  # rule `code`: layer 2 holds the weights of original layer 10


def test_the_threshold_is_lowered_until_the_budget_is_met():
    trials, kept = run(8, lambda layer, m, size: 0.5, laco(3, threshold=0.65, layers_per_merge=3, lowest_layer=2))
    assert len(kept) == 5
    assert sorted({trial.threshold for trial in trials}, reverse=True) == pytest.approx([0.65, 0.6, 0.55, 0.5, 0.45])
    assert all(trial.accepted == (trial.threshold == 0.45) for trial in trials)


@pytest.mark.parametrize("num_layers", [4, 6, 9])
def test_every_budget_that_resolves_is_met_even_if_nothing_is_alike(num_layers):
    for num_pruned in range(num_layers - 1):
        method = laco(num_pruned)
        try:
            method = method.resolve(num_layers)
        except ValueError:
            assert num_pruned > num_layers - 2
            continue
        _, kept = run(num_layers, lambda layer, m, size: -1.0, method)
        assert len(kept) == num_layers - num_pruned


def test_a_similarity_that_is_not_a_number_ends_the_loop():
    with pytest.raises(ValueError, match=r"The similarity is nan after merging 3 layers into 3\. Check the weights"):
        run(8, lambda layer, m, size: float("nan"), laco(3))


def by_hand(model, blocks, rule):
    """Returns (linear weights, norms) of the merged model's layers, one per block of original layers."""
    layers = model.model.layers
    kept = []
    for block in blocks:
        own = {name: linear.weight.detach().clone() for name, linear in linear_sublayers(layers[block[0]]).items()}
        for name in own if len(block) > 1 else ():
            others = [linear_sublayers(layers[layer])[name].weight.detach() for layer in block[1:]]
            own[name] = others[-1] if rule == "code" else own[name] + sum(other - own[name] for other in others)
        kept.append((own, layers[block[0]].input_layernorm.weight.detach().clone()))
    return kept


@pytest.mark.parametrize(
    ("rule", "blocks"),
    [("code", [[0], [1, 2], [3], [4, 5, 6], [7]]), ("paper", [[0], [1], [2, 3], [4], [5, 6, 7]])],
)
def test_the_model_is_that_of_the_accepted_merges(tiny_llama, make_batches, rule, blocks, tmp_path):
    batches = make_batches(2)
    # Every merge is accepted and no layer merges twice: 3 layers are absorbed as 2 + 1, so `paper` is a plain sum.
    method = laco(3, rule=rule, threshold=-1.0, layers_per_merge=3, interval=3).resolve(8)
    model = tiny_llama(num_hidden_layers=8)
    compressed = method.compress(model, batches)
    absorbed_by = {layer: block[0] for block in blocks for layer in block[1:]}
    assert compressed.plan.pruned_layers == tuple(sorted(absorbed_by))
    expected = by_hand(tiny_llama(num_hidden_layers=8), blocks, rule)
    assert len(model.model.layers) == 5 == model.config.num_hidden_layers
    for layer, (weights, norm) in zip(model.model.layers, expected, strict=True):
        for name, linear in linear_sublayers(layer).items():
            torch.testing.assert_close(linear.weight, weights[name])
        assert torch.equal(layer.input_layernorm.weight, norm)
    assert compressed.plan.absorbed_by == absorbed_by
    assert compressed.plan.details["rule"] == rule
    assert [trial["accepted"] for trial in compressed.plan.details["trials"]] == [True, True]


def test_similarity_is_that_of_flattened_final_states(tiny_llama, make_batches, tmp_path):
    [batch] = make_batches(1, batch_size=4)
    model, whole = tiny_llama(), tiny_llama()
    method = laco(1, threshold=-1.0, layers_per_merge=2).resolve(6)
    plan = method.compress(model, [batch]).plan
    cosines = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):  # one row, no padding
        with torch.no_grad():
            states = [each.model(ids[mask.bool()][None]).last_hidden_state.flatten() for each in (whole, model)]
        cosines.append(float(torch.dot(states[0], states[1]) / states[0].norm() / states[1].norm()))
    [trial] = plan.details["trials"]
    assert (trial["layer"], trial["num_absorbed"]) == (3, 1)
    assert trial["similarity"] == pytest.approx(sum(cosines) / 4, abs=1e-5)


def test_large_tokens_dominate_a_flattened_cosine():
    one, other = torch.tensor([[10.0, 0.0], [0.0, 1.0]]), torch.tensor([[10.0, 0.0], [1.0, 0.0]])
    assert float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) == pytest.approx(0.990099, abs=1e-6)


def test_a_merge_is_not_lossless(tiny_llama, make_batches):
    model, [batch] = tiny_llama(), make_batches(1)
    identity = model.model.layers[5]
    identity.self_attn.o_proj.weight.data.zero_()
    identity.mlp.down_proj.weight.data.zero_()
    before = model(**batch).logits
    method = laco(1, threshold=-1.0, layers_per_merge=2, highest_layer=6)
    method.compress(model, [batch])  # layer 4 becomes the identity of layer 5
    assert not torch.allclose(model(**batch).logits, before, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rule": "notebook"}, r"rule must be one of code, paper, got 'notebook'"),
        ({"layers_per_merge": 1}, r"layers_per_merge must be 2 or more, got 1\. Raise method\.layers_per_merge"),
        ({"interval": 0}, r"interval must be 1 or more, got 0\. Raise method\.interval"),
        ({"threshold": 65}, r"threshold is a cosine, in \[-1, 1\], got 65"),
        ({"lowest_layer": -1}, r"lowest_layer must be 0 or above, got -1"),
        ({"num_rows": 0}, r"num_rows must be 1 or more, got 0"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        laco(2, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lowest_layer": 4}, r"With lowest_layer=4 at most 1 of 6 layers can be absorbed, got 2 to prune\. Lower"),
        ({"highest_layer": 7}, r"highest_layer must be above lowest_layer=1 and at most the model's 6 layers, got 7"),
        ({"lowest_layer": 3, "highest_layer": 3}, r"highest_layer must be above lowest_layer=3 .* got 3"),
    ],
)
def test_a_range_that_does_not_fit_the_model(settings, match):
    with pytest.raises(ValueError, match=match):
        laco(2, **settings).resolve(6)


def test_the_rule_is_part_of_the_folder():
    assert laco(2).variant() == "layers2-code" and LaCo(sparsity=0.4, rule="paper").variant() == "sparsity0.4-paper"
