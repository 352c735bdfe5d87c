"""The published values: their shape, the paper's own arithmetic, and what its text says about them."""

from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from statistics import mean

import pytest

from experiments.config import CONF
from gradpruner.reporting.published import load_published

PAPER = CONF.parent / "results" / "paper"
LLAMA, MISTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3"
TABLES = [f"table{number}" for number in range(1, 14)]
FIGURES = [f"figure{number}" for number in (1, 2, 5, 6, 7, 8, 9)]
WITH_AVERAGES = ("table1", "table3", "table4")
# Rows whose printed average is not the average of their values, rounded either way; the notes of the files name them.
WRONG_AVERAGES = {
    ("table1", LLAMA, "full", "sat", None),
    ("table1", LLAMA, "lora", "laco", None),
    ("table1", LLAMA, "lora", "apt", None),
    ("table1", MISTRAL, "full", "llm_pruner", None),
    ("table1", MISTRAL, "full", "laco", None),
    ("table1", MISTRAL, "full", "minitron", None),
    ("table1", MISTRAL, "full", "sat", None),
    ("table1", MISTRAL, "lora", "sat", None),
    ("table1", MISTRAL, "lora", "apt", None),
    ("table3", LLAMA, "full", "igia_only", 12),
    ("table4", LLAMA, "lora", "igia_only", 13),
    ("table4", LLAMA, "lora", "igia_only", 11),
}


def load(name):
    return load_published(PAPER, name)


def values(name, **coordinates):
    [row] = load(name).select(**coordinates)
    return row.values


def test_all_files_are_known():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*TABLES, *FIGURES}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_all_values(name):
    table = load(name)
    assert table.label == f"Table {name.removeprefix('table')}" and table.axis and table.rows
    assert all(len(row.values) == len(table.columns) for row in table.rows)
    assert all((row.average is not None) == (name in WITH_AVERAGES) for row in table.rows)
    assert len({tuple(sorted(row.coordinates.items())) for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_no_values_but_say_what_the_text_does(name):
    figure = load(name)
    assert figure.label == f"Figure {name.removeprefix('figure')}" and figure.notes
    assert all(row.values == () and row.average is None for row in figure.rows)


def test_names_are_those_of_our_options():
    methods = {row.coordinates["method"] for name in (*TABLES, *FIGURES) for row in load(name).rows}
    assert methods <= {path.stem for path in (CONF / "method").glob("*.yaml")}
    datasets = {column for name in ("table1", "table3", "table4", "table7") for column in load(name).columns}
    assert datasets <= {path.stem for path in (CONF / "dataset").glob("*.yaml")}
    models = {row.coordinates.get("model") for name in (*TABLES, *FIGURES) for row in load(name).rows} - {None}
    assert models <= {line[6:] for path in (CONF / "model").glob("*.yaml") for line in path.read_text().splitlines()}


def test_printed_digits_are_kept():
    assert [str(value) for value in values("table11", method="dense")] == ["1.79", "893.35", "7.5"]
    assert str(values("table1", model=LLAMA, finetune="full", method="llm_pruner")[0]) == "0.560"


def average_is_rounded(row):
    exact = sum(row.values) / len(row.values)
    return row.average in {exact.quantize(Decimal("0.001"), rule) for rule in (ROUND_HALF_UP, ROUND_HALF_DOWN)}


def test_printed_averages_but_for_known_exceptions():
    wrong = set()
    for name in WITH_AVERAGES:
        for row in load(name).rows:
            if not average_is_rounded(row):
                keys = ("model", "finetune", "method", "num_pruned_layers")
                wrong.add((name, *(row.coordinates.get(key) for key in keys)))
    assert wrong == WRONG_AVERAGES


def test_exceptions_are_in_the_notes():
    for name, model, mode, method, num_pruned_layers in WRONG_AVERAGES:
        [row] = [
            row
            for row in load(name).select(model=model, finetune=mode, method=method)
            if row.coordinates.get("num_pruned_layers") == num_pruned_layers
        ]
        exact = (sum(row.values) / len(row.values)).quantize(Decimal("0.0001"), ROUND_HALF_UP)
        assert str(exact) in " ".join(load(name).notes), row


def pairs(method):
    """Yields a method's rows of Table 1, each with the dense row of the same model and fine-tuning."""
    table = load("table1")
    for row in table.select(method=method):
        [dense] = table.select(model=row.coordinates["model"], finetune=row.coordinates["finetune"], method="dense")
        yield row, dense


def test_average_performance_drop():
    # "0.99%": relative to dense, between what printed averages and values give; in points it is less.
    printed = mean(1 - row.average / dense.average for row, dense in pairs("gradpruner"))
    exact = mean(1 - sum(row.values) / sum(dense.values) for row, dense in pairs("gradpruner"))
    points = mean(mean(dense.values) - mean(row.values) for row, dense in pairs("gradpruner"))
    assert round(100 * printed, 2) == Decimal("0.98") and round(100 * exact, 2) == Decimal("1.00")
    assert round(100 * points, 2) == Decimal("0.78")


def test_five_points_above_other_pruning_methods():
    # "approximately 5 percentage points on average for LLMPruner, Laco, and MINITRON", "surpassing SAT and APT"
    table = load("table1")
    gains = {}
    for row, _ in pairs("gradpruner"):
        block = table.select(model=row.coordinates["model"], finetune=row.coordinates["finetune"])
        for other in block:
            gains.setdefault(other.coordinates["method"], []).append(100 * (row.average - other.average))
    assert mean(mean(gains[name]) for name in ("llm_pruner", "laco", "minitron")) == pytest.approx(5, abs=0.6)
    assert all(gain > 0 for name in ("sat", "apt", "small_dense") for gain in gains[name])


def test_best_on_all_datasets_but_for_the_smaller_model():
    table = load("table1")
    better = {}
    for row, _ in pairs("gradpruner"):
        mode = row.coordinates["finetune"]
        for other in table.select(model=row.coordinates["model"], finetune=mode):
            if other.coordinates["method"] not in ("dense", "gradpruner"):
                for name, ours, theirs in zip(table.columns, row.values, other.values, strict=True):
                    if theirs >= ours:
                        better.setdefault((other.coordinates["method"], mode), []).append(name)
    assert better == {
        ("small_dense", "full"): ["pubmedqa", "billsum", "fingpt", "arc_easy"],
        ("small_dense", "lora"): ["billsum", "fingpt"],
    }


def test_time_and_memory_saved():
    # "approximately 36% reductions in both training time and memory usage, along with 39% savings in inference"
    rows = load("table2").select(method="gradpruner")
    assert 100 - mean(value for row in rows for value in row.values[:2]) == pytest.approx(36, abs=1)
    assert 100 - mean(value for row in rows for value in row.values[2:]) == pytest.approx(39, abs=1)
    assert all(row.values == (100,) * 4 for row in load("table2").select(method="dense"))


def test_work_and_size_saved():
    # "reduced the number of parameters by approximately 38%, and saved approximately 40% in FLOPs and MACs"
    saved = [1 - own / dense for own, dense in zip(*(row.values for row in load("table11").rows[::-1]), strict=True)]
    assert [float(100 * value) for value in saved] == pytest.approx([40, 40, 38], abs=1)


@pytest.mark.parametrize(("one", "other"), [("table5", "table10"), ("table8", "table9")])
def test_printed_twice(one, other):
    one, other = load(one), load(other)
    assert (one.axis, one.columns, one.rows) == (other.axis, other.columns, other.rows)


def test_ablations_agree_with_the_main_results():
    main = {
        (row.coordinates["model"], row.coordinates["finetune"], row.coordinates["method"]): row
        for row in load("table1").rows
    }
    for name in ("table3", "table4"):
        for row in load(name).rows:
            own = row.coordinates
            if own["method"] == "dense" or (own["method"], own.get("num_pruned_layers")) == ("gradpruner", 13):
                same = main[own["model"], own["finetune"], own["method"]]
                assert (row.values, row.average) == (same.values, same.average)
    # One column of an ablation is the dataset's value at 40 % sparsity.
    for name, column in {"table5": 1.0, "table8": 0.01, "table13": "lora"}.items():
        table = load(name)
        for row in table.rows:
            same = main[LLAMA, "full", row.coordinates["method"]]
            at = load("table1").columns.index(row.coordinates["dataset"])
            assert row.values[table.columns.index(column)] == same.values[at]


def test_merging_helps_everywhere():
    # "layer merging significantly improves accuracy"
    for name in ("table3", "table4"):
        table = load(name)
        for row in table.select(method="gradpruner"):
            own = {key: row.coordinates[key] for key in ("model", "finetune", "num_pruned_layers")}
            [without] = table.select(method="igia_only", **own)
            assert row.average > without.average
            assert all(merged >= dropped for merged, dropped in zip(row.values, without.values, strict=True))


def test_unknown_table(tmp_path):
    (tmp_path / "table1.yaml").write_text("title: t")
    with pytest.raises(ValueError, match=r"no published values 'table2' in .*, only: table1. Name one of those"):
        load_published(tmp_path, "table2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: t\nrow: 1", r"table1.yaml must have a title and may have .*, got \['row', 'title'\]. Correct it"),
        ("- 1", r"must have a title .*, got \[1\]. Correct it"),
        ("title: t\nblocks: [{rows: [{values: []}]}]", "must have a method, got {'values': .*}. Add it"),
        (
            "title: t\ncolumns: [a]\nblocks: [{rows: [{method: m, values: [0.1, 0.2]}]}]",
            r"each of 1 columns.*got \['0.1",
        ),
        (
            "title: t\ncolumns: [a]\nblocks: [{rows: [{method: m, values: [1]}]}]",
            r"with a point .*\['1'\] for m. Correct",
        ),
    ],
)
def test_malformed_files(tmp_path, text, message):
    (tmp_path / "table1.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path, "table1")
