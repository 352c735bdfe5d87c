"""Every format has all text of a table, and no text can break the format."""

import csv
import dataclasses
import io
import re

import pytest
from reporting.test_tables import record

from gradpruner.reporting.formats import csv_text, latex, markdown, write_report
from gradpruner.reporting.tables import Table

TABLE = Table(
    "model on arc_easy, 40 %",
    ["method", "accuracy", "train % ↓"],
    [["Dense", "0.637 ±0.024", "100.0"], ["LaCo, rule=code", "**0.463** ±0.025", "71_5"], ['[a], "b"', "-", "-"]],
    ["400 test rows & one seed"],
)


def test_latex_escapes_and_sets_bold():
    text = latex([TABLE])
    assert r"\caption{model on arc\_easy, 40 \%}" in text
    assert r"method & accuracy & train \% $\downarrow$ \\" in text
    assert r"LaCo, rule=code & \textbf{0.463} $\pm$0.025 & 71\_5 \\" in text
    assert r'{[}a{]}, "b" & - & - \\' in text  # a bare [ would be an argument of the line break before it
    assert r"400 test rows \& one seed" in text
    assert r"\begin{tabular}{lrr}" in text and text.count("{") == text.count("}")
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


def test_latex_escapes_every_special_character_once():
    special = Table("\\ ~ ^ < > | # $ { } *", ["a"], [], [])
    caption = re.search(r"\\caption\{(.*)\}\n", latex([special])).group(1)
    assert caption == (
        r"\textbackslash{} \textasciitilde{} \textasciicircum{} \textless{} \textgreater{} \textbar{} \# \$ \{ \} {*}"
    )


def test_csv_reads_back_without_marks():
    rows = list(csv.reader(io.StringIO(csv_text(TABLE))))
    assert rows == [TABLE.headers, *[[cell.replace("**", "") for cell in row] for row in TABLE.rows]]


def test_the_runs_of_each_row_are_named(tmp_path):
    run = dataclasses.replace(record("dense"), path=tmp_path / "runs/a b/record.json")
    copy = dataclasses.replace(record("laco"), path=tmp_path / "records/laco.json")
    copy.environment.update(git_commit="0123456789", git_dirty=True)
    table = dataclasses.replace(TABLE, sources=[[run], [run, copy], []])
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert [row["runs"] for row in rows] == [str(run.path.parent), f"{run.path.parent} {copy.path}", ""]
    assert rows[1]["commits"] == "unknown 0123456789+"

    assert markdown([table]) == markdown([TABLE])


def test_csv_of_tables_with_one_title_are_different_files(tmp_path):
    paths = write_report(tmp_path / "all.csv", "csv", [TABLE] * 2)
    names = ["1-model-on-arc-easy-40.csv", "2-model-on-arc-easy-40.csv"]
    assert [path.relative_to(tmp_path / "all").as_posix() for path in paths] == ["tables.csv", *names]
    titles = list(csv.reader((tmp_path / "all/tables.csv").read_text().splitlines()))
    assert titles == [["file", "title"], *([name, TABLE.title] for name in names)]
    assert write_report(tmp_path / "one.csv", "csv", [TABLE]) == [tmp_path / "one.csv"]


@pytest.mark.parametrize(
    ("form", "text"), [("md", "| Dense |"), ("tex", "Dense &"), ("csv", "Dense,"), ("html", ">Dense<")]
)
def test_every_format_is_written(form, text, tmp_path):
    [path] = write_report(tmp_path / "new" / f"report.{form}", form, [TABLE])
    assert text in path.read_text()


def test_markdown_is_that_of_the_tables():
    assert markdown([TABLE, TABLE]) == f"{TABLE.markdown()}\n{TABLE.markdown()}"


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format must be one of md, tex, csv, html, got 'pdf'"):
        write_report(tmp_path / "a", "pdf", [TABLE])


def test_csv_of_a_table_with_a_long_title_can_be_written(tmp_path):
    long = dataclasses.replace(TABLE, title="x=1, " * 100)
    _, first, second = write_report(tmp_path / "all.csv", "csv", [long, long])
    assert first.is_file() and second.is_file() and len(second.name) < 50
