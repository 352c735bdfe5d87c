"""Virtual environments for the tools that benchmarks compare with; none is installed in this project's own."""

import subprocess
import sys
from pathlib import Path

import torch
import transformers


def make_venv(folder: Path, name: str, version: str, extra: str | None = None) -> None:
    """Makes a venv with one package and this process's versions of torch and transformers, unless it exists.

    Args:
        folder: folder of the venv.
        name: name of the package on PyPI.
        version: version of the package.
        extra: name of the package's optional dependencies to install as well.
    """
    if list(folder.glob(f"lib/python*/site-packages/{name}-{version}.dist-info")):
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch_requirement = f"torch=={torch.__version__.partition('+')[0]}"
    subprocess.run([*pip, torch_requirement], check=True)  # first, so that no package brings another build
    package = f"{name}[{extra}]" if extra else name
    requirements = (f"{package}=={version}", torch_requirement, f"transformers=={transformers.__version__}")
    subprocess.run([*pip, *requirements], check=True)
