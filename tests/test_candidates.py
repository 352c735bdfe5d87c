"""Sets of layers that compete: the pool, edits, greedy removal, the choice, and GradPruner+ through all of it."""

import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_repair import make_model, make_pipeline  # noqa: F401

from baselines.angular import Angular
from baselines.last import Last
from baselines.shortgpt import ShortGpt
from experiments.summary import show_summary
from gradpruner import candidates
from gradpruner.batch_rows import by_length, distinct_rows
from gradpruner.candidates import CandidateSettings, LayerScores, choose_layers, edits, greedy
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradpruner_plus import GradPrunerPlus
from gradpruner.hidden_states import answer_nll
from gradpruner.layer_scores import angular_distances, block_influence, influence_and_distances
from gradpruner.messages import duration
from gradpruner.models.counting import count_model
from gradpruner.pipeline.work import stage_flops, tokens_per_row
from gradpruner.plan import PruningPlan
from gradpruner.record import RunRecord
from gradpruner.repair.judged import divide_rows
from gradpruner.surgery import apply_plan, sharing_copy

IMPORTANCE = [9.0, 1.0, 8.0, 2.0, 3.0, 7.0]


@pytest.fixture
def measured(make_batches):
    model, batches = make_model(), distinct_rows(make_batches(6, batch_size=8))
    return model, batches, LayerScores.measure(model, IMPORTANCE, divide_rows(batches)[0])


# ---- the pool ----


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sets_are_those_of_the_methods(number, measured, tmp_path):
    model, batches, scores = measured
    sets = scores.sets(number)
    assert sets["igia"] == ((1,), (1, 3), (1, 3, 4))[number - 1]
    for name, method in (("block_influence", ShortGpt), ("angular", Angular), ("last", Last)):
        compressed = method(num_pruned_layers=number).compress(sharing_copy(model), divide_rows(batches)[0])
        assert sets[name] == compressed.plan.pruned_layers, name


def test_edits_by_enumeration():
    """A run grows at one end while it or another run shrinks: every such set, and nothing else."""

    def runs(layers):
        return [layer for layer in layers if layer - 1 not in layers]

    for layers in itertools.chain.from_iterable(itertools.combinations(range(6), size) for size in (1, 2, 3)):
        scores = [0.5, 0.1, 0.4, 0.2, 0.3, 0.6]
        found = edits(layers, scores)
        expected = set()
        for back, new in itertools.product(layers, set(range(6)) - set(layers)):
            left = set(layers) - {back}
            at_an_end = {back - 1, back + 1} - set(layers)
            if at_an_end and {new - 1, new + 1} & left:
                expected.add(tuple(sorted(left | {new})))
        assert set(found) == expected and all(len(each) == len(layers) for each in found)
        gains = [sum(scores[layer] for layer in each) for each in found]
        assert gains == pytest.approx(sorted(gains))
        assert all(len(runs(each)) <= len(runs(layers)) + 1 for each in found)


@pytest.mark.parametrize("width", [1, 2, 6])
def test_greedy_removal(width):
    costs = {frozenset(s): float(torch.rand(1)) for r in range(7) for s in itertools.combinations(range(6), r)}
    asked = []

    def nll(layers):
        asked.append(layers)
        return costs[frozenset(layers)]

    found = greedy(nll, 6, 3, width)
    assert len(asked) == 6 + 2 * width - (width == 6) * (1 + 2)
    if width < 6:
        assert len(found) == 3
        return
    expected = set()
    for _ in range(3):  # exact: every remaining layer is tried for each removal
        expected.add(min(set(range(6)) - expected, key=lambda layer: costs[frozenset(expected | {layer})]))
    assert set(found) == expected


# ---- the choice ----


def test_scores_are_those_of_pruned_models(measured):
    model, batches, scores = measured
    choice = choose_layers(model, scores, 2, batches, CandidateSettings(num_edits=3, num_repaired=0))
    _, choosing, _ = divide_rows(batches)
    for each in choice.candidates:
        plan = PruningPlan(num_hidden_layers=6, pruned_layers=each.layers)
        assert each.nll == pytest.approx(answer_nll(apply_plan(sharing_copy(model), plan), choosing), rel=1e-5)
        assert each.nll_repaired is None
    assert [each.nll for each in choice.candidates] == sorted(each.nll for each in choice.candidates)
    assert choice.dense_nll == pytest.approx(answer_nll(model, choosing), rel=1e-5)
    assert len({each.layers for each in choice.candidates}) == len(choice.candidates)
    assert {name for each in choice.candidates for name in each.names} >= {*scores.sets(2), "edit"}
    assert choice.dense_passes == pytest.approx(1 + len(choice.candidates) * 4 / 6)


def test_the_best_repaired_set_is_taken(measured, monkeypatch):
    """Of the two sets that are repaired, the second one is better after repair."""
    model, batches, scores = measured
    settings = CandidateSettings(num_edits=0, num_repaired=2)
    plain = choose_layers(model, scores, 2, batches, CandidateSettings(0, 0)).candidates
    after = {plain[0].layers: 2.0, plain[1].layers: 1.0}

    def repaired(model, candidate, batches, refit):
        return candidates.dataclasses.replace(candidate, nll_repaired=after[candidate.layers])

    monkeypatch.setattr(candidates, "_repaired", repaired)
    choice = choose_layers(model, scores, 2, batches, settings)
    assert choice.layers == plain[1].layers
    assert [each.layers for each in choice.candidates] == [each.layers for each in (plain[1], plain[0], *plain[2:])]


def test_repair_cannot_start_behind_any_repaired_set(measured):
    model, batches, scores = measured
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = choose_layers(model, scores, 2, batches, CandidateSettings(num_edits=2, num_repaired=3))
    best, *others = choice.candidates
    assert best.nll_repaired == min(each.nll_repaired for each in choice.candidates[:3])
    assert all(each.nll_repaired <= each.nll for each in choice.candidates[:3])
    assert all(each.nll_repaired is None for each in others[2:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    json.dumps(choice.to_dict(), allow_nan=False)


def test_distinct_rows(make_batches):
    batches = make_batches(3, batch_size=4)
    found = distinct_rows([*batches, *batches])
    assert [batch["input_ids"].tolist() for batch in found] == [batch["input_ids"].tolist() for batch in batches]
    assert sum(len(batch["labels"]) for batch in distinct_rows(batches, 6)) == 6


def test_rows_by_length(make_batches):
    """The same rows, in order of length, with no column that is padding only, and the answers at the end."""
    batches = make_batches(3, batch_size=5)
    shorter = {name: values[:2] for name, values in batches.pop().items()}
    found = by_length([*batches, shorter])

    def rows(some):
        real = [
            tuple(tuple(batch[name][row][batch["attention_mask"][row].bool()].tolist()) for name in sorted(batch))
            for batch in some
            for row in range(len(batch["labels"]))
        ]
        return sorted(real, key=lambda row: (len(row[0]), row))

    assert rows(found) == rows([*batches, shorter]) and [len(batch["labels"]) for batch in found] == [5, 5, 2]
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in found]
    in_order = [length for own in lengths for length in own]
    assert in_order == sorted(in_order) and len(set(in_order)) > 1
    assert all(batch["input_ids"].shape[1] == max(own) for batch, own in zip(found, lengths, strict=True))
    assert all(bool((batch["attention_mask"][:, -1] == 1).all()) for batch in found)
    assert by_length([]) == []


def test_scores_of_one_pass_are_those_of_two(make_batches):
    model, batches = make_model(), make_batches(3, batch_size=4)
    assert influence_and_distances(model, batches) == (
        block_influence(model, batches),
        angular_distances(model, batches),
    )


# ---- GradPruner+ ----

SETTINGS = {"num_pruned_layers": 2, "steps": 3, "batch_size": 4, "repair_rows": 24}


def test_compress(make_batches):
    batches, model = make_batches(6, batch_size=4), make_model()
    compressed = GradPrunerPlus(**SETTINGS).compress(model, batches)
    choice = compressed.report["candidates"]
    assert compressed.plan.pruned_layers == tuple(choice["candidates"][0]["layers"])
    assert compressed.plan.details["repair"] and len(model.model.layers) == 4
    importance = GradPruner(num_pruned_layers=2, merge_count=0, steps=3, batch_size=4).compress(
        make_model(), batches[:3]
    )
    assert compressed.plan.layer_importance == pytest.approx(importance.plan.layer_importance)
    [igia] = [each for each in choice["candidates"] if "igia" in each["names"]]
    assert tuple(igia["layers"]) == importance.plan.pruned_layers


def test_without_candidates_it_is_gradpruner_repaired(make_batches):
    plus = GradPrunerPlus(**SETTINGS, candidates=False)
    plain = GradPruner(**SETTINGS, merge_count=0, merge_rule="none", repair="judged")
    assert plus.measured_as is GradPruner and plus.measurement_settings() == plain.measurement_settings()
    plans = [method.compress(make_model(), make_batches(6, batch_size=4)).plan for method in (plus, plain)]
    assert plans[0].pruned_layers == plans[1].pruned_layers and plans[0].details == plans[1].details


def test_through_the_pipeline(make_pipeline):  # noqa: F811
    method = GradPrunerPlus(**SETTINGS | {"repair_rows": 12})
    outcome = make_pipeline(method).run()
    assert outcome.plan.pruned_layers == tuple(outcome.report["candidates"]["candidates"][0]["layers"])
    assert make_pipeline(method).run() == outcome and all(make_pipeline(method).stages().values())
    other_rate = candidates.dataclasses.replace(
        method, halving_learning_rate=3e-3
    )  # as with another finetune.learning_rate
    assert make_pipeline(other_rate).stages()["repair"]
    for change in ({"num_edits": 1}, {"num_pruned_layers": 3}, {"greedy_width": 1}, {"repair_refit": True}):
        changed = make_pipeline(candidates.dataclasses.replace(method, **change))
        stages = changed.stages()
        assert stages["measure"] and not stages["decide"] and not stages["prune"], change


HALVING = {"halving": (2, 3), "halving_learning_rate": 1e-2, "halving_batch_size": 6}


def test_halving_through_compress(make_batches):
    batches = make_batches(6, batch_size=4)
    [trained, plain] = [
        GradPrunerPlus(**SETTINGS, **changes).compress(make_model(), batches).report["candidates"]
        for changes in (HALVING, {})
    ]
    [winner, *others] = trained["candidates"]
    assert len(winner["nlls_trained"]) == 2 and [len(each["nlls_trained"]) for each in others] == [1]  # two sets in all
    assert winner["nlls_trained"][0] <= others[0]["nlls_trained"][0]
    sets = [{tuple(each["layers"]) for each in choice["candidates"]} for choice in (trained, plain)]
    assert sets[0] == sets[1] and len(sets[0]) == 2
    assert not any(each["nlls_trained"] for each in plain["candidates"])


def test_gradpruners_importance_run_serves(make_pipeline):  # noqa: F811
    plain = GradPruner(**SETTINGS, merge_count=0)
    make_pipeline(plain).run()
    plus = make_pipeline(GradPrunerPlus(**SETTINGS | {"repair_rows": 12}))
    assert plus.stages()["measure"] and not plus.stages()["decide"]
    assert plus.run().seconds["decide"] > 0
    assert set(plus.run().seconds) - set(make_pipeline(plain).run().seconds) == {"decide", "repair"}


@pytest.mark.parametrize("kind", ["decision_settings", "prune_settings"])
def test_a_rate_is_part_of_the_choice_with_halving_alone(kind):
    """A sweep over finetune.learning_rate, which it follows, decides, prunes and repairs once."""

    def settings(**changes):
        return getattr(GradPrunerPlus(**SETTINGS | changes), kind)()

    assert settings() == settings(halving_learning_rate=3e-3, halving_batch_size=8)
    assert settings(**HALVING) != settings(**HALVING | {"halving_learning_rate": 3e-3}) != settings()


def test_the_work_of_the_choice_and_of_short_fine_tunes_is_estimated(make_pipeline, make_batches):  # noqa: F811
    """In passes of the dense model over the rows of the choice, beside those that a run counts itself."""

    def work(**changes):
        pipeline = make_pipeline(GradPrunerPlus(**SETTINGS | changes))
        counts = count_model(pipeline.config)
        length, positions = tokens_per_row(pipeline.rows)
        own = stage_flops(pipeline)["decide"]
        one_row = counts.flops(1, length, logit_positions=positions)
        return own / one_row, (length, positions), one_row

    rows = 12  # of the pipeline
    passes = {edits: work(num_edits=edits)[0] / (0.2 * rows) for edits in (0, 4, 8)}
    assert passes[8] - passes[4] == pytest.approx(passes[4] - passes[0]) and passes[4] > passes[0]
    counted = GradPrunerPlus(**SETTINGS, num_edits=8).compress(make_model(), make_batches(6, batch_size=4))
    found = counted.report["candidates"]
    per_set = (found["dense_passes"] - 1) / len(found["candidates"])  # the run has fewer sets, as many are the same
    assert (passes[8] - passes[4]) / 4 == pytest.approx(per_set, rel=0.2)  # the head is not pruned

    plain, sizes, one_row = work()
    pipeline = make_pipeline(GradPrunerPlus(**SETTINGS))
    pruned = count_model(pipeline.config, pipeline.shape)
    trained = sum(n * pruned.training_flops(6 * steps, *sizes, 8) for n, steps in ((4, 2), (2, 3))) / one_row
    assert work(**HALVING)[0] - plain - trained == pytest.approx(6 * (passes[8] - passes[4]) / 4 * 0.2 * rows)
    assert work(greedy_width=2)[0] > plain + 0.2 * rows * 6 * per_set
    assert work(num_repaired=2)[0] > work(num_repaired=1)[0] > plain
    assert work(num_repaired=2, repair="least_squares")[0] == pytest.approx(plain)  # only judged repairs are compared


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"repair_rows": 9},
            r"takes 10 rows at least, got 9 of 12\. Give more training rows, or raise method\.repair_rows",
        ),
        ({"repair_rows": 9, "repair": "none"}, r"Candidates and changes are chosen by rows .*, got 9 of 12\."),
        ({"repair_rows": 9, "candidates": False}, r"got 9 of 12\. Give more .*method\.repair=least_squares"),
    ],
)
def test_too_few_rows_are_found_before_any_work(make_pipeline, changes, match, monkeypatch):  # noqa: F811
    monkeypatch.setattr("gradpruner.models.spec.ModelSpec.load", lambda *args, **kwargs: pytest.fail("loads weights"))
    with pytest.raises(ValueError, match=match):
        make_pipeline(GradPrunerPlus(**SETTINGS | changes)).run()
    make_pipeline(GradPrunerPlus(**SETTINGS | changes | {"repair_rows": 320})).check()


def test_halving_needs_one_process(make_pipeline, monkeypatch):  # noqa: F811
    pipeline = make_pipeline(GradPrunerPlus(**SETTINGS | HALVING))
    monkeypatch.setattr("gradpruner.processes.count", lambda: 2)
    with pytest.raises(ValueError, match=r"halving trains candidates on one process, got 2\. Set method\.halving=\[\]"):
        pipeline.method.check_training(pipeline.training)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"halving": (8, 0)},
            r"halving lists optimizer steps above 0, .*, got \[8, 0\]\. Set method\.halving=\[8,16,32\]",
        ),
        (HALVING | {"halving_batch_size": 0}, r"halving_batch_size must be above 0, got 0\. Raise method\."),
        (HALVING | {"num_repaired": 2}, r"as they are, unrepaired, got candidates=true and num_repaired=2\. Set"),
        (HALVING | {"candidates": False}, r"got candidates=false and num_repaired=0\. Set method\.candidates=true"),
        ({"merge_count": 1}, r"got candidates=true with merge_count=1 and .*Set method\.candidates=false"),
        ({"num_edits": -1}, r"num_edits must be 0 or above, got -1\. Set method\.num_edits=0"),
        ({"greedy_width": -2}, r"greedy_width must be 0 or above, got -2\. Set"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        GradPrunerPlus(**SETTINGS | changes)


def test_the_summary_names_the_sets_that_competed(tmp_path):
    """Of a committed record: the pruned set, the four next ones, how many more, and the dense model."""
    folder = Path(__file__).parents[1] / "results/records/gradpruner_plus"
    file = folder / "arc_easy-lora-gradpruner_plus-judged-distill-tuned0.5-lr0.003-seed0.json"
    record = RunRecord.from_dict(json.loads(file.read_text()), file)
    console = Console(width=200, record=True, file=io.StringIO())
    record.pruning["report"]["candidates"]["candidates"][1]["nlls_trained"] = [5.5, 4.25]
    show_summary([record], tmp_path, "title", console)
    said = (
        "edit 6.10 is pruned; edit 6.10 (trained 5.50, 4.25); edit 6.20; block_influence 6.23; edit 6.26; 7 more; "
        "dense 4.19"
    )
    assert f"Sets that competed, answer NLL on held-out training rows: {said}\n" in (text := console.export_text())
    assert re.search(r"\nCompression took (\d+ min )?\d+ s, \d+\.\d times its fine-tune\n", text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "less than a second"), (59.6, "1 min 0 s"), (12, "12 s"), (3725, "1 h 2 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
