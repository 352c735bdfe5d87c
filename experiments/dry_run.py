"""Say what a run would do, from its config and data; no weights are loaded.

    python -m experiments.run dry_run=true model=llama3_1_8b

Hub models need no connection to the Hub: see `gradpruner.models.offline_configs`. `gradpruner.models.counting` says
what is counted, and how memory and time are estimated.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.sweep_tables import Costs, Work
from gradpruner.checks import AUTO
from gradpruner.grad_pruner import GradPruner
from gradpruner.models import offline_configs
from gradpruner.models.counting import TABLE_11, ModelCounts, count_model, measure_matmul_flops
from gradpruner.models.offline_configs import STAND_IN_TOKENIZER
from gradpruner.pipeline.disk import stage_writes
from gradpruner.pipeline.estimate import importance_memory, settle_micro_batch, training_memory
from gradpruner.pipeline.run import Pipeline
from gradpruner.pipeline.stand_in_rows import has_stand_in_rows, use_stand_in_rows
from gradpruner.pipeline.work import importance_flops, num_trained_rows, training_flops
from gradpruner.runtime import default_device
from gradpruner.tasks.published_sizes import TOKENIZER

LENGTH = 128  # tokens of the forward pass that is counted, as in the paper's Table 11
CALIBRATION_SECONDS = 0.3
Cell = Callable[[float], str]


def prepare_dry_run(pipeline: Pipeline) -> Pipeline:
    """Returns the run with stand-ins for what cannot be read here, or need not be: configs, tokenizers and rows."""
    assets_dir = pipeline.assets_dir
    prepared = dataclasses.replace(pipeline, model=offline_configs.for_dry_run(pipeline.model, assets_dir))
    if (base_model := pipeline.base_model) != pipeline.model:
        vars(prepared)["base_model"] = offline_configs.for_dry_run(base_model, assets_dir)
    use_stand_in_rows(prepared)
    return prepared


def show_dry_run(pipeline: Pipeline, run_dir: Path, console: Console | None = None) -> None:
    """Prints size, work, data, estimated memory and time of the dense and the pruned model, and the cached stages."""
    dtype = pipeline.base_model.torch_dtype
    dense = count_model(pipeline.dense_config)
    pruned = count_model(pipeline.config, pipeline.shape)
    offline = not pipeline.base_model.has_own_tokenizer
    estimated = offline or has_stand_in_rows(pipeline)
    table = Table(title=f"dry run: {pipeline.resolved_method.name} on {pipeline.model.name}, {pipeline.task.name}")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    _add_sizes(table, dense, pruned, dtype)
    table.add_section()
    _add_data(table, pipeline, "estimated " if estimated else "")
    table.add_section()
    flops_per_second = measure_matmul_flops(dtype, CALIBRATION_SECONDS)
    _add_estimates(table, pipeline, dense, pruned, dtype, flops_per_second)
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    for note in _notes(pipeline, dtype, flops_per_second, offline):
        console.print(note, soft_wrap=True)
    cached = [] if estimated else [stage for stage, found in pipeline.stages().items() if found]
    unknown = "unknown without the Hub" if offline else "unknown without the rows" if estimated else "none"
    console.print(f"Cached stages: {', '.join(cached) or unknown}\nRun folder: {run_dir}", soft_wrap=True)


def cell_costs(pipeline: Pipeline) -> Costs:
    """Returns what a run of a sweep would take, see `show_dry_run`."""
    method, training, rows, dtype = (
        *(pipeline.resolved_method, pipeline.training, pipeline.rows),
        pipeline.base_model.torch_dtype,
    )
    flops_per_second = measure_matmul_flops(dtype, CALIBRATION_SECONDS)
    pruned = count_model(pipeline.config, pipeline.shape)
    settled = settle_micro_batch(pipeline, training, rows, pipeline.config, pipeline.shape)
    memory = training_memory(pipeline, settled, rows, pipeline.config, pipeline.shape).total
    seconds = {"finetune": training_flops(pruned, training, rows) / flops_per_second}
    if isinstance(method, GradPruner):
        memory = max(memory, importance_memory(pipeline, method).total)
        dense = count_model(pipeline.dense_config)
        seconds["measure"] = importance_flops(pipeline, method, dense) / flops_per_second
    writes, cached = stage_writes(pipeline), pipeline.stages()
    work = {
        name: Work(id_, seconds.get(name, 0.0), writes[name].result, cached[name])
        for name, id_ in pipeline.stage_ids().items()
    }
    return Costs(len(pruned.layers), pruned.num_parameters, training.num_steps(len(rows)), memory, work)


def _add_sizes(table: Table, dense: ModelCounts, pruned: ModelCounts, dtype: torch.dtype) -> None:
    """Adds the rows that are exact: layers, parameters, operations and cache of both models."""
    forward, name = f"forward pass, 1 x {LENGTH} tokens", _dtype_name(dtype)

    def both(label: str, cell: Cell, value: Callable[[ModelCounts], float]) -> None:
        _add(table, label, cell, value(dense), value(pruned))

    both("decoder layers", _whole, lambda counts: len(counts.layers))
    both("parameters", _whole, lambda counts: counts.num_parameters)
    both("  without input embedding", _whole, lambda counts: counts.num_parameters_without_embedding)
    both("  linear, of all layers", _whole, lambda counts: sum(layer.num_linear_parameters for layer in counts.layers))
    both(f"checkpoint ({name})", _gib, lambda counts: counts.checkpoint_bytes(dtype))
    both(f"MACs, {forward}", _operations, lambda counts: counts.macs(1, LENGTH))
    both("  decoder linears only (Table 11)", _operations, lambda counts: counts.macs(1, LENGTH, TABLE_11))
    both(f"FLOPs, {forward}", _operations, lambda counts: counts.flops(1, LENGTH))
    both("  decoder linears only (Table 11)", _operations, lambda counts: counts.flops(1, LENGTH, TABLE_11))
    both(f"KV cache a token ({name})", _kib, lambda counts: counts.kv_cache_bytes(1, 1, dtype))
    both(f"KV cache, 1 x {LENGTH} tokens", _mib, lambda counts: counts.kv_cache_bytes(1, LENGTH, dtype))


def _add_data(table: Table, pipeline: Pipeline, estimated: str) -> None:
    """Adds the rows about data: rows, tokens and steps."""
    tokens = sum(len(row.input_ids) for row in pipeline.rows)
    steps = pipeline.training.num_steps(len(pipeline.rows))
    calibration = pipeline.resolved_method.calibration()
    table.add_row("train rows", f"{len(pipeline.rows):,}")
    table.add_row(f"{estimated}tokens an epoch", f"{tokens:,}")
    table.add_row("fine-tuning steps", f"{steps:,}", f"{steps:,}")
    trained = round(tokens / len(pipeline.rows) * num_trained_rows(pipeline.training, len(pipeline.rows)))
    table.add_row(f"{estimated}tokens trained on", f"{trained:,}", f"{trained:,}")
    if calibration:
        table.add_row("rows seen before pruning", "", f"{calibration.count(len(pipeline.rows)):,}")
    if pipeline.recovery:
        recovery_rows = pipeline.recovery_rows
        table.add_row("steps of recovery", "", f"{pipeline.recovery.training.num_steps(len(recovery_rows)):,}")
        table.add_row("  rows, tokens", "", f"{len(recovery_rows):,}, {sum(len(r.input_ids) for r in recovery_rows):,}")
    table.add_row("test rows", f"{len(pipeline.test_examples):,}")


def _add_estimates(
    table: Table,
    pipeline: Pipeline,
    dense: ModelCounts,
    pruned: ModelCounts,
    dtype: torch.dtype,
    flops_per_second: float,
) -> None:
    """Adds the rows with estimated memory and time."""
    training, method, rows = pipeline.training, pipeline.resolved_method, pipeline.rows
    models = ((pipeline.dense_config, None), (pipeline.config, pipeline.shape))
    for recompute in (False, True):
        chosen = " *" if recompute == training.gradient_checkpointing else ""
        changed = dataclasses.replace(training, gradient_checkpointing=recompute)
        settled = [settle_micro_batch(pipeline, changed, rows, config, shape) for config, shape in models]
        memory = [
            training_memory(pipeline, spec, rows, config, shape)
            for spec, (config, shape) in zip(settled, models, strict=True)
        ]
        if training.micro_batch_size == AUTO:
            dense_rows, pruned_rows = (int(spec.micro_batch_size) for spec in settled)
            label = f"{'  ' if recompute else ''}rows per micro batch, as memory is free now{chosen}"
            table.add_row(label, f"{dense_rows}", f"{pruned_rows}")
        label = "with gradient checkpointing" if recompute else "estimated peak memory of training"
        _add(table, f"{'  ' if recompute else ''}{label}{chosen}", _gib, *(estimate.total for estimate in memory))
        if not recompute:
            for part in ("weights", "gradients", "moments", "activations", "transient", "allocator"):
                _add(table, f"    {part}", _gib, *(getattr(estimate, part) for estimate in memory))
    flops = [training_flops(counts, training, rows) for counts in (dense, pruned)]
    _add(table, "estimated FLOPs of training", _operations, *flops)
    _add(table, "estimated time of training, at least", _seconds, *(work / flops_per_second for work in flops))
    if isinstance(method, GradPruner):
        seconds = importance_flops(pipeline, method, dense) / flops_per_second
        table.add_row("estimated peak memory of the importance run", _gib(importance_memory(pipeline, method).total))
        table.add_row("estimated time of the importance run, at least", _seconds(seconds))


def _notes(pipeline: Pipeline, dtype: torch.dtype, flops_per_second: float, offline: bool) -> list[str]:
    """Returns notes on how the estimates were made."""
    training = pipeline.training
    size = "that many" if training.micro_batch_size == AUTO else training.micro_batch_size
    notes = [
        f"Memory: {training.mode} fine-tuning, micro batches of {size} rows as long as the longest one; without Python "
        "and its libraries; * is what this run does.",
        f"Time: at {_significant(flops_per_second / 1e9)} GFLOP/s, measured just now on this machine "
        f"({default_device().type}, {_dtype_name(dtype)} matrix products, {CALIBRATION_SECONDS} s). Small models take "
        "about twice that.",
    ]
    if undetermined := pipeline.resolved_method.undetermined():
        notes.append(f"Only the run finds out {' and '.join(undetermined)}: the table has the most it may be.")
    if offline:
        notes.append(
            f"{pipeline.base_model.path} cannot be read from the Hub: layers and sizes are from the config that ships "
            f"here; token counts are estimated with the tokenizer of {STAND_IN_TOKENIZER}{_characters(pipeline)}."
        )
    if has_stand_in_rows(pipeline):
        notes.append(
            f"The rows of {pipeline.task.name} were not read: their number is the published one, and lengths and all "
            f"that depends on them are estimates, from a sample by {TOKENIZER}."
        )
    return notes


def _characters(pipeline: Pipeline) -> str:
    """Returns how many characters a token has, as text to add; empty where rows are stand-ins."""
    if has_stand_in_rows(pipeline):
        return ""
    characters = sum(len(example.prompt) + len(example.answer) for example in pipeline.train_examples)
    return f" ({characters / sum(len(row.input_ids) for row in pipeline.rows):.2f} characters a token)"


def _add(table: Table, label: str, cell: Cell, dense: float, pruned: float) -> None:
    table.add_row(label, cell(dense), cell(pruned), f"{pruned / dense:.3f}" if dense else "")


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _operations(value: float) -> str:
    unit, size = next(((u, n) for u, n in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if value >= n), ("k", 1e3))
    return f"{value / size:,.2f} {unit}"


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _kib(value: float) -> str:
    return f"{value / 2**10:,.2f} KiB"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.2f} MiB"


def _gib(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**27 else _mib(value)


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
