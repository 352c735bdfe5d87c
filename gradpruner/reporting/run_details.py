"""What a page says of one run: its layers, importance, loss, numbers, changed answers and command."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradpruner.messages import duration, parameters
from gradpruner.plan import number_runs
from gradpruner.record import RECORD_FILE, RunRecord
from gradpruner.reporting.changed_answers import ChangedAnswers, changed_answers
from gradpruner.reporting.comparing import QUANTILE
from gradpruner.reporting.differing import plain_differences
from gradpruner.reporting.labels import METRIC_LABELS
from gradpruner.reporting.means import DENSE
from gradpruner.reporting.overview import machine_of
from gradpruner.reporting.row_scores import read_numbers
from gradpruner.reporting.run_groups import run_labels
from gradpruner.reporting.tables import plain_setting_name, row_order, setting

KEPT, MERGED, PRUNED = "kept", "merged", "pruned"
MOST_POINTS = 160  # of a loss curve
STRIP_WIDTH = 600.0  # units of the drawing
BAR_HEIGHT = 70.0
LOSS_WIDTH, LOSS_HEIGHT = 600.0, 90.0


@dataclass(frozen=True)
class Layer:
    """A decoder layer in the strip.

    Attributes:
        index: number of the layer in the dense model.
        fate: kept, merged or pruned.
        x: left end.
        width: width of the box.
        height: height of the importance bar; 0 without a score.
        kept_fraction: fraction of the MLP's width that stays.
    """

    index: int
    fate: str
    x: float
    width: float
    height: float
    kept_fraction: float


@dataclass(frozen=True)
class Curve:
    """A loss curve as points of a polyline, with the numbers at its ends."""

    points: str
    first: float
    last: float
    highest: float
    num_steps: int


@dataclass(frozen=True)
class Details:
    """One run.

    Attributes:
        anchor: its id in the page.
        name: method and, where several runs have one, what tells them apart.
        facts: numbers and settings by name.
        layers: the strip of layers; empty if the model has no plan of layers.
        arrows: merged layers with the layer that absorbs each.
        said: the plan as a sentence.
        loss: loss of the fine-tune, or None if the record does not have it.
        answers: what changed against the dense model, or None where predictions are missing.
        warnings: warnings and notes of the method.
        command: the command that makes the run again; empty if it is not known.
        path: folder of the run, or file of its record.
        record: the run.
        has_importance: whether the strip has bars of importance.
    """

    anchor: str
    name: str
    facts: dict[str, str]
    layers: list[Layer]
    arrows: list[tuple[int, int]]
    said: str
    loss: Curve | None
    answers: ChangedAnswers | None
    warnings: list[str]
    command: str
    path: Path
    record: RunRecord
    has_importance: bool


def run_groups(
    records: Sequence[RunRecord],
    commands: Mapping[int, str],
    losses: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, list[Details]]:
    """Returns details of all runs by setting: model, dataset, kind of fine-tuning, and in what settings differ.

    Args:
        records: finished runs.
        commands: the command of each run by `id` of its record.
        losses: history of the fine-tune by identity, see `comparison_plots.plot_losses`.
    """
    settings: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda each: (*row_order(each), each.seed)):
        settings.setdefault(json.dumps(setting(record), sort_keys=True), []).append(record)
    names = {key: plain_setting_name(runs[0]) for key, runs in settings.items()}
    found: dict[str, list[Details]] = {}
    number = 0
    for key in sorted(settings, key=lambda key: (names[key], key)):
        runs = settings[key]
        alike = [json.loads(other) for other in settings if names[other] == names[key]]
        details = []
        for label, record in zip(run_labels(runs), runs, strict=True):
            number += 1
            dense = [run for run in runs if run.pruning["method"] == DENSE and run.seed == record.seed]
            command = commands.get(id(record), "")
            details.append(_details(f"run-{number}", label, record, dense, command, losses))
        title = ", ".join([names[key], *plain_differences(json.loads(key), alike)])
        found.setdefault(title, []).extend(details)
    return found


def _details(
    anchor: str,
    label: str,
    record: RunRecord,
    dense: Sequence[RunRecord],
    command: str,
    losses: Mapping[str, Sequence[Mapping[str, float]]],
) -> Details:
    report = record.pruning["report"]
    layers = _layers(record)
    answers = changed_answers(record, dense[0]) if dense and record.pruning["method"] != DENSE else None
    path = record.path or Path()
    return Details(
        anchor,
        label if f"seed {record.seed}" in label else f"{label} / seed {record.seed}",
        _facts(record),
        layers,
        [(int(layer), into) for layer, into in record.pruning["absorbed_by"].items() if into is not None],
        _said(record),
        _curve(record, losses),
        answers,
        [*report.get("warnings", []), *report.get("notes", [])],
        command,
        path.parent if path.name == RECORD_FILE else path,
        record,
        any(layer.height for layer in layers),
    )


def _facts(record: RunRecord) -> dict[str, str]:
    pruning, finetune, data = record.pruning, record.finetune, record.config["dataset"]
    share = pruning["num_parameters"] / record.model["num_parameters"]
    facts = {
        "Layers": f"{pruning['num_hidden_layers']} of {record.model['num_hidden_layers']}",
        "Parameters": f"{parameters(pruning['num_parameters'])}, {100 * share:.1f} % of dense",
    }
    for name, label in METRIC_LABELS.items():
        for metrics, when in ((record.metrics, ""), (record.metrics_before, " before fine-tuning")):
            value, error = metrics.get(name), metrics.get(f"{name}_stderr")
            if isinstance(value, float) and isinstance(error, float):
                facts[f"{label[0].upper()}{label[1:]}{when}"] = (
                    f"{value:.3f} ({value - QUANTILE * error:.3f} to {value + QUANTILE * error:.3f})"
                )
    rows = data.get("max_train_samples") or "all"
    facts["Rows"] = f"{rows} to train, {record.metrics['num_examples']} to test"
    facts["Fine-tune"] = (
        f"{finetune['steps']} steps, {finetune['tokens']:,} tokens, {duration(finetune['train_seconds'])}"
    )
    facts["Compression"] = duration(record.efficiency["compression_seconds"])
    facts["Peak memory of the fine-tune"] = f"{finetune['peak_memory_bytes'] / 2**30:.2f} GiB"
    for phase, own in (record.efficiency.get("speed") or {"ratios": {}})["ratios"].items():
        facts[f"{phase.capitalize()} beside dense"] = (
            f"{own['time']:.0%} of the time, {own['memory']:.0%} of the memory"
        )
    machine = record.environment
    facts["Machine"] = machine_of(record)
    if commit := machine.get("git_commit"):
        facts["Commit"] = commit[:10] + (" with changes" if machine.get("git_dirty") else "")
    return facts


def _layers(record: RunRecord) -> list[Layer]:
    num_layers = record.model["num_hidden_layers"]
    pruned = set(record.pruning["pruned_layers"])
    merged = {int(layer) for layer, into in record.pruning["absorbed_by"].items() if into is not None}
    scores = record.pruning["layer_importance"]
    positive = [math.log(score) for score in scores if score > 0]
    low, high = (min(positive), max(positive)) if positive else (0.0, 0.0)
    widths = iter(_kept_fractions(record))
    step = STRIP_WIDTH / num_layers
    layers = []
    for index in range(num_layers):
        fate = MERGED if index in merged else PRUNED if index in pruned else KEPT
        height = 0.0
        if scores and scores[index] > 0:
            height = 4 + (BAR_HEIGHT - 4) * ((math.log(scores[index]) - low) / (high - low) if high > low else 1.0)
        fraction = 1.0 if index in pruned else next(widths, 1.0)
        layers.append(Layer(index, fate, index * step + 1, step - 2, height, fraction))
    return layers


def _kept_fractions(record: RunRecord) -> list[float]:
    """Returns, for each kept layer, the fraction of its MLP's width that stays."""
    kept = [layer for layer in range(record.model["num_hidden_layers"]) if layer not in record.pruning["pruned_layers"]]
    before, after = record.model["shape"]["intermediate_size"], record.pruning["shape"]["intermediate_size"]
    return [size / before[layer] for size, layer in zip(after, kept, strict=False)]


def _said(record: RunRecord) -> str:
    pruned = record.pruning["pruned_layers"]
    merges = [(layer, into) for layer, into in record.pruning["absorbed_by"].items() if into is not None]
    parts = [f"Pruned layers: {number_runs(pruned)}" if pruned else "No layer is pruned"]
    if merges:
        parts.append("merged: " + ", ".join(f"{layer} into {into}" for layer, into in merges))
    fractions = _kept_fractions(record)
    if fractions and min(fractions) < 1:
        parts.append(f"MLP width kept: {100 * min(fractions):.0f} to {100 * max(fractions):.0f} %")
    return "; ".join(parts) + "."


def _curve(record: RunRecord, losses: Mapping[str, Sequence[Mapping[str, float]]]) -> Curve | None:
    history = losses.get(record.identity)
    values = [entry["loss"] for entry in history] if history else []
    if "losses" in record.finetune:
        values = read_numbers(record.finetune["losses"])
    if len(values) < 2:
        return None
    size = math.ceil(len(values) / MOST_POINTS)
    means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
    highest = max(means)
    points = " ".join(
        f"{LOSS_WIDTH * at / (len(means) - 1):.0f},{LOSS_HEIGHT * (1 - value / highest):.1f}"
        for at, value in enumerate(means)
    )
    return Curve(points, values[0], values[-1], highest, len(values))
