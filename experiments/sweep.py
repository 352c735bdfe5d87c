"""What a sweep (-m) adds to hydra's: it skips excluded cells, continues after a failure, and lists failures at the end.

A job may run in another process (joblib, Slurm), so it writes its failure to a file in its folder of the sweep.
"""

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.devices import offer_gpus, withdraw_gpus
from experiments.schema import ConfigError
from gradpruner.files import write_json

logger = logging.getLogger(__name__)

FAILURE_FILE = "failed.json"  # error, traceback and overrides of a failed job


class SweepReport(Callback):
    """Callback that lists the failed jobs of a sweep and then exits with 1.

    Args:
        exclude: cells of the sweep to skip, each as values of config groups and keys that occur together:
            `{method: apt, finetune: full}`.
    """

    def __init__(self, exclude: list[dict[str, Any]]) -> None:
        self.exclude = exclude

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Deletes the failure files of an earlier sweep in the same folder, and offers GPUs to joblib's workers."""
        for file in _failure_files(config):
            file.unlink()
        offer_gpus(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit if a job failed."""
        withdraw_gpus()
        failures = [json.loads(file.read_text(encoding="utf-8")) for file in _failure_files(config)]
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


def note_failure(error: Exception, is_expected: bool) -> None:
    """Logs and records that this job failed, so that the sweep can continue; logs a traceback for unexpected errors."""
    job = HydraConfig.get()
    logger.error("Job %s failed: %s", job.job.num, error, exc_info=None if is_expected else error)
    write_json(
        Path(job.runtime.output_dir) / FAILURE_FILE,
        {
            "job": job.job.num,
            "overrides": list(job.overrides.task),
            "error": str(error) if is_expected else f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exception(error),
        },
    )


def _failure_files(config: DictConfig) -> list[Path]:
    return list(Path(config.hydra.sweep.dir).glob(f"*/{FAILURE_FILE}"))
