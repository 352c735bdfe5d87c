"""Compare finished runs, one table per setting and one row per method; or make tables and figures of the paper.

python -m experiments.report
python -m experiments.report runs_dir=results/records/depth output=results/tables/depth.md     # or .tex, .csv, .html
python -m experiments.report table=1                                # or another table of the paper, with its values
python -m experiments.report table=figure6                          # a figure of the paper, as a table
python -m experiments.report table=2                                # time and memory of finished runs
python -m experiments.report table=importance                       # importance runs: layers, certainty, results
python -m experiments.report table=learning_rate                    # the best rate for each method, and for all
python -m experiments.report table=recipe                           # GradPruner+ beside other methods
python -m experiments.report table=11                               # counted, needs no runs
python -m experiments.report table=11 model=smollm2_135m plan=results/runs/.../plan.json
python -m experiments.report figure=plans                           # or importance, 1, 2, 5, 6, 7, 8, 9
python -m experiments.report figure=5 'methods=[igia_only,last]'    # with other methods than the paper's
python -m experiments.report output=report.html                     # one page with everything there is to show
python -m experiments.report headline=chart.svg                     # its chart alone, or .png
python -m experiments.report 'runs_dir=[one/folder,another]'        # runs of several folders
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments import schema
from experiments.cli import command_of
from experiments.command_line import run_command
from experiments.config import CONF, resolve
from experiments.paths import check_writable, path_setting
from experiments.places import home, shipped
from experiments.recording import HISTORY_FILE
from experiments.records import find_records
from experiments.report_page import runs_of_page
from experiments.sweep_tables import show
from gradpruner.models import offline_configs
from gradpruner.models.shape import config_shape
from gradpruner.plan import PruningPlan
from gradpruner.record import RECORD_FILE, RunRecord
from gradpruner.reporting.appendix import appendix_tables
from gradpruner.reporting.comparison_figures import FIGURES, MODELS, draw
from gradpruner.reporting.efficiency import counts_table, efficiency_tables
from gradpruner.reporting.figures import Picture
from gradpruner.reporting.formats import FORMATS, TITLES_FILE, write_report
from gradpruner.reporting.headline import headline
from gradpruner.reporting.headline_plot import write_headline
from gradpruner.reporting.importance_table import importance_tables
from gradpruner.reporting.learning_rate_table import learning_rate_tables
from gradpruner.reporting.page import Runs
from gradpruner.reporting.paper_tables import paper_table
from gradpruner.reporting.published import Published, load_published
from gradpruner.reporting.recipe_table import recipe_tables
from gradpruner.reporting.row_scores import read_numbers
from gradpruner.reporting.tables import Table, comparisons
from gradpruner.width_surgery import planned_shape

PAPER = shipped("paper", "results/paper")
FIGURES_DIR = "results/figures"
CHART_TYPES = (".svg", ".png")
# Folder of the committed records that a table is made of where there are no runs. Figures and `all` take every record.
COMMITTED_OF = {"2": "methods", "importance": "importance", "learning_rate": "learning_rate", "recipe": "recipe"}
PRESETS = "small"  # folder of all other tables
TABLES = (*(str(number) for number in range(1, 14)), *(f"figure{number}" for number in (5, 6, 7, 8, 9)))
ALL = "all"
# Tables that the paper does not have: the function that makes each, and the runs it needs (from `experiment=NAME`).
OURS = {
    "importance": (importance_tables, "runs that rank layers by gradients"),
    "learning_rate": (learning_rate_tables, "runs that differ in the learning rate of the fine-tune alone"),
    "recipe": (recipe_tables, "runs of GradPruner+ and of other methods"),
}
TABLE_SPARSITY = 0.4


@dataclass(frozen=True)
class Report:
    """The requested tables and figures.

    Attributes:
        tables: tables, in order of display.
        pictures: figures that were drawn.
        problems: one line per record that could not be read.
        page_tables: tables of the HTML page, which has all of them if none was asked for.
        runs: what the HTML page shows besides; None for a page of counts alone, and for other formats.
    """

    tables: list[Table]
    pictures: list[Picture]
    problems: list[str]
    page_tables: list[Table] = field(default_factory=list)
    runs: Runs | None = None


def main() -> None:
    """Runs the command."""
    run_command(hydra_job, "report", "experiments.report")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def hydra_job(cfg: DictConfig) -> None:
    """Prints and writes the report."""
    try:
        resolve(cfg)
        if cfg.output is not None:
            check_writable(output=path_setting(cfg, "output").parent)
        with tempfile.TemporaryDirectory() as scratch:
            report = build_report(cfg, Path(scratch))
            for table in report.tables:
                show(table)
            written = [picture.path for picture in report.pictures if not picture.path.is_relative_to(scratch)]
            if cfg.output is not None:
                path = path_setting(cfg, "output")
                form = path.suffix.removeprefix(".")
                tables = report.page_tables if form == "html" else report.tables
                written += write_report(path, form, tables, report.pictures, cfg.title, report.runs)
                if form == "csv" and len(report.tables) > 1:
                    print(f"{len(report.tables)} tables: one CSV file for each, and {TITLES_FILE} with their titles")
    except (ValueError, OSError) as error:
        print(f"\nError: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    for problem in report.problems:
        print(problem, file=sys.stderr)
    for file in written:
        print(f"Written: {file}")


def build_report(cfg: DictConfig, scratch: Path | None = None) -> Report:
    """Makes the tables and draws the figures.

    Args:
        cfg: the config.
        scratch: temporary folder for the figures of an HTML page, which holds them itself.

    Raises:
        ValueError: if the table, figure or format is unknown, or if no run fits into it.
    """
    table_name, figure = (None if value is None else str(value) for value in (cfg.table, cfg.figure))
    for key, name, known in (("table", table_name, (*TABLES, *OURS, ALL)), ("figure", figure, (*FIGURES, ALL))):
        if name is not None and name not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, or null, got {name!r}.")
    form = Path(cfg.output or "report.md").suffix.removeprefix(".")
    if form not in FORMATS:
        raise ValueError(f"output must end with one of {', '.join(FORMATS)}, got {cfg.output}. Name it so.")
    if cfg.headline is not None:
        return _headline_alone(cfg)
    if table_name == "11" and figure is None:
        counts = [_counts(cfg)]
        return Report(counts, [], [], counts)
    is_page = form == "html"
    everything = figure is not None or table_name == ALL
    found = find_records(cfg, "" if everything else COMMITTED_OF.get(table_name or "", PRESETS))
    records, problems = _of_methods(found.records, cfg.methods), found.problems
    histories = _histories(records, problems) if figure is not None or is_page else {}
    is_whole = is_page and table_name is None and figure is None  # a page has everything if nothing was asked for
    tables, page_tables, pictures = [], [], []
    if table_name is not None or figure is None:
        tables = page_tables = _tables(cfg, table_name, list(records.values()), found.where)
    if is_whole:
        page_tables = _tables(cfg, ALL, list(records.values()), found.where)
    if figure is not None or is_whole:
        pictures = _pictures(cfg, figure, records, histories, scratch if is_page else None)
    runs = None
    if is_page:
        drawn_in = scratch or _figures_folder(cfg)
        runs = runs_of_page(list(records.values()), histories, PAPER, drawn_in, found.label, problems)
        runs = replace(runs, is_whole=is_whole)
    elif found.label:
        tables = [replace(table, notes=[*table.notes, found.label]) for table in tables]
        pictures = [replace(picture, caption=f"{picture.caption} {found.label}.") for picture in pictures]
    return Report(tables, pictures, problems, page_tables, runs)


def _headline_alone(cfg: DictConfig) -> Report:
    """Draws the chart that opens the HTML page into a file of its own."""
    path = path_setting(cfg, "headline")
    if path.suffix not in CHART_TYPES:
        raise ValueError(f"headline must end with one of {', '.join(CHART_TYPES)}, got {cfg.headline}. Name it so.")
    check_writable(headline=path.parent)
    found = find_records(cfg, "")
    records = _of_methods(found.records, cfg.methods)
    chart = headline(list(records.values()), [_published(name) for name in ("1", "2", "11")])
    if chart is None:
        raise ValueError(
            f"The headline chart shows runs of methods that prune, got none among {len(records)} in "
            f"{found.where}. Run one, or set runs_dir."
        )
    return Report([], [write_headline(chart, path)], found.problems)


def _of_methods(records: dict[Path, RunRecord], methods: Sequence[str] | None) -> dict[Path, RunRecord]:
    """Returns the runs of these methods and of dense, or all for None.

    Raises:
        ValueError: if one of the methods has no run.
    """
    if methods is None:
        return records
    known = {run.pruning["method"] for run in records.values()}
    if unknown := [method for method in methods if method not in known]:
        raise ValueError(
            f"methods must be among those that were run, {', '.join(sorted(known))}, got {', '.join(unknown)}. "
            "Correct it, run it, or set runs_dir."
        )
    return {path: run for path, run in records.items() if run.pruning["method"] in ("dense", *methods)}


def _tables(cfg: DictConfig, name: str | None, records: list[RunRecord], where: str) -> list[Table]:
    """Returns the table `name`; for None the comparisons; for `all` every table that has runs.

    Args:
        cfg: the config.
        name: name of the table.
        records: finished runs.
        where: the folders that they are in, for messages.
    """
    if name == "11":
        return [_counts(cfg)]
    everything = records
    if name != "2":
        records = runs_of(records)
    if name is None:
        return comparisons(records)
    if name == ALL:
        of_paper = itertools.chain.from_iterable(
            _paper_tables(each, everything if each == "2" else records) for each in TABLES if each != "11"
        )
        others = appendix_tables([_published(each) for each in TABLES], records)
        ours = itertools.chain.from_iterable(make(records) for make, _ in OURS.values())
        return [*comparisons(records), *of_paper, *others, *ours, _counts(cfg)]
    if tables := OURS[name][0](records) if name in OURS else _paper_tables(name, records):
        is_own = name in OURS or name == "2"
        return tables if is_own else [*tables, *appendix_tables([_published(name)], records)]
    if name in OURS:
        raise ValueError(
            f"table={name} needs {OURS[name][1]}, got none among {len(records)} in {where}. Run "
            f"`{_run()} -m experiment={name}`, or set runs_dir."
        )
    if name == "2":
        raise ValueError(
            f"Table 2 compares with the dense model, of which there is no run in {where}. "
            "Run method=dense with the same settings."
        )
    published = _published(name)
    methods = ", ".join(dict.fromkeys(str(row.coordinates["method"]) for row in published.rows))
    raise ValueError(
        f"{published.label} ({published.title}) needs runs of {methods} by {published.axis}, got none that fit among "
        f"{len(records)} in {where}. Run `{_run()} -m experiment={_file_name(name)}`, or set "
        "runs_dir."
    )


def _run() -> str:
    return " ".join(command_of("experiments.run"))


def _paper_tables(name: str, records: list[RunRecord]) -> list[Table]:
    published = _published(name)
    return efficiency_tables(records, published) if name == "2" else paper_table(published, records)


def _published(name: str) -> Published:
    return load_published(PAPER, _file_name(name))


def _file_name(name: str) -> str:
    return name if name.startswith("figure") else f"table{name}"


def _histories(records: dict[Path, RunRecord], problems: list[str]) -> dict[str, list[dict[str, float]]]:
    """Returns the losses of runs by identity; adds histories that cannot be read to the problems."""
    histories = {}
    for path, run in records.items():
        try:
            if run.finetune and (history := _history(run, path)):
                histories[run.identity] = history
        except (OSError, ValueError) as error:
            problems.append(f"Not drawn: {path.parent / HISTORY_FILE}: {error}. Run it again.")
    return histories


def _figures_folder(cfg: DictConfig) -> Path:
    """Returns `figures_dir`, or a folder beside the report that is written, or that of our own figures."""
    if cfg.figures_dir is not None:
        return path_setting(cfg, "figures_dir")
    if cfg.output is None:
        return Path(home(FIGURES_DIR))
    output = path_setting(cfg, "output")
    return output.with_name(f"{output.stem}-figures")


def _pictures(
    cfg: DictConfig,
    figure: str | None,
    records: dict[Path, RunRecord],
    histories: dict[str, list[dict[str, float]]],
    scratch: Path | None,
) -> list[Picture]:
    """Draws one figure, or for `all` every figure that has runs.

    Args:
        cfg: the config.
        figure: name of the figure; None for all without a word on those that have no runs.
        records: finished runs by file.
        histories: losses by identity.
        scratch: temporary folder for the figures of an HTML page; None to keep them as PNG files.
    """
    folder, runs = _figures_folder(cfg) if cfg.figures_dir or scratch is None else scratch, runs_of(records.values())
    check_writable(figures_dir=folder)
    suffix = ".png" if scratch is None else ".svg"
    methods = None if cfg.methods is None else list(cfg.methods)
    if figure not in (ALL, None):
        return draw(figure, runs, folder, histories, methods, suffix)
    pictures = []
    for name in FIGURES:
        if name == "8" and not any(run.config["model"]["path"] == MODELS["8"] for run in runs):
            continue  # the same figure as 5
        try:
            pictures += draw(name, runs, folder, histories, methods, suffix)
        except ValueError as error:
            if figure == ALL:
                print(f"Not drawn: {error}", file=sys.stderr)
    return pictures


def runs_of(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Returns the records of runs, without those that hold timings alone.

    Raises:
        ValueError: if there is no other.
    """
    runs = [record for record in records if record.finetune]
    if not runs:
        raise ValueError(
            "The tables and figures of results need runs, got records of timings alone (`make test-gpu`). Set table=2, "
            "which shows timings, or runs_dir."
        )
    return runs


def _history(run: RunRecord, path: Path) -> list[dict[str, float]]:
    """Returns the loss of each step of a run's fine-tune, from its record or, for older records, from its folder."""
    if "losses" in run.finetune:
        losses = read_numbers(run.finetune["losses"])
        return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    file = path.parent / HISTORY_FILE
    return json.loads(file.read_text()) if path.name == RECORD_FILE and file.is_file() else []


def _counts(cfg: DictConfig) -> Table:
    """Makes Table 11 for any model: dense, and pruned by a plan or at each sparsity of `cfg.sparsity`."""
    assets = path_setting(cfg, "cache_dir") / "assets"
    spec = offline_configs.for_dry_run(schema.build(cfg.model, "model"), assets)
    config = spec.load_config(assets)
    dense = config_shape(config)
    shapes = {"original": dense}
    paper = load_published(PAPER, "table11").select(model=spec.path, length=cfg.length) if cfg.plan is None else []
    if cfg.plan is not None:
        plan = _load_plan(path_setting(cfg, "plan"))
        shapes[f"{plan.method}, {cfg.plan}"] = planned_shape(dense, plan)
    else:
        for sparsity in cfg.sparsity:
            num_kept = len(dense.layers) - round(sparsity * len(dense.layers))
            label = "pruned" if sparsity == TABLE_SPARSITY else f"pruned, {sparsity:.0%} of layers"
            shapes[label] = replace(dense, layers=dense.layers[:num_kept])
    published = dict(zip(("original", "pruned"), (row.values for row in paper), strict=True)) if paper else None
    return counts_table(
        f"{spec.name}: work and size (Table 11)", config, shapes, spec.torch_dtype, cfg.length, published
    )


def _load_plan(file: Path) -> PruningPlan:
    try:
        return PruningPlan.load(file)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"plan must be the plan.json of a run, got {file.absolute()}: {error}. Set plan.") from error


if __name__ == "__main__":
    main()
