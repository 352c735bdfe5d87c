"""Memory and time of LLM-Pruner's importance, ours against the authors' method, on SmolLM2-135M.

    python -m benchmarks.llm_pruner_memory

The authors' code holds the gradients of all weights, and a second copy for criteria of second order; ours makes the
gradient of one matrix at a time. Every measurement is a fresh process (this module with --role); memory counts from
before the model is loaded. Exits with 1 if the two give different scores, or if ours needs more than
`MAX_MEMORY_RATIO` times the memory of the weights and a forward pass with its activations.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from baselines.llm_pruner import LlmPruner
from baselines.taylor_scores import MLP, channel_scores, combine
from gradpruner.cost import Cost
from gradpruner.encoding import Batch
from gradpruner.hidden_states import text_loss
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import environment, quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("weights", "activations", "ours param_first", "all param_first", "ours param_mix", "all param_mix")
MODEL = ModelSpec("packaged:smollm2-135m")
NUM_ROWS, NUM_TOKENS = 10, 64  # the authors' calibration
MAX_MEMORY_RATIO = 1.15
PROBED_LAYER = 10  # layer whose scores are compared


@dataclass(frozen=True)
class Measurement:
    """Measurement of one role in one process; `checksum` is the sum of one layer's MLP scores, 0 without scores."""

    peak_bytes: int
    seconds: float
    checksum: float


def measure(role: str) -> Measurement:
    """Runs and measures a role in this process."""
    with Cost() as cost:
        before = psutil.Process().memory_info().rss
        model = MODEL.load(_assets_dir())
        for parameter in model.parameters():
            parameter.sum()  # weights are mapped from the file: without a read they would not be in memory
        start = time.perf_counter()
        checksum = _work(role, model, random_batch(model.config.vocab_size))
        seconds = time.perf_counter() - start
    return Measurement(cost.peak_bytes - before, seconds, checksum)


def random_batch(vocab_size: int) -> Batch:
    """Returns random token ids, the same in every process."""
    ids = torch.randint(vocab_size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _work(role: str, model: PreTrainedModel, batch: Batch) -> float:
    who, _, criterion = role.partition(" ")
    if who == "weights":
        return 0.0
    if who == "activations":
        # Keeps what any backward pass through frozen weights keeps.
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        text_loss(model, batch)[0].backward()
        return 0.0
    if who == "ours":
        method = LlmPruner(criterion=criterion)
        scores = method._unit_scores(model, batch, method._range(len(decoder_layers(model))))
        return float(scores[PROBED_LAYER]["channels"].sum())
    return float(_with_all_gradients(model, batch, criterion).sum())


def _with_all_gradients(model: PreTrainedModel, batch: Batch, criterion: str) -> Tensor:
    """Scores in the authors' order: a backward pass per row, its square kept, one for the batch, then all scores."""
    fisher: dict[str, Tensor] = {}
    if criterion == "param_mix":
        for row in range(NUM_ROWS):
            loss, count = text_loss(model, {name: values[row : row + 1] for name, values in batch.items()})
            (loss / count.sum()).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                square = parameter.grad.square() / NUM_ROWS
                fisher[name] = fisher[name] + square if name in fisher else square
            model.zero_grad()
    loss, count = text_loss(model, batch)
    (loss / count.sum()).backward()
    vectors = []
    for name in MLP:
        weight = linear_sublayers(decoder_layers(model)[PROBED_LAYER])[name].weight
        second = fisher.get(f"model.layers.{PROBED_LAYER}.{name}.weight")
        vectors.append(channel_scores(weight.detach(), criterion, name != "mlp.down_proj", weight.grad, second))
    return combine(vectors, "sum")


def measure_in_fresh_process(role: str) -> Measurement:
    """Runs `measure` in a process of its own.

    Raises:
        RuntimeError: if that process fails, with its stderr.
    """
    command = [sys.executable, "-m", "benchmarks.llm_pruner_memory", "--role", role]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The process of role {role!r} ended with status {done.returncode}:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or with --role one measurement that prints JSON; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm_pruner_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=ROLES, help="measure one role in this process and print JSON")
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.role:
        print(json.dumps(asdict(measure(options.role))))
        return 0
    MODEL.source(_assets_dir())  # converts the packaged weights on first use, outside the measurement
    return _report({role: measure_in_fresh_process(role) for role in ROLES})


def _report(runs: dict[str, Measurement]) -> int:
    """Prints the table and the verdicts; returns the exit status."""
    weights, activations = runs["weights"].peak_bytes, runs["activations"].peak_bytes
    table = Table(title=f"Importance of LLM-Pruner, {MODEL.name}, {NUM_ROWS} x {NUM_TOKENS} tokens")
    for column in ("", "peak MB", "of the weights", "of weights + activations", "s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for role, one in runs.items():
        ratios = (f"{one.peak_bytes / each:.2f}" for each in (weights, activations))
        table.add_row(role, f"{one.peak_bytes / 1e6:.0f}", *ratios, f"{one.seconds:.1f}")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width; do not cut columns for it
    console.print(table)
    machine = environment()
    console.print(
        f"{machine['device']}, {machine['num_threads']} threads, torch {machine['packages']['torch']}; `all`: every "
        "weight has a gradient, as in the authors' code.",
        highlight=False,
    )
    passed = True
    for criterion in ("param_first", "param_mix"):
        ours, theirs = runs[f"ours {criterion}"], runs[f"all {criterion}"]
        same = abs(ours.checksum - theirs.checksum) <= 1e-3 * abs(theirs.checksum)
        ratio = ours.peak_bytes / activations
        good = same and ratio <= MAX_MEMORY_RATIO
        passed = passed and good
        console.print(
            f"{'[green]ok[/]' if good else '[red]FAILED[/]'} {criterion}: {theirs.peak_bytes / ours.peak_bytes:.2f}x "
            f"less memory than with all gradients; {ratio:.2f} of weights and activations, goal <= "
            f"{MAX_MEMORY_RATIO}; scores {'equal' if same else 'DIFFER'}",
            highlight=False,
        )
    return 0 if passed else 1


def _assets_dir() -> Path:
    return ROOT / ".cache" / "assets"


if __name__ == "__main__":
    sys.exit(main())
