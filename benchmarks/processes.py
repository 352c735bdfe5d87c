"""Training steps of 2 gloo processes with a core each against one process with both cores, LoRA and full.

    python -m benchmarks.processes

`finetune.run.finetune` trains a random Llama with the same global batch both ways, in turns, each time in fresh
processes. Needs an otherwise idle machine. Exits with 1 if two processes take over `MAX_RATIO` times as long per step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.stopwatch import Stopwatch
from gradpruner import processes
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
MAX_RATIO = 1.25
BUSY_PERCENT = 10.0  # of all cores, by other processes
NUM_CORES = 2
MODEL = ModelSpec(
    "random:llama",
    config={"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
)
BATCH_SIZE, MICRO_BATCH_SIZE, NUM_TOKENS, NUM_ANSWER_TOKENS = 16, 4, 128, 16
NUM_WARMUPS, NUM_STEPS = 2, 8


def train(mode: str, folder: Path) -> None:
    """Trains in this process, or in this and the others that torchrun started, and writes the seconds of each step."""
    quiet_libraries()
    processes.start()
    with processes.main_first():
        model = MODEL.load(folder / "assets")
    answer = range(2, 2 + NUM_ANSWER_TOKENS)
    rows = [TrainingRow((*[3 + row] * (NUM_TOKENS - len(answer)), *answer), len(answer)) for row in range(BATCH_SIZE)]
    spec = TrainingSpec(
        mode=mode,
        batch_size=BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        max_steps=NUM_WARMUPS + NUM_STEPS,
        save_steps=10**9,
    )
    stopwatch = Stopwatch()
    finetune(model, rows, 0, spec, folder / f"{mode}{processes.count()}", callbacks=[stopwatch])
    if processes.is_main():
        (folder / "seconds.json").write_text(json.dumps(stopwatch.seconds[NUM_WARMUPS:]))
    processes.finish()


def step_seconds(mode: str, num_processes: int) -> list[float]:
    """Returns the seconds of each step after the warm-up, in fresh processes that share `NUM_CORES` cores."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"] if num_processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *launcher, "-m", "benchmarks.processes", "--train", mode, folder],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(NUM_CORES // num_processes)},
            capture_output=True,
            check=True,
        )
        seconds: list[float] = json.loads((Path(folder) / "seconds.json").read_text())
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--train", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.train:
        train(chosen.train[0], Path(chosen.train[1]))
        return 0
    if chosen.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {chosen.rounds}.")
    busy_percent = psutil.cpu_percent(interval=1.0)
    table = Table(title=f"Training steps of {BATCH_SIZE} x {NUM_TOKENS} tokens on {NUM_CORES} cores: median seconds")
    for column in ("", "1 process", "2 processes", "2 / 1"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    ratios = {}
    for mode in ("lora", "full"):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(chosen.rounds):
            for num_processes, found in seconds.items():
                found += step_seconds(mode, num_processes)
        one, two = (statistics.median(found) for found in seconds.values())
        ratios[mode] = two / one
        table.add_row(mode, f"{one:.3f}", f"{two:.3f}", f"{ratios[mode]:.2f}x")
    console = Console()
    console.print(table)
    if busy_percent > BUSY_PERCENT:
        console.print(
            f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start. Do not trust the "
            "times."
        )
    passed = all(ratio <= MAX_RATIO for ratio in ratios.values())
    console.print(f"At most {MAX_RATIO}x: {'passed' if passed else 'FAILED'}.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
