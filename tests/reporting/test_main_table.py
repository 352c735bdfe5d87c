"""The main table has a row per method and setting, in words, with intervals over rows and seeds."""

import statistics

import pytest
from reporting.test_figures import committed, run

from gradpruner.reporting.comparing import QUANTILE
from gradpruner.reporting.differing import plain_differences
from gradpruner.reporting.main_table import main_table
from gradpruner.reporting.plain_names import dataset_title, plain_header, plain_label, plain_setting


def scored(method, value, seed=0, **settings):
    metrics = {"num_examples": 400, "accuracy": value, "accuracy_stderr": 0.02, "accuracy_mode": "likelihood"}
    return run(method, () if method == "dense" else (1,), seed=seed, metrics=metrics, **settings)


def cells(table, name):
    at = [column.name for column in table.columns].index(name)
    return [row[at] for row in table.rows]


def test_a_row_is_the_runs_that_differ_in_the_seed():
    records = [scored("dense", 0.8), *(scored("laco", value, seed) for seed, value in enumerate((0.4, 0.6, 0.5)))]
    table = main_table(records)
    assert [cell.text for cell in cells(table, "Method")] == ["Dense", "LaCo"]
    dense, laco = cells(table, "Accuracy")
    reach = QUANTILE * (statistics.stdev([0.4, 0.6, 0.5]) ** 2 / 3 + 0.02**2) ** 0.5
    assert (laco.text, laco.number) == ("0.500", pytest.approx(0.5))
    assert laco.detail == f"{0.5 - reach:.3f} to {0.5 + reach:.3f}" and dense.detail == "0.761 to 0.839"
    assert [cell.number for cell in cells(table, "Seeds")] == [1, 3] and table.sources[1] == records[1:]
    against = cells(table, "Against dense")
    assert against[0].text == "-" and against[1].text.startswith("-0.300") and against[1].text.endswith("≠")
    assert [cell.text for cell in cells(table, "Training time")] == ["-", "100 %"]


def test_what_rows_share_is_said_once_and_what_differs_in_words():
    records = [scored("gradpruner", 0.5, sparsity=sparsity, merge_rule="sign_sum") for sparsity in (0.2, 0.5, 0.6)]
    table = main_table(records)
    assert table.shared["Model"] == "model" and table.shared["Data"] == "ARC-Easy"
    assert "Model" not in [column.name for column in table.columns] and table.filters == {}
    assert [cell.detail for cell in cells(table, "Method")] == [
        f"{number} % of layers pruned" for number in (20, 50, 60)
    ]


def test_the_committed_records_have_no_config_keys():
    table = main_table(committed("small", "methods", "learning_rate"))
    texts = [text for row in table.rows for cell in row for text in (cell.text, cell.detail)]
    assert not [text for text in texts if "=" in text or "_" in text]
    assert {"640 training rows, 400 test rows", "learning rate 0.0003"} <= set(texts)
    assert [table.columns[at].name for at in table.filters] == ["Method", "Data", "Fine-tuning"]
    assert len({tuple(cell.text + cell.detail for cell in row[:4]) for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("max_train_samples", 320, "320 training rows"),
    ("sparsity", 0.4, "40 % of layers pruned"),
    ("sparsity", "auto", "sparsity auto"),
    ("epochs", 1, "1 epoch"),
    ("learning_rate", 0.0001, "learning rate 0.0001"),
    ("merge_rule", "sign_sum", "same signs summed (Eq. 5)"),
    ("prompt", "Question: {question}", "prompt"),
    ("path", "/home/me/data", "source"),
    ("uniform", True, "uniform"),
    ("uniform", False, "no uniform"),
    ("first_layer", None, "first layer: default"),
    ("unknown_key", "a/b", "unknown key a/b"),
])  # fmt: skip
def test_settings_in_words(key, value, words):
    assert plain_setting(key, value) == words


def test_labels_headers_and_datasets_in_words():
    assert plain_label("GradPruner, merge_count=3, density=0.2 on arc_easy") == (
        "GradPruner, 3 merged, merge density 20 % on arc_easy"
    )
    assert plain_header("num_pruned_layers 12 ↑") == "12 layers pruned ↑" and plain_header("accuracy") == "accuracy"
    assert plain_header("fraction 0.01, 40 steps") == "importance from 1.0 % of the steps, 40 steps"
    assert dataset_title("arc_easy, tested on piqa, validation rows") == "ARC-Easy, tested on PIQA, validation rows"


def test_prompts_and_paths_are_numbered_and_not_shown():
    own = {"dataset": {"_target_": "a.B", "prompt": "x {q}", "max_train_samples": 3, "test": None}}
    other = {"dataset": {"_target_": "a.B", "prompt": "y {q}", "max_train_samples": 4, "test": "piqa"}}
    assert plain_differences(own, [own, other]) == ["prompt 1", "3 training rows"]
    assert plain_differences(other, [own, other]) == ["prompt 2", "4 training rows", "tested on PIQA"]
