"""Peak memory and time of a stage."""

import ctypes
import gc
import json
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

from gradpruner.files import write_json


class PeakMemory:
    """Context manager: highest memory of this process while it is open.

    On CUDA the allocator's own peak; on a CPU the resident set size, sampled. That includes what the process had
    before, libraries among it; freed memory is given back to the system first, so that an earlier stage counts little.
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        _release_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self.peak_bytes = torch.cuda.max_memory_allocated()
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
    """Context manager: also the wall time while it is open."""

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
        self.seconds = time.perf_counter() - self._start
        super().__exit__(kind, error, trace)

    def save(self, path: Path) -> None:
        """Writes both as JSON, atomically."""
        write_json(path, {"seconds": self.seconds, "peak_memory_bytes": self.peak_bytes})


def total_cost(*files: Path) -> dict[str, float]:
    """`seconds` together and the highest `peak_memory_bytes` of what `Cost.save` wrote."""
    costs = [json.loads(file.read_text()) for file in files]
    return {
        "seconds": sum(cost["seconds"] for cost in costs),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
    }


def process_memory_bytes() -> int:
    """What the process has before it does anything: libraries on a CPU, nothing on a GPU."""
    _release_memory()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def _release_memory() -> None:
    """Gives freed memory back to the system; glibc would keep most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
