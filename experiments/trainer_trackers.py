"""Trackers that the Trainer has an integration for: TensorBoard and Trackio.

    python -m experiments.run experiment=quickstart tracker=tensorboard
    tensorboard --logdir results/runs

The integration reports losses while a stage trains, each stage as a run of its own; metrics follow when all is done.
The packages are optional, and imported only where a run uses them.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.recording import TENSORBOARD_FOLDER, TRACKED_FILE
from experiments.schema import ConfigError
from experiments.tracker import never_fatal, run_name
from gradpruner.files import write_json
from gradpruner.record import RunRecord

SCALARS = ("metrics", "metrics_before", "model", "pruning", "finetune")  # sections of a record


@dataclass(frozen=True)
class TensorBoardTracker:
    """A tracker that writes files for TensorBoard into the run folder."""

    def check(self) -> None:
        """Raises ConfigError if the package is not installed."""
        check_package("tensorboard")

    @contextmanager
    def watch(self, run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
        """Reports losses at every step in this context."""
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        from experiments.live_curves import reported_to

        def make(section: str, args: Any, step: int) -> Any:
            # A resumed training writes again what an interrupted one wrote after its last checkpoint.
            writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER / section), purge_step=step + 1 if step else None)
            return TensorBoardCallback(writer), args

        with reported_to(make, never_fatal):
            yield

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Writes settings and metrics, and the losses of a fine-tune that was not watched."""
        with never_fatal():
            from torch.utils.tensorboard import SummaryWriter

            folder = run_dir / TENSORBOARD_FOLDER
            if not (folder / "finetune").is_dir():
                with SummaryWriter(str(folder / "finetune")) as writer:
                    for entry in history:
                        for key in ("loss", "learning_rate", "grad_norm"):
                            if key in entry:
                                writer.add_scalar(f"train/{key}", entry[key], int(entry["step"]))
            with SummaryWriter(str(folder)) as writer:
                settings = {key: value for key, value in _flat(record.config).items() if not isinstance(value, list)}
                writer.add_hparams(settings, _scalars(record), run_name=".")
            write_json(run_dir / TRACKED_FILE, {"folder": TENSORBOARD_FOLDER})


@dataclass(frozen=True)
class TrackioTracker:
    """A tracker for Trackio, which keeps runs on this machine or in a Space of the Hub.

    Attributes:
        project: project of the runs.
        space_id: Space to report to, `owner/name`; None: this machine, in the folder that TRACKIO_DIR names.
    """

    project: str = "gradpruner"
    space_id: str | None = None

    def check(self) -> None:
        """Raises ConfigError if the package is not installed."""
        check_package("trackio")

    @contextmanager
    def watch(self, run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
        """Reports losses at every step in this context."""
        from transformers.integrations import TrackioCallback

        from experiments.live_curves import reported_to

        def make(section: str, args: Any, step: int) -> Any:
            own = copy.copy(args)
            own.project, own.run_name = self.project, f"{run_name(run_dir)}/{section}"
            own.trackio_space_id, own.trackio_static_space_id = self.space_id, False
            return TrackioCallback(), own

        with reported_to(make, never_fatal):
            yield

    def log(self, record: RunRecord, history: list[dict[str, Any]], run_dir: Path) -> None:
        """Reports settings, metrics and the loss curve as a run of its own."""
        with never_fatal():
            import trackio

            name = run_name(run_dir)
            trackio.init(
                project=self.project, name=name, space_id=self.space_id, resume="allow", config=_flat(record.config)
            )
            try:
                for entry in history:
                    trackio.log({f"finetune/{key}": value for key, value in entry.items() if key != "epoch"})
                trackio.log(_scalars(record))
            finally:
                trackio.finish()
            write_json(run_dir / TRACKED_FILE, {"project": self.project, "name": name})


def check_package(name: str) -> None:
    """Raises ConfigError with the pip command if the package of a tracker is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"tracker={name} needs the package {name}, got an environment without it. Install it with: pip install "
            f"'gradpruner[{name}]', or leave tracker out: the record in the run folder has all numbers."
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the settings of a config by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _scalars(record: RunRecord) -> dict[str, float]:
    """Returns the numbers of a record by section and name."""
    sections = asdict(record)
    return {
        f"{section}/{key}": value
        for section in SCALARS
        for key, value in (sections[section] or {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
