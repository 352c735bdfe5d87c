"""Where a run reports besides its own record. The record is written first; a tracker that fails never fails a run."""

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
from hydra.types import RunMode

from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.record import RunRecord

logger = logging.getLogger(__name__)

MODES = ("online", "offline")
NUM_PREDICTIONS = 50  # rows of the table of predictions
PICTURES = ("loss.png", "importance.png")


class Tracker(Protocol):
    """Takes a finished run."""

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Reports a run that has been written to `run_dir`."""


@dataclass(frozen=True)
class NoTracker:
    """Reports nowhere."""

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class WandbTracker:
    """Weights & Biases.

    Attributes:
        project: wandb project.
        entity: wandb user or team; None is the default of the account.
        mode: `online`, or `offline` (no account needed; upload later with `wandb sync`).
        group: name for runs that belong together; None: those of a sweep, by the name of its folder.
        directory: where wandb keeps its files.
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
        """Logs the loss curve, tables of layers and predictions, pictures, then metrics and counts as summary."""
        with _never_fatal():
            import wandb

            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]
                group=self.group or _sweep_name(),
                dir=self.directory,
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
    """The name of the sweep's folder, or None outside of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def _layers(record: RunRecord) -> list[list[Any]]:
    """What became of each decoder layer, and its importance where the method has one; the first row is a header."""
    pruned, absorbed_by = set(record.pruning["pruned_layers"]), record.pruning["absorbed_by"]
    importance = record.pruning["layer_importance"]
    rows: list[list[Any]] = [["layer", "importance", "fate"]]
    for layer in range(record.model["num_hidden_layers"]):
        absorber = absorbed_by.get(str(layer))
        dropped = "dropped" if absorber is None else f"merged into {absorber}"
        rows.append([layer, importance[layer] if importance else None, dropped if layer in pruned else "kept"])
    return rows


def _predictions(file: Path) -> list[list[Any]]:
    """The first rows of the predictions; what is not text or a number is written as JSON."""
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, NUM_PREDICTIONS)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


@contextmanager
def _never_fatal() -> Iterator[None]:
    """Turns a tracker's failure into a warning: the run is done and recorded already."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if key := os.environ.get("WANDB_API_KEY"):
            reason = reason.replace(key, "***")
        logger.warning("The tracker failed, the run and its record are complete: %s", reason)
