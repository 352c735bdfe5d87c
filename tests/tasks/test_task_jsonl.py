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
    assert examples[0] == Example("train-0", "Q: 2 + 2?\nA:", " {4}", delimiter=" ")
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
    assert task(tmp_path).load("test", seed=0) == [Example("test-0", "Q: ?\nA:", " b", delimiter=" ")]


def test_options_are_listed_even_if_a_column_has_that_name(tmp_path: Path) -> None:
    row = {"question": "?", "options": ["x", "y"], "answer": 1}
    settings = {"choices_field": "options", "prompt_with_options": "Q: {question}\n{options}\nA:"}
    assert load(tmp_path, row, show_options=True, **settings)[0].prompt == "Q: ?\nA. x\nB. y\nA:"
    assert load(tmp_path, row, **settings)[0].prompt == "Q: ?\nA:"


def test_the_long_field_is_the_context(tmp_path: Path) -> None:
    row = {"doc": {"text": "Once."}, "question": "When?", "answer": "a"}
    example = load(tmp_path, row, prompt="{doc.text}\n{question}", long_field="doc.text")[0]
    assert example.prompt[slice(*example.context or ())] == "Once." and example.context == (0, 5)
    assert load(tmp_path, row)[0].context is None


def test_every_malformed_line_is_reported_at_once(tmp_path: Path) -> None:
    good = b'{"question": "?", "answer": "a", "key": "%d"}'
    lines = {
        1: (good % 1, ""),
        2: (b'{"question": "?", "answer": "a", "key', "not valid JSON: Unterminated string"),
        3: (b"{'question': '?'}", "not valid JSON: Expecting property name"),
        4: (b"[]", "must be a JSON object with named columns, got list"),
        6: (b'{"question": "caf\xe9", "answer": "a", "key": "6"}', "not UTF-8: byte 0xe9"),
        7: (b'{"question": "?", "key": "7"}', "column 'answer' is missing; columns found: question, key"),
        8: (b'{"question": "?", "answer": null, "key": "8"}', "column 'answer' is null"),
        9: (b'{"question": "?", "answer": [], "key": "9"}', "column 'answer' must be text or a number, got list"),
        10: (
            b'{"question": NaN, "answer": "a", "key": "10"}',
            "template field {question} must be text or a number, got",
        ),
        11: (good % 1, "id '1' is taken by"),
        12: (good % 12, ""),
    }
    content = b"".join(lines.get(number, (b"",))[0] + b"\n" for number in range(1, 13))
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="mine train has 9 bad of 11 rows") as error:
        task(tmp_path, id_field="key").load("train", seed=0)
    reported = str(error.value).split("\n")[1:-1]
    expected = [(number, reason) for number, (_, reason) in lines.items() if reason]
    assert len(reported) == len(expected)
    for line, (number, reason) in zip(reported, expected, strict=True):
        assert f"mine.jsonl:{number}: {reason}" in line


@pytest.mark.bad_input("Own data", "a file `mine.jsonl` that holds `{content}`")
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"A data file is empty: .*mine.jsonl has 0 bytes"),
        (b"\n \r\n", r"The train split of mine has no rows"),
        (
            b"[\n",
            r"A data file is not a valid JSON array: .*mine.jsonl: Expecting value: line 1 column 2 .* Correct it th",
        ),
        (
            b"question,answer\n?,a\n",
            r"A data file is not what its name says: .*mine.jsonl does not begin like JSON, its first line is "
            r"'question,answer'. If it is CSV, let its name end in .csv",
        ),
        (
            b"\x1f\x8b\x08\x00",
            r"A data file is damaged: .*mine.jsonl cannot be read .*EOFError.* Copy or download it aga",
        ),
    ],
)
def test_files_that_are_no_json_lines(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=match):
        task(tmp_path).load("train", seed=0)


def test_missing_file_names_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"nothing was found at {tmp_path}/no.jsonl.*dataset.train_file"):
        task(tmp_path, train_file="no.jsonl").load("train", seed=0)


@pytest.mark.bad_input("Own data", "the row {row} with the settings {changes}")
@pytest.mark.parametrize(
    ("row", "changes", "match"),
    [
        ({"question": "?"}, {}, "column 'answer' is missing; columns found: question"),
        ({"question": "?", "answer": ""}, {}, "column 'answer' is empty"),
        ({"question": "?", "answer": float("nan")}, {}, "column 'answer' must be text or a number, got nan"),
        ({"text": "?", "answer": "a"}, {}, r"template field \{question\} is unknown; known: text, answer"),
        ({"question": None, "answer": "a"}, {}, r"template field \{question\} must be text or a number, got null"),
        ({"question": float("nan"), "answer": "a"}, {}, r"template field \{question\} must be text or a .*, got nan"),
        ({"question": "\ud83d", "answer": "a"}, {}, r"template field \{question\} holds half of a surrogate pair"),
        ({"question": "?", "answer": None}, {}, "column 'answer' is null"),
        ({"question": "?", "answer": ["a"]}, {}, "column 'answer' must be text or a number, got list"),
        ({"question": "?", "answer": "a", "key": None}, {"id_field": "key"}, "column 'key' is null"),
        ({"question": "?", "answer": "a", "key": " "}, {"id_field": "key"}, "id column 'key' is empty"),
        ({"question": ["?"], "answer": "a"}, {}, r"template field \{question\} must be text or a number, got list"),
        ({"question": "?", "answer": "a", "key": 1.5}, {"id_field": "key"}, "id column 'key' must be text, got float"),
        ({"question": "?", "answer": "a"}, {"id_field": "key"}, "column 'key' is missing"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=rf"mine.jsonl:1: {match}"):
        load(tmp_path, row, **changes)


@pytest.mark.bad_input("Own data", "options {options}, answer {answer!r}")
@pytest.mark.parametrize(
    ("options", "answer", "match"),
    [
        (["x", "y"], 2, r"answer column 'answer' is the index 2, out of range for 2 choices \(0 is the first\)"),
        (["x", "y"], -1, r"is the index -1, out of range"),
        (["x", "y"], True, r"must be the index \(an integer\) or the text of a choice, got bool"),
        (["x", "y"], 1.0, r"must be the index \(an integer\) or the text of a choice, got float"),
        (["x", "y"], "zz", r"is the text 'zz', which none of the choices \['x', 'y'\] equal"),
        (["x", "y"], "z", r"is the text 'z', which none .* equal; as a letter it is not one from A to B"),
        (
            ["x", "y"],
            "2",
            r"is the index 2, out of range for 2 choices \(0 is the first\); where 1 is the first, set data",
        ),
        (["x", "y"], "X", r"is the text 'X', which none of the choices"),
        (
            ["1", "2"],
            1,
            r"is 1, which is the option '1' or the index of '2'; set dataset.answer_as=text or index_from_0",
        ),
        (["x", "y"], None, r"column 'answer' is null"),
        (["x", "y"], ["x"], r"must be the index \(an integer\) or the text of a choice, got list"),
        (None, 0, r"column 'options' is null"),
        ([], 0, r"is the index 0, out of range for 0 choices"),
        (["x", None], 0, r"column 'options'\[1\] must be text or a number, got null"),
        (["x", "x"], "x", r"is the text 'x', which 2 of the choices"),
        (["x"], "x", r"at least 2 choices are needed, got 1"),
        ("xy", "x", r"column 'options' must be a list, got the text 'xy', which is no list"),
        ("{}", 0, r"column 'options' must be a list, got the text '\{\}', which is no list in JSON"),
        ([1, [2]], 1, r"column 'options'\[1\] must be text or a number, got list"),
    ],
)
def test_bad_choices(tmp_path: Path, options: Any, answer: Any, match: str) -> None:
    with pytest.raises(DataError, match=rf"(?m)mine.jsonl:1: .*{match}"):
        load(tmp_path, {"question": "?", "options": options, "answer": answer}, choices_field="options")


def test_duplicate_ids(tmp_path: Path) -> None:
    row = {"question": "?", "answer": "a", "key": "k"}
    with pytest.raises(DataError, match=r"mine.jsonl:2: id 'k' is taken by .*mine.jsonl:1"):
        load(tmp_path, row, row, id_field="key")


@pytest.mark.bad_input("Own data", "the settings {changes}")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"source": "hub"},
            r"reads files of yours, got source='hub'.*Set dataset.train_file and dataset.test_file",
        ),
        ({"path": "data"}, r"reads files of yours, got .*path='data'"),
        ({"revision": "v1"}, r"reads files of yours, got .*revision='v1'"),
        ({"train_file": None}, r"dataset.train_file must be a path, got None. Set dataset.train_file\.$"),
        (
            {"prompt": None},
            r"dataset.answer_field belongs to dataset.prompt, got 'answer' and dataset.prompt=null. Set da",
        ),
        (
            {"answer_field": None},
            r"dataset.prompt needs dataset.answer_field, and conv.*answer_field=None .*Name the col",
        ),
        ({"messages_field": "m"}, r"dataset.prompt needs .* and conversations need neither, got .*messages_field='m'"),
        (
            {"answer_as": "leter"},
            r"no such way to name a choice, got dataset.answer_as='leter' \(did you mean 'letter'",
        ),
        (
            {"answer_as": "letter"},
            r"dataset.answer_as says how an answer names a choice, got 'letter' with dataset.choic",
        ),
        (
            {"choices_field": "o", "option_fields": ("a",)},
            r"in one column or in several, got .*Set all but one of them to null",
        ),
        (
            {"choices": ("yes", "no"), "choices_field": "o"},
            r"same for all rows, in one .*, got dataset.choices=\('yes', 'no'\) and dataset.choices_field='o'. Set all",
        ),
        (
            {"choices": ("yes", "no"), "prompt": None, "answer_field": None},
            r"dataset.choices belongs to dataset.prompt",
        ),
        ({"test_split": ""}, r"dataset.test_split must be the name of a split, got ''. Set dataset.test_split"),
        ({"answer_field": ""}, r"dataset.answer_field must be a column name, got ''"),
        ({"id_field": 3}, r"dataset.id_field must be a column name, got 3. Set dataset.id_field or leave it null"),
        (
            {"long_field": ""},
            r"dataset.long_field must be a column name, got ''. Set dataset.long_field or leave it nul",
        ),
        (
            {"long_field": "text"},
            r"dataset.long_field must be a field of dataset.prompt, got 'text' and 'Q: .*'. Write it as in the prompt",
        ),
        (
            {"long_field": "question", "choices_field": "options", "prompt_with_options": "{options}"},
            r"dataset.long_field must be a field of dataset.prompt_with_options, got 'question' and '\{options\}'",
        ),
        (
            {"prompt_with_options": "{question} {options}"},
            r"dataset.prompt_with_options lists the choices, got it with dataset.choices_field=null. Set dataset.cho",
        ),
        (
            {"prompt_with_options": "{question}", "choices_field": "options"},
            r"dataset.prompt_with_options lacks the field \{options\}",
        ),
        ({"prompt": "Answer:"}, r"dataset.prompt has no field.*Use the name of a column in braces"),
        ({"prompt": "{ }"}, r"A template field must be the name of a column, got '\{ \}'"),
        ({"choice": "{answer}"}, r"dataset.choice has the unknown field \{answer\}.*Known: \{choice\}"),
    ],
)
def test_settings_are_checked_when_built(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        task(Path("nowhere"), **changes)


def test_the_same_file_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task(tmp_path, train_file="a.jsonl", test_file="a.jsonl")
    assert "train_file and test_file are both a.jsonl" in caplog.text


def test_choices_that_all_rows_share(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": answer} for answer in ("no", 0)]
    first, second = load(tmp_path, *rows, choices=("yes", "no"))
    assert (first.label, second.label) == (1, 0) and first.choices == second.choices == (" yes", " no")


def test_one_file_with_validation_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": "a"} for n in range(10)]
    assert len(load(tmp_path, *rows, test_file=None, validation_fraction=0.2)) == 8
    one = task(tmp_path, test_file=None, validation_fraction=0.2)
    assert len(one.load("test", 0)) == 2
    match = r"needs rows to test on, got dataset.test_file=null. Set dataset.test_file, or dataset.validation_fraction="
    with pytest.raises(DataError, match=match):
        task(tmp_path, test_file=None).load("test", 0)


@pytest.mark.parametrize(("name", "file", "expected"), [
    (None, "data/reviews.csv.gz", "reviews"), (None, "reviews/train.jsonl", "reviews"), (None, "train.jsonl", "train"),
    (None, "reviews/data/train.jsonl", "reviews"), (None, "hf://datasets/org/reviews@main", "reviews"),
    (None, "my folder/", "my-folder"), ("mine: v2", "train.jsonl", "mine-v2"), ("../..", "x", "jsonl"),
])  # fmt: skip
def test_the_name_of_a_dataset(name: str | None, file: str, expected: str) -> None:
    assert task(Path(), name=name, train_file=file).name == expected
