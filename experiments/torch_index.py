"""Print the option with which pip gets a CPU build of torch, or nothing where the usual build is right.

    pip install torch $(python -I experiments/torch_index.py)

PyPI's torch for Linux comes with CUDA: gigabytes that a machine without an NVIDIA GPU cannot use. TORCH_INDEX names
another index, and TORCH_INDEX= none. Needs nothing but Python's own library: it runs before anything is installed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 10.0
DRIVER = Path("/proc/driver/nvidia/version")


def main() -> None:
    """Prints the option, and on stderr why."""
    option, why = choose()
    print(why, file=sys.stderr)
    print(option)


def choose() -> tuple[str, str]:
    """Returns the option for pip, or "", and the reason."""
    if (given := os.environ.get("TORCH_INDEX")) is not None:
        return (f"--extra-index-url {given}", f"torch: from {given} (TORCH_INDEX)") if given else ("", USUAL)
    if platform.system() != "Linux":
        return "", USUAL
    if gpu := find_gpu():
        return "", f"torch: the build with CUDA, for {gpu}"
    try:
        has_build = offers_build(CPU_INDEX)
    except OSError as error:
        return "", f"torch: the usual build, since {CPU_INDEX} cannot be reached ({error})"
    if not has_build:
        return "", f"torch: the usual build, since {CPU_INDEX} has none for this Python"
    return f"--extra-index-url {CPU_INDEX}", f"torch: the CPU build, since there is no NVIDIA GPU ({CPU_INDEX})"


USUAL = "torch: the usual build"


def find_gpu() -> str:
    """Returns the first NVIDIA GPU, or "" if the system has none."""
    if (tool := shutil.which("nvidia-smi")) is not None:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.startswith("GPU "):
            return done.stdout.splitlines()[0].partition(" (")[0]
    return "the NVIDIA GPU of this machine" if DRIVER.exists() else ""


def offers_build(index: str) -> bool:
    """Returns whether an index has the pinned torch for this Python.

    Raises:
        OSError: if it cannot be reached.
    """
    pins = (Path(__file__).resolve().parents[1] / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(\S+)$", pins, re.MULTILINE)
    assert pinned is not None
    with urllib.request.urlopen(f"{index}/torch/", timeout=SECONDS) as answer:
        page = answer.read().decode(errors="replace")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return re.search(rf"torch-{re.escape(pinned[1])}(\+|%2B)cpu-{python}-", page) is not None


if __name__ == "__main__":
    main()
