"""The report over run folders."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from experiments.report import read_records
from experiments.run import CONF, run_job
from gradpruner.files import write_json


def run(tmp_path, *overrides):
    folders = [f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", "reference=null"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return run_job(compose("config", overrides=["debug=smoke", *folders, *overrides]))


def report(*arguments):
    command = [sys.executable, "-m", "experiments.report", *arguments]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=120)


def test_finished_runs_are_compared_and_others_named(tmp_path):
    for method in ("random", "dense", "last"):
        run(tmp_path, f"method={method}")
    write_json(tmp_path / "runs/old/record.json", {"schema_version": 0})
    write_json(tmp_path / "runs/bad/record.json", {**run(tmp_path, "method=last").__dict__, "status": "failed"})
    done = report(f"runs_dir={tmp_path}/runs", f"output={tmp_path}/table.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("Dense") < done.stdout.index("Last but the final one") < done.stdout.index("Random")
    assert "schema version 0" in done.stderr and "has status failed" in done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("## random-llama on arc_easy, lora") and "| Random | 4 |" in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match=rf"no finished run to report, searched {tmp_path} .*experiment=quickstart"):
        read_records(tmp_path)
    done = report(f"runs_dir={tmp_path}")
    assert done.returncode == 1 and "Error: There is no finished run" in done.stderr and "Traceback" not in done.stderr


def test_help_is_its_own():
    done = report("--help")
    assert done.returncode == 0 and "Usage: python -m experiments.report" in done.stdout and "runs_dir" in done.stdout
