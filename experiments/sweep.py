"""What a sweep (-m) adds to hydra's: it skips excluded cells, continues after a failure, and says how the cells ended.

A job may run in another process (joblib, Slurm), so it writes how it ended to a file in its folder of the sweep.
"""

import io
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.devices import offer_gpus, withdraw_gpus
from experiments.launch import check_launcher, describe_going_on, is_first_node, outlives_sweep
from experiments.paths import check_writable
from experiments.schema import ConfigError
from gradpruner.files import write_json

if TYPE_CHECKING:
    from experiments.sweep_tables import Costs

logger = logging.getLogger(__name__)

FAILURE_FILE = "failed.json"  # error, traceback and overrides of a failed job
FINISHED_FILE = "finished.json"  # overrides of a job that finished or was left out
RUNS_FILE = "runs.json"  # folders of a job's finished runs
COSTS_FILE = "costs.json"  # of a job in a dry run
OF_JOBS = (FAILURE_FILE, FINISHED_FILE, RUNS_FILE, COSTS_FILE)
CELLS_FILE = "cells.json"  # label of each job, in the folder of the sweep
NUM_LISTED = 20
_running: list[tuple[DictConfig, ConfigLoader]] = []  # the sweep that this process has started


class SweepReport(Callback):
    """Callback that lists the failed jobs of a sweep and then exits with 1.

    Args:
        exclude: cells of the sweep to skip, each as values of config groups and keys that occur together:
            `{method: apt, finetune: full}`.
    """

    def __init__(self, exclude: list[dict[str, Any]]) -> None:
        self.exclude = exclude

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Deletes what jobs of an earlier sweep left in the same folder, and offers GPUs to joblib's workers.

        Raises:
            SystemExit: if the folder cannot be written to, or if the launcher cannot start jobs here; hydra turns other
                exceptions of callbacks into warnings.
        """
        try:
            check_launcher(config.hydra.launcher)
            check_writable(**{"hydra.sweep.dir": Path(config.hydra.sweep.dir)})
        except ConfigError as error:
            print(f"\nError: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        for file in [file for name in OF_JOBS for file in _files(config, name)]:
            file.unlink()
        _running.append((config, GlobalHydra.instance().config_loader()))
        write_json(Path(config.hydra.sweep.dir) / CELLS_FILE, _cell_labels(*_running[-1]))
        offer_gpus(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Shows what the cells cost or how they compare; raises SystemExit if a job failed."""
        # Imported here: the tables need libraries for which a typo in the command should not wait.
        from experiments.sweep_tables import Costs, comparison_of, costs_table, show

        forget_sweep()
        labels = _read(Path(config.hydra.sweep.dir) / CELLS_FILE)
        found = {int(file.parent.name): _read(file) for file in _files(config, COSTS_FILE)}
        costs = {f"#{number} {labels[number]}".strip(): Costs.from_dict(found[number]) for number in sorted(found)}
        folders = [Path(run) for file in _files(config, RUNS_FILE) for run in _read(file)]
        for table in [costs_table(costs)] if costs else comparison_of(folders):
            show(table)
        failures = [_read(file) for file in _files(config, FAILURE_FILE)]
        if not failures:
            return
        print(f"\nError: {len(failures)} runs of this sweep failed, the others are done:", file=sys.stderr)
        for failure in sorted(failures, key=lambda failure: int(failure["job"])):
            print(f"  #{failure['job']}: {' '.join(failure['overrides'])}\n    {failure['error']}", file=sys.stderr)
        print("The same command again runs those alone.", file=sys.stderr)
        raise SystemExit(1)


def is_left_out(cfg: DictConfig) -> bool:
    """Returns whether the sweep excludes this job.

    Raises:
        ConfigError: if an excluded cell names something that is neither a config group nor a key.
    """
    hydra_config = HydraConfig.get()
    cells = OmegaConf.to_container(hydra_config.callbacks.sweep.exclude)
    assert isinstance(cells, list)
    return any(all(_value(cfg, key) == value for key, value in cell.items()) for cell in cells)


def _value(cfg: DictConfig, key: str) -> Any:
    choices = HydraConfig.get().runtime.choices
    missing = object()
    value = choices[key] if key in choices else OmegaConf.select(cfg, key, default=missing)
    if value is missing:
        raise ConfigError(
            f"hydra.callbacks.sweep.exclude may name config groups and keys, got {key!r}. Correct it in the "
            "YAML of the experiment."
        )
    return value


def arguments_of(overrides: DictConfig) -> list[str]:
    """Returns the arguments of a job or sweep as they were given, without resolving interpolations in them."""
    found = OmegaConf.to_container(overrides.task, resolve=False)
    assert isinstance(found, list)
    return list(map(str, found))


def cells(overrides: list[Override]) -> list[list[str]]:
    """Returns the arguments of every job of hydra's basic sweeper, in order."""
    jobs: list[list[str]]
    [jobs] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return jobs


def _cell_labels(config: DictConfig, loader: ConfigLoader) -> list[str]:
    """Returns, for each job of a sweep in order, the arguments in which it differs from others."""
    params = config.hydra.sweeper.get("params") or {}
    arguments = [*(f"{key}={value}" for key, value in params.items()), *arguments_of(config.hydra.overrides)]
    jobs = cells(OverridesParser.create(config_loader=loader).parse_overrides(arguments))
    shared = set.intersection(*map(set, jobs))  # which the command that continues the sweep shows
    return [" ".join(argument for argument in job if argument not in shared) for job in jobs]


@contextmanager
def labelled_output() -> Iterator[None]:
    """Begins every line that this job prints or logs with its label, if jobs print at the same time (joblib)."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN or not str(job.launcher._target_).endswith(".JoblibLauncher"):
        yield
        return
    label = f"[#{job.job.num} {_read(Path(job.sweep.dir) / CELLS_FILE)[job.job.num]}] "
    out, err = (_Labelled(stream, label) for stream in (sys.stdout, sys.stderr))
    handlers = [each for each in logging.getLogger().handlers if getattr(each, "stream", None) is sys.stderr]
    with redirect_stdout(out), redirect_stderr(err):
        for handler in handlers:
            handler.setStream(err)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for handler in handlers:
                handler.setStream(err.stream)  # type: ignore[attr-defined]


class _Labelled(io.TextIOBase):
    """Stream that writes a label at the start of every line, also of one that a progress bar draws again."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream, self._label, self._at_start = stream, label, True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def write(self, text: str) -> int:
        if not text:
            return 0
        lines = re.sub(r"[\r\n](?=[^\r\n])", lambda end: end[0] + self._label, text)
        starts = self._at_start and text[0] not in "\r\n"
        self._at_start = text[-1] in "\r\n"
        self.stream.write(self._label + lines if starts else lines)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def describe_broken_off() -> str:
    """Returns how many jobs of the running sweep have finished, and a list of the others; empty without a sweep."""
    if not _running:
        return ""
    config, loader = _running[-1]
    finished, failed = (
        {int(file.parent.name) for file in _files(config, name)} for name in (FINISHED_FILE, FAILURE_FILE)
    )
    labels = _cell_labels(config, loader)
    left = [number for number in range(len(labels)) if number not in finished]
    lines = [f"  #{number}: {labels[number]}{' (failed)' * (number in failed)}" for number in left[:NUM_LISTED]]
    if len(left) > NUM_LISTED:
        lines.append(f"  and {len(left) - NUM_LISTED} more")
    listed = "".join(f"\n{line}" for line in lines)
    done = f"\n{len(finished)} of {len(labels)} runs of this sweep have finished and are kept. Not finished:{listed}"
    folder = Path(config.hydra.sweep.dir, ".submitit")
    return done + (describe_going_on(str(folder)) if outlives_sweep(config.hydra.launcher) else "")


def forget_sweep() -> None:
    """Ends what this process holds for a sweep that it has started, if there is one."""
    _running.clear()
    withdraw_gpus()


def note_costs(costs: "Costs") -> None:
    """Records what this job would take."""
    write_json(Path(HydraConfig.get().runtime.output_dir) / COSTS_FILE, asdict(costs))


def note_runs(folders: Iterable[Path]) -> None:
    """Records the folders of this job's finished runs."""
    write_json(Path(HydraConfig.get().runtime.output_dir) / RUNS_FILE, [str(folder.absolute()) for folder in folders])


def note_finished() -> None:
    """Records that this job needs no more work."""
    if not is_first_node():
        return
    job = HydraConfig.get()
    write_json(Path(job.runtime.output_dir) / FINISHED_FILE, {"overrides": arguments_of(job.overrides)})


def note_failure(error: Exception, is_expected: bool) -> None:
    """Logs and records that this job failed, so that the sweep can continue; logs a traceback for unexpected errors."""
    job = HydraConfig.get()
    logger.error("Job %s failed: %s", job.job.num, error, exc_info=None if is_expected else error)
    if not is_first_node():
        return
    write_json(
        Path(job.runtime.output_dir) / FAILURE_FILE,
        {
            "job": job.job.num,
            "overrides": arguments_of(job.overrides),
            "error": str(error) if is_expected else f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exception(error),
        },
    )


def is_sweep() -> bool:
    """Returns whether this process runs a job of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def place_in_sweep() -> tuple[int, int] | None:
    """Returns the number of this job in its sweep, from 1, and how many jobs there are; None outside a sweep."""
    if not is_sweep():
        return None
    job = HydraConfig.get()
    return int(job.job.num) + 1, len(_read(Path(job.sweep.dir) / CELLS_FILE))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _files(config: DictConfig, name: str) -> list[Path]:
    return list(Path(config.hydra.sweep.dir).glob(f"*/{name}"))
