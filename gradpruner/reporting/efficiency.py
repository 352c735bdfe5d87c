"""What compression saves: counted from shapes (the paper's Table 11), and measured by runs (its Table 2)."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch
from transformers import PreTrainedConfig

from gradpruner.models.counting import TABLE_11, ModelCounts, count_model
from gradpruner.models.shape import ModelShape
from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METHODS
from gradpruner.reporting.published import Published
from gradpruner.reporting.tables import Table, row_labels, setting, tell_apart

DASH = "-"


def counts_table(
    title: str,
    config: PreTrainedConfig,
    shapes: Mapping[str, ModelShape],
    dtype: torch.dtype,
    length: int = 128,
    published: Mapping[str, Sequence[Decimal]] | None = None,
) -> Table:
    """Parameters and work of one forward pass of a row of `length` tokens.

    Args:
        title: of the table.
        config: of the dense model.
        shapes: what to count, by label; the first is what ratios are to.
        dtype: of weights and KV cache, for their bytes.
        length: tokens.
        published: the paper's FLOPs, MACs and parameters by label.
    """
    counts = {label: count_model(config, shape) for label, shape in shapes.items()}
    first = next(iter(counts.values()))
    rows = [
        [
            label,
            str(len(own.layers)),
            *_with_published(_table_11(own, length), (published or {}).get(label), published is not None),
            f"{own.macs(1, length) / 1e9:.2f}",
            f"{own.flops(1, length) / 1e12:.2f}",
            f"{own.num_parameters:,}",
            f"{own.num_parameters / first.num_parameters:.3f}",
            f"{own.kv_cache_bytes(1, length, dtype) / 2**20:.2f}",
            f"{own.checkpoint_bytes(dtype) / 2**30:.2f}",
        ]
        for label, own in counts.items()
    ]
    headers = ["model", "layers"]
    for name in ("TFLOPs", "GMACs", "params (B)"):
        headers += [f"{name} *", *(["paper"] if published is not None else [])]
    headers += ["GMACs", "TFLOPs", "params", "of first", "KV cache MiB", "checkpoint GiB"]
    notes = [
        "* as the paper counts: linear sublayers of the decoder layers, without attention scores and output head; "
        "parameters without one of the two vocabulary matrices",
        f"the rest is complete: attention scores and output head on all {length} positions; a MAC is 2 FLOPs",
        f"1 row of {length} tokens; bytes in {str(dtype).removeprefix('torch.')}",
    ]
    return Table(title, headers, rows, notes)


def _table_11(counts: ModelCounts, length: int) -> list[str]:
    """FLOPs, MACs and parameters with the paper's digits."""
    billions = f"{counts.num_parameters_without_embedding / 1e9:.2f}"
    return [
        f"{counts.flops(1, length, TABLE_11) / 1e12:.2f}",
        f"{counts.macs(1, length, TABLE_11) / 1e9:.2f}",
        billions.removesuffix("0"),
    ]


def _with_published(own: Sequence[str], published: Sequence[Any] | None, wanted: bool) -> list[str]:
    if not wanted:
        return list(own)
    return [cell for pair in zip(own, published or [DASH] * len(own), strict=True) for cell in map(str, pair)]


def efficiency_tables(records: Sequence[RunRecord], published: Published | None) -> list[Table]:
    """The paper's Table 2: time and memory as percent of the dense model's, for every setting that has a dense run.

    Args:
        records: finished runs.
        published: the paper's Table 2.
    """
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    tables = []
    for group in settings.values():
        for dense in [record for record in group if record.pruning["method"] == "dense"][:1]:
            alike = [record for record in group if _machine(record) == _machine(dense)]
            tables.append((_efficiency_table(alike, dense, published, len(group) - len(alike)), setting(dense)))
    return tell_apart(tables)


def _machine(record: RunRecord) -> tuple[Any, Any]:
    return record.environment["device"], record.environment["num_threads"]


def _efficiency_table(
    records: list[RunRecord], dense: RunRecord, published: Published | None, num_elsewhere: int
) -> Table:
    mode = dense.config["finetune"]["mode"]
    paper = {row.coordinates["method"]: row.values for row in published.select(finetune=mode)} if published else {}
    rows, order = [], list(METHODS)
    ordered = sorted(records, key=lambda one: (order.index(one.pruning["method"]), one.seed))
    labels = row_labels(ordered)
    for record, label in zip(ordered, labels, strict=True):
        method = record.pruning["method"]
        step, fresh, *inference = _timed(record)
        time, memory = _training(record, dense, fresh)
        own: list[float | Decimal | None] = [time, step, memory, *inference]
        # Beside the paper's inference time, which is that of whole answers, stands that of the prefill.
        values = [*paper[method]] if method in paper else [None] * 4
        theirs = [values[0], None, values[1], values[2], None, values[3]]
        cells = [_percent(value) for pair in zip(own, theirs, strict=True) for value in pair]
        seed = f", seed {record.seed}" if labels.count(label) > 1 else ""
        rows.append([label + seed, *cells])
    headers = ["method"]
    for name in ("train time", "train step", "train memory", "prefill", "decode", "inference memory"):
        headers += [f"{name} % ↓", "paper"]
    environment = dense.environment
    notes = [
        "percent of the dense model's in the same setting on the same machine: "
        f"{environment['device']}, {environment['num_threads']} threads",
        "train time: measuring, pruning, recovery and fine-tuning of this run",
        "train step, prefill, decode, and their memory: timed in turns with the dense model, in processes of their "
        "own; the paper has one number for inference, which stands beside prefill",
        "train memory: the higher of a training step's and of what compression took, the latter in the run's own "
        "process; for methods that act in training, the peak of the run",
    ]
    if num_elsewhere:
        notes.append(f"left out: {num_elsewhere} runs on another machine or with another number of threads")
    return Table(f"{dense.model['name']}, {mode}: time and memory (Table 2)", headers, rows, notes)


def _training(record: RunRecord, dense: RunRecord, fresh: float | None) -> tuple[float, float]:
    """Time, and memory: `fresh` is that of a training step, if it was measured."""

    def time(one: RunRecord) -> float:
        spent: float = one.efficiency["compression_seconds"] + one.efficiency.get("recovery_seconds", 0.0)
        return spent + float(one.finetune["train_seconds"])

    def above(one: RunRecord, peak: int) -> float:
        """What the process had more than at its start."""
        return max(0.0, float(peak - one.efficiency.get("process_memory_bytes", 0)))

    base = above(dense, dense.finetune["peak_memory_bytes"])
    is_dense = record.pruning["method"] == "dense"
    spent = [0 if is_dense else record.efficiency["compression_peak_memory_bytes"]]
    spent.append(record.pruning.get("recovery", {}).get("peak_memory_bytes", 0))
    trained = 100 * above(record, record.finetune["peak_memory_bytes"]) / base if fresh is None else fresh
    return 100 * time(record) / time(dense), max(trained, 100 * above(record, max(spent)) / base)


def _timed(record: RunRecord) -> list[float | None]:
    """Percent of dense: time and memory of a training step, time of prefill and of decoding, memory of both."""
    measured = record.efficiency.get("speed", {})
    ratios = measured.get("ratios", {})

    def percent(phase: str, kind: str) -> float | None:
        return 100 * ratios[phase][kind] if phase in ratios else None

    peaks = [
        max(measured[whose][phase]["peak_memory_bytes"] for phase in ("prefill", "decode"))
        for whose in ("own", "dense")
        if ratios
    ]
    return [
        percent("train", "time"),
        percent("train", "memory"),
        percent("prefill", "time"),
        percent("decode", "time"),
        100 * peaks[0] / peaks[1] if peaks else None,
    ]


def _percent(value: float | Decimal | None) -> str:
    return DASH if value is None else f"{value:.1f}"
