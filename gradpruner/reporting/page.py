"""The HTML report: summary, main table, the paper's tables and figures, and a fold for every run.

One file without anything loaded from elsewhere. Its one script, which sorts and filters the main table, is allowed by
its hash.
"""

import base64
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradpruner.caveats import CAVEATS
from gradpruner.record import RunRecord
from gradpruner.reporting import overview
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.headline import Headline
from gradpruner.reporting.headline_plot import caption_of, legend_parts
from gradpruner.reporting.inline_svg import inline_svg
from gradpruner.reporting.main_table import main_table
from gradpruner.reporting.plain_names import plain_header, plain_label
from gradpruner.reporting.published import Published
from gradpruner.reporting.run_details import run_groups
from gradpruner.reporting.tables import Table

TEMPLATES = Path(__file__).parent / "templates"
BOLD = re.compile(r"\*\*(.+?)\*\*")
OWN_SECTIONS = {
    "Other settings": "Other settings of the paper's methods",
    "Importance runs": "Importance runs",
    "Learning rates": "Learning rates",
    "Layer importance": "Layer importance",
    "Pruned layers": "Pruned layers",
    "": "Measured values by setting",
}
# Notes that explain how to read a table rather than what is in it: they move to the top if several sections have them.
EXPLAINS = ("±", "accuracy: ", "similarity: ", "BERTScore", "stemmed", "bold: ", "in brackets: ", "≠", "[]", "[-]")
SAYS_SCALE = "test rows"  # notes with these words are always shown, the others are in a fold


@dataclass(frozen=True)
class Runs:
    """The runs of a page, and what is known of them besides their records.

    Attributes:
        records: finished runs; empty for a page of counts alone.
        label: where the records are from, if they are not the reader's own.
        problems: one line per record that is not shown.
        commands: command of each run, by `id` of its record.
        losses: history of each run's fine-tune, by identity.
        chart: the headline chart.
        panels: its pictures, one per axis.
        published: the paper's tables and figures.
        is_whole: whether the page has every table and figure that has runs, so that the others have none.
    """

    records: Sequence[RunRecord] = ()
    label: str = ""
    problems: Sequence[str] = ()
    commands: Mapping[int, str] = field(default_factory=dict)
    losses: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    chart: Headline | None = None
    panels: Sequence[Picture] = ()
    published: Sequence[Published] = ()
    is_whole: bool = False


@dataclass(frozen=True)
class Block:
    """Tables of one setting: the first is shown, the others are folds.

    Attributes:
        heading: the setting in words.
        tables: tables in order.
    """

    heading: str
    tables: list[Table]


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, or tables of ours.

    Attributes:
        anchor: its id in the page.
        label: `Table 1`; empty for ours.
        title: what it shows.
        blocks: its tables.
        pictures: its figures.
        notes: sentences that hold for all its tables.
    """

    anchor: str
    label: str
    title: str
    blocks: list[Block]
    pictures: list[Picture]
    notes: list[str]


def page(
    title: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture] = (),
    folder: Path = Path(),
    runs: Runs | None = None,
) -> str:
    """Returns the page.

    Args:
        title: title of the page.
        tables: tables in order.
        pictures: figures in order, as SVG files.
        folder: folder of the page, at which relative links start.
        runs: the runs, for summary, main table and folds; None for tables alone.

    Raises:
        ValueError: if a picture is no SVG.
    """
    runs = runs or Runs()
    sections, notes = _sections(tables, pictures, {each.label: each.title for each in runs.published})
    groups = run_groups(runs.records, runs.commands, runs.losses) if runs.records else {}
    anchors = {id(run.record): run.anchor for group in groups.values() for run in group}
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rich": _rich, "plain": plain_label, "svg": _svg, "ident": id, "header": plain_header}
    environment.tests["scale"] = lambda note: SAYS_SCALE in note and not note.startswith("the paper")
    environment.filters["href"] = partial(_href, folder)
    shown = {section.label for section in sections}
    return environment.get_template("report.html.jinja").render(
        title=title,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        runs=runs,
        overview=overview,
        caption=caption_of(runs.chart) if runs.chart else "",
        legend=legend_parts(runs.chart) if runs.chart else [],
        main=main_table(runs.records) if runs.records else None,
        anchors=anchors,
        paper=[section for section in sections if section.label],
        own=[section for section in sections if not section.label],
        notes=notes,
        absent=[f"{each.label} ({each.title})" for each in runs.published if runs.is_whole and each.label not in shown],
        groups=groups,
    )


def _sections(
    tables: Sequence[Table], pictures: Sequence[Picture], titles: Mapping[str, str]
) -> tuple[list[Section], list[str]]:
    """Returns the sections in the paper's order, then ours; and the notes that many of them share."""
    names = list(dict.fromkeys([*(table.section for table in tables), *(picture.name for picture in pictures)]))
    owners: dict[str, set[str]] = {}
    for table in tables:
        for note in table.notes:
            owners.setdefault(note, set()).add(table.section)
    explain = (*EXPLAINS, *CAVEATS.values())
    common = [note for note, sections in owners.items() if len(sections) > 1 and note.startswith(explain)]
    found = []
    for name in sorted(names, key=_place):
        own = [table for table in tables if table.section == name]
        counts = Counter(note for table in own for note in table.notes if note not in common)
        shared = [note for note, count in counts.items() if len(own) > 1 and count == len(own)]
        blocks: dict[str, list[Table]] = {}
        for table in own:
            blocks.setdefault(table.heading or table.title, []).append(
                Table(
                    table.title,
                    table.headers,
                    table.rows,
                    [note for note in table.notes if note not in common and note not in shared],
                    table.sources,
                    aspect=table.aspect,
                )
            )
        is_paper = name.startswith(("Table ", "Figure "))
        found.append(
            Section(
                anchor=re.sub(r"\W+", "-", name.lower()) or "settings",
                label=name if is_paper else "",
                title=titles.get(name, "") if is_paper else OWN_SECTIONS.get(name, name),
                blocks=[Block(heading, each) for heading, each in blocks.items()],
                pictures=[picture for picture in pictures if picture.name == name],
                notes=shared,
            )
        )
    return found, common


def _place(name: str) -> tuple[int, int, int]:
    """Returns the sorting key of a section: tables of the paper, its figures, ours."""
    order = list(OWN_SECTIONS)
    number = re.search(r"\d+", name)
    kinds = [kind for kind, start in enumerate(("Table ", "Figure ")) if name.startswith(start)]
    if kinds and number:
        return kinds[0], int(number[0]), 0
    return 2, order.index(name) if name in order else len(order), 0


def _rich(text: str) -> Markup:
    """Returns the text of a cell with its `**bold**` parts."""
    bold = Markup("<strong>{}</strong>")
    return Markup("").join(bold.format(part) if at % 2 else part for at, part in enumerate(BOLD.split(text)))


def _svg(picture: Picture, name: str) -> Markup:
    return inline_svg(picture.path, name, picture.alt)


def _href(folder: Path, path: Any) -> str:
    return quote(os.path.relpath(path, folder).replace(os.sep, "/"))
