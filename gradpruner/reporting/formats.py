"""Report files: tables as Markdown, LaTeX or CSV, or everything as one HTML page (`page.py`).

A cell may have `**bold**` parts; CSV files are written without the marks.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from gradpruner.files import slug, write_text
from gradpruner.record import RECORD_FILE, RunRecord
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.page import Runs, page
from gradpruner.reporting.tables import Table

FORMATS = ("md", "tex", "csv", "html")
LONGEST_NAME = 40  # characters of a title in a file name
TITLES_FILE = "tables.csv"  # titles by file, in the folder of several tables
BOLD = re.compile(r"\*\*(.+?)\*\*")
# LaTeX would read `[` or `*` at the start of a row as an argument of the line break before it.
LATEX = str.maketrans(
    {
        **{char: f"\\{char}" for char in "%_&$#{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "*": "{*}"},
        **{"±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\rightarrow$"},
        **{"Δ": r"$\Delta$", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$"},
    }
)


def write_report(
    path: Path,
    form: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture] = (),
    title: str = "Report",
    runs: Runs | None = None,
) -> list[Path]:
    """Writes a report.

    Args:
        path: file to write. Several tables as CSV get a folder of the same name, with a file for each.
        form: one of `FORMATS`.
        tables: tables in order.
        pictures: pictures to show in HTML; other formats ignore them.
        title: title of the HTML page.
        runs: runs of the HTML page, for its summary, its main table and a fold for each.

    Returns:
        The files written.

    Raises:
        ValueError: if there is no such format, or a picture of an HTML page is no SVG.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}. Choose one of these.")
    if form == "csv":
        texts = {path: csv_text(tables[0])} if len(tables) == 1 else csv_files(tables, path.with_suffix(""))
    elif form == "html":
        texts = {path: page(title, tables, pictures, path.parent, runs)}
    else:
        texts = {path: markdown(tables) if form == "md" else latex(tables)}
    for file, text in texts.items():
        write_text(file, text)
    return list(texts)


def markdown(tables: Sequence[Table]) -> str:
    """Returns tables in Markdown."""
    return "\n".join(table.markdown() for table in tables)


def latex(tables: Sequence[Table]) -> str:
    """Returns tables in LaTeX, for a document that loads `booktabs`."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex_cell, cells)) + r" \\"

    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_cell(table.title)}}}",
        r"\small",
        rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
        r"\toprule",
        row(table.headers),
        r"\midrule",
        *map(row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {_latex_cell(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    return "".join(
        rf"\textbf{{{part.translate(LATEX)}}}" if bold else part.translate(LATEX) for part, bold in _parts(text)
    )


def csv_files(tables: Sequence[Table], folder: Path) -> dict[Path, str]:
    """Returns the text of a CSV file for each table, numbered, and of one with their titles."""
    short = [f"{number}-{slug(table.title)[:LONGEST_NAME].rstrip('-')}.csv" for number, table in enumerate(tables, 1)]
    titles = [["file", "title"], *([name, table.title] for name, table in zip(short, tables, strict=True))]
    texts = {folder / name: csv_text(table) for name, table in zip(short, tables, strict=True)}
    return {folder / TITLES_FILE: _csv(titles), **texts}


def csv_text(table: Table) -> str:
    """Returns headers and rows as CSV, with the runs of each row and their commits. CSV has no notes."""
    rows = [["".join(part for part, _ in _parts(cell)) for cell in row] for row in (table.headers, *table.rows)]
    if table.sources:
        rows[0] += ["runs", "commits"]
        for row, records in zip(rows[1:], table.sources, strict=True):
            row += [" ".join(str(place(record)) for record in records), " ".join(map(commit, records))]
    return _csv(rows)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def place(record: RunRecord) -> Path:
    """Returns the folder of a run, or the file of a record by itself."""
    path = record.path or Path()
    return path.parent if path.name == RECORD_FILE else path


def commit(record: RunRecord) -> str:
    """Returns the commit that a run was made from; with `+` if files were changed."""
    found = record.environment.get("git_commit") or "unknown"
    return found + "+" * record.environment.get("git_dirty", False)


def _parts(cell: str) -> list[tuple[str, bool]]:
    """Splits the text of a cell into parts, each with whether it is bold."""
    return [(part, index % 2 == 1) for index, part in enumerate(BOLD.split(cell)) if part]
