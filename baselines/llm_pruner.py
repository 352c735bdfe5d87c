"""LLM-Pruner: prune the KV groups and MLP channels with the least weight times gradient (Ma et al., arXiv:2305.11627).

Block-wise pruning, as in all published runs: KV groups and MLP channels of the middle layers, ranked within each layer.
With W a weight, g its gradient for the calibration rows and a the mean over rows of its squared gradient for one row:

    param_first   sum |W g|                 vectorize   |sum W g|
    param_second  sum |W a W|               l1, l2      sum |W|, sum W^2
    param_mix     sum |W g - W a W / 2|     random

summed along the other dimension of the matrix, then over the matrices of a unit, then over the channels of a head.

Deviations from the code (horseee/LLM-Pruner): calibration uses rows of the downstream task instead of windows of 64
tokens of BookCorpus; query heads are folded into the KV head that they read (`gqa_fold=reference` gives the code's
fold, which adds up heads of other groups); counts meet a parameter budget (`match=native` gives the code's counts);
gradients exist for one matrix at a time, where the code holds two full copies of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from baselines.calibration import checked
from baselines.taylor_scores import (
    CRITERIA,
    GROUPINGS,
    MLP,
    TAYLOR,
    channel_scores,
    combine,
    for_each_gradient,
    group_scores,
)
from baselines.width_pruning import (
    WidthPruning,
    heads_of,
    highest,
    load_scores,
    save_scores,
    training_spec,
)
from gradpruner.budget import counted_parameters, solve_size, target_parameters
from gradpruner.checks import check_choice, check_positive
from gradpruner.encoding import IGNORED, Batch
from gradpruner.method import Calibration, Compressed, Recovery
from gradpruner.models.architectures import check_finite_weights, decoder_layers, linear_sublayers
from gradpruner.models.counting import count_model
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, head_dim
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.surgery import apply_plan
from gradpruner.width_surgery import READS_HIDDEN, head_channels

GQA_FOLDS = ("exact", "reference")


@dataclass(frozen=True)
class LlmPruner(WidthPruning):
    """Pruning of KV groups and MLP channels by a Taylor expansion of the loss.

    Attributes:
        ratio: fraction of the KV channels and MLP channels to prune per layer in the range, for `match=native`.
        criterion: one of `CRITERIA`.
        grouping: how the scores of a unit's matrices are combined, one of `GROUPINGS`; None is `sum` for the criteria
            with gradients and `mean` for the others, as in the code.
        first_layer: first layer to narrow; None scales the paper's 4 of 32.
        end_layer: one past the last layer to narrow; None scales the paper's 30 of 32.
        uniform: narrow all layers alike, which gives a stock checkpoint; the range is then all layers.
        iterative_steps: number of cuts; units are scored again before each cut.
        gqa_fold: `exact` or `reference`, see above.
        num_rows: training rows for calibration, which go through the model as one batch.
        seed: seed of the row sample and of `random`.
        recover_on: dataset to train on between pruning and the fine-tune, such as alpaca; None skips this training.
        recover_settings: settings of that dataset.
        recover_training: how to train on that dataset, as in `finetune`.
    """

    name: ClassVar[str] = "llm_pruner"

    ratio: float | None = None
    criterion: str = "param_first"
    grouping: str | None = None
    first_layer: int | None = None
    end_layer: int | None = None
    uniform: bool = False
    iterative_steps: int = 1
    gqa_fold: str = "exact"
    num_rows: int = 10
    seed: int = 0
    recover_on: str | None = None
    recover_settings: dict[str, Any] | None = None
    recover_training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work or contradict each other."""
        super().__post_init__()
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("gqa_fold", self.gqa_fold, GQA_FOLDS)
        if self.grouping is not None:
            check_choice("grouping", self.grouping, GROUPINGS)
        check_positive(self, "iterative_steps", "num_rows")
        if (self.ratio is not None) != (self.match == "native"):
            raise ValueError(
                f"ratio is for match=native and needed there, got ratio={self.ratio} and match={self.match}. "
                "Set method.ratio (the code's 0.25, for example) with method.match=native, or neither."
            )
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio is a part of the units, in [0, 1), got {self.ratio}. The code's is 0.25.")
        if self.uniform and not (self.first_layer is self.end_layer is None):
            raise ValueError(
                f"uniform=true makes all layers narrower, got first_layer={self.first_layer} and "
                f"end_layer={self.end_layer}. Set them to null, or method.uniform=false."
            )
        self.recovery()  # checks its own values

    # ---- sizes ----

    def narrower_shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the code's counts for `native`; otherwise its KV groups and the MLP width that meets the budget."""
        dense, width = config_shape(config), head_dim(config)
        layer, cut = dense.layers[0], self._range(len(dense.layers))
        if self.sparsity == 0.0 and self.match != "native":
            return dense
        target = None if self.match == "native" else target_parameters(config, self.sparsity, self.match)
        ratio = self.ratio
        if target is not None:
            counts = count_model(config)
            in_range = sum(counts.layers[index].num_parameters for index in cut)
            ratio = (counted_parameters(counts, self.match) - target) / in_range
        assert ratio is not None
        kept_groups = layer.num_key_value_heads - num_removed(layer.num_key_value_heads * width, ratio) // width
        kept_groups = max(1, kept_groups)
        rep = layer.num_attention_heads // layer.num_key_value_heads
        if self.uniform:
            # transformers refuses a Llama config whose hidden size is not a multiple of the number of heads.
            fitting = (n for n in range(kept_groups, layer.num_key_value_heads) if config.hidden_size % (n * rep) == 0)
            kept_groups = next(fitting, layer.num_key_value_heads)

        def make_shape(intermediate_size: int) -> ModelShape:
            narrow = LayerShape(kept_groups * rep, kept_groups, intermediate_size)
            return replace(dense, layers=tuple(narrow if n in cut else own for n, own in enumerate(dense.layers)))

        if target is None:
            return make_shape(max(1, layer.intermediate_size - num_removed(layer.intermediate_size, ratio)))
        return make_shape(solve_size("MLP width", make_shape, config, target, self.match, layer.intermediate_size))

    def _range(self, num_layers: int) -> range:
        """Returns the layers to narrow."""
        if self.uniform:
            return range(num_layers)
        first = round(num_layers * 4 / 32) if self.first_layer is None else self.first_layer
        end = num_layers - round(num_layers * 2 / 32) if self.end_layer is None else self.end_layer
        if not 0 <= first < end <= num_layers:
            raise ValueError(
                f"Layers from first_layer up to end_layer become narrower, out of {num_layers}, got {first} and {end}. "
                "Change method.first_layer and method.end_layer."
            )
        return range(first, end)

    # ---- the methods of `Method` ----

    def variant(self) -> str:
        """Returns how much is pruned and by which criterion."""
        ratio = "" if self.ratio is None else f"{self.ratio}"
        return f"{super().variant()}{ratio}-{self.criterion}" + ("-uniform" if self.uniform else "")

    def calibration(self) -> Calibration | None:
        """Returns which few rows of the training split to use, each at most once; None without gradients."""
        if self.criterion not in TAYLOR:
            return None
        return Calibration(self.num_rows, self.num_rows, self.seed, once=True)

    def measurement_settings(self) -> dict[str, Any]:
        """Returns all settings that change the scores; with one cut, the scores serve every budget."""
        settings = asdict(self)
        for name in ("recover_on", "recover_settings", "recover_training"):
            del settings[name]
        if self.iterative_steps == 1:
            for name in ("sparsity", "match", "ratio"):
                del settings[name]
        return settings

    def recovery(self) -> Recovery | None:
        """Returns the training on instructions that the authors do; None by default."""
        return Recovery(training_spec(self.recover_training, self.name)) if self.recover_on else None

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Scores all KV groups and MLP channels in the range; leaves the model unchanged.

        Raises:
            ValueError: if weights or scores are not finite, or gradients are needed and there is no data.
        """
        check_finite_weights(model)
        batch = self._one_batch(batches, model.config.pad_token_id or 0)
        dense = config_shape(model.config)
        cut, last = self._range(len(dense.layers)), self.narrower_shape(model.config)
        scores = {
            "kv_groups": torch.zeros(len(dense.layers), dense.layers[0].num_key_value_heads, dtype=torch.float64),
            "channels": torch.zeros(len(dense.layers), dense.layers[0].intermediate_size, dtype=torch.float64),
        }
        columns = {
            (index, name): linear_sublayers(decoder_layers(model)[index])[name].weight
            for index in cut
            for name in ("self_attn.o_proj", "mlp.down_proj")
        }
        steps = self.iterative_steps
        originals = {key: weight.detach().clone() for key, weight in columns.items()} if steps > 1 else {}
        try:
            for step in tqdm(range(1, steps + 1), desc="llm_pruner", unit="cut", disable=steps == 1):
                gone = {kind: values == -torch.inf for kind, values in scores.items()}
                for index, own in self._unit_scores(model, batch, cut).items():
                    for kind, values in own.items():
                        scores[kind][index] = values
                for kind, values in scores.items():
                    values[gone[kind]] = -torch.inf
                if step < steps:
                    for index in cut:
                        self._cut(scores, index, dense.layers[index], last.layers[index], step / steps, columns)
        finally:
            for key, original in originals.items():
                columns[key].data.copy_(original)
        save_scores(scores, directory, self.name)

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Prunes the lowest-scoring units of every layer in the range."""
        scores, dense, shape = load_scores(directory), config_shape(model.config), self.shape(model.config)
        rep = dense.layers[0].num_attention_heads // dense.layers[0].num_key_value_heads
        heads, channels = [], []
        for index, sizes in enumerate(shape.layers):
            heads.append(heads_of(highest(scores["kv_groups"][index], sizes.num_key_value_heads), rep))
            channels.append(highest(scores["channels"][index], sizes.intermediate_size))
        width = None if shape == dense else WidthPlan(tuple(heads), tuple(channels))
        plan = PruningPlan(num_hidden_layers=len(dense.layers), method=self.name, width=width)
        return Compressed(apply_plan(model, plan), plan, {})

    # ---- scores ----

    def _one_batch(self, batches: Iterable[Batch], pad_token_id: int) -> Batch | None:
        """Returns all rows as one batch: |W g| of all rows is not the sum of |W g| over batches."""
        if self.criterion not in TAYLOR:
            return None
        taken = checked(batches, self)
        length = max(batch["input_ids"].shape[1] for batch in taken)
        fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.cat(
                [functional.pad(batch[name], (length - batch[name].shape[1], 0), value=value) for batch in taken]
            )
            for name, value in fill.items()
        }

    def _unit_scores(self, model: PreTrainedModel, batch: Batch | None, cut: range) -> dict[int, dict[str, Tensor]]:
        """Returns `kv_groups` and `channels` of every layer in the range."""
        sizes, width = config_shape(model.config).layers[0], head_dim(model.config)
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            counts = {"kv_groups": sizes.num_key_value_heads, "channels": sizes.intermediate_size}
            return {
                index: {
                    kind: torch.rand(count, generator=generator, dtype=torch.float64) for kind, count in counts.items()
                }
                for index in cut
            }
        vectors: dict[int, dict[str, Tensor]] = {index: {} for index in cut}

        def note(index: int, name: str, weight: Tensor, gradient: Tensor | None, fisher: Tensor | None) -> None:
            vectors[index][name] = channel_scores(weight, self.criterion, name in READS_HIDDEN, gradient, fisher)

        if batch is None:
            for index in cut:
                for name, linear in linear_sublayers(decoder_layers(model)[index]).items():
                    note(index, name, linear.weight.detach(), None, None)
        else:
            squares = self.criterion in ("param_second", "param_mix")
            for_each_gradient(model, batch, cut, note, squares)
        grouping = self.grouping or ("sum" if self.criterion in TAYLOR else "mean")
        return {
            index: {
                "kv_groups": group_scores(own, sizes, width, grouping, self.gqa_fold),
                "channels": combine([own[name] for name in MLP], grouping),
            }
            for index, own in vectors.items()
        }

    def _cut(
        self,
        scores: dict[str, Tensor],
        index: int,
        dense: LayerShape,
        last: LayerShape,
        part: float,
        columns: Mapping[tuple[int, str], Tensor],
    ) -> None:
        """Zeroes the fraction `part` of a layer's units to prune, which changes outputs as removing them would."""
        rep, sizes = dense.num_attention_heads // dense.num_key_value_heads, {}
        sizes["kv_groups"] = (dense.num_key_value_heads, last.num_key_value_heads)
        sizes["channels"] = (dense.intermediate_size, last.intermediate_size)
        for kind, (before, after) in sizes.items():
            kept = highest(scores[kind][index], before - int((before - after) * part))
            gone = sorted(set(range(before)) - set(kept))
            scores[kind][index, gone] = -torch.inf
            if kind == "kv_groups":
                output = columns[index, "self_attn.o_proj"].data
                output[:, head_channels(heads_of(gone, rep), output.shape[1] // dense.num_attention_heads)] = 0
            else:
                columns[index, "mlp.down_proj"].data[:, gone] = 0


def num_removed(count: int, ratio: float) -> int:
    """Returns how many of `count` channels are pruned, rounded as in the code."""
    return count - int(count * (1.0 - ratio))
