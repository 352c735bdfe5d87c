"""Messages about what a run waits for, so that no terminal is silent for long."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

SILENT_SECONDS = 2.0


@contextmanager
def say_if_waiting(what: str, limit_seconds: float | None = None) -> Iterator[None]:
    """Logs what the block waits for once it has taken 2 seconds, and at its end how long it took.

    Args:
        what: completes "Waiting for ...".
        limit_seconds: longest possible wait; None if there is no limit.
    """
    limit = "no time limit" if limit_seconds is None else f"{limit_seconds:g} s at most"
    start, is_said = time.monotonic(), threading.Event()

    def say() -> None:
        is_said.set()
        logger.warning("Waiting for %s (%s)", what, limit)  # a warning, to be seen where no logging is set up

    timer = threading.Timer(SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if is_said.is_set():
            logger.info("Waited %.0f s for %s", time.monotonic() - start, what)


@contextmanager
def locked(file: Path | str, what: str) -> Iterator[None]:
    """Holds a lock between processes, and says so where another process holds it for long.

    Args:
        file: lock file. The system releases the lock of a process that ends, so a file that is left means nothing.
        what: what the other process does, to complete "Waiting for another process that ...".
    """
    lock = FileLock(file)
    with say_if_waiting(f"another process that {what}; it holds {file}"):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
