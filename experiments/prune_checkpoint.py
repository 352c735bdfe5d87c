"""Apply a saved plan to a safetensors checkpoint on disk, in a few hundred megabytes of memory whatever its size.

    python -m experiments.prune_checkpoint plan.json importance/ Llama-3.1-8B/ Llama-3.1-8B-pruned/

PLAN is the `plan.json` of a run or of a pruned checkpoint, FACTORS the folder with `importance.json` that the
importance run left in the cache, SOURCE the dense model. A plan that merges nothing needs no factors: write `-`. The
result is a stock checkpoint, bit for bit the one that surgery on the loaded model gives.
"""

import argparse
import ctypes
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.igia import STEP_WEIGHTINGS
from gradpruner.plan import PruningPlan

if TYPE_CHECKING:
    from gradpruner.gradients import EarlyGradients

NO_FACTORS = "-"
MMAP_THRESHOLD = (-3, 4 * 2**20)  # mallopt parameter M_MMAP_THRESHOLD (malloc.h), value in bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        plan = _load_plan(options.plan)
        gradients = None if options.factors == NO_FACTORS else _load_gradients(Path(options.factors))
        prune_checkpoint(
            plan,
            gradients,
            options.source,
            options.target,
            options.max_shard_bytes,
            step_weighting=options.step_weighting,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    merged = sum(len(layers) for layers in plan.merges.values())
    print(
        f"{options.target}: {len(plan.kept_layers)} of {plan.num_hidden_layers} layers, {merged} of the "
        f"{len(plan.pruned_layers)} pruned layers merged"
    )
    return 0


def return_memory_at_once() -> None:
    """Makes glibc return the memory of every large tensor when it is freed.

    By default glibc learns to keep freed blocks of up to 32 MB, in pieces that the next sublayer may not fit into: up
    to 100 MB more at the peak. The setting cannot be undone, so it is for processes that only prune a checkpoint.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(*MMAP_THRESHOLD)


def _parser() -> argparse.ArgumentParser:
    description, command, details = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prune_checkpoint",
        description=f"{description}\n\n{details}",
        epilog=f"example:\n{command}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="plan.json")
    parser.add_argument("factors", metavar="FACTORS", help="folder of the importance run, or - if nothing merges")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the dense safetensors checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to make; must not exist")
    parser.add_argument(
        "--step-weighting",
        choices=STEP_WEIGHTINGS,
        default="energy",
        help="method.step_weighting of the run that made the plan (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=5 * 10**9,
        metavar="BYTES",
        help="largest weight file (default: %(default)s)",
    )
    return parser


def _load_plan(file: Path) -> PruningPlan:
    """Reads a plan; raises ValueError if the file has none."""
    try:
        return PruningPlan.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"PLAN must be a plan.json, got no file at {file}. Pass that of the run.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"PLAN must be a plan.json, got {file}, not one: {error}. Pass that of the run.") from error
    except ValueError as error:
        raise ValueError(f"Cannot use the plan {file}: {error}") from error


def _load_gradients(folder: Path) -> "EarlyGradients":
    """Reads the factors of an importance run; raises ValueError if the folder has none."""
    # Imported here, because plans without merges do not need the time and memory that this import takes.
    from gradpruner.gradients import RESULT_FILE, EarlyGradients

    try:
        return EarlyGradients.load(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"FACTORS must be a folder with {RESULT_FILE}, got {folder}. Pass that of the importance run, or "
            f"{NO_FACTORS} if the plan merges nothing."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RESULT_FILE} must be as the importance run wrote it, got {error!r}. Run the importance steps "
            "again."
        ) from error


if __name__ == "__main__":
    return_memory_at_once()
    sys.exit(main())
