"""Where a run reports besides its own record. The record is written first; a tracker that fails never fails a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from gradpruner.record import RunRecord

logger = logging.getLogger(__name__)

MODES = ("online", "offline")


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
        group: runs that belong together, such as a sweep.
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
        """Logs the loss curve, then metrics and counts as summary."""
        with _never_fatal():
            import wandb

            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]
                group=self.group,
                dir=self.directory,
                name="/".join(run_dir.parts[-5:]),
                config=record.config,
                reinit="finish_previous",  # wandb merges runs that are not finished
            )
            try:
                for entry in history:
                    values = {f"finetune/{key}": value for key, value in entry.items() if key not in ("step", "epoch")}
                    run.log(values, step=entry["step"])
                summary = asdict(record)
                for part in ("metrics", "metrics_before", "model", "pruning", "finetune", "efficiency"):
                    for key, value in summary[part].items():
                        if isinstance(value, (int, float, str)):
                            run.summary[f"{part}/{key}"] = value
            finally:
                run.finish()


@contextmanager
def _never_fatal() -> Iterator[None]:
    """Turns a tracker's failure into a warning: the run is done and recorded already."""
    try:
        yield
    except Exception as error:
        logger.warning("The tracker failed, the run and its record are complete: %s: %s", type(error).__name__, error)
