"""Pruning the same layers of the same checkpoint with this project and with mergekit: equal output, memory and time.

    python -m benchmarks.mergekit_prune

The commands, `python -m experiments.prune_checkpoint` and `mergekit-yaml` with a passthrough of the kept layers, run in
separate processes, in turns; mergekit runs in `.venv-mergekit`, which is made on first use. Exits with 1 if the outputs
differ, or a goal, `MAX_MEMORY_SHARES` or `MIN_SPEEDUP`, is missed.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from shutil import rmtree

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.own_venv import make_venv
from benchmarks.streaming_prune import BUSY_PERCENT, CONFIG, ROOT, copy_bytes, make_plan, write_source
from gradpruner.runtime import environment, quiet_libraries

VENV = ROOT / ".venv-mergekit"
MERGEKIT_VERSION = "0.1.5"
RUNNER = ROOT / "benchmarks" / "mergekit_runner.py"
SIDES = ("ours", "mergekit", "mergekit, shards of 100 MB")
OURS, MERGEKIT, SMALL_SHARDS = SIDES
PLAN = make_plan("prune")
SAMPLE_SECONDS = 0.005
MAX_MEMORY_SHARES = {"0.4B": 0.33, "3.4B": 0.1}  # of mergekit's peak, which grows with the checkpoint; ours does not
# Of the work without imports, until all is on the disk. The goal is not to be slower, with room for noise: passthrough
# takes less than twice as long as copying the kept bytes, so nothing can be several times faster.
MIN_SPEEDUP = 0.8


def llama(hidden_size: int, intermediate_size: int, num_heads: int, **more: object) -> LlamaConfig:
    """Returns a Llama config with the depth of `streaming_prune.CONFIG` and other widths."""
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=CONFIG.num_hidden_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 3,
        architectures=CONFIG.architectures,
        **more,
    )


# SmolLM2-360M in float32, and widths of Llama-3.2-3B in bfloat16.
SIZES = {"0.4B": CONFIG, "3.4B": llama(3072, 8192, 24, vocab_size=49152, dtype="bfloat16", tie_word_embeddings=True)}
# Small enough to compute logits; with and without an output head of its own.
SMALL = {
    "tied": llama(48, 96, 6, vocab_size=96, dtype="float32", tie_word_embeddings=True),
    "untied": llama(48, 96, 6, vocab_size=96, dtype="bfloat16", tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Measurement:
    """Measurement of one side in one process.

    Attributes:
        library_bytes: resident memory after all imports.
        peak_bytes: highest resident memory.
        private_bytes: highest resident memory without pages of files, which the system can drop and read again.
        process_seconds: wall time of the whole process, imports included.
        work_seconds: wall time from the end of the imports to the end of the command.
        disk_seconds: wall time of the sync that then brings the written files to the disk.
    """

    library_bytes: float
    peak_bytes: float
    private_bytes: float
    process_seconds: float
    work_seconds: float
    disk_seconds: float

    @property
    def seconds(self) -> float:
        """Wall time of the work until everything is on the disk."""
        return self.work_seconds + self.disk_seconds


@dataclass(frozen=True)
class Comparison:
    """Measurements of all sides on one size.

    Attributes:
        kept_bytes: bytes of the kept weights.
        runs: side -> one measurement per repeat.
        copy_seconds: times to copy `kept_bytes` and bring them to the disk, one per repeat.
        differences: differences between the outputs of the last repeat.
    """

    kept_bytes: int
    runs: dict[str, list[Measurement]]
    copy_seconds: list[float]
    differences: list[str]

    def median(self, side: str) -> Measurement:
        """Returns the median of each number of a side."""
        columns = zip(*(asdict(one).values() for one in self.runs[side]), strict=True)
        return Measurement(*(statistics.median(column) for column in columns))

    @property
    def memory_share(self) -> float:
        """Our peak memory as a fraction of mergekit's."""
        return self.median(OURS).peak_bytes / self.median(MERGEKIT).peak_bytes

    @property
    def speedup(self) -> float:
        """Time of mergekit divided by ours."""
        return self.median(MERGEKIT).seconds / self.median(OURS).seconds


def mergekit_config(source: Path) -> dict[str, object]:
    """Returns a passthrough of the plan's kept layers, with one slice per run of adjacent layers."""
    kept = PLAN.kept_layers
    starts = [kept[0], *(layer for before, layer in pairwise(kept) if layer != before + 1)]
    ends = [*(before + 1 for before, layer in pairwise(kept) if layer != before + 1), kept[-1] + 1]
    return {
        "slices": [
            {"sources": [{"model": str(source), "layer_range": [start, end]}]}
            for start, end in zip(starts, ends, strict=True)
        ],
        "merge_method": "passthrough",
        "dtype": str(AutoConfig.from_pretrained(source).dtype).removeprefix("torch."),
    }


def command_of(side: str, source: Path, target: Path) -> list[str]:
    """Returns the command of a side; its input is written beside `source`."""
    if side == OURS:
        plan = source.parent / "plan.json"
        PLAN.save(plan)
        return [sys.executable, str(RUNNER), "ours", str(plan), str(source), str(target)]
    config = source.parent / "mergekit.yml"
    config.write_text(yaml.safe_dump(mergekit_config(source)), encoding="utf-8")
    # Only the weights and the config, because the source has nothing else.
    options = ["--quiet", "--no-copy-tokenizer", *(["--out-shard-size", "100M"] if side == SMALL_SHARDS else [])]
    return [str(VENV / "bin" / "python"), str(RUNNER), "mergekit", str(config), str(target), *options]


def run(side: str, source: Path, target: Path) -> Measurement:
    """Prunes in a fresh process, after all earlier writes are on the disk, and watches its memory from here.

    Raises:
        RuntimeError: if that process fails, with its stderr.
    """
    command = command_of(side, source, target)
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if side == OURS else ""}
    os.sync()
    peak = private = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=source.parent, env=environ, stdout=output, stderr=errors)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):  # the process has ended
                memory = watched.memory_info()
                peak, private = max(peak, memory.rss), max(private, memory.rss - memory.shared)
            time.sleep(SAMPLE_SECONDS)
        process_seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(
                f"The process of {side} ended with status {process.returncode}:\n{errors.read()}\n"
                f"If it lacks a package, remove {VENV} and start again."
            )
        found = json.loads(output.read().splitlines()[-1])
    start = time.perf_counter()
    for file in target.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    disk_seconds = time.perf_counter() - start
    return Measurement(found["library_bytes"], peak, private, process_seconds, found["seconds"], disk_seconds)


def read_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Returns tensor name -> dtype, shape and SHA-256 of the bytes, for all tensors of a checkpoint."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it cannot be iterated)
                tensor = opened.get_tensor(name)
                digest = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy())
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape), digest.hexdigest())
    return tensors


def read_output(folder: Path) -> dict[str, object]:
    """Returns everything that must be equal: config entries and tensors."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {f"config.{key}": value for key, value in config.items()} | read_tensors(folder)


def differences(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """Returns the differences between two outputs, and between their depth and the plan's."""
    found = [
        f"{name} is {ours.get(name)} of ours, {theirs.get(name)} of mergekit's."
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if ours["config.num_hidden_layers"] != len(PLAN.kept_layers):
        found.append(f"The config has {ours['config.num_hidden_layers']} layers, {len(PLAN.kept_layers)} stay.")
    return found


def compare_small(name: str, folder: Path) -> list[str]:
    """Prunes a small checkpoint with both; returns differences of the outputs and their transformers logits."""
    write_source(folder / "source", SMALL[name])
    for side in (OURS, MERGEKIT):
        run(side, folder / "source", folder / side)
    found = differences(read_output(folder / OURS), read_output(folder / MERGEKIT))
    tokens = torch.arange(SMALL[name].vocab_size).view(4, -1)  # (B, T)
    logits = []
    for side in (OURS, MERGEKIT):
        model, info = AutoModelForCausalLM.from_pretrained(folder / side, output_loading_info=True)
        found += [f"{side}: {kind} {sorted(info[kind])}." for kind in ("missing_keys", "unexpected_keys") if info[kind]]
        with torch.inference_mode():
            logits.append(model.eval()(tokens).logits)
    if not torch.equal(*logits):
        found.append(f"Logits differ by up to {(logits[0] - logits[1]).abs().max():.1e}.")
    return [f"{name}: {line}" for line in found]


def compare(name: str, num_repeats: int, folder: Path) -> Comparison:
    """Prunes one size with all sides in turns."""
    source = folder / "source"
    kept_bytes = write_source(source, SIZES[name])
    runs: dict[str, list[Measurement]] = {side: [] for side in SIDES}
    copy_seconds = []
    outputs = {}
    for repeat in range(num_repeats):
        os.sync()
        start = time.perf_counter()
        copy_bytes(source, folder / "copy", kept_bytes)
        copy_seconds.append(time.perf_counter() - start)
        rmtree(folder / "copy")
        for side in SIDES:
            runs[side].append(run(side, source, folder / side))
            if repeat == num_repeats - 1:
                outputs[side] = read_output(folder / side)
            # At once: otherwise these files fill the page cache, and the next side pays for room in it.
            rmtree(folder / side)
    rmtree(folder)
    found = [f"{name}, {side}: {line}" for side in SIDES[1:] for line in differences(outputs[OURS], outputs[side])]
    return Comparison(kept_bytes, runs, copy_seconds, found)


def results_table(comparisons: dict[str, Comparison], num_repeats: int) -> Table:
    """Returns a table of the medians of each side and size, and their ratios to ours."""
    title = f"Pruning a checkpoint on disk with mergekit {MERGEKIT_VERSION} and with this project: "
    layers = f"{len(PLAN.pruned_layers)} of {PLAN.num_hidden_layers} layers leave"
    table = Table(title=f"{title}{layers}, median of {num_repeats}")
    memory, times = ("libraries MB", "peak MB", "private MB", "peak / ours"), ("process s", "work s", "sync s")
    for column in ("", *memory, *times, "time / ours"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, comparison in comparisons.items():
        ours = comparison.median(OURS)
        for side in SIDES:
            one = comparison.median(side)
            table.add_row(
                f"{name}, {side}",
                *(f"{value / 1e6:.0f}" for value in (one.library_bytes, one.peak_bytes, one.private_bytes)),
                f"{one.peak_bytes / ours.peak_bytes:.2f}x",
                *(f"{value:.2f}" for value in (one.process_seconds, one.work_seconds, one.disk_seconds)),
                f"{one.seconds / ours.seconds:.2f}x",
            )
        seconds = statistics.median(comparison.copy_seconds)
        label = f"{name}, copy of {comparison.kept_bytes / 1e9:.2f} GB"
        table.add_row(label, "", "", "", "", "", f"{seconds:.2f}", "", f"{seconds / ours.seconds:.2f}x", style="dim")
        table.add_section()
    return table


def verdict(name: str, comparison: Comparison) -> str:
    """Returns a sentence that says whether the outputs are equal, with the two ratios that have a goal."""
    equal = "outputs differ" if comparison.differences else "equal outputs"
    return (
        f"{name}: {equal}, {comparison.memory_share:.3f} of mergekit's peak memory (goal: at most "
        f"{MAX_MEMORY_SHARES[name]}), {comparison.speedup:.2f} times as fast (goal: at least {MIN_SPEEDUP})."
    )


def missed_goals(name: str, comparison: Comparison) -> list[str]:
    """Returns the goals that the medians miss."""
    missed = []
    share, speedup = comparison.memory_share, comparison.speedup
    if not share <= MAX_MEMORY_SHARES[name]:
        missed.append(f"{name}: {share:.3f} of mergekit's peak memory, at most {MAX_MEMORY_SHARES[name]} is allowed.")
    if not speedup >= MIN_SPEEDUP:
        missed.append(f"{name}: {speedup:.2f} times as fast as mergekit, at least {MIN_SPEEDUP} is the goal.")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mergekit_prune", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes a side and size (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder; needs 11 GB")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}.")
    quiet_libraries()
    make_venv(VENV, "mergekit", MERGEKIT_VERSION)
    busy_percent = psutil.cpu_percent(interval=1.0)
    comparisons, failed = {}, []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        for name in SMALL:
            failed += compare_small(name, folder / name)
        for name in options.sizes:
            comparisons[name] = compare(name, options.repeats, folder / name)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width; do not cut columns for it
    console.print(results_table(comparisons, options.repeats))
    machine = environment()
    console.print(
        f"{machine['platform']}, torch {machine['packages']['torch']}. Source in the page cache. private: without "
        "pages of files. sync: bringing to the disk what the command left in memory. time / ours: work and sync.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start.")
    if not failed:
        console.print(f"Small models ({', '.join(SMALL)}): equal outputs, equal logits.", highlight=False)
    for name, comparison in comparisons.items():
        console.print(verdict(name, comparison), highlight=False)
        failed += comparison.differences + missed_goals(name, comparison)
    for line in failed:
        console.print(f"[red]FAILED[/] {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
