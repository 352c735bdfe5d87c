"""The table at the end of a run: reference and method, before and after fine-tuning."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradpruner.caveats import weak_accuracy
from gradpruner.checkpoints.adapter import ADAPTER_FOLDER
from gradpruner.checkpoints.checkpoint import SHAPE_FILE
from gradpruner.finetune.result import LEAST_SURVIVAL
from gradpruner.messages import duration, parameters
from gradpruner.models.shape import ModelShape, describe_shape
from gradpruner.record import RunRecord
from gradpruner.record_sections import MethodReport
from gradpruner.reporting.labels import caveats, describe_origins, metric_columns
from gradpruner.reporting.means import DENSE

NUM_NAMED_CANDIDATES = 4


def show_summary(records: list[RunRecord], run_dir: Path, title: str, console: Console | None = None) -> None:
    """Prints each record before and after fine-tuning, then what was pruned and where the results are."""
    config = records[-1].config
    measured = [metrics for record in records for metrics in (record.metrics_before, record.metrics) if metrics]
    columns = metric_columns(measured)
    table = Table(title=title)
    for label in ("model", "layers", "params", *(column.label for column in columns), "train", "memory"):
        table.add_column(label, justify="left" if label == "model" else "right", no_wrap=True)
    for record in records:
        name = record.pruning["method"]
        size = (str(record.pruning["num_hidden_layers"]), parameters(record.pruning["num_parameters"]))
        if record.metrics_before:
            table.add_row(name, *size, *(column.cell(record.metrics_before) for column in columns), "", "", style="dim")
        seconds, memory = record.finetune["train_seconds"], record.finetune["peak_memory_bytes"]
        table.add_row(
            f"{name} + {config['finetune']['mode']}",
            *size,
            *(column.cell(record.metrics) for column in columns),
            f"{seconds:.0f} s",
            f"{memory / 2**30:.2f} GiB",
            style="bold" if record is records[-1] else "",
        )
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    metrics, pruning = records[-1].metrics, records[-1].pruning
    notes = [f"{metrics['num_examples']} test rows"]
    if "majority_accuracy" in metrics:
        notes.append(f"always the most frequent label: {metrics['majority_accuracy']:.3f}")
        notes.append(f"guessing: {metrics['chance_accuracy']:.3f}")
    if metrics.get("finished", 1.0) < 1.0:
        notes.append(f"answers that came to an end: {metrics['finished']:.0%}")
    console.print("; ".join([*notes, *describe_origins(measured), *caveats(records)]), soft_wrap=True)
    dense = next((record.metrics for record in records[:-1] if record.pruning["method"] == DENSE), None)
    if weak := weak_accuracy(metrics, dense, pruning["method"]):
        console.print(f"[yellow]Warning:[/] {weak}", soft_wrap=True)
    if pruning["pruned_layers"]:
        absorbed = [(layer, absorber) for layer, absorber in pruning["absorbed_by"].items() if absorber is not None]
        merged = ", ".join(f"{layer} into {absorber}" for layer, absorber in absorbed)
        console.print(f"Pruned layers: {pruning['pruned_layers']}; merged: {merged or 'none'}")
    for line in _choices(pruning["report"]):
        console.print(line, soft_wrap=True)
    if widths := _widths(records[-1]):
        console.print(widths, soft_wrap=True)
    cost, training = records[-1].efficiency["compression_seconds"], records[-1].finetune["train_seconds"]
    if cost >= 1.0 and pruning["method"] != DENSE:
        share = f", {cost / training:.1f} times its fine-tune" if training else ""
        console.print(f"Compression took {duration(cost)}{share}", soft_wrap=True)
    if ratios := records[-1].efficiency.get("speed", {}).get("ratios"):
        parts = [
            f"{phase} {own['time']:.2f} of the time, {own['memory']:.2f} of the memory" for phase, own in ratios.items()
        ]
        console.print(f"Beside the dense model: {'; '.join(parts)}", soft_wrap=True)
    for note in pruning["report"].get("notes", []):
        console.print(note, soft_wrap=True)
    for warning in pruning["report"].get("warnings", []):
        console.print(f"[yellow]Warning:[/] {warning}")
    if (survival := records[-1].finetune.get("update_survival", 1.0)) < LEAST_SURVIVAL:
        console.print(
            f"[yellow]Warning:[/] a merged checkpoint keeps {survival:.0%} of the update; see finetune.merge_dtype",
            soft_wrap=True,
        )
    if (run_dir / "checkpoint").is_dir():
        loader = (
            "gradpruner.load_checkpoint" if (run_dir / "checkpoint" / SHAPE_FILE).is_file() else "plain transformers"
        )
        if (run_dir / "checkpoint" / ADAPTER_FOLDER).is_dir():
            loader = f"the model before fine-tuning with {loader}, {ADAPTER_FOLDER}/ on it with peft"
        console.print(f"Checkpoint ({loader}): {run_dir / 'checkpoint'}", soft_wrap=True)
    console.print(f"Run folder: {run_dir}", soft_wrap=True)


def _choices(report: MethodReport) -> Iterator[str]:
    """Yields how the number of layers was found, which sets competed, and which layers were near the cut."""
    if search := report.get("search"):
        tried = ", ".join(f"{number}: {nll:.2f}" for number, nll in search["curve"].items())
        yield (
            f"sparsity=auto: answer NLL by layers pruned, repaired, untrained: 0: {search['dense']:.2f}, {tried}; "
            f"at most {search['limit']:.2f}"
        )
    if choice := report.get("candidates"):
        best, *others = choice["candidates"]
        tried = "; ".join(f"{'/'.join(each['names'])} {_nll(each)}" for each in others[:NUM_NAMED_CANDIDATES])
        more = f"; {len(others) - NUM_NAMED_CANDIDATES} more" if len(others) > NUM_NAMED_CANDIDATES else ""
        yield (
            f"Sets that competed, answer NLL on held-out training rows: {'/'.join(best['names'])} {_nll(best)} is "
            f"pruned; {tried}{more}; dense {choice['dense_nll']:.2f}"
        )
    if undecided := report.get("undecided_layers"):
        chances = ", ".join(f"{layer} ({report['pruned_probability'][layer]:.0%})" for layer in undecided)
        yield f"Near the cut, with how often resampled steps prune them: {chances}"


def _nll(candidate: dict[str, Any]) -> str:
    repaired, trained = candidate["nll_repaired"], candidate.get("nlls_trained")  # which older records lack
    after = "" if repaired is None else f" (repaired {repaired:.2f})"
    if trained:
        after = f" (trained {', '.join(f'{nll:.2f}' for nll in trained)})"
    return f"{candidate['nll']:.2f}{after}"


def _widths(record: RunRecord) -> str:
    """Describes the sizes inside the layers that differ from the dense model; empty if none does."""
    own, dense = (describe_shape(ModelShape.from_dict(each["shape"])) for each in (record.pruning, record.model))
    changed = [f"{size} {own[size]} (of {dense[size]})" for size in own if own[size] != dense[size]]
    return "Widths by layer: " + "; ".join(changed) if changed else ""
