"""Answers to own multiple-choice questions: letters, indices from 0 or 1, and texts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gradpruner.tasks import DataError, JsonLines


def labels(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> list[int | None]:
    (folder / "a.jsonl").write_text("".join(json.dumps({"q": "?"} | row) + "\n" for row in rows))
    settings = {"choices_field": "options", "answer_field": "answer"} | changes
    data = JsonLines(train_file=str(folder / "a.jsonl"), test_file="b.jsonl", prompt="{q}", **settings)
    return [example.label for example in data.load("train", seed=0)]


def row(answer: Any, *options: Any) -> dict[str, Any]:
    return {"answer": answer, "options": list(options) or ["w", "x", "y", "z"]}


@pytest.mark.bad_input(
    "Own data",
    "the answer {answer!r} to the options w, x, y, z, with answer_as={answer_as}",
    "option {label} (0 is the first)",
)
@pytest.mark.parametrize(
    ("answer", "answer_as", "label"),
    [
        *[
            ("y", "auto", 2),
            (" y ", "auto", 2),
            ("C", "auto", 2),
            ("c", "auto", 2),
            ("(C)", "auto", 2),
            ("C.", "auto", 2),
        ],
        *[(2, "auto", 2), ("2", "auto", 2), ("2.0", "auto", 2), (0, "auto", 0)],
        *[("D", "letter", 3), (1, "index_from_1", 0), ("4", "index_from_1", 3), (4.0, "index_from_1", 3)],
        *[("0", "index_from_0", 0), (3.0, "index_from_0", 3), ("z", "text", 3)],
    ],
)
def test_ways_to_name_a_choice(answer: Any, answer_as: str, label: int, tmp_path: Path) -> None:
    assert labels(tmp_path, [row(answer)], answer_as=answer_as) == [label]


@pytest.mark.bad_input("Own data", "the answer {answer!r} to the options w, x, y, z, with answer_as={answer_as}")
@pytest.mark.parametrize(
    ("answer", "answer_as", "match"),
    [
        (
            0,
            "index_from_1",
            r"is the index 0, out of range for 4 choices \(1 is the first\); where 0 is the first, set data",
        ),
        (5, "index_from_1", r"is the index 5, out of range for 4 choices \(1 is the first\)"),
        (
            4,
            "auto",
            r"is the index 4, out of range for 4 choices \(0 is the first\); where 1 is the first, set dataset.answ",
        ),
        (1.5, "index_from_0", r"is 1.5, which is not an index, a whole number from 0 on"),
        ("y", "index_from_0", r"is 'y', which is not an index, a whole number from 0 on"),
        ("E", "letter", r"is 'E', which is not a letter from A to D"),
        ("w", "letter", r"is 'w', which is not a letter from A to D"),
        (2, "letter", r"is 2, which is not a letter from A to D"),
        ("C", "text", r"is the text 'C', which none of the choices \['w', 'x', 'y', 'z'\] equal"),
        (2, "text", r"is the text '2', which none of the choices"),
    ],
)
def test_answers_that_name_no_choice(answer: Any, answer_as: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"(?m)a.jsonl:1: answer column 'answer' {match}"):
        labels(tmp_path, [row(answer)], answer_as=answer_as)


@pytest.mark.parametrize(
    ("answer", "options", "answer_as", "label"),
    [
        ("2", ["2", "3", "4"], "auto", 0),
        (2, [2, 3, 4], "text", 0),
        (2, [2, 3, 4], "index_from_0", 2),
        (1, [2, 3, 4], "auto", 1),
        ("A", ["B", "A"], "auto", 1),
        ("A", ["B", "A"], "letter", 0),
        (0.5, [0.25, 0.5], "text", 1),
        ("true", [True, False], "auto", 0),
    ],
)
def test_options_that_look_like_answers(answer: Any, options: Any, answer_as: str, label: int, tmp_path: Path) -> None:
    assert labels(tmp_path, [row(answer, *options)], answer_as=answer_as) == [label]


@pytest.mark.bad_input("Own data", "a list of options as the text `{text}`", "the options")
@pytest.mark.parametrize("text", ['["w", "x"]', "['w', 'x']", ' ["w", "x"] '])
def test_a_list_of_options_as_text(text: str, tmp_path: Path) -> None:
    assert labels(tmp_path, [{"answer": "x", "options": text}]) == [1]


@pytest.mark.bad_input("Own data", "one column per option, the last ones empty in some rows", "the options of each row")
def test_options_in_columns_of_their_own(tmp_path: Path) -> None:
    settings = {"choices_field": None, "option_fields": ("A", "B", "C")}
    rows = [{"A": "x", "B": "y", "C": "z", "answer": "C"}, {"A": "x", "B": 2, "C": "", "answer": "B"}]
    assert labels(tmp_path, [*rows, {"A": "x", "B": "y", "C": None, "answer": "A"}], **settings) == [2, 1, 0]
    with pytest.raises(DataError, match=r"a.jsonl:1: column 'B' is null, and later options are not"):
        labels(tmp_path, [rows[0] | {"B": None}], **settings)
    with pytest.raises(DataError, match=r"a.jsonl:1: column 'C' is missing; columns found: q, A, B, answer"):
        labels(tmp_path, [{"A": "x", "B": "y", "answer": "A"}], **settings)


@pytest.mark.bad_input("Own data", "{what}", "a warning with the setting to change")
@pytest.mark.parametrize(
    ("what", "answers", "answer_as", "warning"),
    [
        ("indices from 1 read from 0, none of which is the last", [1, 2, 3] * 4, "auto",
         "none of 12 answers names the first option. They are read as index_from_0 (dataset.answer_as=auto)"
         "; if they count from 1, set dataset.answer_as=index_from_1."),
        ("indices that never name the last option", [0, 1, 2] * 4, "index_from_0",
         "none of 12 answers names the last option. They are read as index_from_0"),
        ("indices from 0 read from 1, none of which is 0", [1, 2, 3] * 4, "index_from_1",
         "none of 12 answers names the last option. They are read as index_from_1 (dataset.answer_as=index_from_1); if "
         "they count from 0, set dataset.answer_as=index_from_0."),
        ("answers as letters and as texts in one file", ["A", "B", "C", "D", "w"], "auto",
         "answers are read in 2 ways (4 as letter, 1 as text). If they are all of one kind, set dataset.answer_as"),
    ],
)  # fmt: skip
def test_signs_of_another_way(
    what: str, answers: list[Any], answer_as: str, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        labels(tmp_path, [row(answer) for answer in answers], answer_as=answer_as)
    assert warning in caplog.text and len(caplog.messages) == 1


@pytest.mark.parametrize("answers", [[0, 1, 2, 3] * 2, ["w", "x", "y"] * 4, [1, 2, 2], ["A", "B", "C"] * 4])
def test_no_sign_of_another_way(answers: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        labels(tmp_path, [row(answer) for answer in answers])
    assert not caplog.messages


@pytest.mark.bad_input("Own data", "the open answer {answer!r}", "the text {text}")
@pytest.mark.parametrize(("answer", "text"), [(42, "42"), (0.5, "0.5"), (True, "true"), ("北京", "北京")])
def test_open_answers_that_are_no_text(answer: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"问题": "?", "答 案": {"文本": [answer]}}, ensure_ascii=False))
    data = JsonLines(
        train_file=str(tmp_path / "a.jsonl"),
        test_file="b",
        prompt="{问题}",
        answer_field="答 案.文本[0]",
        id_field="问题",
    )
    [example] = data.load("train", seed=0)
    assert (example.id, example.prompt, example.reference) == ("?", "?", text)
