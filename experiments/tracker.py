"""Trackers, which report a run beyond its record, while it trains and when it is done. A failing one fails no run."""

import json
import logging
import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from hydra.core.hydra_config import HydraConfig

from experiments.recording import TRACKED_FILE
from experiments.sweep import is_sweep
from gradpruner.evaluate.base import PREDICTIONS_FILE
from gradpruner.files import user_path, write_json
from gradpruner.record import RunRecord
from gradpruner.waiting import say_if_waiting

logger = logging.getLogger(__name__)

MODES = ("online", "offline")
NUM_PREDICTIONS = 50  # rows of the table of predictions
PICTURES = ("loss.png", "importance.png")
SECTIONS = ("importance", "recover", "finetune")  # what trains
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")  # environment variables that no message shows
_logged: set[tuple[str, int]] = set()  # sections and steps that wandb's run has


class Tracker(Protocol):
    """Reports runs."""

    def check(self) -> None:
        """Raises ValueError if runs cannot be reported; called before any work."""

    def watch(self, run_dir: Path, config: dict[str, Any]) -> AbstractContextManager[None]:
        """Returns a context in which the losses of a run are reported as they come."""

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Reports a run that has been written to `run_dir`."""


@dataclass(frozen=True)
class NoTracker:
    """A tracker that reports nothing."""

    def check(self) -> None:
        """Does nothing."""

    def watch(self, run_dir: Path, config: dict[str, Any]) -> AbstractContextManager[None]:
        """Returns a context that does nothing."""
        return nullcontext()

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

    def check(self) -> None:
        """Raises ValueError without a login, or if WANDB_MODE names another mode."""
        mode = os.environ.get("WANDB_MODE", self.mode)
        if mode != self.mode:
            raise ValueError(
                f"tracker.mode must be that of WANDB_MODE, got tracker.mode={self.mode} and WANDB_MODE={mode}. Set one "
                "of them to the other, or unset WANDB_MODE."
            )
        if self.mode == "online" and not _has_login():
            raise ValueError(
                "tracker.mode=online needs a login, got no API key. Run `wandb login` or set WANDB_API_KEY, or set "
                "tracker.mode=offline, which needs no account."
            )

    @contextmanager
    def watch(self, run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
        """Logs losses at every step in this context; `log` adds the rest."""
        import wandb

        from experiments.live_curves import live_curves

        with never_fatal():
            self._start(run_dir, config)
        try:
            with live_curves(_log_live):
                yield
        except BaseException:
            with never_fatal():
                wandb.finish(exit_code=1)
            raise

    def _start(self, run_dir: Path, config: dict[str, Any]) -> Any:
        """Returns wandb's run of this name: the one that `watch` started, or a new one."""
        import wandb

        name = run_name(run_dir)
        if wandb.run is not None and wandb.run.name == name:
            return wandb.run
        _logged.clear()
        with say_if_waiting("an answer of Weights & Biases", wandb.Settings().init_timeout):
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]
                group=self.group or _sweep_name(),
                dir=user_path(self.directory),
                name=name,
                config=config,
                reinit="finish_previous",  # wandb merges runs that are not finished
            )
        for section in SECTIONS:  # a run that was resumed logs its first steps last
            run.define_metric(f"{section}/*", step_metric=f"{section}/step")
        return run

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Logs the loss curve, tables of layers and predictions, and pictures; metrics and counts form the summary."""
        with never_fatal():
            import wandb

            run = self._start(run_dir, record.config)
            try:
                for entry in history:
                    _log_step(run, "finetune", entry)
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
            write_json(run_dir / TRACKED_FILE, {"project": self.project, "mode": self.mode, "id": run.id})


def run_name(run_dir: Path) -> str:
    """Returns the name of a run in trackers: the last folders of its path."""
    return "/".join(run_dir.parts[-5:])


def _log_live(section: str, entry: Mapping[str, Any]) -> None:
    import wandb

    if wandb.run is not None:
        with never_fatal():
            _log_step(wandb.run, section, entry)


def _log_step(run: Any, section: str, entry: Mapping[str, Any]) -> None:
    """Logs what a training run said of a step, unless that was logged already."""
    if (section, entry["step"]) not in _logged:
        _logged.add((section, entry["step"]))
        run.log({f"{section}/{key}": value for key, value in entry.items() if key != "epoch"})


def _has_login() -> bool:
    """Returns whether wandb finds an API key where `wandb login` or the user has put it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
def never_fatal() -> Iterator[None]:
    """Turns a tracker's failure into a warning, because the run is already recorded."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        for key in filter(None, map(os.environ.get, SECRETS)):
            reason = reason.replace(key, "***")
        logger.warning("The tracker failed, the run and its record are complete: %s", reason)
