"""A joblib sweep spreads its workers over the visible GPUs; nothing else changes devices."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import devices
from experiments.config import CONF

JOBLIB = ["hydra/launcher=joblib"]
# A worker: says which GPU it took and whether torch was there already, then waits until its input ends.
WORKER = """
import sys
from experiments.devices import taken_gpu
import os
print(taken_gpu(), os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules, "GRADPRUNER_SWEEP_GPUS" in os.environ)
sys.stdout.flush()
sys.stdin.read()
"""
TWO_GPUS = """
import sys
import torch
torch.cuda.device_count = lambda: 2  # in this process alone: it offers the GPUs
from experiments import run
sys.argv = ["run", *sys.argv[1:]]
run.main()
"""


@pytest.fixture(autouse=True)
def no_offer(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("GRADPRUNER_SWEEP_GPUS", "")  # so that it is restored whatever a test does
    monkeypatch.delenv("GRADPRUNER_SWEEP_GPUS")


def offer(monkeypatch, tmp_path, num_gpus, *overrides):
    """Returns what a sweep with so many visible GPUs offers its workers, or None."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        overrides = [f"hydra.sweep.dir={tmp_path}/sweep", *overrides]
        config = compose("config", overrides=overrides, return_hydra_config=True)
    devices.offer_gpus(config)
    offered = os.environ.get("GRADPRUNER_SWEEP_GPUS")
    return None if offered is None else json.loads(offered)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "gpus"),
    [
        (None, 4, ["0", "1", "2", "3"]),
        ("5,7", 2, ["5", "7"]),
        ("GPU-a,GPU-b,GPU-c", 3, ["GPU-a", "GPU-b", "GPU-c"]),
        ("0,1,99", 2, ["0", "1"]),  # CUDA ignores what follows a device that does not exist
    ],
)
def test_a_joblib_sweep_offers_the_visible_gpus(monkeypatch, tmp_path, visible, num_gpus, gpus):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert offer(monkeypatch, tmp_path, num_gpus, *JOBLIB) == {"folder": f"{tmp_path}/sweep", "gpus": gpus}
    devices.withdraw_gpus()
    assert "GRADPRUNER_SWEEP_GPUS" not in os.environ


@pytest.mark.parametrize(("num_gpus", "overrides"), [(0, JOBLIB), (1, JOBLIB), (4, [])])
def test_one_gpu_or_one_process_changes_nothing(monkeypatch, tmp_path, num_gpus, overrides):
    assert offer(monkeypatch, tmp_path, num_gpus, *overrides) is None
    devices.take_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and devices.taken_gpu() is None


def start_worker(tmp_path, gpus):
    offered = json.dumps({"folder": str(tmp_path / "sweep"), "gpus": gpus})
    environment = {**os.environ, "GRADPRUNER_SWEEP_GPUS": offered, "PYTHONPATH": str(CONF.parent)}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return worker, worker.stdout.readline().split()


def end_worker(worker):
    worker.communicate(timeout=60)
    assert worker.returncode == 0


def test_workers_take_the_least_used_gpu_before_they_import_torch(tmp_path):
    workers = [start_worker(tmp_path, ["3", "5"]) for _ in range(5)]
    said = [line for _, line in workers]
    assert [gpu for gpu, *_ in said] == ["3", "5", "3", "5", "3"]
    assert all(line == [line[0], line[0], "False", "False"] for line in said)
    end_worker(workers[1][0])  # joblib ends workers that were idle for long, and starts others
    replacement, line = start_worker(tmp_path, ["3", "5"])
    assert line[0] == "5"
    for worker in (replacement, *(worker for index, (worker, _) in enumerate(workers) if index != 1)):
        end_worker(worker)


def test_a_worker_that_has_torch_already_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(devices, "_taken", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GRADPRUNER_SWEEP_GPUS", json.dumps({"folder": str(tmp_path), "gpus": ["4", "6"]}))
    devices.take_gpu()
    assert devices.taken_gpu() == "4" == os.environ["CUDA_VISIBLE_DEVICES"]
    assert "must take its GPU before it imports torch, got GPU 4 afterwards" in caplog.text
    assert "Import `experiments` first." in caplog.text


@pytest.mark.slow
def test_jobs_of_a_joblib_sweep_run_on_both_gpus(tmp_path):
    arguments = [
        *("-m", *JOBLIB, "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/sweep", "seed=0,1,2,3"),
        *("merge_count=0", "hydra.callbacks.sweep.exclude=[{merge_count: 0}]"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TWO_GPUS, *arguments], cwd=CONF.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    jobs = [line.split("Job ")[1].split() for line in done.stderr.splitlines() if "runs on GPU" in line]
    assert sorted(job for job, *_ in jobs) == ["0", "1", "2", "3"]
    assert {gpu for *_, gpu in jobs} <= {"0", "1"}
    assert "before it imports torch" not in done.stderr
    assert {path.name for path in (tmp_path / "sweep").glob("*.lock")} == {"gpu0-worker0.lock", "gpu1-worker0.lock"}
