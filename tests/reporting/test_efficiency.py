"""Table 2 over made-up records, and Table 11 to every published digit."""

import dataclasses
import re

import torch
from reporting.test_tables import record

from experiments.config import CONF
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import LayerShape, ModelShape, config_shape
from gradpruner.reporting.efficiency import counts_table, efficiency_tables
from gradpruner.reporting.published import load_published

PAPER = CONF.parent / "results" / "paper"
MB = 10**6


def published(name):
    return load_published(PAPER, name)


def run(method, train_seconds, train_mb, compress=(0.0, 0), seed=0, **efficiency):
    made = record(method, seed=seed)
    finetune = made.finetune | {"train_seconds": train_seconds, "peak_memory_bytes": train_mb * MB}
    costs = {"compression_seconds": compress[0], "compression_peak_memory_bytes": compress[1] * MB}
    costs |= {"process_memory_bytes": 500 * MB, **efficiency}
    return dataclasses.replace(made, finetune=finetune, efficiency=made.efficiency | costs)


def speed(prefill, decode, memory, step=None):
    own = {name: {"peak_memory_bytes": memory * MB} for name in ("prefill", "decode")}
    dense = {name: {"peak_memory_bytes": 100 * MB} for name in ("prefill", "decode")}
    times = {"prefill": {"time": prefill, "memory": 0.0}, "decode": {"time": decode, "memory": 0.0}}
    if step:
        times["train"] = dict(zip(("time", "memory"), step, strict=True))
    return {"speed": {"ratios": times, "own": own, "dense": dense}}


def test_table_2_is_percent_of_dense():
    runs = [
        run("gradpruner", 50.0, 1900, (12.0, 900), **speed(0.61, 0.65, 69, (0.59, 0.64))),
        run("llm_pruner", 60.0, 1000, (3.0, 3500), recovery_seconds=37.0, **speed(0.7, 0.7, 70, (0.6, 0.6))),
        run("sat", 75.0, 1300, **speed(1.0, 1.0, 100)),
        run("dense", 100.0, 1500, **speed(1.0, 1.0, 100, (1.0, 1.0))),
    ]
    [table] = efficiency_tables(runs, published("table2"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["Dense", "LLM-Pruner", "SAT (ends dense)", "GradPruner"]
    assert rows["Dense"][0::2] == ["100.0"] * 6
    # A training step was measured in a separate process, so the peak of the run's process does not count.
    assert rows["GradPruner"][0::2] == ["62.0", "59.0", "64.0", "61.0", "65.0", "69.0"]
    assert rows["GradPruner"][1::2] == ["66.9", "-", "64.4", "61.8", "-", "60.7"]
    # Above the 500 MB of the process, importance took (3500 - 500) / (1500 - 500).
    assert rows["LLM-Pruner"][0::2] == ["100.0", "60.0", "300.0", "70.0", "70.0", "70.0"]
    # SAT prunes in training: the peak of its run counts, (1300 - 500) / (1500 - 500).
    assert rows["SAT (ends dense)"][0::2] == ["75.0", "-", "80.0", "100.0", "100.0", "100.0"]
    assert rows["SAT (ends dense)"][1::2] == ["74.8", "-", "82.9", "102.3", "-", "99.4"]


def test_records_without_timings_have_dashes():
    [table] = efficiency_tables([run("dense", 1.0, 600), run("laco", 1.0, 600)], None)
    assert table.rows[1][1:] == ["100.0", "-", "100.0", "-", "-", "-"]


def test_a_dense_fine_tune_in_a_process_that_had_more_memory_is_no_measure():
    [table] = efficiency_tables([run("dense", 10, 400), run("laco", 5, 600)], None)
    laco = dict(zip(table.headers, table.rows[1], strict=True))
    assert laco["train time % ↓"] == "50.0" and laco["train memory % ↓"] == "-"


def test_without_a_dense_run_there_is_no_table():
    assert efficiency_tables([run("gradpruner", 50.0, 1100)], published("table2")) == []


def test_only_runs_of_one_machine_are_compared():
    other = dataclasses.replace(run("laco", 9.0, 900), environment={"device": "cpu", "num_threads": 64})
    [table] = efficiency_tables([run("dense", 1.0, 600), other], None)
    assert [row[0] for row in table.rows] == ["Dense"]
    assert table.notes[-1] == "left out: 1 runs without a dense run of their seed on the same machine"


def test_a_seed_is_compared_with_dense_of_its_own():
    runs = [
        run(name, seconds, 600, seed=seed) for name, seconds in (("dense", 2.0), ("random", 1.0)) for seed in (0, 1)
    ]
    runs[1] = run("dense", 4.0, 600, seed=1)
    [table] = efficiency_tables([*runs, run("random", 1.0, 600, seed=2)], None)
    shown = {row[0]: row[1] for row in table.rows}
    assert shown == {
        "Dense, seed 0": "100.0",
        "Dense, seed 1": "100.0",
        "Random, seed 0": "50.0",
        "Random, seed 1": "25.0",
    }
    assert table.notes[-1] == "left out: 1 runs without a dense run of their seed on the same machine"


def test_the_papers_values_are_beside_its_settings_only():
    settings = {"sparsity": 0.4, "merge_count": 3, "adapter": "lora", "merge_rule": "sign_sum", "density": 0.2}
    others = [{}, {"sparsity": 0.3}, {"merge_count": 1}, {"adapter": "dora"}]
    runs = [run("dense", 1.0, 600)]
    for change in others:
        made = run("gradpruner", 1.0, 600)
        method = made.config["method"] | settings | change
        layers = made.pruning | {"num_hidden_layers": 30 - round(method["sparsity"] * 30)}
        runs.append(dataclasses.replace(made, config=made.config | {"method": method}, pruning=layers))
    usual, other = efficiency_tables(runs, published("table2"))
    assert [row[0] for row in usual.rows] == ["Dense", "GradPruner"] and usual.rows[1][2] == "66.9"
    assert other.title == f"{usual.title}, other settings" and len(other.rows) == 3
    assert "paper" not in other.headers and usual.title == "model on arc_easy, lora: time and memory (Table 2)"


def test_titles_have_no_prompts_or_line_breaks():
    runs = []
    for prompt in ("Question: {q}\nAnswer:", "Q: {q}\nA:"):
        for name in ("dense", "laco"):
            made = run(name, 1.0, 600)
            made.config["dataset"]["prompt"] = prompt
            runs.append(made)
    titles = [table.title for table in efficiency_tables(runs, None)]
    assert len(set(titles)) == 2 and not any("\n" in title or "Answer" in title for title in titles)
    assert all(re.search(", prompt=#[0-9a-f]{6}$", title) for title in titles)


def test_table_11_to_every_published_digit():
    paper = published("table11").rows
    own = paper[0].coordinates
    config = shipped_config(own["model"])
    dense = config_shape(config)
    shapes = {"original": dense, "pruned": dataclasses.replace(dense, layers=dense.layers[:19])}
    rows = {name: row.values for name, row in zip(shapes, paper, strict=True)}
    table = counts_table("t", config, shapes, torch.bfloat16, own["length"], rows)
    for row in table.rows:
        assert row[2:8:2] == row[3:8:2] == [str(value) for value in rows[row[0]]]
    complete = dict(zip(table.headers[8:], table.rows[1][8:], strict=True))
    assert complete["params"] == "5,194,805,248" and complete["GMACs"] == "600.22" and complete["of first"] == "0.647"


def test_counts_of_any_shape():
    config = shipped_config("meta-llama/Llama-3.2-1B")
    dense = config_shape(config)
    narrow = ModelShape(2048, (LayerShape(16, 4, 100), *dense.layers[1:]))
    table = counts_table("t", config, {"a": dense, "b": narrow}, torch.float32)
    assert "paper" not in table.headers and len(table.rows) == 2
    assert all(len(row) == len(table.headers) for row in table.rows)
