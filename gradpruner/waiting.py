"""Messages about what a run waits for, so that no terminal is silent for long."""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from gradpruner.lease import Lease, find_holder

logger = logging.getLogger(__name__)

SILENT_SECONDS = 2.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without `flock`


@contextmanager
def say_if_waiting(what: str | Callable[[], str], limit_seconds: float | None = None) -> Iterator[None]:
    """Logs what the block waits for once it has taken 2 seconds, and at its end how long it took.

    Args:
        what: completes "Waiting for ..."; a function is called when that is said.
        limit_seconds: longest possible wait; None if there is no limit.
    """
    limit = "no time limit" if limit_seconds is None else f"{limit_seconds:g} s at most"
    start, said = time.monotonic(), list[str]()

    def say() -> None:
        said.append(what if isinstance(what, str) else what())
        logger.warning("Waiting for %s (%s)", said[0], limit)  # a warning, to be seen where no logging is set up

    timer = threading.Timer(SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said:
            logger.info("Waited %.0f s for %s", time.monotonic() - start, said[0])


@contextmanager
def locked(file: Path | str, what: str) -> Iterator[Lease]:
    """Holds a lock between processes, on this host and others, and says so where another process holds it for long.

    The system's lock on `file` serves this host: it is free the moment its process ends, and a process that is
    suspended keeps it. The lease beside it serves hosts that share the file system, whose locks need not reach them.

    Args:
        file: lock file, `*.lock`. One that is left means nothing: the system releases the lock of a process that ends.
        what: what the other process does, to complete "Waiting for another process that ...".

    Yields:
        The lease; call its `check` before results are made visible to other processes.

    Raises:
        LostLockError: if another process has taken over because this one stood still for minutes.
    """
    lease = Lease(Path(file).with_suffix(".lease"))
    with ExitStack() as stack:
        with say_if_waiting(lambda: _describe(what, lease, file)):
            if on_host := _lock_on_host(file, lease):
                stack.callback(on_host.release)
            lease.acquire()
        stack.enter_context(_released(lease))
        yield lease


@contextmanager
def leased(file: Path, what: str) -> Iterator[Lease]:
    """Holds a lease alone, whose file names the holder and is gone when nobody holds it.

    A process that is suspended for minutes loses it, unlike with `locked`.

    Args:
        file: file of the lease.
        what: as for `locked`.

    Yields:
        The lease.

    Raises:
        LostLockError: as `locked` does.
    """
    lease = Lease(file)
    with say_if_waiting(lambda: _describe(what, lease, file)):
        lease.acquire()
    with _released(lease):
        yield lease


def _describe(what: str, lease: Lease, file: Path | str) -> str:
    return f"another process that {what}; {find_holder(lease.file) or 'it'} holds {file}"


@contextmanager
def _released(lease: Lease) -> Iterator[None]:
    """Releases a lease at the end of the block, and turns the interruption by its loss into LostLockError."""
    try:
        yield
    except KeyboardInterrupt:
        lease.check()
        raise
    finally:
        lease.release()


def _lock_on_host(file: Path | str, lease: Lease) -> BaseFileLock | None:
    """Waits for the system's lock, and returns it; None where there is none, or where its holder's host is gone."""
    lock = FileLock(file, fallback_to_soft=False)
    while True:
        try:
            lock.acquire(timeout=1)
            return lock
        except Timeout:
            holder = find_holder(lease.file)
            # NFS may hold the lock of a host that is gone until that host is back.
            if lease.is_abandoned() and holder is not None and not holder.is_here:
                return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
