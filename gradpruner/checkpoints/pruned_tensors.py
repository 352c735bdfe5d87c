"""What a pruned checkpoint consists of, tensor by tensor: which stored tensors are kept, and what merges into them.

`prepare` reads names and shapes only. Weights are read, and merged block by block, when a tensor is asked for.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig

from gradpruner.igia import (
    SCORES,
    STEP_WEIGHTINGS,
    Factors,
    igia_matrix,
    layer_importance,
    squared_frobenius,
    step_weights,
)
from gradpruner.merge import MERGE_RULES, merge_layers, top_fraction_mask
from gradpruner.models.architectures import decoder_layers, empty_model, linear_sublayers, shrink_config
from gradpruner.models.contents import check_folder
from gradpruner.models.loading import check_checkpoint, warn_of_adapter
from gradpruner.models.read_config import read_config
from gradpruner.models.tensor_files import FLOAT_DTYPES, StoredTensor, read_tensors
from gradpruner.plan import PruningPlan

if TYPE_CHECKING:  # it pulls in the Trainer, whose libraries take more memory than the work done here
    from gradpruner.gradients import EarlyGradients

BLOCK_NUMEL = 2**19  # entries of a sublayer that are merged at once
_NUMBERED = re.compile(r"(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<layer>\d+)\.")  # up to the first part that is a number


@dataclass(frozen=True)
class PrunedTensor:
    """A tensor of the pruned checkpoint.

    Attributes:
        kept: the stored tensor that it comes from; gives its dtype, shape and size.
        sublayer: name of the sublayer whose weight it is, if anything merges into it.
        layer: decoder layer of `kept` in the dense model, if anything merges into it.
        merged: pruned layer -> its weight of the same sublayer.
    """

    kept: StoredTensor
    sublayer: str = ""
    layer: int = -1
    merged: Mapping[int, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A plan that was checked against a dense checkpoint.

    Attributes:
        plan: which layers are pruned and merged.
        config: of the pruned model.
        tensors: by name in the pruned checkpoint.
        igia: returns the IGIA-Matrix of a layer (of the dense model) and sublayer.
    """

    plan: PruningPlan
    config: PreTrainedConfig
    tensors: dict[str, PrunedTensor]
    igia: Callable[[int, str], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.kept.num_bytes for tensor in self.tensors.values())

    def parts(self, tensor: PrunedTensor, buffer: memoryview) -> Iterator[memoryview]:
        """Yields the bytes of one of `tensors`, through `buffer` if the tensor is only copied.

        Raises:
            ValueError: if there is NaN or infinity among them.
        """
        if not tensor.merged:
            for part in tensor.kept.parts(buffer):
                if tensor.kept.dtype in FLOAT_DTYPES:
                    _check_finite(torch.frombuffer(part, dtype=FLOAT_DTYPES[tensor.kept.dtype]), tensor)
                yield part
        else:
            for block in self._merged_blocks(tensor):
                _check_finite(block, tensor)
                yield block.flatten().view(torch.uint8).numpy().data

    def _merged_blocks(self, tensor: PrunedTensor) -> Iterator[Tensor]:
        """Yields blocks of rows of the weight that `surgery.apply_plan` makes, bit for bit.

        Only IGIA-Matrices are held whole, because their top entries are taken over all rows: one at a time, except that
        `fisher` needs all of them throughout.
        """
        rule, density = self.plan.merge_rule, self.plan.density
        fisher = rule == "fisher"
        if rule == "weighted_average":  # it counts zeros in, so masked entries cannot be zeroed as below
            weights = [stored.read() for stored in tensor.merged.values()]
            igias = [self.igia(layer, tensor.sublayer) for layer in tensor.merged]
            yield merge_layers(tensor.kept.read(), weights, igias, density, rule)
            return
        masks, kept_igias = {}, {}
        for layer in tensor.merged:
            igia = self.igia(layer, tensor.sublayer)
            masks[layer] = top_fraction_mask(igia, density)
            if fisher:
                kept_igias[layer] = igia
            del igia  # before the next one is made
        if fisher:
            kept_igias[tensor.layer] = self.igia(tensor.layer, tensor.sublayer)
        num_rows, num_columns = tensor.kept.shape
        block = max(1, BLOCK_NUMEL // num_columns)
        for start in range(0, num_rows, block):
            rows = slice(start, min(start + block, num_rows))
            kept = tensor.kept.rows(rows.start, rows.stop).read()
            ignored = torch.zeros(()).expand(kept.shape)
            # A zero never merges: with the masked entries at zero, every entry (density 1) may pass.
            yield merge_layers(
                kept,
                [
                    stored.rows(rows.start, rows.stop).read().masked_fill_(~masks[layer][rows], 0)
                    for layer, stored in tensor.merged.items()
                ],
                [kept_igias[layer][rows] if fisher else ignored for layer in tensor.merged],
                1.0,
                rule,
                kept_igia=kept_igias[tensor.layer][rows] if fisher else None,
            )


def prepare(plan: PruningPlan, gradients: "EarlyGradients | None", source: Path) -> PrunedCheckpoint:
    """Checks that plan, gradients and checkpoint belong together; reads names and shapes, no weights.

    Args:
        plan: which layers are pruned and merged.
        gradients: see `streaming.prune_checkpoint`.
        source: folder of the dense model.

    Raises:
        ValueError: if they do not belong together, or `source` is no whole, undamaged safetensors checkpoint.
    """
    beyond = "makes layers narrower" if plan.width is not None else "repairs" if plan.details.get("repair") else None
    if plan.merge_rule not in MERGE_RULES:
        beyond = f"merges by {plan.merge_rule}"
    if beyond:
        raise ValueError(
            f"Only plans that drop and merge layers are applied file to file, got one of method={plan.method} that "
            f"{beyond}. Run the method with save_checkpoint=true."
        )
    check_folder(source)
    config = read_config(str(source), source)
    check_checkpoint(source, config)
    warn_of_adapter(source, str(source))
    if config.num_hidden_layers != plan.num_hidden_layers:
        raise ValueError(
            f"The plan is for {plan.num_hidden_layers} decoder layers, the model in {source} has "
            f"{config.num_hidden_layers}. Apply it to the dense model that it was made for."
        )
    stored, kept_layers = read_tensors(source), plan.kept_layers
    prefix = _layer_prefix(stored, plan.num_hidden_layers)
    tensors = {}
    for name, tensor in stored.items():
        layer = _layer_of(name, prefix)
        if layer is None:
            tensors[name] = PrunedTensor(tensor)
        elif layer in kept_layers:
            tensors[_renumber(name, prefix, kept_layers.index(layer))] = PrunedTensor(tensor)
    if not plan.merges:
        return PrunedCheckpoint(plan, shrink_config(config, kept_layers), tensors, _no_igia)

    shapes = _sublayer_shapes(config)
    gradients = _check_gradients(gradients, plan, shapes)
    for absorber, merged in plan.merges.items():
        for sublayer in shapes:
            weights = {layer: stored[f"{prefix}{layer}.{sublayer}.weight"] for layer in (absorber, *merged)}
            name = f"{prefix}{kept_layers.index(absorber)}.{sublayer}.weight"
            tensors[name] = PrunedTensor(weights.pop(absorber), sublayer, absorber, weights)
    weights_of_steps = step_weights(gradients.energies, _step_weighting(gradients, plan)).tolist()

    def igia(layer: int, sublayer: str) -> Tensor:
        return igia_matrix(gradients.factors(layer, sublayer), weights_of_steps)

    return PrunedCheckpoint(plan, shrink_config(config, kept_layers), tensors, igia)


def _check_finite(values: Tensor, tensor: PrunedTensor) -> None:
    if not bool(values.isfinite().all()):
        layers = f" or of layers {sorted(tensor.merged)}, which merge into it" if tensor.merged else ""
        raise ValueError(
            f"All weights must be finite, got NaN or infinity in {tensor.kept.name} of {tensor.kept.file}{layers}. "
            "Use an undamaged checkpoint."
        )


def _no_igia(layer: int, sublayer: str) -> Tensor:
    raise AssertionError(f"nothing merges, but the IGIA-Matrix of layer {layer}, {sublayer}, was asked for")


def _layer_prefix(names: Iterable[str], num_layers: int) -> str:
    """Returns what precedes the layer number in the names of decoder layers, such as `model.layers.`."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            numbers.setdefault(match["prefix"], set()).add(int(match["layer"]))
    return next(prefix for prefix, found in numbers.items() if found == set(range(num_layers)))


def _layer_of(name: str, prefix: str) -> int | None:
    """Returns the decoder layer that a tensor belongs to, or None."""
    match = _NUMBERED.match(name)
    return int(match["layer"]) if match and match["prefix"] == prefix else None


def _renumber(name: str, prefix: str, layer: int) -> str:
    return f"{prefix}{layer}.{name.removeprefix(prefix).partition('.')[2]}"


def _sublayer_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape (out, in) of every linear sublayer of a decoder layer, from the config alone."""
    layer = decoder_layers(empty_model(config))[0]
    return {name: tuple(linear.weight.shape) for name, linear in linear_sublayers(layer).items()}


def _check_gradients(
    gradients: "EarlyGradients | None", plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]
) -> "EarlyGradients":
    """Raises ValueError if the factors are missing, damaged or of another model."""
    if gradients is None:
        raise ValueError(
            f"The plan merges layers {sorted(plan.absorbed_by)} but no factors were given. "
            "Pass the folder that the importance run wrote."
        )
    if set(gradients.sublayers) != set(shapes) or gradients.energies.shape[1] != plan.num_hidden_layers:
        raise ValueError(
            f"The factors must be of {plan.num_hidden_layers} layers with sublayers {sorted(shapes)}, got "
            f"{gradients.energies.shape[1]} layers with {sorted(gradients.sublayers)} in {gradients.directory}. "
            "Pass the folder of the importance run that the plan was made from."
        )
    for absorber, merged in plan.merges.items():
        for layer in (absorber, *merged) if plan.merge_rule == "fisher" else merged:
            for sublayer, shape in shapes.items():
                factors = _factors(gradients, layer, sublayer)
                found = {(left.shape[0], right.shape[1]) for left, right in factors}
                if found != {shape}:
                    raise ValueError(
                        f"The factors of layer {layer}, {sublayer}, must make a matrix of shape {shape}, got "
                        f"{', '.join(map(str, sorted(found)))} in {gradients.directory}. "
                        "Pass the folder of the importance run that the plan was made from."
                    )
                made = torch.stack([squared_frobenius(left, right) for left, right in factors])
                if not _are_close(made, gradients.energies[:, layer, gradients.sublayers.index(sublayer)], 1e-4):
                    raise ValueError(
                        f"The factors of layer {layer}, {sublayer}, must have the norms of importance.json beside "
                        f"them, got other ones in {gradients.directory}. Its files are of several importance runs: "
                        "run the importance steps again."
                    )
    return gradients


def _step_weighting(gradients: "EarlyGradients", plan: PruningPlan) -> str:
    """Returns the step weighting with which the factors give the plan's layer importance.

    Raises:
        ValueError: if none does: the factors are of another run, on other data or with other settings.
    """
    planned = torch.tensor(plan.layer_importance, dtype=torch.float64)
    for weighting, score in itertools.product(STEP_WEIGHTINGS, SCORES):
        if _are_close(layer_importance(gradients.energies, score, weighting), planned, 1e-9):
            return weighting
    found = layer_importance(gradients.energies).tolist()
    raise ValueError(
        "The factors must give the layer importance that the plan was made from, got a plan with "
        f"{_shown(plan.layer_importance)} and factors that give {_shown(found)} in {gradients.directory}. Pass the "
        "folder of the importance run that the plan was made from."
    )


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other, tolerance, 0.0, equal_nan=True).all())


def _shown(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.3g}" for score in scores[:3]) + ", ..." if scores else "none"


def _factors(gradients: "EarlyGradients", layer: int, sublayer: str) -> list[Factors]:
    try:
        return gradients.factors(layer, sublayer)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Cannot read the factors of layer {layer}, {sublayer}, in {gradients.directory}: got "
            f"{type(error).__name__}: {error}. The folder is damaged: run the importance steps again."
        ) from error
