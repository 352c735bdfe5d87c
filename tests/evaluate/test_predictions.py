"""Predictions reach the disk batch by batch, and an interrupted evaluation ends like an uninterrupted one."""

import json
import random
from dataclasses import dataclass

import pytest

from gradpruner.evaluate.base import JOURNAL_FILE, PREDICTIONS_FILE, Evaluation, Question, predict_all
from gradpruner.files import read_jsonl
from gradpruner.tasks import Example


@dataclass(frozen=True)
class Echo(Evaluation):
    """Evaluation whose answers contain the batch size, so that a changed batch is visible."""

    name = "echo"

    def questions(self, examples, encoder):
        raise NotImplementedError

    def predict(self, model, encoder, batch):
        model.append([question.example.id for question in batch])
        return [{"id": question.example.id, "text": "é\u2028😀", "batch": len(batch)} for question in batch]

    def prediction_settings(self):
        return {}

    def measure(self, predictions, examples):
        raise NotImplementedError


QUESTIONS = [
    Question(Example(str(index), "", ""), prompt=[0] * length, completions=[[1], [1, 2]])
    for index, length in enumerate([3, 9, 4, 9, 1, 7, 7])
]


def run(folder, questions=QUESTIONS, batch_size=2):
    seen = []
    path = predict_all(lambda: seen, Echo(batch_size), None, questions, folder)
    return read_jsonl(path), seen


def test_rows_in_order_and_batches_longest_first(tmp_path):
    rows, seen = run(tmp_path)
    assert [row["id"] for row in rows] == [str(index) for index in range(7)]
    assert seen == [["1", "3"], ["5", "6"], ["2", "0"], ["4"]]
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS_FILE]


@pytest.fixture
def interrupted(tmp_path):
    """Returns the folder of a run that was killed after two of four batches."""

    class Killed(list):
        def append(self, batch):
            if len(self) == 2:
                raise KeyboardInterrupt
            super().append(batch)

    with pytest.raises(KeyboardInterrupt):
        predict_all(Killed, Echo(2), None, QUESTIONS, tmp_path)
    return tmp_path


def test_goes_on_with_the_missing_batches(interrupted, tmp_path_factory):
    expected, _ = run(tmp_path_factory.mktemp("whole"))
    rows, seen = run(interrupted)
    assert rows == expected and seen == [["2", "0"], ["4"]]


def test_any_torn_journal_ends_in_the_same_file(interrupted, tmp_path_factory):
    expected, _ = run(tmp_path_factory.mktemp("whole"))
    journal = (interrupted / JOURNAL_FILE).read_bytes()
    for size in [*range(len(journal) + 1)]:  # power can fail after any byte
        (interrupted / JOURNAL_FILE).write_bytes(journal[:size])
        rows, seen = run(interrupted)
        num_whole = journal[:size].count(b"\n") // 2
        assert rows == expected and len(seen) == 4 - num_whole


def test_rows_of_another_order_are_answered_again(interrupted):
    lines = (interrupted / JOURNAL_FILE).read_text().splitlines(keepends=True)
    (interrupted / JOURNAL_FILE).write_text("".join(lines[::-1]))
    _, seen = run(interrupted)
    assert len(seen) == 4


def test_a_finished_journal_needs_no_model(tmp_path):
    expected, seen = run(tmp_path)
    by_id = {row["id"]: row for row in expected}
    lines = [json.dumps(by_id[row_id], ensure_ascii=False) + "\n" for batch in seen for row_id in batch]
    (tmp_path / JOURNAL_FILE).write_text("".join(lines))

    def refuse():
        raise AssertionError("the model was loaded")

    assert read_jsonl(predict_all(refuse, Echo(2), None, QUESTIONS, tmp_path)) == expected


def test_random_sizes(tmp_path):
    for seed in range(20):
        generator = random.Random(seed)
        lengths = [generator.randint(1, 9) for _ in range(generator.randint(1, 12))]
        questions = [Question(Example(str(i), "", ""), [0] * n, [[1]]) for i, n in enumerate(lengths)]
        rows, seen = run(tmp_path, questions, generator.randint(1, 5))
        assert [row["id"] for row in rows] == [str(i) for i in range(len(lengths))]
        in_batches = [lengths[int(i)] for batch in seen for i in batch]
        assert in_batches == sorted(lengths, reverse=True)
