"""The paper's tables over made-up records: the row and column of each run, and the text of a cell."""

import dataclasses
import math

import pytest
from reporting.test_tables import record

from experiments.config import CONF
from gradpruner.reporting.paper_tables import paper_table
from gradpruner.reporting.published import load_published

PAPER = CONF.parent / "results" / "paper"
GRADPRUNER = {"sparsity": 0.4, "merge_count": 3, "density": 0.2, "merge_rule": "sign_average", "adapter": "lora"}
GRADPRUNER |= {"fraction": None, "steps": 5, "num_pruned_layers": None}


def tables(name, records):
    return paper_table(load_published(PAPER, name), records)


def scores(name, records):
    """Returns the only table of accuracies."""
    [table] = [table for table in tables(name, records) if "answer NLL" not in table.title]
    return table


def cells(table):
    return {row[0]: dict(zip(table.headers[1:], row[1:], strict=True)) for row in table.rows}


def dataset(name="arc_easy", **settings):
    return {"_target_": f"gradpruner.tasks.{name}.Task", "test": None, **settings}


def run(method, accuracy=0.5, seed=0, data=None, mode="full", config=None, metrics=None, **settings):
    config = {"dataset": data or dataset(), "finetune": {"mode": mode}, **(config or {})}
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
    assert "sparsity: 0.4, which is 12 of 30 layers pruned, or as many parameters in narrower ones" in table.notes
    assert "[]: the paper's, with Llama-3.1-8B" in table.notes


def test_dense_is_never_the_best_and_ties_are_all():
    table = scores("table1", [run("dense", 0.5), run("laco", 0.5), gradpruner(0.5)])
    marked = [row[0] for row in table.rows if "**" in row[7]]
    assert marked == ["LaCo", "GradPruner, merge_count=3"]


def test_modes_and_models_have_tables_of_their_own():
    mistral = {"model": {"path": "mistralai/Mistral-7B-v0.3"}}
    runs = [gradpruner(mode="full"), gradpruner(mode="lora"), gradpruner(merge_count=2, config=mistral)]
    shown = [row[-1] for table in tables("table1", runs) for row in table.rows if row[0].startswith("GradPruner")]
    assert sorted(shown) == ["- [0.876]", "- [0.891]", "- [0.897]"]
    assert len({note for table in tables("table1", runs) for note in table.notes if note.startswith("[]")}) == 2


def test_seeds_have_mean_and_deviation():
    runs = [gradpruner(accuracy, seed=seed) for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6))]
    assert cells(scores("table1", runs))["GradPruner, merge_count=3"]["ARC-Easy ↑"] == "0.400 ±0.200 (n=3) [0.849]"


def test_average_is_over_what_all_methods_with_runs_have():
    runs = [
        make(accuracy + extra, data=dataset(name))
        for make, accuracy in ((lambda *a, **k: run("dense", *a, **k), 0.8), (gradpruner, 0.4))
        for name, extra in (("arc_easy", 0.0), ("piqa", 0.1))
    ]
    table = scores("table1", [*runs, run("dense", 0.9, data=dataset("winogrande"))])
    rows = cells(table)
    error = math.hypot(0.02, 0.02) / 2
    assert rows["Dense"]["average of 2 ↑"] == f"0.850 ±{error:.3f} [0.866]"  # (0.865 + 0.867) / 2
    assert rows["GradPruner, merge_count=3"]["average of 2 ↑"] == f"0.450 ±{error:.3f} [0.862]"
    assert rows["LaCo"]["average of 2 ↑"] == "- [0.816]"
    assert "average over ARC-Easy, PIQA" in table.notes
    assert not any(header.startswith("average") for header in scores("table1", runs[::2]).headers)


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


def test_average_over_all_datasets_is_the_printed_one():
    names = load_published(PAPER, "table1").columns
    rows = cells(scores("table1", [run("sat", data=dataset(name), omission_rate=0.4) for name in names]))
    assert rows["SAT (ends dense)"]["average of 8 ↑"].endswith("[0.750]")  # 0.7506, if it were right


def test_settings_of_the_same_data_are_columns_of_their_own():
    runs = [gradpruner(0.1 * n, data=dataset(max_train_samples=n)) for n in (1, 2)]
    table = scores("table1", runs)
    row = cells(table)["GradPruner, merge_count=3"]
    assert row["ARC-Easy, max_train_samples=1 ↑"] == "0.100 ±0.020 [0.849]"
    assert row["ARC-Easy, max_train_samples=2 ↑"] == "0.200 ±0.020 [0.849]"
    assert not any(header.startswith("average") for header in table.headers)


def test_open_settings_make_rows_and_others_are_left_out():
    runs = [gradpruner(0.1, merge_rule="sign_sum"), gradpruner(0.2), gradpruner(0.3, density=0.5)]
    runs += [gradpruner(0.4, repair="least_squares"), gradpruner(0.5, sparsity=0.2), gradpruner(0.6, merge_count=0)]
    table = scores("table1", runs)
    shown = {row[0]: row[7] for row in table.rows if row[0].startswith("GradPruner")}
    assert shown == {
        "GradPruner, merge_rule=sign_sum, merge_count=3": "0.100 ±0.020 [0.849]",
        "GradPruner, merge_rule=sign_average, merge_count=3": "**0.200 ±0.020** [0.849]",
    }
    assert "left out: 4 runs of these methods with other settings" in table.notes


def test_similarity_where_the_paper_has_it_and_runs_do():
    metrics = {"num_examples": 9, "accuracy": 0.1, "accuracy_stderr": 0.0, "accuracy_mode": "generate"}
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


def test_encoders_are_not_mixed():
    def billsum(seed, encoder):
        text = {"similarity": 0.7, "similarity_stderr": 0.0, "bertscore_encoder": encoder, "bertscore_layer": 1}
        return gradpruner(data=dataset("billsum"), seed=seed, metrics=text | {"num_examples": 9})

    row = cells(scores("table1", [billsum(0, "a"), billsum(1, "b")]))["GradPruner, merge_count=3"]
    assert {"BillSum, bertscore_encoder=a ↑", "BillSum, bertscore_encoder=b ↑"} <= row.keys()


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
        *("0.400 ±0.020", "**0.300 ±0.020** [0.940]", "0.200 ±0.020 [0.942]"),
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
    assert cells(main)["GradPruner, merge_count=3"]["MedMCQA ↑"] == "0.900 ±0.020 [0.586]"


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


def test_only_finished_runs():
    assert tables("table1", [dataclasses.replace(gradpruner(), status="failed"), run("dense")]) == []
