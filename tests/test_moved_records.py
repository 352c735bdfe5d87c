"""Result folders that were moved, copied or damaged: what the report shows, and what the same command does."""

import json
import logging
import os
import re
import shutil

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import CONF
from experiments.job import run_job
from experiments.records import read_records
from experiments.report import build_report
from gradpruner.record import RunRecord

AREA = "Sweeps and records"


def tried(given, gets):
    return pytest.mark.bad_input(AREA, given, gets)


def start(*overrides):
    fixed = ["debug=smoke", "method=last", "reference=null", "evaluate_before=false"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return run_job(compose("config", overrides=[*fixed, *overrides]))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a finished run, and its cache."""
    folder = tmp_path_factory.mktemp("original")
    start(f"results_dir={folder}/runs", f"cache_dir={folder}/cache")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of that folder, to be changed."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def only_run(folder):
    [file] = (folder / "runs").rglob("record.json")
    return file.parent


@tried("a results folder that was moved", "the report finds its runs, and the same command does not run them again")
def test_moved_results(folder, caplog):
    shutil.move(folder / "runs", folder / "moved here")
    [path] = read_records(folder)[0]
    assert path.is_relative_to(folder / "moved here")
    with caplog.at_level(logging.INFO):
        start(f"results_dir='{folder}/moved here'", f"cache_dir={folder}/cache")
    assert f"Already finished: {path.parent}" in caplog.text


@tried("a run folder that was renamed", "the report finds it, and output_dir takes it as finished")
def test_a_renamed_run(folder, caplog):
    shutil.move(only_run(folder), folder / "best run")
    assert list(read_records(folder)[0]) == [folder / "best run/record.json"]
    with caplog.at_level(logging.INFO):
        start(f"output_dir='{folder}/best run'", f"cache_dir={folder}/cache")
    assert f"Already finished: {folder}/best run" in caplog.text


@tried("a run folder that was renamed, without output_dir", "is made again from the cache, without training")
def test_a_run_that_is_not_found_is_made_again_from_the_cache(folder, monkeypatch):
    shutil.move(only_run(folder), folder / "best run")
    monkeypatch.setattr("gradpruner.models.spec.ModelSpec.load", lambda *args: pytest.fail("a weight was loaded"))
    record = start(f"results_dir={folder}/runs", f"cache_dir={folder}/cache")
    assert record.metrics == RunRecord.load(folder / "best run").metrics


@tried("a copy of a run folder", "the report shows the run once and names the copy")
def test_a_copied_run_is_no_second_seed(folder):
    shutil.copytree(only_run(folder), folder / "backup")
    found, problems = read_records(folder)
    assert len(found) == 1
    [problem] = problems
    assert re.search(r"Not shown: .*record\.json is a copy of .*backup/record\.json\. Delete one of them\.", problem)


def change(**values):
    def damage(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def without(*keys):
    def damage(file):
        data = node = json.loads(file.read_text())
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        file.write_text(json.dumps(data))

    return damage


DAMAGES = [
    ("a record of an older version", change(schema_version=2), r"schema version 2, this release reads 3\. Delete it"),
    ("a record of a newer version", change(schema_version=99), r"schema version 99, this release reads 3\. Delete it"),
    ("a record that was cut in half", lambda file: file.write_bytes(file.read_bytes()[:2000]), r"line \d+ column \d+"),
    ("an empty record", lambda file: file.write_text(""), "Expecting value"),
    ("a record that is not UTF-8", lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()), "can't decode byte"),
    ("a record without metrics", without("metrics"), r"with missing or unknown keys \(metrics\)\. Delete it to run"),
    ("a record without a key of a section", without("pruning", "shape"), r"unknown keys \(pruning\.shape\)\. Delete"),
    ("a record with an unknown key", change(flavour="mild"), r"missing or unknown keys \(flavour\)\. Delete it"),
    ("a record with metrics and no fine-tune", change(finetune={}), r"unknown keys \(finetune\.loss, finetune\.peak"),
    ("a record whose section is a list", change(model=[]), r"unknown keys \(model\.name, model\.num_hidden_layers"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "match"), [
    pytest.param(damage, match, id=given, marks=tried(given, "the report names and skips it; the run: error: "
                 "Cannot read … Delete it to run again"))
    for given, damage, match in DAMAGES
])  # fmt: skip
def test_a_damaged_record_is_named_and_skipped(folder, damage, match):
    run_dir = only_run(folder)
    shutil.copytree(run_dir, folder / "whole")
    damage(run_dir / "record.json")
    found, problems = read_records(folder)
    assert list(found) == [folder / "whole/record.json"]
    [problem] = problems
    assert problem.startswith(f"Not shown: {run_dir}/record.json: ") and re.search(match, problem)
    with pytest.raises(ValueError, match=r"Cannot read .*record\.json: .*Delete it to run again\."):
        RunRecord.load(run_dir)


@tried("the record of a failed run", "the report names it with its error")
def test_a_failed_run_is_named(folder):
    run_dir = only_run(folder)
    shutil.copytree(run_dir, folder / "whole")
    RunRecord("failed", {}, "x", 0, error="ValueError: bad rows").save(run_dir)
    [problem] = read_records(folder)[1]
    assert problem.endswith("record.json has status failed (ValueError: bad rows). Run it again.")


@tried("other JSON files, a folder x.json and a broken link in runs_dir", "the report passes over them; names the link")
def test_other_things_among_the_runs(folder):
    (folder / "runs/x.json").mkdir()
    (folder / "runs/list.json").write_text("[1]")
    os.symlink(folder / "nowhere", folder / "runs/link.json")
    found, problems = read_records(folder)
    assert len(found) == 1
    [problem] = problems
    assert re.search(r"Not shown: .*link\.json: .*No such file", problem)


@tried("deeply nested JSON in runs_dir", "the report names and skips it")
def test_nested_json(folder):
    (folder / "runs/deep.json").write_text("[" * 100_000)
    found, [problem] = read_records(folder)
    assert len(found) == 1 and "deep.json: maximum recursion depth exceeded" in problem


@tried("several folders in runs_dir, one inside the other", "each run is shown once; a copy is named")
def test_several_folders(folder, tmp_path):
    first, second = only_run(folder) / "record.json", folder / "second/record.json"
    for place in ("second", "copy"):
        shutil.copytree(first.parent, folder / place)
        change(seed=7)(folder / place / "record.json")
    found, problems = read_records(folder / "runs", folder / "second", folder)
    assert set(found) == {first, second}
    assert problems == [f"Not shown: {folder}/copy/record.json is a copy of {second}. Delete one of them."]
    with pytest.raises(ValueError, match=rf"no finished run to report, searched {tmp_path}/nowhere for record\.json"):
        read_records(folder, tmp_path / "nowhere")


@tried("a history that was cut in half", "the report draws the other figures and names it")
def test_a_damaged_history(folder):
    without("finetune", "losses")(only_run(folder) / "record.json")  # as in older records; newer ones hold the losses
    (only_run(folder) / "history.json").write_text('[{"step"')
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        overrides = [f"runs_dir={folder}/runs", f"figures_dir={folder}/figures", "figure=plans"]
        made = build_report(compose("report", overrides=overrides))
    assert [picture.path.name for picture in made.pictures] == ["plans.png"]
    [problem] = made.problems
    assert re.search(r"Not drawn: .*history\.json: .*\. Run it again\.", problem)
