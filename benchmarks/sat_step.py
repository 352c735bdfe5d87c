"""Training steps with SAT's omission against dense ones, on SmolLM2-135M, LoRA and full.

    python -m benchmarks.sat_step

Short trainings of both kinds run in turns in one process, on the same batches, with `trainer.CompletionTrainer`. Needs
an otherwise idle machine. Exits with 1 if a dense step takes less than `MIN_RATIO` times as long as a step of SAT.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, TrainerCallback

from baselines.sat import Sat
from benchmarks.stopwatch import Stopwatch
from gradpruner.encoding import IGNORED, Batch
from gradpruner.finetune import run as finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.trainer import CompletionTrainer
from gradpruner.models.architectures import lora_targets
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import environment, quiet_libraries, set_seed

ASSETS_DIR = Path(__file__).resolve().parents[1] / ".cache" / "assets"
MIN_RATIO = 1.25
BUSY_PERCENT = 10.0  # of all cores, by other processes
MODEL = ModelSpec("packaged:smollm2-135m")
SAT = Sat(omission_rate=0.4, ladder="none", dense_tail=0.0)  # the full rate from start to end
NUM_WARMUPS = 2  # SAT's first step is dense, its second selects units, which are then used for 50 steps
NUM_STEPS = 4  # timed steps per training
BATCH_SIZE, NUM_TOKENS, NUM_ANSWER_TOKENS = 8, 128, 16


def random_batches() -> list[Batch]:
    """Returns one batch of random token ids per step, with labels on the last `NUM_ANSWER_TOKENS`."""
    vocab_size = MODEL.load_config(ASSETS_DIR).vocab_size
    batches = []
    for _ in range(NUM_WARMUPS + NUM_STEPS):
        input_ids = torch.randint(vocab_size, (BATCH_SIZE, NUM_TOKENS))
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, -NUM_ANSWER_TOKENS:] = input_ids[:, -NUM_ANSWER_TOKENS:]
        batches.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
    return batches


def step_seconds(model: PreTrainedModel, batches: list[Batch], callbacks: Sequence[TrainerCallback]) -> list[float]:
    """Trains one step per batch, and returns the seconds of each step after the warm-up."""
    spec = TrainingSpec(batch_size=1, micro_batch_size=1, max_steps=len(batches), group_by_length=False)
    with tempfile.TemporaryDirectory() as scratch:
        stopwatch = Stopwatch()
        trainer = CompletionTrainer(
            model,
            finetune._training_arguments(spec, Path(scratch), seed=0).set_save(strategy="no"),
            description="steps",
            train_dataset=batches,  # an item of the dataset is a whole batch
            data_collator=lambda items: items[0],
            callbacks=[stopwatch, *callbacks],
        )
        trainer.train()
    return stopwatch.seconds[NUM_WARMUPS:]


def compare(mode: str, num_rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every step, dense and with SAT, in turns on one model.

    Args:
        mode: `lora` or `full`.
        num_rounds: trainings of each kind.
    """
    set_seed(0)
    batches, model = random_batches(), MODEL.load(ASSETS_DIR)
    if mode == "lora":
        rank, alpha = TrainingSpec.lora_rank, TrainingSpec.lora_alpha
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=lora_targets(model)))
    seconds: dict[str, list[float]] = {"dense": [], "sat": []}
    for _ in range(num_rounds):
        seconds["dense"] += step_seconds(model, batches, [])
        seconds["sat"] += step_seconds(model, batches, SAT.callbacks())
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sat_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="trainings of each kind (default: %(default)s)")
    num_rounds = parser.parse_args(arguments).rounds
    if num_rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {num_rounds}.")
    quiet_libraries()
    busy_percent = psutil.cpu_percent(interval=1.0)
    table = Table(title=f"Training steps, {MODEL.name}, omission rate {SAT.omission_rate}: median \\[quartiles]")
    for column in ("", "dense s", "SAT s", "dense / SAT"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    ratios = {}
    for mode in ("lora", "full"):
        seconds = compare(mode, num_rounds)
        ratios[mode] = statistics.median(seconds["dense"]) / statistics.median(seconds["sat"])
        table.add_row(mode, _spread(seconds["dense"]), _spread(seconds["sat"]), f"{ratios[mode]:.2f}x")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width; do not cut columns for it
    console.print(table)
    machine = environment()
    console.print(
        f"{machine['device']}, {machine['num_threads']} threads, torch {machine['packages']['torch']}; {num_rounds} "
        f"rounds of {NUM_STEPS} steps of {BATCH_SIZE} x {NUM_TOKENS} tokens after {NUM_WARMUPS} warm-ups, loss on the "
        f"last {NUM_ANSWER_TOKENS}; LoRA rank {TrainingSpec.lora_rank}.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(
            f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start. Do not trust the "
            "times."
        )
    passed = all(ratio >= MIN_RATIO for ratio in ratios.values())
    verdict = "[green]ok[/]" if passed else "[red]FAILED[/]"
    console.print(f"{verdict} lowest ratio {min(ratios.values()):.2f}, goal >= {MIN_RATIO}", highlight=False)
    return 0 if passed else 1


def _spread(values: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    # The backslash keeps rich from taking the bracket for markup.
    return rf"{median:.2f} \[{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
