"""Comparison tables over made-up records."""

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from gradpruner.record import RunRecord
from gradpruner.reporting.comparing import SPREAD_NOTE
from gradpruner.reporting.labels import METHOD_LABELS
from gradpruner.reporting.tables import comparisons, row_labels

CONFIG = {
    "model": {"path": "org/model"},
    "dataset": {"_target_": "gradpruner.tasks.arc_easy.ArcEasy", "test": None},
    "finetune": {"mode": "lora"},
    "evaluation": {"batch_size": 16},
    "sparsity": 0.4,
    "merge_count": 3,
    "seed": 0,
    "results_dir": "results/runs",
}


def shape(num_layers, hidden_size=4, intermediate_size=8):
    heads = {"num_attention_heads": [2] * num_layers, "num_key_value_heads": [1] * num_layers}
    return {"hidden_size": hidden_size, **heads, "intermediate_size": [intermediate_size] * num_layers}


def record(method, seed=0, accuracy=0.5, layers=18, config=None, metrics=None, **settings):
    method_config = {"_target_": f"x.{method}", "seed": seed, **settings}
    values = {"num_examples": 400, "accuracy": accuracy, "accuracy_stderr": 0.02, "accuracy_mode": "likelihood"}
    return RunRecord(
        status="finished",
        config=copy.deepcopy(CONFIG) | {"seed": seed, "method": method_config} | (config or {}),
        identity="x",
        seed=seed,
        model={
            "name": "model",
            "num_hidden_layers": 30,
            "num_parameters": 100_000_000,
            "shape": shape(30),
        },
        pruning={
            "method": method,
            "pruned_layers": [],
            "absorbed_by": {},
            "layer_importance": [],
            "num_hidden_layers": layers,
            "num_parameters": 60_000_000,
            "shape": shape(layers),
            "report": {},
            "recovery": {},
        },
        finetune={"steps": 10, "tokens": 1, "train_seconds": 12.0, "peak_memory_bytes": 2**30, "loss": 1.0},
        metrics=values if metrics is None else metrics,
        efficiency={
            "layer_ratio": layers / 30,
            "parameter_ratio": 0.6,
            "compression_seconds": 3.0,
            "compression_peak_memory_bytes": 2**31,
            "recovery_seconds": 0.0,
            "stage_seconds": {},
        },
        environment={"device": "cpu", "num_threads": 2},
    )


def test_methods_come_in_the_papers_order_and_the_unknown_last():
    names = ["zebra", "gradpruner", "random", "laco", "dense", "igia_only"]
    [table] = comparisons([record(name) for name in names])
    assert [row[0] for row in table.rows] == [
        "Dense", "LaCo", "Random", "GradPruner w/o merging", "GradPruner", "zebra",
    ]  # fmt: skip
    paper = ["dense", "llm_pruner", "laco", "minitron", "sat", "apt", "small_dense", "gradpruner"]
    assert [name for name in METHOD_LABELS if name in paper] == paper


def test_a_dataset_of_ones_own_may_lack_what_ours_have():
    own = {"dataset": {"_target_": "riddles.Riddles", "prompt": "{riddle}"}}
    [table] = comparisons([record("mine", config=own), record("dense", config=own)])
    assert "riddles" in table.title
    assert [row[0] for row in table.rows] == ["Dense", "mine"]


def test_every_method_has_a_name():
    from experiments.config import CONF

    assert {path.stem for path in (CONF / "method").glob("*.yaml")} <= set(METHOD_LABELS)


def test_settings_in_labels_are_short():
    [table] = comparisons([record("random", sparsity=sparsity) for sparsity in (1 / 3, 0.4)])
    assert [row[0] for row in table.rows] == ["Random, sparsity=0.3333", "Random, sparsity=0.4"]


def test_titles_say_in_what_settings_of_one_dataset_differ():
    finetune = [{"mode": "lora", "learning_rate": rate} for rate in (1e-3, 3e-3)]
    tables = comparisons([record("random", config={"finetune": each}) for each in finetune])
    assert [table.title for table in tables] == [
        "model on arc_easy, lora, learning_rate=0.001",
        "model on arc_easy, lora, learning_rate=0.003",
    ]


def test_seeds_are_one_row_with_mean_and_its_error():
    [table] = comparisons([record("random", seed, accuracy) for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6))])
    [row] = table.rows
    assert row[table.headers.index("accuracy")] == "0.400 ±0.115 (n=3)"
    assert SPREAD_NOTE in table.notes


def test_a_caveat_stands_beside_every_number_of_its_method():
    [table] = comparisons([record("sat"), record("sat_constant"), record("dense")])
    assert [row[0] for row in table.rows] == ["Dense", "SAT (ends dense)", "SAT (no dense tail)"]
    assert sum("SAT: no code of its authors exists" in note and "3 to 5 points" in note for note in table.notes) == 1
    [table] = comparisons([record("laco"), record("dense")])
    assert not any("SAT" in note for note in table.notes)


def test_parameters_without_the_embedding_and_macs_stand_beside_all_parameters():
    counted = record("minitron")
    counted.pruning["num_parameters_without_embedding"], counted.pruning["num_macs"] = 32_512_000, 12_345_000_000
    [table] = comparisons([counted, record("gradpruner")])  # the second one is older
    assert table.headers[2:5] == ["params", "w/o embedding", "GMACs"]
    assert [row[2:5] for row in table.rows] == [["60.0 M", "32.5 M", "12.35"], ["60.0 M", "-", "-"]]
    [table] = comparisons([record("gradpruner")])
    assert table.headers[:4] == ["method", "layers", "params", "accuracy"]


def test_one_seed_shows_its_standard_error():
    [table] = comparisons([record("random"), record("random")])  # the same run, found twice
    assert table.rows[0][table.headers.index("accuracy")] == "0.500 ±0.020" and len(table.rows) == 1


def test_rows_of_one_method_say_in_what_they_differ():
    [table] = comparisons([record("laco", rule="code", interval=2), record("laco", rule="paper", interval=2)])
    assert [row[0] for row in table.rows] == ["LaCo, rule=code", "LaCo, rule=paper"]


def test_what_most_rows_of_a_method_share_goes_without_saying():
    rows = [("paper", 1), ("code", 1), ("code", 2)]
    [table] = comparisons([record("laco", rule=rule, interval=interval) for rule, interval in rows])
    assert sorted(row[0] for row in table.rows) == ["LaCo", "LaCo, interval=2", "LaCo, rule=paper"]


def test_what_older_records_lack_is_said_only_where_it_tells_rows_apart():
    old, new = {"interval": 2, "_target_": "a"}, {"interval": 2, "_target_": "b", "repair": "none"}
    [table] = comparisons([record("laco", **old), record("laco", **new | {"interval": 3})])
    assert sorted(row[0] for row in table.rows) == ["LaCo, interval=2", "LaCo, interval=3"]
    [table] = comparisons([record("laco", **old), record("laco", **new)])
    assert sorted(row[0] for row in table.rows) == ["LaCo", "LaCo, repair=none"]


def test_what_is_unusual_in_a_row_is_said_beside_what_tells_rows_apart():
    """A refit is no less of a difference where the rows' numbers differ, too."""
    rows = [{"repair_rows": 320, "repair_refit": False}, {"repair_rows": 640, "repair_refit": True}]
    [table] = comparisons([record("shortgpt", **each) for each in rows])
    expected = ["ShortGPT, repair_rows=320", "ShortGPT, repair_rows=640, repair_refit=True"]
    assert sorted(row[0] for row in table.rows) == expected


def test_what_acts_only_with_another_setting_is_none_without_it():
    """Runs of two seeds are one row, though the older record has no setting for short fine-tunes."""
    off = {"halving": [], "halving_learning_rate": 3e-3, "halving_batch_size": 4}
    settings = [{}, off, off | {"halving_learning_rate": 1e-3}, off | {"halving": [8, 16]}]
    [table] = comparisons([record("gradpruner_plus", seed=seed, **each) for seed, each in enumerate(settings)])
    rows = {row[0]: len(runs) for row, runs in zip(table.rows, table.sources, strict=True)}
    assert rows == {
        "GradPruner+": 3,
        "GradPruner+, halving=[8, 16], halving_learning_rate=0.003, halving_batch_size=4": 1,
    }


def test_older_records_share_a_table_with_runs_whose_later_settings_are_the_usual_ones():
    old, new = {"mode": "lora"}, {"mode": "lora", "precision": "auto", "merge_dtype": "auto"}
    assert len(comparisons([record("laco", config={"finetune": each}) for each in (old, new)])) == 1
    other = new | {"precision": "bf16_mixed"}
    assert len(comparisons([record("laco", config={"finetune": each}) for each in (old, other)])) == 2


VALUES = {"rule": st.sampled_from("ab"), "steps": st.integers(1, 3), "repair": st.none() | st.just({"rows": 1})}


@given(st.lists(st.fixed_dictionaries({}, optional=VALUES), max_size=8))
def test_no_two_settings_of_a_method_have_one_label(settings):
    def given(each):  # older records lack what newer ones have as null
        return json.dumps({key: value for key, value in each.items() if value is not None}, sort_keys=True)

    labels = row_labels([record("laco", **each) for each in settings])
    assert len({(given(each), label) for each, label in zip(settings, labels, strict=True)}) == len(set(labels))
    assert len(set(map(given, settings))) == len(set(labels))


def test_another_setting_is_another_table():
    other = {"finetune": {"mode": "full"}}
    tables = comparisons([record("dense"), record("gradpruner"), record("gradpruner", config=other)])
    assert sorted(len(table.rows) for table in tables) == [1, 2]
    assert {table.title for table in tables} == {"model on arc_easy, lora", "model on arc_easy, full"}


def test_failed_runs_are_not_shown():
    assert comparisons([RunRecord("failed", {}, "x", 0)]) == []


def test_encoders_have_columns_of_their_own():
    def text(encoder):
        values = {"similarity": 0.5, "similarity_stderr": 0.1, "num_examples": 3}
        return values | {"bertscore_encoder": encoder, "bertscore_layer": 5}

    [table] = comparisons([record("dense", metrics=text("a")), record("gradpruner", metrics=text("b"))])
    assert table.headers[3:5] == ["similarity (a, layer 5)", "similarity (b, layer 5)"]
    assert [row[3:5] for row in table.rows] == [["0.500 ±0.100", "-"], ["-", "0.500 ±0.100"]]


def test_seeds_of_different_encoders_are_not_averaged():
    def text(encoder):
        values = {"similarity": 0.5, "similarity_stderr": 0.1, "num_examples": 3}
        return values | {"bertscore_encoder": encoder, "bertscore_layer": 5}

    [table] = comparisons([record("dense", 0, metrics=text("a")), record("dense", 1, metrics=text("b"))])
    assert table.rows[0][3:5] == ["0.500 ±0.100", "0.500 ±0.100"]


def test_markdown():
    [table] = comparisons([record("dense")])
    lines = table.markdown().splitlines()
    assert lines[0] == "## model on arc_easy, lora" and lines[2].startswith("| method | layers | params | accuracy |")
    assert lines[4].startswith("| Dense | 18 | 60.0 M | 0.500 ±0.020 |")
    assert len({line.count("|") for line in lines[2:5]}) == 1


def test_nested_settings_are_only_named_where_others_do_not_tell_rows_apart():
    nested = [{"on": "x", "how": {"rate": 1}}, {"on": None, "how": {"rate": 2}}]
    [table] = comparisons([record("minitron", **settings) for settings in nested])
    assert sorted(row[0] for row in table.rows) == ["MINITRON, on=None", "MINITRON, on=x"]
    [table] = comparisons([record("minitron", how={"rate": rate}) for rate in (1, 2)])
    assert [row[0] for row in table.rows] == ["MINITRON, how={'rate': 1}", "MINITRON, how={'rate': 2}"]


def generated_by(name, method, **metrics):
    evaluation = {"batch_size": 16, "engine": name, "vllm_python": "/x/python", "vllm_dtype": "auto"}
    values = {"num_examples": 400, "accuracy": 0.5, "accuracy_stderr": 0.02, "accuracy_mode": "generate"}
    return record(method, config={"evaluation": evaluation}, metrics=values | metrics)


VLLM = {"engine": "vllm", "engine_versions": "vllm 1.2", "engine_dtype": "float32"}


def test_engines_are_in_tables_of_their_own():
    """Older records, which name no engine, are of transformers; where vLLM was does not matter."""
    older = record("laco", metrics=generated_by("transformers", "laco").metrics)
    other_machine = generated_by("vllm", "laco", **VLLM)
    other_machine.config["evaluation"]["vllm_python"] = "/y/python"
    plain, vllm = comparisons(
        [older, generated_by("transformers", "dense"), generated_by("vllm", "dense", **VLLM), other_machine]
    )
    if "vLLM" in plain.title:
        plain, vllm = vllm, plain
    assert [[row[0] for row in table.rows] for table in (plain, vllm)] == [["Dense", "LaCo"]] * 2
    assert vllm.title == f"{plain.title}, answers by vLLM"
    assert "answers generated by vLLM (vllm 1.2) in float32" in vllm.notes
    assert not any("vLLM" in note for note in plain.notes)


def test_a_chosen_dtype_of_vllm_is_a_setting():
    chosen = generated_by("vllm", "dense", **VLLM)
    chosen.config["evaluation"]["vllm_dtype"] = "bfloat16"
    titles = [table.title for table in comparisons([chosen, generated_by("vllm", "dense", **VLLM)])]
    assert len(set(titles)) == 2 and any("vllm_dtype=bfloat16" in title for title in titles)
