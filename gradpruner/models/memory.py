"""Peak memory of training, estimated from a config; no weights are loaded."""

import copy
import dataclasses
import math
import os
import platform
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.models.architectures import lora_targets
from gradpruner.models.counting import count_model
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, empty_shaped_model
from gradpruner.runtime import default_device

GLIBC_OVERHEAD = 0.7
BLOCK_8BIT = 256  # parameters that share a scale in 8-bit moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs at its peak, besides Python and its libraries.

    Attributes:
        weights: weights of the model, and of the adapters if there are any.
        gradients: gradients of the trained weights.
        moments: AdamW's two moments.
        activations: activations kept for the backward pass of one micro batch.
        transient: largest short-lived tensors: logits with their loss, or the inside of a layer's backward pass.
        factors: factors of one step that the importance run holds until they are on disk; otherwise 0.
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
        """Sum of all attributes."""
        return sum(vars(self).values())


def estimate_training_memory(
    config: PreTrainedConfig,
    batch_size: int,
    length: int,
    logit_positions: int,
    dtype: torch.dtype,
    *,
    precision: str | None = None,
    lora_rank: int | None = None,
    recompute: bool = False,
    accumulate: bool = False,
    keep_factors: bool = False,
    attn_implementation: str = "auto",
    overhead: float = 0.0,
    shape: ModelShape | None = None,
    shards: int = 1,
) -> MemoryEstimate:
    """Estimates the peak memory of fine-tuning.

    Activations are measured: one and two layers of each shape run forward on tensors without storage, and the tensors
    that autograd saves are added up. The total is linear in depth.

    Args:
        config: config of the dense model.
        batch_size: rows per micro batch.
        length: tokens per row, including padding.
        logit_positions: positions per row that get logits.
        dtype: dtype of the weights.
        precision: one of `finetune.spec.PRECISIONS` but `auto`: the dtypes of a full fine-tune. None: `dtype` for all.
        lora_rank: rank of the adapters on frozen weights; None trains all weights.
        recompute: activation checkpointing: keep each layer's input only, and one layer's activations at a time.
        accumulate: several micro batches per step, so that gradients and activations are held at the same time.
        keep_factors: the importance run, which copies the adapters' gradients in float32.
        attn_implementation: as in `ModelSpec`; `eager` keeps attention matrices.
        overhead: memory that the allocator keeps, as a fraction of all activations; see `allocator_overhead`.
        shape: shape of the trained model; None is the dense one.
        shards: processes among which weights, gradients and moments are divided. Each also holds two whole layers, the
            embedding and the output head; and all weights, alone, before they are divided.
    """
    shape = shape or config_shape(config)
    if attn_implementation == "eager":
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
    counts, num_layers = count_model(config, shape), len(shape.layers)
    autocast = precision == "bf16_mixed"
    if lora_rank is None and precision is not None:
        dtype = torch.bfloat16 if precision == "bf16_stochastic" else torch.float32
    activation_dtype = torch.bfloat16 if autocast else dtype
    # peft keeps adapters in float32, whatever the dtype of the weights.
    adapters = 4 * counts.num_lora_parameters(lora_rank) if lora_rank else 0
    weights = counts.num_parameters * dtype.itemsize
    trained = adapters if lora_rank else weights
    own: dict[LayerShape, int] = {}
    for sizes in set(shape.layers):
        one, two = (
            saved_activation_bytes(
                config, ModelShape(shape.hidden_size, (sizes,) * n), batch_size, length, lora_rank, dtype, autocast
            )
            for n in (1, 2)
        )
        own[sizes], outside = two - one, 2 * one - two
    layers, layer = sum(own[sizes] for sizes in shape.layers), max(own.values())
    hidden = batch_size * length * shape.hidden_size * activation_dtype.itemsize
    # Autocast keeps its copies of all weights until the forward pass ends; without recomputation they are activations.
    copies = 2 * sum(part.num_linear_parameters for part in counts.layers) if autocast and lora_rank is None else 0
    activations = outside + (num_layers * hidden + max(layer, copies) if recompute else layers)
    logits = _loss_bytes(batch_size * logit_positions * counts.vocab_size, activation_dtype)
    inside = 3 * batch_size * length * max(part.widest for part in counts.layers) * activation_dtype.itemsize
    transient = max(logits, inside)
    # Recomputed activations are allocated and freed all the same, with the same holes in the heap.
    allocator = round(overhead * (outside + layers + transient))
    gradients = trained
    if not (accumulate or lora_rank):
        # Activations are freed while gradients are made: a step peaks before its backward pass, in the first decoder
        # layer, which comes last, or after it.
        missing = counts.layers[0].num_parameters
        if not config.tie_word_embeddings:
            missing += counts.num_embedding_parameters
        in_first = (trained - missing * dtype.itemsize, layer, inside)
        gradients, activations, transient = max((0, activations, transient), in_first, (trained, 0, 0), key=sum)
    moments = 2 * (_bytes_8bit(counts.num_parameters) if precision == "bf16_stochastic" else trained)
    gathered = 0
    if shards > 1:
        heads = 1 if config.tie_word_embeddings else 2
        gathered = 2 * max(part.num_parameters for part in counts.layers) + heads * counts.num_embedding_parameters
    estimate = MemoryEstimate(
        weights=-(-(weights + adapters) // shards) + gathered * activation_dtype.itemsize,
        gradients=-(-gradients // shards),
        moments=-(-moments // shards),
        activations=activations,
        transient=transient,
        factors=adapters if keep_factors else 0,
        allocator=allocator,
    )
    undivided = max(0, weights + adapters - estimate.total)
    return dataclasses.replace(estimate, weights=estimate.weights + undivided)


def allocator_overhead() -> float:
    """Returns the freed memory that the allocator keeps, as a fraction of all activations of a micro batch.

    On a CPU, glibc serves tensors up to 32 MB from a heap with holes: the fraction was 0.4 to 0.8 in runs of
    SmolLM2-135M, LoRA and full, with and without activation checkpointing. MALLOC_MMAP_THRESHOLD_=65536 in the
    environment makes it 0 (within 6 %) but slows steps down. CUDA's allocator counts live tensors.
    """
    if default_device().type != "cpu" or platform.libc_ver()[0] != "glibc":
        return 0.0
    return 0.0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else GLIBC_OVERHEAD


def _bytes_8bit(num_parameters: int) -> int:
    """Returns the bytes of a moment in torchao's 8-bit AdamW: one per parameter, and a float32 scale per block."""
    return num_parameters + 4 * math.ceil(num_parameters / BLOCK_8BIT)


def _loss_bytes(num_logits: int, dtype: torch.dtype) -> int:
    """Returns bytes of logits, log-probabilities and their gradient in float32, plus a copy of narrower logits."""
    return num_logits * (3 * 4 + (dtype.itemsize if dtype.itemsize < 4 else 0))


def saved_activation_bytes(
    config: PreTrainedConfig,
    shape: ModelShape,
    batch_size: int,
    length: int,
    lora_rank: int | None,
    dtype: torch.dtype,
    autocast: bool = False,
) -> int:
    """Returns the bytes that autograd saves in a forward pass of that shape, without logits; computes nothing."""
    model = _empty_training_model(config, shape, lora_rank, dtype)
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), default_device()
    values = {
        name: FakeTensor(mode, tensor.detach(), device).requires_grad_(tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    own = {value.untyped_storage()._cdata for value in values.values()}
    saved: dict[int, torch.UntypedStorage] = {}  # a storage that is held keeps its address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    cast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast)
    with mode, cast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
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
