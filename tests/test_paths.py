"""Paths with unusual names, relative paths, and folders that cannot be written to."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from commands import call

from experiments import report, run
from experiments.arguments import quote
from experiments.config import CONF
from experiments.paths import check_writable
from gradpruner.models.spec import ModelSpec
from gradpruner.record import RunRecord

AREA = "Paths and overrides"
NAME = 'lr=1e-3, it\'s "ü" (1)'
ROW = {"question": "1 + 1?", "options": ["2", "3"], "answer": "2"}
SETTINGS = [
    *("debug=smoke", "method=last", "reference=null", "evaluate_before=false", "dataset=jsonl", "model.config=null"),
    *("dataset.answer_field=answer", "dataset.choices_field=options", "dataset.max_length=128"),
    quote("dataset.prompt", "{question} =").strip("'"),
]


def tried(given, gets=None):
    return pytest.mark.bad_input(AREA, given, gets) if gets else pytest.mark.bad_input(AREA, given)


@pytest.fixture
def folder(tmp_path, tiny_spec, assets_dir, monkeypatch):
    """The folder in which commands start: a model and data in a folder with an unusual name."""
    inputs = tmp_path / "start" / NAME
    shutil.copytree(tiny_spec.source(assets_dir), inputs / "model")
    for name in ("train", "test"):
        (inputs / f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * 4)
    monkeypatch.chdir(tmp_path / "start")
    monkeypatch.setenv("HOME", str(tmp_path / "start"))
    return tmp_path / "start"


def paths(prefix):
    places = {
        "model.path": f"{NAME}/model", "dataset.train_file": f"{NAME}/train.jsonl", "results_dir": f"{NAME}/runs",
        "dataset.test_file": f"{NAME}/test.jsonl", "cache_dir": f"{NAME}/cache",
    }  # fmt: skip
    return [read_by_shell(quote(key, f"{prefix}{place}")) for key, place in places.items()]


def read_by_shell(argument):
    return subprocess.run(["sh", "-c", f"printf %s {argument}"], capture_output=True, text=True, check=True).stdout


def records(folder):
    return [RunRecord.load(file.parent) for file in sorted((folder / NAME / "runs").rglob("record.json"))]


@pytest.mark.parametrize("prefix", [
    pytest.param("", marks=tried("relative paths with = , ' \" ( ) ü and spaces, quoted", "a run and its report")),
    pytest.param("~/", marks=tried("the same below ~", "a run and its report")),
])  # fmt: skip
def test_unusual_paths_of_a_run_and_its_report(folder, prefix):
    done = call(run.main, *SETTINGS, *paths(prefix))
    assert done.returncode == 0, done.stderr
    assert [record.status for record in records(folder)] == ["finished"]
    assert {path.name for path in folder.iterdir()} == {NAME}  # no folder is called ~
    runs, page = (read_by_shell(quote(key, f"{prefix}{NAME}/{place}")) for key, place in
                  (("runs_dir", "runs"), ("output", "page.md")))  # fmt: skip
    done = call(report.main, runs, page)
    assert done.returncode == 0 and (folder / NAME / "page.md").is_file(), done.stderr


@tried("relative paths in a sweep", "start at the folder of the command, in every job")
def test_relative_paths_of_a_sweep(folder):
    done = call(run.main, "-m", *SETTINGS, *paths(""), "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert {record.seed for record in records(folder)} == {0, 1}
    assert {path.name for path in folder.iterdir()} == {NAME, "results"}
    [sweep] = (folder / "results/sweeps").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "cells.json", "multirun.yaml"}


@pytest.mark.slow
@tried("relative paths in a sweep with joblib", "start at the folder of the command, in every worker")
def test_relative_paths_of_a_joblib_sweep(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "experiments.run", "-m", *joblib, *SETTINGS, *paths(""), "seed=0,1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {record.seed for record in records(folder)} == {0, 1}


@tried("a model below ~ that lacks a tensor", "error: The weights in … do not fit")
def test_a_checkpoint_below_home_is_checked_before_the_run(folder, monkeypatch):
    from safetensors.torch import load_file, save_file

    file = folder / NAME / "model/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    done = call(run.main, *SETTINGS, *paths("~/"))
    assert done.returncode == 1 and "do not fit the model that its config.json describes: they lack 1" in done.stderr


@pytest.mark.parametrize(("setting", "place", "match"), [
    pytest.param("results_dir", "file/runs", "results_dir must be a folder that this user can write to, got",
                 marks=tried("a file where results_dir is")),
    pytest.param("output_dir", "file", "output_dir must be a folder that this user can write to, got",
                 marks=tried("a file as output_dir")),
    pytest.param("cache_dir", "file", "cache_dir must be a folder that this user can write to, got",
                 marks=tried("a file as cache_dir")),
    # The one file system in which nobody can make a file, root included.
    pytest.param("results_dir", "/proc/runs", "results_dir must be a folder that this user can write to, got /proc",
                 marks=tried("results_dir on a read-only file system")),
    pytest.param("cache_dir", "/proc/cache", "cache_dir must be a folder that this user can write to, got /proc",
                 marks=tried("cache_dir on a read-only file system")),
    pytest.param("hydra.sweep.dir", "/proc/sweep", "hydra.sweep.dir must be a folder that this user can write to, got",
                 marks=tried("the folder of a sweep on a read-only file system")),
])  # fmt: skip
def test_folders_that_cannot_be_written_to(setting, place, match, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    sweep = ["-m", "seed=0,1"] if setting == "hydra.sweep.dir" else []
    done = call(run.main, *sweep, "debug=smoke", f"{setting}={place}")
    assert done.returncode == 1 and match in done.stderr and "Traceback" not in done.stderr
    assert f"Set {setting} to another one." in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"file", ".cache"}


@pytest.mark.parametrize(("setting", "match"), [
    pytest.param("figures_dir", "figures_dir must be a folder that this user can write to",
                 marks=tried("a report: a file as figures_dir")),
    pytest.param("output", "output must be a folder that this user can write to",
                 marks=tried("a report: output below a file")),
])  # fmt: skip
def test_reports_that_cannot_be_written(setting, match, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    value = "file/x.md" if setting == "output" else "file"
    monkeypatch.chdir(tmp_path)
    done = call(report.main, f"runs_dir={CONF.parent}/results/records/quickstart", f"{setting}={value}", "figure=plans")
    assert done.returncode == 1 and match in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("match", [
    pytest.param("results_dir must be on a disk with 17 MB free", marks=tried("results_dir on a full disk"))
])  # fmt: skip
def test_a_full_disk(match, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(3 * 10**6)
    monkeypatch.setattr("experiments.paths.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=rf"{match}, got {tmp_path}/runs with 3\.0 MB\. Free some space, or set"):
        check_writable(results_dir=tmp_path / "runs")


@tried("a missing results_dir", "is made")
def test_folders_are_made(tmp_path):
    check_writable(results_dir=tmp_path / "a" / "b", cache_dir=Path("c"))
    assert not list(tmp_path.iterdir())  # by the run, not by the check
