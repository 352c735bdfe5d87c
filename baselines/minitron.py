"""MINITRON: prune the units with the weakest activations, then distil (Muralidharan et al., arXiv:2407.14679).

Scores need only forward passes. The absolute value of an activation is averaged over the tokens of a row, then the L2
norm is taken over rows. MLP channels are scored by the input of down_proj, heads by the input of o_proj (L2 norm over
their channels), channels of the residual stream by the outputs of both norms, summed over layers, and layers by Block
Influence. Every layer keeps the same number of units, so the result is a stock checkpoint.

The pruned model then learns to predict what the dense model predicts, on Alpaca as in Section 4.2 of the GradPruner
paper (MINITRON's 80 billion tokens of pre-training data are out of reach). The downstream task comes after that.

Deviations: widths meet a parameter budget; heads of a group are ranked in the model's own layout, where the reference
(`mcore_minitron`) reads the scores in another order; padding never counts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from baselines.calibration import Calibrated, checked, real_tokens
from baselines.width_pruning import WidthPruning, heads_of, highest, load_scores, save_scores, training_spec
from gradpruner.budget import nearest_size, solve_size, target_parameters
from gradpruner.checks import check_choice
from gradpruner.encoding import Batch
from gradpruner.finetune.distill import Distillation
from gradpruner.hidden_states import last_hidden_state
from gradpruner.layer_scores import block_influence
from gradpruner.method import Compressed, Recovery
from gradpruner.models.architectures import check_finite_weights, decoder_layers, linear_sublayers
from gradpruner.models.shape import LAYER_SIZES, LayerShape, ModelShape, config_shape, head_dim
from gradpruner.plan import PruningPlan, WidthPlan, check_counts
from gradpruner.progress import track
from gradpruner.surgery import apply_plan

AXES = ("width", "depth", "ffn")
SIZES = ("num_hidden_layers", "hidden_size", *LAYER_SIZES)
HIDDEN_PART = 7 / 8  # kept fraction of the residual stream to start from: the reference's 3584 of 4096
SMALLEST_PART = 1 / 4  # least kept fraction of the MLP channels; below it, the residual stream is pruned more
DIVISOR = 64  # widths are multiples of it, or of a smaller power of two in a small model


@dataclass(frozen=True)
class Minitron(Calibrated, WidthPruning):
    """Uniform pruning of all layers by activations, followed by distillation.

    Attributes:
        axes: `width` (residual stream and MLP channels), `ffn` (MLP channels), or `depth` (whole layers).
        target_shape: sizes by name (`SIZES`) instead of axes and budget; others are unchanged; for `match=native`.
        num_rows: training rows to use; all of them if there are fewer.
        batch_size: rows per batch; changes speed and memory, not scores.
        seed: seed of the row sample.
        recover_on: dataset to distil on; None skips distillation.
        recover_settings: settings of that dataset, such as {source: local, path: my/folder}.
        recover_training: how to train on that dataset, as in `finetune`.
        temperature: temperature of the distillation.
        distil_tokens: tokens to distil on: `all` real tokens, or those of the `answer`.
        distil_states: also compare hidden states; meant for pruning many layers.
    """

    name: ClassVar[str] = "minitron"

    axes: str = "width"
    target_shape: dict[str, int] | None = None
    num_rows: int = 1024
    recover_on: str | None = None
    recover_settings: dict[str, Any] | None = None
    recover_training: dict[str, Any] | None = None
    temperature: float = 1.0
    distil_tokens: str = "all"
    distil_states: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        super().__post_init__()
        check_choice("axes", self.axes, AXES)
        if (self.target_shape is not None) != (self.match == "native"):
            raise ValueError(
                f"target_shape is for match=native and needed there, got target_shape={self.target_shape} and "
                f"match={self.match}. Set both, or neither."
            )
        unknown = sorted(set(self.target_shape or {}) - set(SIZES))
        if unknown:
            raise ValueError(
                f"target_shape names sizes of a config, got {', '.join(unknown)} besides. Known: {', '.join(SIZES)}."
            )
        self.recovery()  # checks its own values

    # ---- sizes ----

    def narrower_shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns `target_shape`, or the shape along `axes` that meets the budget."""
        dense = config_shape(config)
        if self.target_shape is not None:
            return self._explicit_shape(config, dense)
        if self.sparsity == 0.0:
            return dense
        num_layers = len(dense.layers)
        if self.axes == "depth":
            num_pruned = round(self.sparsity * num_layers)
            if self.match == "total":
                target = target_parameters(config, self.sparsity, self.match)
                num_kept = solve_size(
                    "number of layers",
                    lambda n: replace(dense, layers=dense.layers[:n]),
                    config,
                    target,
                    self.match,
                    num_layers,
                )
                num_pruned = num_layers - num_kept
            check_counts(num_layers, num_pruned)
            return replace(dense, layers=dense.layers[num_pruned:])
        target = target_parameters(config, self.sparsity, self.match)
        divisor = _divisor(config)
        largest = dense.layers[0].intermediate_size

        def make_shape(hidden_size: int, intermediate_size: int) -> ModelShape:
            layer = replace(dense.layers[0], intermediate_size=intermediate_size)
            return ModelShape(hidden_size, (layer,) * num_layers)

        if self.axes == "ffn":
            ffn_shape = partial(make_shape, config.hidden_size)
            step = min(DIVISOR, divisor)
            return ffn_shape(solve_size("MLP width", ffn_shape, config, target, self.match, largest, step))
        # The rotary embedding and transformers' check of a Llama config need whole heads in the residual stream.
        step, start = lcm(divisor, config.num_attention_heads), HIDDEN_PART * config.hidden_size
        widths = range(step, config.hidden_size + 1, step)
        for hidden_size in sorted(widths, key=lambda size: (abs(size - start), size)):
            shape = partial(make_shape, hidden_size)
            size = nearest_size(
                shape, config, target, self.match, largest, min(DIVISOR, divisor), int(SMALLEST_PART * largest)
            )
            if size is not None:
                return shape(size)
        raise ValueError(
            f"No hidden size of {step} to {config.hidden_size} and MLP width leave {target:,} parameters with "
            f"method={self.name}, got sparsity={self.sparsity} and match={self.match}. Lower sparsity, or set "
            "method.axes=ffn or method.target_shape."
        )

    def _explicit_shape(self, config: PreTrainedConfig, dense: ModelShape) -> ModelShape:
        given = {name: int(size) for name, size in (self.target_shape or {}).items()}
        layer = replace(dense.layers[0], **{name: given[name] for name in LAYER_SIZES if name in given})
        shape = ModelShape(
            given.get("hidden_size", dense.hidden_size),
            (layer,) * given.get("num_hidden_layers", len(dense.layers)),
        )
        for name in given:
            old, new = getattr(config, name), given[name]
            if not 1 <= new <= old:
                raise ValueError(
                    f"target_shape.{name} must be between 1 and the dense model's {old}, got {new}. Lower or raise it."
                )
        rep = layer.num_attention_heads / layer.num_key_value_heads
        old_rep = dense.layers[0].num_attention_heads // dense.layers[0].num_key_value_heads
        if rep != int(rep) or rep > old_rep or shape.hidden_size % layer.num_attention_heads:
            raise ValueError(
                f"target_shape must give every KV head equally many query heads, at most {old_rep}, and a hidden_size "
                f"that is a multiple of the query heads, got {layer.num_attention_heads} query heads, "
                f"{layer.num_key_value_heads} KV heads and hidden_size {shape.hidden_size}. Change them."
            )
        return shape

    # ---- the methods of `Method` ----

    def variant(self) -> str:
        """Returns how much is pruned along which axes, and the distillation dataset."""
        sizes = "-".join(f"{size}" for size in (self.target_shape or {}).values())
        cut = sizes or f"{super().variant()}-{self.axes}"
        return f"{cut}-{self.recover_on}" if self.recover_on else cut

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the row settings, and whether layers or units are scored."""
        return {
            **super().measurement_settings(),
            "scores_layers": self._scores_layers,
            "scores_units": self._scores_units,
        }

    @property
    def _scores_layers(self) -> bool:
        return self.axes == "depth" if self.target_shape is None else "num_hidden_layers" in self.target_shape

    @property
    def _scores_units(self) -> bool:
        return self.axes != "depth" if self.target_shape is None else bool({*self.target_shape} - {"num_hidden_layers"})

    def prune_settings(self) -> dict[str, Any]:
        """Returns all settings except those of the distillation."""
        return {
            name: value
            for name, value in asdict(self).items()
            if not name.startswith(("recover_", "distil_")) and name != "temperature"
        }

    def recovery(self) -> Recovery | None:
        """Returns the distillation from the dense model; None without `recover_on`."""
        if self.recover_on is None:
            return None
        distillation = Distillation(self.temperature, self.distil_tokens, self.distil_states)
        return Recovery(training_spec({"mode": "full", **(self.recover_training or {})}, self.name), distillation)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Scores layers, heads, MLP channels and channels of the residual stream; leaves the model unchanged."""
        check_finite_weights(model)
        taken = checked(batches, self)
        scores = self._unit_scores(model, taken) if self._scores_units else {}
        if self._scores_layers:
            influence = block_influence(model, taken, "block influence")
            scores["layers"] = torch.tensor(influence, dtype=torch.float64)  # (L,)
        save_scores(scores, directory, self.name)

    def _unit_scores(self, model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
        """Returns `heads` (L, query heads), `channels` (L, d_ff) and `hidden` (d,)."""
        squares: dict[str, Tensor] = {}
        with _mean_activations(model) as means:
            for batch in track(batches, "activations", "batch"):
                means.mask = real_tokens(batch, model.device)
                last_hidden_state(model, batch)
                for name, values in means.rows.items():
                    squares[name] = squares.get(name, 0.0) + values.square().sum(dim=0).cpu()  # (channels,)
        scores = {name: values.sqrt() for name, values in squares.items()}
        num_layers, width = len(decoder_layers(model)), head_dim(model.config)
        heads = torch.stack([scores[f"{index}.self_attn.o_proj"] for index in range(num_layers)])
        return {
            "heads": heads.view(num_layers, -1, width).norm(dim=-1),
            "channels": torch.stack([scores[f"{index}.mlp.down_proj"] for index in range(num_layers)]),
            "hidden": torch.stack([values for name, values in scores.items() if "norm" in name]).sum(0),
        }

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Keeps the highest-scoring units of each axis, the same number in every layer."""
        scores, dense, shape = load_scores(directory), config_shape(model.config), self.shape(model.config)
        num_layers = len(dense.layers)
        kept_layers = highest(scores["layers"], len(shape.layers)) if "layers" in scores else tuple(range(num_layers))
        old, new = dense.layers[0], shape.layers[0]
        width = None
        if (old, dense.hidden_size) != (new, shape.hidden_size):
            width = WidthPlan(
                heads=tuple(kept_heads(scores["heads"][layer], old, new) for layer in kept_layers),
                channels=tuple(highest(scores["channels"][layer], new.intermediate_size) for layer in kept_layers),
                hidden=None if shape.hidden_size == dense.hidden_size else highest(scores["hidden"], shape.hidden_size),
            )
        plan = PruningPlan(
            num_hidden_layers=num_layers,
            pruned_layers=tuple(layer for layer in range(num_layers) if layer not in kept_layers),
            layer_importance=tuple(scores["layers"].tolist()) if "layers" in scores else (),
            method=self.name,
            width=width,
        )
        return Compressed(apply_plan(model, plan), plan, {})


def kept_heads(scores: Tensor, old: LayerShape, new: LayerShape) -> tuple[int, ...]:
    """Returns the query heads of a layer to keep: the highest groups, and the highest heads in each of these groups.

    Args:
        scores: one per query head, (query heads,).
        old: sizes of the layer.
        new: sizes of the pruned layer.
    """
    rep, new_rep = (sizes.num_attention_heads // sizes.num_key_value_heads for sizes in (old, new))
    by_group = scores.view(-1, rep)  # group-major, as in the model
    groups = highest(by_group.norm(dim=1), new.num_key_value_heads)
    if new_rep == rep:
        return heads_of(groups, rep)
    return tuple(group * rep + head for group in groups for head in highest(by_group[group], new_rep))


def _divisor(config: PreTrainedConfig) -> int:
    """Returns the largest power of two up to `DIVISOR` that, with whole heads, is at most an eighth of the width."""
    divisor = DIVISOR
    while divisor > 1 and lcm(divisor, config.num_attention_heads) > config.hidden_size * (1 - HIDDEN_PART):
        divisor //= 2
    return divisor


class _Means:
    """Mean absolute activations over the real tokens of each row of the latest batch."""

    def __init__(self) -> None:
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self.rows: dict[str, Tensor] = {}

    def note(self, name: str, states: Tensor) -> None:
        """Records the means of `states` (B, T, channels); padding has weight 0."""
        weights = self.mask.to(states.device).double()  # (B, T)
        total = torch.einsum("bt,btc->bc", weights, states.double().abs())
        self.rows[name] = total / weights.sum(dim=1, keepdim=True).clamp_min(1)


@contextmanager
def _mean_activations(model: PreTrainedModel) -> Iterator[_Means]:
    """Yields the means of the inputs of o_proj and down_proj and the outputs of both norms, for every layer."""
    means, handles = _Means(), []

    def watch(module: nn.Module, name: str, is_input: bool) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            means.note(name, inputs[0] if is_input else output)

        handles.append(module.register_forward_hook(hook))

    for index, layer in enumerate(decoder_layers(model)):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            watch(linear_sublayers(layer)[name], f"{index}.{name}", is_input=True)
        for name in ("input_layernorm", "post_attention_layernorm"):
            watch(layer.get_submodule(name), f"{index}.{name}", is_input=False)
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
