"""Parameters, multiply-accumulates and bytes of a model, from its config alone; no weights are loaded.

The counts are defined for a model of any depth or plan:

- MACs, multiply-accumulates of the matrix products; FLOPs are twice that. Norms, activations, rotary embedding, softmax
  and biases are not counted (below 1 %), as in every counter of MACs.
- `COMPLETE`: all linear sublayers, attention scores and values over the full square that a dense kernel computes (a
  sliding window bounds its width), and the output head on the positions that need logits.
- `TABLE_11`: linear sublayers of the decoder layers only. This gives every digit of GradPruner's Table 11
  (Llama-3.1-8B, 1 x 128 tokens): 893.35 and 530.43 GMACs, 1.79 and 1.06 TFLOPs for 32 and 19 layers. With the output
  head it would be 960.60 GMACs, with attention as well 964.89. The 7.5 and 4.67 B parameters of Table 11 are the total
  less one of the two vocabulary matrices (7,504,924,672 and 4,669,468,672), as a counter gives for the model without
  its output head.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.models.architectures import (
    count_parameters,
    decoder_layers,
    linear_sublayers,
)
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, empty_shaped_model, head_dim
from gradpruner.runtime import default_device

COMPLETE, TABLE_11 = "complete", "table_11"
COUNTINGS = (COMPLETE, TABLE_11)
FLOPS_PER_MAC = 2
ROW_LENGTH = 128  # tokens of the row whose forward pass Table 11 and our records count


@dataclass(frozen=True)
class LayerCounts:
    """Counts of one decoder layer.

    Attributes:
        num_parameters: all parameters, including norms.
        num_linear_parameters: weights and biases of the linear sublayers.
        linear_macs: MACs of the linear sublayers per token.
        linear_width: sum of inputs and outputs of the linear sublayers; LoRA of rank r has r times as many parameters.
        widest: largest output of a linear sublayer, per token.
        attention_macs: MACs of scores and values per pair of query and key, all heads.
        kv_width: numbers that the KV cache keeps per token.
        window: tokens that a query sees, or None for all.
    """

    num_parameters: int
    num_linear_parameters: int
    linear_macs: int
    linear_width: int
    widest: int
    attention_macs: int
    kv_width: int
    window: int | None


@dataclass(frozen=True)
class ModelCounts:
    """Counts of a model, layer by layer.

    Attributes:
        layers: counts of the decoder layers, first to last.
        num_embedding_parameters: input embedding, which is also the output head if the two are tied.
        num_other_parameters: everything outside the decoder layers except the input embedding.
        head_macs: MACs of the output head per position.
        vocab_size: logits per position.
    """

    layers: tuple[LayerCounts, ...]
    num_embedding_parameters: int
    num_other_parameters: int
    head_macs: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """All parameters; tied ones count once."""
        return self.num_embedding_parameters + self.num_parameters_without_embedding

    @property
    def num_parameters_without_embedding(self) -> int:
        """All but the input embedding, which does no arithmetic; the number in the paper's Table 11."""
        return self.num_other_parameters + sum(layer.num_parameters for layer in self.layers)

    def keep(self, kept_layers: Sequence[int]) -> "ModelCounts":
        """Returns the counts of the model with only these decoder layers, such as `PruningPlan.kept_layers`."""
        layers = tuple(self.layers[layer] for layer in kept_layers)
        return ModelCounts(
            layers, self.num_embedding_parameters, self.num_other_parameters, self.head_macs, self.vocab_size
        )

    def num_lora_parameters(self, rank: int) -> int:
        """Returns the parameters of LoRA adapters on all linear sublayers of all decoder layers."""
        return rank * sum(layer.linear_width for layer in self.layers)

    def macs(self, batch_size: int, length: int, counting: str = COMPLETE, logit_positions: int | None = None) -> int:
        """Returns the multiply-accumulates of one forward pass.

        Args:
            batch_size: rows.
            length: tokens per row, including padding.
            counting: one of `COUNTINGS`, see the top of this file.
            logit_positions: positions per row that get logits; None is all of them.

        Raises:
            ValueError: if `counting` is unknown.
        """
        if counting not in COUNTINGS:
            raise ValueError(f"counting must be one of {', '.join(COUNTINGS)}, got {counting!r}.")
        tokens = batch_size * length
        linear = tokens * sum(layer.linear_macs for layer in self.layers)
        if counting == TABLE_11:
            return linear
        head = batch_size * (length if logit_positions is None else logit_positions) * self.head_macs
        return linear + self._attention_macs(batch_size, length) + head

    def flops(self, batch_size: int, length: int, counting: str = COMPLETE, logit_positions: int | None = None) -> int:
        """Returns the floating-point operations of one forward pass: two per MAC. Arguments as for `macs`."""
        return FLOPS_PER_MAC * self.macs(batch_size, length, counting, logit_positions)

    def training_flops(
        self, batch_size: int, length: int, logit_positions: int, lora_rank: int | None = None, recompute: bool = False
    ) -> int:
        """Returns the floating-point operations of one forward and backward pass.

        The backward pass of a matrix product takes two products: one for the gradient of the input, and one for the
        gradient of the weight, which a frozen weight saves. Full fine-tuning thus costs 3 forward passes, LoRA about 2.

        Args:
            batch_size: rows.
            length: tokens per row, including padding.
            logit_positions: positions per row that get logits.
            lora_rank: rank of the adapters on frozen weights; None trains all weights.
            recompute: activation checkpointing, which runs the decoder layers forward once more.
        """
        tokens = batch_size * length
        linear = tokens * sum(layer.linear_macs for layer in self.layers)
        attention = self._attention_macs(batch_size, length)
        adapters = tokens * self.num_lora_parameters(lora_rank) if lora_rank else 0
        head = batch_size * logit_positions * self.head_macs
        frozen = 2 if lora_rank else 3
        again = linear + attention + adapters if recompute else 0
        return FLOPS_PER_MAC * (frozen * (linear + head) + 3 * (attention + adapters) + again)

    def kv_cache_bytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Returns the bytes of the KV cache after `length` tokens; a sliding window limits the tokens of its layer."""
        numbers = sum(layer.kv_width * _seen(layer, length) for layer in self.layers)
        return batch_size * numbers * dtype.itemsize

    def checkpoint_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the weights on disk, tied ones once, without file headers (some kB)."""
        return self.num_parameters * dtype.itemsize

    def _attention_macs(self, batch_size: int, length: int) -> int:
        return batch_size * sum(layer.attention_macs * length * _seen(layer, length) for layer in self.layers)


def count_model(config: PreTrainedConfig, shape: ModelShape | None = None) -> ModelCounts:
    """Counts a model on the meta device.

    Args:
        config: config of the dense model.
        shape: shape of the model to count, which is made from the dense one; None counts the dense one.
    """
    shape = shape or config_shape(config)
    known = (config.to_json_string(use_diff=False), shape)  # a dry run and the plan of a run ask many times
    if known not in _counts:
        _counts[known] = _count(empty_shaped_model(config, shape), shape)
    return _counts[known]


_counts: dict[tuple[str, ModelShape], ModelCounts] = {}


def _count(model: PreTrainedModel, shape: ModelShape) -> ModelCounts:
    layers = tuple(
        _count_layer(layer, model.config, sizes, index)
        for index, (layer, sizes) in enumerate(zip(decoder_layers(model), shape.layers, strict=True))
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = sum(layer.num_parameters for layer in layers)
    return ModelCounts(
        layers=layers,
        num_embedding_parameters=embedding.weight.numel(),
        num_other_parameters=count_parameters(model) - inside - embedding.weight.numel(),
        head_macs=head.weight.numel(),
        vocab_size=head.weight.shape[0],
    )


def _count_layer(layer: nn.Module, config: PreTrainedConfig, sizes: LayerShape, index: int) -> LayerCounts:
    linears = linear_sublayers(layer).values()
    width = head_dim(config)
    return LayerCounts(
        num_parameters=count_parameters(layer),
        num_linear_parameters=sum(count_parameters(linear) for linear in linears),
        linear_macs=sum(linear.weight.numel() for linear in linears),
        linear_width=sum(linear.in_features + linear.out_features for linear in linears),
        widest=max(linear.out_features for linear in linears),
        attention_macs=2 * sizes.num_attention_heads * width,
        kv_width=2 * sizes.num_key_value_heads * width,
        window=_window(config, index),
    )


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """Returns the sliding window of a layer, or None. Without `layer_types`, all layers share one (Mistral)."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    return window if layer_types is None or layer_types[index] == "sliding_attention" else None


def _seen(layer: LayerCounts, length: int) -> int:
    return length if layer.window is None else min(length, layer.window)


def measure_matmul_flops(dtype: torch.dtype, seconds: float = 0.3, rows: int = 512, width: int = 1024) -> float:
    """Measures the floating-point operations per second that matrix products reach on this machine now.

    Training reaches less, because norms, attention and small products take longer per FLOP. Times computed from this
    rate are lower bounds.

    Args:
        dtype: dtype of both factors.
        seconds: how long to measure, after one product to warm up.
        rows: rows (tokens) of the left factor.
        width: inputs and outputs of the right factor.
    """
    device = default_device()
    left, right = (torch.randn(n, width, device=device).to(dtype) for n in (rows, width))
    best = float("inf")
    _timed_matmul(left[: max(1, rows // 16)], right)  # a few rows: bfloat16 takes seconds on some CPUs
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed_matmul(left, right))
    return FLOPS_PER_MAC * rows * width * width / best


def _timed_matmul(left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    product = left @ right
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
