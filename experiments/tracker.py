"""Trackers, which report a run beyond its record. The record is written first, so a failing tracker fails no run."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig

from experiments.sweep import is_sweep
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import user_path
from gradpruner.record import RunRecord
from gradpruner.waiting import say_if_waiting

logger = logging.getLogger(__name__)

MODES = ("online", "offline")
NUM_PREDICTIONS = 50  # rows of the table of predictions
PICTURES = ("loss.png", "importance.png")


class Tracker(Protocol):
    """Reports finished runs."""

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Reports a run that has been written to `run_dir`."""


@dataclass(frozen=True)
class NoTracker:
    """A tracker that reports nothing."""

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class WandbTracker:
    """A tracker for Weights & Biases.

    Attributes:
        project: wandb project.
        entity: wandb user or team; None: the default of the account.
        mode: `online`, or `offline` (no account needed; upload later with `wandb sync`).
        group: name for runs that belong together; None: the name of the sweep's folder, in a sweep.
        directory: folder for wandb's files.
    """

    project: str = "gradpruner"
    entity: str | None = None
    mode: str = "online"
    group: str | None = None
    directory: str = "results"

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown mode."""
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode must be one of {', '.join(MODES)}, got {self.mode!r}.")

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Logs the loss curve, tables of layers and predictions, and pictures; metrics and counts form the summary."""
        with _never_fatal():
            import wandb

            with say_if_waiting("an answer of Weights & Biases", wandb.Settings().init_timeout):
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    mode=self.mode,  # type: ignore[arg-type]
                    group=self.group or _sweep_name(),
                    dir=user_path(self.directory),
                    name="/".join(run_dir.parts[-5:]),
                    config=record.config,
                    reinit="finish_previous",  # wandb merges runs that are not finished
                )
            try:
                for entry in history:
                    values = {f"finetune/{key}": value for key, value in entry.items() if key not in ("step", "epoch")}
                    run.log(values, step=entry["step"])
                tables = {"layers": _layers(record), "predictions": _predictions(run_dir / PREDICTIONS_FILE)}
                pictures = [run_dir / name for name in PICTURES if (run_dir / name).is_file()]
                run.log(
                    {name: wandb.Table(columns=rows[0], data=rows[1:]) for name, rows in tables.items()}
                    | {path.stem: wandb.Image(str(path)) for path in pictures}
                )
                summary = asdict(record)
                for part in ("metrics", "metrics_before", "model", "pruning", "finetune", "efficiency"):
                    for key, value in summary[part].items():
                        if isinstance(value, (int, float, str)):
                            run.summary[f"{part}/{key}"] = value
            finally:
                run.finish()


def _sweep_name() -> str | None:
    """Returns the name of the sweep's folder, or None outside a sweep."""
    return Path(HydraConfig.get().sweep.dir).name if is_sweep() else None


def _layers(record: RunRecord) -> list[list[Any]]:
    """Returns a header, then each decoder layer with its importance, if the method has one, and its fate."""
    pruned, absorbed_by = set(record.pruning["pruned_layers"]), record.pruning["absorbed_by"]
    importance = record.pruning["layer_importance"]
    rows: list[list[Any]] = [["layer", "importance", "fate"]]
    for layer in range(record.model["num_hidden_layers"]):
        absorber = absorbed_by.get(str(layer))
        dropped = "dropped" if absorber is None else f"merged into {absorber}"
        rows.append([layer, importance[layer] if importance else None, dropped if layer in pruned else "kept"])
    return rows


def _predictions(file: Path) -> list[list[Any]]:
    """Returns a header and the first predictions; values other than text and numbers are written as JSON."""
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, NUM_PREDICTIONS)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


@contextmanager
def _never_fatal() -> Iterator[None]:
    """Turns a tracker's failure into a warning, because the run is already recorded."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if key := os.environ.get("WANDB_API_KEY"):
            reason = reason.replace(key, "***")
        logger.warning("The tracker failed, the run and its record are complete: %s", reason)
