"""Show the whole way on a tiny model: data, importance, plan, prune and merge, fine-tune, evaluate, verify.

    python -m experiments.demo                 # or: make demo
    python -m experiments.demo --folder DEMO

The model has random weights and learns nothing: this shows what happens, not how well it works.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import argument_parser, command_of

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.verify_fresh import Check
    from gradpruner.record_sections import PruningSection

FOLDER = Path("results/demo")
# Four importance steps, no dense model beside it, and a seed whose plan has a layer that merges.
SETTINGS = ("method.steps=4", "reference=null", "seed=7")
MARK = ".gradpruner-demo"  # in a folder that this made, and may delete
ARGUMENTS = "experiment=quickstart"  # of the run that the note names
NOTE = (
    "The model is tiny and random, so its numbers mean nothing: it cannot read, and 8 test rows tell nothing apart. "
    "Warnings that the plan has not settled are right: there is nothing to settle on. A real model of 135M parameters "
    "takes about 10 minutes on 2 cores:"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns 0 if the checkpoint is good."""
    parser = argument_parser("experiments.demo", __doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write; made anew each time (%(default)s)")
    folder: Path = parser.parse_args(arguments).folder
    if folder.exists() and not (folder / MARK).is_file():
        print(
            f"Error: the demo deletes what is in its folder, got {folder}, which it has not made. Give --folder the "
            "name of a new one.",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return _show_all(folder)


def _show_all(folder: Path) -> int:
    # Imported here: torch and transformers take seconds, for which a mistake in the arguments need not wait.
    import logging

    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from experiments import verify
    from experiments.config import CONF
    from experiments.job import run_job

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = Console()
    console.rule("1. Data, importance, plan, merge, fine-tune, evaluation")
    console.print("First a training row as the model sees it (here a token is a byte), then one line per stage.")
    run_dir = folder / "run"
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        folders = (f"output_dir={run_dir}", f"cache_dir={folder}/cache")
        record = run_job(compose("config", overrides=["debug=smoke", "save_checkpoint=true", *SETTINGS, *folders]))
    assert record is not None
    console.rule("2. The plan: which layers are pruned, and what becomes of them")
    for line in plan_lines(record.pruning):
        console.print(line, highlight=False)
    console.rule("3. The checkpoint, read by plain transformers in a process of its own")
    failed = show_checks(verify.verify(run_dir / "checkpoint"), console)
    console.print(f"Checkpoint: {run_dir / 'checkpoint'}", soft_wrap=True, highlight=False)
    console.rule()
    console.print(NOTE, highlight=False)
    console.print(f"  {' '.join(command_of('experiments.run'))} {ARGUMENTS}", highlight=False)
    return 1 if failed else 0


def show_checks(checks: "list[Check]", console: "Console") -> int:
    """Prints how many checks of a checkpoint passed, and those that failed; returns the number of these."""
    failed = [check for check in checks if check.ok is False]
    for check in failed:
        console.print(f"NO {check.name}: {check.details}", markup=False)
    console.print(f"{sum(check.ok is True for check in checks)} checks passed, {len(failed)} failed")
    return len(failed)


def plan_lines(pruning: "PruningSection") -> list[str]:
    """Returns a line per decoder layer: its importance as a bar, and its fate."""
    importance, pruned = pruning["layer_importance"], set(pruning["pruned_layers"])
    assert importance is not None  # of a method that measures it
    most, lines = max(importance), []
    for layer, value in enumerate(importance):
        into = pruning["absorbed_by"].get(str(layer))
        fate = "kept" if layer not in pruned else "dropped" if into is None else f"merged into layer {into}"
        bar = "█" * max(1, round(30 * value / most))
        lines.append(f"layer {layer}  {bar:30}  {value / sum(importance):4.0%}  {fate}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
