"""Say what a run would do, from config and data alone."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from gradpruner.models import count_parameters, empty_model, shrink_config
from gradpruner.pipeline import Pipeline


def show_dry_run(pipeline: Pipeline, run_dir: Path, console: Console | None = None) -> None:
    """Prints layers, parameters, bytes, steps and tokens before and after, and which stages are cached."""
    config, method = pipeline.config, pipeline.resolved_method
    num_layers = config.num_hidden_layers
    num_kept = num_layers - (getattr(method, "num_pruned_layers", 0) or 0)
    dense, embedding = pipeline.num_dense_parameters, config.vocab_size * config.hidden_size
    # Which layers leave is not known yet; they are alike in shape, so any will do for counting.
    pruned = count_parameters(empty_model(shrink_config(config, tuple(range(num_kept)))))
    table = Table(title=f"dry run: {method.name} on {pipeline.model.name}, {pipeline.task.name}")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        ("decoder layers", num_layers, num_kept),
        ("parameters", dense, pruned),
        ("  without input embedding", dense - embedding, pruned - embedding),
        ("checkpoint bytes (float32)", 4 * dense, 4 * pruned),
    ]
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    tokens = sum(len(row.input_ids) for row in pipeline.rows)
    steps = pipeline.training.num_steps(len(pipeline.rows))
    calibration = method.calibration()
    table.add_section()
    table.add_row("train rows / tokens an epoch", f"{len(pipeline.rows):,}", f"{tokens:,}", "")
    table.add_row("fine-tuning steps", "", f"{steps:,}", "")
    if calibration:
        table.add_row("rows seen before pruning", "", f"{calibration.batch_size * calibration.num_batches:,}", "")
    table.add_row("test rows", f"{len(pipeline.test_examples):,}", "", "")
    console = console or Console()
    console.print(table)
    cached = [stage for stage, found in pipeline.stages().items() if found]
    console.print(f"Cached stages: {', '.join(cached) or 'none'}\nRun folder: {run_dir}", soft_wrap=True)
