"""Runs the command of either side of `benchmarks.mergekit_prune` in this process and prints its time.

    .venv/bin/python benchmarks/mergekit_runner.py ours PLAN SOURCE TARGET
    .venv-mergekit/bin/python benchmarks/mergekit_runner.py mergekit CONFIG TARGET

Arguments after the side go to `experiments.prune_checkpoint` or `mergekit-yaml`. The last line on stdout is JSON:
`library_bytes`, the resident memory after all imports, and `seconds`, the time from there to the end. Each side imports
nothing from the other, which is not installed in its environment.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

import psutil


def load_ours() -> Callable[[Sequence[str]], int | None]:
    """Returns our command, set up as in `python -m experiments.prune_checkpoint`."""
    from experiments.prune_checkpoint import main, return_memory_at_once

    return_memory_at_once()
    return main


def load_mergekit() -> Callable[[Sequence[str]], int | None]:
    """Returns `mergekit-yaml`, with its errors raised."""
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
