"""LaCo: collapse rear layers into an earlier one while the output stays similar (Yang et al., arXiv:2402.11187).

Layer l absorbs the m layers after it. Its linear sublayers become
- rule `paper`: W_l + sum over k of (W_l+k - W_l);
- rule `code`, the default: W_l+m. The authors' notebook overwrites the base inside its loop, so that the sum telescopes
  and the block is replaced by its last layer (issues 4 and 5 of their repository). The published numbers probably come
  from this rule. For m = 1 both rules are the same. Our reports name the rule.

Norms stay those of layer l. A sweep starts at l = H - C, so its first try absorbs layers up to H - 1. With `code` H is
L - 1 for L layers, as in the notebook: the first try leaves the final layer alone, whose weights would otherwise stand
under another layer's norms at once. After a merge l moves by I, so a later merge may absorb fewer layers, the final one
among them; the notebook's reset of l never takes place. With `paper` H is L, and after a merge l moves on until there
are C - 1 layers after it, if that is further.

A merge is accepted if the final hidden states are similar enough to the dense model's: the cosine of whole flattened
sequences, averaged over rows, must be above the threshold.

The method has no target size. To meet one (deviation), no merge absorbs more layers than are still to be pruned. If a
sweep ends too early, the threshold is lowered by 0.05 and a new sweep starts from the merged model.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.calibration import checked, real_tokens
from gradpruner.checks import check_choice, check_positive
from gradpruner.depth_method import DepthMethod
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.hidden_states import last_hidden_state
from gradpruner.method import Calibration, Compressed
from gradpruner.models.architectures import check_finite_weights, decoder_layers, linear_sublayers
from gradpruner.plan import PruningPlan, preceding_kept_layer
from gradpruner.progress import Steps
from gradpruner.surgery import drop_layers, only_layers

logger = logging.getLogger(__name__)

RULES = ("code", "paper")
MERGES_FILE = "merges.json"
THRESHOLD_STEP = 0.05


@dataclass(frozen=True)
class Trial:
    """One merge that was tried; layer numbers are positions in the model at that moment.

    Attributes:
        layer: l, the layer that absorbs.
        num_absorbed: m, the layers after l that are pruned.
        similarity: similarity of the candidate to the dense model.
        threshold: value that `similarity` has to exceed.
        accepted: whether `similarity` exceeds `threshold`.
    """

    layer: int
    num_absorbed: int
    similarity: float
    threshold: float
    accepted: bool


@dataclass(frozen=True)
class LaCo(DepthMethod):
    """Layer Collapse.

    Attributes:
        rule: `code` or `paper`, see above.
        layers_per_merge: C, the layers that become one: m is at most C - 1.
        lowest_layer: L, the first layer that may absorb.
        highest_layer: H, one past the last layer that the first try absorbs; None: all but the final layer with rule
            `code`, all with `paper`.
        interval: I, how far l moves after a merge.
        threshold: T, a cosine.
        num_rows: training rows to compare on.
        batch_size: rows per batch; changes speed and memory, not the outcome.
        seed: seed of the row sample.
    """

    name: ClassVar[str] = "laco"
    measures_per_layer: ClassVar[bool] = True

    rule: str = "code"
    layers_per_merge: int = 4
    lowest_layer: int = 1
    highest_layer: int | None = None
    interval: int = 2
    threshold: float = 0.65
    num_rows: int = 10
    batch_size: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_choice("rule", self.rule, RULES)
        check_positive(self, "interval", "num_rows", "batch_size")
        if self.layers_per_merge < 2:
            raise ValueError(
                f"layers_per_merge must be 2 or more, got {self.layers_per_merge}. Raise method.layers_per_merge."
            )
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is a cosine, in [-1, 1], got {self.threshold}. The paper's is 0.65.")
        if self.lowest_layer < 0:
            raise ValueError(f"lowest_layer must be 0 or above, got {self.lowest_layer}. Raise method.lowest_layer.")

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Checks that the range of layers has room for the budget; see `DepthMethod.resolve`."""
        resolved = super().resolve(num_hidden_layers)
        highest = self.highest_layer
        if highest is not None and not self.lowest_layer < highest <= num_hidden_layers:
            raise ValueError(
                f"highest_layer must be above lowest_layer={self.lowest_layer} and at most the model's "
                f"{num_hidden_layers} layers, got {highest}. Change method.highest_layer."
            )
        assert resolved.num_pruned_layers is not None
        if resolved.num_pruned_layers > num_hidden_layers - 1 - self.lowest_layer:
            raise ValueError(
                f"With lowest_layer={self.lowest_layer} at most {num_hidden_layers - 1 - self.lowest_layer} of "
                f"{num_hidden_layers} layers can be absorbed, got {resolved.num_pruned_layers} to prune. Lower "
                "sparsity or method.lowest_layer."
            )
        return resolved

    def _highest(self, num_layers: int) -> int:
        """Returns H for a model of that depth."""
        if self.highest_layer is not None:
            return self.highest_layer
        return num_layers - 1 if self.rule == "code" else num_layers

    def variant(self) -> str:
        """Returns how much is pruned and by which rule."""
        return f"{super().variant()}-{self.rule}"

    def calibration(self) -> Calibration:
        """Returns which few rows of the training split to use, each at most once."""
        return Calibration(self.batch_size, self.num_rows, self.seed, once=True)

    def measurement_settings(self) -> dict[str, Any]:
        """Returns all settings: the merges depend on the budget and on each other."""
        return asdict(self)

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Finds the merges; leaves the model unchanged.

        Raises:
            ValueError: if weights or similarities are not finite, or there are no batches.
        """
        assert self.num_pruned_layers is not None
        check_finite_weights(model)
        taken = checked(batches, self)
        layers = decoder_layers(model)
        weights = [_parameters(layer) for layer in layers]
        originals = [{name: tensor.data for name, tensor in own.items()} for own in weights]
        dense = [_masked(last_hidden_state(model, batch), batch) for batch in taken]
        kept = list(range(len(layers)))  # layers of the working model, by original numbers

        def similarity(layer: int, num_absorbed: int) -> float:
            """Returns the similarity of the working model after one more merge, then undoes the merge."""
            block = kept[layer : layer + num_absorbed + 1]
            before = {name: tensor.data for name, tensor in weights[block[0]].items()}
            _collapse(weights, block, self.rule)
            try:
                rest = (*kept[: layer + 1], *kept[layer + num_absorbed + 1 :])
                with only_layers(model, rest):
                    return _similarity(model, taken, dense)
            finally:
                _set(weights[block[0]], before)

        def merge(layer: int, num_absorbed: int) -> None:
            _collapse(weights, kept[layer : layer + num_absorbed + 1], self.rule)
            del kept[layer + 1 : layer + num_absorbed + 1]

        try:
            trials = self.collapse(len(layers), similarity, merge)
        finally:
            for own, original in zip(weights, originals, strict=True):
                _set(own, original)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / MERGES_FILE, [asdict(trial) for trial in trials])

    def collapse(
        self, num_layers: int, similarity: Callable[[int, int], float], merge: Callable[[int, int], None]
    ) -> list[Trial]:
        """Sweeps from the rear to the front, and repeats until the budget is met.

        Args:
            num_layers: layers of the dense model.
            similarity: returns the similarity of the working model after layer l absorbs m more layers.
            merge: makes such a merge final.

        Returns:
            Every merge that was tried, in order.

        Raises:
            ValueError: if a similarity is NaN.
        """
        assert self.num_pruned_layers is not None
        target = num_layers - self.num_pruned_layers
        threshold, trials = self.threshold, []
        with Steps("laco", "layer", self.num_pruned_layers) as steps:
            while num_layers > target:
                highest = min(self._highest(num_layers), num_layers)
                layer = max(self.lowest_layer, highest - self.layers_per_merge)
                while layer >= self.lowest_layer and num_layers > target:
                    num_absorbed = min(self.layers_per_merge - 1, num_layers - 1 - layer, num_layers - target)
                    found = similarity(layer, num_absorbed)
                    if not abs(found) < float("inf"):
                        raise ValueError(
                            f"The similarity is {found} after merging {num_absorbed} layers into {layer}. Check the "
                            "weights, or use a wider dtype (model.dtype=float32)."
                        )
                    accepted = found > threshold
                    trials.append(Trial(layer, num_absorbed, found, threshold, accepted))
                    logger.info("laco: %s", trials[-1])
                    if not accepted:
                        layer -= 1
                        continue
                    merge(layer, num_absorbed)
                    num_layers -= num_absorbed
                    steps.advance(num_absorbed)
                    layer -= self.interval
                    if self.rule == "paper":
                        layer = min(layer, num_layers - self.layers_per_merge)
                if num_layers > target:
                    threshold = round(threshold - THRESHOLD_STEP, 10)
        return trials

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Makes the merges that `measure` accepted."""
        trials = [Trial(**entry) for entry in json.loads((directory / MERGES_FILE).read_text())]
        layers = decoder_layers(model)
        weights = [_parameters(layer) for layer in layers]
        kept = list(range(len(layers)))
        for trial in trials:
            if trial.accepted:
                _collapse(weights, kept[trial.layer : trial.layer + trial.num_absorbed + 1], self.rule)
                del kept[trial.layer + 1 : trial.layer + trial.num_absorbed + 1]
        pruned = tuple(layer for layer in range(len(layers)) if layer not in kept)
        plan = PruningPlan(
            num_hidden_layers=len(layers),
            pruned_layers=pruned,
            absorbed_by={layer: preceding_kept_layer(layer, pruned) for layer in pruned},
            merge_rule=f"laco_{self.rule}" if pruned else "none",
            density=1.0,
            method=self.name,
            details={"rule": self.rule, "trials": [asdict(trial) for trial in trials]},
        )
        if pruned:
            drop_layers(model, plan.kept_layers)
        return Compressed(model, plan, {})


def merged_weight(block: list[Tensor], rule: str) -> Tensor:
    """Returns the weight of a layer that absorbs the layers after it.

    Args:
        block: the same parameter in layer l, l+1, ..., l+m.
        rule: `code` or `paper`.

    Returns:
        With `code` the last tensor itself, not a copy; with `paper` a new tensor.
    """
    if rule == "code":
        return block[-1]
    base = block[0]
    return base + torch.stack([other - base for other in block[1:]]).sum(dim=0)


def _collapse(weights: list[dict[str, nn.Parameter]], block: list[int], rule: str) -> None:
    """Gives the first layer of the block its merged weights; its previous tensors are unchanged."""
    if len(block) > 1:
        own = weights[block[0]]
        _set(own, {name: merged_weight([weights[layer][name].data for layer in block], rule) for name in own})


def _set(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        parameters[name].data = tensor


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights and biases of the linear sublayers."""
    return {
        f"{name}.{kind}": parameter
        for name, linear in linear_sublayers(layer).items()
        for kind, parameter in linear.named_parameters(recurse=False)
    }


def _masked(states: Tensor, batch: Batch) -> Tensor:
    """Returns the states with padding set to zero, so that it adds nothing to a product, (B, T*d)."""
    return (states.float() * real_tokens(batch, states.device)[..., None]).flatten(1)


def _similarity(model: PreTrainedModel, batches: list[Batch], dense: list[Tensor]) -> float:
    """Returns the mean over rows of the cosine between the flattened final states of this and the dense model."""
    cosines = [
        torch.cosine_similarity(_masked(last_hidden_state(model, batch), batch), before, dim=-1)
        for batch, before in zip(batches, dense, strict=True)
    ]
    return float(torch.cat(cosines).double().mean())
