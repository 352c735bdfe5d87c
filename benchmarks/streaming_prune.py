"""Memory and time of pruning a checkpoint on disk against copying the kept bytes, on a synthetic Llama of 1.4 GB.

    python -m benchmarks.streaming_prune

Every measurement is a fresh process (this module with --role), in turns, within a temporary folder. Exits with 1 if a
peak is over `MAX_PEAK_BYTES`, or pruning without merges takes over `MAX_TIME_RATIO` times as long as the copy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from experiments.prune_checkpoint import return_memory_at_once
from gradpruner.checkpoints.streaming import prune_checkpoint
from gradpruner.cost import PeakMemory
from gradpruner.files import write_json
from gradpruner.igia import layer_importance, squared_frobenius
from gradpruner.models.architectures import decoder_layers, empty_model, linear_sublayers
from gradpruner.plan import PruningPlan
from gradpruner.runtime import environment

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("copy", "prune", "merge")
MAX_PEAK_BYTES = 500e6
MAX_TIME_RATIO = 2.0
BUSY_PERCENT = 10.0  # of all cores, by other processes
# SmolLM2-360M, in float32.
CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
    tie_word_embeddings=True,
    dtype="float32",
    architectures=["LlamaForCausalLM"],
)
PRUNED_LAYERS = tuple(range(18, 31))  # 40 % of the layers
MERGED_LAYERS = (28, 29, 30)  # all three into layer 17: the most tensors at once
LAYERS_A_SHARD = 8
NUM_STEPS = 40
LORA_RANK = 8


@dataclass(frozen=True)
class Measurement:
    """Measurement of one role in one process.

    Attributes:
        before_bytes: memory of the process before the work: libraries.
        peak_bytes: highest memory during the work, see `cost.PeakMemory`.
        seconds: wall time of the work until everything is on the disk.
    """

    before_bytes: int
    peak_bytes: int
    seconds: float


def make_plan(role: str) -> PruningPlan:
    """Returns the plan of a role; both roles prune the same layers."""
    return PruningPlan(
        num_hidden_layers=CONFIG.num_hidden_layers,
        pruned_layers=PRUNED_LAYERS,
        absorbed_by=dict.fromkeys(MERGED_LAYERS, PRUNED_LAYERS[0] - 1) if role == "merge" else {},
        merge_rule="sign_average",
        density=0.2,
        method="gradpruner",
    )


def write_source(folder: Path, config: LlamaConfig = CONFIG) -> int:
    """Writes random weights shard by shard; returns the bytes that are kept when the plan is applied.

    Args:
        folder: folder for the checkpoint.
        config: config with the depth of `CONFIG` and a dtype.
    """
    config.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    model = empty_model(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in shapes:
        parts = name.split(".")
        shard = f"{int(parts[2]) // LAYERS_A_SHARD:02d}" if parts[1] == "layers" else "rest"
        shards.setdefault(shard, []).append(name)
    weight_map, kept_bytes = {}, 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: 0.02 * torch.randn(shapes[name], dtype=config.dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        pruned = tuple(f"model.layers.{layer}." for layer in PRUNED_LAYERS)
        kept_bytes += sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith(pruned))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return kept_bytes


def write_factors(folder: Path) -> None:
    """Writes random factors of the merged layers, as the importance run stores them."""
    sublayers = linear_sublayers(decoder_layers(empty_model(CONFIG))[0])
    folder.mkdir()
    energies = torch.ones(NUM_STEPS, CONFIG.num_hidden_layers, len(sublayers), dtype=torch.float64)
    for step in range(NUM_STEPS):
        factors = {}
        for layer in MERGED_LAYERS:
            for index, (name, linear) in enumerate(sublayers.items()):
                left = 1e-3 * torch.randn(linear.out_features, LORA_RANK)
                right = 1e-3 * torch.randn(LORA_RANK, linear.in_features)
                factors |= {f"layers.{layer}.{name}.left": left, f"layers.{layer}.{name}.right": right}
                energies[step, layer, index] = squared_frobenius(left, right)
        save_file(factors, folder / f"step-{step:05d}.safetensors")
    result = {"sublayers": list(sublayers), "energies": energies.tolist(), "losses": [1.0] * NUM_STEPS}
    write_json(folder / "importance.json", {**result, "train_seconds": 1.0, "peak_memory_bytes": 1})


def copy_bytes(source: Path, target: Path, num_bytes: int) -> None:
    """Copies `num_bytes` bytes of the shards in the kernel, as `cp` does, and syncs every file to the disk."""
    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        size = min(num_bytes, shard.stat().st_size)
        with shard.open("rb") as reader, (target / shard.name).open("wb") as writer:
            done = 0
            while done < size:
                done += os.sendfile(writer.fileno(), reader.fileno(), done, size - done)
            os.fsync(writer.fileno())
        num_bytes -= size


def measure(role: str, folder: Path, kept_bytes: int) -> Measurement:
    """Does the work of a role in this process.

    Args:
        role: one of `ROLES`.
        folder: folder with `source` and `factors`, and for `target`.
        kept_bytes: bytes that the copy copies.
    """
    return_memory_at_once()
    plan, gradients = make_plan(role), None
    if role == "merge":
        # Imported here, as in experiments.prune_checkpoint, because the other roles do not need its libraries.
        from gradpruner.gradients import EarlyGradients

        gradients = EarlyGradients.load(folder / "factors")
        plan = replace(plan, layer_importance=tuple(layer_importance(gradients.energies).tolist()))
    before = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        start = time.perf_counter()
        if role == "copy":
            copy_bytes(folder / "source", folder / "target", kept_bytes)
        else:
            prune_checkpoint(plan, gradients, folder / "source", folder / "target")
        seconds = time.perf_counter() - start
    return Measurement(before, memory.peak_bytes, seconds)


def measure_in_fresh_process(role: str, folder: Path, kept_bytes: int) -> Measurement:
    """Runs `measure` in a process of its own, after all earlier writes are on the disk.

    Raises:
        RuntimeError: if that process fails, with its stderr, or writes fewer or more bytes than expected.
    """
    os.sync()
    command = [sys.executable, "-m", "benchmarks.streaming_prune", "--role", role, str(folder), str(kept_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The process of role {role!r} ended with status {done.returncode}:\n{done.stderr}")
    written = sum(file.stat().st_size for file in (folder / "target").glob("*.safetensors"))
    if not kept_bytes <= written < 1.001 * kept_bytes:
        raise RuntimeError(f"Role {role!r} wrote {written:,} bytes of weights, not {kept_bytes:,} and a header.")
    for file in (folder / "target").iterdir():
        file.unlink()
    (folder / "target").rmdir()
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def results_table(runs: dict[str, list[Measurement]], kept_bytes: int) -> Table:
    """Returns a table of all runs, then the medians and their time divided by the copy's."""
    title = f"Pruning a checkpoint on disk: {len(PRUNED_LAYERS)} of {CONFIG.num_hidden_layers} layers leave, "
    table = Table(title=f"{title}{kept_bytes / 1e9:.2f} GB stay")
    for column in ("", "before MB", "peak MB", "added MB", "seconds", "MB / s", "time / copy"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    copy_seconds = median(runs["copy"]).seconds
    for role, measurements in runs.items():
        for number, one in enumerate(measurements, start=1):
            table.add_row(f"{role}, run {number}", *_cells(one, kept_bytes), "", style="dim")
    table.add_section()
    for role, measurements in runs.items():
        middle = median(measurements)
        table.add_row(f"{role}, median", *_cells(middle, kept_bytes), f"{middle.seconds / copy_seconds:.2f}x")
    return table


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Returns the median of each number."""
    columns = zip(*(asdict(one).values() for one in measurements), strict=True)
    return Measurement(*(statistics.median(column) for column in columns))


def failures(runs: dict[str, list[Measurement]]) -> list[str]:
    """Returns the goals that are missed, by the highest memory and the median time."""
    peaks = {role: max(one.peak_bytes for one in runs[role]) for role in ("prune", "merge")}
    missed = [
        f"{role}: peak of {peak / 1e6:.0f} MB, at most {MAX_PEAK_BYTES / 1e6:.0f} MB is allowed."
        for role, peak in peaks.items()
        if not peak < MAX_PEAK_BYTES
    ]
    ratio = median(runs["prune"]).seconds / median(runs["copy"]).seconds
    if not ratio <= MAX_TIME_RATIO:
        missed.append(f"prune: {ratio:.2f} times the time of the copy, at most {MAX_TIME_RATIO} is allowed.")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_prune", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes a role (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder; needs 3 GB")
    parser.add_argument("--role", nargs=3, metavar=("ROLE", "FOLDER", "BYTES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role:
        role, folder, kept_bytes = options.role
        print(json.dumps(asdict(measure(role, Path(folder), int(kept_bytes)))))
        return 0
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}.")
    busy_percent = psutil.cpu_percent(interval=1.0)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        kept_bytes = write_source(folder / "source")
        write_factors(folder / "factors")
        source_bytes = sum(file.stat().st_size for file in (folder / "source").iterdir())
        runs: dict[str, list[Measurement]] = {role: [] for role in ROLES}
        for _ in range(options.repeats):
            for role in ROLES:
                runs[role].append(measure_in_fresh_process(role, folder, kept_bytes))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width; do not cut columns for it
    console.print(results_table(runs, kept_bytes))
    machine = environment()
    console.print(
        f"cpu ({machine['platform']}), {machine['num_threads']} threads, torch {machine['packages']['torch']}. Source: "
        f"{source_bytes / 1e9:.2f} GB of float32 in the page cache; every written file is synced. merge: "
        f"{len(MERGED_LAYERS)} layers into one, {NUM_STEPS} steps of rank {LORA_RANK}. Memory is the resident set, "
        "libraries included.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start.")
    missed = failures(runs)
    for line in missed:
        console.print(f"[red]FAILED[/] {line}")
    return 1 if missed else 0


def _cells(one: Measurement, kept_bytes: int) -> tuple[str, str, str, str, str]:
    memory = (one.before_bytes, one.peak_bytes, one.peak_bytes - one.before_bytes)
    return (*(f"{value / 1e6:.0f}" for value in memory), f"{one.seconds:.2f}", f"{kept_bytes / 1e6 / one.seconds:.0f}")


if __name__ == "__main__":
    sys.exit(main())
