"""Sweeps that start in the same second have folders of their own; all jobs of a sweep share one."""

import os
import pickle
import re
import subprocess
import sys
from datetime import datetime

import pytest
from hydra import initialize_config_dir
from hydra.core import utils
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from experiments.config import CONF

FROZEN = """
import sys
from datetime import datetime
from hydra.core import utils

class Frozen(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2030, 1, 2, 3, 4, 5)

utils.datetime = Frozen
from experiments import run
sys.argv = ["run", *sys.argv[1:]]
run.main()
"""
SKIPPED = ["-m", "seed=0,1", "merge_count=0", "hydra.callbacks.sweep.exclude=[{merge_count: 0}]"]


def start_sweep(folder, *overrides):
    return subprocess.Popen(
        [sys.executable, "-c", FROZEN, *SKIPPED, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CONF.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.bad_input("Sweeps and records", "two sweeps that start in the same second", "a folder each")
def test_two_sweeps_of_one_second_have_two_folders(tmp_path):
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for sweep in [start_sweep(tmp_path), start_sweep(tmp_path, *joblib)]:
        _, log = sweep.communicate(timeout=300)
        assert sweep.returncode == 0, log
    folders = list((tmp_path / "results/sweeps").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("2030-01-02_03-04-05-") for folder in folders)
    for folder in folders:  # both jobs of a sweep are in its own folder, whichever process they ran in
        assert {path.name for path in folder.iterdir()} == {"0", "1", "cells.json", "multirun.yaml"}


class Frozen(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2030, 1, 2, 3, 4, 5)


def test_a_folder_is_unique_to_a_sweep_and_the_same_for_its_jobs(monkeypatch):
    monkeypatch.setattr(utils, "datetime", Frozen)
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        sweeps = [loader.load_configuration("config", ["seed=0,1"], RunMode.MULTIRUN) for _ in range(2)]
        folders = [sweep.hydra.sweep.dir for sweep in sweeps]
        for sweep, folder in zip(sweeps, folders, strict=True):
            sent = pickle.loads(pickle.dumps(sweep))  # as joblib sends it to a worker
            jobs = [loader.load_sweep_config(config, [f"seed={n}"]) for n, config in enumerate((sweep, sent))]
            assert [job.hydra.sweep.dir for job in jobs] == [folder] * 2
    assert len(set(folders)) == 2
    assert all(re.fullmatch(r"results/sweeps/2030-01-02_03-04-05-[0-9a-f]{8}", folder) for folder in folders)
