"""Runs the command of either side of `benchmarks.mergekit_prune` in this process and says how long it worked.

    .venv/bin/python benchmarks/mergekit_runner.py ours PLAN - SOURCE TARGET
    .venv-mergekit/bin/python benchmarks/mergekit_runner.py mergekit CONFIG TARGET

Arguments after the side are those of `experiments.prune_checkpoint` and of `mergekit-yaml`. The last line on stdout is
JSON: `library_bytes`, the resident memory when all is imported, and `seconds`, from there to the end. Each side imports
nothing of the other, which is not installed there.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

import psutil


def load_ours() -> Callable[[Sequence[str]], int | None]:
    """Our command, set up as `python -m experiments.prune_checkpoint` sets itself up."""
    from experiments.prune_checkpoint import main, return_memory_at_once

    return_memory_at_once()
    return main


def load_mergekit() -> Callable[[Sequence[str]], int | None]:
    """`mergekit-yaml`; its errors are raised."""
    from mergekit.scripts.run_yaml import main

    return lambda arguments: main(list(arguments), standalone_mode=False)


def run(side: str, arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status."""
    command = {"ours": load_ours, "mergekit": load_mergekit}[side]()
    library_bytes = psutil.Process().memory_info().rss
    start = time.perf_counter()
    status = command(arguments)
    seconds = time.perf_counter() - start
    print(json.dumps({"library_bytes": library_bytes, "seconds": seconds}))
    return status or 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
