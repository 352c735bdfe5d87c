"""The committed tables are what the documented commands write, and every one has a command."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import CONF
from experiments.report import build_report
from gradpruner.reporting.formats import markdown

ROOT = CONF.parent
TABLES = ROOT / "results" / "tables"
PREFIX = "python -m experiments.report "
LINES = [line for line in (TABLES / "README.md").read_text().splitlines() if line.startswith(PREFIX)]
COMMANDS = {
    match[1]: shlex.split(line.removeprefix(PREFIX))
    for line in LINES
    if (match := re.search(r"output=results/tables/(\S+)$", line))
}


def test_every_table_has_a_command():
    assert set(COMMANDS) == {path.name for path in TABLES.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_table_is_what_its_command_writes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        report = build_report(compose("report", overrides=[*COMMANDS[name], f"cache_dir={tmp_path}"]))
    assert markdown(report.tables) == (TABLES / name).read_text()


def test_the_chart_of_the_readme_is_what_its_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    [command] = [line.removeprefix(PREFIX) for line in LINES if "headline=" in line]
    overrides = [word for word in shlex.split(command) if not word.startswith("headline=")]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        build_report(compose("report", overrides=[*overrides, f"headline={tmp_path}/headline.svg"]))

    def texts(path):
        return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())

    shown = texts(ROOT / "docs" / "images" / "headline.svg")
    assert shown == texts(tmp_path / "headline.svg") and any("320 training rows" in text for text in shown)
