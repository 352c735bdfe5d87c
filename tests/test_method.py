import dataclasses
import json
import logging

import oracles
import pytest
import torch

import gradpruner
from gradpruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.importance_spec import ImportanceSpec
from gradpruner.merge import MERGE_RULES
from gradpruner.method import Calibration, Method
from gradpruner.models.architectures import linear_sublayers
from gradpruner.plan import PruningPlan


def pruner(**settings):
    defaults = {"num_pruned_layers": 2, "merge_count": 1, "steps": 3, "batch_size": 2, "lora_rank": 4}
    if "sparsity" in settings:
        del defaults["num_pruned_layers"]
    if "fraction" in settings:
        defaults["steps"] = None
    return GradPruner(**(defaults | settings))


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture(params=["llama", "mistral"])
def make_model(request, tiny_llama, tiny_mistral):
    return tiny_llama if request.param == "llama" else tiny_mistral


# End to end


def test_compress(make_model, make_batches):
    model, batches = make_model(), make_batches(3)
    compressed = pruner().compress(model, batches)
    plan, report = compressed.plan, compressed.report
    assert compressed.model is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert plan.num_hidden_layers == len(plan.layer_importance) == 6
    lowest = sorted(range(6), key=lambda layer: plan.layer_importance[layer])[:2]
    assert plan.pruned_layers == tuple(sorted(lowest))
    assert list(plan.absorbed_by) == [lowest[1]]
    assert (plan.method, plan.merge_rule, plan.density) == ("gradpruner", "sign_average", 0.2)
    assert len(report["losses"]) == len(report["step_importance"]) == len(report["prefix_overlap"]) == 3
    assert report["train_seconds"] > 0
    assert report["peak_memory_bytes"] > 0
    json.dumps([report, plan.to_dict()], allow_nan=False)
    assert logits_of(model, batches[0]).isfinite().all()
    model(**batches[0]).loss.backward()  # ready for fine-tuning
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.generate(batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"], max_new_tokens=3)


@pytest.mark.parametrize("weighting", ["energy", "normalized"])
@pytest.mark.parametrize("rule", MERGE_RULES)
def test_merged_weights_come_from_the_recorded_gradients(tiny_llama, make_batches, tmp_path, rule, weighting):
    """The oracles, applied to the recorded gradients, give the merged weight."""
    model = tiny_llama(num_hidden_layers=4)
    method = pruner(merge_rule=rule, density=0.3, merge_count=2, step_weighting=weighting).resolve(4)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    method.measure(model, make_batches(3), tmp_path)
    gradients = EarlyGradients.load(tmp_path)
    plan = method.prune(model, tmp_path).plan
    expected_importance = oracles.layer_importance(gradients.energies, "sumsq", weighting)
    assert plan.layer_importance == pytest.approx(tuple(expected_importance), rel=1e-9)
    totals = gradients.energies.sum(dim=(1, 2)).tolist()
    step_weights = None if weighting == "energy" else [1 / total if total > 0 else 0.0 for total in totals]

    def igia(layer, name):
        return oracles.igia(gradients.factors(layer, name), step_weights)

    for index, kept in enumerate(plan.kept_layers):
        absorbed = plan.merges.get(kept, ())
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            expected = oracles.merge(
                weights[f"model.layers.{kept}.{name}.weight"],
                [weights[f"model.layers.{layer}.{name}.weight"] for layer in absorbed],
                [igia(layer, name) for layer in absorbed],
                0.3,
                rule,
                igia(kept, name) if rule == "fisher" else None,
            )
            oracles.close(linear_sublayers(model.model.layers[index])[name].weight, expected, rtol=1e-5)


def test_same_seed_same_plan_and_weights(tiny_llama, make_batches):
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        runs.append(pruner(seed=3).compress(tiny_llama(), make_batches(3)))
    assert runs[0].plan == runs[1].plan
    state, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("settings", [{"sparsity": 0.0}, {"num_pruned_layers": 0}])
def test_pruning_nothing_leaves_logits_bit_identical(make_model, make_batches, settings):
    model, batches = make_model(), make_batches(3)
    before = logits_of(model, batches[0])
    compressed = pruner(merge_count=0, **settings).compress(model, batches)
    assert compressed.plan.pruned_layers == ()
    assert torch.equal(logits_of(model, batches[0]), before)
    json.dumps(compressed.report, allow_nan=False)


def test_merging_nothing_is_pruning_alone(tiny_llama, make_batches):
    batches = make_batches(3)
    results = [
        logits_of(pruner(**settings).compress(tiny_llama(), batches).model, batches[0])
        for settings in ({"merge_count": 0}, {"density": 0.0}, {"merge_rule": "none"}, {"merge_count": 1})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_one_measurement_serves_every_pruning(tiny_llama, make_batches, tmp_path):
    batches = make_batches(3)
    pruner().resolve(6).measure(tiny_llama(), batches, tmp_path)
    for settings in ({"num_pruned_layers": 3, "merge_count": 2}, {"score": "frobenius"}, {"density": 0.9}):
        method = pruner(**settings).resolve(6)
        assert method.measurement_settings() == pruner().resolve(6).measurement_settings()
        apart, together = method.prune(tiny_llama(), tmp_path), method.compress(tiny_llama(), batches)
        assert apart.plan == together.plan
        assert torch.equal(logits_of(apart.model, batches[0]), logits_of(together.model, batches[0]))


def test_measuring_leaves_the_model_as_it_was(tiny_llama, make_batches, tmp_path):
    model, batches = tiny_llama(), make_batches(3)
    before = logits_of(model, batches[0])
    pruner().resolve(6).measure(model, batches, tmp_path)
    assert torch.equal(logits_of(model, batches[0]), before)


def test_explicit_merged_layers(tiny_llama, make_batches):
    batches = make_batches(3)
    pruned = pruner().compress(tiny_llama(), batches).plan.pruned_layers
    plan = pruner(merged_layers=(pruned[0],), merge_count=0).compress(tiny_llama(), batches).plan
    assert plan.pruned_layers == pruned
    assert list(plan.absorbed_by) == [pruned[0]]
    stays = next(layer for layer in range(6) if layer not in pruned)
    with pytest.raises(ValueError, match=rf"merged_layers must be among the pruned layers .*, got \[{stays}\] besides"):
        pruner(merged_layers=(stays,), merge_count=0).compress(tiny_llama(), batches)


def test_explicit_merged_layers_need_no_merge_count(tiny_llama, make_batches):
    """The default merge_count of 3 exceeds the number of pruned layers; `merged_layers` replaces it."""
    batches = make_batches(3)
    pruned = pruner().compress(tiny_llama(), batches).plan.pruned_layers
    method = GradPruner(num_pruned_layers=2, merged_layers=pruned[:1], steps=3, batch_size=2, lora_rank=4)
    assert list(method.compress(tiny_llama(), batches).plan.absorbed_by) == [pruned[0]]


def test_layer_zero_pruned_is_reported(tiny_llama, make_batches, caplog):
    """A layer with zero weights is the least important, and no kept layer before layer 0 can absorb it."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        for name in ("q", "k", "v"):
            getattr(model.model.layers[0].self_attn, f"{name}_proj").weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[0].mlp.gate_proj.weight.zero_()
    with caplog.at_level(logging.WARNING):
        compressed = pruner(num_pruned_layers=1, merge_count=1).compress(model, make_batches(3))
    assert compressed.plan.absorbed_by == {0: None}
    message = "Layers [0] were to merge but no kept layer comes before them: dropped unmerged."
    assert message in compressed.report["warnings"]
    assert message in caplog.text
    assert len(model.model.layers) == 5


def test_gradients_are_kept_out_of_the_callers_way(tiny_llama, make_batches):
    model = tiny_llama()
    pruner().compress(model, make_batches(3))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_too_few_batches(tiny_llama, make_batches):
    with pytest.raises(ValueError, match="3 importance steps need 3 batches, got 2"):
        pruner().compress(tiny_llama(), make_batches(2))


def test_refused_before_any_work(tiny_llama):
    def batches():
        raise AssertionError("a batch was taken")
        yield

    with pytest.raises(ValueError, match="leave at least 2 of the model's 6 decoder layers, got 5"):
        pruner(num_pruned_layers=5).compress(tiny_llama(), batches())


# Settings


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.4, "num_pruned_layers": 2}])
def test_sparsity_or_layers(settings):
    with pytest.raises(ValueError, match=r"Give either sparsity or num_pruned_layers, got sparsity=.* null"):
        GradPruner(**settings)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 40, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=rf"in \[0, 1\), got {sparsity}\. For 40 % write sparsity=0\.4"):
        GradPruner(sparsity=sparsity)


@pytest.mark.parametrize("settings", [{"steps": None}, {"steps": 40, "fraction": 0.01}])
def test_steps_or_fraction(settings):
    with pytest.raises(ValueError, match=r"Give either steps or fraction, got steps=.* null"):
        GradPruner(sparsity=0.4, **settings)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=rf"in \(0, 1\], got {fraction}"):
        pruner(fraction=fraction)


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=rf"density must be in \[0, 1\], got {density}\. Set method\.density"):
        pruner(density=density)


def test_negative_merge_count():
    with pytest.raises(ValueError, match="merge_count must be 0 or above, got -1"):
        pruner(merge_count=-1)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("merge_rule", "sign_average, sign_sum, fisher, weighted_average, none"),
        ("score", "sumsq, frobenius"),
        ("step_weighting", "energy, normalized"),
        ("gradient_estimate", "product, tangent"),
        ("adapter", "lora, dora, qlora"),
    ],
)
def test_unknown_choice(name, choices):
    with pytest.raises(ValueError, match=f"{name} must be one of {choices}, got 'other'"):
        pruner(**{name: "other"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "at least 2 steps, got steps=1"),
        ({"lora_init": "mica"}, "'mica' freezes B"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_of_the_importance_run_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        pruner(**settings)


def test_defaults_of_the_importance_run_are_the_same_in_both_places():
    method, spec = GradPruner(sparsity=0.4), ImportanceSpec()
    assert method.measurement_settings() == dataclasses.asdict(spec)


def test_every_setting_is_in_the_cache_key():
    settings = pruner().prune_settings()
    assert set(settings) == {field.name for field in dataclasses.fields(GradPruner)}
    json.dumps(settings, allow_nan=False)


# Resolving


@pytest.mark.parametrize(("sparsity", "layers", "pruned"), [(0.4, 32, 13), (0.4, 30, 12), (0.0, 30, 0), (0.25, 10, 2)])
def test_sparsity_becomes_layers(sparsity, layers, pruned):
    resolved = pruner(sparsity=sparsity, merge_count=0).resolve(layers)
    assert (resolved.sparsity, resolved.num_pruned_layers) == (None, pruned)


@pytest.mark.parametrize(("training_steps", "steps"), [(4000, 40), (150, 2), (10, 2), (250, 2), (300, 3)])
def test_fraction_becomes_steps(training_steps, steps):
    resolved = pruner(fraction=0.01).resolve(6, training_steps)
    assert (resolved.fraction, resolved.steps) == (None, steps)
    assert resolved.calibration() == Calibration(batch_size=2, num_rows=2 * steps, seed=0)


def test_resolving_twice_is_resolving_once():
    resolved = pruner(sparsity=0.4, fraction=0.01).resolve(32, 1000)
    assert resolved.resolve(32) == resolved


def test_resolving_leaves_the_original():
    method = pruner(sparsity=0.4)
    method.resolve(32)
    assert method == pruner(sparsity=0.4)


def test_fraction_without_training_steps(tiny_llama, make_batches):
    message = r"fraction=0\.01 needs the number of planned training steps, which is not known here"
    with pytest.raises(ValueError, match=message):
        pruner(fraction=0.01).resolve(6)
    with pytest.raises(ValueError, match=message):
        pruner(fraction=0.01).compress(tiny_llama(), make_batches(3))


def test_counts_that_do_not_fit_the_model():
    with pytest.raises(ValueError, match="leave at least 2 of the model's 6 decoder layers, got 5"):
        pruner(sparsity=0.9).resolve(6)
    with pytest.raises(ValueError, match="between 0 and the 2 pruned layers, got 3"):
        pruner(merge_count=3).resolve(6)
    with pytest.raises(ValueError, match="between 0 and the 2 pruned layers, got 3"):
        pruner(merged_layers=(1, 2, 3)).resolve(6)


def test_calibration_counts_accumulated_batches():
    assert pruner(accumulation=4, seed=5).calibration() == Calibration(batch_size=2, num_rows=24, seed=5)


def test_variant():
    assert pruner(sparsity=0.4).variant() == "sparsity0.4-merge1"
    assert pruner(merge_count=0).variant() == "layers2-merge0"
    assert pruner(merged_layers=(1, 4)).variant() == "layers2-merge1-4"
    assert pruner(merged_layers=()).variant() == "layers2-merge0"


def test_variants_of_different_settings_differ_after_resolving_too():
    assert pruner(sparsity=0.4).resolve(32).variant() != pruner(sparsity=0.5).resolve(32).variant()


# Base class and package


@dataclasses.dataclass(frozen=True)
class DoNothing(Method):
    name = "nothing"


def test_a_method_without_hooks_changes_nothing(tiny_llama, make_batches):
    model, batch = tiny_llama(), make_batches(1)[0]
    before = logits_of(model, batch)
    method = DoNothing()
    compressed = method.compress(model)
    assert compressed.plan == PruningPlan(num_hidden_layers=6, method="nothing")
    assert torch.equal(logits_of(compressed.model, batch), before)
    assert (method.calibration(), method.callbacks(), method.variant()) == (None, [], "")
    assert (method.measurement_settings(), method.prune_settings(), compressed.report) == ({}, {}, {})
    assert method.finish(model) is model
    assert method.resolve(6, 100) == method


def test_package_names():
    assert gradpruner.GradPruner is GradPruner
    assert gradpruner.PruningPlan is PruningPlan
    assert all(getattr(gradpruner, name).__name__ == name for name in gradpruner.__all__)
    assert all(hasattr(gradpruner, name) for name in gradpruner.__all__)
    with pytest.raises(AttributeError, match="module 'gradpruner' has no attribute 'Pruner'"):
        gradpruner.Pruner  # noqa: B018
