"""Figures show the numbers that they are made from, and the same data gives the same file."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from reporting.test_tables import CONFIG, record, shape

from experiments.config import CONF
from gradpruner.record import RunRecord
from gradpruner.reporting.comparison_figures import FIGURES, MOST_CURVES, MOST_ROWS, draw
from gradpruner.reporting.comparison_plots import plot_losses
from gradpruner.reporting.figures import KEPT, LINE_STYLES, MERGED
from gradpruner.reporting.layer_figures import plot_importance_map, plot_plans, plot_sensitivity, sensitivity_curve
from gradpruner.reporting.means import measure
from gradpruner.reporting.run_groups import in_order, run_labels

RECORDS = CONF.parent / "results" / "records"
HISTORIES = {"a": [{"step": step, "loss": 3.0 / step} for step in range(1, 101)], "b": [{"step": 1, "loss": 2.0}]}


@pytest.fixture
def drawn(monkeypatch):
    """Collects figures in the order in which they are written."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def committed(*folders):
    paths = [path for folder in folders for path in sorted((RECORDS / folder).glob("*.json"))]
    return [RunRecord.from_dict(json.loads(path.read_text()), path) for path in paths]


def run(
    method, pruned=(), accuracy=0.5, seed=0, dataset="arc_easy", absorbed_by=None, scores=(), metrics=None, **settings
):
    """Makes a run of a model with six layers."""
    config = {"dataset": CONFIG["dataset"] | {"_target_": f"gradpruner.tasks.{dataset}.Task"}}
    values = {"accuracy": accuracy, "accuracy_stderr": 0.02} if metrics is None else metrics
    made = record(method, seed=seed, config=config, metrics=values, **settings)
    pruning = made.pruning | {
        "pruned_layers": list(pruned),
        "absorbed_by": absorbed_by or {},
        "layer_importance": list(scores),
        "num_hidden_layers": 6 - len(pruned),
        "shape": shape(6 - len(pruned)),
        "report": {},  # its own: tests write into it
    }
    model = made.model | {"num_hidden_layers": 6, "shape": shape(6)}
    key = json.dumps([method, list(pruned), accuracy, seed, dataset, settings])
    return dataclasses.replace(made, pruning=pruning, model=model, identity=key)


# ---- sensitivity


@pytest.mark.parametrize("top", [1, 3, 8])
def test_sensitivity_is_that_of_sorted_prefix_means(top):
    series = np.random.default_rng(0).lognormal(size=(20, 8))

    def largest(matrix):
        means = [sum(column) / len(matrix) for column in matrix.T]
        return {layer for _, layer in sorted((-mean, layer) for layer, mean in enumerate(means))[:top]}

    expected = [len(largest(series[:stop]) & largest(series)) / top for stop in range(1, 21)]
    curve = sensitivity_curve(series, top)
    assert curve.shape == (20,) and curve.tolist() == expected
    assert curve[-1] == 1.0 and (top == 8) == (curve.min() == 1.0)


def test_sensitivity_by_hand():
    # Means so far: (4, 1, 0), (2, 3, 0), (4/3, 2, 3).
    assert sensitivity_curve([[4, 1, 0], [0, 5, 0], [0, 0, 9]], 1).tolist() == [0.0, 0.0, 1.0]
    assert sensitivity_curve([[4, 1, 0], [0, 5, 0], [0, 0, 9]], 2).tolist() == [0.5, 0.5, 1.0]


def test_the_text_of_figure_2_starts_at_the_first_gradient(tmp_path):
    curves = {"with": np.array([0.5, 0.75, 1.0]), "without": np.array([np.nan, 0.25, 1.0])}
    text = plot_sensitivity(curves, "4", tmp_path / "figure2.png").alt
    assert "with: 50 % at 33 % of 3 steps" in text and "without: 25 % at 67 % of 3 steps" in text


def test_sensitivity_edges():
    assert sensitivity_curve([[1.0, 2.0]], 1).tolist() == [1.0]  # one step
    assert sensitivity_curve(np.ones((3, 4)), 2).tolist() == [1.0] * 3  # all equal
    curve = sensitivity_curve([[0.0, 0.0], [1.0, 2.0]], 1)  # LoRA's first step: B is zero
    assert np.isnan(curve[0]) and curve[1] == 1.0


def test_sensitivity_refuses_what_is_no_series():
    with pytest.raises(ValueError, match=r"one row a step and one column a layer, got shape \(3,\)"):
        sensitivity_curve([1.0, 2.0, 3.0], 1)
    for top in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and the 2 layers, got {top}"):
            sensitivity_curve([[1.0, 2.0]], top)


# ---- means


def test_mean_over_datasets_of_means_over_seeds():
    points = [
        ("a", 1.0, run("a", accuracy=value, seed=seed, dataset=dataset))
        for dataset, values in (("piqa", (0.2, 0.4)), ("arc_easy", (0.9,)))
        for seed, value in enumerate(values)
    ]
    lines, datasets, _ = measure(points, "accuracy")
    point = lines["a"][1.0]
    assert datasets == ["arc_easy", "piqa"] and (point.num_datasets, point.num_seeds) == (2, 1)
    assert point.value == pytest.approx((0.3 + 0.9) / 2)
    assert point.error == pytest.approx(np.hypot(np.std([0.2, 0.4], ddof=1) / np.sqrt(2), 0.02) / 2)


def test_only_datasets_of_every_line_count():
    points = [("a", 1.0, run("a", accuracy=0.2)), ("a", 1.0, run("a", accuracy=0.8, dataset="piqa"))]
    points += [("a", 2.0, run("a", accuracy=0.7, dataset="piqa")), ("b", 1.0, run("b", accuracy=0.4))]
    lines, datasets, left_out = measure(points, "accuracy")
    assert datasets == ["arc_easy"] and left_out == []
    assert {label: {x: point.value for x, point in line.items()} for label, line in lines.items()} == {
        "a": {1.0: 0.2},
        "b": {1.0: 0.4},
    }
    assert measure([points[1], points[3]], "accuracy")[1:] == (["piqa"], ["b"])  # nothing that both have


def test_similarity_of_different_encoders_is_not_averaged():
    def text(encoder):
        return {"similarity": 0.5, "similarity_stderr": 0.1, "bertscore_encoder": encoder, "bertscore_layer": 1}

    runs = [run(name, dataset="billsum", metrics=text(name)) for name in "ab"]
    lines, _, left_out = measure([(name, 1.0, one) for name, one in zip("ab", runs, strict=True)], "main")
    assert len(lines) == 1 and len(left_out) == 1
    assert measure([("a", 1.0, runs[0])], "main")[0]["a"][1.0].value == 0.5
    assert measure([("a", 1.0, runs[0])], "accuracy") == ({}, [], [])


def test_a_line_that_lacks_datasets_of_the_others_is_left_out():
    points = [(name, 1.0, run(name, dataset=data)) for name in "ab" for data in ("arc_easy", "piqa", "winogrande")]
    lines, datasets, left_out = measure([*points, ("c", 1.0, run("c", dataset="piqa"))], "accuracy")
    assert (list(lines), len(datasets), left_out) == (["a", "b"], 3, ["c"])


def test_labels_say_what_differs_and_no_two_are_alike():
    assert run_labels([run("laco"), run("dense")]) == ["LaCo", "Dense"]
    assert run_labels([run("laco"), run("laco", dataset="piqa")]) == ["LaCo / ARC-Easy", "LaCo / PIQA"]
    assert run_labels([run("laco", rule=1), run("laco", rule=2, seed=1)]) == [
        "LaCo, rule 1 / seed 0",
        "LaCo, rule 2 / seed 1",
    ]
    same = [dataclasses.replace(run("laco"), identity=key) for key in ("0123456789", "9876543210")]
    assert run_labels(same) == ["LaCo / 01234567", "LaCo / 98765432"]


def test_every_run_is_shown_once():
    runs = [run("gradpruner"), run("dense"), run("gradpruner"), run("laco", seed=1), run("laco")]
    assert [(one.pruning["method"], one.seed) for one in in_order(runs)] == [
        ("dense", 0),
        ("laco", 0),
        ("laco", 1),
        ("gradpruner", 0),
    ]


# ---- what is drawn


def test_loss_curves(drawn, tmp_path):
    plot_losses(HISTORIES, tmp_path / "a.png")
    every, smooth, *_ = drawn[0].axes[0].lines
    assert every.get_ydata().tolist() == [3.0 / step for step in range(1, 101)]
    assert smooth.get_ydata()[:3].tolist() == pytest.approx([3.0, (3 + 1.5) / 2, (3 + 1.5 + 1) / 3])
    assert smooth.get_ydata()[-1] == pytest.approx(sum(3.0 / step for step in range(93, 101)) / 8)


def test_accuracy_against_layers_pruned(drawn, tmp_path):
    runs = [run("dense", accuracy=0.9)]
    runs += [run("last", range(1, 1 + n), 0.9 - n / 10, sparsity=n / 6) for n in (3, 1, 2)]
    [picture] = draw("5", runs, tmp_path, methods=["last"])
    axes = drawn[0].axes[0]
    points, dense = axes.containers[0].lines[0], [line for line in axes.lines if line.get_label() == "Dense"]
    assert points.get_xdata().tolist() == [1, 2, 3] and points.get_ydata() == pytest.approx([0.8, 0.7, 0.6])
    assert dense[0].get_ydata() == [0.9, 0.9]
    assert (
        picture.path.name == "figure5-model-lora.png" and "Last but the final one 0.800 at 1, 0.700 at 2" in picture.alt
    )


def test_accuracy_against_density(drawn, tmp_path):
    runs = [run("gradpruner", [3], d, absorbed_by={"3": 2}, density=d) for d in (0.5, 0.1)]
    runs.append(run("gradpruner", [3], 0.3, density=0.3))  # does not merge
    draw("6", runs, tmp_path)
    points = drawn[0].axes[0].containers[0].lines[0]
    assert points.get_xdata() == pytest.approx([10, 50]) and points.get_ydata() == pytest.approx([0.1, 0.5])
    with pytest.raises(ValueError, match="shows runs that merge layers at two or more densities, got none among 2"):
        draw("6", runs[1:], tmp_path)


def test_other_rows_of_a_dataset_have_a_picture_of_their_own(tmp_path):
    first, second = ([run("last", layers, accuracy) for layers in ([1], [1, 2])] for accuracy in (0.5, 0.1))
    for each in second:
        each.config["dataset"]["max_train_samples"] = 5
    assert len(draw("5", [*first, *second], tmp_path, methods=["last"])) == 2


def test_layers_pruned_are_those_of_gradpruner_without_merging_unless_others_are_asked_for(tmp_path):
    mistral = {"model": {"path": "mistralai/Mistral-7B-v0.3"}}
    depths = ([1], [1, 2])
    own, other = ([run("igia_only", layers, accuracy) for layers in depths] for accuracy in (0.5, 0.3))
    for each in other:
        each.config.update(mistral)
    runs = [run("dense"), *own, *other, *(run("last", layers) for layers in depths)]
    assert [len(draw(figure, runs, tmp_path)) for figure in ("5", "8")] == [1, 2]
    assert "Last but" not in draw("5", runs, tmp_path)[0].alt
    assert "Last but" in draw("5", runs, tmp_path, methods=["igia_only", "last"])[0].alt


def test_only_some_methods_have_a_loss_curve_if_there_are_too_many(tmp_path):
    runs = [run("dense"), *(run("last", [layer], layer=layer) for layer in range(MOST_CURVES))]
    histories = {each.identity: HISTORIES["a"] for each in runs}
    assert "Last" not in draw("1", runs, tmp_path, histories)[0].alt
    assert "Last" in draw("1", runs, tmp_path, histories, ["last"])[0].alt
    assert "Last" in draw("1", runs[:3], tmp_path, histories)[0].alt


def test_bars_by_merge_rule(drawn, tmp_path):
    runs = [run("dense", accuracy=0.9), run("igia_only", [3], 0.5)]
    runs += [run("gradpruner", [3], value, merge_rule=rule) for rule, value in (("fisher", 0.6), ("sign_sum", 0.7))]
    draw("7", [*runs, run("laco", [3])], tmp_path)
    axes = drawn[0].axes[0]
    labels = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    widths = [patch.get_width() for patch in axes.patches]
    assert dict(zip(labels, widths, strict=True)) == {
        "Dense": 0.9,
        "GradPruner w/o merging": 0.5,
        "GradPruner, Fisher merging": 0.6,
        "GradPruner, same signs summed (Eq. 5)": 0.7,
    }
    assert len({patch.get_hatch() for patch in axes.patches}) == 4


def test_importance_map(drawn, tmp_path):
    runs = {"a": run("a", [1, 5], scores=[5, 1, 0, -2, 3, 1]), "b": run("b", scores=[1] * 6)}
    plot_importance_map(runs, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    shares = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shares, [[50, 10, np.nan, np.nan, 30, 10], [100 / 6] * 6])
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [(1, 0), (5, 0)]
    plot_importance_map({"a": run("a", scores=[0.0] * 6)}, tmp_path / "b.png")  # nothing above 0


def test_plan_boxes(drawn, tmp_path):
    narrow = run("llm_pruner")
    narrow.pruning["shape"] = {"hidden_size": 2, "intermediate_size": [8, 4, 8, 8, 8, 8]}
    merged = run("gradpruner", [2, 3, 5], absorbed_by={"2": 1, "3": 1, "5": None})
    plot_plans({"merged": merged, "narrow": narrow}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    colors = [to_hex(patch.get_facecolor()).upper() for patch in axes.patches[:6]]
    white = "#FFFFFF"
    assert colors == [KEPT, KEPT, MERGED, MERGED, KEPT, white]  # no layer absorbs 5
    assert [patch.get_height() for patch in axes.patches[6:12]] == pytest.approx([0.25, 0.125, *[0.25] * 4])
    assert axes.lines[0].get_xdata().tolist() == [1, 3]  # from the last merged layer to what absorbs it


def test_runs_that_look_alike_are_one_row(tmp_path):
    scores = [5, 1, 4, 2, 3, 1]
    runs = [run("igia_only", [3], scores=scores), run("gradpruner", [3], scores=scores, accuracy=0.6)]
    [picture] = draw("importance", [*runs, run("gradpruner", [5], scores=scores), run("dense")], tmp_path)
    assert "GradPruner w/o merging (+1 alike): pruned 3. GradPruner: pruned 5." in picture.alt
    assert picture.caption.endswith("+1 alike: so many more runs look the same.")
    [picture] = draw("plans", [*runs, run("igia_only", [3], seed=1)], tmp_path)  # methods have rows of their own
    assert "GradPruner w/o merging (+1 alike): pruned 3. GradPruner: pruned 3." in picture.alt


@pytest.mark.parametrize(
    ("figure", "stem", "most"),
    [("importance", "importance", MOST_ROWS), ("plans", "plans", MOST_ROWS), ("2", "figure2", MOST_CURVES)],
)
def test_what_is_too_much_for_one_picture_is_one_a_dataset(figure, stem, most, tmp_path):
    runs = [
        run("gradpruner", [layer], 0.5, seed, dataset, {str(layer): seed}, [layer, seed, *[1] * 4], layer=[layer, seed])
        for dataset in ("arc_easy", "piqa")
        for layer in range(6)
        for seed in range(most // 6 + 1)
    ]
    for each in runs:
        each.pruning["report"]["step_importance"] = [each.pruning["layer_importance"]]
    drawn = [picture.path.stem for picture in draw(figure, runs, tmp_path)]
    assert drawn == [f"{stem}{end}" for end in ("-arc-easy", "-arc-easy-2", "-piqa", "-piqa-2")]
    assert [picture.path.stem for picture in draw(figure, runs[:6], tmp_path)] == [stem]


def test_sensitivity_of_seeds_is_one_line(drawn, tmp_path):
    first, second, longer = (run("gradpruner", [0, 1, 2], seed=seed) for seed in range(3))
    first.pruning["report"]["step_importance"] = [[0, 0, 0, 1, 2, 3], [9, 0, 0, 0, 2, 3]]  # top 3: 3, 4, 5; 0, 4, 5
    second.pruning["report"]["step_importance"] = [[0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    longer.pruning["report"]["step_importance"] = [[0, 0, 0, 1, 2, 3]] * 3  # steps=auto
    draw("2", [first, second, longer], tmp_path)
    lines = {line.get_label(): line.get_ydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines["GradPruner / seed 0 (mean of 2 seeds)"] == pytest.approx([100 * (2 / 3 + 1) / 2, 100])
    assert lines["GradPruner / seed 2"] == [100, 100, 100]


def test_no_two_line_styles_are_alike_without_colour():
    assert len({(style["marker"], style["linestyle"]) for style in LINE_STYLES}) == len(LINE_STYLES)


# ---- files


@pytest.mark.parametrize("figure", FIGURES)
def test_same_records_same_file_and_nothing_reaches_its_edge(figure, tmp_path):
    records = committed("methods" if figure in ("7", "9") else "small" if figure in ("5", "8") else "depth")
    if figure == "6":
        [merged] = [record for record in records if record.pruning["method"] == "gradpruner"]
        method = merged.config["method"] | {"density": 0.5}
        records.append(dataclasses.replace(merged, identity="other", config=merged.config | {"method": method}))
    histories = {record.identity: HISTORIES["a"] for record in records}
    pictures = [draw(figure, records, tmp_path / folder, histories) for folder in "ab"]
    for first, second in zip(*pictures, strict=True):
        assert first.path.read_bytes() == second.path.read_bytes() and first.caption and first.alt
        assert_nothing_reaches_the_edge(first.path)


def assert_nothing_reaches_the_edge(path):
    pixels = imread(path)[..., :3]
    edges = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((edge == 1).all() for edge in edges)  # else a label is cut off


@pytest.mark.parametrize(
    "label", ["i", "MMMM MMM MMMMMMMM MMMM MMMMM", "i" * 60, "a few words " * 12], ids=["short", "wide", "word", "text"]
)
def test_any_legend_fits_below(label, tmp_path):
    labels = [f"{index} {label}" for index in range(5)]
    plot_losses(dict.fromkeys(labels, HISTORIES["a"]), tmp_path / "a.png")
    assert_nothing_reaches_the_edge(tmp_path / "a.png")


def test_every_dataset_has_a_picture_of_losses(tmp_path):
    runs = [run("dense"), run("last", [3]), run("last", [3], dataset="piqa")]
    histories = {each.identity: HISTORIES["a"] for each in (runs[0], runs[2])}  # the second run has no history
    pictures = draw("1", runs, tmp_path, histories)
    assert [picture.path.stem for picture in pictures] == ["figure1-arc-easy", "figure1-piqa"]
    assert "Dense" in pictures[0].alt and "Last" not in pictures[0].alt


def test_losses_of_seeds_are_one_line(tmp_path, drawn):
    runs = [run("last", [3], seed=seed) for seed in (0, 1)]
    losses = ([6.0, 4.0, 2.0], [2.0, 2.0])  # one was cut short
    histories = {
        each.identity: [{"step": step, "loss": loss} for step, loss in enumerate(own, start=1)]
        for each, own in zip(runs, losses, strict=True)
    }
    draw("1", runs, tmp_path, histories)
    pale, smooth = drawn[0].axes[0].lines
    assert list(pale.get_xdata()) == [1, 2] and list(pale.get_ydata()) == [4.0, 3.0]
    assert smooth.get_label() == "Last but the final one (mean of 2 seeds)"


def test_svg_has_no_date(tmp_path):
    for name in ("a", "b"):
        plot_losses(HISTORIES, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("figure", FIGURES)
def test_without_runs_there_is_no_figure(figure, tmp_path):
    with pytest.raises(ValueError, match=rf"Figure {figure} shows .*, got none among 0 records\. Run"):
        draw(figure, [], tmp_path)


def test_unknown_figure(tmp_path):
    with pytest.raises(ValueError, match=r"no figure '3'. Set figure to one of 1, 2, 5"):
        draw("3", [], tmp_path)
