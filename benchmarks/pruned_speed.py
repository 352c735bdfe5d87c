"""Dense against pruned: training step, prefill and decoding at 20, 30 and 40 % of the layers, on SmolLM2-135M.

    python -m benchmarks.pruned_speed
    python -m benchmarks.pruned_speed --output results/figures/speed   # also speed.json and speed.png

Also measures the time of an importance run of 1 % of the steps as a fraction of a dense fine-tune, and the speed of
each phase as a fraction of this machine's rate in matrix products. All models are measured in turns
(`gradpruner.pipeline.speed`). Exits with 1 if at 40 % a training step or prefill takes over `MAX_TIME` of the dense
model's time, or the importance run over `MAX_SHARE` of the dense fine-tune.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.importance_memory import SPEC, measure_in_fresh_process
from gradpruner.files import write_json
from gradpruner.models.counting import count_model, measure_matmul_flops
from gradpruner.models.shape import config_shape
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.speed import Phase, Workload, measure, ratios
from gradpruner.reporting.figures import LINE_STYLES
from gradpruner.runtime import environment, quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelSpec("packaged:smollm2-135m")
SPARSITIES = (0.2, 0.3, 0.4)
MODES = ("lora", "full")
MAX_TIME = 0.66  # of dense, at the highest sparsity
IMPORTANCE_PART = 0.01  # of the steps
MAX_SHARE = 0.015  # of the time
BUSY_PERCENT = 10.0  # of all cores, by other processes
PAPER_MEMORY = {"full": (0.658, 0.609), "lora": (0.644, 0.607)}  # Table 2: training, inference


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruned_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="processes a model and phase (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats in each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="path without suffix for a .json and a .png")
    options = parser.parse_args(arguments)
    for name in ("rounds", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}.")
    quiet_libraries()
    busy_percent = psutil.cpu_percent(interval=1.0)
    config = MODEL.load_config(ROOT / ".cache" / "assets")
    dense = config_shape(config)
    num_layers = len(dense.layers)
    models = {"dense": (config, dense)}
    for sparsity in SPARSITIES:
        kept = num_layers - round(sparsity * num_layers)
        models[f"{sparsity:.0%}"] = (config, replace(dense, layers=dense.layers[:kept]))
    workload = Workload(rounds=options.rounds, repeats=options.repeats)
    found: dict[str, dict[str, Phase]] = {name: {} for name in models}
    for mode in MODES:
        trained = measure(models, replace(workload, mode=mode), ("train",))
        for name, phases in trained.items():
            found[name][f"train {mode}"] = phases["train"]
    for name, phases in measure(models, workload, ("infer",)).items():
        found[name] |= phases
    importance = measure_in_fresh_process("importance").step_seconds
    flops = measure_matmul_flops(torch.float32, seconds=2.0)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width; do not cut columns for it
    console.print(_table(found))
    _roofline(console, found, models, workload, flops)
    machine = environment()
    console.print(
        f"{machine['device']}, {machine['num_threads']} threads, torch {machine['packages']['torch']}; training: "
        f"{workload.train_rows} x {workload.train_tokens} tokens, loss on {workload.answer_tokens} a row; prompt of "
        f"{workload.prompt_tokens} tokens; memory above what the process had before the model.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start.")
    if options.output:
        _write(options.output, found, workload, importance, flops)
    return _verdicts(console, found, importance, workload)


def _table(found: Mapping[str, Mapping[str, Phase]]) -> Table:
    table = Table(title=f"Dense and pruned, {MODEL.name}: time and memory, and as parts of the dense model's")
    for column in ("phase", "pruned", "median s", "quartiles", "tokens/s", "time", "memory MB", "memory"):
        table.add_column(column, justify="left" if column in ("phase", "pruned") else "right", no_wrap=True)
    for phase in found["dense"]:
        for name, phases in found.items():
            own, values = ratios({phase: phases[phase]}, {phase: found["dense"][phase]})[phase], phases[phase].to_dict()
            low, high = values["quartile_seconds"]
            table.add_row(
                *(phase if name == "dense" else "", name, f"{values['median_seconds']:.3f}", f"{low:.3f}-{high:.3f}"),
                *(f"{values['tokens_per_second']:.0f}", f"{own['time']:.3f}"),
                *(f"{values['peak_memory_bytes'] / 1e6:.0f}", f"{own['memory']:.3f}"),
            )
        table.add_section()
    return table


def _roofline(
    console: Console,
    found: Mapping[str, Mapping[str, Phase]],
    models: Mapping[str, Any],
    workload: Workload,
    flops: float,
) -> None:
    """Prints the fraction of the measured rate of matrix products that each phase of the dense model reaches."""
    counts = count_model(*models["dense"])
    positions = workload.answer_tokens + 1
    rows, length = workload.train_rows, workload.train_tokens
    work = {
        "train lora": counts.training_flops(rows, length, positions, workload.lora_rank),
        "train full": counts.training_flops(rows, length, positions),
        "prefill": counts.flops(workload.batch_size, workload.prompt_tokens, logit_positions=1),
        "decode": counts.flops(workload.batch_size, 1),
    }
    reached = ", ".join(
        f"{phase} {work[phase] / found['dense'][phase].median_seconds / flops:.0%}" for phase in found["dense"]
    )
    bytes_read = counts.num_parameters * 4 / found["dense"]["decode"].median_seconds
    console.print(
        f"Matrix products of 512 x 1024 x 1024 reach {flops / 1e9:.0f} GFLOP/s here; of that the dense model reaches: "
        f"{reached}. Decoding reads all weights for one token: {bytes_read / 1e9:.1f} GB/s.",
        highlight=False,
    )


def _verdicts(console: Console, found: Mapping[str, Mapping[str, Phase]], importance: float, workload: Workload) -> int:
    """Prints the checks and their results; returns the exit status."""
    name = f"{SPARSITIES[-1]:.0%}"
    own = ratios(found[name], found["dense"])
    passed = True
    for phase in ("train lora", "train full", "prefill"):
        good = own[phase]["time"] <= MAX_TIME
        passed = passed and good
        console.print(
            f"{'[green]ok[/]' if good else '[red]FAILED[/]'} {phase} at {name}: {own[phase]['time']:.3f} of dense, "
            f"goal <= {MAX_TIME}",
            highlight=False,
        )
    for mode, (train, infer) in PAPER_MEMORY.items():
        console.print(
            f"memory at {name}, {mode}: training {own[f'train {mode}']['memory']:.3f} (paper {train}), inference "
            f"{own['prefill']['memory']:.3f} (paper {infer}); the tied embedding stays",
            highlight=False,
        )
    # A step of the importance run has as many rows as a step of the fine-tune here.
    assert SPEC.batch_size == workload.train_rows
    for mode in MODES:
        share = IMPORTANCE_PART * importance / found["dense"][f"train {mode}"].median_seconds
        good = share <= MAX_SHARE
        passed = passed and good
        console.print(
            f"{'[green]ok[/]' if good else '[red]FAILED[/]'} importance of {IMPORTANCE_PART:.0%} of the steps: "
            f"{share:.2%} of the time of a dense {mode} fine-tune, goal <= {MAX_SHARE:.1%}",
            highlight=False,
        )
    return 0 if passed else 1


def _write(
    output: Path,
    found: Mapping[str, Mapping[str, Phase]],
    workload: Workload,
    importance: float,
    flops: float,
) -> None:
    summary = {
        "model": MODEL.name,
        "workload": vars(workload),
        "phases": {name: {phase: own.to_dict() for phase, own in phases.items()} for name, phases in found.items()},
        "ratios": {name: ratios(phases, found["dense"]) for name, phases in found.items()},
        "importance_step_seconds": importance,
        "matmul_flops_per_second": flops,
        "environment": environment(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), summary)
    points = {0.0: summary["ratios"]["dense"]} | {each: summary["ratios"][f"{each:.0%}"] for each in SPARSITIES}
    _plot(points, output.with_suffix(".png"))


def _plot(points: Mapping[float, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draws time and memory against sparsity, as fractions of the dense model's.

    Args:
        points: fraction of layers pruned -> phase -> `time` and `memory`.
        path: file of the picture.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    sparsities = sorted(points)
    for axis, kind in zip(axes, ("time", "memory"), strict=True):
        for style, phase in zip(LINE_STYLES, points[sparsities[0]], strict=False):
            values = [points[sparsity][phase][kind] for sparsity in sparsities]
            axis.plot([100 * sparsity for sparsity in sparsities], values, label=phase, markersize=4, **style)
        axis.plot([0, 100 * sparsities[-1]], [1, 1 - sparsities[-1]], color="#888888", linewidth=1, label="layers left")
        axis.set(xlabel="layers pruned (%)", title=kind, ylim=(0, 1.08))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("part of the dense model's")
    axes[1].legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
