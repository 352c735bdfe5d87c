"""Lists the cells of a sweep: which are done, running, failed (and why) or missing, and how to continue.

    python -m experiments.status -m experiment=table1 scale=paper      # the arguments of the sweep
    python -m experiments.status results/sweeps/2026-11-27_10-00-00-1a2b3c4d    # or its folder

A cell is the same run whichever sweep or command made it, so this reads what is in `results_dir` and asks no launcher:
it works on any machine that sees the folders. The exit status is 0 if all cells are done, else 1.
"""

import copy
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console
from rich.table import Table

from experiments.cli import command_of
from experiments.command_line import run_command
from experiments.config import build_pipeline, composing, identity, reference_configs, run_directory
from experiments.launch import config_dir_arguments
from experiments.recording import RUNNING_FILE, is_complete
from experiments.schema import ConfigError
from experiments.sweep import FAILURE_FILE, arguments_of, cells, is_left_out
from gradpruner.files import content_hash
from gradpruner.lease import find_holder
from gradpruner.messages import one_line
from gradpruner.record import CONFIG_FILE, RunRecord

STATES = ("done", "running", "failed", "missing")
STYLES = {"done": "green", "running": "yellow", "failed": "red", "missing": "dim"}
LONG_SWEEP = 20  # cells whose configs take some seconds to compose
SWEEP_FILE = "multirun.yaml"  # hydra's, in the folder of a sweep


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        number: its place in the sweep, which is also its folder there.
        arguments: those in which it differs from other cells.
        state: one of `STATES`.
        detail: where it runs, why it failed, or what it left.
    """

    number: int
    arguments: str
    state: str
    detail: str = ""


def main() -> None:
    """Runs the command."""
    given = sys.argv[1:]
    if len(given) == 1 and "=" not in given[0] and not given[0].startswith("-"):
        run_command(lambda: _show(_arguments_of_folder(Path(given[0]))), "config", "experiments.status", check=False)
    else:
        run_command(lambda: _show(sys.argv[1:], given), "config", "experiments.status")


def _show(arguments: list[str], given: list[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: those of the sweep, as hydra reads them.
        given: the same as the user wrote them; None: as hydra reads them.
    """
    found = list(find_cells(arguments))
    table = Table()
    for column in ("#", "state", "cell", ""):
        table.add_column(column, justify="right" if column == "#" else "left", overflow="fold")
    for cell in found:
        table.add_row(str(cell.number), f"[{STYLES[cell.state]}]{cell.state}[/]", cell.arguments, cell.detail)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    counts = Counter(cell.state for cell in found)
    console.print(", ".join(f"{counts[state]} {state}" for state in STATES) + f" of {len(found)} cells")
    if counts["done"] < len(found):
        command = shlex.join([*command_of("experiments.run"), *(arguments if given is None else given)])
        print(f"To continue: {command}")
        raise SystemExit(1)


def find_cells(arguments: list[str]) -> Iterator[Cell]:
    """Yields the cells of the sweep that `experiments.run` makes of these arguments, without those that it excludes.

    Raises:
        ConfigError: if the arguments cannot be composed.
    """
    parsed = get_args_parser().parse_args(arguments)
    with composing(parsed.config_dir) as loader:
        sweep = loader.load_configuration("config", parsed.overrides, RunMode.MULTIRUN)
        params = sweep.hydra.sweeper.get("params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *arguments_of(sweep.hydra.overrides)]
        jobs = cells(OverridesParser.create(config_loader=loader).parse_overrides(given))
        if len(jobs) > LONG_SWEEP:
            print(f"Composing the configs of {len(jobs)} cells ...", file=sys.stderr)
        failures, shared = _failures(Path(sweep.hydra.sweep.dir).parent), set.intersection(*map(set, jobs))
        for number, job in enumerate(jobs):
            own = " ".join(argument for argument in job if argument not in shared)
            cfg = _job_config(loader, sweep, job, number)
            try:
                if not is_left_out(cfg):
                    yield Cell(number, own, *_state(cfg, failures.get(frozenset(job))))
            except ValueError as error:  # the run would be refused
                yield Cell(number, own, "failed", str(error))


def _job_config(loader: ConfigLoader, sweep: DictConfig, overrides: list[str], number: int) -> DictConfig:
    """Returns the config that hydra gives a job, and sets hydra's own node as in that job."""
    cfg: DictConfig = loader.load_sweep_config(sweep, overrides)
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        HydraConfig.instance().set_config(copy.copy(cfg))
        del cfg["hydra"]
    return cfg


def _state(cfg: DictConfig, failure: str | None) -> tuple[str, str]:
    """Returns state and detail of a cell.

    Args:
        cfg: its config.
        failure: error of its last failure in a sweep, if there was one.
    """
    pipeline = build_pipeline(cfg)
    run_dir = run_directory(cfg, pipeline)
    record = RunRecord.load(run_dir)
    if record is not None and record.identity != content_hash(identity(cfg)):
        return "failed", f"{run_dir} holds a run with another config"
    if record is not None and is_complete(record, run_dir, cfg):
        return "done", ""
    first = [(each, build_pipeline(each)) for each in reference_configs(cfg, pipeline.method.name)]
    folders = {run_dir: ""} | {run_directory(*arm): f", first {arm[1].method.name}" for arm in first}
    for folder, what in folders.items():
        holder = find_holder(folder / RUNNING_FILE)
        if holder is not None and holder.is_alive:
            return "running", f"{holder}{what}"
    if record is not None and record.status == "failed":
        return "failed", str(record.error)
    if failure is not None:
        return "failed", failure
    if record is not None:
        return "missing", "finished without the checkpoint or speed that is asked for"
    return "missing", "broken off, and will be resumed" if (run_dir / CONFIG_FILE).is_file() else ""


def _failures(sweeps: Path) -> dict[frozenset[str], str]:
    """Returns the errors of failed jobs in the folders of sweeps, by the job's arguments; the last one of each."""
    files = sorted(sweeps.glob(f"*/*/{FAILURE_FILE}"), key=lambda file: file.stat().st_mtime)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {frozenset(each["overrides"]): " ".join(each["error"].split()) for each in found}


def _arguments_of_folder(folder: Path) -> list[str]:
    """Returns the arguments of the sweep that wrote a folder.

    Raises:
        ConfigError: if no sweep wrote it.
    """
    try:
        sweep = OmegaConf.load(folder / SWEEP_FILE)
        own, task = (list(map(str, sweep.hydra.overrides[key])) for key in ("hydra", "task"))
        options = config_dir_arguments(sweep.hydra.runtime.config_sources)
    except Exception as error:
        raise ConfigError(
            f"Give the arguments of a sweep or the folder of one, got {folder} ({one_line(error)}). Folders of sweeps "
            f"are in results/sweeps and hold {SWEEP_FILE}."
        ) from error
    return ["-m", *options, *(each for each in own if not each.startswith("hydra.mode=")), *task]


if __name__ == "__main__":
    main()
