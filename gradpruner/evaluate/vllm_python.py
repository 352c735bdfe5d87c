"""Finds vLLM in the environment that `evaluation.vllm_python` names; it cannot be installed in ours."""

import json
import os
import subprocess
from functools import cache

from gradpruner.evaluate import vllm_worker
from gradpruner.files import user_path

SECONDS = 120  # to start a Python and look at its packages, on a slow disk
ADVICE = "Run `make vllm` and set evaluation.vllm_python=.venv-vllm/bin/python, or set evaluation.engine=transformers."


def python_path(python: str) -> str:
    """Returns the setting as an absolute path; links stay, since a venv's Python is a link to another."""
    return os.path.abspath(user_path(python))


@cache
def find_vllm(python: str | None) -> str:
    """Returns the versions of vLLM, torch and transformers in an environment, as text; starts its Python.

    Args:
        python: path of the environment's Python.

    Raises:
        ValueError: if it cannot be run, or has no vLLM.
    """
    if not python:
        raise ValueError(
            f"evaluation.engine=vllm needs the Python of an environment with vLLM, got evaluation.vllm_python={python}."
            f" {ADVICE}"
        )
    path = python_path(python)
    try:
        done = subprocess.run(
            [path, str(vllm_worker.__file__)], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        found = json.loads(done.stdout)
        problem = "has none" if found is None else None
    except OSError as error:
        problem = f"cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        problem = f"does not answer within {SECONDS} seconds"
    except ValueError:
        problem = f"is none, or older than 3.10 ({next(iter(done.stderr.strip().splitlines()[-1:]), 'no output')})"
    if problem is not None:
        raise ValueError(
            f"evaluation.vllm_python must be the Python of an environment with vLLM, got {path}, which {problem}. "
            f"{ADVICE}"
        )
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())
