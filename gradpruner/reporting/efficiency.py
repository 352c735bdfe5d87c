"""What compression saves: counted from shapes (the paper's Table 11), and measured by runs (its Table 2)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from gradpruner.counting import TABLE_11, ModelCounts, count_model
from gradpruner.record import RunRecord
from gradpruner.reporting.labels import METHODS
from gradpruner.reporting.tables import Table, setting
from gradpruner.shape import ModelShape

Values = Mapping[str, Sequence[Any]]  # published values by row
DASH = "-"


def counts_table(
    title: str,
    config: PreTrainedConfig,
    shapes: Mapping[str, ModelShape],
    dtype: torch.dtype,
    length: int = 128,
    published: Values | None = None,
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


def efficiency_tables(records: Sequence[RunRecord], published: Mapping[str, Values]) -> list[Table]:
    """The paper's Table 2: time and memory as percent of the dense model's, for every setting that has a dense run.

    Args:
        records: finished runs.
        published: the paper's percentages by fine-tune mode and method.
    """
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    tables = []
    for group in settings.values():
        dense = [record for record in group if record.pruning["method"] == "dense"]
        if dense:
            tables.append(_efficiency_table(group, dense[0], published))
    return tables


def _efficiency_table(records: list[RunRecord], dense: RunRecord, published: Mapping[str, Values]) -> Table:
    mode = dense.config["finetune"]["mode"]
    paper = published.get(mode, {})
    order = list(METHODS)
    rows, seen = [], set()
    for record in sorted(records, key=lambda one: (order.index(one.pruning["method"]), one.seed)):
        method = record.pruning["method"]
        own = [*_training(record, dense), *_inference(record)]
        # Beside the paper's inference time, which is that of whole answers, stands that of prefill and decoding.
        values = [*paper[method]] if method in paper else [None] * 4
        theirs = [*values[:2], values[2], None, values[3]]
        cells = [_percent(value) for pair in zip(own, theirs, strict=True) for value in pair]
        label = METHODS.get(method, method) + (f" (seed {record.seed})" if method in seen else "")
        seen.add(method)
        rows.append([label, *cells])
    headers = ["method"]
    for name in ("train time", "train memory", "prefill", "decode", "inference memory"):
        headers += [f"{name} % ↓", "paper"]
    environment = dense.environment
    notes = [
        "percent of the dense model's in the same setting on the same machine: "
        f"{environment['device']}, {environment['num_threads']} threads",
        "train time: measuring, pruning, recovery and fine-tuning; train memory: the highest of them; on a CPU above "
        "what the process had before",
        "prefill and decode: timed in turns with the dense model, in processes of their own; the paper has one number "
        "for inference, which stands beside prefill",
    ]
    return Table(f"{dense.model['name']}, {mode}: time and memory (Table 2)", headers, rows, notes)


def _training(record: RunRecord, dense: RunRecord) -> list[float]:
    times, peaks = [], []
    for one in (record, dense):
        spent = one.efficiency["compression_seconds"] + one.efficiency.get("recovery_seconds", 0.0)
        times.append(spent + one.finetune["train_seconds"])
        highest = max(
            one.finetune["peak_memory_bytes"],
            one.efficiency["compression_peak_memory_bytes"] if one.pruning["method"] != "dense" else 0,
            one.pruning.get("recovery", {}).get("peak_memory_bytes", 0),
        )
        peaks.append(highest - one.efficiency.get("process_memory_bytes", 0))
    return [100 * times[0] / times[1], 100 * peaks[0] / peaks[1]]


def _inference(record: RunRecord) -> list[float | None]:
    ratios = record.efficiency.get("speed", {}).get("ratios")
    if not ratios:
        return [None, None, None]
    memory = max(record.efficiency["speed"]["own"][phase]["peak_memory_bytes"] for phase in ratios) / max(
        record.efficiency["speed"]["dense"][phase]["peak_memory_bytes"] for phase in ratios
    )
    return [100 * ratios["prefill"]["time"], 100 * ratios["decode"]["time"], 100 * memory]


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"
