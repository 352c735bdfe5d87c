"""Writes `docs/bad-inputs.md`, a table of every test marked `bad_input`: `python tests/bad_inputs.py`.

    @pytest.mark.bad_input("Checkpoints", "a Git LFS pointer in place of weights", "error: is a Git LFS pointer")

The words are: one of `AREAS`; what a user gives; what they get, which the test must check. Both may name parameters of
the test in braces. Without the last, the test's parameter `match` is taken to be the start of an error.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/bad-inputs.md"
AREAS = ("Checkpoints", "What is saved", "Own data", "Paths and overrides", "Sweeps and records", "Waiting")
INTRODUCTION = """# Unusual, damaged or wrong inputs

Each line is a test: somebody's input of that kind ended in a wrong number, a traceback or silence, here or in a similar
tool. What begins with "error" ends the command with exit code 1 and a message of three parts (what is wrong, what was
given, what to do) before any weight is loaded. `python tests/bad_inputs.py` writes this page, and a test keeps it equal
to the tests.
"""


class Collector:
    """A pytest plugin that keeps the marked tests."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {area: {} for area in AREAS}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Reads the words of every mark."""
        for item in items:
            for mark in item.iter_markers("bad_input"):
                params = item.callspec.params if hasattr(item, "callspec") else {}
                area, given, gets = _words(params, *mark.args)
                self.rows[area][given] = gets


def make_page() -> str:
    """Returns the page's text.

    Raises:
        ValueError: If a test file cannot be collected.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.bad_input" in path.read_text()]
    collector, output = Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "", *files], [collector])
    if code:
        raise ValueError(f"the tests cannot be collected: {output.getvalue()}")
    count = sum(map(len, collector.rows.values()))
    parts = [INTRODUCTION, f"{count} inputs are tried.\n"]
    for area, rows in collector.rows.items():
        if rows:
            lines = [f"| {_cell(given)} | {_cell(gets)} |" for given, gets in rows.items()]
            parts.append("\n".join([f"## {area}\n", "| given | gets |", "| --- | --- |", *lines, ""]))
    return "\n".join(parts)


def _words(params: dict[str, Any], area: str, given: str, gets: str | None = None) -> tuple[str, str, str]:
    if gets is None:
        gets = "error: " + re.sub(r"\\(.)", r"\1", params["match"].replace(".*", " … "))
        return area, given.format(**params), gets
    return area, given.format(**params), gets.format(**params)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(make_page())
    sys.stdout.write(f"Written: {PAGE.relative_to(ROOT)}\n")
