"""Repair judged by answers: each change against its formula, the choice, what stays unchanged, and the pipeline."""

import copy
import dataclasses
import json

import pytest
import torch
from test_repair import PLAN, logits, make_model, make_pipeline  # noqa: F401

from baselines.last import Last
from baselines.shortgpt import ShortGpt
from gradpruner.answer_judge import AnswerJudge
from gradpruner.batch_rows import split_rows
from gradpruner.hidden_states import answer_nll, decode
from gradpruner.partial_pass import PartialPass
from gradpruner.repair import judged, repair
from gradpruner.repair.judged import CHANNELS, MAGNITUDE, NONE, judged_repair
from gradpruner.repair.maps import Sums, scale
from gradpruner.repair.states import RunStates, stream_outputs
from gradpruner.surgery import apply_plan, sharing_copy

ALL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text", "olmo2"]


def pruned(dense, plan=PLAN):
    return apply_plan(sharing_copy(dense), plan)


# ---- the judge ----


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_kept_states_give_the_nll_of_the_whole_model(model_type, make_batches):
    model, batches = make_model(model_type), make_batches(3, batch_size=2)
    judge, whole = AnswerJudge(model, batches), answer_nll(model, batches)
    for position in (0, 2, 3, 5):
        judge.advance(position)
        assert judge.nll() == pytest.approx(whole, rel=1e-5)
    assert len(model.model.layers) == 6 and not any(m._forward_pre_hooks for m in model.modules())


# ---- the changes ----


def test_a_channel_scale_has_the_least_squared_error():
    m, r = torch.randn(200, 5), torch.randn(200, 5)
    sums = Sums()
    sums.add(m[:50], r[:50])
    sums.add(m[50:], r[50:])
    expected = [float(m[:, j].double() @ r[:, j].double() / m[:, j].double().square().sum()) for j in range(5)]
    assert sums.channel_scales(0.0).tolist() == pytest.approx(expected)
    assert sums.channel_scales(1e12).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_scaling_multiplies_what_a_layer_adds(model_type, make_batches):
    model, factors = make_model(model_type), torch.linspace(0.5, 2.0, 16, dtype=torch.float64)
    seen = []
    _, mlp = stream_outputs(model, 1)
    mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.double()))
    batch, before = make_batches(1, batch_size=2)[0], copy.deepcopy(model.state_dict())
    with torch.no_grad():
        decode(model, batch)
        scale(mlp, factors)
        decode(model, batch)
    torch.testing.assert_close(seen[1], seen[0] * factors, rtol=1e-5, atol=1e-6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("layers.1." in name for name in changed)


@pytest.mark.parametrize("model_type", [each for each in ALL_TYPES if each != "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_dividing_later_layers_is_a_larger_stream(model_type, tied, make_batches):
    """Multiplying the state that leaves a layer by alpha must give the same logits as dividing what comes later."""
    alpha, batch = 1.7, make_batches(1, batch_size=3)[0]
    model, other = make_model(model_type, tie_word_embeddings=tied), make_model(model_type, tie_word_embeddings=tied)

    def larger(module, args, output):
        return (output[0] * alpha, *output[1:]) if isinstance(output, tuple) else output * alpha

    model.model.layers[2].register_forward_hook(larger)
    with torch.no_grad():
        for position in (3, 4, 5):
            for module in stream_outputs(other, position):
                scale(module, 1 / alpha)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real], logits(other, batch)[real], rtol=2e-3, atol=2e-4)


def test_states_are_those_of_both_models(make_batches):
    """X is the pruned model's state behind the absorber, Z the dense model's behind the run."""
    dense, batch = make_model(), make_batches(1, batch_size=4)[0]
    model = pruned(dense)
    run = judged._runs(PLAN, False)[0]
    [tokens] = RunStates(model, dense, PLAN, [batch]).read(run, stream_scale=0.5)
    kept = batch["attention_mask"].bool() & (batch["attention_mask"].cumsum(-1) > 1)
    with torch.no_grad():
        dense_states = dense(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    z = dense_states.hidden_states[3][kept]  # behind layers 0 to 2
    x = dense_states.hidden_states[1][kept]  # behind layer 0, the absorber
    torch.testing.assert_close(tokens.target, 0.5 * z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tokens.target - tokens.missing + tokens.outputs, x, rtol=1e-3, atol=1e-4)
    answers = torch.zeros_like(kept)
    answers[:, :-1] = batch["labels"][:, 1:] != -100
    assert torch.equal(tokens.answers, answers[kept])


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_each_layer_of_each_model_runs_once_for_all_runs(model_type, make_batches):
    dense, batches = make_model(model_type), make_batches(2, batch_size=3)
    model, calls = pruned(dense), {}

    def count(name):
        return lambda module, args, output: calls.update({name: calls.get(name, 0) + 1})

    for side, of in (("dense", dense), ("pruned", model)):
        for index, layer in enumerate(of.model.layers):
            layer.mlp.register_forward_hook(count((side, index)))
    states = RunStates(model, dense, PLAN, batches)
    for run in judged._runs(PLAN, False):  # layers 1 and 2, behind 0; layer 4, behind 3
        list(states.read(run))
    # The absorber runs again for every read, since it may have been changed in between.
    assert calls == {**{("dense", index): 2 for index in range(5)}, ("pruned", 0): 4, ("pruned", 1): 2}


def test_a_pass_goes_on_where_it_stopped(make_batches):
    model, batches = make_model(), make_batches(2, batch_size=3)
    partial = PartialPass(model, batches)
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    for position in (1, 4):
        partial.advance(position)
        for number, batch in enumerate(batches):
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(partial.state(number)[real], states[number][position][real])
        for after, batch, expected in zip(partial.after(position), batches, states, strict=True):
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(after[real], expected[position + 1][real], rtol=1e-4, atol=1e-5)
    partial.advance(6)  # behind the last layer, before the final norm
    normed = model.model.norm(partial.state(1))[batches[1]["attention_mask"].bool()]
    torch.testing.assert_close(normed, states[1][6][batches[1]["attention_mask"].bool()], rtol=1e-4, atol=1e-5)


# ---- the choice ----


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("refit", [False, True])
def test_nothing_is_accepted_that_does_not_lower_the_nll(model_type, refit, make_batches):
    dense, batches = make_model(model_type), make_batches(5, batch_size=8)
    model = pruned(dense)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    fits = repair(model, dense, PLAN, batches, kind="judged", refit=refit)
    assert [(fit.absorber, fit.last) for fit in fits] == ([(0, 2), (3, 4), (5, 5)] if refit else [(0, 2), (3, 4)])
    for fit, following in zip(fits, [*fits[1:], None], strict=True):
        assert fit.options[fit.chosen] == min(fit.options.values())
        if following is not None:
            assert following.options[NONE] == pytest.approx(fit.options[fit.chosen], rel=1e-6)
            assert following.fresh_nll_before == fit.fresh_nll_after
        maps = [name for name in fit.options if name.startswith("map")]
        is_cut = fit.last != fit.absorber
        assert bool(maps) == (model_type == "llama") and (CHANNELS in fit.options) == (is_cut or not maps)
        assert all("answers weighted" in name for name in maps) == (not is_cut or not maps)
        assert (MAGNITUDE in fit.options) == (model_type != "olmo2" and is_cut and fit.absorber != 5)
    # What the fits say is what the model does.
    rest, choosing = split_rows(batches, 5, 4)
    _, fresh = split_rows(rest, 8, 3)
    assert answer_nll(model, choosing) == pytest.approx(fits[-1].options[fits[-1].chosen], rel=1e-5)
    assert answer_nll(model, fresh) == pytest.approx(fits[-1].fresh_nll_after, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert len(dense.model.layers) == 6 and len(model.model.layers) == 3


def test_a_run_that_did_nothing_is_left_alone(make_batches, monkeypatch):
    """Where no change lowers the NLL, the weights stay the very tensors of the dense model."""
    monkeypatch.setattr(AnswerJudge, "nll", lambda self: 1.0)
    dense = make_model()
    model = pruned(dense)
    fits = judged_repair(model, dense, PLAN, make_batches(2, batch_size=8))
    assert [fit.chosen for fit in fits] == [NONE, NONE] and not any(fit.applied for fit in fits)
    kept = [dense.model.layers[index] for index in PLAN.kept_layers]
    for own, theirs in zip(model.model.layers, kept, strict=True):
        assert own.mlp.down_proj.weight.data_ptr() == theirs.mlp.down_proj.weight.data_ptr()


def test_rows_of_fit_choice_and_report_are_disjoint(make_batches):
    groups = judged.divide_rows(make_batches(5, batch_size=8))
    assert [sum(len(batch["input_ids"]) for batch in group) for group in groups] == [28, 8, 4]


@pytest.mark.parametrize(
    ("rows", "label", "match"),
    [
        (9, None, r"takes 10 rows at least, got 9\. Give more training rows"),
        (20, -100, r"got rows without answer tokens\. Give rows"),
    ],
)
def test_rows_that_cannot_judge(rows, label, match, make_batches):
    [batch] = make_batches(1, batch_size=rows)
    if label is not None:
        batch["labels"] = torch.full_like(batch["labels"], label)
    dense = make_model()
    with pytest.raises(ValueError, match=match):
        repair(pruned(dense), dense, PLAN, [batch], kind="judged")


# ---- through methods ----


@pytest.mark.parametrize("refit", [False, True])
def test_compress_repairs(refit, make_batches):
    method = ShortGpt(num_pruned_layers=2, repair="judged", repair_refit=refit)
    model = make_model()
    plan = method.compress(model, make_batches(6, batch_size=4)).plan
    assert {fit["chosen"] for fit in plan.details["repair"]}
    json.dumps(plan.to_dict(), allow_nan=False)
    assert method.variant() == ("layers2-judged-refit" if refit else "layers2-judged")


def test_a_stage_of_its_own(make_pipeline):  # noqa: F811
    method = Last(num_pruned_layers=2, repair="judged")
    first = make_pipeline(method).run()
    [fit] = first.plan.details["repair"]
    assert fit["chosen"] != NONE  # otherwise the comparison below would say nothing
    assert first.seconds["repair"] > 0
    assert (
        first.metrics_before["answer_nll"]
        != make_pipeline(Last(num_pruned_layers=2)).run().metrics_before["answer_nll"]
    )
    assert make_pipeline(method).run() == first
    assert not make_pipeline(dataclasses.replace(method, repair_refit=True)).stages()["repair"]


def test_refit_alone_is_refused():
    with pytest.raises(ValueError, match=r"repair_refit=true is a part of repair=judged, got repair=none\. Set"):
        Last(num_pruned_layers=2, repair_refit=True)
