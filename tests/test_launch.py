"""A run on several GPUs is started by torchrun from one task per node; launchers that cannot work here are refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from commands import call
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from experiments import devices, launch, run
from experiments.config import CONF, identity
from experiments.launch import check_launcher, run_with_torchrun, torchrun_command
from experiments.schema import ConfigError

# Stands in for torchrun: writes down what it was given, and does what the first argument of the job says.
STUB = """
import json, os, signal, sys, time
given, folder = sys.argv[1:], os.environ["STUB_FOLDER"]
ignored = signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
with open(f"{folder}/calls", "a") as stream:
    stream.write(json.dumps({"given": given, "ignores": ignored}) + "\\n")
if "seed=1" in given:
    sys.exit("[rank0]: a long traceback\\nError: seed must be even, got 1. Take another.\\n[torchrun]: more")
if "seed=3" in given:
    sys.exit(7)
if "seed=5" in given:
    open(f"{folder}/started", "w").close()
    time.sleep(100)
"""
SLURM = {
    **{"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"},
    **{"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
}


def tried(given, gets):
    return pytest.mark.bad_input("Sweeps and records", given, gets)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Puts the stub in torchrun's place; returns a function that reads its calls."""
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    monkeypatch.setenv("STUB_FOLDER", str(tmp_path))
    monkeypatch.setattr(launch, "TORCHRUN", (sys.executable, "-S", str(file)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def calls():
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return calls


def launcher(name, *overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}", *overrides], return_hydra_config=True)
    return config.hydra.launcher


# ---- torchrun ----


@tried("a run of a sweep that fails on several processes", "the reason that it gave is listed; the others go on")
def test_each_cell_is_a_run_under_torchrun(stub, tmp_path):
    """Also of a preset that is a sweep by itself, and with the value that a sweep gives the cell."""
    given = ["experiment=table1", "method=dense", "dataset=piqa", "finetune=full", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = call(run.main, "-m", "seed=0,1,3", "num_processes=4", *given)
    assert done.returncode == 1 and "2 runs of this sweep failed, the others are done" in done.stderr
    assert "    seed must be even, got 1. Take another.\n" in done.stderr
    assert "torchrun ended with status 7: see its output in the log of this job" in done.stderr
    assert "[rank0]: a long traceback" in done.stderr and "[torchrun]: more" in done.stderr
    calls = stub()
    assert [each["ignores"] for each in calls] == [True] * 3
    for seed, each in zip((0, 1, 3), calls, strict=True):
        assert each["given"][:4] == ["--standalone", "--nproc-per-node=4", "-m", "experiments.run"]
        assert each["given"][-1] == "hydra.mode=RUN"
        assert {f"seed={seed}", "experiment=table1", "method=dense", "finetune=full"} <= set(each["given"])
        assert not any(argument.startswith("hydra.sweep") for argument in each["given"])


def test_a_process_of_torchruns_runs_the_job_itself(stub, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    seen = []
    monkeypatch.setattr("experiments.job.run_job", lambda cfg: seen.append(cfg.num_processes))
    assert call(run.main, "num_processes=4", "experiment=table1", "hydra.mode=RUN").returncode == 0
    assert seen == [4] and not (tmp_path / "calls").exists()


def test_a_dry_run_is_one_process(stub, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.job.run_job", lambda cfg: None)
    assert call(run.main, "num_processes=4", "dry_run=true").returncode == 0 and not (tmp_path / "calls").exists()


def test_a_record_does_not_depend_on_the_number_of_processes():
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        assert identity(compose("config")) == identity(compose("config", overrides=["num_processes=8"]))


def test_nodes_of_a_slurm_job_meet_on_the_first_one(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: b"node07\nnode08\n")  # scontrol
    command = torchrun_command(["seed=0"], 8)
    assert command[len(launch.TORCHRUN) : -1] == [
        *("--nnodes=2", "--node-rank=1", "--rdzv-backend=c10d", "--rdzv-id=4711", "--rdzv-endpoint=node07:24711"),
        *("--nproc-per-node=8", "-m", "experiments.run", "seed=0"),
    ]
    assert not launch.is_first_node()
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert "--standalone" in torchrun_command(["seed=0"], 8)


def test_an_interrupted_job_ends_torchrun(stub, tmp_path):
    """As when Slurm's signal makes submitit requeue the job."""
    ended = []

    class Requeued(BaseException):
        pass

    def requeue(signum, frame):
        raise Requeued

    def interrupt():
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    before, end = signal.signal(signal.SIGUSR2, requeue), launch._end
    thread = threading.Thread(target=interrupt)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Requeued):
            patch.setattr(launch, "_end", lambda process: (end(process), ended.append(process.returncode)))
            thread.start()
            run_with_torchrun(["seed=5"], 2)
    finally:
        signal.signal(signal.SIGUSR2, before)
        thread.join()
    assert ended == [-signal.SIGTERM]


@tried("more processes than the node has GPUs", "error: num_processes must be at most the GPUs of a node, got")
def test_more_processes_than_gpus(stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"at most the GPUs of a node, got num_processes=4 and 2 visible GPUs\. Lower"
    ):
        run_with_torchrun([], 4)


def test_no_process_is_refused():
    done = call(run.main, "num_processes=0")
    assert done.returncode == 1 and "Error: num_processes must be 1 or more, got 0. Leave it out" in done.stderr


def test_joblib_gives_each_worker_the_gpus_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(devices.OFFER, "")
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=joblib", "num_processes=2", f"hydra.sweep.dir={tmp_path}"]
        config = compose("config", overrides=overrides, return_hydra_config=True)
    devices.offer_gpus(config)
    assert json.loads(os.environ[devices.OFFER])["gpus"] == ["0,1", "2,3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    devices.withdraw_gpus()
    devices.offer_gpus(config)
    assert devices.OFFER not in os.environ


# ---- launchers ----


@pytest.mark.parametrize("name", ["submitit_slurm", "submitit_local"])
def test_our_yaml_has_the_keys_of_the_launcher(name):
    plugin = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config", reason="needs the extra `cluster`")
    config = {"submitit_slurm": plugin.SlurmQueueConf, "submitit_local": plugin.LocalQueueConf}[name]
    ours = launcher(name)
    assert set(ours) == set(OmegaConf.load(CONF / f"hydra/launcher/{name}.yaml")) == set(OmegaConf.structured(config))
    assert ours.timeout_min == 1440 and ours.tasks_per_node == 1


@tried(
    "hydra/launcher=submitit_slurm without Slurm", "error: … needs a machine that submits jobs to Slurm, got no sbatch"
)
def test_slurm_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call(run.main, "-m", "seed=0,1", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "needs a machine that submits jobs to Slurm, got no sbatch in PATH. Start the sweep on a login" in done.stderr
    )


@tried("a launcher whose extra is not installed", "error: … Install it with: pip install 'gradpruner[cluster]'")
def test_a_launcher_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    target = OmegaConf.create({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"})
    match = (
        r"must be one that is installed, got LocalLauncher of .*Install it with: pip install 'gradpruner\[cluster\]'"
    )
    with pytest.raises(ConfigError, match=match):
        check_launcher(target)


def test_an_interrupted_slurm_sweep_says_that_jobs_go_on(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `cluster`")
    (tmp_path / "sbatch").touch()
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *args, **kwargs: SimpleNamespace(launch=interrupted))
    done = call(run.main, "-m", "seed=0,1", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 130
    assert "0 of 2 runs of this sweep have finished" in done.stderr
    assert f"Jobs that Slurm has go on; their logs are in {tmp_path}/sweep/.submitit." in done.stderr


@tried("a job of Slurm's that was killed", "error: a job of the sweep ended without a result; what is left is listed")
def test_a_job_that_was_killed(monkeypatch, tmp_path):
    submitit = pytest.importorskip("submitit.core.utils", reason="needs the extra `cluster`")

    def killed(*args, **kwargs):
        raise submitit.UncompletedJobError("Job 12_0 (task: 0) has not produced any output (OUT_OF_MEMORY)\n...")

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *args, **kwargs: SimpleNamespace(launch=killed))
    done = call(run.main, "-m", "seed=0,1", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "Error: a job of the sweep ended without a result, got UncompletedJobError: Job 12_0 (task: 0)" in done.stderr
    )
    assert "Its log is in the folder .submitit of the sweep" in done.stderr and "0 of 2 runs" in done.stderr
    assert "To continue: python -m experiments.run -m seed=0,1" in done.stderr
