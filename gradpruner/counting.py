"""Parameters, multiply-accumulates, bytes and time of a model, from its config alone; no weights are loaded.

What is counted, for a model of any depth or plan:

- MACs, multiply-accumulates of the matrix products; FLOPs are twice that. Norms, activations, rotary embedding, softmax
  and biases are left out (below 1 %), as they are by every counter of MACs.
- `COMPLETE`: all linear sublayers, attention scores and values over the full square that a dense kernel computes (a
  sliding window bounds its width), and the output head on the positions that need logits.
- `TABLE_11`: linear sublayers of the decoder layers only. This gives every digit of GradPruner's Table 11
  (Llama-3.1-8B, 1 x 128 tokens): 893.35 and 530.43 GMACs, 1.79 and 1.06 TFLOPs for 32 and 19 layers. With the output
  head it would be 960.60 GMACs, with attention besides 964.89. Its 7.5 and 4.67 B parameters are the total less one
  vocabulary matrix of two (7,504,924,672 and 4,669,468,672), as of a counter given the model without its output head.
"""

import copy
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.architectures import (
    count_parameters,
    decoder_layers,
    linear_sublayers,
    lora_targets,
)
from gradpruner.runtime import default_device
from gradpruner.shape import LayerShape, ModelShape, config_shape, empty_shaped_model, head_dim

COMPLETE, TABLE_11 = "complete", "table_11"
COUNTINGS = (COMPLETE, TABLE_11)
FLOPS_PER_MAC = 2
GLIBC_OVERHEAD = 0.7


@dataclass(frozen=True)
class LayerCounts:
    """One decoder layer.

    Attributes:
        num_parameters: all parameters, norms among them.
        num_linear_parameters: weights and biases of the linear sublayers.
        linear_macs: MACs of the linear sublayers for one token.
        linear_width: sum of inputs and outputs of the linear sublayers; LoRA of rank r has r times as many parameters.
        widest: largest output of a linear sublayer, for one token.
        attention_macs: MACs of scores and values for one pair of query and key, all heads.
        kv_width: numbers that the KV cache keeps for one token.
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
    """A model, by layer.

    Attributes:
        layers: its decoder layers, first to last.
        num_embedding_parameters: input embedding; it is the output head, too, where they are tied.
        num_other_parameters: everything outside of the decoder layers but the input embedding.
        head_macs: MACs of the output head for one position.
        vocab_size: logits of one position.
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
        """All but the input embedding, which does no arithmetic: what the paper's Table 11 gives."""
        return self.num_other_parameters + sum(layer.num_parameters for layer in self.layers)

    def keep(self, kept_layers: Sequence[int]) -> "ModelCounts":
        """The model with these of its decoder layers alone, such as `PruningPlan.kept_layers`."""
        layers = tuple(self.layers[layer] for layer in kept_layers)
        return ModelCounts(
            layers, self.num_embedding_parameters, self.num_other_parameters, self.head_macs, self.vocab_size
        )

    def num_lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all linear sublayers of all decoder layers."""
        return rank * sum(layer.linear_width for layer in self.layers)

    def macs(self, batch_size: int, length: int, counting: str = COMPLETE, logit_positions: int | None = None) -> int:
        """Multiply-accumulates of one forward pass.

        Args:
            batch_size: rows.
            length: tokens a row, padding among them.
            counting: one of `COUNTINGS`, see the top of this file.
            logit_positions: positions of a row that get logits; None is all of them.

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
        """Floating-point operations of one forward pass: two a MAC. Arguments as for `macs`."""
        return FLOPS_PER_MAC * self.macs(batch_size, length, counting, logit_positions)

    def training_flops(
        self, batch_size: int, length: int, logit_positions: int, lora_rank: int | None = None, recompute: bool = False
    ) -> int:
        """Floating-point operations of one forward and backward pass.

        A matrix product has two in its backward pass, one for the gradient of its input and one for that of its
        weight; a frozen weight saves the second. Full fine-tuning is thus 3 forward passes and LoRA about 2.

        Args:
            batch_size: rows.
            length: tokens a row, padding among them.
            logit_positions: positions of a row that get logits.
            lora_rank: rank of the adapters on frozen weights; None trains all weights.
            recompute: activation checkpointing runs the decoder layers forward once more.
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
        """Bytes of the KV cache after `length` tokens; a layer with a sliding window keeps no more than that."""
        numbers = sum(layer.kv_width * _seen(layer, length) for layer in self.layers)
        return batch_size * numbers * dtype.itemsize

    def checkpoint_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights on disk; tied ones are saved once, file headers (some kB) are left out."""
        return self.num_parameters * dtype.itemsize

    def _attention_macs(self, batch_size: int, length: int) -> int:
        return batch_size * sum(layer.attention_macs * length * _seen(layer, length) for layer in self.layers)


def count_model(config: PreTrainedConfig, shape: ModelShape | None = None) -> ModelCounts:
    """Counts on the meta device.

    Args:
        config: of the dense model.
        shape: of the model to count, made from the dense one; None is the dense one itself.
    """
    shape = shape or config_shape(config)
    model = empty_shaped_model(config, shape)
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
    """Sliding window of a layer, or None. Without `layer_types` a window is that of every layer (Mistral)."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    return window if layer_types is None or layer_types[index] == "sliding_attention" else None


def _seen(layer: LayerCounts, length: int) -> int:
    return length if layer.window is None else min(length, layer.window)


# ---- estimates ----


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs at its peak, besides Python and its libraries.

    Attributes:
        weights: of the model, and of the adapters if there are any.
        gradients: of what is trained.
        moments: AdamW's two.
        activations: what the backward pass of one micro batch needs.
        transient: the largest of what comes and goes: logits with their loss, or the inside of a layer's backward pass.
        factors: what the importance run holds of a step until it is on disk; otherwise 0.
        allocator: freed memory that the allocator does not give back, see `allocator_overhead`.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    transient: int
    factors: int = 0
    allocator: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def estimate_training_memory(
    config: PreTrainedConfig,
    batch_size: int,
    length: int,
    logit_positions: int,
    dtype: torch.dtype,
    *,
    lora_rank: int | None = None,
    recompute: bool = False,
    accumulate: bool = False,
    keep_factors: bool = False,
    attn_implementation: str = "auto",
    overhead: float = 0.0,
    shape: ModelShape | None = None,
) -> MemoryEstimate:
    """Peak memory of fine-tuning.

    Activations are not guessed: one and two layers of each shape run forward on tensors without storage, and what
    autograd saves is added up; depth is linear.

    Args:
        config: of the dense model.
        batch_size: rows of a micro batch.
        length: tokens of its rows, padding among them.
        logit_positions: positions of a row that get logits.
        dtype: of the weights.
        lora_rank: rank of the adapters on frozen weights; None trains all weights.
        recompute: activation checkpointing: keep each layer's input only, and one layer's activations at a time.
        accumulate: several micro batches a step, so that gradients are there while activations are.
        keep_factors: the importance run, which copies the adapters' gradients in float32.
        attn_implementation: as in `ModelSpec`; `eager` keeps attention matrices.
        overhead: what the allocator keeps besides, as a part of all activations; see `allocator_overhead`.
        shape: of the model that is trained; None is the dense one.
    """
    shape = shape or config_shape(config)
    if attn_implementation == "eager":
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
    counts, num_layers = count_model(config, shape), len(shape.layers)
    # peft keeps adapters in float32 even where the weights are not.
    adapters = 4 * counts.num_lora_parameters(lora_rank) if lora_rank else 0
    weights = counts.num_parameters * dtype.itemsize
    trained = adapters if lora_rank else weights
    own: dict[LayerShape, int] = {}
    for sizes in set(shape.layers):
        one, two = (
            saved_activation_bytes(
                config, ModelShape(shape.hidden_size, (sizes,) * n), batch_size, length, lora_rank, dtype
            )
            for n in (1, 2)
        )
        own[sizes], outside = two - one, 2 * one - two
    layers, layer = sum(own[sizes] for sizes in shape.layers), max(own.values())
    hidden = batch_size * length * shape.hidden_size * dtype.itemsize
    activations = outside + (num_layers * hidden + layer if recompute else layers)
    logits = _loss_bytes(batch_size * logit_positions * counts.vocab_size, dtype)
    inside = 3 * batch_size * length * max(part.widest for part in counts.layers) * dtype.itemsize
    transient = max(logits, inside)
    # Recomputed activations come and go all the same, and leave the same holes.
    allocator = round(overhead * (outside + layers + transient))
    gradients = trained
    if not (accumulate or lora_rank):
        # Gradients come while activations go: a step peaks either before its backward pass or after it.
        before, after = activations + transient, max(trained, layer)
        if before >= after:
            gradients = 0
        else:
            activations, transient = 0, 0
    return MemoryEstimate(
        weights=weights + adapters,
        gradients=gradients,
        moments=2 * trained,
        activations=activations,
        transient=transient,
        factors=adapters if keep_factors else 0,
        allocator=allocator,
    )


def allocator_overhead() -> float:
    """Freed memory that the allocator keeps, as a part of all activations of a micro batch.

    On a CPU glibc serves tensors up to 32 MB from a heap with holes: 0.4 to 0.8 in runs of SmolLM2-135M, LoRA and full,
    with and without activation checkpointing. MALLOC_MMAP_THRESHOLD_=65536 in the environment makes it 0 (within 6 %),
    at the price of slower steps. CUDA's allocator counts live tensors.
    """
    if default_device().type != "cpu" or platform.libc_ver()[0] != "glibc":
        return 0.0
    return 0.0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else GLIBC_OVERHEAD


def _loss_bytes(num_logits: int, dtype: torch.dtype) -> int:
    """Logits, log-probabilities and their gradient, computed in float32; narrower logits have a copy besides."""
    return num_logits * (3 * 4 + (dtype.itemsize if dtype.itemsize < 4 else 0))


def saved_activation_bytes(
    config: PreTrainedConfig,
    shape: ModelShape,
    batch_size: int,
    length: int,
    lora_rank: int | None,
    dtype: torch.dtype,
) -> int:
    """Bytes that autograd saves in a forward pass of a model of that shape, without logits; no arithmetic."""
    model = _empty_training_model(config, shape, lora_rank, dtype)
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), default_device()
    values = {
        name: FakeTensor(mode, tensor.detach(), device).requires_grad_(tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    own = {value.untyped_storage()._cdata for value in values.values()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": tokens}
        functional_call(model, values, kwargs={**inputs, "use_cache": False, "logits_to_keep": 1}, tie_weights=True)
    return sum(storage.nbytes() for storage in saved.values())


def _empty_training_model(
    config: PreTrainedConfig, shape: ModelShape, lora_rank: int | None, dtype: torch.dtype
) -> PreTrainedModel:
    model = empty_shaped_model(config, shape).to(dtype).train()
    if lora_rank is None:
        return model
    lora = LoraConfig(r=lora_rank, target_modules=lora_targets(model), task_type="CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(model, lora)


def measure_matmul_flops(dtype: torch.dtype, seconds: float = 0.3, rows: int = 512, width: int = 1024) -> float:
    """Floating-point operations a second that this machine reaches in matrix products, now, at this dtype.

    Training reaches less: norms, attention and small products are slower a FLOP. Times from it are lower bounds.

    Args:
        dtype: of both factors.
        seconds: how long to measure, after one product to warm up.
        rows: tokens of the left factor.
        width: inputs and outputs of the right factor.
    """
    device = default_device()
    left, right = (torch.randn(n, width, device=device).to(dtype) for n in (rows, width))
    best = float("inf")
    _timed_matmul(left, right)
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
