"""The pruning plan: which decoder layers are pruned, which of them merge, and which kept layer absorbs each.

Pure Python, so that a plan can be made, checked, saved and read without a model.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gradpruner.files import write_json

PLAN_VERSION = 3  # 2: details; 3: width


@dataclass(frozen=True)
class WidthPlan:
    """Units to keep in the kept layers; numbers are 0-based positions in the dense model, ascending.

    Attributes:
        heads: query heads of each kept layer. A KV head is kept if a query head that reads it is kept.
        channels: MLP channels of each kept layer.
        hidden: channels of the residual stream, or None for all.
    """

    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on a plan that cannot be carried out."""
        hidden = [] if self.hidden is None else [("hidden", self.hidden)]
        kinds = [(kind, units) for kind in ("heads", "channels") for units in getattr(self, kind)]
        for kind, units in (*kinds, *hidden):
            if not units or units[0] < 0 or any(one >= other for one, other in itertools.pairwise(units)):
                raise ValueError(
                    f"{kind} that stay must be ascending, distinct and at least one, got {_shortened(units)}. "
                    "The plan is damaged."
                )
        if len(self.heads) != len(self.channels):
            raise ValueError(
                f"A plan must name heads and channels of the same layers, got {len(self.heads)} and "
                f"{len(self.channels)} layers. The plan is damaged."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready form, with runs of units as text: `0-2 5` is 0, 1, 2 and 5."""
        return {
            "heads": [number_runs(units) for units in self.heads],
            "channels": [number_runs(units) for units in self.channels],
            "hidden": None if self.hidden is None else number_runs(self.hidden),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the plan from the output of `to_dict`."""
        heads, channels = (tuple(map(_units, data[kind])) for kind in ("heads", "channels"))
        return cls(heads, channels, None if data["hidden"] is None else _units(data["hidden"]))


def number_runs(units: Sequence[int]) -> str:
    """Returns ascending numbers in short form: `0-3 7 9-10`."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _units(runs: str) -> tuple[int, ...]:
    units: list[int] = []
    for run in runs.split():
        first, _, last = run.partition("-")
        units.extend(range(int(first), int(last or first) + 1))
    return tuple(units)


def _shortened(units: Sequence[int]) -> str:
    return str(list(units[:8])) + (f" and {len(units) - 8} more" if len(units) > 8 else "")


@dataclass(frozen=True)
class PruningPlan:
    """Plan of which decoder layers to prune and merge; layer numbers are 0-based positions in the dense model.

    Attributes:
        num_hidden_layers: decoder layers of the dense model.
        pruned_layers: layers to prune, ascending.
        absorbed_by: for each pruned layer that was chosen to merge, the kept layer that absorbs it, or None where no
            kept layer comes before it (the pruned layer is then dropped unmerged).
        merge_rule: one of `merge.MERGE_RULES`.
        density: fraction of each merged weight that may enter the kept one.
        layer_importance: one score per layer, as the method computed it; empty for methods without scores.
        method: name of the method that made the plan.
        details: what else the method computed, JSON-ready: similarities tried, distances, losses.
        width: units to keep in the kept layers; None: all.
    """

    num_hidden_layers: int
    pruned_layers: tuple[int, ...] = ()
    absorbed_by: Mapping[int, int | None] = dataclasses.field(default_factory=dict)
    merge_rule: str = "none"
    density: float = 0.0
    layer_importance: tuple[float, ...] = ()
    method: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    width: WidthPlan | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on a plan that cannot be carried out."""
        layers, pruned = range(self.num_hidden_layers), self.pruned_layers
        if sorted(set(pruned)) != list(pruned) or any(layer not in layers for layer in pruned):
            raise ValueError(
                f"pruned_layers must be ascending, distinct and within 0 to {self.num_hidden_layers - 1}, "
                f"got {list(pruned)}. The plan is damaged or belongs to another model."
            )
        if self.num_hidden_layers < 1 or len(pruned) == self.num_hidden_layers:
            raise ValueError(
                f"A plan must keep at least one layer, got {len(pruned)} pruned of {self.num_hidden_layers}. "
                "The plan is damaged."
            )
        if self.layer_importance and len(self.layer_importance) != self.num_hidden_layers:
            raise ValueError(
                f"layer_importance must have one score for each of {self.num_hidden_layers} layers, "
                f"got {len(self.layer_importance)}. The plan is damaged or belongs to another model."
            )
        if self.width is not None and len(self.width.heads) != len(self.kept_layers):
            raise ValueError(
                f"A plan must say what stays of each of its {len(self.kept_layers)} kept layers, got "
                f"{len(self.width.heads)}. The plan is damaged."
            )
        for layer, absorber in self.absorbed_by.items():
            if layer not in pruned or absorber != preceding_kept_layer(layer, pruned):
                raise ValueError(
                    f"absorbed_by must map pruned layers to the nearest kept layer before them, got {layer} -> "
                    f"{absorber} with pruned layers {list(pruned)}. The plan is damaged."
                )

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers to keep, ascending."""
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in self.pruned_layers)

    @property
    def merges(self) -> dict[int, tuple[int, ...]]:
        """Kept layer -> the pruned layers that it absorbs, both ascending."""
        merges: dict[int, tuple[int, ...]] = {}
        for layer in sorted(self.absorbed_by):
            absorber = self.absorbed_by[layer]
            if absorber is not None and self.merge_rule != "none":
                merges[absorber] = (*merges.get(absorber, ()), layer)
        return dict(sorted(merges.items()))

    @property
    def dropped_unmerged(self) -> tuple[int, ...]:
        """Layers chosen to merge that have no kept layer before them."""
        return tuple(layer for layer in sorted(self.absorbed_by) if self.absorbed_by[layer] is None)

    def with_details(self, **details: Any) -> Self:
        """Returns a copy with more `details`."""
        return dataclasses.replace(self, details={**self.details, **details})

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready form, with the kept layers spelt out for readers."""
        return {
            "version": PLAN_VERSION,
            **dataclasses.asdict(self),
            "pruned_layers": list(self.pruned_layers),
            "kept_layers": list(self.kept_layers),
            "absorbed_by": {str(layer): absorber for layer, absorber in sorted(self.absorbed_by.items())},
            "dropped_unmerged": list(self.dropped_unmerged),
            "layer_importance": list(self.layer_importance),
            "width": self.width and self.width.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the plan from the output of `to_dict`; raises ValueError on another version or inconsistent data."""
        if data.get("version") != PLAN_VERSION:
            raise ValueError(
                f"Cannot read plan version {data.get('version')!r}, this release writes {PLAN_VERSION}. "
                "Make the plan again with this release."
            )
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        if missing:
            raise ValueError(f"The plan lacks {', '.join(missing)}: it is damaged. Make it again.")
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        fields["pruned_layers"] = tuple(fields["pruned_layers"])
        fields["layer_importance"] = tuple(fields["layer_importance"])
        fields["absorbed_by"] = {int(layer): absorber for layer, absorber in fields["absorbed_by"].items()}
        fields["width"] = fields["width"] and WidthPlan.from_dict(fields["width"])
        return cls(**fields)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a plan written by `save`."""
        return cls.from_dict(json.loads(path.read_text()))


def preceding_kept_layer(layer: int, pruned_layers: Sequence[int]) -> int | None:
    """Returns the nearest kept layer before `layer` ("only merged with the preceding retained layer", Section 3.2)."""
    return next((before for before in range(layer - 1, -1, -1) if before not in pruned_layers), None)


def lowest_layers(layer_importance: Sequence[float], num_pruned_layers: int) -> tuple[int, ...]:
    """Returns the `num_pruned_layers` least important layers, ascending; among equals the first is pruned first."""
    ranking = sorted(range(len(layer_importance)), key=lambda layer: (layer_importance[layer], layer))
    return tuple(sorted(ranking[:num_pruned_layers]))


def most_important_layers(
    layer_importance: Sequence[float], pruned_layers: Sequence[int], merge_count: int
) -> tuple[int, ...]:
    """Returns the `merge_count` most important pruned layers, ascending; among equals the first merges first."""
    ranking = sorted(pruned_layers, key=lambda layer: (-layer_importance[layer], layer))
    return tuple(sorted(ranking[:merge_count]))


def make_plan(
    layer_importance: Sequence[float],
    num_pruned_layers: int,
    merge_count: int,
    *,
    merge_rule: str = "sign_average",
    density: float = 0.2,
    merged_layers: Sequence[int] | None = None,
    method: str = "gradpruner",
) -> PruningPlan:
    """Makes a plan that prunes the least important layers and merges the most important of those (Section 3).

    Args:
        layer_importance: one finite score per layer (Eq. 4).
        num_pruned_layers: number of layers to prune.
        merge_count: number of pruned layers to merge; ignored when `merged_layers` is given.
        merge_rule: one of `merge.MERGE_RULES`.
        density: fraction of each merged weight that may enter the kept one.
        merged_layers: the pruned layers to merge, instead of the most important ones.
        method: name of the method, for the plan.

    Raises:
        ValueError: if scores are not finite, counts do not fit, or a layer of `merged_layers` is not pruned.
    """
    num_layers = len(layer_importance)
    bad = [layer for layer, score in enumerate(layer_importance) if not abs(score) < float("inf")]
    if bad:
        raise ValueError(
            f"layer_importance must be finite, got NaN or infinity for layers {bad}. "
            "The importance run diverged: lower its learning rate or check the weights."
        )
    check_counts(num_layers, num_pruned_layers, merge_count if merged_layers is None else len(merged_layers))
    pruned = lowest_layers(layer_importance, num_pruned_layers)
    chosen = most_important_layers(layer_importance, pruned, merge_count) if merged_layers is None else merged_layers
    if merge_rule == "none":
        chosen = ()
    strangers = sorted(set(chosen) - set(pruned))
    if strangers:
        raise ValueError(
            f"merged_layers must be among the pruned layers {list(pruned)}, got {strangers} besides. "
            "Leave them out, or use merge_count to take the most important pruned layers."
        )
    return PruningPlan(
        num_hidden_layers=num_layers,
        pruned_layers=pruned,
        absorbed_by={layer: preceding_kept_layer(layer, pruned) for layer in chosen},
        merge_rule=merge_rule,
        density=density,
        layer_importance=tuple(float(score) for score in layer_importance),
        method=method,
    )


def check_counts(num_hidden_layers: int, num_pruned_layers: int, merge_count: int = 0) -> None:
    """Raises ValueError if a model of that depth cannot have that many layers pruned or merged."""
    if not 0 <= num_pruned_layers <= num_hidden_layers - 2:
        raise ValueError(
            f"num_pruned_layers must leave at least 2 of the model's {num_hidden_layers} decoder layers, "
            f"got {num_pruned_layers}. Lower sparsity or method.num_pruned_layers."
        )
    if not 0 <= merge_count <= num_pruned_layers:
        raise ValueError(
            f"merge_count must be between 0 and the {num_pruned_layers} pruned layers, got {merge_count}. "
            "Lower merge_count or raise sparsity."
        )
