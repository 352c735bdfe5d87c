"""Compare finished runs: one table a setting, one row a method, in the paper's order. Or one table of the paper.

python -m experiments.report
python -m experiments.report runs_dir=results/records/depth output=results/tables/depth.md
python -m experiments.report table=2                                # time and memory of finished runs
python -m experiments.report table=11                               # counted, no runs needed
python -m experiments.report table=11 model=smollm2_135m plan=results/runs/.../plan.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table as RichTable

from experiments import schema
from experiments.run import CONF
from gradpruner import offline_configs
from gradpruner.files import write_text
from gradpruner.plan import PruningPlan
from gradpruner.record import RunRecord
from gradpruner.reporting.efficiency import counts_table, efficiency_tables
from gradpruner.reporting.tables import Table, comparisons
from gradpruner.shape import config_shape
from gradpruner.width_surgery import planned_shape

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper"
TABLES = ("2", "11")
TABLE_SPARSITY = 0.4


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        tables, problems = build_tables(cfg)
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


def build_tables(cfg: DictConfig) -> tuple[list[Table], list[str]]:
    """The tables that are asked for, and a line for each record that could not be read.

    Raises:
        ValueError: if there is no such table, or nothing to put into it.
    """
    if cfg.table is not None and str(cfg.table) not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, or null for comparisons, got {cfg.table!r}.")
    if str(cfg.table) == "11":
        return [_counts(cfg)], []
    records, problems = read_records(Path(cfg.runs_dir))
    if cfg.table is None:
        return comparisons(records), problems
    tables = efficiency_tables(records, _published("table2"))
    if not tables:
        raise ValueError(
            f"Table 2 compares with the dense model, of which there is no run in {Path(cfg.runs_dir).absolute()}. "
            "Run method=dense with the same settings."
        )
    return tables, problems


def _counts(cfg: DictConfig) -> Table:
    """Table 11 for any model: dense, and pruned by a plan or by layers at the usual sparsities."""
    spec = offline_configs.for_dry_run(schema.build(cfg.model, "model"), Path(cfg.cache_dir) / "assets")
    config = spec.load_config(Path(cfg.cache_dir) / "assets")
    dense = config_shape(config)
    shapes = {"original": dense}
    paper = _published("table11")
    is_papers = spec.path == paper["model"] and cfg.length == paper["length"] and cfg.plan is None
    if cfg.plan is not None:
        plan = PruningPlan.load(Path(cfg.plan))
        shapes[f"{plan.method}, {cfg.plan}"] = planned_shape(dense, plan)
    else:
        for sparsity in cfg.sparsity:
            num_kept = len(dense.layers) - round(sparsity * len(dense.layers))
            label = "pruned" if sparsity == TABLE_SPARSITY else f"pruned, {sparsity:.0%} of layers"
            shapes[label] = replace(dense, layers=dense.layers[:num_kept])
    published = {row: paper[row] for row in ("original", "pruned")} if is_papers else None
    return counts_table(
        f"{spec.name}: work and size (Table 11)", config, shapes, spec.torch_dtype, cfg.length, published
    )


def _published(name: str) -> dict[str, Any]:
    """Published values of a table."""
    values = OmegaConf.to_container(OmegaConf.load(PAPER / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


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
