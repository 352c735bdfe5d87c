"""Shared code of APT's two variants: which parameters a budget counts, and how small the model gets."""

from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedConfig

from baselines.apt.scores import Costs
from baselines.width_pruning import WidthPruning
from gradpruner.budget import target_parameters
from gradpruner.checks import check_positive
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.shape import LayerShape, ModelShape, config_shape


@dataclass(frozen=True)
class AptPruning(WidthPruning):
    """Base of `apt` and `apt_fast`.

    Attributes:
        gamma: fraction of the parameters outside the embedding and output head to keep, for `match=native`.
        growth: adapter parameters after the last growth, as a multiple of those at the start.
        max_rank: rank beyond which no adapter grows.
        widths_depend_on_data: `narrower_shape` is not the shape that comes out.
    """

    widths_depend_on_data: ClassVar[bool] = True

    gamma: float = 0.6
    growth: float = 4.0
    max_rank: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_positive(self, "growth", "max_rank")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(
                f"gamma is the part of the parameters that stays, in (0, 1], got {self.gamma}. For 60 % set "
                "method.gamma=0.6."
            )

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError unless `training` uses LoRA: APT prunes, grows and tunes adapters."""
        if training.mode != "lora":
            raise ValueError(
                f"APT prunes and grows LoRA adapters, so it needs finetune=lora, got finetune={training.mode}. "
                "Use finetune=lora, or another method such as llm_pruner."
            )

    def variant(self) -> str:
        """Returns `gamma` for `match=native`, otherwise the sparsity and `match`."""
        return f"gamma{self.gamma}" if self.match == "native" else super().variant()

    def budget(self, config: PreTrainedConfig) -> tuple[Costs, int]:
        """Returns the costs of units, and how many parameters may be kept.

        Args:
            config: config of the dense model.

        Raises:
            ValueError: if not even one KV group and one MLP channel per layer fit.
        """
        costs = Costs.of(config, self.match)
        dense, step = config_shape(config), hidden_step(config)
        if self.match == "native":
            target = round(self.gamma * costs.of_shape(dense))
        else:
            target = target_parameters(config, self.sparsity, self.match)
        smallest = costs.of_shape(_narrowed(dense, 0.0, step))
        if smallest > target:
            raise ValueError(
                f"method={self.name} keeps a KV group and an MLP channel in every layer: {smallest:,} parameters, got "
                f"a budget of {target:,}. Lower sparsity, or raise method.gamma where method.match=native."
            )
        return costs, target

    def narrower_shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns a shape for the dry run, with the same fraction of each kind of unit; real sizes depend on data.

        The parameter count meets the budget to within one MLP channel per layer. Nothing else relies on this shape.
        """
        costs, target = self.budget(config)
        dense, step = config_shape(config), hidden_step(config)
        if costs.of_shape(dense) <= target:
            return dense
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if costs.of_shape(_narrowed(dense, middle, step)) <= target else (low, middle)
        shape = _narrowed(dense, low, step)
        layer, num_layers = shape.layers[0], len(shape.layers)
        one_wider = num_layers * (costs.channel * shape.hidden_size + costs.channel_bias)
        wider = layer.intermediate_size + (target - costs.of_shape(shape)) // one_wider
        wider = min(wider, dense.layers[0].intermediate_size)
        return replace(shape, layers=(replace(layer, intermediate_size=wider),) * num_layers)


def hidden_step(config: PreTrainedConfig) -> int:
    """Returns the divisor of the number of hidden channels: LlamaConfig requires a multiple of the number of heads."""
    heads: int = config.num_attention_heads
    return heads if config.hidden_size % heads == 0 else 1


def _narrowed(dense: ModelShape, part: float, step: int) -> ModelShape:
    """Returns a uniform shape with the fraction `part` of all units; `step` hidden channels count as one unit."""
    layer = dense.layers[0]
    rep = layer.num_attention_heads // layer.num_key_value_heads
    groups = max(1, round(part * layer.num_key_value_heads))
    channels = max(1, round(part * layer.intermediate_size))
    hidden = step * max(1, round(part * (dense.hidden_size // step)))
    return ModelShape(hidden, (LayerShape(groups * rep, groups, channels),) * len(dense.layers))
