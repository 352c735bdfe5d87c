"""Finished stages on disk, filed by the content that determines them.

The key of an entry is everything its result depends on, code included; its folder is named by the key's hash. An entry
is computed into a `.partial` folder and renamed when it is whole, with a checksum of every file. A damaged entry is
computed again, and said so. Processes may share a cache, on hosts that share a file system, too: one computes, the
others wait.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.files import content_hash, write_json
from gradpruner.lease import Lease
from gradpruner.waiting import locked

logger = logging.getLogger(__name__)

ENTRY_FILE = "entry.json"
FULL_DISK_BYTES = 2**20  # a write that failed with less than this free failed for lack of space


@dataclass(frozen=True)
class StageCache:
    """Folder of finished stages.

    Attributes:
        root: folder of the cache; each stage has one below it.
    """

    root: Path

    def find(self, stage: str, key: Mapping[str, Any]) -> Path | None:
        """Returns the folder of an entry that is there and whole, or None."""
        entry = self.path(stage, key)
        problem = _problem(entry) if entry.is_dir() else "missing"
        return entry if problem is None else None

    def get(self, stage: str, key: Mapping[str, Any], compute: Callable[[Path], None], resumable: bool = False) -> Path:
        """Returns the folder of an entry, computed unless it is there and whole.

        Args:
            stage: name of the stage.
            key: JSON-ready; everything that the result depends on.
            compute: writes the result into the folder that it is given.
            resumable: give `compute` what an interrupted call left behind, instead of an empty folder.
        """
        entry = self.path(stage, key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(f"{entry}.lock", f"computes the stage {stage} in this cache") as lock:
                return self._get_locked(entry, stage, key, compute, resumable, lock)
        except Exception as error:
            _explain_full_disk(error, self.root)
            raise

    def _get_locked(
        self,
        entry: Path,
        stage: str,
        key: Mapping[str, Any],
        compute: Callable[[Path], None],
        resumable: bool,
        lock: Lease,
    ) -> Path:
        if entry.is_dir():
            problem = _problem(entry)
            if problem is None:
                logger.debug("%s: cached (%s)", stage, entry.name)
                return entry
            logger.warning("%s: cache entry %s is damaged (%s), computing it again", stage, entry, problem)
            shutil.rmtree(entry)
        partial = entry.with_name(f"{entry.name}.partial")
        if partial.is_dir() and not resumable:
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        compute(partial)
        write_json(partial / ENTRY_FILE, {"key": key, "checksums": _checksums(partial)})
        lock.check()
        os.replace(partial, entry)
        return entry

    def path(self, stage: str, key: Mapping[str, Any]) -> Path:
        """Returns where the entry is or would be."""
        return self.root / stage / content_hash(key)


def _explain_full_disk(error: Exception, folder: Path) -> None:
    """Raises a clear OSError if the disk is full: libraries report that in many ways, some as damaged files."""
    free = shutil.disk_usage(folder).free
    if free < FULL_DISK_BYTES or getattr(error, "errno", None) == errno.ENOSPC:
        raise OSError(
            errno.ENOSPC,
            f"The disk of {folder.absolute()} is full ({free / 1e6:.1f} MB free). Free some space, or set cache_dir to "
            "another disk, and run again: finished stages are kept",
        ) from error


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ENTRY_FILE)
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _problem(entry: Path) -> str | None:
    """Returns what is wrong with an entry, or None."""
    try:
        expected = json.loads((entry / ENTRY_FILE).read_text())["checksums"]
    except (OSError, ValueError, KeyError) as error:
        return f"{ENTRY_FILE}: {error}"
    for name, checksum in expected.items():
        if not (entry / name).is_file():
            return f"{name} is missing"
        if _checksum(entry / name) != checksum:
            return f"{name} has changed"
    return None
