"""Sweeps and runs that end early: Ctrl-C, memory that ran out, a worker that was killed."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from commands import call
from hydra.core.plugins import Plugins
from joblib.externals.loky.process_executor import TerminatedWorkerError

from experiments import run
from experiments.config import CONF
from gradpruner.finetune import run as trainer_callbacks

AREA = "Sweeps and records"


def tried(given, gets):
    return pytest.mark.bad_input(AREA, given, gets)


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Returns `sweep(job, *arguments, seeds="0,1")`, a sweep over seeds whose jobs call `job(seed)`."""

    def start(job, *arguments, seeds="0,1,2,3"):
        monkeypatch.setattr("experiments.job.run_job", lambda cfg: job(cfg.seed))
        return call(run.main, "-m", f"seed={seeds}", "method=last", f"hydra.sweep.dir={tmp_path}/a b", *arguments)

    return start


def fail_at(seed, error):
    def job(number):
        if number == seed:
            raise error

    return job


@tried("Ctrl-C in a sweep", "exit code 130; finished runs are kept, the others listed with the command to continue")
def test_an_interrupted_sweep_lists_what_is_left(sweep, tmp_path):
    done = sweep(fail_at(2, KeyboardInterrupt()))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert (
        "2 of 4 runs of this sweep have finished and are kept. Not finished:\n  #2: seed=2\n  #3: seed=3\n"
        in done.stderr
    )
    again = f"python -m experiments.run -m seed=0,1,2,3 method=last 'hydra.sweep.dir={tmp_path}/a b'"
    assert f"To continue: {again}\n" in done.stderr


@tried("Ctrl-C in a sweep after a failed run", "the failed run is listed as failed")
def test_an_interrupted_sweep_names_its_failures(sweep):
    def job(seed):
        if seed == 1:
            raise ValueError("bad rows")
        if seed == 3:
            raise KeyboardInterrupt

    done = sweep(job)
    assert (
        "2 of 4 runs of this sweep have finished and are kept. Not finished:\n  #1: seed=1 (failed)\n  #3"
        in done.stderr
    )


@tried("the same sweep again in the same folder", "counts its own runs")
def test_what_an_earlier_sweep_finished_does_not_count(sweep):
    sweep(lambda seed: None, seeds="0,1")
    assert "0 of 2 runs of this sweep" in sweep(fail_at(0, KeyboardInterrupt()), seeds="0,1").stderr


@tried("Ctrl-C in a sweep of many runs", "20 are listed, and how many more")
def test_a_long_list_is_cut(sweep, monkeypatch):
    monkeypatch.setattr("experiments.sweep.NUM_LISTED", 3)
    done = sweep(fail_at(0, KeyboardInterrupt()), seeds="0,1,2,3,4")
    assert "0 of 5 runs" in done.stderr and "\n  #2: seed=2\n  and 2 more\n" in done.stderr


@tried("Ctrl-C in the sweep of a preset", "its runs are listed")
def test_an_interrupted_preset_lists_its_runs(sweep):
    chosen = ["experiment=figure8", "method=gradpruner", "method.num_pruned_layers=3,6"]  # model: ${at_scale:...}
    done = sweep(fail_at(0, KeyboardInterrupt()), *chosen, seeds="0")
    assert "0 of 4 runs of this sweep" in done.stderr and "at_scale" not in done.stderr
    assert "  #3: dataset=piqa method.num_pruned_layers=6\n" in done.stderr


@tried("Ctrl-C in a single run", "exit code 130; the command to continue")
def test_an_interrupted_run(monkeypatch):
    def stop(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.job.run_job", stop)
    done = call(run.main, "seed=1")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "\nInterrupted; finished stages are kept.\nTo continue: python -m experiments.run seed=1\n" in done.stderr


@tried("Ctrl-C in a fine-tune", "exit code 130; the step from which the same command goes on")
def test_an_interrupted_fine_tune(monkeypatch, tmp_path):
    folders = (f"output_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache")
    arguments = ("debug=smoke", "method=dense", "evaluate_before=false", "finetune.save_steps=1", *folders)
    save = trainer_callbacks._Clock.on_save

    def stop(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_callbacks._Clock, "on_save", stop)
        done = call(run.main, *arguments)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "\nInterrupted; finished stages are kept, and finetune goes on from step 2.\nTo continue: " in done.stderr
    done = call(run.main, *arguments)
    assert done.returncode == 0 and "checkpoint-1" in done.stderr


@tried("`--version`", "is that of gradpruner")
def test_the_version_is_ours():
    assert re.fullmatch(r"gradpruner \d+\.\d+.*\n", call(run.main, "--version").stdout)


@pytest.mark.parametrize("error", [
    pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
                 marks=tried("a sweep whose second run exceeds the GPU's memory", "the others go on; exit code 1; "
                             "error: Memory ran out … Lower finetune.micro_batch_size")),
    pytest.param(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
                 marks=tried("a sweep whose second run exceeds the host's memory", "the same")),
    pytest.param(MemoryError("9 GiB"), marks=tried("a sweep whose second run exceeds Python's memory", "the same")),
])  # fmt: skip
def test_a_run_out_of_memory_stops_no_other(sweep, error):
    ended = []

    def job(seed):
        if seed == 1:
            raise error
        ended.append(seed)

    done = sweep(job, seeds="0,1,2")
    assert ended == [0, 2] and done.returncode == 1 and "Traceback" not in done.stderr
    assert f"#1: seed=1 method=last\n    Memory ran out, got {type(error).__name__}: {error}. Lower fine" in done.stderr


def test_a_run_out_of_memory_leaves_its_memory_to_the_next(sweep):
    class Model:
        def __init__(self):
            self.itself = self  # as models and trainers refer to each other

    held = []

    def job(seed):
        if seed == 0:
            model = Model()
            held.append(weakref.ref(model))
            raise MemoryError
        assert held[0]() is None

    gc.disable()
    try:
        assert "1 runs of this sweep failed" in sweep(job, seeds="0,1").stderr
    finally:
        gc.enable()


@tried("a single run that exceeds the memory", "exit code 1; error: Memory ran out … Lower finetune.micro_batch_size")
def test_a_single_run_out_of_memory(monkeypatch):
    def job(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("experiments.job.run_job", job)
    done = call(run.main)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "Error: Memory ran out, got OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB. Lower" in done.stderr
    )


@tried("a failing run of a sweep whose arguments hold an interpolation", "is listed as it was given")
def test_a_failure_is_listed_with_its_arguments_as_given(sweep):
    done = sweep(fail_at(1, ValueError("bad rows")), "results_dir=${oops}", seeds="0,1")
    assert done.returncode == 1 and "1 runs of this sweep failed" in done.stderr and "oops" in done.stderr


@tried("a joblib worker that the system killed", "error: a worker of the sweep was killed … Lower hydra.launcher")
def test_a_killed_worker(sweep, monkeypatch):
    class Launcher:
        def launch(self, job_overrides, initial_job_idx):
            raise TerminatedWorkerError("SIGKILL(-9)")

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *args, **kwargs: Launcher())
    done = sweep(None)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "a worker of the sweep was killed, as the system does when memory runs out. Lower hydra.laun" in done.stderr
    assert "0 of 4 runs" in done.stderr and "To continue: python -m experiments.run -m seed=0,1,2,3" in done.stderr


@pytest.mark.slow
@tried("Ctrl-C in a sweep with joblib", "exit code 130; finished runs are kept, the others listed")
def test_an_interrupted_joblib_sweep(tmp_path):
    arguments = [
        *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/sweep", "debug=smoke"),
        *("reference=null", "method=last", "seed=0,1,2,3,4,5", f"results_dir={tmp_path}/runs"),
        f"cache_dir={tmp_path}/cache",
    ]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=CONF.parent,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's background job has none
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("sweep/*/finished.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(sweep.pid, signal.SIGINT)
    _, log = sweep.communicate(timeout=100)
    assert sweep.returncode == 130, log
    finished = len(list((tmp_path / "runs").rglob("record.json")))
    assert f"{finished} of 6 runs of this sweep have finished and are kept. Not finished:\n  #" in log
    again = subprocess.run([sys.executable, "-m", "experiments.run", *arguments], cwd=CONF.parent, capture_output=True)
    assert again.returncode == 0 and len(list((tmp_path / "runs").rglob("record.json"))) == 6
