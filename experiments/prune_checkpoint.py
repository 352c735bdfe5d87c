"""Apply a run's plan to a safetensors checkpoint on disk, in a few hundred megabytes of memory whatever its size.

    python -m experiments.prune_checkpoint RUN_FOLDER Llama-3.1-8B/ Llama-3.1-8B-pruned/

RUN is the folder of a finished run, or a `plan.json`. SOURCE is the dense model. A plan that merges layers needs the
gradients of its importance run: the run's record says where in the cache they are. FACTORS names their folder, with
`importance.json`, where there is no record. The result is a stock checkpoint, bit for bit the one that surgery on the
loaded model gives.
"""

import argparse
import ctypes
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from experiments.cli import argument_parser
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.files import user_path
from gradpruner.plan import PruningPlan
from gradpruner.record import CONFIG_FILE, RunRecord

if TYPE_CHECKING:
    from gradpruner.gradients import EarlyGradients

MMAP_THRESHOLD = (-3, 4 * 2**20)  # mallopt parameter M_MMAP_THRESHOLD (malloc.h), value in bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    Args:
        arguments: None for those of this process, which then does nothing else.
    """
    if arguments is None:
        return_memory_at_once()
    options = _parser().parse_args(arguments)
    try:
        is_folder = options.run.is_dir()
        plan = _load_plan(options.run / "plan.json" if is_folder else options.run)
        gradients = None
        if plan.merges:
            gradients = _load_gradients(
                options.factors or _recorded_factors(options.run if is_folder else options.run.parent)
            )
        prune_checkpoint(plan, gradients, options.source, options.target, options.max_shard_bytes)
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
    parser = argument_parser("experiments.prune_checkpoint", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run, or a plan.json")
    parser.add_argument("factors", metavar="FACTORS", type=Path, nargs="?", help="folder of the importance run")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the dense safetensors checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to make; must not exist")
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
        raise ValueError(f"RUN must hold a plan.json or be one, got no file at {file}. Pass a finished run.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"RUN must hold a plan.json or be one, got {file}, not one: {error}. Pass a finished run."
        ) from error
    except ValueError as error:
        raise ValueError(f"Cannot use the plan {file}: {error}") from error


def _recorded_factors(run: Path) -> Path:
    """Returns the folder of the importance run that a run's record names.

    Raises:
        ValueError: if there is no such record, or the cache no longer has that folder.
    """
    record, config = RunRecord.load(run), run / CONFIG_FILE
    if record is None or "measure" not in record.stage_ids or not config.is_file():
        raise ValueError(
            f"The plan merges layers, and the record beside it must name its importance run, got none in {run}. Give "
            "the folder of a finished run as RUN, or that of the importance run as FACTORS."
        )
    cache = OmegaConf.to_container(OmegaConf.load(config))["cache_dir"]  # type: ignore[call-overload, index]
    folder = user_path(str(cache)) / "stages" / "measure" / record.stage_ids["measure"]
    if not folder.is_dir():
        raise ValueError(
            f"The cache must hold the importance run of {run}, got no folder {folder.absolute()}. Start this "
            "command in the folder in which the run was started, run it again, or give the folder of the importance "
            "run as FACTORS."
        )
    return folder


def _load_gradients(folder: Path) -> "EarlyGradients":
    """Reads the factors of an importance run; raises ValueError if the folder has none."""
    # Imported here, because plans without merges do not need the time and memory that this import takes.
    from gradpruner.gradients import RESULT_FILE, EarlyGradients

    try:
        return EarlyGradients.load(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"FACTORS must be a folder with {RESULT_FILE}, got {folder}. Pass that of the importance run."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RESULT_FILE} must be as the importance run wrote it, got {error!r}. Run the importance steps "
            "again."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
