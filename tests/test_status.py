"""`python -m experiments.status` says of every cell of a sweep whether it is done, running, failed or missing."""

import logging
import os
import socket
import time

import filelock
import pytest
from commands import call
from hydra import compose, initialize_config_dir

from experiments import run, status
from experiments.config import CONF, build_pipeline, identity, run_directory
from experiments.job import _run_arm, run_job
from experiments.recording import RUNNING_FILE
from gradpruner import lease
from gradpruner.files import content_hash
from gradpruner.record import RunRecord

METHODS = "last,random,magnitude,dense"


def tried(given, gets):
    return pytest.mark.bad_input("Sweeps and records", given, gets)


@pytest.fixture
def arguments(tmp_path):
    return [
        *("-m", "debug=smoke", "reference=null", "evaluate_before=false", f"method={METHODS}"),
        *("hydra.callbacks.sweep.exclude=[{method: dense}]", f"hydra.sweep.dir={tmp_path}/sweeps/one"),
        *(f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"),
        *("dataset.max_train_samples=4", "dataset.max_test_samples=2", "finetune.max_steps=1"),
    ]


@pytest.fixture
def folder_of(arguments):
    """Returns `folder_of(method)`, the run folder of that cell and its config."""

    def find(method):
        single = [each for each in arguments if not each.startswith(("-m", "method=", "hydra."))]
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=[*single, f"method={method}"])
            return run_directory(cfg, build_pipeline(cfg)), cfg

    return find


def states(done):
    """Returns the cells of the table that was printed, as {method: (state, detail)}."""
    lines = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    return {cells[2].strip().removeprefix("method="): (cells[1].strip(), cells[3].strip()) for cells in lines}


def test_a_sweep_that_has_not_begun(arguments):
    done = call(status.main, *arguments)
    assert done.returncode == 1
    assert states(done) == dict.fromkeys(("last", "random", "magnitude"), ("missing", ""))  # dense is excluded
    assert "0 done, 0 running, 0 failed, 3 missing of 3 cells" in done.stdout
    assert "To continue: python -m experiments.run -m debug=smoke reference=null evaluate_before=false " in done.stdout


def test_each_state_is_told(arguments, folder_of, tmp_path):
    failed, cfg = folder_of("magnitude")
    RunRecord("failed", {}, content_hash(identity(cfg)), 0, error="ValueError: bad rows").save(failed)
    broken_off, _ = folder_of("random")
    broken_off.mkdir(parents=True)
    (broken_off / "config.yaml").touch()
    with filelock.SoftFileLease(folder_of("last")[0] / RUNNING_FILE, lease_duration=lease.LEASE_SECONDS):
        done = call(status.main, *arguments)
    assert done.returncode == 1 and states(done) == {
        "last": ("running", f"process {os.getpid()} on {lease.own_host()}"),
        "random": ("missing", "broken off, and will be resumed"),
        "magnitude": ("failed", "ValueError: bad rows"),
    }


def test_a_process_on_another_host_runs_while_its_heart_beats(arguments, folder_of, monkeypatch):
    file = folder_of("last")[0] / RUNNING_FILE
    file.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "node7")
        held = filelock.SoftFileLease(file, lease_duration=lease.LEASE_SECONDS)
        held.acquire()
    try:
        assert states(call(status.main, *arguments))["last"] == ("running", f"process {os.getpid()} on node7")
        past = time.time() - 2 * lease.LEASE_SECONDS
        os.utime(file, (past, past))
        assert states(call(status.main, *arguments))["last"] == ("missing", "")
    finally:
        held.release()


def test_a_sweep_and_its_folder(arguments, monkeypatch, tmp_path):
    """One cell fails before it has a folder; the sweep's folder knows why, and names the same sweep."""
    original = run_job

    def job(cfg):
        if "magnitude" in cfg.method._target_:
            raise ValueError("no such rows")
        return None if "random" in cfg.method._target_ else original(cfg)

    monkeypatch.setattr("experiments.job.run_job", job)
    assert call(run.main, *arguments).returncode == 1
    for given in (arguments, [f"{tmp_path}/sweeps/one"]):
        done = call(status.main, *given)
        assert done.returncode == 1
        assert states(done) == {
            "last": ("done", ""),
            "random": ("missing", ""),
            "magnitude": ("failed", "no such rows"),
        }
    again = done.stdout.split("To continue: ")[1]
    assert again.startswith("python -m experiments.run -m ") and f"method={METHODS}" in again
    single = [each for each in arguments if not each.startswith("method=")]
    done = call(status.main, *single, "method=last")
    assert done.returncode == 0 and "1 done, 0 running, 0 failed, 0 missing of 1 cells\n" in done.stdout
    assert "To continue" not in done.stdout


def test_a_cell_that_would_be_refused_has_failed(arguments):
    done = call(status.main, *arguments, "+method.flavour=mild")
    assert {state for state, _ in states(done).values()} == {"failed"}
    assert "There is no key 'method.flavour'" in done.stdout


def test_a_folder_with_another_config_is_told(arguments, tmp_path):
    RunRecord("failed", {}, "other", 0, error="x").save(tmp_path / "mine")
    found = states(call(status.main, *arguments, f"output_dir={tmp_path}/mine"))
    assert found["last"] == ("failed", f"{tmp_path}/mine holds a run with another config")


@tried("a folder of no sweep for experiments.status", "error: Give the arguments of a sweep or the folder of one, got")
def test_a_folder_of_no_sweep(tmp_path):
    done = call(status.main, str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Error: Give the arguments of a sweep or the folder of one, got {tmp_path} (FileNotFound" in done.stderr
    assert "hold multirun.yaml." in done.stderr


@tried("a misspelt key for experiments.status", "error: There is no key 'sede' … Did you mean seed?")
def test_a_misspelt_key(arguments):
    done = call(status.main, *arguments, "sede=1")
    assert done.returncode == 1 and "There is no key 'sede'. Did you mean seed?" in done.stderr


@tried("two commands that run the same cell at once", "the second waits, and then finds it finished")
def test_a_run_waits_for_another_one_of_the_same(folder_of, monkeypatch, caplog):
    folder, cfg = folder_of("last")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("gradpruner.waiting.SILENT_SECONDS", 0.01)
    monkeypatch.setattr("experiments.job._run_alone", lambda *args: (folder / RUNNING_FILE).is_file())
    folder.mkdir(parents=True)
    held = filelock.SoftFileLease(folder / RUNNING_FILE, lease_duration=lease.LEASE_SECONDS)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        deadline = time.monotonic() + 20
        while "Waiting for" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        held.release()

    held.acquire()
    monkeypatch.setattr(lease, "time", _Clock(sleep))
    assert _run_arm(cfg, build_pipeline(cfg), None)
    assert waits and not (folder / RUNNING_FILE).exists()
    assert f"Waiting for another process that runs the same; process {os.getpid()} on" in caplog.text


class _Clock:
    """The module `time` with another `sleep`, for one module alone."""

    def __init__(self, sleep):
        self.sleep = sleep

    def __getattr__(self, name):
        return getattr(time, name)
