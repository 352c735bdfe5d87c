"""Compare finished runs: one table a setting, one row a method, in the paper's order.

python -m experiments.report
python -m experiments.report runs_dir=results/records/depth output=results/tables/depth.md
"""

import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table as RichTable

from experiments.run import CONF
from gradpruner.files import write_text
from gradpruner.record import RunRecord
from gradpruner.reporting.tables import Table, comparisons


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        records, problems = read_records(Path(cfg.runs_dir))
        tables = comparisons(records)
    except ValueError as error:
        print(f"\nError: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    for table in tables:
        show(table)
    for problem in problems:
        print(problem, file=sys.stderr)
    if cfg.output is not None:
        write_text(Path(cfg.output), "\n".join(table.markdown() for table in tables))
        print(f"Written to {cfg.output}")


def read_records(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """Finished records below a folder, and a line for each one that failed or cannot be read.

    Raises:
        ValueError: if there is no finished record.
    """
    records, problems = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict) or "schema_version" not in data:
                continue  # a plan, a config
            record = RunRecord.from_dict(data, path)
        except ValueError as error:
            problems.append(f"Not shown: {path}: {error}")
            continue
        if record.status == "finished":
            records.append(record)
        else:
            problems.append(f"Not shown: {path} has status {record.status} ({record.error}). Run it again.")
    if not records:
        raise ValueError(
            f"There is no finished run to report, searched {folder.absolute()} for records. Run something first, for "
            "example `python -m experiments.run experiment=quickstart`, or set runs_dir."
            + "".join(f"\n{problem}" for problem in problems)
        )
    return records, problems


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table."""
    rich = RichTable(title=table.title)
    for index, header in enumerate(table.headers):
        rich.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        rich.add_row(*row, style="bold" if row[0].startswith("GradPruner") else "")
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a pipe has no width; do not cut columns for it
    console.print(rich)
    for note in table.notes:
        console.print(f"- {note}", soft_wrap=True)


if __name__ == "__main__":
    main()
