"""Spreads the jobs of a joblib sweep over the visible GPUs: a worker process keeps its GPU for all its jobs.

With `num_processes`, it keeps as many GPUs as a run has processes.

The sweep's own process offers the GPUs in an environment variable, which its workers inherit. A worker takes the GPU
that the fewest workers have when it imports this package. That is before it imports torch: CUDA reads
`CUDA_VISIBLE_DEVICES` once, and some libraries start CUDA when they are imported. The choice is by worker and not by
job number because jobs take unequal time, and two busy workers would come to share a GPU. This module imports no torch.
"""

import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

OFFER = "GRADPRUNER_SWEEP_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_taken: list[tuple[str, FileLock]] = []  # GPU of this worker, and its lock, which is held until the worker ends


def offer_gpus(config: "DictConfig") -> None:
    """Offers the visible GPUs to the workers of a sweep; does nothing without joblib or with GPUs for one worker.

    Args:
        config: the sweep's config, with hydra's own node.
    """
    if not str(config.hydra.launcher._target_).endswith(".JoblibLauncher"):
        return
    import torch

    count, size = torch.cuda.device_count(), config.num_processes
    if count < 2 * size:
        return
    listed = os.environ.get(VISIBLE)
    gpus = listed.split(",")[:count] if listed else [str(index) for index in range(count)]
    gpus = [",".join(gpus[start : start + size]) for start in range(0, count - count % size, size)]
    folder = Path(config.hydra.sweep.dir).absolute()
    os.environ[OFFER] = json.dumps({"folder": str(folder), "gpus": gpus})


def withdraw_gpus() -> None:
    """Ends the offer of `offer_gpus`."""
    os.environ.pop(OFFER, None)


def take_gpu() -> None:
    """Makes one of the offered GPUs the only visible one; does nothing if none are offered."""
    offer = os.environ.pop(OFFER, None)  # not for the processes that this worker starts: they share its GPU
    if offer is None:
        return
    folder, gpus = (json.loads(offer)[key] for key in ("folder", "gpus"))
    index, lock = _least_used(Path(folder), len(gpus))
    _taken.append((gpus[index], lock))
    os.environ[VISIBLE] = gpus[index]
    if "torch" in sys.modules:
        logger.warning(
            "A worker of the sweep must take its GPU before it imports torch, got GPU %s afterwards: its jobs may run "
            "on the first GPU. Import `experiments` first.",
            gpus[index],
        )


def taken_gpu() -> str | None:
    """Returns the GPU that this process took, as `CUDA_VISIBLE_DEVICES` names it, or None."""
    return _taken[-1][0] if _taken else None


def _least_used(folder: Path, num_gpus: int) -> tuple[int, FileLock]:
    """Returns the index of the GPU that the fewest workers hold a lock for, with a lock for it.

    The system releases the locks of a worker that ends, so joblib's replacement for it gets the same GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in itertools.count():
        for index in range(num_gpus):
            lock = FileLock(folder / f"gpu{index}-worker{place}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            return index, lock
    raise AssertionError("itertools.count() has no end")
