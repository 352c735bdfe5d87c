"""What a run times: training steps and inference of its result, beside the dense model, on rows like its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gradpruner import speed
from gradpruner.encoding import TrainingRow
from gradpruner.finetune import TrainingSpec
from gradpruner.models import ModelSpec
from gradpruner.speed import Model, Workload


def workload_like(model: ModelSpec, training: TrainingSpec, rows: Sequence[TrainingRow]) -> Workload:
    """Steps of one micro batch of rows of the mean length."""
    length = round(sum(len(row.input_ids) for row in rows) / len(rows))
    answer = round(sum(row.num_answer_tokens for row in rows) / len(rows))
    return Workload(
        mode=training.mode,
        lora_rank=training.lora_rank,
        gradient_checkpointing=training.gradient_checkpointing,
        train_rows=training.micro_batch_size,
        train_tokens=length,
        answer_tokens=min(answer, length - 1),
        dtype=str(model.torch_dtype).removeprefix("torch."),
        attn_implementation=model.attn_implementation,
        rounds=1,
    )


def compare(dense: Model, own: Model, workload: Workload, roles: Sequence[str]) -> dict[str, Any]:
    """Times both in turns; a model that is its own twin once.

    Returns:
        JSON-ready: the `workload`, the phases of `dense` and `own`, and their `ratios`.
    """
    is_dense = own[1] == dense[1]
    found = speed.measure({"dense": dense} if is_dense else {"dense": dense, "own": own}, workload, roles)
    dense_phases, own_phases = found["dense"], found["dense" if is_dense else "own"]
    return {
        "workload": dataclasses.asdict(workload),
        "dense": {name: phase.to_dict() for name, phase in dense_phases.items()},
        "own": {name: phase.to_dict() for name, phase in own_phases.items()},
        "ratios": speed.ratios(own_phases, dense_phases),
    }
