"""The paper's tables over made-up records: the row and column of each run, and the text of a cell."""

import dataclasses
import math
import re

import pytest
from reporting.test_tables import record

from experiments.config import CONF
from gradpruner.reporting import measures
from gradpruner.reporting.appendix import appendix_tables
from gradpruner.reporting.paper_tables import paper_table
from gradpruner.reporting.published import load_published
from gradpruner.reporting.tables import comparisons
from gradpruner.tasks import MedMcqa

PAPER = CONF.parent / "results" / "paper"
GRADPRUNER = {"sparsity": 0.4, "merge_count": 3, "density": 0.2, "merge_rule": "sign_average", "adapter": "lora"}
GRADPRUNER |= {"fraction": None, "steps": 5, "num_pruned_layers": None}


def tables(name, records):
    return paper_table(load_published(PAPER, name), records)


def scores(name, records):
    """Returns the only table of accuracies."""
    [table] = [table for table in tables(name, records) if "NLL" not in table.title and "difference" not in table.title]
    return table


def differences(name, records):
    [table] = [table for table in tables(name, records) if "difference from dense" in table.title]
    return table


def cells(table):
    return {row[0]: dict(zip(table.headers[1:], row[1:], strict=True)) for row in table.rows}


def dataset(name="arc_easy", **settings):
    return {"_target_": f"gradpruner.tasks.{name}.Task", "test": None, **settings}


def run(method, accuracy=0.5, seed=0, data=None, mode="full", config=None, metrics=None, **settings):
    config = {"dataset": data or dataset(), "finetune": {"mode": mode}, **(config or {})}
    if metrics is None:  # measured as the paper does
        metrics = {
            "num_examples": 400,
            "accuracy": accuracy,
            "accuracy_stderr": 0.02,
            "accuracy_mode": "generate",
            "accuracy_match": "raw",
        }
    return record(method, seed, accuracy, config=config, metrics=metrics, **settings)


def gradpruner(accuracy=0.5, method="gradpruner", **settings):
    layers = {"num_hidden_layers": 30 - round(settings.get("sparsity", 0.4) * 30), "num_parameters": 1}
    made = run(method, accuracy, **{**GRADPRUNER, **settings})
    return dataclasses.replace(made, pruning=made.pruning | layers)


def test_ours_beside_the_papers():
    table = scores("table1", [run("dense", 0.9), run("laco", 0.6, sparsity=0.4), gradpruner(0.5)])
    assert table.headers[:3] == ["method", "PubMedQA ↑", "MedMCQA ↑"] and len(table.headers) == 9
    rows = cells(table)
    assert [row[0] for row in table.rows] == [
        *("Dense", "LLM-Pruner", "LaCo", "MINITRON", "SAT (ends dense)", "FT(smaller model)"),
        "GradPruner, merge_count=3",
    ]
    assert rows["Dense"]["ARC-Easy ↑"] == "0.900 ±0.020 [0.865]"  # the reference is not the best
    assert rows["LaCo"]["ARC-Easy ↑"] == "**0.600 ±0.020** [0.824]"
    assert rows["GradPruner, merge_count=3"]["ARC-Easy ↑"] == "0.500 ±0.020 [0.849]"
    assert rows["SAT (ends dense)"]["PIQA ↑"] == "- [0.833]"
    assert table.title == "Table 1: main results at 40 % sparsity; model with 100.0 M parameters, full"
    assert "ours: accuracy, arc_easy, all training rows, 10 steps of fine-tuning, 400 test rows" in table.notes
    assert "pruned: 12 of 30 layers (40 %), or as many parameters in narrower ones" in table.notes
    assert "[]: the paper's, with Llama-3.1-8B" in table.notes


def test_models_that_end_dense_are_never_the_best_and_ties_are_all():
    table = scores("table1", [run("dense", 0.5), run("sat", 0.9), run("laco", 0.5), gradpruner(0.5)])
    marked = [row[0] for row in table.rows if "**" in row[7]]
    assert marked == ["LaCo", "GradPruner, merge_count=3"]


def test_modes_and_models_have_tables_of_their_own():
    mistral = {"model": {"path": "mistralai/Mistral-7B-v0.3"}}
    runs = [gradpruner(mode="full"), gradpruner(mode="lora"), gradpruner(merge_count=2, config=mistral)]
    shown = [row[-1] for table in tables("table1", runs) for row in table.rows if row[0].startswith("GradPruner")]
    assert sorted(shown) == ["- [0.876]", "- [0.891]", "- [0.897]"]
    assert len({note for table in tables("table1", runs) for note in table.notes if note.startswith("[]")}) == 2


def test_seeds_have_mean_and_its_error():
    runs = [gradpruner(accuracy, seed=seed) for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6))]
    assert cells(scores("table1", runs))["GradPruner, merge_count=3"]["ARC-Easy ↑"] == "0.400 ±0.115 (n=3) [0.849]"


def test_rows_are_averaged_over_the_columns_that_they_have():
    runs = [
        make(accuracy + extra, data=dataset(name))
        for make, accuracy in ((lambda *a, **k: run("dense", *a, **k), 0.8), (gradpruner, 0.4))
        for name, extra in (("arc_easy", 0.0), ("piqa", 0.1), ("winogrande", 0.2))
    ]
    runs += [run("laco", 0.95, data=dataset(name), sparsity=0.4) for name in ("arc_easy", "piqa")]
    table = scores("table1", runs)
    rows = cells(table)
    error = 0.02 / math.sqrt(3)
    assert rows["Dense"]["average of 3 ↑"] == f"0.900 ±{error:.3f} [0.867]"  # (0.868 + 0.865 + 0.867) / 3
    assert rows["GradPruner, merge_count=3"]["average of 3 ↑"] == f"0.500 ±{error:.3f} [0.862]"
    assert rows["LaCo"]["average of 3 ↑"] == f"0.950 ±{0.02 / math.sqrt(2):.3f} † [0.816]"  # never the best
    assert rows["SAT (ends dense)"]["average of 3 ↑"] == "- [0.830]"
    assert "average over WinoGrande, ARC-Easy, PIQA" in table.notes
    assert "† over fewer, so not comparable with the others: LaCo (ARC-Easy, PIQA)" in table.notes
    assert not any(header.startswith("average") for header in scores("table1", runs[::3]).headers)


def test_average_of_cells_with_different_seeds():
    runs = [gradpruner(accuracy, seed=seed) for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6))]
    runs.append(gradpruner(0.8, data=dataset("piqa")))
    row = cells(scores("table1", runs))["GradPruner, merge_count=3"]
    error = math.hypot(0.2 / math.sqrt(3), 0.02) / 2
    assert row["average of 2 ↑"] == f"0.600 ±{error:.3f} (n=1 to 3) [0.862]"


def test_average_of_seeds_is_averaged_seed_by_seed():
    runs = [
        gradpruner(accuracy, seed=seed, data=dataset(name))
        for name, accuracies in (("arc_easy", (0.2, 0.6)), ("piqa", (0.6, 0.2)))
        for seed, accuracy in enumerate(accuracies)
    ]
    row = cells(scores("table1", runs))["GradPruner, merge_count=3"]
    assert row["average of 2 ↑"] == "0.400 ±0.000 (n=2) [0.862]"


def test_both_schedules_of_sat_stand_beside_the_papers_value_with_the_caveat():
    piqa = dataset("piqa")
    runs = [run(name, score, data=piqa, omission_rate=0.4) for name, score in (("sat", 0.7), ("sat_constant", 0.6))]
    table = scores("table1", runs)
    rows = cells(table)
    assert rows["SAT (ends dense)"]["PIQA ↑"].endswith("[0.833]") and "0.700" in rows["SAT (ends dense)"]["PIQA ↑"]
    assert (
        rows["SAT (no dense tail)"]["PIQA ↑"].endswith("[0.833]") and "0.600" in rows["SAT (no dense tail)"]["PIQA ↑"]
    )
    assert sum("no code of its authors exists" in note for note in table.notes) == 1


def test_average_over_all_datasets_is_the_printed_one(monkeypatch):
    monkeypatch.setattr(measures, "_is_papers_task", lambda dataset: True)  # as if all eight had the paper's task
    names = load_published(PAPER, "table1").columns
    similarity = {
        "similarity": 0.7,
        "similarity_stderr": 0.0,
        "bertscore_encoder": "roberta-large",
        "rouge_stemming": True,
        "bertscore_layer": 17,
    }
    runs = []
    for name in names:
        made = run("sat", data=dataset(name), omission_rate=0.4)
        runs.append(dataclasses.replace(made, metrics=made.metrics | similarity))
    rows = cells(scores("table1", runs))
    assert rows["SAT (ends dense)"]["average of 8 ↑"].endswith("[0.750]")  # 0.7506, if it were right


def test_the_setting_of_a_dataset_that_most_rows_have_is_shown():
    small = [make(data=dataset(max_train_samples=1)) for make in (gradpruner, lambda **k: run("dense", 0.9, **k))]
    large = [gradpruner(0.2, seed=seed, data=dataset(max_train_samples=2)) for seed in range(4)]
    table = scores("table1", [*large, *small])
    assert [header for header in table.headers if header.startswith("ARC")] == ["ARC-Easy ↑"]
    assert cells(table)["GradPruner, merge_count=3"]["ARC-Easy ↑"] == "0.500 ±0.020 [0.849]"
    assert "not in this table: 4 runs with settings that the paper does not vary here" in table.notes
    [other] = appendix_tables([load_published(PAPER, "table1")], [*large, *small])
    assert other.headers == ["method", "ARC-Easy, max_train_samples=2"]
    assert other.rows == [["GradPruner", "0.200 ±0.000 (n=4)"]]


def test_settings_that_a_row_leaves_open_have_the_most_runs_and_others_are_in_the_appendix():
    runs = [gradpruner(0.1, merge_rule="sign_sum"), gradpruner(0.2), gradpruner(0.25, seed=1)]
    others = [gradpruner(0.3, density=0.5), gradpruner(0.4, repair="least_squares")]
    left_out = [gradpruner(0.5, sparsity=0.2), gradpruner(0.6, merge_count=0)]
    records = [*runs, *others, *left_out]
    table = scores("table1", records)
    shown = {row[0]: row[7] for row in table.rows if row[0].startswith("GradPruner")}
    assert shown == {"GradPruner, merge_count=3": "0.225 ±0.025 (n=2) [0.849]"}
    assert "GradPruner, merge_count=3: merge_rule=sign_average; it has runs with others" in table.notes
    assert "left out: 2 runs of these methods with other settings" in table.notes
    [other] = appendix_tables([load_published(PAPER, "table1")], records)
    assert sorted(row[1] for row in other.rows) == ["0.100 ±0.020", "0.300 ±0.020", "0.400 ±0.020"]
    assert not any("[" in cell for row in other.rows for cell in row)
    # With as many runs the paper's rule, Eq. 5, is the one.
    assert cells(scores("table1", runs[:2]))["GradPruner, merge_count=3"]["ARC-Easy ↑"] == "0.100 ±0.020 [0.849]"


def test_two_names_of_one_sparsity_are_one_row():
    runs = [gradpruner(0.4), gradpruner(0.4, sparsity=13 / 32)]  # 12 of 30 layers
    rows = [row for row in scores("table1", runs).rows if row[0].startswith("GradPruner")]
    assert [row[7] for row in rows] == ["0.400 ±0.020 [0.849]"]
    assert appendix_tables([load_published(PAPER, "table1")], runs) == []
    [row] = [row for row in comparisons(runs)[0].rows if row[0].startswith("GradPruner")]
    assert row[0] == "GradPruner"


def test_models_of_the_paper_stand_where_the_paper_has_them():
    def of(path, **settings):
        return gradpruner(config={"model": {"path": path}}, **settings)

    llama, small = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
    medmcqa = dataset("medmcqa")
    runs = [of(llama), of(small, data=medmcqa), of("someone/else"), of(llama, mode="lora")]
    titles = [table.title for table in tables("table1", runs) if "difference" not in table.title]
    assert len(titles) == 3  # Llama full and lora, the other model
    [table] = tables("table3", [*runs, of(llama, mode="lora", merge_count=1, sparsity=11 / 32)])[:1]
    assert ", full" in table.title


def test_similarity_where_the_paper_has_it_and_runs_do():
    metrics = {
        "num_examples": 9,
        "accuracy": 0.1,
        "accuracy_stderr": 0.0,
        "accuracy_mode": "generate",
        "accuracy_match": "raw",
    }
    text = {"similarity": 0.7, "similarity_stderr": 0.0, "bertscore_encoder": "e", "bertscore_layer": 1}
    runs = [
        gradpruner(data=dataset("medmcqa"), metrics=metrics | text),
        gradpruner(data=dataset("fingpt"), metrics=metrics),
        gradpruner(data=dataset("piqa"), metrics=metrics | text),
    ]
    table = scores("table1", runs)
    row = cells(table)["GradPruner, merge_count=3"]
    assert row["MedMCQA ↑"].startswith("0.700") and row["FinGPT ↑"].startswith("0.100")
    assert row["PIQA ↑"].startswith("0.100")
    assert any(note.startswith("MedMCQA: similarity, medmcqa") for note in table.notes)
    assert any(note.startswith("FinGPT: accuracy, fingpt") for note in table.notes)


def similar(encoder, stemming=True, data="billsum", **settings):
    text = {
        "similarity": 0.7,
        "similarity_stderr": 0.0,
        "bertscore_encoder": encoder,
        "bertscore_layer": 1,
        "rouge_stemming": stemming,
    }
    return gradpruner(data=dataset(data), metrics=text | {"num_examples": 9}, **settings)


def test_encoders_are_not_mixed():
    row = cells(scores("table1", [similar("roberta-large"), similar("b", seed=1)]))["GradPruner, merge_count=3"]
    assert row["BillSum ↑"] in ("0.700 ±0.000 [0.687]", "0.700 ±0.000 [-]")


GENERATED = {"num_examples": 9, "accuracy": 0.5, "accuracy_stderr": 0.1, "accuracy_mode": "generate"}


@pytest.mark.parametrize(
    ("made", "column", "expected", "reason"),
    [
        (gradpruner, "ARC-Easy ↑", "[0.849]", None),
        (lambda: similar("roberta-large"), "BillSum ↑", "[0.687]", None),
        (lambda: similar("roberta-large", False), "BillSum ↑", "[-]", "our ROUGE-L is of words, the paper's of"),
        (lambda: similar("minilm"), "BillSum ↑", "[-]", "our BERTScore is of minilm, the paper's of roberta-large"),
        (
            lambda: gradpruner(metrics={**GENERATED, "accuracy_mode": "likelihood"}),
            "ARC-Easy ↑", "[-]", "ours is the likeliest option, the paper's the exact match of a generated answer",
        ),
        (
            lambda: gradpruner(data=dataset("fingpt")),
            "FinGPT ↑", "[-]", "ours is the accuracy of the chosen option, the paper's the mean of BERTScore and ROUGE",
        ),
    ],
)  # fmt: skip
def test_the_papers_value_stands_beside_the_same_measure_only(made, column, expected, reason):
    table = scores("table1", [made()])
    cell = cells(table)["GradPruner, merge_count=3"][column]
    assert cell.endswith(expected) and cells(table)["LaCo"][column].startswith("- [")
    said = [note for note in table.notes if note.startswith("[-]: not the same measure: ")]
    assert len(said) == (reason is not None) and all(reason in note for note in said)
    assert cells(table)["LaCo"]["PubMedQA ↑"] == "- [0.556]"  # no run of ours, so nothing is beside it


def test_a_lenient_match_of_answers_is_not_the_papers():
    metrics = {"num_examples": 9, "accuracy": 0.5, "accuracy_stderr": 0.1, "accuracy_mode": "generate"}
    for match in ({}, {"accuracy_match": "lenient"}):
        table = scores("table1", [gradpruner(metrics=metrics | match)])
        assert "[-]: not the same measure: our match of answers is lenient, the paper's exact" in table.notes


def test_a_task_that_was_not_the_papers_has_no_value_of_it(monkeypatch):
    monkeypatch.setattr(MedMcqa, "paper_comparable", False, raising=False)
    table = scores("table1", [gradpruner(data=dataset("medmcqa"))])
    assert cells(table)["GradPruner, merge_count=3"]["MedMCQA ↑"].endswith("[-]")
    assert "[-]: not the same measure: the paper's task on medmcqa was another one" in table.notes


def test_an_average_has_the_papers_only_if_every_column_has():
    likelihood = {"num_examples": 9, "accuracy": 0.5, "accuracy_stderr": 0.1, "accuracy_mode": "likelihood"}
    runs = [gradpruner(), gradpruner(data=dataset("piqa"), metrics=likelihood)]
    row = cells(scores("table1", runs))["GradPruner, merge_count=3"]
    assert row["average of 2 ↑"].endswith("[-]") and row["ARC-Easy ↑"].endswith("[0.849]")


def test_likelihood_has_a_table_without_the_papers_values():
    def metrics(nll):
        return {"num_examples": 9, "answer_nll": nll, "answer_nll_stderr": 0.1}

    [table] = tables("table1", [run("laco", metrics=metrics(4.0)), gradpruner(metrics=metrics(3.0))])
    assert table.title.endswith(", answer NLL") and not any("the paper" in note for note in table.notes)
    rows = cells(table)
    assert rows["GradPruner, merge_count=3"]["ARC-Easy ↓"] == "**3.000 ±0.100**"
    assert rows["LaCo"]["ARC-Easy ↓"] == "4.000 ±0.100" and rows["LaCo"]["PIQA ↓"] == "-"


def test_merged_layers_on_top_of_dropped_ones():
    runs = [gradpruner(0.1 * n, sparsity=(9 + n) / 30, merge_count=n) for n in (1, 2, 3)]
    runs += [gradpruner(0.01 * n, "igia_only", sparsity=(9 + n) / 30, merge_count=0) for n in (1, 2, 3)]
    rows = cells(scores("table3", [run("dense", 0.9), *runs]))
    assert {label: row["ARC-Easy ↑"] for label, row in rows.items()} == {
        "Dense": "0.900 ±0.020 [0.865]",
        "GradPruner, merge_count=3, 12 of 30 layers pruned": "**0.300 ±0.020** [0.849]",
        "GradPruner w/o merging, 12 of 30 layers pruned": "0.030 ±0.020 [0.830]",
        "GradPruner, merge_count=2, 11 of 30 layers pruned": "0.200 ±0.020 [0.871]",
        "GradPruner w/o merging, 11 of 30 layers pruned": "0.020 ±0.020 [0.846]",
        "GradPruner, merge_count=1, 10 of 30 layers pruned": "0.100 ±0.020 [0.866]",
        "GradPruner w/o merging, 10 of 30 layers pruned": "0.010 ±0.020 [0.853]",
    }


def test_with_another_kind_of_fine_tuning_the_papers_values_are_not_beside():
    table = scores("table3", [gradpruner(mode="lora")])
    assert "the paper has this for Llama-3.1-8B, full, so its values are not beside ours" in table.notes
    assert not any("[" in cell for row in table.rows for cell in row)


@pytest.mark.parametrize("name", ["table5", "table10"])
def test_parts_of_the_training_data(name):
    data = [dataset("winogrande", train_fraction=part) for part in (0.1, 0.5, None)]
    runs = [make(data=each) for each in data for make in (gradpruner, lambda **k: run("dense", 0.9, **k))]
    table = scores(name, runs)
    assert table.headers[1:] == [f"train_fraction {part} ↑" for part in ("0.01", "0.1", "0.3", "0.5", "1.0")]
    assert table.rows[0][1:] == [
        *("- [0.853]", "0.900 ±0.020 [0.863]", "- [0.866]", "0.900 ±0.020", "0.900 ±0.020 [0.868]"),
    ]


def test_sparsities():
    hellaswag = dataset("hellaswag")
    runs = [gradpruner(sparsity, sparsity=sparsity, data=hellaswag) for sparsity in (0.2, 0.3, 0.4)]
    runs += [run("sat", 0.1, data=hellaswag, omission_rate=0.3), run("dense", 0.9, data=hellaswag)]
    table = scores("table6", runs)
    assert table.headers[1:] == ["sparsity 0.4 ↑", "sparsity 0.3 ↑", "sparsity 0.2 ↑"]  # falls, as in the paper
    rows = cells(table)
    assert list(rows["Dense"].values()) == ["0.900 ±0.020", *["0.900 ±0.020 [0.943]"] * 2]
    assert list(rows["SAT (ends dense)"].values()) == ["-", "0.100 ±0.020 [0.934]", "- [0.940]"]
    assert list(rows["GradPruner"].values()) == [
        *("0.400 ±0.020", "0.300 ±0.020 [0.940]", "0.200 ±0.020 [0.942]"),  # SAT does not compete
    ]


@pytest.mark.parametrize("name", ["table8", "table9"])
def test_importance_steps(name):
    hellaswag = dataset("hellaswag")
    runs = [gradpruner(0.2, fraction=0.01, steps=None, data=hellaswag), gradpruner(0.4, steps=4, data=hellaswag)]
    table = scores(name, [*runs, gradpruner(0.9, steps="auto", data=hellaswag)])
    assert table.headers[1:] == [
        *(f"fraction {part} ↑" for part in (0.0002, 0.0005, 0.0008, 0.01)),
        "fraction 0.4, 4 steps ↑",
    ]
    assert table.rows[1][4:] == ["0.200 ±0.020 [0.939]", "0.400 ±0.020"]


def test_a_sweep_needs_two_values():
    assert tables("table8", [gradpruner(steps=4), run("dense")]) == []
    assert tables("table6", [gradpruner(sparsity=0.2), run("dense")]) == []


def test_other_data_than_the_papers_has_a_table_without_its_values():
    runs = [gradpruner(0.1, sparsity=0.2), gradpruner(0.2, sparsity=0.3)]
    table = scores("table6", [*runs, gradpruner(0.3, sparsity=0.3, data=dataset("piqa"))])
    assert " on arc_easy, full" in table.title and not any("[" in cell for row in table.rows for cell in row)
    assert "the paper has this for Llama-3.1-8B, hellaswag, so its values are not beside ours" in table.notes


def test_settings_of_a_sweep_are_not_mixed():
    runs = [
        gradpruner(0.1, sparsity=sparsity, config={"finetune": {"mode": "full", "learning_rate": rate}})
        for sparsity in (0.2, 0.3)
        for rate in (1e-3, 1e-4)
    ]
    made = tables("table6", runs)
    assert [table.title.rsplit(", ", 1)[1] for table in made] == ["learning_rate=0.0001", "learning_rate=0.001"]


def test_adapters():
    runs = [gradpruner(0.1 + len(name) / 10, adapter=name, data=dataset("hellaswag")) for name in ("lora", "qlora")]
    table = scores("table13", runs)
    assert table.headers[1:] == ["adapter lora ↑", "adapter dora ↑", "adapter qlora ↑"]
    assert table.rows[1][1:] == ["0.500 ±0.020 [0.939]", "- [0.941]", "0.600 ±0.020 [0.925]"]


def test_tested_on_other_data():
    tested = dataset("medmcqa", test="mmlu_clinical_knowledge")
    runs = [gradpruner(0.4, data=tested), run("dense", 0.5, data=tested), gradpruner(0.9, data=dataset("medmcqa"))]
    table = scores("table12", runs)
    assert table.headers[1:] == ["test mmlu_clinical_knowledge ↑"] and len(table.rows) == 6
    assert table.rows[0][1] == "0.500 ±0.020 [0.735]" and table.rows[-1][1] == "0.400 ±0.020 [0.717]"
    [main] = tables("table1", runs)
    assert cells(main)["GradPruner, merge_count=3"]["MedMCQA ↑"] == "0.900 ±0.020 [-]"  # chosen option


def test_scale_of_the_model():
    table = scores("table7", [gradpruner(0.4, mode="lora", data=dataset("hellaswag")), gradpruner(mode="lora")])
    assert table.headers[1:5] == ["MedMCQA ↑", "FinGPT ↑", "HellaSwag ↑", "ARC-Easy ↑"]
    assert table.rows[1][3:5] == ["0.400 ±0.020 [0.585]", "0.500 ±0.020"]  # the paper has no ARC there


@pytest.mark.parametrize("name", ["figure5", "figure8"])
def test_layers_pruned_without_merging(name):
    def pruned(number):
        made = gradpruner(number / 100, "igia_only", merge_count=0)
        settings = made.config["method"] | {"sparsity": None, "num_pruned_layers": number}
        layers = made.pruning | {"num_hidden_layers": 30 - number}
        return dataclasses.replace(made, config=made.config | {"method": settings}, pruning=layers)

    table = scores(name, [pruned(12), pruned(3), run("dense", 0.9)])
    assert table.headers[1:] == ["num_pruned_layers 3 ↑", "num_pruned_layers 12 ↑"]
    assert table.rows == [["Dense", *["0.900 ±0.020"] * 2], ["GradPruner w/o merging", "0.030 ±0.020", "0.120 ±0.020"]]
    assert "the paper has this as a picture, without values" in table.notes


def test_density_merge_rule_and_kernels():
    runs = [gradpruner(density, density=density) for density in (0.1, 0.2)]
    table = scores("figure6", runs)
    assert table.headers[1:] == [f"density {density} ↑" for density in (0.5, 0.4, 0.3, 0.2, 0.1)]
    assert table.rows[1][1:] == ["-", "-", "-", "0.200 ±0.020", "0.100 ±0.020"]
    runs = [
        gradpruner(0.3),
        gradpruner(0.2, merge_rule="weighted_average"),
        gradpruner(0.1, "kernel_igia", merge_count=0),
    ]
    rows = cells(scores("figure7", runs))
    assert rows["GradPruner"]["ARC-Easy ↑"] == "**0.300 ±0.020**"
    assert rows["GradPruner, merge_rule=weighted_average"]["ARC-Easy ↑"] == "0.200 ±0.020"
    rows = cells(scores("figure9", runs))
    assert rows["GradPruner"]["ARC-Easy ↑"] == "**0.300 ±0.020**"
    assert rows["Kernel pruning by IGIA"]["ARC-Easy ↑"] == "0.100 ±0.020"


@pytest.mark.parametrize("name", ["table2", "table11", "figure1", "figure2"])
def test_no_table_of_quantities_or_pictures_alone(name):
    assert tables(name, [gradpruner(), run("dense")]) == []


def scored(method, right, **settings):
    """Makes a run with the scores of its rows."""
    value = sum(right) / len(right)
    metrics = {
        "num_examples": len(right),
        "accuracy": value,
        "accuracy_stderr": 0.05,
        "accuracy_mode": "generate",
        "accuracy_match": "raw",
    }
    make = gradpruner if method == "gradpruner" else lambda **kwargs: run(method, **kwargs)
    made = make(metrics=metrics, **settings)
    scores = {"accuracy": "".join(str(int(each)) for each in right)}
    return dataclasses.replace(made, row_scores=scores, content={"test_rows": "same"})


def test_what_a_paired_test_tells_apart_is_not_bold():
    best = [1] * 60 + [0] * 40
    worse = [1] * 52 + [0] * 48  # eight rows less and none more: McNemar's p is 2 / 2^8
    level = [0] * 8 + [1] * 60 + [0] * 32  # eight rows less, eight others more
    runs = [scored("dense", [1] * 70 + [0] * 30), scored("laco", best), scored("llm_pruner", worse)]
    table = scores("table1", [*runs, scored("gradpruner", level)])
    assert [row[0] for row in table.rows if "**" in row[7]] == ["LaCo", "GradPruner, merge_count=3"]
    assert any("a test on the same rows cannot tell" in note for note in table.notes)
    unpaired = [dataclasses.replace(each, row_scores={}) for each in [*runs, scored("gradpruner", level)]]
    table = scores("table1", unpaired)
    assert [row[0] for row in table.rows if "**" in row[7]] == ["LLM-Pruner", "LaCo", "GradPruner, merge_count=3"]
    assert any("unpaired where runs have no scores of the same rows) cannot tell" in note for note in table.notes)


def test_differences_from_dense_have_intervals():
    dense, worse = [1] * 70 + [0] * 30, [1] * 60 + [0] * 40
    table = differences("table1", [scored("dense", dense), scored("laco", worse)])
    [[label, cell]] = table.rows
    assert table.headers == ["method", "ARC-Easy"] and label == "LaCo"
    value, low, high = (float(part) for part in re.findall(r"[+-][\d.]+", cell))
    assert value == -0.1 and -0.17 < low < -0.14 and -0.06 < high < -0.03 and cell.endswith("≠")
    assert "paired on the same test rows" in table.notes[0]
    table = differences("table1", [dataclasses.replace(scored("dense", dense), row_scores={}), scored("laco", worse)])
    assert "as all of these" in table.notes[0] and not table.rows[0][1].endswith("≠")  # 0.05 each


def test_only_finished_runs():
    assert tables("table1", [dataclasses.replace(gradpruner(), status="failed"), run("dense")]) == []


def test_settings_that_depend_on_the_dataset_are_one_row_and_a_note():
    cuts = {"arc_easy": 1, "piqa": 1, "hellaswag": 2}
    runs = [run("apt", 0.5, data=dataset(name), mode="lora", num_cuts=cuts[name]) for name in cuts]
    runs.append(run("apt", 0.9, data=dataset("piqa"), mode="lora", num_cuts=2))
    table = scores("table1", runs)
    [row] = [row for row in table.rows if row[0] == "APT"]
    assert [cell.split(" ")[0] for cell in row[1:]] == ["-"] * 4 + ["0.500", "-", "0.500", "0.500", "0.500"]
    assert "APT: num_cuts=1 on arc_easy, piqa; num_cuts=2 on hellaswag; it has runs with others" in table.notes
