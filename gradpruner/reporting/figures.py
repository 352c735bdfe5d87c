"""Figures of one run. Colours are told apart by colour-blind readers and by a grey print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gradpruner.plan import PruningPlan

KEPT, MERGED, PRUNED = "#0072B2", "#E69F00", "#CCCCCC"  # Okabe and Ito's palette
LINE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
)


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training loss and learning rate over optimizer steps."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["loss"] for entry in history], color=KEPT, label="loss")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per answer token)", ylim=(0, None))
    rate = axes.twinx()
    rate.plot(steps, [entry["learning_rate"] for entry in history], color="#888888", linestyle="--", linewidth=1)
    rate.set_ylabel("learning rate (dashed)")
    rate.set_ylim(0, None)
    _save(figure, path)


def plot_importance(plan: PruningPlan, report: dict[str, Any], path: Path) -> None:
    """Layer importance with each layer's fate and, for a per-step series, how soon the pruned set settled."""
    overlap = report.get("prefix_overlap")
    figure = Figure(figsize=(8, 5.2 if overlap else 3.2), layout="constrained")
    axes = figure.subplots(2 if overlap else 1, 1, squeeze=False)[:, 0]
    layers = range(plan.num_hidden_layers)
    merged = [layer for layers_in in plan.merges.values() for layer in layers_in]
    colors = [MERGED if i in merged else PRUNED if i in plan.pruned_layers else KEPT for i in layers]
    axes[0].bar(layers, plan.layer_importance, color=colors, edgecolor="black", linewidth=0.4)
    axes[0].set_yscale("log")
    axes[0].set(xlabel="decoder layer", ylabel="layer importance", xlim=(-0.7, plan.num_hidden_layers - 0.3))
    axes[0].set_xticks(range(0, plan.num_hidden_layers, max(1, plan.num_hidden_layers // 15)))
    fates = [("kept", KEPT), ("pruned, merged", MERGED), ("pruned", PRUNED)]
    axes[0].legend(
        handles=[Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=name) for name, color in fates],
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.18),
        frameon=False,
    )
    if overlap:
        points = [(step, value) for step, value in enumerate(overlap, start=1) if value is not None]
        axes[1].plot(*zip(*points, strict=True), color=KEPT, marker="o", markersize=3)
        axes[1].set(
            xlabel="importance steps used",
            ylabel="share of final pruned set",
            ylim=(0, 1.05),
            xlim=(0.5, len(overlap) + 0.5),
        )
    _save(figure, path)


def plot_speed(points: Mapping[float, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Time and memory against sparsity, as parts of the dense model's.

    Args:
        points: by fraction of layers pruned: by phase: `time` and `memory`.
        path: of the picture.
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "gradpruner"}):
        figure.savefig(path, dpi=150)
