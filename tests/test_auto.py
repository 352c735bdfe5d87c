"""steps=auto and sparsity=auto: the stop rule, the bisection, and both through methods and the pipeline."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.last import Last
from gradpruner import auto_sparsity
from gradpruner.auto_sparsity import largest_cut, search
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.gradpruner_plus import GradPrunerPlus
from gradpruner.importance import record_early_gradients
from gradpruner.importance_spec import ImportanceSpec
from gradpruner.models.counting import count_model
from gradpruner.pipeline.run import Pipeline
from gradpruner.pipeline.work import stage_flops, tokens_per_row
from gradpruner.plan import PruningPlan
from gradpruner.stability import has_settled
from gradpruner.surgery import apply_plan

# ---- the stop rule ----


def series(*sets, num_layers=6):
    """Returns per-step importance, (steps, layers), in which the layers of `sets[i]` are the lowest at step i."""
    rows = torch.ones(len(sets), num_layers, dtype=torch.float64)
    for row, lowest in zip(rows, sets, strict=True):
        row[list(lowest)] = 0.1
    return rows


def test_a_constant_set_settles_once_there_are_enough_steps():
    steps = series(*[(1, 4)] * 8)
    assert [has_settled(steps[:n], 2, patience=3) for n in range(1, 9)] == [False] * 3 + [True] * 5


def test_steps_without_gradient_do_not_count():
    steps = series(*[(1, 4)] * 6)
    steps[:2] = 0.0
    assert [has_settled(steps[:n], 2, patience=3) for n in range(1, 7)] == [False] * 5 + [True]


def test_a_set_that_changed_lately_has_not_settled():
    steps = torch.cat([series(*[(0, 1)] * 3), series(*[(4, 5)] * 4)])
    means = [steps[: n + 1].mean(dim=0) for n in range(7)]
    sets = [set(mean.sort(stable=True).indices[:2].tolist()) for mean in means]
    assert sets[2] == {0, 1} and sets[6] == {4, 5} and sets[3] == {0, 1}
    assert not has_settled(steps, 2, patience=4)


def test_a_set_that_resampling_changes_has_not_settled():
    """One spiky step decides: all prefixes agree, but resamples without that step do not."""
    steps = series(*[(0, 1)] * 10)
    steps[:, 2] = 0.1001
    steps[0, 0] = 0.2
    prefixes = {tuple(steps[:n].mean(dim=0).sort(stable=True).indices[:2].tolist()) for n in range(5, 11)}
    assert len(prefixes) == 1
    assert not has_settled(steps, 2, patience=5)


def test_stopping_early_is_a_shorter_run(tiny_llama, make_batches, tmp_path):
    spec, model = ImportanceSpec(steps=6, batch_size=2), tiny_llama()
    batches, seen = make_batches(6), []

    def after_four(energies):
        seen.append(tuple(energies.shape))
        return len(energies) == 4

    stopped = record_early_gradients(model, batches, spec, tmp_path / "stopped", after_four)
    short = record_early_gradients(model, batches, ImportanceSpec(steps=4, batch_size=2), tmp_path / "short")
    assert torch.equal(stopped.energies, short.energies) and stopped.losses == short.losses
    assert [shape[0] for shape in seen] == [1, 2, 3, 4]
    assert len(list((tmp_path / "stopped").glob("step-*"))) == 4


# ---- the bisection ----


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(0, 10))
def test_bisection_finds_what_a_scan_finds(nlls, limit):
    nlls = sorted(nlls)  # nlls[n - 1]: NLL with n layers pruned
    found, curve = largest_cut(lambda number: nlls[number - 1], limit, len(nlls))
    assert found == max((number for number, nll in enumerate(nlls, start=1) if nll <= limit), default=0)
    assert len(curve) <= 1 + math.ceil(math.log2(len(nlls) + 1))
    assert all(curve[number] == nlls[number - 1] for number in curve)


@pytest.fixture
def drop_rear():
    def prune(model, num_pruned_layers):
        num_layers = len(model.model.layers)
        plan = PruningPlan(num_layers, tuple(range(num_layers - num_pruned_layers, num_layers)))
        apply_plan(model, plan)
        return plan

    return prune


def test_the_search_says_what_it_tried(tiny_llama, make_batches, drop_rear, monkeypatch):
    """Likelihoods come from a known curve; fits and likelihoods use different rows."""
    seen = []

    def nll(model, batches):
        seen.append([tuple(row.tolist()) for batch in batches for row in batch["input_ids"]])
        return {6: 2.0, 5: 2.1, 4: 2.3, 3: 3.0}[len(model.model.layers)]

    monkeypatch.setattr(auto_sparsity, "answer_nll", nll)
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = make_batches(10)
    repeated = [*batches, *batches]  # as when training repeats its data
    found = search(model, repeated, drop_rear, repair=None, tolerance=0.2, most=3)
    assert (found.num_pruned_layers, found.dense, found.limit) == (2, 2.0, pytest.approx(2.4))
    assert found.curve == {3: 3.0, 1: 2.1, 2: 2.3}
    assert str(found) == "answer NLL by layers pruned: 0: 2.000, 1: 2.100, 2: 2.300, 3: 3.000; at most 2.400: 2 leave"
    rows = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert all(each == rows[4::5] for each in seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_layer_may_be_too_many(tiny_llama, make_batches, drop_rear, monkeypatch):
    monkeypatch.setattr(auto_sparsity, "answer_nll", lambda model, batches: 10.0 - len(model.model.layers))
    match = r"(?s)costs at most 5% of likelihood, got no layer that does not: .*0 leave\. Raise method\.tolerance"
    with pytest.raises(ValueError, match=match):
        search(tiny_llama(), make_batches(10), drop_rear, repair=None, tolerance=0.05, most=3)


def test_few_rows_are_refused(tiny_llama, make_batches, drop_rear):
    with pytest.raises(ValueError, match=r"needs 10 distinct training rows or more, got 8\. Give it more"):
        search(tiny_llama(), make_batches(4), drop_rear, repair=None, tolerance=1.0, most=3)


# ---- through methods ----

AUTO = {"steps": "auto", "max_steps": 6, "patience": 2, "batch_size": 4, "learning_rate": 1e-4}


def test_compress_finds_both(tiny_llama, make_batches):
    method = GradPrunerPlus(sparsity="auto", tolerance=1.0, **AUTO)
    model = tiny_llama()
    num_layers = len(model.model.layers)
    compressed = method.compress(model, make_batches(6, batch_size=4))
    found = compressed.report["search"]
    assert found["num_pruned_layers"] == len(compressed.plan.pruned_layers) == num_layers // 2
    assert len(model.model.layers) == num_layers - num_layers // 2
    assert 3 <= len(compressed.report["step_importance"]) <= 6
    assert compressed.plan.details["repair"] and not compressed.plan.merges
    assert compressed.plan.method == "gradpruner_plus"


def test_what_decides_is_in_the_key_of_what_is_measured():
    plain, stopping = GradPruner(num_pruned_layers=2), GradPruner(num_pruned_layers=2, steps="auto")
    assert "auto" not in plain.measurement_settings()
    for change, matters in (
        ({"patience": 9}, True), ({"num_pruned_layers": 3}, True), ({"score": "frobenius"}, True),
        ({"merge_count": 1}, False), ({"density": 0.5}, False), ({"tolerance": 0.5}, False),
    ):  # fmt: skip
        changed = GradPruner(**({"num_pruned_layers": 2, "steps": "auto"} | change))
        assert (changed.measurement_settings() != stopping.measurement_settings()) == matters, change
    assert GradPruner(sparsity="auto").measurement_settings() == plain.measurement_settings()
    both = {"sparsity": "auto", "steps": "auto"}
    for change, matters in (({"max_sparsity": 0.3}, True), ({"tolerance": 0.5}, False), ({"repair": "none"}, False)):
        changed = GradPruner(**both, **change).measurement_settings()
        assert (changed != GradPruner(**both).measurement_settings()) == matters, change


def test_every_setting_of_a_search_is_in_the_key_of_what_is_decided():
    for kind in (GradPruner, GradPrunerPlus):
        decided = kind(sparsity="auto").decision_settings()
        for change in ({"tolerance": 0.5}, {"max_sparsity": 0.3}, {"repair": "least_squares"}, {"score": "frobenius"}):
            assert kind(sparsity="auto", **change).decision_settings() != decided, (kind, change)
    assert GradPruner(sparsity=0.4).decision_calibration() is None


def test_through_the_pipeline(tiny_spec, make_sums_task, tmp_path):
    task = make_sums_task(24)
    training = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=2)

    def make(**settings):
        method = GradPrunerPlus(**({"sparsity": "auto", "tolerance": 1.0} | AUTO | settings))
        return Pipeline(tiny_spec, task, method, training, Likelihood(), 0, tmp_path / "cache")

    pipeline = make()
    assert len(pipeline.shape.layers) == 3  # the smallest possible model, before anything is measured
    outcome = pipeline.run()
    assert len(outcome.plan.pruned_layers) == outcome.report["search"]["num_pruned_layers"] == 3
    assert make().run() == outcome and all(make().stages().values())
    assert len(pipeline.load_result().model.layers) == 3
    [measured] = (tmp_path / "cache" / "stages" / "measure").glob("*/importance.json")
    assert EarlyGradients.load(measured.parent).energies.shape[0] <= 6
    other = make(tolerance=0.9)
    assert other.stages()["measure"] and not other.stages()["decide"]


def test_a_search_and_a_number_share_the_importance_run(tiny_spec, make_sums_task, tmp_path):
    task = make_sums_task(24)
    training = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=2)

    def make(**settings):
        method = GradPruner(steps=2, batch_size=4, merge_count=1, **settings)
        return Pipeline(tiny_spec, task, method, training, Likelihood(), 0, tmp_path / "cache")

    found = make(sparsity="auto", tolerance=9.0).run()
    number = found.report["search"]["num_pruned_layers"]
    assert number == len(found.plan.pruned_layers) == 3 and len(found.plan.merges) == 1
    same = make(num_pruned_layers=number)
    assert same.stages()["measure"] and "decide" not in same.stages()
    assert same.run().plan == found.plan and same.run().metrics == found.metrics


def test_a_search_is_expected_to_take_what_it_takes(make_pipeline, tiny_llama, make_batches, drop_rear):
    config = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    pipeline = make_pipeline(config, GradPruner(sparsity="auto", merge_count=0), TrainingSpec(max_steps=1))
    one_row = count_model(pipeline.config).flops(1, tokens_per_row(pipeline.rows)[0], logit_positions=1)
    expected = stage_flops(pipeline)["decide"] / one_row / len(pipeline.rows)

    model, calls = tiny_llama(num_hidden_layers=6), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    batches = make_batches(10)
    with pytest.raises(ValueError, match="got no layer that does not"):  # the longest search
        search(model, batches, drop_rear, repair=None, tolerance=-1.0, most=3)
    taken = sum(calls) / 6 / sum(len(batch["input_ids"]) for batch in batches)
    assert 0.5 * taken <= expected <= 2 * taken


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: Last(sparsity="auto"),
            r"found from an importance run, which method=last does not have\. Set sparsity",
        ),
        (lambda: GradPruner(sparsity="much"), r"sparsity must be a number or auto, got 'much'\. For 40 %"),
        (lambda: GradPruner(sparsity=0.4, steps="few"), r"steps must be a number or auto, got 'few'\. Change"),
        (lambda: GradPruner(sparsity=0.4, patience=0), r"patience must be 1 or more, got 0\. Raise"),
        (lambda: GradPruner(sparsity="auto", tolerance=-1.0), r"tolerance must be 0 or above, got -1\.0\. For 10 %"),
        (lambda: GradPruner(sparsity="auto", max_sparsity=1.0), r"max_sparsity is a fraction .* in \(0, 1\), got 1\.0"),
        (
            lambda: GradPruner(sparsity="auto", merge_count=4).resolve(6),
            r"(?i)merge.*got 4|4.*merge",
        ),
    ],
)
def test_what_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
