"""Jobs of submitit share a cache: one makes a stage, the others wait and say so. A preempted job resumes."""

import os
import signal
import threading
import time

import pytest
from commands import call

from experiments import run, status
from gradpruner.lease import find_holder
from gradpruner.record import RunRecord

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra `cluster`")


def tried(given, gets):
    return pytest.mark.bad_input("Sweeps and records", given, gets)


def preempt_once(folder, preempted, is_over):
    """Sends the job that fine-tunes first the signal that Slurm sends before it ends a job, after a checkpoint."""
    while not is_over.is_set():
        for partial in folder.glob("cache/stages/finetune/*.partial"):
            holder = find_holder(partial.with_suffix(".lease"))
            if holder is not None and list(partial.glob("checkpoints/checkpoint-*/complete.json")):
                preempted.append(holder.pid)
                os.kill(holder.pid, signal.SIGUSR2)
                return
        time.sleep(0.02)


@tried("a job of Slurm's that is preempted", "is requeued, and resumes from the checkpoint of its fine-tune")
@tried("runs of a sweep on a cluster that share a stage", "one makes it, the others wait")
def test_jobs_share_stages_and_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two jobs with threads on all cores would wait for each other
    arguments = [
        *("-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/sweep", "debug=smoke"),
        *("merge_count=0,1", "reference=null", "evaluate_before=false", "method.steps=2", "method.batch_size=2"),
        *("dataset.max_train_samples=4", "dataset.max_test_samples=2"),
        *("finetune.batch_size=2", "finetune.max_steps=10", "finetune.save_steps=1"),
        *(f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"),
    ]
    preempted, is_over = [], threading.Event()
    thread = threading.Thread(target=preempt_once, args=(tmp_path, preempted, is_over))
    thread.start()
    done = call(run.main, *arguments)
    is_over.set()
    thread.join()
    logs = [
        "".join(file.read_text() for file in folder.glob("*_log.*"))
        for folder in (tmp_path / "sweep/.submitit").iterdir()
        if folder.name.isdigit()
    ]
    assert done.returncode == 0, done.stderr + "\n".join(logs)
    records = [RunRecord.load(file.parent) for file in tmp_path.glob("runs/**/record.json")]
    assert [record.status for record in records] == ["finished"] * 2 == ["finished"] * len(logs)
    assert sorted("measure took" in log for log in logs) == [False, True]  # one of them measured
    [requeued] = [log for log in logs if "Requeued job" in log]
    assert preempted and "this job is preempted" in requeued and "Resuming fine-tuning from" in requeued
    assert call(status.main, *arguments).returncode == 0
