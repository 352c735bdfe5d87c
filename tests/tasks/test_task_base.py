import json
import logging
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gradpruner.tasks import DataError, Example, Task, fingerprint
from gradpruner.tasks.base import Parsed
from gradpruner.tasks.columns import take_label, take_text, take_texts


@dataclass(frozen=True, kw_only=True)
class Toy(Task):
    name: ClassVar[str] = "toy"
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        choices = take_texts(columns, "choices")
        label = take_label(columns, "label", [str(index) for index in range(len(choices))])
        return Parsed({"question": take_text(columns, "question")}, choices, label, id=columns.get("id"))


def row(**changes: Any) -> dict[str, Any]:
    return {"question": "Why?", "choices": ["a", "b"], "label": 1} | changes


def toy(folder: Path | None = None, **changes: Any) -> Toy:
    settings = {"source": "local", "path": str(folder), "prompt": "Q: {question}\nA:", "choice": " {choice}"}
    return Toy(**(settings | changes))


def write(folder: Path, *lines: Any, name: str = "train.jsonl") -> None:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / name).write_bytes(b"\n".join(encoded) + b"\n")


def test_load_renders_rows_in_order(tmp_path: Path) -> None:
    write(tmp_path, row(), b"", row(question="{x}?", label="0", id="mine"), b"  ", row())
    examples = toy(tmp_path).load("train", seed=0)
    assert examples == [
        Example("train-0", "Q: Why?\nA:", " b", (" a", " b"), 1),
        Example("mine", "Q: {x}?\nA:", " a", (" a", " b"), 0),
        Example("train-2", "Q: Why?\nA:", " b", (" a", " b"), 1),
    ]


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n\r\n")
    assert len(toy(tmp_path).load("test", seed=0)) == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        toy().max_length = 3  # type: ignore[misc]


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
        ({"prompt": "{goal}"}, r"dataset.prompt has the unknown field \{goal\}.*Known: \{question\}"),
        ({"prompt": "{question"}, r"lone '\{'"),
        ({"choice": " x"}, r"dataset.choice has no field.*Use \{choice\}"),
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
        (b"[1, 2]", r"must be a JSON object with named columns, got list"),
        (b'{"question": "caf\xe9"}', r"not UTF-8: byte 0xe9 at position 17 of the line"),
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


def test_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path, *[row(question=f"q{number:02d}") for number in range(50)], name=name)
    everything = toy(tmp_path).load("train", seed=0)
    task = toy(tmp_path, max_train_samples=10)
    drawn = task.load("train", seed=0)
    assert len(set(drawn)) == 10 and drawn == [example for example in everything if example in drawn]
    assert drawn == task.load("train", seed=0)
    assert drawn != task.load("train", seed=1)
    assert len(task.load("test", seed=0)) == 50
    assert len(toy(tmp_path, max_test_samples=3).load("test", seed=0)) == 3
    with caplog.at_level(logging.INFO):
        assert toy(tmp_path, max_train_samples=51).load("train", seed=0) == everything
    assert "toy train: 51 rows asked, all 50 used" in caplog.text


def test_a_bad_row_outside_the_sample_is_found(tmp_path: Path) -> None:
    write(tmp_path, *[row()] * 20, row(label=5))
    for seed in range(3):
        with pytest.raises(DataError, match="1 bad of 21"):
            toy(tmp_path, max_train_samples=1).load("train", seed=seed)


def test_fingerprint() -> None:
    example = Example("1", "p", " b", (" a", " b"), 1)
    # Golden: sha256 of '{"answer":" b","choices":[" a"," b"],"id":"1","label":1,"prompt":"p"}\n', by sha256sum.
    assert fingerprint([example]) == "c40471505848851b2ad7e5013eeac6a9ae262e32aa67056b1ec2047f3b6f1c31"
    changes: list[dict[str, Any]] = [
        {"id": "2"}, {"prompt": "q"}, {"answer": " a"}, {"choices": (" a", " c")}, {"label": 0}, {"label": None},
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
