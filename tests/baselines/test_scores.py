"""Scores of the layer-dropping baselines against numbers worked out by hand and against slow loops."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baselines.angular import Angular
from baselines.last import Last
from baselines.layer_dropping import Scores
from baselines.magnitude import Magnitude
from baselines.perplexity import Perplexity
from baselines.random import Random
from baselines.shortgpt import ShortGpt
from baselines.taylor_depth import TaylorDepth
from gradpruner.layer_scores import angular_distances, block_influence, nearest_block
from gradpruner.models.architectures import linear_sublayers


def scripted(inputs, *outputs):
    """Returns a model of hidden size 2 with given states: the input of layer 0 and the output of each layer."""
    config = LlamaConfig(
        vocab_size=len(inputs), hidden_size=2, intermediate_size=2, num_hidden_layers=len(outputs),
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data = torch.tensor(inputs, dtype=torch.float32)
    for layer, states in zip(model.model.layers, outputs, strict=True):
        by_token = torch.tensor(states, dtype=torch.float32)
        layer.register_forward_hook(lambda module, args, output, by_token=by_token: by_token[model.seen])
    model.register_forward_pre_hook(lambda *args: None)
    return model


def rows(model, *token_rows, padding="left"):
    """Returns one batch of these token rows, and tells the scripted model which tokens it sees."""
    length = max(map(len, token_rows))
    ids, mask = torch.zeros(len(token_rows), length, dtype=torch.int64), torch.zeros(len(token_rows), length)
    for index, tokens in enumerate(token_rows):
        where = slice(length - len(tokens), length) if padding == "left" else slice(0, len(tokens))
        ids[index, where], mask[index, where] = torch.tensor(tokens), 1
    model.seen = ids
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}


IN, OUT = [[1, 0], [1, 1], [0, 2]], [[1, 1], [2, 2], [2, 0]]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_block_influence_oracle(padding):
    model = scripted(IN, OUT)
    assert block_influence(model, [rows(model, [0, 1, 2])]) == pytest.approx([0.430964], abs=1e-6)
    # The same tokens in rows of different lengths: padding (also token 0) does not count.
    assert block_influence(model, [rows(model, [2], [0, 1], padding=padding)]) == pytest.approx([0.430964], abs=1e-6)


def test_block_influence_is_of_the_raw_output_and_not_of_what_the_final_norm_makes_of_it():
    model = scripted([[1, 0]], [[1, 1]])
    model.model.norm.weight.data = torch.tensor([1.0, 3.0])
    assert block_influence(model, [rows(model, [0])]) == pytest.approx([1 - 0.707107], abs=1e-6)  # not 1 - 0.316228


def test_angular_oracle():
    model = scripted(IN, OUT)
    distances = angular_distances(model, [rows(model, [0], [1], [2])])
    assert distances[0][1] == pytest.approx(0.25)  # arccos of the mean would give 0.307317
    assert distances[0][0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_angular_looks_at_the_last_real_token(padding):
    model = scripted(IN, OUT)
    batch = rows(model, [0, 2, 1], [1, 0], [2], padding=padding)
    assert angular_distances(model, [batch])[0][1] == pytest.approx((0.0 + 0.25 + 0.5) / 3, abs=1e-6)


def test_angular_blocks_oracle():
    angles = [0, 90, 100, 105, 180]
    states = [[[math.cos(math.radians(a)), math.sin(math.radians(a))]] for a in angles]
    model = scripted(states[0], *states[1:])
    distances = angular_distances(model, [rows(model, [0])])
    assert [distances[i][i + 1] for i in range(4)] == pytest.approx([0.5, 0.055556, 0.027778, 0.416667], abs=1e-6)
    assert [distances[i][i + 2] for i in range(3)] == pytest.approx([0.555556, 0.083333, 0.444444], abs=1e-6)
    assert nearest_block(distances, 1) == (2,)
    assert nearest_block(distances, 2) == (1, 2)
    assert nearest_block(distances, 4) == (0, 1, 2, 3)
    assert nearest_block(distances, 0) == ()
    scores = Scores([0.0] * 4, {"angular_distances": distances})
    assert Angular(num_pruned_layers=2).choose(scores, 2) == (1, 2)


def test_of_equal_distances_the_first_block_leaves():
    assert nearest_block([[0.0] * 5] * 5, 2) == (0, 1)


def test_perplexity_against_a_model_built_without_the_layer(tiny_llama, make_batches):
    model, batches = tiny_llama(), make_batches(3)

    def nll(layers):
        other = tiny_llama()
        other.model.layers = torch.nn.ModuleList([other.model.layers[i] for i in layers])
        total, count = 0.0, 0
        for batch in batches:
            for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
                real = mask.bool()
                with torch.no_grad():
                    logits = other(ids[real][None], use_cache=False).logits[0].double().log_softmax(-1)
                for position, label in enumerate(labels[real].tolist()):
                    if label != -100 and position > 0:
                        total -= float(logits[position - 1, label])
                        count += 1
        return total / count

    scores = Perplexity(num_pruned_layers=1).score_layers(model, batches)
    whole = nll(range(6))
    expected = [nll([i for i in range(6) if i != layer]) - whole for layer in range(6)]
    assert scores.layers == pytest.approx(expected, abs=1e-5)
    assert scores.details["answer_nll"] == pytest.approx(whole, abs=1e-5)


def test_taylor_against_one_backward_pass_over_all_rows(tiny_llama, make_batches):
    model, [batch] = tiny_llama(), make_batches(1, batch_size=6)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    scores = TaylorDepth(num_pruned_layers=1).score_layers(model, parts)

    other = tiny_llama()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = other(**inputs, position_ids=positions).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
    expected = []
    for layer in other.model.layers:
        total = 0.0
        for linear in linear_sublayers(layer).values():
            for weight, gradient in zip(
                linear.weight.flatten().tolist(), linear.weight.grad.flatten().tolist(), strict=True
            ):
                total += abs(weight * gradient)
        expected.append(total)
    assert scores.layers == pytest.approx(expected, rel=1e-4)


def test_taylor_leaves_no_gradients_and_the_flags_as_they_were(tiny_llama, make_batches):
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    TaylorDepth(num_pruned_layers=1).score_layers(model, make_batches(1))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_magnitude_by_loops(tiny_llama):
    model = tiny_llama(num_hidden_layers=2)
    expected = [
        sum(value**2 for linear in linear_sublayers(layer).values() for value in linear.weight.flatten().tolist())
        for layer in model.model.layers
    ]
    assert Magnitude(num_pruned_layers=0).score_layers(model, ()).layers == pytest.approx(expected)


def test_last_keeps_the_final_layer(tiny_llama):
    scores = Last(num_pruned_layers=1).score_layers(tiny_llama(), ())
    assert [Last(num_pruned_layers=n).choose(scores, n) for n in range(5)] == [
        (),
        (4,),
        (3, 4),
        (2, 3, 4),
        (1, 2, 3, 4),
    ]


def test_random_depends_on_the_seed_and_a_higher_sparsity_drops_the_same_and_more(tiny_llama):
    model = tiny_llama()

    def drawn(seed, count):
        method = Random(num_pruned_layers=count, seed=seed)
        return set(method.choose(method.score_layers(model, ()), count))

    assert len({frozenset(drawn(seed, 2)) for seed in range(20)}) > 5
    assert all(drawn(seed, 2) < drawn(seed, 4) for seed in range(20))
    assert {layer for seed in range(50) for layer in drawn(seed, 1)} == set(range(6))


def test_iterative_shortgpt_measures_what_is_left(tiny_llama, make_batches):
    model, batches = tiny_llama(), make_batches(2)
    scores = ShortGpt(num_pruned_layers=3, iterative=True).score_layers(model, batches)
    kept, left = list(range(6)), []
    for _ in range(3):  # the slow way: a new model per round
        other = tiny_llama()
        other.model.layers = torch.nn.ModuleList([other.model.layers[i] for i in kept])
        other.config.num_hidden_layers = len(kept)
        influence = block_influence(other, batches)
        lowest = influence.index(min(influence))
        left.append(kept.pop(lowest))
        assert scores.details["rounds"][len(left) - 1]["block_influence"] == pytest.approx(influence, abs=1e-6)
    assert [entry["layer"] for entry in scores.details["rounds"]] == left
    assert ShortGpt(num_pruned_layers=3).choose(scores, 3) == tuple(sorted(left))
