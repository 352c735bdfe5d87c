"""Peak memory of a stage, and parameter ratios."""

import ctypes
import gc
import platform
import threading
from types import TracebackType
from typing import Self

import psutil
import torch


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


def _release_memory() -> None:
    """Gives freed memory back to the system; glibc would keep most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
