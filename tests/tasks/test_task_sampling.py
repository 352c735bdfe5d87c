"""Sampling of rows: the shares of the labels, the seed, and the settings that ask for a sample."""

import logging
import random
from collections import Counter
from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import row, toy, write

from gradpruner.tasks import DataError, Example
from gradpruner.tasks.base import SPLITS
from gradpruner.tasks.sampling import stratified_sample

every = settings(derandomize=True, deadline=None, max_examples=200, database=None)

all_labels = st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=60)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def draws(draw):
    """Draws labels, a number of rows to sample, and a seed."""
    labels = draw(all_labels)
    return labels, draw(st.integers(1, len(labels))), draw(seeds)


def by_label(labels: list[Hashable], chosen: list[int]) -> dict[Hashable, set[int]]:
    return {label: {index for index in chosen if labels[index] == label} for label in set(labels)}


@every
@given(draws())
def test_a_sample_has_as_many_rows_as_asked_for_each_once_and_in_order(case):
    labels, count, seed = case
    chosen = stratified_sample(labels, count, seed)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(len(labels)))


@every
@given(draws())
def test_every_label_is_within_one_row_of_its_share(case):
    labels, count, seed = case
    for label, rows in by_label(labels, stratified_sample(labels, count, seed)).items():
        assert abs(len(rows) - count * labels.count(label) / len(labels)) < 1


@every
@given(draws())
def test_the_same_seed_draws_the_same(case):
    labels, count, seed = case
    assert stratified_sample(labels, count, seed) == stratified_sample(tuple(labels), count, seed)


@every
@given(draws(), st.integers(1, 60))
def test_a_label_with_fewer_rows_in_one_draw_has_a_part_of_those_in_another(case, other_count):
    labels, count, seed = case
    one = by_label(labels, stratified_sample(labels, count, seed))
    other = by_label(labels, stratified_sample(labels, other_count, seed))
    for label in one:
        small, large = sorted((one[label], other[label]), key=len)
        assert small <= large


@every
@given(st.sampled_from([None, 0, "x"]), st.integers(2, 50), seeds)
def test_one_label_is_plain_sampling_and_a_smaller_draw_is_part_of_a_larger_one(label, num_rows, seed):
    shuffled = random.Random(seed).sample(range(num_rows), num_rows)
    for count in range(1, num_rows):
        assert stratified_sample([label] * num_rows, count, seed) == sorted(shuffled[:count])


@every
@given(all_labels, st.integers(0, 100), seeds)
def test_asking_for_all_rows_or_more_gives_all(labels, more, seed):
    assert stratified_sample(labels, len(labels) + more, seed) == list(range(len(labels)))


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        ("aaaabb", 3, {"a": 2, "b": 1}),  # shares 2 and 1
        ("aabbcc", 4, {"a": 2, "b": 1, "c": 1}),  # 1 1/3 each: among equal remainders, the first label gets the row
        ("bbbaaa", 3, {"b": 2, "a": 1}),  # 1 1/2 each: the first label is the first in the rows, not the smallest
        ("aaaaabbbccc", 4, {"a": 2, "b": 1, "c": 1}),  # 1 9/11, 1 1/11, 1 1/11
        ("aaaaabbbccc", 1, {"a": 1}),  # 5/11, 3/11, 3/11
        ("aaaaaaaaab", 5, {"a": 5}),  # 4 1/2 and 1/2: a rare label may get no row
        ("baaaaaaaaa", 5, {"b": 1, "a": 4}),
        ("abcdefgh", 3, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_shares_by_hand(labels: str, count: int, expected: dict[str, int]) -> None:
    for seed in range(5):
        assert Counter(labels[index] for index in stratified_sample(labels, count, seed)) == expected


def test_every_row_is_drawn_as_often_as_another() -> None:
    labels = "aabababbba" * 2
    drawn = Counter(index for seed in range(1000) for index in stratified_sample(labels, 6, seed))
    assert set(drawn) == set(range(20))
    assert all(230 <= number <= 370 for number in drawn.values())  # 300 expected, with a standard deviation of 14


# ---- through Task.load ----


def write_rows(folder: Path, num_rows: int = 50) -> None:
    """Writes questions q00, q01, ...; every fifth has the label 0, the others 1."""
    rows = [row(question=f"q{number:02d}", label=int(number % 5 > 0)) for number in range(num_rows)]
    for name in ("train.jsonl", "test.jsonl"):
        write(folder, *rows, name=name)


def load(folder: Path, split: str = "train", seed: int = 0, **changes: Any) -> list[Example]:
    return toy(folder, **changes).load(split, seed=seed)


def test_max_samples_draws_by_seed_in_the_order_of_the_source(tmp_path: Path) -> None:
    write_rows(tmp_path)
    everything = load(tmp_path)
    drawn = load(tmp_path, max_train_samples=10)
    assert len(set(drawn)) == 10 and drawn == [example for example in everything if example in drawn]
    assert Counter(example.label for example in drawn) == {0: 2, 1: 8}
    assert drawn == load(tmp_path, max_train_samples=10)
    assert drawn != load(tmp_path, max_train_samples=10, seed=1)


def test_each_split_has_its_own_limit(tmp_path: Path) -> None:
    write_rows(tmp_path)
    assert len(load(tmp_path, "test", max_train_samples=10, train_fraction=0.1)) == 50
    assert len(load(tmp_path, "test", max_test_samples=3)) == 3
    assert len(load(tmp_path, "train", max_test_samples=3)) == 50


def test_asking_for_more_than_there_is_gives_all_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path)
    with caplog.at_level(logging.INFO):
        assert load(tmp_path, max_train_samples=51) == load(tmp_path)
    assert "toy train: 51 rows asked, all 50 used" in caplog.text


@pytest.mark.parametrize(
    ("fraction", "maximum", "expected"),
    [
        (None, None, {0: 10, 1: 40}),
        (1.0, None, {0: 10, 1: 40}),
        (1, None, {0: 10, 1: 40}),
        (0.1, None, {0: 1, 1: 4}),
        (0.3, None, {0: 3, 1: 12}),
        (0.5, 20, {0: 2, 1: 8}),  # of the rows that max_train_samples keeps
        (0.5, 80, {0: 5, 1: 20}),  # of the 50 rows that exist
        (0.001, None, {1: 1}),  # at least one row
        (0.25, 1, {1: 1}),
    ],
)
def test_a_fraction_of_the_train_rows(
    fraction: float | None, maximum: int | None, expected: dict[int, int], tmp_path: Path
) -> None:
    write_rows(tmp_path)
    examples = load(tmp_path, train_fraction=fraction, max_train_samples=maximum)
    assert Counter(example.label for example in examples) == expected


def test_a_smaller_fraction_is_part_of_a_larger_one(tmp_path: Path) -> None:
    write_rows(tmp_path)
    draws = [load(tmp_path, train_fraction=fraction) for fraction in (0.1, 0.2, 0.5, 0.8, 1.0)]
    assert [len(draw) for draw in draws] == [5, 10, 25, 40, 50]
    assert all(set(smaller) < set(larger) for smaller, larger in pairwise(draws))
    assert draws[1] == load(tmp_path, max_train_samples=10)


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.001, 10, float("nan"), float("inf"), True, "0.1", [0.1]])
def test_a_fraction_that_is_none_is_refused(fraction: Any) -> None:
    with pytest.raises(
        DataError, match=r"train_fraction must be in \(0, 1\] or null for all rows, got .*\. For 10 % write dataset\.tr"
    ):
        toy(Path("nowhere"), train_fraction=fraction)


def test_validation_rows_are_held_out_of_train_for_every_seed(tmp_path: Path) -> None:
    write_rows(tmp_path)
    (tmp_path / "test.jsonl").unlink()  # never read
    everything = load(tmp_path)
    halves = {
        (split, seed): load(tmp_path, split, seed, validation_fraction=0.3) for split in SPLITS for seed in (0, 1)
    }
    train, validation = halves["train", 0], halves["test", 0]
    assert (train, validation) == (halves["train", 1], halves["test", 1])
    assert len(validation) == 15 and Counter(each.label for each in validation) == {0: 3, 1: 12}
    assert not set(train) & set(validation) and set(train) | set(validation) == set(everything)
    fewer = load(tmp_path, "test", max_test_samples=5, validation_fraction=0.3)
    assert len(fewer) == 5 and set(fewer) < set(validation)
    assert len(load(tmp_path, max_train_samples=40, train_fraction=0.5, validation_fraction=0.3)) == 18


@pytest.mark.parametrize("fraction", [0, 0.0, 1, 1.0, -0.1, float("nan"), True, "0.1"])
def test_a_part_for_validation_that_is_none_is_refused(fraction: Any) -> None:
    with pytest.raises(
        DataError,
        match=r"validation_fraction must be a part of the train split, in \(0, 1\), or null, got .*\. For 10 % write",
    ):
        toy(Path("nowhere"), validation_fraction=fraction)


def test_validation_leaves_rows_on_both_sides(tmp_path: Path) -> None:
    write_rows(tmp_path)
    for fraction in (0.001, 0.999):
        with pytest.raises(
            DataError, match=rf"rows on both sides, got {fraction} of 50 training rows of toy\. Change dataset\."
        ):
            load(tmp_path, validation_fraction=fraction)


@pytest.mark.parametrize("setting", ["max_train_samples", "max_test_samples"])
@pytest.mark.parametrize("value", [0, -1, 10.0, True, "10"])
def test_a_number_of_rows_that_is_none_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"{setting} must be a positive integer or null for all rows, got {value!r}\."):
        toy(Path("nowhere"), **{setting: value})


def test_label_0_of_two_choices_is_not_label_0_of_three(tmp_path: Path) -> None:
    write(tmp_path, *[row(label=0)] * 30, *[row(choices=["a", "b", "c"], label=0)] * 10)
    drawn = toy(tmp_path, max_train_samples=8).load("train", seed=0)
    assert sorted(len(example.choices) for example in drawn) == [2] * 6 + [3] * 2
