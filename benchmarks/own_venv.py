"""Virtual environments of the tools that benchmarks compare with: none is installed beside this project."""

import subprocess
import sys
from pathlib import Path

import torch
import transformers


def make_venv(folder: Path, name: str, version: str, extra: str | None = None) -> None:
    """Makes a venv with one package and this process's own torch and transformers, unless it is there.

    Args:
        folder: of the venv.
        name: of the package on PyPI.
        version: of the package.
        extra: optional dependencies of the package to install, too.
    """
    if list(folder.glob(f"lib/python*/site-packages/{name}-{version}.dist-info")):
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch_requirement = f"torch=={torch.__version__.partition('+')[0]}"
    subprocess.run([*pip, torch_requirement], check=True)  # first, so that nothing draws in another build
    package = f"{name}[{extra}]" if extra else name
    requirements = (f"{package}=={version}", torch_requirement, f"transformers=={transformers.__version__}")
    subprocess.run([*pip, *requirements], check=True)
