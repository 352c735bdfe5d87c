"""Savings of compression: counted from shapes (the paper's Table 11), and measured in runs (its Table 2)."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch
from transformers import PreTrainedConfig

from gradpruner.models.counting import ROW_LENGTH, TABLE_11, ModelCounts, count_model
from gradpruner.models.shape import ModelShape
from gradpruner.record import RunRecord
from gradpruner.record_sections import PhaseSection
from gradpruner.reporting.labels import METHOD_LABELS, caveats
from gradpruner.reporting.published import Published
from gradpruner.reporting.tables import Table, row_labels, setting, tell_apart

DASH = "-"


def counts_table(
    title: str,
    config: PreTrainedConfig,
    shapes: Mapping[str, ModelShape],
    dtype: torch.dtype,
    length: int = ROW_LENGTH,
    published: Mapping[str, Sequence[Decimal]] | None = None,
) -> Table:
    """Counts parameters, and the work of one forward pass over a row of `length` tokens.

    Args:
        title: title of the table.
        config: config of the dense model.
        shapes: shapes to count, by label; ratios are to the first.
        dtype: type of weights and KV cache, for their bytes.
        length: tokens per row.
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
        headers.append(f"{name} *")
        if published is not None:
            headers.append("paper")
    headers += ["GMACs", "TFLOPs", "params", "of first", "KV cache MiB", "checkpoint GiB"]
    notes = [
        "* as the paper counts: linear sublayers of the decoder layers, without attention scores and output head; "
        "parameters without one of the two vocabulary matrices",
        f"the rest is complete: attention scores and output head on all {length} positions; a MAC is 2 FLOPs",
        f"1 row of {length} tokens; bytes in {str(dtype).removeprefix('torch.')}",
    ]
    return Table(title, headers, rows, notes)


def _table_11(counts: ModelCounts, length: int) -> list[str]:
    """Returns FLOPs, MACs and parameters, rounded as the paper prints them."""
    billions = f"{counts.num_parameters_without_embedding / 1e9:.2f}"
    return [
        f"{counts.flops(1, length, TABLE_11) / 1e12:.2f}",
        f"{counts.macs(1, length, TABLE_11) / 1e9:.2f}",
        billions.removesuffix("0"),
    ]


def _with_published(own: Sequence[str], published: Sequence[Any] | None, wanted: bool) -> list[str]:
    if not wanted:
        return list(own)
    theirs = published or [DASH] * len(own)
    return [str(cell) for pair in zip(own, theirs, strict=True) for cell in pair]


def efficiency_tables(records: Sequence[RunRecord], published: Published | None) -> list[Table]:
    """Returns the paper's Table 2 for each setting with a dense run: time and memory as percent of the dense model's.

    Args:
        records: finished runs.
        published: the paper's Table 2.
    """
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    tables = []
    for group in settings.values():
        dense = next((record for record in group if record.pruning["method"] == "dense"), None)
        if dense is None:
            continue
        alike = [record for record in group if _machine(record) == _machine(dense)]
        tables.append((_efficiency_table(alike, dense, published, len(group) - len(alike)), setting(dense)))
    return tell_apart(tables)


def _machine(record: RunRecord) -> tuple[str, int]:
    return record.environment["device"], record.environment["num_threads"]


def _efficiency_table(
    records: list[RunRecord], dense: RunRecord, published: Published | None, num_elsewhere: int
) -> Table:
    mode = dense.config["finetune"]["mode"]
    paper = {row.coordinates["method"]: row.values for row in published.select(finetune=mode)} if published else {}
    rows, order = [], list(METHOD_LABELS)
    ordered = sorted(records, key=lambda one: (order.index(one.pruning["method"]), one.seed))
    labels = row_labels(ordered)
    for record, label in zip(ordered, labels, strict=True):
        method = record.pruning["method"]
        step, fresh, *inference = _timed(record)
        time, memory = _training(record, dense, fresh)
        own: list[float | Decimal | None] = [time, step, memory, *inference]
        # The paper has one inference time, of whole answers; it stands beside our prefill. Step and decode have none.
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
    if not all(record.finetune for record in records):
        notes.append("rows without train time: timings of random weights alone (`make test-gpu`), no run")
    notes += caveats(records)
    if num_elsewhere:
        notes.append(f"left out: {num_elsewhere} runs on another machine or with another number of threads")
    return Table(f"{dense.model['name']}, {mode}: time and memory (Table 2)", headers, rows, notes)


def _training(record: RunRecord, dense: RunRecord, fresh: float | None) -> tuple[float | None, float | None]:
    """Returns time and memory of training as percent of dense; without fine-tunes, None and `fresh`.

    Args:
        record: the run.
        dense: the dense run of the same setting.
        fresh: memory of a training step in a fresh process as percent of dense, if it was measured.
    """
    if not (record.finetune and dense.finetune):
        return None, fresh
    base = _above_start(dense, dense.finetune["peak_memory_bytes"])
    compression = 0 if record.pruning["method"] == "dense" else record.efficiency["compression_peak_memory_bytes"]
    recovery = record.pruning["recovery"].get("peak_memory_bytes", 0)
    if fresh is None:
        fresh = 100 * _above_start(record, record.finetune["peak_memory_bytes"]) / base
    before = 100 * _above_start(record, max(compression, recovery)) / base
    return 100 * _total_seconds(record) / _total_seconds(dense), max(fresh, before)


def _total_seconds(record: RunRecord) -> float:
    efficiency = record.efficiency
    return efficiency["compression_seconds"] + efficiency["recovery_seconds"] + record.finetune["train_seconds"]


def _above_start(record: RunRecord, peak_bytes: int) -> float:
    """Returns memory above what the process had before the run, so that the libraries do not count."""
    return max(0.0, float(peak_bytes - record.efficiency.get("process_memory_bytes", 0)))


def _timed(record: RunRecord) -> list[float | None]:
    """Returns time and memory of a training step, time of prefill and decoding, memory of both, in percent of dense.

    Each is None if it was not timed: many records have no timings, and methods that prune while they train have no
    training step of a fixed shape.
    """
    speed = record.efficiency.get("speed")
    if not speed:
        return [None] * 5
    own, dense = (_inference_peak(phases) for phases in (speed["own"], speed["dense"]))
    train, prefill, decode = (speed["ratios"].get(phase) for phase in ("train", "prefill", "decode"))
    return [
        100 * train["time"] if train else None,
        100 * train["memory"] if train else None,
        100 * prefill["time"] if prefill else None,
        100 * decode["time"] if decode else None,
        100 * own / dense,
    ]


def _inference_peak(phases: Mapping[str, PhaseSection]) -> int:
    return max(phases[name]["peak_memory_bytes"] for name in ("prefill", "decode"))


def _percent(value: float | Decimal | None) -> str:
    return DASH if value is None else f"{value:.1f}"
