"""A lock between processes on any hosts that share a file system, made of what a network file system offers.

`flock` is missing on some network file systems and known to one host alone on others. A lease is a file that is
created exclusively, names its holder, and is touched by the holder's heartbeat (`filelock.SoftFileLease`). A holder
that died on this host is noticed at once; one on another host when its heartbeat has been missing for
`LEASE_SECONDS`. filelock takes an abandoned file over by exchanging two names, which NFS refuses: there `Lease` removes
the file itself.
"""

import _thread
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
from filelock import LeaseCompromise, SoftFileLease, Timeout

logger = logging.getLogger(__name__)

# A heartbeat may be late: Python code that holds the interpreter for long, attributes that NFS caches for a minute.
LEASE_SECONDS = 300.0
HEARTBEAT_SECONDS = 20.0
POLL_SECONDS = 1.0  # between two looks of a process that waits


class LostLockError(OSError):
    """Error for a process that stood still for so long that another one has taken its lock over."""


@dataclass(frozen=True)
class Holder:
    """Process that holds a lease.

    Attributes:
        pid: its id.
        host: name of its host.
        silent_seconds: time since its last heartbeat, by this host's clock.
    """

    pid: int
    host: str
    silent_seconds: float

    @property
    def is_here(self) -> bool:
        """Whether the process is or was on this host."""
        return self.host == own_host()

    @property
    def has_died(self) -> bool:
        """Whether the process is known to be gone; of one on another host nothing is known."""
        return self.is_here and not psutil.pid_exists(self.pid)

    @property
    def is_alive(self) -> bool:
        """Whether the process seems to run, if the clocks of this host and the file system agree."""
        return not self.has_died and (self.is_here or self.silent_seconds < LEASE_SECONDS)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Lock that one process holds at a time.

    Args:
        file: the file that is the lock while it exists. Its folder must exist.
    """

    def __init__(self, file: Path | str) -> None:
        self.file = Path(file)
        self._lease = SoftFileLease(
            self.file,
            lease_duration=LEASE_SECONDS,
            heartbeat_interval=min(HEARTBEAT_SECONDS, LEASE_SECONDS / 3),
            on_compromise=self._note_loss,
        )
        self._watch = _Watch(self.file)
        self._interrupts = False
        self._lost: LeaseCompromise | None = None

    def acquire(self) -> None:
        """Waits for the lock and takes it."""
        while not self.try_acquire():
            if self.is_abandoned() or ((holder := find_holder(self.file)) is not None and holder.has_died):
                self._remove_abandoned()
            time.sleep(min(POLL_SECONDS, LEASE_SECONDS / 10))

    def try_acquire(self) -> bool:
        """Takes the lock if it is free, and returns whether it was."""
        self._lost = None
        self._interrupts = threading.current_thread() is threading.main_thread()
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def is_abandoned(self) -> bool:
        """Returns whether calls of this have seen no heartbeat of a holder for `LEASE_SECONDS`."""
        return self._watch.look() > LEASE_SECONDS

    def check(self) -> None:
        """Raises LostLockError if another process has taken the lock over since this one took it."""
        if self._lost is not None:
            raise LostLockError(
                f"The lock must be held until the work under it is done, got {self.file} lost ({self._lost.reason}): "
                f"this process or its file system stood still for more than {LEASE_SECONDS:.0f} s. Run again: what is "
                "finished is kept."
            )

    def release(self) -> None:
        """Gives the lock back; does nothing if it is not held."""
        if self._lease.is_locked:
            self._lease.release()

    def _note_loss(self, compromise: LeaseCompromise) -> None:
        """Stops the work under the lock, in which another process has begun; the heartbeat's thread calls this."""
        self._lost = compromise
        logger.error("The lock %s was lost: %s", self.file, compromise.reason)
        if self._interrupts:
            # Does nothing where SIGINT is ignored, as for a shell's background job: `check` stops that later.
            _thread.interrupt_main()

    def _remove_abandoned(self) -> None:
        """Removes the file of a holder that is gone, unless it changes meanwhile.

        Only one process at a time may remove it: a second one could remove the file of the first one's successor.
        """
        mark, guard = self._watch.mark, self.file.with_name(f"{self.file.name}.removing")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with suppress(FileNotFoundError):  # its process may have died; it needs the guard for milliseconds
                if time.time() - guard.stat().st_mtime > LEASE_SECONDS:
                    guard.unlink()
            return
        try:
            if mark is not None and _read_mark(self.file) == mark:
                logger.warning("Removing the abandoned lock %s of %s", self.file, find_holder(self.file))
                self._lease.break_lock()
        finally:
            guard.unlink(missing_ok=True)


def find_holder(file: Path) -> Holder | None:
    """Returns the process that a lease's file names, alive or not; None if there is no file or no name in it."""
    owner, mark = SoftFileLease(file, lease_duration=LEASE_SECONDS).owner, _read_mark(file)
    if owner is None or mark is None:
        return None
    return Holder(owner.pid, owner.hostname, time.time() - mark[1])


@cache
def own_host() -> str:
    """Returns the name of this host as leases have it, which tells containers on one host apart."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder, "lease")) as lease:
        owner = lease.owner
    assert owner is not None
    return owner.hostname


class _Watch:
    """How long a file has been seen unchanged, in seconds of this process.

    Time between two looks counts only up to a few polls: a file system that stood still was no look at all.

    Args:
        file: the file.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self.mark: tuple[int, float] | None = None
        self._seen = clock()
        self._unchanged = 0.0

    def look(self) -> float:
        now, mark = self._clock(), _read_mark(self._file)
        self._unchanged += min(now - self._seen, 3 * POLL_SECONDS)
        if mark is None or mark != self.mark:
            self._unchanged = 0.0
        self.mark, self._seen = mark, now
        return self._unchanged


def _read_mark(file: Path) -> tuple[int, float] | None:
    """Returns what tells a lease and its heartbeats apart: inode and time of change; None if there is no file."""
    try:
        descriptor = os.open(file, os.O_RDONLY)  # opening asks the server of NFS, where `stat` may use a cache
    except FileNotFoundError:
        return None
    try:
        stat = os.fstat(descriptor)
        return stat.st_ino, stat.st_mtime
    finally:
        os.close(descriptor)
