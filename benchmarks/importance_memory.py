"""Memory and time of the importance run against plain LoRA steps on the same batches, on SmolLM2-135M.

    python -m benchmarks.importance_memory

Every measurement is a fresh process (this module with --role), because memory touched by one run would count for the
next. Exits with 1 if the importance run's peak memory is over `MAX_MEMORY_RATIO` times the peak of plain training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from unittest import mock

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from gradpruner import importance
from gradpruner.cost import Cost
from gradpruner.encoding import IGNORED, Batch
from gradpruner.finetune.trainer import CompletionTrainer
from gradpruner.importance import record_early_gradients
from gradpruner.importance_spec import ImportanceSpec
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import default_device, environment, quiet_libraries, set_seed

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("plain", "importance")
MAX_MEMORY_RATIO = 1.1
BUSY_PERCENT = 10.0  # of all cores, by other processes
MODEL = ModelSpec("packaged:smollm2-135m")
SPEC = ImportanceSpec(steps=6, batch_size=8)
NUM_TOKENS = 64
NUM_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Measurement:
    """Measurement of one role in one process.

    Attributes:
        before_bytes: memory just before the first step: libraries, model, adapters.
        peak_bytes: highest memory while training, see `cost.PeakMemory`.
        step_seconds: wall time of the training over its steps; the first is slower than the rest.
    """

    before_bytes: int
    peak_bytes: int
    step_seconds: float

    @property
    def increment_bytes(self) -> int:
        """Memory that training adds."""
        return self.peak_bytes - self.before_bytes


class _Probe(Cost):
    """Peak memory and time, and the memory at the start."""

    before_bytes: int

    def __enter__(self) -> Self:
        super().__enter__()
        cuda = default_device().type == "cuda"
        self.before_bytes = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        return self


def random_batches() -> list[Batch]:
    """Returns one batch of random token ids per step, labels on the last `NUM_ANSWER_TOKENS`; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = MODEL.load_config(_assets_dir()).vocab_size
    batches = []
    for _ in range(SPEC.steps):
        input_ids = torch.randint(vocab_size, (SPEC.batch_size, NUM_TOKENS), generator=generator)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, -NUM_ANSWER_TOKENS:] = input_ids[:, -NUM_ANSWER_TOKENS:]
        batches.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
    return batches


def measure(role: str) -> Measurement:
    """Trains in this process and measures the training alone.

    Args:
        role: `importance` (`record_early_gradients`) or `plain` (the same training without the recorder).
    """
    batches = random_batches()
    model = MODEL.load(_assets_dir())
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from the file: without a read they would be loaded in the first step
    probe = _Probe()
    with tempfile.TemporaryDirectory() as folder:
        if role == "importance":
            # The importance run opens its own PeakMemory, around the training alone; the probe replaces it.
            with mock.patch.object(importance, "PeakMemory", lambda: probe):
                record_early_gradients(model, batches, SPEC, Path(folder))
        else:
            _train_plainly(model, batches, Path(folder), probe)
    return Measurement(probe.before_bytes, probe.peak_bytes, probe.seconds / SPEC.steps)


def measure_in_fresh_process(role: str) -> Measurement:
    """Runs `measure` in a process of its own.

    Raises:
        RuntimeError: if that process fails, with its stderr.
    """
    command = [sys.executable, "-m", "benchmarks.importance_memory", "--role", role]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The process of role {role!r} ended with status {done.returncode}:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def results_table(runs: dict[str, list[Measurement]]) -> Table:
    """Returns a table of all runs, the medians per role, and their ratios."""
    table = Table(title=f"Importance run against plain LoRA steps, {MODEL.name}")
    for column in ("", "before MB", "peak MB", "increment MB", "s / step"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for role, measurements in runs.items():
        for number, one in enumerate(measurements, start=1):
            table.add_row(f"{role}, run {number}", *_cells(one), style="dim")
    plain, ours = (median(runs[role]) for role in ROLES)
    table.add_section()
    table.add_row("plain, median", *_cells(plain))
    table.add_row("importance, median", *_cells(ours))
    table.add_row(
        "importance / plain",
        f"{ours.before_bytes / plain.before_bytes:.3f}",
        f"{ours.peak_bytes / plain.peak_bytes:.3f}",
        f"{ours.increment_bytes / plain.increment_bytes:.3f}",
        f"{ours.step_seconds / plain.step_seconds:.3f}",
        style="bold",
    )
    return table


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Returns the median of every value separately."""
    return Measurement(
        before_bytes=round(statistics.median(one.before_bytes for one in measurements)),
        peak_bytes=round(statistics.median(one.peak_bytes for one in measurements)),
        step_seconds=statistics.median(one.step_seconds for one in measurements),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or with --role one measurement that prints JSON; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.importance_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="processes a role, in turns (default: %(default)s)")
    parser.add_argument("--role", choices=ROLES, help="measure one role in this process and print JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}.")
    quiet_libraries()
    if options.role:
        print(json.dumps(asdict(measure(options.role))))
        return 0
    MODEL.source(_assets_dir())  # converts the packaged weights on first use, outside the measurement
    busy_percent = psutil.cpu_percent(interval=1.0)
    runs: dict[str, list[Measurement]] = {role: [] for role in ROLES}
    for _ in range(options.repeats):
        for role in ROLES:
            runs[role].append(measure_in_fresh_process(role))
    return _report(runs, busy_percent)


def _train_plainly(model: PreTrainedModel, batches: list[Batch], scratch: Path, probe: _Probe) -> None:
    """Trains as `record_early_gradients` does, with its own private functions, without recording anything."""
    set_seed(SPEC.seed)
    with importance._adapters(model, SPEC) as tuned:
        trainer = CompletionTrainer(
            tuned,
            importance._training_arguments(SPEC, scratch),
            description="plain",
            train_dataset=batches,
            data_collator=lambda batch: batch[0],
        )
        with probe:
            trainer.train()


def _report(runs: dict[str, list[Measurement]], busy_percent: float) -> int:
    """Prints the table and the verdict; returns the exit status."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width; do not cut columns for it
    console.print(results_table(runs))
    machine = environment()
    packages = machine["packages"]
    console.print(
        f"{machine['device']}, {machine['num_threads']} threads, torch {packages['torch']}, peft {packages['peft']}; "
        f"{SPEC.steps} steps of {SPEC.batch_size} x {NUM_TOKENS} tokens, loss on the last {NUM_ANSWER_TOKENS}, LoRA "
        f"rank {SPEC.lora_rank}. Peaks are sampled by cost.PeakMemory around the training alone.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(
            f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start. Trust the "
            "memory, not the times."
        )
    ratio = median(runs["importance"]).peak_bytes / median(runs["plain"]).peak_bytes
    passed = ratio <= MAX_MEMORY_RATIO
    verdict = "[green]ok[/]" if passed else "[red]FAILED[/]"
    console.print(f"{verdict} peak memory ratio {ratio:.3f}, goal <= {MAX_MEMORY_RATIO}", highlight=False)
    return 0 if passed else 1


def _assets_dir() -> Path:
    return ROOT / ".cache" / "assets"


def _cells(one: Measurement) -> tuple[str, str, str, str]:
    memory = (one.before_bytes, one.peak_bytes, one.increment_bytes)
    before, peak, increment = (f"{value / 1e6:.0f}" for value in memory)
    return before, peak, increment, f"{one.step_seconds:.2f}"


if __name__ == "__main__":
    sys.exit(main())
