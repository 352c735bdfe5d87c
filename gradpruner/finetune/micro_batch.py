"""`micro_batch_size=auto`: the largest micro batch that the device's memory holds, by the estimate.

Accumulation makes up for smaller micro batches: an optimizer step sees the same rows, in the same order, with the same
mean over their answer tokens, so only rounding depends on the choice.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner import processes
from gradpruner.checks import AUTO
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.precision import resolve_precision
from gradpruner.finetune.spec import SHARDED, TrainingSpec
from gradpruner.models.memory import MemoryEstimate, allocator_overhead, estimate_training_memory
from gradpruner.models.shape import ModelShape, model_shape
from gradpruner.runtime import default_device

# The estimate may be too low by 10 %. On a CPU, other processes need their share as well.
USABLE = {"cuda": 0.9, "cpu": 0.5}


def longest(rows: Sequence[TrainingRow]) -> tuple[int, int]:
    """Returns the largest length of a row, and the largest number of its positions that need logits."""
    length = max(len(row.input_ids) for row in rows)
    return length, min(length, 1 + max(row.num_answer_tokens for row in rows))


def training_memory(
    training: TrainingSpec,
    rows: Sequence[TrainingRow],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    shape: ModelShape | None = None,
) -> MemoryEstimate:
    """Estimates the peak memory of a fine-tune, with micro batches of rows that are as long as the longest one.

    Args:
        training: how to train; `micro_batch_size` is a number.
        rows: what to train on.
        config: config of the dense model.
        dtype: dtype of the weights before training.
        attn_implementation: as in `ModelSpec`.
        shape: shape of the trained model; None is the dense one.
    """
    length, positions = longest(rows)
    return estimate_training_memory(
        config,
        min(int(training.micro_batch_size), len(rows)),
        length,
        positions,
        dtype,
        precision=resolve_precision(training) if training.mode == "full" else None,
        lora_rank=training.lora_rank if training.mode == "lora" else None,
        recompute=training.gradient_checkpointing,
        accumulate=training.accumulation > 1,
        attn_implementation=attn_implementation,
        overhead=allocator_overhead(),
        shape=shape,
        shards=processes.count() if training.parallel in SHARDED else 1,
    )


def free_bytes(device: torch.device) -> int:
    """Returns the memory that this process can get on a device, what torch holds unused included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available // processes.count_on_machine()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def settle_micro_batch(
    training: TrainingSpec, num_bytes: Callable[[TrainingSpec], int], free: int, device: torch.device
) -> TrainingSpec:
    """Returns `training` with a number in place of `micro_batch_size=auto`.

    Args:
        training: how to train.
        num_bytes: estimates the peak memory of a fine-tune.
        free: bytes that the fine-tune may take, those of its weights included.
        device: where it trains.

    Returns:
        The largest divisor of the rows that a process has of a batch that fits, 1 if none does.
    """
    if training.micro_batch_size != AUTO:
        return training
    share = training.batch_size // processes.count()
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    tried = [dataclasses.replace(training, micro_batch_size=size) for size in sizes]
    return next((spec for spec in tried if num_bytes(spec) <= USABLE[device.type] * free), tried[-1])


def settle_for(
    model: PreTrainedModel, training: TrainingSpec, rows: Sequence[TrainingRow], checkpoint: Path | None = None
) -> TrainingSpec:
    """Returns `training` with a number in place of `micro_batch_size=auto`, for a model that is loaded already.

    Args:
        model: the model to train.
        training: how to train.
        rows: what to train on.
        checkpoint: Trainer checkpoint that the run resumes from. It keeps that run's number, hence its rounding.
    """
    if training.micro_batch_size != AUTO:
        return training
    if checkpoint is not None:
        size = json.loads((checkpoint / "trainer_state.json").read_text())["train_batch_size"]
        if training.batch_size % (size * processes.count()) == 0:  # unless it was made by fewer processes
            return dataclasses.replace(training, micro_batch_size=size)
    dtype, attention, shape = model.dtype, model.config._attn_implementation, model_shape(model)
    device = default_device()
    held = sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == device.type)

    def num_bytes(spec: TrainingSpec) -> int:
        return training_memory(spec, rows, model.config, dtype, attention, shape).total

    settled = settle_micro_batch(training, num_bytes, free_bytes(device) + held, device)
    smallest = min(processes.gather(int(settled.micro_batch_size)))  # all processes have the same accumulation
    return dataclasses.replace(settled, micro_batch_size=smallest)
