"""kill -9 at random moments of every stage, then the same command: the record equals that of an undisturbed run."""

import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.config import CONF
from experiments.job import run_job

STAGES = ("measure", "prune", "finetune", "predict")
NOT_COMPARED = ("second", "bytes", "environment", "config", "identity", "runtime")


def overrides(folder):
    return [
        *("debug=smoke", "reference=null", "save_checkpoint=true", "method.steps=4", "method.batch_size=2"),
        *("finetune.max_steps=10", "finetune.save_steps=2", "dataset.max_test_samples=24", "evaluation.batch_size=2"),
        *(f"output_dir={folder}/run", f"cache_dir={folder}/cache"),
    ]


def work(folder):
    gc.freeze()  # as in conftest.py, which is not in force in a process of the fork server
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        run_job(compose("config", overrides=overrides(folder)))


@pytest.fixture(scope="module")
def context():
    """Context whose processes start from one that has imported everything but started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_interruptions"])
    return context


def start(context, folder):
    process = context.Process(target=work, args=(str(folder),))
    process.start()
    return process


def finish(context, folder):
    process = start(context, folder)
    process.join(300)
    assert process.exitcode == 0
    return results(folder)


def results(folder):
    def comparable(value):
        if isinstance(value, dict):
            return {k: comparable(v) for k, v in value.items() if not any(part in k for part in NOT_COMPARED)}
        return value

    run_dir = Path(folder) / "run"
    record = comparable(json.loads((run_dir / "record.json").read_text()))
    files = ("plan.json", "predictions.jsonl", "checkpoint/model.safetensors", "checkpoint/config.json")
    return record, [(run_dir / name).read_bytes() for name in files]


def kill_in(context, folder, stage, delay):
    """Kills a run `delay` seconds into a stage; returns whether it was still running then."""
    process = start(context, folder)
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if list((Path(folder) / "cache" / "stages" / stage).glob("*.partial")):
            time.sleep(delay)
            break
        time.sleep(0.005)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def check(context, tmp_path, kills, seed):
    expected = finish(context, tmp_path / "undisturbed")
    moments, hits = random.Random(seed), 0
    for index in range(kills):
        stage = STAGES[index * len(STAGES) // kills]
        if kill_in(context, tmp_path / "killed", stage, moments.uniform(0, 0.15)):
            hits += 1
    assert hits >= kills // 2  # a short stage may be over before the kill arrives
    assert finish(context, tmp_path / "killed") == expected


@pytest.mark.bad_input("Sweeps and records", "kill -9 at any moment", "the same command gives the same record")
def test_four_kills(context, tmp_path):
    check(context, tmp_path, kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills(context, tmp_path, seed):
    check(context, tmp_path, kills=20, seed=seed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, which only root can mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL("libc.so.6", use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16m") != 0:
        pytest.skip(f"cannot mount a small tmpfs: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(bytes(folder), 2)


@pytest.mark.bad_input("Sweeps and records", "a disk that fills up", "error: The disk … is full; nothing is damaged")
def test_a_full_disk_is_said_and_damages_nothing(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gradpruner.pipeline.run.Pipeline.check", lambda self, **kwargs: None
    )  # which would refuse to start
    monkeypatch.setattr("experiments.job.check_writable", lambda **folders: None)  # likewise
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (31 * 2**19))
    with pytest.raises(OSError, match=r"The disk of .*cache/stages is full .*Free some space, or set cache_dir"):
        work(small_disk)
    filler.unlink()
    work(small_disk)  # with free space again, the same command finishes
    work(tmp_path / "elsewhere")
    assert results(small_disk) == results(tmp_path / "elsewhere")
