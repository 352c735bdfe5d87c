"""Kernel pruning by the IGIA-Matrix: channels of the residual stream instead of layers (Appendix D, Figure 9).

The paper: "we used IGIA-Matrix to compute the importance of each hidden size, pruned the less important parts, and
merged the pruned hidden sizes with the unpruned ones". The paper says neither how channels are paired nor which weights
belong to a channel. Here:

- The importance of a channel is the sum of F (Eq. 3) over the columns of the linear sublayers that read it and the rows
  of those that write it, in all layers.
- Every pruned channel merges into one kept channel. `similarity` takes the channel with the highest cosine of weights
  (the channel's columns and rows in all layers and in the embedding). `preceding` takes the nearest kept channel before
  the pruned one, as for layers; a channel before the first kept one merges into none.
- An entry of a pruned column or row merges if it is among the top `density` of F in the pruned part of its matrix and
  has the sign of the kept entry (Eq. 5, 6). Embedding, output head and norms have no F: their kept channels are
  unchanged.

Importance run and budget are GradPruner's: as many parameters are kept as by GradPruner with the same `sparsity`,
the input embedding not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from baselines.width_pruning import highest
from gradpruner.budget import check_match, solve_size, target_parameters
from gradpruner.checks import check_choice
from gradpruner.grad_pruner import GradPruner, step_warnings
from gradpruner.gradients import EarlyGradients
from gradpruner.igia import Factors, igia_matrix, step_importance, step_weights
from gradpruner.merge import top_fraction_mask
from gradpruner.method import Compressed, Method
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.models.shape import ModelShape, check_width_supported, config_shape
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.surgery import apply_plan
from gradpruner.width_surgery import READS_HIDDEN, WRITES_HIDDEN

PAIRINGS = ("similarity", "preceding")
CHANNEL_RULES = ("sign_average", "sign_sum", "weighted_average", "none")


@dataclass(frozen=True)
class KernelIgia(GradPruner):
    """GradPruner with channels of the residual stream in place of layers.

    The settings of the importance run, `density` and `merge_rule` are GradPruner's.

    Attributes:
        match: as in `WidthPruning`, except `native`.
        pairing: how the kept channel that a pruned one merges into is chosen, one of `PAIRINGS`.
    """

    name: ClassVar[str] = "kernel_igia"
    finds_sparsity: ClassVar[bool] = False

    merge_count: int = 0
    match: str = "layers"
    pairing: str = "similarity"

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_choice("pairing", self.pairing, PAIRINGS)
        check_choice("merge_rule of kernel_igia", self.merge_rule, CHANNEL_RULES)
        check_match(self.match)
        if self.match == "native":
            raise ValueError("kernel_igia has no ratio of its own, got match=native. Use layers or total.")
        if self.sparsity is None:
            raise ValueError(
                f"kernel_igia prunes channels, got num_pruned_layers={self.num_pruned_layers}. Give sparsity instead."
            )
        if self.repair != "none":
            raise ValueError(f"kernel_igia drops no layers, got repair={self.repair}. Set method.repair=none.")
        if self.merge_count or self.merged_layers:
            raise ValueError(
                f"kernel_igia merges channels, all that leave, got merge_count={self.merge_count} and "
                f"merged_layers={self.merged_layers}. Set method.merge_count=0, and merge_rule=none for no merging."
            )

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Converts `fraction` to steps; see `Method.resolve`."""
        return self._with_steps(training_steps)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the shape with a narrower residual stream that meets the budget; see `Method.shape`."""
        assert isinstance(self.sparsity, float | int)
        check_width_supported(config, self.name)
        layers, step = config_shape(config).layers, config.num_attention_heads
        target = target_parameters(config, self.sparsity, self.match)
        # A multiple of the number of heads: transformers refuses any other Llama config.
        size = solve_size(
            "hidden size", lambda size: ModelShape(size, layers), config, target, self.match, config.hidden_size, step
        )
        return ModelShape(size, layers)

    def variant(self) -> str:
        """Returns how much is pruned and how it merges."""
        match = "" if self.match == "layers" else f"-{self.match}"
        return f"sparsity{self.sparsity}{match}-{self.merge_rule}-{self.pairing}"

    @property
    def measured_as(self) -> type[Method]:
        """Returns `GradPruner`, whose importance run this method shares."""
        return GradPruner

    @torch.no_grad()
    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Scores, pairs and merges channels, then narrows the residual stream."""
        gradients, shape, dense = EarlyGradients.load(directory), self.shape(model.config), config_shape(model.config)
        weights = step_weights(gradients.energies, self.step_weighting).tolist()
        importance = channel_importance(gradients, len(dense.layers), dense.hidden_size, weights)
        hidden = highest(importance, shape.hidden_size)
        pruned = tuple(channel for channel in range(dense.hidden_size) if channel not in set(hidden))
        partners = self._partners(model, hidden, pruned)
        if self.merge_rule != "none" and pruned:
            for index, layer in enumerate(decoder_layers(model)):
                for name, linear in linear_sublayers(layer).items():
                    igia = igia_matrix(gradients.factors(index, name, linear.weight.device), weights)
                    reads = name in READS_HIDDEN
                    sides = (linear.weight, igia) if reads else (linear.weight.T, igia.T)
                    merged = merge_columns(*sides, hidden, pruned, partners, self.density, self.merge_rule)
                    linear.weight.copy_(merged if reads else merged.T)
        width = None
        if pruned:
            width = WidthPlan(
                heads=tuple(tuple(range(layer.num_attention_heads)) for layer in dense.layers),
                channels=tuple(tuple(range(layer.intermediate_size)) for layer in dense.layers),
                hidden=hidden,
            )
        plan = PruningPlan(
            num_hidden_layers=len(dense.layers),
            method=self.name,
            merge_rule=self.merge_rule,
            density=self.density,
            details={"channel_importance": importance.tolist(), "partners": partners},
            width=width,
        )
        report = {
            "losses": list(gradients.losses),
            "train_seconds": gradients.train_seconds,
            "peak_memory_bytes": gradients.peak_memory_bytes,
            "warnings": step_warnings(step_importance(gradients.energies, self.score, self.step_weighting)),
        }
        return Compressed(apply_plan(model, plan), plan, report)

    def _partners(self, model: PreTrainedModel, kept: tuple[int, ...], pruned: tuple[int, ...]) -> list[int | None]:
        """Returns for every pruned channel the kept channel that it merges into, or None."""
        if self.pairing == "preceding":
            return [max((channel for channel in kept if channel < gone), default=None) for gone in pruned]
        products = channel_products(model)
        norms = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
        cosines = (products / norms[:, None] / norms)[list(pruned)][:, list(kept)]  # (pruned, kept)
        return [kept[position] for position in cosines.argmax(dim=1).tolist()] if pruned else []


def channel_importance(gradients: EarlyGradients, num_layers: int, hidden_size: int, weights: list[float]) -> Tensor:
    """Returns the sum of F over all weights that read or write each channel of the residual stream, (d,) float64."""
    total = torch.zeros(hidden_size, dtype=torch.float64)
    for layer in range(num_layers):
        for name in gradients.sublayers:
            factors = gradients.factors(layer, name)
            if name in WRITES_HIDDEN:
                factors = [(right.T, left.T) for left, right in factors]
            total += column_sums(factors, weights)
    return total


def column_sums(factors: list[Factors], weights: list[float]) -> Tensor:
    """Returns the column sums of F = 1/t sum_i w_i (left_i @ right_i)^2 (Eq. 3) by Gram matrices, without forming F.

    Args:
        factors: one pair per step, (out, k) and (k, in).
        weights: one per step.

    Returns:
        (in,) float64.
    """
    sums = torch.zeros(factors[0][1].shape[1], dtype=torch.float64)
    for weight, (left, right) in zip(weights, factors, strict=True):
        left, right = left.double(), right.double()
        sums += weight / len(factors) * ((left.T @ left @ right) * right).sum(0)  # (k, k) @ (k, in)
    return sums.clamp_min_(0.0)


def channel_products(model: PreTrainedModel) -> Tensor:
    """Returns the inner products of the channels' weights, over all layers and the embedding, (d, d) float64."""
    embedding = model.get_input_embeddings().weight.float()
    products: Tensor = (embedding.T @ embedding).double()
    for layer in decoder_layers(model):
        for name, linear in linear_sublayers(layer).items():
            weight = linear.weight.float()
            product = weight.T @ weight if name in READS_HIDDEN else weight @ weight.T
            products += product.double().to(products.device)
    return products


def merge_columns(
    weight: Tensor,
    igia: Tensor,
    kept: tuple[int, ...],
    pruned: tuple[int, ...],
    partners: list[int | None],
    density: float,
    rule: str,
) -> Tensor:
    """Merges pruned columns into kept ones, as `merge.merge_layers` does with layers.

    Args:
        weight: (rows, d).
        igia: F of the weight, (rows, d).
        kept: columns that are kept.
        pruned: columns that are pruned.
        partners: for each of `pruned`, the kept column that it merges into, or None.
        density: fraction of the entries of the pruned columns that may merge.
        rule: one of `CHANNEL_RULES`.

    Returns:
        A new (rows, d) tensor; only kept columns differ.
    """
    pairs = [(gone, into) for gone, into in zip(pruned, partners, strict=True) if into is not None]
    if rule == "none" or not pairs:
        return weight.clone()
    gone, into = (torch.tensor(side, device=weight.device) for side in zip(*pairs, strict=True))
    leaving, base = weight[:, gone].float(), weight[:, into].float()  # (rows, pairs)
    passes = top_fraction_mask(igia[:, gone].contiguous(), density)
    if rule != "weighted_average":
        passes &= (torch.sign(leaving) == torch.sign(base)) & (leaving != 0)
    total = weight.float().index_add(1, into, leaving * passes)
    count = torch.ones_like(total).index_add(1, into, passes.float())
    merged = total if rule == "sign_sum" else total / count
    return torch.where(count > 1, merged.to(weight.dtype), weight)
