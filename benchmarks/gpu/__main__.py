"""Checks on a CUDA device what the tests cannot check on a CPU: `make test-gpu`.

    python -m benchmarks.gpu --device cuda
    python -m benchmarks.gpu --device cpu        # the same code in small; memory and times are not the GPU's

Needs no network and no installed package of this project: run it in the source tree, with whatever torch (from 2.11)
and transformers (from 5.17) there are. What is optional and missing is named as not checked. Exits with 1 if a check
fails, with 2 if nothing can be checked here.
"""

import argparse
import faulthandler
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.common import Finding, Scale

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "records" / "gpu"
NEEDED = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tqdm", "psutil", "regex", "jinja2"),
    *("filelock", "evaluate", "rouge_score", "bert_score"),
)
MINUTES = 9.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses with tiny sizes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after that long (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the records of the timings")
    options = parser.parse_args(arguments)
    if arguments is None:  # a process of its own
        os.environ["HF_HUB_OFFLINE"] = "1"
        faulthandler.dump_traceback_later(60 * options.minutes, exit=True)  # a hang must not hold the machine
    start = time.monotonic()
    problem = _problem(options.device)
    if problem:
        print(f"Error: {problem}", file=sys.stderr)
        return 2
    from benchmarks.gpu.common import FAILED, ON_GPU, REHEARSAL
    from gradpruner.runtime import environment, quiet_libraries

    quiet_libraries()
    scale = ON_GPU if options.device == "cuda" else REHEARSAL
    machine = environment()
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    print(f"{machine['device']}, Python {machine['python']}, {packages}\n", flush=True)
    counts: dict[str, int] = {}
    for name, finding in findings(scale, options.records, start + 60 * options.minutes):
        counts[finding.status] = counts.get(finding.status, 0) + 1
        print(f"{finding.status:12}{name}: {finding.text}  [{time.monotonic() - start:.0f} s]", flush=True)
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"\n{total}. Records: {options.records}")
    return 1 if counts.get(FAILED) else 0


def findings(scale: "Scale", records: Path, deadline: float) -> Iterator[tuple[str, "Finding"]]:
    """Runs all checks; yields what they find, each with the name of its check.

    A check that raises is a failed one; the others go on.

    Args:
        scale: sizes.
        records: folder for the records of the timings.
        deadline: `time.monotonic()` by which everything must have ended.
    """
    import torch

    from benchmarks.gpu.common import FAILED, Check, Finding
    from benchmarks.gpu.evaluation import check_evaluation
    from benchmarks.gpu.pruning import check_device_map, check_importance, check_merge_and_repair
    from benchmarks.gpu.ratios import check_ratios
    from benchmarks.gpu.training import check_memory, check_precision

    checks: dict[str, Check] = {
        "importance": check_importance,
        "merge and repair": check_merge_and_repair,
        "evaluation": check_evaluation,
        "device_map": check_device_map,
        "precision": check_precision,
        "memory": check_memory,
        "tests": check_marked_tests,
        "ratios": lambda scale, folder: check_ratios(scale, records, deadline),
    }
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield from ((name, finding) for finding in check(scale, Path(folder)))
            except Exception as error:
                traceback.print_exc()
                yield name, Finding(FAILED, f"{type(error).__name__}: {error}")
        gc.collect()
        torch.cuda.empty_cache()  # for the processes that later checks start


def check_marked_tests(scale: "Scale", folder: Path) -> Iterator["Finding"]:
    """Runs the tests that are marked `gpu`, if pytest is installed."""
    from benchmarks.gpu.common import NOT_CHECKED, Finding, judged
    from gradpruner.runtime import default_device

    # Other test files import packages that a machine may lack.
    files = [file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    if importlib.util.find_spec("pytest") is None or default_device().type != "cuda":
        yield Finding(NOT_CHECKED, "tests marked gpu: pytest is not installed, or there is no CUDA device")
        return
    # Warnings of other versions of libraries are no errors here.
    command = ["-m", "pytest", "-q", "-m", "gpu", "-o", "filterwarnings=", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    yield judged(done.returncode == 0, f"pytest -m gpu: {(done.stdout.splitlines() or ['no output'])[-1]}")


def _problem(device: str) -> str | None:
    """Returns why nothing can be checked on this machine, or None."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"The checks need the packages {', '.join(NEEDED)}, got an environment without {', '.join(missing)}. "
            "Install them, or put their wheels on PYTHONPATH."
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return (
            f"`make test-gpu` needs a CUDA device, got none (torch {torch.__version__}, {build}). Run it on a machine "
            "with an NVIDIA GPU and a CUDA build of torch; `python -m benchmarks.gpu --device cpu` rehearses it "
            "without one."
        )
    if device == "cpu" and torch.cuda.is_available():
        return (
            f"--device cpu rehearses without a GPU, got {torch.cuda.get_device_name()}, which the code under test "
            "would use. Hide it with CUDA_VISIBLE_DEVICES= in the environment, or give --device cuda."
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
