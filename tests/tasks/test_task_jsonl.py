import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gradpruner.tasks import DataError, Example, JsonLines


def task(folder: Path, **changes: Any) -> JsonLines:
    settings = {
        "train_file": str(folder / "mine.jsonl"),
        "test_file": str(folder / "held_out.jsonl"),
        "prompt": "Q: {question}\nA:",
        "answer_field": "answer",
    }
    return JsonLines(**(settings | changes))


def load(folder: Path, *rows: dict[str, Any], **changes: Any) -> list[Example]:
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task(folder, **changes).load("train", seed=0)


def test_open_answers(tmp_path: Path) -> None:
    examples = load(tmp_path, {"question": "2 + 2?", "answer": "{4}"}, {"question": "Why?", "answer": "So."})
    assert examples[0] == Example("train-0", "Q: 2 + 2?\nA:", " {4}")
    assert examples[1].choices == () and examples[1].label is None


def test_choices_by_index_and_by_text(tmp_path: Path) -> None:
    rows = [{"question": "?", "options": ["x", "y", "z"], "answer": answer} for answer in (2, "y")]
    first, second = load(tmp_path, *rows, choices_field="options", choice="\n{choice}")
    assert (first.label, first.answer, first.choices) == (2, "\nz", ("\nx", "\ny", "\nz"))
    assert (second.label, second.answer) == (1, "\ny")


def test_nested_columns_ids_and_both_files(tmp_path: Path) -> None:
    row = {"doc": {"title": "T", "year": 7}, "answer": "a", "key": 5}
    examples = load(tmp_path, row, row | {"key": "six"}, prompt="{doc.title} {doc.year}:", id_field="key")
    assert [example.id for example in examples] == ["5", "six"]
    assert examples[0].prompt == "T 7:"
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"question": "?", "answer": "b"}))
    assert task(tmp_path).load("test", seed=0) == [Example("test-0", "Q: ?\nA:", " b")]


def test_missing_file_names_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"nothing was found at {tmp_path}/no.jsonl.*dataset.train_file"):
        task(tmp_path, train_file="no.jsonl").load("train", seed=0)


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        ({"question": "?"}, {}, "column 'answer' is missing; columns found: question"),
        ({"question": "?", "answer": ""}, {}, "column 'answer' is empty"),
        ({"question": "?", "answer": 4}, {}, "column 'answer' must be text, got int"),
        ({"text": "?", "answer": "a"}, {}, r"template field \{question\} is unknown; known: text, answer"),
        ({"question": ["?"], "answer": "a"}, {}, r"template field \{question\} must be text or a number, got list"),
        ({"question": "?", "answer": "a", "key": 1.5}, {"id_field": "key"}, "id column 'key' must be text, got float"),
        ({"question": "?", "answer": "a"}, {"id_field": "key"}, "column 'key' is missing"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"mine.jsonl:1: {reason}"):
        load(tmp_path, row, **changes)


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        (["x", "y"], 2, r"answer column 'answer' is the index 2, out of range for 2 choices \(0 is the first\)"),
        (["x", "y"], -1, r"is the index -1, out of range"),
        (["x", "y"], True, r"must be the index \(an integer\) or the text of a choice, got bool"),
        (["x", "y"], 1.0, r"must be the index \(an integer\) or the text of a choice, got float"),
        (["x", "y"], "z", r"is the text 'z', which none of the choices \['x', 'y'\] equal$"),
        (["x", "y"], "1", r"is the text '1', which none .* equal; an index must be an integer, without quotes"),
        (["x", "x"], "x", r"is the text 'x', which 2 of the choices"),
        (["x"], "x", r"at least 2 choices are needed, got 1"),
        ("xy", "x", r"column 'options' must be a list of strings, got str"),
        ([1, 2], 1, r"column 'options'\[0\] must be text, got int"),
    ],
)
def test_bad_choices(tmp_path: Path, options: Any, answer: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"(?m)mine.jsonl:1: .*{reason}"):
        load(tmp_path, {"question": "?", "options": options, "answer": answer}, choices_field="options")


def test_duplicate_ids(tmp_path: Path) -> None:
    row = {"question": "?", "answer": "a", "key": "k"}
    with pytest.raises(DataError, match=r"mine.jsonl:2: id 'k' is taken by .*mine.jsonl:1"):
        load(tmp_path, row, row, id_field="key")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": "hub"},
            r"reads two files of yours, got source='hub'.*Set dataset.train_file and dataset.test_file",
        ),
        ({"path": "data"}, r"reads two files of yours, got .*path='data'"),
        ({"revision": "v1"}, r"reads two files of yours, got .*revision='v1'"),
        ({"train_file": None}, r"dataset.train_file must be a path, got None. Set dataset.train_file\.$"),
        ({"answer_field": ""}, r"dataset.answer_field must be a column name, got ''"),
        ({"id_field": 3}, r"dataset.id_field must be a column name, got 3. Set dataset.id_field or leave it null"),
        ({"prompt": "Answer:"}, r"dataset.prompt has no field.*Use the name of a column in braces"),
        ({"prompt": "{a[0]}"}, r"must be a plain name"),
        ({"choice": "{answer}"}, r"dataset.choice has the unknown field \{answer\}.*Known: \{choice\}"),
    ],
)
def test_settings_are_checked_when_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(Path("nowhere"), **changes)


def test_the_same_file_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task(tmp_path, train_file="a.jsonl", test_file="a.jsonl")
    assert "train_file and test_file are both a.jsonl" in caplog.text
