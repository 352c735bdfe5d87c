"""The table of importance runs over made-up records."""

import dataclasses

from test_tables import record

from gradpruner.reporting.importance_table import importance_tables


def run(seed=0, accuracy=0.5, pruned=(3, 4, 5, 9), halves=0.5, undecided=(3,), layers=26, **settings):
    made = record("gradpruner", seed, accuracy, layers, **settings)
    report = {
        "step_importance": [[1.0]], "prefix_overlap": [None, 0.25, 0.75, 1.0], "halves_overlap": halves,
        "undecided_layers": list(undecided), "top_step_share": 0.4,
    }  # fmt: skip
    return dataclasses.replace(
        made,
        pruning=made.pruning | {"pruned_layers": list(pruned), "report": report},
        metrics_before={"answer_nll": 20.0 + seed},
    )


def test_what_was_found_and_what_it_was_worth():
    runs = [
        run(steps=4),
        run(steps=8, accuracy=0.3, halves=None),
        run(1, steps=8, accuracy=0.5, pruned=(2, 3, 4, 5), undecided=()),
    ]
    [table] = importance_tables([*runs, record("dense"), dataclasses.replace(run(steps=2), status="failed")])
    assert table.title == "Importance runs: model on arc_easy, lora, 26 of 30 layers kept"
    assert table.headers == [
        "importance run", "layers pruned", "halves", "half-way", "near the cut", "top steps", "accuracy", "NLL before",
    ]  # fmt: skip
    assert table.rows == [
        ["GradPruner, steps=4", "3-5 9", "0.50", "0.25", "1.0", "0.40", "0.500 ±0.020", "20.00"],
        ["GradPruner, steps=8", "3-5 9", "0.50", "0.25", "0.5", "0.40", "0.400 ±0.100 (n=2)", "20.50"],
    ]


def test_a_run_found_twice_is_one():
    [table] = importance_tables([run(), run()])
    assert table.rows[0][6] == "0.500 ±0.020"


def test_each_number_of_layers_has_a_table_of_its_own():
    assert len(importance_tables([run(), run(layers=20)])) == 2
    assert importance_tables([record("random")]) == []
