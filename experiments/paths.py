"""Settings that are paths: what they mean, and whether they can be written to.

A relative path starts at the folder in which the command was started, in a job of a sweep, too.
"""

import shutil
import tempfile
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from experiments.schema import ConfigError
from gradpruner.files import user_path

LEAST_FREE_BYTES = 16 * 2**20  # a record, its predictions and pictures


def path_setting(cfg: DictConfig, key: str) -> Path:
    """Returns the path that a root key holds, with `~` expanded.

    Raises:
        ConfigError: if it is empty.
    """
    text = str(cfg[key])
    if not text.strip():
        raise ConfigError(f"{key} must be a path, got {text!r}. Give {key}=PATH, or leave it out for the default.")
    return user_path(text)


def path_settings(cfg: DictConfig, key: str) -> list[Path]:
    """Returns the paths of a root key that holds a path or a list of paths.

    Raises:
        ConfigError: if there is none, or if one is empty.
    """
    if not isinstance(cfg[key], ListConfig):
        return [path_setting(cfg, key)]
    texts = [str(each) for each in cfg[key]]
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError(
            f"{key} must be a path or a list of paths, got {texts}. Give {key}=PATH or {key}=[PATH,PATH]."
        )
    return [user_path(text) for text in texts]


def check_writable(**folders: Path) -> None:
    """Writes an empty temporary file to the nearest existing parent of each folder, to see whether that works.

    Args:
        folders: folder by the name of its setting.

    Raises:
        ConfigError: naming a folder that cannot be made or written to, or whose disk is full.
    """
    for setting, folder in folders.items():
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        try:
            if not existing.is_dir():
                raise NotADirectoryError(f"{existing} is a file")
            with tempfile.TemporaryFile(dir=existing):  # permission bits do not tell: root, network disks, quotas
                pass
        except OSError as error:
            reason = str(error) if error.strerror is None else f"{existing}: {error.strerror}"
            raise ConfigError(
                f"{setting} must be a folder that this user can write to, got {folder.absolute()} ({reason}). "
                f"Set {setting} to another one."
            ) from error
        free = shutil.disk_usage(existing).free
        if free < LEAST_FREE_BYTES:
            raise ConfigError(
                f"{setting} must be on a disk with {LEAST_FREE_BYTES / 1e6:.0f} MB free, got {folder.absolute()} with "
                f"{free / 1e6:.1f} MB. Free some space, or set {setting} to another disk."
            )
