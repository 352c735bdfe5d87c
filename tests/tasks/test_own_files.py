"""Own data in every format that `datasets` reads, and what is said of files that hold something else."""

import bz2
import gzip
import json
import logging
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from gradpruner.tasks import DataError, JsonLines
from gradpruner.tasks.local_files import read_folder, read_local

ROWS = [{"question": "Où?", "answer": "a\u2028b"}, {"question": 'No,\nor "yes"', "answer": "None"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1)
CSV = 'question,answer\nOù?,a\u2028b\n"No,\nor ""yes""",None\n'


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `datasets` from writing below the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Returns the rows as a Parquet file."""
    file = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    return file.read_bytes()


def read(path: Path) -> list[Any]:
    return [row.problem or row.columns for row in read_local(path)]


CONTENTS = {
    "data.jsonl": LINES,
    "data.ndjson": LINES,
    "without ending": LINES,
    "data.json": ARRAY,
    "one line.json": json.dumps(ROWS),
    "data.jsonl.gz": gzip.compress(LINES.encode()),
    "unnamed gzip.jsonl": gzip.compress(LINES.encode()),
    "data.json.gz": gzip.compress(ARRAY.encode()),
    "data.jsonl.bz2": bz2.compress(LINES.encode()),
    "data.jsonl.xz": lzma.compress(LINES.encode()),
    "data.jsonl.zst": pyarrow.compress(LINES.encode(), "zstd", asbytes=True),
    "byte order mark.jsonl": "\ufeff" + LINES,
    "UTF-16.jsonl": LINES.encode("utf-16"),
    "UTF-16 without a mark.jsonl": LINES.encode("utf-16-le"),
    "UTF-16.json": ARRAY.encode("utf-16"),
    "Windows lines.jsonl": LINES.replace("\n", "\r\n"),
    "blank lines.jsonl": "\n" + LINES.replace("\n", "\n \n"),
    "no last line break.jsonl": LINES.rstrip("\n"),
    "lines named.csv": LINES,
    "data.csv": CSV,
    "data.csv.gz": gzip.compress(CSV.encode()),
    "data.csv.zst": pyarrow.compress(CSV.encode(), "zstd", asbytes=True),
    "byte order mark.csv": "\ufeff" + CSV,
    "UTF-16.csv": CSV.encode("utf-16"),
    "blank lines.csv": "\n" + CSV + "\n\n",
    "a [1] 'b' = ü*.csv": CSV,
    "semicolons.csv": CSV.replace("question,", "question;").replace("Où?,", "Où?;").replace('",None', '";None'),
    "data.tsv": CSV.replace("question,", "question\t").replace("Où?,", "Où?\t").replace('",None', '"\tNone'),
}


@pytest.mark.bad_input("Own data", "a file of the kind `{name}`", "its rows")
@pytest.mark.parametrize("name", CONTENTS)
def test_formats(name: str, tmp_path: Path) -> None:
    content = CONTENTS[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert read(tmp_path / name) == ROWS


@pytest.mark.bad_input("Own data", "a file of the kind `{name}`", "its rows")
@pytest.mark.parametrize("name", ["data.parquet", "Parquet named.json", "data.parquet.gz", "data.arrow"])
def test_binary_formats(name: str, parquet: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(parquet) if name.endswith("gz") else parquet)
    if name == "data.arrow":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        shutil.copy(tmp_path / "saved/data-00000-of-00001.arrow", path)
    assert read(path) == ROWS


@pytest.mark.parametrize(("name", "builder"), [("data.json", "json"), ("data.jsonl", "json"), ("data.csv", "csv")])
def test_datasets_reads_the_same(name: str, builder: str, tmp_path: Path) -> None:
    content = CONTENTS[name].replace("None", "none so far")  # which `datasets` leaves as text
    (tmp_path / name).write_text(content)
    theirs = datasets.load_dataset(builder, data_files=str(tmp_path / name), split="train", streaming=True)
    assert read(tmp_path / name) == list(theirs)


@pytest.mark.parametrize(
    ("name", "said"), [("data.json", "a JSON array"), ("data.jsonl.xz", "JSON in xz"), ("data.csv.gz", "CSV in gzip")]
)
def test_the_log_says_what_a_file_is_read_as(
    name: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = CONTENTS[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.INFO, "gradpruner"):
        read(tmp_path / name)
    assert caplog.messages == [f"{tmp_path}/{name} is read as {said}"]


@pytest.mark.bad_input("Own data", "007, None, NA, 1e3, true and an empty cell in a CSV file", "text as it is written")
def test_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,c,d,e,f\n007,None,NA,1e3,true,\n")
    assert read(tmp_path / "a.csv") == [{"a": "007", "b": "None", "c": "NA", "d": "1e3", "e": "true", "f": ""}]


@pytest.mark.bad_input("Own data", "a line of a CSV file with fewer cells than the first", "empty cells")
def test_short_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1\n2,3\n")
    assert [row["b"] or "" for row in read(tmp_path / "a.csv")] == ["", "3"]


BAD = {
    "latin1.csv": (
        "question,answer\nOk?,a\nOù?,b\n".encode("latin-1"),
        r"not UTF-8: .*latin1.csv:3: byte 0xf9 at position 1 of the line. Save it as UTF-8: `iconv -f latin1",
    ),
    "ragged.csv": (
        b"q,a\n1,2\n1,2,3\n",
        r"not a valid table: .*ragged.csv: .*Expected 2 fields in line 3, saw 3. Its columns are separated by a comma",
    ),
    "trailing commas.csv": (
        b"q,a\n1,2,\n3,4,\n",
        r"not a valid table: .*Length of header .* every line needs as many as the first",
    ),
    "open quote.csv": (b'q,a\n1,"2\n3,4\n', r"not a valid table: .*EOF inside string .*needs quotes around it"),
    "blank.csv": (b"\n\n", r"not a valid table: .*No columns to parse from file"),
    "trailing comma.json": (
        b'[{"q": 1},\n{"q": 2},\n]',
        r"not a valid JSON array: .*line 3 column 1 .*after a comma that is one too many. Correct it there",
    ),
    "an object.json": (
        json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
        r"has no rows: .* is one JSON object with version, data. Give its rows as an array: `jq '.data'",
    ),
    "workbook.xlsx": (b"PK\x03\x04", r"is a ZIP archive or an Excel workbook. Unpack it, or save the sheet as CSV"),
    "pointer.parquet": (
        b"version https://git-lfs.github.com/spec/v1\n",
        r"is a Git LFS pointer, not the file that it stands for. Run `git lfs pull`",
    ),
    "page.jsonl": (b"<!doctype html><html>", r"is a web page. Download the file itself"),
    "text.parquet": (b"hello", r"is damaged: .*text.parquet cannot be read \(its content is not Parquet\). Copy or do"),
    "cut.jsonl.gz": (
        gzip.compress(LINES.encode() * 9)[:40],
        r"is damaged: .*cut.jsonl.gz cannot be read \(EOFError: .*Copy or download it again",
    ),
    "cut.jsonl.zst": (
        pyarrow.compress(LINES.encode() * 9, "zstd", asbytes=True)[:40],
        r"is damaged: .*cut.jsonl.zst cannot be read",
    ),
    "rows.txt": (b"q: why?\n", r"not what its name says: .* its first line is 'q: why\?'. If it is CSV, let its name"),
    "a number.json": (b"3", r"not what its name says: .*does not begin like JSON, its first line is '3'"),
}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        pytest.param(name, match, marks=pytest.mark.bad_input("Own data", f"a file of the kind `{name}`"))
        for name, (_, match) in BAD.items()
    ],
)
def test_files_that_cannot_be_read(name: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(DataError, match=match):
        read(tmp_path / name)


@pytest.mark.bad_input("Own data", "a file without permission to read it", "error: A data file cannot be opened: ...")
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_text(LINES)
    monkeypatch.setattr("gradpruner.tasks.local_files.open_content", refuse)  # root may read everything
    with pytest.raises(
        DataError, match=r"cannot be opened: .*a.jsonl, got Permission denied. Check its permissions and"
    ):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
@pytest.mark.bad_input("Own data", "a Parquet file that is {damage}", "error: A data file is damaged: ...")
def test_damaged_parquet(damage: str, parquet: bytes, tmp_path: Path) -> None:
    bad = parquet[:-20] if damage == "cut" else parquet[:30] + bytes(200) + parquet[230:]
    (tmp_path / "a.parquet").write_bytes(bad)
    with pytest.raises(
        DataError, match=r"A data file is damaged: .*a.parquet cannot be read .*Copy or download it again"
    ):
        read(tmp_path / "a.parquet")


@pytest.mark.bad_input("Own data", "the line `{line}` of a JSONL file")
@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"q": 1},', r"not valid JSON: Extra data: line 1 column 9 .*; a line must not end in a comma"),
        ("{", r"not valid JSON: .*; an object must be on one line"),
        ("{'q': 1}", r"not valid JSON: Expecting property name enclosed in double quotes"),
        ('{"q": 1}{"q": 2}', r"not valid JSON: Extra data"),
        ('["a", "b"]', r"must be a JSON object with named columns, got list"),
    ],
)
def test_bad_lines(line: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    rows = list(read_local(tmp_path / "a.jsonl"))
    assert [row.where for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    with pytest.raises(ValueError, match=match):
        raise ValueError(rows[0].problem)


def test_places_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": 1}, 2]')
    (tmp_path / "a.csv").write_text("q\n1\n2\n")
    assert [(row.where, row.problem) for row in read_local(tmp_path / "a.json")] == [
        (f"{tmp_path}/a.json: row 1", None),
        (f"{tmp_path}/a.json: row 2", "must be a JSON object with named columns, got int"),
    ]
    assert [row.where for row in read_local(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv: row {n}" for n in (1, 2)]


# ---- folders ----


def task(train: Path | str, test: Path | str, **changes: Any) -> JsonLines:
    fixed = {"prompt": "{question}", "answer_field": "answer"}
    return JsonLines(train_file=str(train), test_file=str(test), **(fixed | changes))


def answers(data: JsonLines, split: str) -> list[str]:
    return [example.reference for example in data.load(split, seed=0)]


@pytest.mark.bad_input("Own data", "a folder with data/train-00000-of-00001.parquet", "its splits, by name")
def test_a_folder_as_on_the_hub(parquet: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine/data").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / f"mine/data/{split}-00000-of-00001.parquet").write_bytes(parquet)
    data = task(tmp_path / "mine", tmp_path / "mine", test_split="validation")
    assert answers(data, "train") == answers(data, "test") == [row["answer"] for row in ROWS]
    with pytest.raises(
        DataError, match=r"mine has no split 'test', found train, validation. Set dataset.train_split or"
    ):
        answers(task(tmp_path / "mine", tmp_path / "mine"), "test")


@pytest.mark.bad_input("Own data", "a folder with train.csv and test.csv", "its splits, by name")
def test_a_folder_of_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"question,answer\n007,{split}\n")
    data = task(tmp_path, tmp_path)
    assert (answers(data, "train"), answers(data, "test")) == (["train"], ["test"])
    assert data.load("test", seed=0)[0].prompt == "007" and "scores will be too good" not in caplog.text


@pytest.mark.bad_input("Own data", "a folder that `save_to_disk` wrote", "its rows")
def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert [row.columns for row in read_folder(tmp_path / "one", "train")] == ROWS
    assert answers(task(tmp_path / "one", tmp_path / "both", test_split="dev"), "test") == ["None"]
    with pytest.raises(DataError, match=r"both has no split 'test', found train, dev"):
        list(read_folder(tmp_path / "both", "test"))


@pytest.mark.bad_input(
    "Own data", "a folder with two configurations", "the one that dataset.subset names, else an error"
)
def test_subsets(tmp_path: Path) -> None:
    configs = ""
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text(f"question,answer\n?,{name}\n")
        configs += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.csv\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert answers(task(tmp_path, tmp_path, subset="two"), "train") == ["two"]
    with pytest.raises(
        DataError, match=r"folder cannot be read: .*available configs: \['one', 'two'\].* or dataset.subset"
    ):
        answers(task(tmp_path, tmp_path), "train")


@pytest.mark.bad_input("Own data", "a folder without data", "error: A data folder cannot be read: ...")
def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"A data folder cannot be read: .*doesn't contain any data files. Set dataset.tra"
    ):
        answers(task(tmp_path, tmp_path), "train")


@pytest.mark.bad_input("Own data", "a split or a subset of a file", "error: A file has no splits and no subsets, ...")
def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    for changes in ({"train_split": "dev"}, {"subset": "one"}):
        with pytest.raises(
            DataError, match=r"A file has no splits and no subsets, got .* Leave them as they are, or give"
        ):
            answers(task(tmp_path / "a.jsonl", "b.jsonl", **changes), "train")


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        if kwargs["revision"] == "v2":
            raise ConnectionError("no")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = task("hf://datasets/owner/name@v1", "hf://datasets/owner/name@v2", subset="part", test_split="validation")
    assert answers(data, "train") == [row["answer"] for row in ROWS]
    assert calls == [(("owner/name", "part"), {"split": "train", "revision": "v1"})]
    with pytest.raises(
        DataError, match=r"split validation, revision v2.* Check the connection, or name a file or a folder"
    ):
        answers(data, "test")
    with pytest.raises(
        DataError, match=r"A dataset of the Hub is hf://datasets/OWNER/NAME, got .*Give its name, and name"
    ):
        answers(task("hf://datasets/owner/name/a.csv", "b.jsonl"), "train")


@pytest.mark.parametrize("name", ["data.json", "data.csv", "data.jsonl.gz"])
@pytest.mark.bad_input("Own data", "other content under the same path `{name}`, as old as before", "the new content")
def test_content_is_never_out_of_a_cache(name: str, tmp_path: Path) -> None:
    def write(answer: str) -> None:
        text = (
            json.dumps([{"question": "?", "answer": answer}])
            if name != "data.csv"
            else f"question,answer\n?,{answer}\n"
        )
        file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        os.utime(file, (1, 1))

    file = tmp_path / name
    write("a")
    assert answers(task(file, file), "train") == ["a"]
    write("b")
    assert answers(task(file, file), "train") == ["b"]
