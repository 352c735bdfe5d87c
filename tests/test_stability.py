import json

import pytest
import torch

from gradpruner.plan import lowest_layers
from gradpruner.stability import pruned_probability, stability_report


def overlap(first, second, num_pruned):
    """Returns the overlap of the lowest layers of two lists of steps, as a fraction of `num_pruned`, by hand."""
    sets = []
    for steps in (first, second):
        means = [sum(step[layer] for step in steps) / len(steps) for layer in range(len(steps[0]))]
        sets.append(set(sorted(range(len(means)), key=lambda layer: (means[layer], layer))[:num_pruned]))
    return len(sets[0] & sets[1]) / num_pruned


def steps(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("num_steps", [2, 3, 7, 12])
@pytest.mark.parametrize("seed", range(3))
def test_overlaps_agree_with_loops(num_steps, seed):
    values = torch.rand(num_steps, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    report = stability_report(values, 4)
    rows = values.tolist()
    assert report["prefix_overlap"] == [overlap(rows[:stop], rows, 4) for stop in range(1, num_steps + 1)]
    assert report["prefix_overlap"][-1] == 1.0
    middle = (num_steps + 1) // 2
    assert report["halves_overlap"] == overlap(rows[:middle], rows[middle:], 4)
    assert report["step_importance"] == rows
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_settled_run_has_no_warnings():
    report = stability_report(torch.arange(6.0).repeat(12, 1), 2)
    assert report["prefix_overlap"] == [1.0] * 12
    assert report["halves_overlap"] == 1.0
    assert report["top_step_share"] == pytest.approx(1 / 12)
    assert report["warnings"] == []


def test_first_step_without_gradient_is_null():
    report = stability_report(steps([0, 0, 0], [1, 2, 3], [1, 2, 3]), 1)
    assert report["prefix_overlap"] == [None, 1.0, 1.0]
    assert report["halves_overlap"] == 1.0


def test_half_without_gradient_is_null():
    report = stability_report(steps([0, 0, 0], [1, 2, 3]), 1)
    assert report["halves_overlap"] is None
    assert report["warnings"] == []


def test_nothing_pruned():
    report = stability_report(torch.rand(12, 4), 0)
    assert report["prefix_overlap"] == [None] * 12
    assert report["halves_overlap"] is None
    assert report["warnings"] == []


def test_last_step_that_changes_the_set_is_warned_about():
    rows = [[1.0, 2.0, 3.0, 4.0]] * 11 + [[100.0, 100.0, 0.0, 0.0]]
    report = stability_report(steps(*rows), 2)
    assert report["prefix_overlap"][-2:] == [0.0, 1.0]
    assert any("has not settled: over the last quarter of the 12 importance steps" in w for w in report["warnings"])
    assert any("only 0% of the layers" in w for w in report["warnings"])


def test_early_disagreement_alone_is_not_warned_about():
    rows = [[2.0, 1.0, 3.0, 4.0]] + [[1.0, 4.0, 5.0, 6.0]] * 11
    report = stability_report(steps(*rows), 1)
    assert report["prefix_overlap"] == [0.0] + [1.0] * 11
    assert report["warnings"] == []


def test_drift_between_halves_is_warned_about():
    report = stability_report(steps(*([[1.0, 2.0]] * 6 + [[2.0, 1.5]] * 6)), 1)
    assert report["halves_overlap"] == 0.0
    assert any("drifts: the two halves of the importance steps agree on only 0%" in w for w in report["warnings"])


def test_a_spike_that_moves_the_set_is_warned_about():
    values = torch.arange(1.0, 6.0).repeat(20, 1)
    values[18] = values[18].flip(0) * 100
    report = stability_report(values, 2)
    assert report["top_step_share"] == pytest.approx(101 / 119)
    assert [w for w in report["warnings"] if w.startswith("2 of 20 importance steps hold 85% of the gradient energy")]


def test_a_spike_that_moves_no_layer_is_not_warned_about():
    values = torch.arange(1.0, 6.0).repeat(20, 1)
    values[7] *= 100
    report = stability_report(values, 2)
    assert report["top_step_share"] == pytest.approx(101 / 119)
    assert report["warnings"] == []


def test_share_of_a_short_run_is_not_warned_about():
    report = stability_report(steps([0.0, 0.0], [100.0, 200.0], [1.0, 2.0]), 1)
    assert report["top_step_share"] == pytest.approx(300 / 303)
    assert report["warnings"] == []


def test_input_is_left_alone():
    values = torch.rand(5, 4)
    before = values.clone()
    stability_report(values, 2)
    assert torch.equal(values, before)


def test_final_set_is_the_one_that_the_plan_takes():
    values = torch.rand(8, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    final = set(lowest_layers(values.mean(dim=0).tolist(), 4))
    first = set(lowest_layers(values[0].tolist(), 4))
    assert stability_report(values, 4)["prefix_overlap"][0] == len(final & first) / 4


def test_no_gradient_at_all_is_still_json():
    json.dumps(stability_report(torch.zeros(4, 3), 1), allow_nan=False)


def test_layers_that_every_step_agrees_on_are_certain():
    steps = torch.tensor([[5.0, 1.0, 4.0, 2.0]] * 6)
    assert pruned_probability(steps, 2) == [0.0, 1.0, 0.0, 1.0]
    report = stability_report(steps, 2)
    assert report["undecided_layers"] == [] and report["pruned_probability"] == [0.0, 1.0, 0.0, 1.0]


def test_layers_near_the_cut_are_named_with_their_chance():
    """Layer 1 is below layer 2 in one of two steps: without ties it would be pruned in half of the draws."""
    steps = torch.tensor([[9.0, 1.0, 3.0], [9.0, 3.0, 1.0]])
    probability = pruned_probability(steps, 1)
    # Half of all draws have both steps: a tie, which goes to the lower index. A quarter each have one step twice.
    assert probability == pytest.approx([0.0, 0.75, 0.25], abs=0.05)
    assert stability_report(steps, 1)["undecided_layers"] == [1, 2]
    assert pruned_probability(steps, 1) == probability
    assert pruned_probability(steps, 0) == [0.0, 0.0, 0.0] and sum(pruned_probability(steps, 2)) == pytest.approx(2.0)
