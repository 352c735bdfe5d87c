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
from gradpruner.reporting.labels import caveats, method_place
from gradpruner.reporting.paper_rows import main_runs
from gradpruner.reporting.published import Published
from gradpruner.reporting.tables import (
    Table,
    depth_settings,
    plain_setting_name,
    row_labels,
    setting,
    setting_name,
    tell_apart,
)

DASH = "-"
_Pair = tuple[RunRecord, RunRecord]  # a run and the dense run of its seed


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
    return Table(title, headers, rows, notes, section="Table 11", heading=title.removesuffix(" (Table 11)"))


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

    Each run is compared with the dense run of its own seed, on the same machine. Of a model and kind of fine-tuning the
    settings are shown that have the most of the paper's methods, timed ones if there are any. Runs with other settings
    than the paper's have a table of their own, without its values.

    Args:
        records: finished runs.
        published: the paper's Table 2.
    """
    # Two names for one setting, such as a sparsity of 0.4 and 13/32, may have made a run twice.
    distinct: dict[str, RunRecord] = {}
    for record in records:
        distinct.setdefault(_run_key(record), record)
    settings: dict[str, list[RunRecord]] = {}
    for record in distinct.values():
        settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    groups = [group for group in settings.values() if any(_is_dense(record) for record in group)]
    tables = []
    for group in groups:
        alike = [_coverage(other, published) for other in groups if _block(other[0]) == _block(group[0])]
        if _coverage(group, published) < max(alike):
            continue
        dense = {seed_and_machine(record): record for record in group if _is_dense(record)}
        pairs = [(own, dense[key]) for own in group if (key := seed_and_machine(own)) in dense]
        usual = _usual(group, published)
        own = [pair for pair in pairs if id(pair[0]) in usual]
        others = [pair for pair in pairs if id(pair[0]) not in usual]
        if others and all(_is_dense(record) for record, _ in own):
            own, others = [], pairs
        made = [_efficiency_table(own, "", published, len(group) - len(pairs))] if own else []
        if others:
            made.append(_efficiency_table(others, ", other settings", None, 0, named_beside=own))
        tables += [(table, setting(group[0])) for table in made]
    return tell_apart(tables)


def _is_dense(record: RunRecord) -> bool:
    return record.pruning["method"] == "dense"


def _block(record: RunRecord) -> tuple[str, str]:
    return record.model["name"], record.config["finetune"]["mode"]


def seed_and_machine(record: RunRecord) -> tuple[int, str, int]:
    """Returns what a run and the dense run that it is compared with must share."""
    return record.seed, record.environment["device"], record.environment["num_threads"]


def _run_key(record: RunRecord) -> str:
    key = [setting(record), record.pruning["method"], depth_settings(record), *seed_and_machine(record)]
    return json.dumps(key, sort_keys=True)


def _coverage(group: list[RunRecord], published: Published | None) -> tuple[bool, int]:
    """Returns whether runs of a setting were timed, and how many methods of the paper it has."""
    known = {row.coordinates["method"] for row in published.rows} if published else set()
    methods = {record.pruning["method"] for record in group}
    return any(record.efficiency.get("speed") for record in group), len(methods & known if published else methods)


def _usual(group: list[RunRecord], published: Published | None) -> set[int]:
    """Returns the ids of the runs that have a published row: sparsity, adapter and merged layers are the paper's."""
    if published is None:
        return {id(record) for record in group}
    rows = published.select(finetune=group[0].config["finetune"]["mode"])
    return {id(record) for row in rows for record in main_runs(group, row, published.axis)}


def _efficiency_table(
    pairs: list[_Pair], title: str, published: Published | None, num_left_out: int, named_beside: Sequence[_Pair] = ()
) -> Table:
    """Makes a table of pairs of a run and its dense run; the paper's values are beside them if `published` is given.

    Labels name the settings in which runs differ from each other and from those of `named_beside`.
    """
    ordered = sorted(pairs, key=lambda pair: (method_place(pair[0].pruning["method"]), pair[0].seed))
    labels = row_labels([record for record, _ in ordered] + [record for record, _ in named_beside])[: len(ordered)]
    first = ordered[0][1]
    mode = first.config["finetune"]["mode"]
    paper = {row.coordinates["method"]: row.values for row in published.select(finetune=mode)} if published else {}
    rows = []
    for (record, dense), label in zip(ordered, labels, strict=True):
        method = record.pruning["method"]
        step, fresh, *inference = timed(record)
        time, memory = training_costs(record, dense, fresh)
        own: list[float | Decimal | None] = [time, step, memory, *inference]
        # The paper has one inference time, of whole answers; it stands beside our prefill. Step and decode have none.
        values = [*paper[method]] if method in paper else [None] * 4
        theirs = [values[0], None, values[1], values[2], None, values[3]]
        cells = [_percent(value) for pair in zip(own, theirs, strict=True) for value in pair]
        seed = f", seed {record.seed}" if labels.count(label) > 1 else ""
        rows.append([label + seed, *(cells if published else cells[::2])])
    headers = ["method"]
    for name in ("train time", "train step", "train memory", "prefill", "decode", "inference memory"):
        headers += [f"{name} % ↓", "paper"] if published else [f"{name} % ↓"]
    machines = dict.fromkeys(
        f"{dense.environment['device']}, {dense.environment['num_threads']} threads" for _, dense in ordered
    )
    notes = [
        "percent of the dense model of the same seed in the same setting on the same machine: " + "; ".join(machines),
        "train time: measuring, pruning, recovery and fine-tuning of this run",
        "train step, prefill, decode, and their memory: timed in turns with the dense model, in processes of their own",
        "train memory: the higher of a training step's and of what compression took, the latter in the run's own "
        "process; for methods that act in training, the peak of the run",
    ]
    if not all(record.finetune for record, _ in ordered):
        notes.append("rows without train time: timings of random weights alone (`make test-gpu`), no run")
    notes += caveats([record for record, _ in ordered])
    if published:
        notes.append(
            "paper: at the sparsity, adapter and number of merged layers of these runs; its one number for inference "
            "stands beside prefill"
        )
    if num_left_out:
        notes.append(f"left out: {num_left_out} runs without a dense run of their seed on the same machine")
    sources = [[record] for record, _ in ordered]
    heading = plain_setting_name(first) + title
    title = f"{setting_name(first)}: time and memory (Table 2){title}"
    return Table(title, headers, rows, notes, sources, "Table 2", heading)


def training_costs(record: RunRecord, dense: RunRecord, fresh: float | None) -> tuple[float | None, float | None]:
    """Returns time and memory of training as percent of dense; without fine-tunes, None and `fresh`.

    The memory is None as well where the dense fine-tune took none above what its process already had.

    Args:
        record: the run.
        dense: the dense run of the same setting.
        fresh: memory of a training step in a fresh process as percent of dense, if it was measured.
    """
    if not (record.finetune and dense.finetune):
        return None, fresh
    time = 100 * _total_seconds(record) / _total_seconds(dense)
    base = _above_start(dense, dense.finetune["peak_memory_bytes"])
    if not base:
        return time, fresh
    compression = 0 if record.pruning["method"] == "dense" else record.efficiency["compression_peak_memory_bytes"]
    recovery = record.pruning["recovery"].get("peak_memory_bytes", 0)
    if fresh is None:
        fresh = 100 * _above_start(record, record.finetune["peak_memory_bytes"]) / base
    return time, max(fresh, 100 * _above_start(record, max(compression, recovery)) / base)


def _total_seconds(record: RunRecord) -> float:
    efficiency = record.efficiency
    return efficiency["compression_seconds"] + efficiency["recovery_seconds"] + record.finetune["train_seconds"]


def _above_start(record: RunRecord, peak_bytes: int) -> float:
    """Returns memory above what the process had before the run, so that the libraries do not count."""
    return max(0.0, float(peak_bytes - record.efficiency.get("process_memory_bytes", 0)))


def timed(record: RunRecord) -> list[float | None]:
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
