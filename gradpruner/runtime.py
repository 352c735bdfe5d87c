"""Environment of a run: device, seeds, versions, git state."""

import functools
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils
from transformers import set_seed as _set_seed
from transformers.utils import logging as transformers_logging

from gradpruner import processes
from gradpruner.record_sections import EnvironmentSection

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "hydra-core")


def default_device() -> torch.device:
    """Returns the first CUDA device if there is one, of several processes each its own, else the CPU."""
    if torch.cuda.is_available() and processes.count() > 1:
        return torch.device("cuda", processes.local_rank())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype() -> torch.dtype:
    """Returns bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is tens of times slower."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    _set_seed(seed)


def quiet_libraries() -> None:
    """Turns off progress bars and irrelevant warnings of libraries.

    Downloads from the Hub keep their bars on a terminal; elsewhere each bar would be a line per update.
    """
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    if not getattr(sys.stderr, "isatty", bool)():
        disable_progress_bars()
    # The bar of a GGUF file that is converted, which no setting of transformers turns off.
    modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=None)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft reads it


def environment() -> EnvironmentSection:
    """Returns versions, hardware and commit of this process, for the record."""
    device = default_device()
    file = Path(__file__).name
    is_checkout = _git("ls-files", "--error-unmatch", file) is not None  # not a wheel inside another repository
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _is_installed(name)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD") if is_checkout else None,
        "git_dirty": is_checkout and bool(_git("status", "--porcelain")),
    }


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str | None:
    """Returns the output of a git command in the project's folder, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
