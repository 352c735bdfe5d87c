"""Loss curves of full fine-tuning in every precision that is offered, against float32, and bytes per parameter.

    python -m benchmarks.precision

A random tiny Llama and SmolLM2-135M (on ARC-Easy) are trained at the paper's learning rate from the same weights, on
the same batches. Two references that are not offered are trained as well: weights, gradients and moments in bfloat16,
and, where torch-optimi is installed, bfloat16 weights with Kahan summation. Exits with 1 if the loss of an offered
precision falls by over `TOLERANCE` more or less than that of float32.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.stopwatch import Stopwatch
from experiments.config import load_option
from gradpruner.encoding import Batch, Encoder, TrainingRow, encode_training_rows, training_batches
from gradpruner.finetune import run as finetune
from gradpruner.finetune.precision import convert_weights, prepare_weights
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.trainer import CompletionTrainer
from gradpruner.hidden_states import answer_nll
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import environment, quiet_libraries, set_seed
from gradpruner.tasks.arc_easy import ArcEasy

ASSETS_DIR = Path(__file__).resolve().parents[1] / ".cache" / "assets"
OFFERED = ("float32", "bf16_mixed", "bf16_stochastic")
PURE, KAHAN = "all bfloat16", "bf16, Kahan (torch-optimi)"
TOLERANCE = 0.02
TINY = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


class _Watch(Stopwatch):
    """Notes the seconds of every step, and the bytes that a parameter takes."""

    bytes_per_parameter = 0.0

    def on_pre_optimizer_step(self, *args: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        parameters = list(model.parameters())
        self._held = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in parameters)
        self._count = sum(p.numel() for p in parameters)

    def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, **kwargs)
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        moments = sum(_nbytes(value) for value in states if value.ndim)
        self.bytes_per_parameter = (self._held + moments) / self._count


def train(model: PreTrainedModel, precision: str, batches: Sequence[Batch]) -> _Watch:
    """Trains one step per batch, in place."""
    spec = TrainingSpec(
        mode="full",
        batch_size=1,
        micro_batch_size=1,
        max_steps=len(batches),
        group_by_length=False,
        precision=precision if precision in OFFERED else "float32",
    )
    if precision in OFFERED:
        prepare_weights(model, spec, precision)
    else:
        convert_weights(model, torch.bfloat16)
    optimizers: tuple[Any, Any] = (None, None)
    if precision == KAHAN:
        from optimi import AdamW

        kahan = AdamW(model.parameters(), spec.learning_rate, weight_decay=spec.weight_decay, kahan_sum=True)
        optimizers = (kahan, None)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CompletionTrainer(
            model,
            finetune._training_arguments(spec, Path(scratch), 0, spec.precision).set_save(strategy="no"),
            description=precision,
            train_dataset=batches,  # an item of the dataset is a whole batch
            data_collator=lambda items: items[0],
            callbacks=[watch],
            optimizers=optimizers,
        )
        trainer.train()
        # Autocast would stay around `forward`, and its bfloat16 weights would hide small updates from the evaluation.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return watch


def compare(
    dense: PreTrainedModel,
    rows: Sequence[TrainingRow],
    batch_size: int,
    num_steps: int,
    names: Sequence[str],
    console: Console,
) -> bool:
    """Prints the table of a model; returns whether every offered precision learns what float32, the first one, does."""
    padding = dense.config.pad_token_id or 0
    batches = list(training_batches(rows, batch_size, batch_size * num_steps, padding, seed=0))
    before = answer_nll(dense, batches)
    size = sum(p.numel() for p in dense.parameters())
    table = Table(title=f"{size:,} parameters, {num_steps} steps of {batch_size} rows at {TrainingSpec.learning_rate}")
    for column in ("precision", "loss falls by", "of float32's", "weights changed", "bytes / parameter", "step s"):
        table.add_column(column, justify="left" if column == "precision" else "right", no_wrap=True)
    decrease: dict[str, float] = {}
    for name in names:
        model = copy.deepcopy(dense)
        set_seed(0)
        watch = train(model, name, batches)
        convert_weights(model, torch.float32)
        decrease[name] = before - answer_nll(model, batches)
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        changed = sum(int((new != old).sum()) for new, old in pairs) / size
        ratio, step = decrease[name] / decrease["float32"], statistics.median(watch.seconds)
        memory = f"{watch.bytes_per_parameter:.2f}"
        table.add_row(name, f"{decrease[name]:.4f}", f"{ratio:.3f}", f"{changed:.1%}", memory, f"{step:.3f}")
    console.print(table)
    return all(abs(decrease[name] / decrease["float32"] - 1) <= TOLERANCE for name in names if name in OFFERED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of the tiny model (default: %(default)s)")
    parser.add_argument("--steps-135m", type=int, default=60, help="of SmolLM2-135M; 0: leave out (default: 60)")
    parser.add_argument("--only", choices=OFFERED[1:], help="compare this precision alone with float32")
    options = parser.parse_args(arguments)
    every = [*OFFERED, PURE, *([KAHAN] if find_spec("optimi") else [])]
    names = [OFFERED[0], options.only] if options.only else every
    quiet_libraries()
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width; do not cut columns for it
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 258, (64, 16), generator=generator).tolist()
    tiny = ModelSpec("random:llama", config=TINY, dtype="bfloat16").load(ASSETS_DIR)
    passed = [
        compare(_widened(tiny), [TrainingRow(tuple(row), 12) for row in tokens], 16, options.steps, names, console)
    ]
    if options.steps_135m:
        spec = ModelSpec("packaged:smollm2-135m", dtype="bfloat16")
        arc = load_option("dataset", "arc_easy")
        task = ArcEasy(
            **{key: arc[key] for key in ("prompt", "choice")},
            source="packaged",
            max_train_samples=max(64, 4 * options.steps_135m),
            max_length=128,
        )
        rows = encode_training_rows(task.load("train", 0), Encoder(spec.load_tokenizer(ASSETS_DIR), 128, False))
        passed.append(compare(_widened(spec.load(ASSETS_DIR)), rows, 4, options.steps_135m, names, console))
    machine = environment()
    console.print(
        f"{machine['device']}, {machine['num_threads']} threads, torch {machine['packages']['torch']}; loss over "
        "all rows trained on, in float32.",
        highlight=False,
    )
    verdict = "[green]ok[/]" if all(passed) else "[red]FAILED[/]"
    console.print(f"{verdict} goal: every offered precision within {TOLERANCE:.0%} of float32", highlight=False)
    return 0 if all(passed) else 1


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    """Converts weights to float32, exactly: every precision starts from weights that bfloat16 can hold."""
    convert_weights(model, torch.float32)
    return model


def _nbytes(tensor: torch.Tensor) -> int:
    """Returns the bytes of a tensor; torchao's 8-bit moments hold codes and scales."""
    parts = [getattr(tensor, name) for name in ("codes", "scale") if hasattr(tensor, name)]
    return sum(part.nbytes for part in parts) if parts else tensor.nbytes


if __name__ == "__main__":
    sys.exit(main())
