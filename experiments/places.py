"""Where files are: data that come with the code, in a checkout and in a wheel, and where results and the cache go."""

import os
from pathlib import Path

from gradpruner.files import user_path

HOME = "GRADPRUNER_HOME"  # environment variable: where `results` and `.cache` go, instead of the current folder


def shipped(name: str, in_checkout: str) -> Path:
    """Returns a folder of data that the code reads: inside this package if it was installed from a wheel.

    Args:
        name: its name in the package, see `package-dir` in pyproject.toml.
        in_checkout: its path in a checkout.
    """
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / in_checkout


def home(path: str) -> str:
    """Returns a relative path below `GRADPRUNER_HOME`, or as it is if that is not set."""
    folder = os.environ.get(HOME)
    return str(user_path(folder) / path) if folder else path
