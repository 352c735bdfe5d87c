"""The tables of a sweep: a comparison of its cells when it ends, or what they would cost in a dry run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from gradpruner.messages import parameters
from gradpruner.record import RunRecord
from gradpruner.reporting.tables import Table, comparisons

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """A stage of a cell. Cells share a stage if its id is the same.

    Attributes:
        id: hash of what the stage's result depends on.
        seconds: estimated time.
        num_bytes: what the stage leaves on the disk.
        is_cached: whether it is finished already.
    """

    id: str
    seconds: float
    num_bytes: int
    is_cached: bool


@dataclass(frozen=True)
class Costs:
    """What one cell of a sweep would take.

    Attributes:
        num_layers: decoder layers of the pruned model.
        num_parameters: its parameters.
        steps: steps of the fine-tune.
        memory_bytes: estimated peak memory of what trains.
        work: its stages by name.
    """

    num_layers: int
    num_parameters: int
    steps: int
    memory_bytes: int
    work: Mapping[str, Work]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Costs":
        """Builds the costs from the output of `dataclasses.asdict`."""
        return cls(**{**data, "work": {name: Work(**work) for name, work in data["work"].items()}})


def costs_table(cells: Mapping[str, Costs]) -> Table:
    """Returns a row per cell, by label, and their total, in which a stage that several cells share counts once."""
    rows: list[list[str]] = []
    shared: dict[str, Work] = {}
    for label, cell in cells.items():
        work = list(cell.work.values())
        cached = [name for name, each in cell.work.items() if each.is_cached]
        size = (str(cell.num_layers), parameters(cell.num_parameters), f"{cell.steps:,}")
        rows.append([label, *size, *_sums(work, cell.memory_bytes), ", ".join(cached) or "none"])
        shared |= {each.id: each for each in work}
    unique = list(shared.values())
    memory = max(cell.memory_bytes for cell in cells.values())
    total = f"{sum(cell.steps for cell in cells.values()):,}"
    num_cached = f"{sum(each.is_cached for each in unique)} of {len(unique)} stages"
    rows.append([f"{len(cells)} cells", "", "", total, *_sums(unique, memory), num_cached])
    headers = ["cell", "layers", "params", "steps", "hours", "memory GiB", "disk GiB", "cached"]
    return Table(
        "dry run of the sweep",
        headers,
        rows,
        [
            "hours: estimated, of importance runs and fine-tunes that are not cached, at least; disk: of stages that "
            "are not cached; the last row counts stages that cells share once, and has the largest memory",
            "dry_run=true without -m shows all numbers of one cell",
        ],
    )


def _sums(work: list[Work], memory_bytes: int) -> list[str]:
    left = [each for each in work if not each.is_cached]
    hours, num_bytes = sum(each.seconds for each in left) / 3600, sum(each.num_bytes for each in left)
    return [f"{hours:.2f}", f"{memory_bytes / GIB:.2f}", f"{num_bytes / GIB:.2f}"]


def comparison_of(folders: list[Path]) -> list[Table]:
    """Returns the comparison of the finished runs in these folders; no table for fewer than two."""
    records = [RunRecord.load(folder) for folder in dict.fromkeys(folders)]
    finished = [record for record in records if record is not None and record.status == "finished"]
    return comparisons(finished) if len(finished) > 1 else []


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table."""
    rich = RichTable(title=escape(table.title))
    rich.add_column(escape(table.headers[0]), overflow="fold", min_width=16)
    for header in table.headers[1:]:
        rich.add_column(escape(header), justify="right", overflow="fold")
    for row in table.rows:
        rich.add_row(*map(escape, row), style="bold" if row[0].startswith("GradPruner") else "")
    console = console or Console()
    if not console.is_terminal:
        console.width = 1000  # a pipe has no width, and its lines must not wrap
    console.print(rich)
    for note in table.notes:
        console.print(f"- {escape(note)}", soft_wrap=True)
