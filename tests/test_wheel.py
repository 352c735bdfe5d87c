"""A wheel holds all that the code reads, and runs from another folder without the checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from gradpruner import runtime

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOL = PROJECT["tool"]["setuptools"]
DATA = TOOL["package-dir"]  # package: its folder in a checkout
SOURCES = ("gradpruner", "baselines", "experiments", *DATA.values())


def test_every_package_is_listed():
    found = {file.parent for package in SOURCES[:3] for file in (ROOT / package).rglob("__init__.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in found} | set(DATA) == set(TOOL["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources, without what a build leaves in a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copytree(ROOT / name, folder / "source" / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", folder / "source", *options], check=True)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def gradpruner(wheel, tmp_path_factory):
    """Returns `gradpruner(folder, *arguments)`, which runs the installed command; every other package is ours."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    script = site / "bin/gradpruner"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom experiments.cli import main\nsys.exit(main())\n")
    environment = {name: value for name, value in os.environ.items() if name != "GRADPRUNER_HOME"}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}

    def run(folder, *arguments):
        before = sorted(site.rglob("*"))
        command = [sys.executable, script, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert sorted(site.rglob("*")) == before
        return done

    return run


def test_a_wheel_holds_all_that_is_read(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    renamed = {f"{folder}/": f"{package.replace('.', '/')}/" for package, folder in DATA.items()}
    kept = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = set()
    for name in kept.splitlines():
        start = next((start for start in renamed if name.startswith(start)), "")
        expected.add(renamed.get(start, "") + name.removeprefix(start))
    assert expected and expected - held == set()
    assert not {name for name in held if name.startswith("tests")}


def test_from_a_folder_and_a_file_to_a_pruned_checkpoint(gradpruner, tmp_path, tiny_spec, assets_dir):
    """As a new user: three commands, with a model of their own, and nothing is written outside of the folder."""
    done = gradpruner(tmp_path, "init", "x")
    assert done.returncode == 0 and "Run it: cd x && gradpruner run --config my.yaml\n" in done.stdout, done.stderr
    folder = tmp_path / "x"
    copytree(tiny_spec.source(assets_dir), folder / "Llama")
    config = folder / "my.yaml"
    config.write_text(re.sub(r"(?m)^model\.path:.*$", "model.path: ./Llama", config.read_text()))
    short = ("dataset.max_length=128", "dataset.max_train_samples=12", "dataset.max_test_samples=4", "reference=null")
    short += ("evaluate_before=false", "method.steps=2", "method.num_edits=1", "finetune.max_steps=2")
    done = gradpruner(folder, "run", "--config", "my.yaml", *short)
    assert done.returncode == 0, done.stderr
    assert "Checkpoint (plain transformers): result/checkpoint\n" in done.stdout
    assert list((folder / "result/checkpoint").glob("*.safetensors"))
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    own = {"Llama", "my.yaml", "train.jsonl", "test.jsonl"}
    assert {file.name for file in folder.iterdir()} == {*own, "result", ".cache"}


def test_the_commit_of_the_repository_around_an_installation_is_not_ours(tmp_path, monkeypatch):
    assert runtime.environment()["git_commit"]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ("-c", "user.name=x", "-c", "user.email=x@y")
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    (tmp_path / "runtime.py").touch()
    found = runtime.environment()
    assert found["git_commit"] is None and found["git_dirty"] is False


@pytest.mark.slow
def test_the_other_commands_run_from_a_wheel(gradpruner, tmp_path):
    for arguments in (
        ["doctor"],
        ["report", "table=11", "model=tiny_random"],
        ["run", "--help"],
        ["preview", "--help"],
    ):
        done = gradpruner(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    done = gradpruner(tmp_path, "report")
    assert done.returncode == 1 and "for example `gradpruner run experiment=quickstart`" in done.stderr
