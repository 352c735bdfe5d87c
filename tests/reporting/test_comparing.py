"""Differences between methods: against closed forms, and with the scores of rows that records hold."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reporting.test_tables import record

from gradpruner.reporting.comparing import difference, mcnemar, mean_difference
from gradpruner.reporting.row_scores import read_numbers, read_row_scores, row_scores, write_numbers


def run(scores, seed=0, metric="accuracy", rows="same", stderr=0.05, weights=None):
    weights = [1] * len(scores) if weights is None else weights
    value = sum(scores) / sum(weights)
    made = record("a", seed, metrics={"num_examples": len(scores), metric: value, f"{metric}_stderr": stderr})
    texts = {metric: write_numbers(scores)} | (
        {"answer_tokens": write_numbers(weights)} if metric == "answer_nll" else {}
    )
    return dataclasses.replace(made, row_scores=texts, content={"test_rows": rows})


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 2**8), (9, 1, 2 * 11 / 2**10)]
)
def test_mcnemar_is_the_binomial_test(first, second, p):
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(p)


def test_mcnemar_of_thousands_of_rows():
    assert mcnemar(2000, 2000) == 1.0 and 0.001 < mcnemar(2100, 1900) < 0.002  # normal: z = 3.15


def test_single_runs_on_the_same_rows():
    found = difference([run([1] * 60 + [0] * 40)], [run([1] * 50 + [0] * 50)], "accuracy")
    assert found.is_paired and found.p_value == mcnemar(10, 0) and found.is_clear
    # The gain per row is 0 or 1, so its error is that of a binomial share of a tenth.
    assert found.value == pytest.approx(0.1) and found.high - found.low == pytest.approx(3.92 * 0.03, abs=0.015)


def test_the_interval_of_answer_nll_is_that_of_a_ratio_of_sums():
    tokens = np.arange(1, 201) % 7 + 1
    first, second = 2.0 * tokens, 2.0 * tokens + np.sin(np.arange(200)) * tokens
    found = difference(
        [run(first, metric="answer_nll", weights=tokens)],
        [run(second, metric="answer_nll", weights=tokens)],
        "answer_nll",
    )
    gains = first - second
    error = math.sqrt(sum((gains - found.value * tokens) ** 2)) / tokens.sum()
    assert found.is_paired and found.p_value is None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_seeds_add_their_error():
    rows = [1] * 50 + [0] * 50
    same = [run(rows, seed) for seed in range(3)]
    moved = [run([1] * (50 + extra) + [0] * (50 - extra), seed) for seed, extra in enumerate((2, 10, 18))]
    found = difference(moved, same, "accuracy")
    of_seeds = np.std([0.52, 0.60, 0.68], ddof=1) / math.sqrt(3)
    assert found.p_value is None and found.value == pytest.approx(0.1)
    assert found.high - found.low > 3.92 * of_seeds * 0.9


def test_seeds_with_rows_of_their_own_are_paired_seed_by_seed():
    """As one row set of all seeds, where the seeds agree; hard rows of one seed do not widen the interval."""
    easy, hard = [1] * 90 + [0] * 10, [1] * 20 + [0] * 80
    better = [[1] * 95 + [0] * 5, [1] * 25 + [0] * 75]
    first = [run(scores, seed, rows=f"rows {seed}") for seed, scores in enumerate(better)]
    second = [run(scores, seed, rows=f"rows {seed}") for seed, scores in enumerate((easy, hard))]
    found = difference(first, second, "accuracy")
    assert found.is_paired and found.p_value is None and found.is_clear and found.value == pytest.approx(0.05)
    assert found.high - found.low == pytest.approx(3.92 * math.sqrt(0.05 * 0.95 / 200), rel=0.1)
    assert difference(list(reversed(first)), second, "accuracy") == found


def test_seeds_that_disagree_beyond_their_rows_widen_the_interval():
    worse, better = [1] * 40 + [0] * 60, [1] * 60 + [0] * 40
    first = [run(scores, seed, rows=f"rows {seed}") for seed, scores in enumerate((better, worse, better))]
    second = [run([1] * 50 + [0] * 50, seed, rows=f"rows {seed}") for seed in range(3)]
    found = difference(first, second, "accuracy")
    assert found.is_paired and not found.is_clear
    of_both = np.std([0.1, -0.1, 0.1], ddof=1) / math.sqrt(3)
    assert found.high - found.low == pytest.approx(3.92 * of_both, rel=0.1)


@pytest.mark.parametrize("seeds", [(0, 1), (0,), (0, 1, 2, 2)])
def test_other_seeds_are_not_paired(seeds):
    first = [run([1] * 60 + [0] * 40, seed, rows=f"rows {seed}") for seed in (0, 1, 2)]
    second = [run([1] * 50 + [0] * 50, seed, rows=f"rows {seed}") for seed in seeds]
    assert not difference(first, second, "accuracy").is_paired


@pytest.mark.parametrize("change", [{"rows": "others"}, {"rows": None}, {"stderr": 0.05}])
def test_without_the_same_rows_it_is_unpaired(change):
    other = run([1] * 50 + [0] * 50, **change)
    if "stderr" in change:
        other = dataclasses.replace(other, row_scores={})  # an older record
    found = difference([run([1] * 60 + [0] * 40)], [other], "accuracy")
    assert not found.is_paired and not found.is_clear
    assert found.high - found.value == pytest.approx(1.96 * math.hypot(0.05, 0.05), rel=1e-3)


def test_mean_over_datasets():
    one = difference([run([1] * 60 + [0] * 40)], [run([1] * 50 + [0] * 50)], "accuracy")
    mean = mean_difference([one, one])
    assert mean.value == one.value and mean.is_paired
    assert mean.high - mean.low == pytest.approx((one.high - one.low) / math.sqrt(2))


@given(st.lists(st.floats(0, 1e4, allow_nan=False), max_size=9))
@example([100.0])
@example([1.0])
@example([1e4, 1.0])
def test_numbers_survive_as_text(values):
    assert read_numbers(write_numbers(values)) == pytest.approx(values, rel=1e-3)


@given(st.lists(st.booleans(), max_size=9))
def test_right_and_wrong_are_one_character(values):
    text = write_numbers(values)
    assert len(text) == len(values) and read_numbers(text) == values


def test_scores_of_likelihoods_and_of_texts():
    likelihood = [
        {"prediction": 1, "prediction_norm": 0, "label": 1, "answer_nll": 2.5, "answer_tokens": 3},
        {"prediction": 1, "prediction_norm": 0, "label": 0, "answer_nll": 1.25, "answer_tokens": 4},
    ]
    names = ("accuracy", "accuracy_norm", "answer_nll")
    metrics = {"num_examples": 2} | {f"{name}{end}": 0.5 for name in names for end in ("", "_stderr")}
    kept = row_scores(likelihood, metrics)
    assert kept == {"accuracy": "10", "accuracy_norm": "01", "answer_nll": "2.5 1.25", "answer_tokens": "3 4"}
    texts = [
        {"accuracy": 1.0, "rouge_l": 0.5, "similarity": 0.123456},
        {"accuracy": 0.0, "rouge_l": 0.1, "similarity": 1},
    ]
    metrics = {"num_examples": 2, "accuracy_stderr": 0.1, "rouge_l_stderr": 0.1, "similarity_stderr": 0.1}
    assert row_scores(texts, metrics) == {"accuracy": "10", "similarity": "0.1235 1"}


def test_older_records_have_no_scores():
    assert read_row_scores(record("a"), "accuracy") is None
