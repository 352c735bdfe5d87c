"""The headline chart says what the records say, and has the paper's values only where they were measured alike."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reporting.test_figures import RECORDS, committed, run
from reporting.test_tables import shape

from experiments.config import CONF
from gradpruner.reporting.comparing import QUANTILE
from gradpruner.reporting.headline import headline
from gradpruner.reporting.headline_plot import caption_of, draw_panels, side_by_side, write_headline
from gradpruner.reporting.published import load_published

PAPER = [load_published(CONF.parent / "results" / "paper", name) for name in ("table1", "table2", "table11")]


def scored(method, value, seed=0, dataset="arc_easy", mode="likelihood", **settings):
    metrics = {"num_examples": 400, "accuracy": value, "accuracy_stderr": 0.02, "accuracy_mode": mode}
    metrics |= {"accuracy_match": "raw"} if mode == "generate" else {"chance_accuracy": 0.25}
    return run(method, () if method == "dense" else (1, 2), seed=seed, dataset=dataset, metrics=metrics, **settings)


def test_a_point_is_the_mean_of_datasets_of_means_of_seeds():
    records = [scored("laco", value, seed) for seed, value in enumerate((0.4, 0.6))]
    records += [scored("laco", 0.7, dataset="piqa"), scored("dense", 0.8), scored("dense", 0.9, dataset="piqa")]
    chart = headline(records)
    [point] = chart.points
    assert point.quality.value == pytest.approx((0.5 + 0.7) / 2) and point.num_seeds == (1, 2)
    # Two seeds: standard error 0.1, with that of the rows; both datasets count as independent.
    reach = QUANTILE * ((0.1**2 + 0.02**2) + 0.02**2) ** 0.5 / 2
    assert point.quality.high - point.quality.value == pytest.approx(reach)
    assert chart.dense.value == pytest.approx(0.85) and chart.guessing == 0.25
    assert chart.datasets == ["ARC-Easy", "PIQA"] and point.places["parameters"] == 60.0


def test_methods_that_lack_a_dataset_are_named_and_left_out():
    pairs = [(method, data) for method in ("dense", "laco", "random") for data in ("arc_easy", "piqa")]
    records = [scored(method, 0.5, dataset=data) for method, data in pairs]
    chart = headline([*records, scored("last", 0.9)])
    assert [point.label for point in chart.points] == ["LaCo", "Random"]
    assert chart.left_out == ["Last but the final one"]
    assert "Left out, for lack of a dataset: Last but the final one." in caption_of(chart)


def test_one_sparsity_for_all_methods_but_every_one_of_a_single_method():
    sweep = [scored("gradpruner", 0.9 - sparsity, sparsity=sparsity) for sparsity in (0.2, 0.4, 0.6)]
    assert [point.label for point in headline(sweep).points] == [
        f"GradPruner, {percent} % of layers pruned" for percent in (20, 40, 60)
    ]
    chart = headline([*sweep, scored("laco", 0.1, sparsity=0.4)])
    assert [(point.letter, point.label, point.quality.value) for point in chart.points] == [
        ("A", "GradPruner", 0.5),
        ("B", "LaCo", 0.1),
    ]


@pytest.mark.parametrize(
    "repaired", [{"repair": "judged"}, {"repair": "least_squares"}, {"merge_rule": "least_squares"}]
)
def test_a_repaired_method_is_not_shown_under_its_plain_name(repaired):
    better, plain, other = scored("gradpruner", 0.6, **repaired), scored("gradpruner", 0.5), scored("laco", 0.4)
    for runs in itertools.permutations([better, plain, other]):
        assert [(point.label, point.quality.value) for point in headline(runs).points] == [
            ("GradPruner", 0.5),
            ("LaCo", 0.4),
        ]
    assert headline([better, other]).points[0].label == "GradPruner, repaired"
    plus = scored("gradpruner_plus", 0.6, repair="judged")
    assert headline([plus, other]).points[0].label == "GradPruner+"


def test_the_papers_value_is_there_only_if_it_was_measured_alike():
    both = [scored("dense", 0.8, mode="generate"), scored("gradpruner", 0.5, mode="generate")]
    [point] = headline(both, PAPER).points
    quality, places = point.paper
    row = PAPER[0].select(method="gradpruner", finetune="lora", model="meta-llama/Llama-3.1-8B")[0]
    assert quality == float(row.values[PAPER[0].columns.index("arc_easy")])
    assert (places["time"], places["memory"]) == (66.9, 64.4)
    assert places["parameters"] == pytest.approx(100 * 4.67 / 7.5)
    assert "Grey: the paper's values" in caption_of(headline(both, PAPER))
    [point] = headline([scored("dense", 0.8), scored("gradpruner", 0.5)], PAPER).points
    assert point.paper is None


def test_timings_serve_models_of_the_same_shapes():
    phase = {"median_seconds": 1.0, "peak_memory_bytes": 50}
    half = {"time": 0.5, "memory": 0.5}
    speed = {
        "ratios": {"train": half, "prefill": {"time": 0.6, "memory": 0.7}, "decode": half},
        "own": dict.fromkeys(("prefill", "decode"), phase),
        "dense": dict.fromkeys(("prefill", "decode"), phase | {"peak_memory_bytes": 100}),
    }
    records = [scored("dense", 0.8), scored("laco", 0.5), scored("random", 0.4)]
    timed = scored("last", 0.3, dataset="piqa")
    timed = replace(timed, efficiency=timed.efficiency | {"speed": speed})
    chart = headline([*records, timed])
    assert {point.label: (point.places["time"], point.places["memory"]) for point in chart.points} == {
        "LaCo": (60.0, 50.0),
        "Random": (60.0, 50.0),
    } and chart.axis_notes["time"].startswith("time per prompt: inference, timed in turns")

    # Timings of another setting, which has fewer of the models, are not mixed with these.
    slow = speed | {"ratios": speed["ratios"] | {"prefill": {"time": 0.9, "memory": 0.9}}}
    other = scored("last", 0.3, dataset="winogrande")
    other = replace(other, efficiency=other.efficiency | {"speed": slow})
    smaller = replace(scored("random", 0.4, dataset="piqa"), efficiency=timed.efficiency)
    smaller.pruning["shape"] = records[2].pruning["shape"] = shape(4, hidden_size=1)
    for order in ([other, timed, smaller], [timed, smaller, other]):
        chart = headline([*records, *order])
        assert [point.places["time"] for point in chart.points] == [60.0, 60.0]
    for each in records[1:]:
        each.pruning["shape"] = shape(4, hidden_size=2)
    chart = headline([*records, timed])
    assert all(point.places["time"] == 100.0 for point in chart.points) and "training time" in chart.axis_notes["time"]


def test_the_caption_names_datasets_and_loss():
    loss = {"loss": "distill", "tuned_teacher": 0.5}
    records = [scored("laco", 0.5, dataset=name) for name in ("piqa", "arc_easy", "winogrande")]
    assert "on ARC-Easy, PIQA and WinoGrande, " in caption_of(headline(records))
    assert "distilled" not in caption_of(headline(records))
    for record in records:
        record.config["finetune"].update(loss)
    assert ", LoRA, distilled, tuned teacher 0.5, 10 steps" in caption_of(headline(records[:1]))


def test_there_is_no_chart_without_pruning():
    assert headline([scored("dense", 0.8)]) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 5))
def test_marks_do_not_hide_each_other(places, gap):
    moved = side_by_side(places, gap)
    ordered = sorted(moved)
    assert all(after - before >= gap - 1e-6 for before, after in itertools.pairwise(ordered))
    for first, one in enumerate(places):
        for second, other in enumerate(places):
            assert not one < other or moved[first] < moved[second]
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)


def test_marks_that_are_apart_do_not_move():
    assert side_by_side([5.0, 1.0], 2.0) == [5.0, 1.0] and side_by_side([3.0, 3.0], 1.0) == [2.5, 3.5]


def test_panels_and_picture_have_the_numbers_as_text(tmp_path):
    chart = headline(committed("depth"))
    panels = draw_panels(chart, tmp_path)
    assert [panel.path.stem for panel in panels] == ["headline-parameters", "headline-time", "headline-memory"]
    best = chart.points[0]
    assert f"{best.label} {best.quality.value:.3f} at 68 %" in panels[0].alt
    picture = write_headline(chart, tmp_path / "a.svg")
    text = re.sub(r"\s+", " ", (tmp_path / "a.svg").read_text())
    assert f"A {best.label} {best.quality.value:.2f}" in text and "smollm2-135m (134.5 M parameters)" in picture.caption
    again = write_headline(chart, tmp_path / "b.svg")
    assert again.path.read_bytes() == picture.path.read_bytes()


def test_the_records_that_the_readme_shows():
    paths = sorted(RECORDS.rglob("*.json"))
    assert len(paths) > 300 and all(json.loads(path.read_text())["schema_version"] == 3 for path in paths[:3])
    chart = headline(committed("small", "methods"))
    assert chart.datasets == ["ARC-Easy", "PIQA"] and len(chart.points) >= 10
    assert caption_of(chart).startswith("smollm2-135m (134.5 M parameters) on ARC-Easy and PIQA, 320 training rows")
