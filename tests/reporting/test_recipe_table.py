"""GradPruner+ beside other methods, over made-up records."""

import dataclasses
import itertools

import pytest
from reporting.test_tables import record

from gradpruner.reporting.plain_names import plain_label
from gradpruner.reporting.recipe_table import recipe_tables
from gradpruner.reporting.row_scores import write_numbers

TASKS = {"arc_easy": "gradpruner.tasks.arc_easy.ArcEasy", "piqa": "gradpruner.tasks.piqa.Piqa"}


def run(method, right, dataset="arc_easy", seed=0, nll=None, sparsity=0.4, rows=20, **settings):
    """Returns a run that has the first `right` of its test rows right, and tokens that all cost `nll`."""
    metrics = {"num_examples": rows, "accuracy": right / rows, "accuracy_stderr": 0.1, "accuracy_mode": "likelihood"}
    scores = {"accuracy": write_numbers([1] * right + [0] * (rows - right))}
    if nll is not None:
        metrics |= {"answer_nll": nll, "answer_nll_stderr": 0.1}
        scores |= {"answer_nll": write_numbers([nll] * rows), "answer_tokens": write_numbers([1] * rows)}
    if method != "dense":
        settings["sparsity"] = sparsity
    config = {"dataset": {"_target_": TASKS[dataset], "test": None}}
    made = record(method, seed, layers=round(30 * (1 - sparsity)), config=config, metrics=metrics, **settings)
    return dataclasses.replace(made, row_scores=scores, content={"test_rows": dataset})


def tuned_first(made):
    finetune = {**made.config["finetune"], "tune_dense_first": True}
    return dataclasses.replace(made, config={**made.config, "finetune": finetune})


def test_means_and_paired_differences():
    tables = recipe_tables(
        [
            *(run("gradpruner_plus", right, name, nll=4.0) for right, name in ((16, "arc_easy"), (12, "piqa"))),
            *(run("shortgpt", right, name, nll=4.5) for right, name in ((8, "arc_easy"), (12, "piqa"))),
            run("laco", 10, nll=5.0),
            run("dense", 18, nll=3.0),
            dataclasses.replace(run("minitron", 1, nll=9.0), status="failed"),
        ]
    )
    nll, nll_minus, accuracy, minus = tables
    assert accuracy.title == "GradPruner+ beside other methods: model, LoRA, 40 % of the layers, accuracy"
    assert accuracy.headers == ["method", "ARC-Easy, accuracy ↑", "PIQA, accuracy ↑"]
    assert [row[0] for row in accuracy.rows] == ["Dense", "LaCo", "ShortGPT", "GradPruner+"]
    assert accuracy.rows[2] == ["ShortGPT", "0.400 ±0.100", "0.600 ±0.100"]
    assert accuracy.rows[1][2] == "-"
    assert minus.headers == [*accuracy.headers, "mean of 2"]
    by_method = {row[0]: row[1:] for row in minus.rows}
    assert list(by_method) == ["Dense", "LaCo", "ShortGPT"]
    assert by_method["Dense"][0].startswith("-0.100 (") and by_method["Dense"][1:] == ["-", "-"]
    # Eight rows that only GradPruner+ has right: 2 / 2^8 < 0.05. The same rows on PIQA: no difference, no spread.
    assert by_method["ShortGPT"][0].startswith("+0.400 (") and by_method["ShortGPT"][0].endswith(") ≠")
    assert by_method["ShortGPT"][1] == "+0.000 (+0.000 to +0.000)"
    assert by_method["ShortGPT"][2].startswith("+0.200 (")
    assert nll.rows[3] == ["GradPruner+", "4.000 ±0.100", "4.000 ±0.100"]
    assert {row[0]: row[3] for row in nll_minus.rows}["ShortGPT"] == "-0.500 (-0.500 to -0.500) ≠"
    assert any("paired on the same test rows" in note for note in minus.notes)
    assert not any("loss=" in note for table in tables for note in table.notes)
    assert [len(each) for each in minus.sources] == [1, 1, 2]


def test_the_loss_that_methods_share_is_said():
    def distilled(made):
        finetune = {**made.config["finetune"], "loss": "distill", "tuned_teacher": 0.5}
        return dataclasses.replace(made, config={**made.config, "finetune": finetune})

    tables = recipe_tables([distilled(run(method, 10)) for method in ("gradpruner_plus", "shortgpt")])
    assert tables
    for table in tables:
        assert "distill" not in table.title and table.notes[0].endswith(", loss=distill, tuned_teacher=0.5")


def test_seeds_are_means_and_sparsities_tables():
    methods = (("gradpruner_plus", 10), ("shortgpt", 8))
    cells = itertools.product(methods, range(3), (0.3, 0.5))
    runs = [run(method, right, seed=seed, sparsity=sparsity) for (method, right), seed, sparsity in cells]
    tables = recipe_tables([*runs, runs[0]])  # the same run, found twice
    assert [table.title.split(", ")[2] for table in tables] == ["30 % of the layers"] * 2 + ["50 % of the layers"] * 2
    assert tables[0].rows[1] == ["GradPruner+", "0.500 ±0.000 (n=3)"]
    assert len(tables[0].headers) == 2 and len(tables[1].headers) == 2  # a mean of one dataset is that dataset


def test_differences_are_over_the_seeds_that_both_have():
    ours = [run("gradpruner_plus", right, seed=seed) for seed, right in enumerate((10, 16))]
    tables = recipe_tables([*ours, run("shortgpt", 8, seed=1), run("laco", 8, seed=7)])
    by_method = {row[0]: row[1] for row in tables[1].rows}
    assert by_method["ShortGPT"].startswith("+0.400 (") and by_method["LaCo"].startswith("+0.250 (")
    assert "over the seeds that both have" in tables[1].notes


def test_the_variant_with_the_most_runs_is_compared():
    runs = [run("gradpruner_plus", 10, seed=seed, num_edits=8) for seed in range(2)]
    tables = recipe_tables([*runs, run("gradpruner_plus", 5, num_edits=0), run("shortgpt", 8)])
    assert [row[0] for row in tables[1].rows] == ["ShortGPT", "GradPruner+, num_edits=0"]
    assert tables[1].rows[1][1].startswith("+0.250 (")
    assert "GradPruner+, num_edits=8 minus each" in tables[1].title


def test_a_model_that_was_tuned_first_is_a_row_of_the_same_table():
    runs = [run("gradpruner_plus", 10, seed=seed) for seed in range(2)]
    tuned = [tuned_first(run("gradpruner_plus", 14, seed=seed)) for seed in range(3)]
    tables = recipe_tables([*runs, *tuned, run("shortgpt", 8), tuned_first(run("shortgpt", 9))])
    ours = "GradPruner+, tune_dense_first=True"
    assert [row[0] for row in tables[0].rows] == ["ShortGPT, tune_dense_first=True", "ShortGPT", ours, "GradPruner+"]
    assert tables[0].rows[2] == [ours, "0.700 ±0.000 (n=3)"] and len(tables) == 2
    assert f"{ours} minus each" in tables[1].title and len(tables[1].rows) == 3
    assert plain_label(ours) == "GradPruner+, dense model tuned first"


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run("gradpruner_plus", 1), run("dense", 2)],
        [run("shortgpt", 1), run("dense", 2)],
        [run("gradpruner_plus", 1, sparsity=0.3), run("shortgpt", 2, sparsity=0.4)],
    ],
    ids=["none", "no other", "no recipe", "other sparsity"],
)
def test_nothing_to_compare(runs):
    assert recipe_tables(runs) == []
