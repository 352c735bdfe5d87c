"""Figures of layers over many runs: their importance, how early it is known, and which layers are pruned or merged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike, NDArray

from gradpruner.plan import lowest_layers
from gradpruner.record import RunRecord
from gradpruner.reporting.figures import (
    KEPT,
    LINE_STYLES,
    MERGED,
    ON_DARK,
    ON_LIGHT,
    Picture,
    canvas,
    legend_below,
    wrap_rows,
)


def sensitivity_curve(step_importance: ArrayLike, num_top_layers: int) -> NDArray[np.float64]:
    """Returns how many of a run's most important layers its first steps already find (the paper's Section 2.3).

    Importance up to a step is the mean over the steps so far (Eq. 3 and 4). Ties are broken as in pruning: of equal
    layers, the first counts as less important.

    Args:
        step_importance: importance per step and layer, (t, L).
        num_top_layers: k, the number of layers that count as most important; 20 of 32 in the paper.

    Returns:
        For each step, the fraction in [0, 1] of the top k so far that are in the top k of the run, (t,); NaN while the
        steps have no gradient.

    Raises:
        ValueError: if the series is not (t, L) with at least one step, or k is not within 1 to L.
    """
    series = np.asarray(step_importance, dtype=np.float64)
    if series.ndim != 2 or 0 in series.shape:
        raise ValueError(
            f"step_importance must have one row a step and one column a layer, got shape {series.shape}. "
            "Take the report's step_importance of a finished importance run."
        )
    num_steps, num_layers = series.shape
    if not 1 <= num_top_layers <= num_layers:
        raise ValueError(
            f"num_top_layers must be between 1 and the {num_layers} layers, got {num_top_layers}. "
            "Give the number of layers that pruning keeps."
        )

    def top(means: NDArray[np.float64]) -> set[int]:
        return set(range(num_layers)) - set(lowest_layers(means.tolist(), num_layers - num_top_layers))

    means = series.cumsum(axis=0) / np.arange(1, num_steps + 1)[:, None]  # (t, L)
    final = top(means[-1])
    return np.array([len(top(row) & final) / num_top_layers if row.any() else np.nan for row in means])


def plot_sensitivity(curves: Mapping[str, NDArray[np.float64]], num_top_layers: str, path: Path) -> Picture:
    """Draws the agreement of early layer importance with that of the whole run, the paper's Figure 2.

    Args:
        curves: results of `sensitivity_curve` by label.
        num_top_layers: k, for the caption.
        path: file of the picture.
    """
    alt = []
    with canvas(path, 2.0) as figure:
        axes = figure.subplots()
        for index, (label, curve) in enumerate(curves.items()):
            percent = 100 * np.arange(1, len(curve) + 1) / len(curve)
            style = LINE_STYLES[index % len(LINE_STYLES)]
            axes.plot(percent, 100 * curve, label=label, markevery=max(1, len(curve) // 8), **style)
            early = int(np.argmax((percent >= 10) & np.isfinite(curve)))  # the first steps may have no gradient
            alt.append(f"{label}: {100 * curve[early]:.0f} % at {percent[early]:.0f} % of {len(curve)} steps")
        axes.set_xscale("log")  # the claim is about the first percent
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="steps used (% of the run)", ylabel=f"top-{num_top_layers} layers in common (%)")
        axes.set_ylim(min(50.0, *(95 * float(np.nanmin(curve)) for curve in curves.values())), 102)
        axes.grid(alpha=0.3)
        legend_below(figure)
    caption = (
        f"Share of the {num_top_layers} most important layers that are among those of the whole run, by the mean "
        "importance up to each step."
    )
    return Picture(path, caption, f"Line chart of layers in common. {'; '.join(alt)}.")


def plot_importance_map(runs: Mapping[str, RunRecord], path: Path) -> Picture:
    """Draws layer importance as a fraction of its sum on a log scale: one row per run, one column per decoder layer.

    Args:
        runs: runs by label; each has `layer_importance`. Scores of 0 or less have no colour.
        path: file of the picture.
    """
    num_layers = max(len(run.pruning["layer_importance"]) for run in runs.values())
    shares = np.full((len(runs), num_layers), np.nan)
    for row, run in zip(shares, runs.values(), strict=True):
        scores = np.array(run.pruning["layer_importance"], dtype=np.float64)
        row[: len(scores)] = np.where(scores > 0, 100 * scores / (scores.clip(0).sum() or 1), np.nan)
    known = shares[np.isfinite(shares)]
    norm = LogNorm(known.min(initial=100), known.max(initial=0) or 100)
    labels, height = wrap_rows(runs, 0.16)
    with canvas(path, 0.9 + height) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, norm=norm, cmap="cividis", aspect="auto", interpolation="nearest")
        for index, run in enumerate(runs.values()):
            for layer in run.pruning["pruned_layers"]:
                dark = not norm(shares[index, layer]) > 0.5 and np.isfinite(shares[index, layer])
                axes.plot(layer, index, "x", color=ON_DARK if dark else ON_LIGHT, markersize=3, markeredgewidth=0.8)
        _layer_axis(axes, labels, num_layers)
        bar = figure.colorbar(image, orientation="horizontal", aspect=40, pad=0.02)
        bar.set_label("importance (% of the row's sum)")
        bar.ax.xaxis.set_major_formatter("{x:g}")
        bar.ax.xaxis.set_minor_formatter("")
    caption = (
        "Layer importance as each run saw it, as part of the row's sum; x: pruned. "
        "White cells have no score above 0. Scores of different methods are different quantities."
    )
    return Picture(path, caption, f"Heat map of layer importance. {_fates(runs)}.")


def plot_plans(runs: Mapping[str, RunRecord], path: Path) -> Picture:
    """Draws which layers are kept, pruned or merged: one row per run, one box per decoder layer.

    The height of a box is the fraction of the layer's MLP weights that is kept, so it shows methods that make layers
    narrower. An arrow runs from merged layers to the kept layer that absorbs them.

    Args:
        runs: runs by label.
        path: file of the picture.
    """
    num_layers = max(run.model["num_hidden_layers"] for run in runs.values())
    look: dict[str, dict[str, Any]] = {
        "kept": {"facecolor": KEPT},
        "merged": {"facecolor": MERGED, "hatch": "/////"},
        "pruned": {"facecolor": "white"},
    }
    edge: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.4}
    labels, height = wrap_rows(runs, 0.2)
    with canvas(path, 0.75 + height) as figure:
        axes = figure.subplots()
        for row, run in enumerate(runs.values()):
            absorbed_by = _absorbed_by(run)
            heights = iter(_kept_mlp_fractions(run))
            for layer in range(run.model["num_hidden_layers"]):
                pruned = layer in run.pruning["pruned_layers"]
                fate = "merged" if layer in absorbed_by else "pruned" if pruned else "kept"
                height = 0.5 if pruned else 0.5 * next(heights)
                axes.add_patch(Rectangle((layer - 0.4, row + 0.3 - height), 0.8, height, **look[fate], **edge))
            for absorber in sorted(set(absorbed_by.values())):
                merged = [layer for layer, into in absorbed_by.items() if into == absorber]
                line: dict[str, Any] = {"color": "black", "linewidth": 0.7}
                top = row - 0.38
                axes.plot([absorber, max(merged)], [top, top], **line)
                axes.vlines(merged, top, row - 0.2, **line)
                arrow = {"arrowstyle": "-|>,head_length=0.2,head_width=0.12", "shrinkA": 0, "shrinkB": 0, **line}
                axes.annotate("", (absorber, row - 0.18), (absorber, top), arrowprops=arrow)
        _layer_axis(axes, labels, num_layers)
        axes.set(xlim=(-0.7, num_layers - 0.3), ylim=(len(runs) - 0.5, -0.6))
        figure.legend(
            handles=[Patch(label=fate, **style, **edge) for fate, style in look.items()],
            loc="outside upper center",
            ncols=3,
        )
    caption = (
        "Which layers stay; arrows lead from merged layers to the one that absorbs them. "
        "The height of a kept layer is the part of its MLP weights that stays."
    )
    return Picture(path, caption, f"A row of boxes for each run. {_fates(runs)}.")


def _layer_axis(axes: Any, labels: list[str], num_layers: int) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(0, num_layers, 1 + num_layers // 8))
    axes.set_xlabel("decoder layer")
    axes.tick_params(length=2)


def _absorbed_by(run: RunRecord) -> dict[int, int]:
    absorbers = run.pruning["absorbed_by"]
    return {int(layer): absorber for layer, absorber in absorbers.items() if absorber is not None}


def _kept_mlp_fractions(run: RunRecord) -> list[float]:
    """Returns, for each kept layer, the fraction of its MLP weights that is kept."""
    kept = [layer for layer in range(run.model["num_hidden_layers"]) if layer not in run.pruning["pruned_layers"]]
    before, after = run.model["shape"], run.pruning["shape"]
    hidden = after["hidden_size"] / before["hidden_size"]
    sizes = zip(after["intermediate_size"], kept, strict=True)
    return [hidden * size / before["intermediate_size"][layer] for size, layer in sizes]


def _fates(runs: Mapping[str, RunRecord]) -> str:
    parts = []
    for label, run in runs.items():
        merges = ", ".join(f"{layer} into {into}" for layer, into in _absorbed_by(run).items())
        pruned = ", ".join(map(str, run.pruning["pruned_layers"])) or "none"
        parts.append(f"{label}: pruned {pruned}" + (f"; merged {merges}" if merges else ""))
    return ". ".join(parts)
