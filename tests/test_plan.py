import dataclasses
import json
import random

import pytest

from gradpruner.plan import (
    PLAN_VERSION,
    PruningPlan,
    check_counts,
    lowest_layers,
    make_plan,
    most_important_layers,
    preceding_kept_layer,
)

SCORES = [9.0, 2.0, 8.0, 1.0, 3.0, 7.0, 0.5, 4.0]  # lowest first: 6, 3, 1, 4, 7, 5, 2, 0


def random_scores(seed, num_layers=32):
    generator = random.Random(seed)
    return [generator.choice([0.0, 0.5, 1.0, generator.random()]) for _ in range(num_layers)]  # with ties


# Choosing


def test_prunes_the_lowest_and_merges_the_most_important_of_them():
    plan = make_plan(SCORES, 4, 2)
    assert plan.pruned_layers == (1, 3, 4, 6)
    assert plan.kept_layers == (0, 2, 5, 7)
    assert plan.absorbed_by == {1: 0, 4: 2}
    assert plan.merges == {0: (1,), 2: (4,)}
    assert plan.layer_importance == tuple(SCORES)
    assert (plan.merge_rule, plan.density, plan.method) == ("sign_average", 0.2, "gradpruner")


@pytest.mark.parametrize("seed", range(20))
def test_every_layer_exactly_once_and_absorbers_are_the_nearest_kept_before(seed):
    scores = random_scores(seed)
    generator = random.Random(seed)
    num_pruned = generator.randint(0, 30)
    merge_count = generator.randint(0, num_pruned)
    plan = make_plan(scores, num_pruned, merge_count)
    assert sorted(plan.kept_layers + plan.pruned_layers) == list(range(32))
    assert (len(plan.pruned_layers), len(plan.absorbed_by)) == (num_pruned, merge_count)
    for layer, absorber in plan.absorbed_by.items():
        before = [kept for kept in plan.kept_layers if kept < layer]
        assert layer in plan.pruned_layers
        assert absorber == (max(before) if before else None)
    merged = [layer for layers in plan.merges.values() for layer in layers]
    assert sorted(merged + list(plan.dropped_unmerged)) == sorted(plan.absorbed_by)
    assert list(plan.merges) == sorted(plan.merges)
    worst_kept = min(scores[layer] for layer in plan.kept_layers)
    assert all(scores[layer] <= worst_kept for layer in plan.pruned_layers)
    left_out = [scores[layer] for layer in plan.pruned_layers if layer not in plan.absorbed_by]
    assert all(scores[layer] >= max(left_out, default=0.0) for layer in plan.absorbed_by)


def test_authors_plan_for_llama_3():
    """Layers 18 to 30 of 32 are pruned; 18, 19 and 30 merge into 17 (baselines.md, section 1)."""
    scores = [0.0 if 18 <= layer <= 30 else 1.0 for layer in range(32)]
    plan = make_plan(scores, 13, 3, merged_layers=(18, 19, 30))
    assert plan.pruned_layers == tuple(range(18, 31))
    assert plan.absorbed_by == {18: 17, 19: 17, 30: 17}
    assert plan.merges == {17: (18, 19, 30)}
    assert len(plan.kept_layers) == 19


def test_ties_lowest_index_first():
    assert lowest_layers([1.0] * 6, 3) == (0, 1, 2)
    assert lowest_layers([2.0, 1.0, 1.0, 1.0], 2) == (1, 2)
    assert most_important_layers([1.0] * 6, (2, 3, 5), 2) == (2, 3)
    assert most_important_layers([0.0, 1.0, 3.0, 3.0], (1, 2, 3), 1) == (2,)


def test_minus_zero_ties_with_zero():
    assert lowest_layers([0.0, -0.0, 0.0], 1) == (0,)


def test_nothing_chosen():
    assert lowest_layers(SCORES, 0) == ()
    assert most_important_layers(SCORES, (), 0) == ()
    plan = make_plan(SCORES, 0, 0)
    assert (plan.pruned_layers, plan.absorbed_by, plan.kept_layers) == ((), {}, tuple(range(8)))


def test_preceding_kept_layer():
    assert preceding_kept_layer(5, (5,)) == 4
    assert preceding_kept_layer(5, (3, 4, 5)) == 2
    assert preceding_kept_layer(1, (0, 1)) is None
    assert preceding_kept_layer(0, (0,)) is None


def test_first_layers_pruned_are_dropped_unmerged():
    plan = make_plan([0.0, 0.1, 5.0, 0.2, 6.0], 3, 3)
    assert plan.absorbed_by == {0: None, 1: None, 3: 2}
    assert plan.dropped_unmerged == (0, 1)
    assert plan.merges == {2: (3,)}


def test_adjacent_pruned_layers_share_an_absorber():
    plan = make_plan([5.0, 1.0, 2.0, 3.0, 6.0, 7.0], 3, 2)
    assert plan.absorbed_by == {2: 0, 3: 0}
    assert plan.merges == {0: (2, 3)}


def test_last_layer_can_leave_and_merge():
    assert make_plan([3.0, 2.0, 1.0], 1, 1).absorbed_by == {2: 1}


def test_rule_none_merges_nothing():
    plan = make_plan(SCORES, 4, 2, merge_rule="none")
    assert plan.absorbed_by == plan.merges == {}


def test_explicit_merged_layers():
    plan = make_plan(SCORES, 4, 3, merged_layers=(6, 3))
    assert plan.absorbed_by == {6: 5, 3: 2}
    assert plan.merges == {2: (3,), 5: (6,)}


def test_explicit_merged_layers_ignore_merge_count():
    """The docstring of `make_plan` promises this."""
    assert make_plan(SCORES, 2, 3, merged_layers=(6,)).absorbed_by == {6: 5}
    assert make_plan(SCORES, 4, 2, merged_layers=()).absorbed_by == {}


# Refusals


def test_explicit_layer_that_stays():
    with pytest.raises(ValueError, match=r"among the pruned layers \[1, 3, 4, 6\], got \[0, 5\] besides"):
        make_plan(SCORES, 4, 0, merged_layers=(5, 3, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity for layers \[1, 3\]"):
        make_plan([0.0, bad, 1.0, bad], 1, 0)


@pytest.mark.parametrize(("num_layers", "num_pruned"), [(8, 7), (8, 8), (8, 9), (8, -1), (2, 1)])
def test_too_many_layers_pruned(num_layers, num_pruned):
    message = f"leave at least 2 of the model's {num_layers} decoder layers, got {num_pruned}"
    with pytest.raises(ValueError, match=message):
        check_counts(num_layers, num_pruned, 0)
    with pytest.raises(ValueError, match=message):
        make_plan([1.0] * num_layers, num_pruned, 0)


@pytest.mark.parametrize("merge_count", [-1, 4])
def test_too_many_layers_merged(merge_count):
    with pytest.raises(ValueError, match=f"between 0 and the 3 pruned layers, got {merge_count}"):
        check_counts(8, 3, merge_count)


def test_largest_counts_that_fit():
    check_counts(8, 6, 6)
    check_counts(2, 0, 0)


# On disk


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(seed, tmp_path):
    plan = make_plan(random_scores(seed), 12, 5, merge_rule="sign_sum", density=0.3, method="some_method")
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    plan.save(tmp_path / "deep" / "plan.json")
    assert PruningPlan.load(tmp_path / "deep" / "plan.json") == plan
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["plan.json"]


def test_round_trip_of_the_smallest_plan(tmp_path):
    plan = PruningPlan(num_hidden_layers=4)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_file_spells_out_what_readers_want():
    data = make_plan([0.0, 0.1, 5.0, 0.2, 6.0], 3, 3).to_dict()
    assert data["kept_layers"] == [2, 4]
    assert data["dropped_unmerged"] == [0, 1]
    assert data["absorbed_by"] == {"0": None, "1": None, "3": 2}
    assert data["version"] == PLAN_VERSION


@pytest.mark.parametrize("version", [None, 0, PLAN_VERSION + 1, "1"])
def test_plan_of_another_version(version):
    data = make_plan(SCORES, 4, 2).to_dict() | {"version": version}
    with pytest.raises(ValueError, match=f"Cannot read plan version {version!r}, this release writes {PLAN_VERSION}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("pruned", [[1, 1], [3, 1], [8], [-1, 1]])
def test_damaged_pruned_layers(pruned):
    data = PruningPlan(num_hidden_layers=8).to_dict() | {"pruned_layers": pruned}
    with pytest.raises(ValueError, match=r"ascending, distinct and within 0 to 7, got \[.*\]\. The plan is damaged"):
        PruningPlan.from_dict(data)


def test_damaged_layer_importance():
    data = make_plan(SCORES, 4, 2).to_dict() | {"layer_importance": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"one score for each of 8 layers, got 2\. The plan is damaged"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("absorbed_by", [{"0": None}, {"1": 1}, {"1": None}, {"1": 2}, {"6": 2}, {"4": 0}])
def test_damaged_absorbed_by(absorbed_by):
    data = make_plan(SCORES, 4, 2).to_dict() | {"absorbed_by": absorbed_by}
    layer, absorber = next(iter(absorbed_by.items()))
    with pytest.raises(ValueError, match=f"nearest kept layer before them, got {layer} -> {absorber} with pruned"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(PruningPlan)])
def test_plan_with_a_missing_entry(missing):
    data = make_plan(SCORES, 4, 2).to_dict()
    del data[missing]
    with pytest.raises(ValueError, match=rf"The plan lacks {missing}: it is damaged\. Make it again"):
        PruningPlan.from_dict(data)


def test_entries_for_readers_are_not_needed_to_load():
    data = make_plan(SCORES, 4, 2).to_dict()
    del data["kept_layers"], data["dropped_unmerged"]
    assert PruningPlan.from_dict(data) == make_plan(SCORES, 4, 2)


def test_half_a_file(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(SCORES, 4, 2).save(path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="line 3 column"):
        PruningPlan.load(path)


def test_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_plan(SCORES, 4, 2).density = 0.5
