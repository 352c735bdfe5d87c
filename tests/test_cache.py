import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from gradpruner.files import content_hash
from gradpruner.pipeline.cache import ENTRY_FILE, StageCache

KEY = {"model": "abc", "steps": 2}


def write(text):
    return lambda folder: (folder / "result.txt").write_text(text)


def refuse(folder):
    raise AssertionError("computed again")


def test_computed_once(tmp_path):
    cache = StageCache(tmp_path)
    entry = cache.get("stage", KEY, write("first"))
    assert cache.get("stage", KEY, refuse) == entry == cache.find("stage", KEY)
    assert (entry / "result.txt").read_text() == "first"


def test_any_change_of_the_key_is_another_entry(tmp_path):
    cache = StageCache(tmp_path)
    entry = cache.get("stage", KEY, write("first"))
    assert cache.get("stage", {**KEY, "steps": 3}, write("second")) != entry
    assert cache.get("other stage", KEY, write("third")) != entry
    assert cache.find("stage", {**KEY, "steps": 4}) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no entry file", "half entry file"])
def test_damage_is_noticed_and_repaired(tmp_path, caplog, damage):
    cache = StageCache(tmp_path)
    entry = cache.get("stage", KEY, write("result"))
    file, entry_file = entry / "result.txt", entry / ENTRY_FILE
    if damage == "truncate":
        file.write_text("res")
    elif damage == "flip":
        file.write_text("resumt")
    elif damage == "delete":
        file.unlink()
    elif damage == "no entry file":
        entry_file.unlink()
    else:
        entry_file.write_text(entry_file.read_text()[:20])
    assert cache.find("stage", KEY) is None
    with caplog.at_level(logging.WARNING):
        cache.get("stage", KEY, write("again"))
    assert "is damaged" in caplog.text and "computing it again" in caplog.text
    assert file.read_text() == "again"


def test_an_interrupted_stage_leaves_no_entry(tmp_path):
    cache = StageCache(tmp_path)

    def interrupted(folder):
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("stage", KEY, interrupted)
    assert cache.find("stage", KEY) is None

    def fresh(folder):
        assert not list(folder.iterdir())
        (folder / "result.txt").write_text("whole")

    assert (cache.get("stage", KEY, fresh) / "result.txt").read_text() == "whole"


def test_a_resumable_stage_gets_what_was_left_behind(tmp_path):
    cache = StageCache(tmp_path)

    def compute(folder):
        if not (folder / "half.txt").exists():
            (folder / "half.txt").write_text("half")
            raise KeyboardInterrupt
        (folder / "result.txt").write_text((folder / "half.txt").read_text() + " and half")

    with pytest.raises(KeyboardInterrupt):
        cache.get("stage", KEY, compute, resumable=True)
    entry = cache.get("stage", KEY, compute, resumable=True)
    assert (entry / "result.txt").read_text() == "half and half"


def _compute_slowly(root: str) -> None:
    def compute(folder: Path) -> None:
        with (Path(root) / "computed.txt").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.3)

    StageCache(Path(root)).get("stage", KEY, compute)


def test_two_processes_compute_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_compute_slowly, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len((tmp_path / "computed.txt").read_text().splitlines()) == 1


def test_hash_ignores_the_order_of_keys():
    assert content_hash({"a": 1, "b": [2, None]}) == content_hash({"b": [2, None], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
