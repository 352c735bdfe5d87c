"""Report files: tables as Markdown, LaTeX or CSV, and tables with figures as one HTML page.

A cell may have `**bold**` parts; CSV files are written without the marks.
"""

import base64
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradpruner.files import slug, write_text
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.tables import Table

FORMATS = ("md", "tex", "csv", "html")
LONGEST_NAME = 120  # characters of a title in a file name; file systems stop at 255 bytes with all that is around it
IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
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
    path: Path, form: str, tables: Sequence[Table], pictures: Sequence[Picture] = (), title: str = "Report"
) -> list[Path]:
    """Writes a report.

    Args:
        path: file to write. Several tables as CSV are written beside it, each with its title appended to the name.
        form: one of `FORMATS`.
        tables: tables in order.
        pictures: pictures to show in HTML; other formats ignore them.
        title: title of the HTML page.

    Returns:
        The files written.

    Raises:
        ValueError: if there is no such format, or a picture is neither PNG nor SVG.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}. Choose one of these.")
    if form == "csv":
        by_name = csv_files(tables)
        alone = len(by_name) == 1
        texts = {path if alone else path.with_name(f"{path.stem}-{name}.csv"): text for name, text in by_name.items()}
    elif form == "html":
        texts = {path: html(title, tables, pictures)}
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


def csv_files(tables: Sequence[Table]) -> dict[str, str]:
    """Returns headers and rows of each table as CSV, by a name made from its title. CSV has no notes."""
    texts: dict[str, str] = {}
    for table in tables:
        stream = io.StringIO()
        plain = [["".join(part for part, _ in _parts(cell)) for cell in row] for row in (table.headers, *table.rows)]
        csv.writer(stream, lineterminator="\n").writerows(plain)
        name = slug(table.title)[:LONGEST_NAME].rstrip("-")
        same = sum(re.fullmatch(rf"{name}(-\d+)?", other) is not None for other in texts)
        texts[f"{name}-{same + 1}" if same else name] = stream.getvalue()
    return texts


def html(title: str, tables: Sequence[Table], pictures: Sequence[Picture] = ()) -> str:
    """Returns one self-contained page, without scripts and without anything loaded from elsewhere.

    Raises:
        ValueError: if a picture is neither PNG nor SVG.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"parts": _parts, "data_uri": _data_uri}
    return environment.get_template("report.html.jinja").render(title=title, tables=tables, pictures=pictures)


def _data_uri(path: Path) -> str:
    if path.suffix not in IMAGE_TYPES:
        raise ValueError(
            f"A picture of an HTML report must be one of {', '.join(IMAGE_TYPES)}, got {path}. Draw it as one of these."
        )
    return f"data:{IMAGE_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _parts(cell: str) -> list[tuple[str, bool]]:
    """Splits the text of a cell into parts, each with whether it is bold."""
    return [(part, index % 2 == 1) for index, part in enumerate(BOLD.split(cell)) if part]
