"""The table of learning rates over made-up records."""

import dataclasses

import pytest
from test_tables import record

from gradpruner.reporting.learning_rate_table import learning_rate_tables


def run(method, rate, nll, seed=0, mode="lora", **settings):
    metrics = {"num_examples": 400, "answer_nll": nll, "answer_nll_stderr": 0.1}
    return record(method, seed, config={"finetune": {"mode": mode, "learning_rate": rate}}, metrics=metrics, **settings)


def test_the_best_rate_of_each_method_and_of_all():
    runs = [run("dense", 1e-4, 2.0), run("dense", 3e-3, 3.0), run("dense", 1e-2, 9.0)]
    runs += [run("gradpruner", 1e-4, 8.0), run("gradpruner", 3e-3, 5.0)]
    runs += [run("apt", 1e-4, 5.5), run("apt", 3e-3, 4.0), run("apt", 3e-3, 6.0, seed=1)]
    runs.append(runs[-1])  # the same run, found twice
    [table] = learning_rate_tables(runs)
    assert table.title == "Learning rates: model on arc_easy, lora, answer NLL ↓"
    assert table.headers == ["method", "0.0001", "0.003", "0.01"]
    assert table.rows == [
        ["Dense", "**2.000 ±0.100**", "3.000 ±0.100", "9.000 ±0.100"],
        ["APT", "5.500 ±0.100", "**5.000 ±1.000 (n=2)**", "-"],
        ["GradPruner", "8.000 ±0.100", "**5.000 ±0.100**", "-"],
        ["mean of all", "5.167", "**4.333**", "-"],
    ]
    [table] = learning_rate_tables([run("dense", 1, 2.0), run("dense", 2, 3.0), run("laco", 3, 2.0)])
    assert table.rows[1:] == [["LaCo", "-", "-", "2.000 ±0.100"]]  # no rate has all methods; one rate is not marked
    [table] = learning_rate_tables([*runs[:2], run("laco", 3e-3, 2.0)])
    assert [row[0] for row in table.rows] == ["Dense", "LaCo"]
    [table] = learning_rate_tables(runs[:2])
    assert [row[0] for row in table.rows] == ["Dense"]


def test_settings_of_a_method_are_rows_and_those_of_the_fine_tune_tables():
    runs = [run("laco", rate, 1.0, mode=mode, rule=rule)
            for rate in (1, 2) for mode in ("lora", "full") for rule in ("code", "paper")]  # fmt: skip
    tables = learning_rate_tables(runs)
    assert [table.title.split(", ")[1] for table in tables] == ["full", "lora"]
    assert [[row[0] for row in table.rows[:2]] for table in tables] == [["LaCo, rule=code", "LaCo, rule=paper"]] * 2


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run("dense", 1, 2.0), run("laco", 1, 2.0)],
        [run("dense", 1, 2.0), dataclasses.replace(run("dense", 2, 2.0), status="failed")],
        [run("dense", 1, 2.0), dataclasses.replace(run("dense", 2, 2.0), metrics={"accuracy": 0.5})],
    ],
    ids=["none", "one rate", "failed", "no likelihood"],
)
def test_one_rate_is_no_search(runs):
    assert learning_rate_tables(runs) == []
