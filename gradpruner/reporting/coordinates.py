"""The settings of a run under the names of the published coordinates, and whether a run is one of a published row.

Settings that the run's method does not have are not compared, so a dense run stands in every column of a sweep.
"""

import math
from collections.abc import Mapping
from typing import Any

from gradpruner.record import RunRecord
from gradpruner.reporting.labels import VARIANT_OF
from gradpruner.reporting.published import PublishedRow
from gradpruner.tasks.jsonl import name_of

# The paper's settings wherever a table does not vary them. The paper does not say which merge rule it uses,
# that of Eq. 5 or of Eq. 6, so runs with either belong.
USUAL = {
    "test": None,
    "sparsity": 0.4,
    "density": 0.2,
    "merge_rule": ("sign_sum", "sign_average"),
    "adapter": "lora",
    "repair": "none",
    "loss": "answers",
}
# Runs belong even if they differ from the paper's in these. With another fine-tuning or dataset the paper's values are
# not shown (`paper_tables`); for a model of another depth, counts of pruned layers are scaled (`scaled`).
NOT_MATCHED = ("model", "finetune", "dataset", "num_hidden_layers")
DEPTHS = ("sparsity", "num_pruned_layers")


def coordinates(record: RunRecord) -> dict[str, Any]:
    """Returns the settings of a run under the names of the published coordinates, without those its method lacks."""
    config, method = record.config, record.config["method"]
    own = {key: method[key] for key in ("merge_count", "density", "merge_rule", "adapter", "repair") if key in method}
    if method.get("merged_layers"):  # the layers to merge were given one by one instead of by their number
        own["merge_count"] = len(method["merged_layers"])
    num_layers = record.model["num_hidden_layers"]
    if "sparsity" in method or "omission_rate" in method:
        given = method.get("sparsity", method.get("omission_rate"))
        # Counted in the pruned model: the config may have `sparsity=auto`, or a number of layers instead.
        own["num_pruned_layers"] = num_layers - record.pruning["num_hidden_layers"]
        own["sparsity"] = given if isinstance(given, float) else own["num_pruned_layers"] / num_layers
    if "fraction" in method:
        steps = own["steps"] = method["steps"]
        own["fraction"] = method["fraction"]
        if not own["fraction"] and isinstance(steps, int):
            own["fraction"] = steps / record.finetune["steps"]
    return own | {
        "model": config["model"]["path"],
        "finetune": config["finetune"]["mode"],
        "loss": config["finetune"].get("loss", "answers"),
        "dataset": dataset_module(record),
        "test": config["dataset"].get("test"),
        "train_fraction": config["dataset"].get("train_fraction") or 1.0,
        "method": VARIANT_OF.get(record.pruning["method"], record.pruning["method"]),
        "num_hidden_layers": num_layers,
    }


def dataset_module(record: RunRecord) -> str | None:
    """Returns the name of a dataset: its module in `gradpruner.tasks` or a user's name; None for timings alone."""
    dataset = record.config["dataset"]
    if "train_file" in dataset:
        return name_of(dataset.get("name"), dataset["train_file"])
    return dataset["_target_"].rsplit(".", 2)[-2] if dataset else None


def fits(record: RunRecord, row: PublishedRow, axis: str) -> bool:
    """Returns whether a run has the settings that a published row names, and a place on the axis."""
    return _has(record, {"test": None, **row.coordinates}, row, axis)


def is_usual(record: RunRecord, row: PublishedRow, axis: str) -> bool:
    """Returns whether a run fits a row, and also has the paper's settings (`USUAL`) where the row names none."""
    says_depth = axis in DEPTHS or any(key in row.coordinates for key in DEPTHS)
    usual = {key: value for key, value in USUAL.items() if key != "sparsity" or not says_depth}
    return _has(record, usual | row.coordinates, row, axis)


def _has(record: RunRecord, wanted: Mapping[str, Any], row: PublishedRow, axis: str) -> bool:
    own = coordinates(record)
    if axis in own and own[axis] is None:  # steps=auto, or not tested on other data
        return False
    compared = [key for key in wanted if key in own and key != axis and key not in NOT_MATCHED]
    return all(same(key, wanted[key], own, row) for key in compared)


def same(key: str, wanted: Any, own: dict[str, Any], row: PublishedRow) -> bool:
    """Returns whether a run with the coordinates `own` has the value `wanted` of the coordinate `key`."""
    if isinstance(wanted, tuple):
        return bool(own[key] in wanted)
    num_layers = own["num_hidden_layers"]
    if key == "sparsity":
        # Two sparsities that prune the same number of our layers are the same.
        return bool(round(wanted * num_layers) == round(own[key] * num_layers))
    if key == "num_pruned_layers":
        return scaled(wanted, row, num_layers) == int(own[key])
    return math.isclose(wanted, own[key]) if isinstance(wanted, float) else bool(wanted == own[key])


def scaled(num_pruned: Any, row: PublishedRow, num_layers: int) -> int:
    """Scales the paper's pruned-layer count to our model's depth, if the row gives the depth of the paper's model."""
    theirs = int(row.coordinates.get("num_hidden_layers", num_layers))
    return round(int(num_pruned) / theirs * num_layers)
