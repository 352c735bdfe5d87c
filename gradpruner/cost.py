"""Peak memory and time of a stage."""

import ctypes
import gc
import json
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

import psutil
import torch

from gradpruner import processes
from gradpruner.files import write_json

COST_FILE = "cost.json"


class PeakMemory:
    """Context manager that measures the peak memory of this process while it is open.

    On CUDA this is the allocator's own peak, summed over all devices that this process sees (each peak counts, even if
    they are reached at different times); on a CPU it is the sampled resident set size, which includes memory the
    process held before, such as libraries. Freed memory is returned to the system first, so that an earlier stage
    counts little.
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        _release_memory()
        if torch.cuda.is_available():
            for device in _cuda_devices():
                torch.cuda.reset_peak_memory_stats(device)
            return self
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self.peak_bytes = sum(torch.cuda.max_memory_allocated(device) for device in _cuda_devices())
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            if self._done.wait(self._interval):
                return


class Cost(PeakMemory):
    """Context manager that also measures the wall time while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __enter__(self) -> Self:
        super().__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            for device in _cuda_devices():
                torch.cuda.synchronize(device)  # kernels may still run
        self.seconds = time.perf_counter() - self._start
        super().__exit__(kind, error, trace)

    def save(self, path: Path) -> None:
        """Writes time and peak memory as JSON, atomically."""
        write_json(path, {"seconds": self.seconds, "peak_memory_bytes": self.peak_bytes})


class TotalCost(TypedDict):
    """Wall time and highest memory of several stages together."""

    seconds: float
    peak_memory_bytes: int


def total_cost(*files: Path) -> TotalCost:
    """Returns the total `seconds` and the highest `peak_memory_bytes` of files that `Cost.save` wrote."""
    costs = [json.loads(file.read_text()) for file in files]
    return {
        "seconds": sum(cost["seconds"] for cost in costs),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
    }


def process_memory_bytes() -> int:
    """Returns the memory the process holds before any work: libraries on a CPU, nothing on a GPU."""
    _release_memory()
    if torch.cuda.is_available():
        return sum(torch.cuda.memory_allocated(device) for device in _cuda_devices())
    return int(psutil.Process().memory_info().rss)


def _cuda_devices() -> Sequence[int]:
    """Returns the numbers of the CUDA devices that this process uses: all, or of several processes its own.

    Their allocators answer only once CUDA is initialized.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return range(torch.cuda.device_count()) if processes.count() == 1 else [processes.local_rank()]


def _release_memory() -> None:
    """Returns freed memory to the system; glibc would keep most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
